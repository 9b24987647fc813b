"""Runs of several processes, as a pod starts them: on this machine's CPU, with gloo between
them.
"""

import json
import os
import signal
import socket
import subprocess
import threading
import time

import jax
import pytest

from benchmarks import kills
from tips_jax.core import schema
from tips_jax.core.errors import AGAIN, InputError
from tips_jax.data.scenes import dataset as scenes
from tips_jax.runs import checkpoint
from tips_jax.runtime import peers as multihost
from tips_jax.runtime import rendezvous, signals, watchdog

EXIT = AGAIN
TOTAL, EVERY = 48, 8
BROKEN = (3, 11, 17)  # training images that cannot be read
LIMIT_S = 150  # of any wait: the machine may be busy


class Processes:
  """Starts runs and never leaves a process behind."""

  def __init__(self, folder, store, plain_xla):
    self.folder = folder
    self.store = store
    self.plain_xla = plain_xla
    self.running = []

  def start(self, workdir, *, count=2, devices=2, only=None, own=None, **fields):
    """`count` processes of `devices` devices each (or those of `only`); own: {process: fields of
    its own}.
    """
    address = f'localhost:{free_port()}'
    defaults = {
      'data.store': self.store,
      'data.scenes.train': 0,
      'schedule.total_steps': TOTAL,
      'evals.tasks': '()',
      'checkpoint.every_steps': EVERY,
      'hosts.lost_seconds': 5,
      'data.max_bad_fraction': 1.0,
    }
    run = []
    for process in range(count) if only is None else only:
      name = f'{workdir.name}-{len(self.running)}'
      command = kills.command(
        workdir,
        config='configs/methods/clip.py:runlocal',
        **{**defaults, **fields, **(own or {}).get(process, {})},
      )
      env = {
        **kills.environment(self.folder / 'compiled'),
        'NPROC': '32',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} {self.plain_xla}',
      }
      if count > 1:
        command.append('--multihost')
        env |= {
          'JAX_COORDINATOR_ADDRESS': address,
          'JAX_NUM_PROCESSES': str(count),
          'JAX_PROCESS_ID': str(process),
        }
      with (
        open(self.folder / f'{name}.err', 'w') as err,
        open(self.folder / f'{name}.out', 'w') as out,
      ):
        run.append(subprocess.Popen(command, env=env, cwd=kills.ROOT, stdout=out, stderr=err))
      run[-1].err = self.folder / f'{name}.err'
      self.running.append(run[-1])
    return run

  def close(self):
    for process in self.running:
      if process.poll() is None:
        process.kill()
        process.wait()


def free_port():
  with socket.socket() as s:
    s.bind(('', 0))
    return s.getsockname()[1]


def until(condition, run=()):
  """Waits; fails at once where a process of `run` has ended."""
  end = time.monotonic() + LIMIT_S
  while not condition():
    ended = [p for p in run if p.poll() is not None]
    assert not ended and time.monotonic() < end, '\n'.join(p.err.read_text() for p in ended or run)
    time.sleep(0.02)


def ends(run, *codes):
  """The processes end with these exit codes; returns what each wrote to standard error."""
  until(lambda: all(p.poll() is not None for p in run))
  said = [p.err.read_text() for p in run]
  assert tuple(p.returncode for p in run) == codes, '\n---\n'.join(said)
  return said


def reached(workdir, step):
  path = workdir / 'metrics.jsonl'
  return lambda: path.exists() and f'"step": {step},' in path.read_text()


def quarantined(workdir):
  """Records that any process found unreadable."""
  return {
    json.loads(line)['record'] for path in workdir.glob('quarantine*.jsonl') for line in open(path)
  }


def saved(workdir):
  """(newest step, next example) of a run's checkpoints."""
  checkpoints = checkpoint.Checkpoints(workdir, schema.Checkpoint())
  step = checkpoints.latest
  return step, checkpoints.next_index(step)


def losses(workdir):
  return {step: line['loss'] for step, line in kills.curve(workdir).items() if 'loss' in line}


@pytest.fixture(scope='module')
def processes(plain_xla, tmp_path_factory):
  folder = tmp_path_factory.mktemp('processes')
  example = scenes.example

  def broken(index, *, split, **kwargs):
    record = example(index, split=split, **kwargs)
    return record | (
      {'image': record['image'][:200]} if split == 'train' and index in BROKEN else {}
    )

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scenes, 'example', broken)
    store = scenes.build(str(folder / 'store'), train=40, test=8, size=48)
  processes = Processes(folder, store, plain_xla)
  yield processes
  processes.close()


@pytest.fixture(scope='module')
def whole(processes, tmp_path_factory):
  """Work folder of an uninterrupted run: one process with four devices."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  ends(processes.start(workdir, count=1, devices=4), 0)
  assert list(losses(workdir)) == list(range(1, TOTAL + 1)) and quarantined(workdir)
  return workdir


# --- whole runs ---------------------------------------------------------------------------------


def test_one_is_killed_and_one_goes_on_alone(processes, whole, tmp_path):
  workdir = tmp_path / 'run'
  run = processes.start(workdir)
  until(reached(workdir, 2 * EVERY + 2), run)
  run[1].kill()
  said = ends(run, EXIT, -signal.SIGKILL)
  assert 'process 1 of 2 gave no sign of life' in said[0]
  step, index = saved(workdir)
  assert 0 < step < TOTAL and step % EVERY == 0 and index == 8 * step
  (said,) = ends(processes.start(workdir, count=1, devices=4), 0)
  assert f'resumed from step {step} ' in said
  assert losses(workdir) == pytest.approx(losses(whole), rel=1e-5)
  assert quarantined(workdir) == quarantined(whole)  # the same examples
  assert saved(workdir) == saved(whole) == (TOTAL, 8 * TOTAL)


@pytest.mark.once
def test_a_signal_to_one_stops_all_and_a_stall_leaves_stacks(processes, whole, tmp_path):
  workdir, tasks = tmp_path / 'run', {'evals.tasks': "('knn',)", 'evals.at_start': False}
  run = processes.start(workdir, **tasks)
  until(reached(workdir, EVERY + 1), run)
  run[1].terminate()
  said = ends(run, EXIT, EXIT)
  assert all('all is saved' in text and 'Traceback' not in text for text in said)
  assert 'process 1 was asked to stop' in said[0]
  step, index = saved(workdir)
  assert EVERY < step < TOTAL and index == 8 * step and max(losses(workdir)) == step

  stacks = workdir / 'stall-0.txt'
  # By the first process's clock: after each tenth step, and both save.
  by_time = {'checkpoint.every_steps': 1000, 'checkpoint.every_minutes': 1e-9}
  watched = {'log.stall_seconds': 1.5, 'hosts.lost_seconds': 60}
  run = processes.start(workdir, **tasks, **watched, **by_time)
  until(lambda: 'compiled in' in run[0].err.read_text(), run)
  until(reached(workdir, step + 2), run)
  run[1].send_signal(signal.SIGSTOP)
  until(lambda: stacks.exists() and 'at step' in stacks.read_text(), run)
  run[1].send_signal(signal.SIGCONT)
  said = ends(run, 0, 0)
  assert (
    'loop.py' in stacks.read_text()
    and 'Thread' in stacks.read_text()
    and 'stacks of all threads' in said[0]
  )
  assert losses(workdir) == pytest.approx(losses(whole), rel=1e-5)
  assert 'knn/accuracy' in json.loads((workdir / 'report.json').read_text())['after']
  kept = [int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit()]
  assert sorted(kept) == [TOTAL // 10 * 10, TOTAL]


def test_a_signal_at_start_up_takes_all_down(processes, tmp_path):
  workdir = tmp_path / 'run'
  run = processes.start(workdir, own={0: {'seed': 5}, 1: {'seed': 5}})
  until(lambda: 'compiling' in run[0].err.read_text(), run)
  begin = time.monotonic()
  run[1].terminate()
  said = ends(run, EXIT, EXIT)
  assert time.monotonic() - begin < 40 and 'process 1 was asked to stop' in said[0]
  assert not any('Traceback' in text for text in said)


def test_processes_that_differ_refuse_to_start(processes, tmp_path):
  run = processes.start(tmp_path / 'run', own={1: {'optimizer.learning_rate': 0.5}})
  for text in ends(run, 2, 2):
    (line,) = [line for line in text.splitlines() if line.startswith('error: ')]
    assert (
      'config.optimizer is' in line
      and ' on 0' in line
      and ' on 1' in line
      and 'Traceback' not in text
    )


def test_who_does_not_come_is_named(processes, tmp_path):
  run = processes.start(tmp_path / 'run', count=3, only=(0,), **{'hosts.rendezvous_seconds': 1})
  (said,) = ends(run, EXIT)  # they may yet come: try again
  assert '2 of 3 processes did not come' in said and '1-2 missing' in said


def test_several_processes_without_the_flag(tmp_path):
  env = {**kills.environment(tmp_path), 'SLURM_NTASKS': '4', 'SLURM_PROCID': '1'}
  code, _, err = kills.attempt(kills.command(tmp_path / 'run'), env)
  assert code == 2 and '--multihost: missing' in err and 'SLURM_NTASKS=4' in err


# --- parts --------------------------------------------------------------------------------------


def meeting(*facts, count=None, seconds=20.0):
  """What each process hears when these come to the rendezvous (None: it stays away): an error, or
  ''.
  """
  count, heard = count or len(facts), {}
  address = f'localhost:{free_port()}'

  def come(index):
    try:
      rendezvous.meet(address, count=count, index=index, facts=facts[index], seconds=seconds)
      heard[index] = ''
    except InputError as error:
      heard[index] = str(error)
      assert isinstance(error, rendezvous.Missing) == ('missing' in str(error))

  threads = [
    threading.Thread(target=come, args=(i,)) for i, fact in enumerate(facts) if fact is not None
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return heard


def test_all_hear_the_same():
  same = {'jax': '0.10.2', 'code': 'a'}
  assert meeting(same, same, same) == {0: '', 1: '', 2: ''}
  heard = meeting(same, same | {'jax': '0.10.3'}, same)
  assert len(set(heard.values())) == 1 and 'jax is 0.10.2 on 0, 2, 0.10.3 on 1' in heard[0]
  heard = meeting(same, None, same, seconds=1.0)
  assert (
    heard[0] == heard[2] and '1 of 3 processes did not come' in heard[0] and '1 missing' in heard[0]
  )
  heard = meeting(None, same, seconds=0.5)
  assert 'process 0 is missing' in heard[1]


def test_a_stranger_at_the_door_is_ignored():
  port = free_port()
  done = []
  server = threading.Thread(
    target=lambda: done.append(
      rendezvous.meet(f'localhost:{port}', count=2, index=0, facts={}, seconds=20)
    )
  )
  server.start()
  while True:
    try:
      with socket.create_connection(('localhost', port)) as stranger:
        stranger.sendall(b'GET / HTTP/1.1\r\n\r\n')
      break
    except ConnectionRefusedError:
      time.sleep(0.02)
  rendezvous.meet(f'localhost:{port}', count=2, index=1, facts={}, seconds=20)
  server.join()
  assert done == [None]


def test_ranges():
  assert rendezvous.ranges([0, 1, 2, 5, 7, 8]) == '0-2, 5, 7-8'


def test_facts_tell_code_and_config_apart(small):
  one, other = (
    rendezvous.facts(small.config('clip', schedule=dict(total_steps=n))) for n in (4, 5)
  )
  assert {n for n in one if one[n] != other[n]} == {'config.schedule'}
  assert one['jax'] and one['libtpu'] and len(one['code']) == 8


@pytest.mark.parametrize(
  'env, found',
  [
    ({}, ''),
    ({'JAX_NUM_PROCESSES': '1'}, ''),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, ''),
    ({'SLURM_NTASKS': '8'}, ''),  # inside an allocation, and no task of it
    ({'JAX_NUM_PROCESSES': '2'}, 'JAX_NUM_PROCESSES=2'),
    ({'OMPI_COMM_WORLD_SIZE': '3'}, 'OMPI_COMM_WORLD_SIZE=3'),
    ({'TPU_WORKER_HOSTNAMES': 'a,b,c'}, 'TPU_WORKER_HOSTNAMES with 3 hosts'),
  ],
)
def test_what_tells_of_several_processes(env, found):
  assert rendezvous.others(env) == found


@pytest.mark.parametrize(
  'env, said',
  [
    ({}, 'got no JAX_COORDINATOR_ADDRESS'),
    ({'JAX_PROCESS_ID': 'x'}, 'expected integers'),
    (
      {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'},
      'process 2 of 2',
    ),
  ],
)
def test_addresses_that_do_not_do(monkeypatch, env, said):
  for name in [
    n
    for n in os.environ
    if n.startswith(('JAX_COORDINATOR', 'JAX_NUM', 'JAX_PROCESS', 'SLURM', 'OMPI'))
  ]:
    monkeypatch.delenv(name)
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(InputError, match=said):
    rendezvous.find()


@pytest.mark.parametrize(
  'owners, parts',
  [
    ([0, 0, 1, 1], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ([1, 0, 1, 0], [[2, 3, 6, 7], [0, 1, 4, 5]]),  # interleaved, as a torus may lie
    # A tensor axis across hosts.
    ([(0, 1), (0, 1), (2, 3), (2, 3)], [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2),
  ],
)
def test_rows_of_a_process(monkeypatch, owners, parts):
  class Device:
    def __init__(self, process):
      self.process_index = process

  class Places:
    def devices_indices_map(self, shape):
      size = shape[0] // len(owners)
      return {
        Device(p): (slice(i * size, (i + 1) * size),)
        for i, who in enumerate(owners)
        for p in (who if isinstance(who, tuple) else (who,))
      }

  for process, expected in enumerate(parts):
    monkeypatch.setattr(multihost.jax, 'process_index', lambda p=process: p)
    assert multihost.rows(Places(), 8) == expected


class Store:
  """The coordination service's key-value store, for processes that are threads."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    self.values.setdefault(key, value)
    if allow_overwrite:
      self.values[key] = value

  def key_value_dir_get(self, key):
    return [(k, v) for k, v in list(self.values.items()) if k.startswith(key)]

  def blocking_key_value_get(self, key, milliseconds):
    time.sleep(0.01)
    if key not in self.values:
      raise jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED')
    return self.values[key]


def test_all_stop_at_the_latest_point_that_one_has_promised(monkeypatch):
  """Three processes at different points, of which one is asked; none goes beyond, and none stops
  before.
  """
  monkeypatch.setattr(multihost.signal, 'pthread_kill', lambda *_: None)
  store, asked = Store(), [signals.Preemption() for _ in range(3)]
  peers = [multihost.Peers(a, client=store, index=i, count=3) for i, a in enumerate(asked)]
  stopped = {}

  def walk(i, seconds):
    for point in range(1000):
      try:
        peers[i].check(point)
      except signals.Stopped:
        stopped[i] = point
        return
      time.sleep(seconds)

  threads = [threading.Thread(target=walk, args=(i, s)) for i, s in enumerate((0.01, 0.02, 0.03))]
  for thread in threads:
    thread.start()
  time.sleep(0.3)
  asked[2].requested = True
  for thread in threads:
    thread.join()
  for p in peers:
    p._close()
  assert set(stopped) == {0, 1, 2} and len(set(stopped.values())) == 1 and stopped[0] > 20


def test_who_waits_for_an_interrupted_evaluation_stops_there(monkeypatch):
  """Process 0 is asked while it evaluates and gives no result; it goes no further, though nobody
  has heard of it.
  """
  monkeypatch.setattr(multihost.signal, 'pthread_kill', lambda *_: None)
  store, asked = Store(), [signals.Preemption() for _ in range(2)]
  lead, other = (multihost.Peers(a, client=store, index=i, count=2) for i, a in enumerate(asked))
  stopped = []

  def wait():
    other.check(6)
    try:
      other.share('evaluated/3')
    except signals.Stopped:
      stopped.append(True)
    with pytest.raises(signals.Stopped):
      other.check(7)

  thread = threading.Thread(target=wait)
  lead.check(6)
  thread.start()
  asked[0].requested = True
  with pytest.raises(signals.Stopped):
    lead.check(7)
  thread.join()
  for p in (lead, other):
    p._close()
  assert stopped == [True]


def test_the_watchdog_barks_once_a_stall(tmp_path, capfd):
  dog = watchdog.Watchdog(tmp_path, seconds=0.2, process=3)
  try:
    dog.beat('at step 7')
    until(lambda: (tmp_path / 'stall-3.txt').exists())
    time.sleep(0.5)
    text = (tmp_path / 'stall-3.txt').read_text()
    assert text.count('process 3: at step 7 for') == 1 and 'test_multihost.py' in text
    assert 'process 3: at step 7' in capfd.readouterr().err
    dog.beat('at step 8')
    until(lambda: 'at step 8' in (tmp_path / 'stall-3.txt').read_text())
  finally:
    dog.close()
  watchdog.Watchdog(tmp_path, seconds=0, process=4)  # off: no thread
  assert not any(
    t.name == 'watchdog' and t is not threading.current_thread() and not dog._closed.is_set()
    for t in threading.enumerate()
  )

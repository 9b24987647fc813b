"""tpu_pod.sh and tpu_queued.sh: which calls they make, in which order, whatever gcloud answers."""

import shlex

import pytest

COMMIT = '0123456789ab'
SLICE = ['--name=pod', '--zone=us-west4-a']
RUN = [*SLICE, '--topology=v5e:4x4', '--config=configs/vitb.py:v2', '--workdir=gs://bucket/run']
POD = ['list', 'create', 'archive', 'scp', 'install', 'start', 'follow']


# --- slices that are there or created ---


def test_pod_creates_sends_and_follows(machine):
  machine.call(
    'tpu_pod.sh',
    'run',
    *RUN,
    '--spot',
    '--project=p',
    '--service_account=a@b',
    '--config.seed=3',
    '--',
    '--config.name=a b',
  )
  assert machine.verbs == POD
  listed, create, archive, scp, install, start, follow = [
    c for c in machine.calls if c[0] != 'git' or 'archive' in c
  ]
  where = ['--zone=us-west4-a', '--project=p']
  tpu = ['gcloud', 'compute', 'tpus', 'tpu-vm']
  assert listed == [*tpu, 'list', *where, '--filter=name~/pod$', '--format=value(state)']
  assert create == [
    *tpu,
    'create',
    'pod',
    *where,
    '--version=v2-alpha-tpuv5-lite',
    '--accelerator-type=v5litepod-16',
    '--scopes=https://www.googleapis.com/auth/cloud-platform',
    '--service-account=a@b',
    '--spot',
  ]
  tar = f'{machine.place}/tips_jax-{COMMIT}.tar.gz'
  assert archive[3:] == [
    'archive',
    '--format=tar.gz',
    f'--prefix=tips_jax-{COMMIT}/',
    f'--output={tar}',
    COMMIT,
  ]
  assert scp == [*tpu, 'scp', *where, tar, 'pod:', '--worker=all']
  assert install[:-1] == start[:-1] == [*tpu, 'ssh', 'pod', *where, '--worker=all']
  assert follow[:-1] == [*tpu, 'ssh', 'pod', *where, '--worker=0']
  assert shlex.split(start[-1].removeprefix('--command=')) == [
    'bash',
    'tips_run/worker.sh',
    'start',
    'bucket',
    '--config=configs/vitb.py:v2',
    '--workdir=gs://bucket/run',
    '--config.seed=3',
    '--config.name=a b',
  ]


@pytest.mark.parametrize(
  'topology, shape, version',
  [
    ('v4:2x2x4', '--type=v4 --topology=2x2x4', 'tpu-ubuntu2204-base'),
    ('v5e:16x16', '--accelerator-type=v5litepod-256', 'v2-alpha-tpuv5-lite'),
    ('v5p:8x8x8', '--type=v5p --topology=8x8x8', 'v2-alpha-tpuv5'),
    ('v5p:4x4x12', '--type=v5p --topology=4x4x12', 'v2-alpha-tpuv5'),
    ('v5p:2x2x1', '--type=v5p --topology=2x2x1', 'v2-alpha-tpuv5'),
    ('v6e:2x4', '--accelerator-type=v6e-8', 'v2-alpha-tpuv6e'),
  ],
)
def test_topologies(machine, topology, shape, version):
  for script, flag in (('tpu_pod.sh', '--version='), ('tpu_queued.sh', '--runtime-version=')):
    machine.call(script, 'run', *RUN, f'--topology={topology}', '--dry_run')
    (create,) = [c for c in machine.printed if 'create' in c]
    assert {*shape.split(), flag + version} <= set(create)
  machine.call(
    'tpu_pod.sh',
    'run',
    *RUN,
    '--runtime=mine',
    '--create_flags=--network=n --internal-ips',
    '--ssh_flags=--internal-ip',
    '--dry_run',
  )
  (create,) = [c for c in machine.printed if 'create' in c]
  assert {'--version=mine', '--network=n', '--internal-ips'} <= set(create)
  assert all('--internal-ip' in c for c in machine.printed if c[4] in ('ssh', 'scp'))


@pytest.mark.parametrize(
  'args, message',
  [
    (
      ['--topology=v7:4x4'],
      "--topology: got 'v7'; expected one of: v4 v5e v5p v6e; did you mean v4?",
    ),
    (['--topology=v5e'], "--topology: got 'v5e'; expected GENERATION:SHAPE"),
    (['--topology=v5e:4x'], "--topology: got 'v5e:4x'; expected GENERATION:SHAPE"),
    (['--topology=v5e:4x6'], "--topology: shape of v5e: got '4x6'; expected one of: 1x1 2x2"),
    (['--topology=v6e:4x4x4'], "--topology: shape of v6e: got '4x4x4'; expected one of"),
    (['--topology=v5p:4x4'], "--topology: got 'v5p:4x4'; expected one of: 2x2x1"),
    (['--topology=v5p:4x4x6'], "--topology: got 'v5p:4x4x6'; expected one of: 2x2x1"),
    (['--topology=v5p:8x4x4'], "--topology: got 'v5p:8x4x4'; expected one of: 2x2x1"),
    (['--topology=v4:2x2x8'], "--topology: got 'v4:2x2x8'; expected one of: 2x2x1"),
    (['--workdir=runs/a'], "--workdir: got 'runs/a'; expected gs://BUCKET/FOLDER"),
    (['--workdir=gs://bucket'], "--workdir: got 'gs://bucket'; expected gs://BUCKET/FOLDER"),
    (
      ['--config.data.store=gs://other/s'],
      "--config.data.store: got 'gs://other/s'; expected a path in the bucket of",
    ),
  ],
)
def test_slices_that_cannot_be(machine, args, message):
  machine.call('tpu_pod.sh', 'run', *RUN, *args, code=2)
  assert machine.err.startswith(f'error: {message}')
  assert not machine.calls


def test_pod_reuses_a_slice(machine):
  machine.answer('list', 'READY')
  machine.call('tpu_pod.sh', 'run', *RUN)
  assert machine.verbs == [v for v in POD if v != 'create']
  machine.answer('list', 'STOPPED')
  machine.call('tpu_pod.sh', 'run', *RUN)
  assert machine.verbs == ['list', 'start', *POD[2:]]


@pytest.mark.parametrize(
  'state, says', [('PREEMPTED', 'delete --name=pod --zone=us-west4-a'), ('CREATING', 'run again')]
)
def test_pod_leaves_other_slices_alone(machine, state, says):
  machine.answer('list', state)
  machine.call('tpu_pod.sh', 'run', *RUN, code=2)
  assert machine.verbs == ['list'] and says in machine.err


@pytest.mark.parametrize('broken', ['list', 'create', 'archive', 'scp', 'install', 'start'])
def test_pod_ends_at_the_first_failure(machine, broken):
  """Above all: when gcloud cannot tell whether a slice exists, none is created."""
  machine.answer(broken if broken != 'start' else 'worker.sh start', code=7)
  machine.call('tpu_pod.sh', 'run', *RUN, code=7)
  assert machine.verbs == POD[: POD.index(broken) + 1]


@pytest.mark.parametrize(
  'code, ends, says',
  [
    (2, 2, 'bad input'),
    (3, 3, 'diverged'),
    (75, 75, 'saved'),
    (76, 75, 'saved'),
    (255, 255, 'the run goes on'),
    (1, 1, 'code 1'),
  ],
)
def test_pod_ends_with_the_code_of_the_run(machine, code, ends, says):
  machine.answer('follow', code=code)
  machine.call('tpu_pod.sh', 'run', *RUN, code=ends)
  assert says in machine.err and machine.verbs == POD


@pytest.mark.parametrize('script', ['tpu_pod.sh', 'tpu_queued.sh'])
def test_commands_for_a_slice_that_is_there(machine, script):
  kind = 'tpu-vm' if 'pod' in script else 'queued-resources'
  for command in ('stop', 'logs', 'delete'):
    machine.call(script, command, *SLICE)
    assert (
      machine.verbs == [{'logs': 'follow'}.get(command, command)] and machine.calls[0][3] == kind
    )
  assert machine.calls[0][4:] == [
    'delete',
    'pod',
    '--zone=us-west4-a',
    *(['--force'] * (kind != 'tpu-vm')),
    '--quiet',
  ]
  machine.call(script, 'logs', *SLICE, '--worker=3')
  assert '--worker=3' in machine.calls[0]
  machine.call(script, 'status', *SLICE)
  assert machine.verbs == ['list'] and machine.out.startswith('no ')
  machine.answer('list', 'READY' if 'pod' in script else 'ACTIVE')
  machine.call(script, 'status', *SLICE)
  assert machine.verbs == ['list', 'status'] and '--worker=all' in machine.calls[-1]


# --- queued resources ---

QUEUED = [*RUN, '--poll=0.01']
SEND = ['archive', 'scp', 'install']


def test_queued_survives_preemption(machine):
  """Asked for, waited for, run, lost (the connection first, then the slices), asked for anew, done,
  released.
  """
  for state in (
    '',
    'WAITING_FOR_RESOURCES',
    'PROVISIONING',
    'ACTIVE',
    'SUSPENDING',
    'SUSPENDED',
    '',
    'WAITING_FOR_RESOURCES',
    'ACTIVE',
  ):
    machine.answer('list', state)
  machine.answer('follow', 'step 10', 255)
  machine.answer('follow', 'step 20', 0)
  machine.call('tpu_queued.sh', 'run', *QUEUED, '--spot', '--slices=2')
  assert machine.verbs == [
    'list',
    'create',
    'list',
    'list',
    'list',
    *SEND,
    'start',
    'follow',
    'list',
    'list',
    'delete',
    'list',
    'create',
    'list',
    'list',
    *SEND,
    'start',
    'follow',
    'delete',
  ]
  assert machine.err.count('SUSPENDED') == 1 and 'step 20' in machine.out and not machine.rules
  create = machine.calls[1]
  assert {
    '--node-count=2',
    '--node-prefix=pod',
    '--spot',
    '--runtime-version=v2-alpha-tpuv5-lite',
  } <= set(create)
  assert {'--force', '--quiet'} <= set(machine.calls[-1])
  (start,) = {tuple(c) for c in machine.calls if 'worker.sh start' in c[-1]}
  assert start[4:9] == ('ssh', 'pod', '--zone=us-west4-a', '--node=all', '--worker=all')


def test_queued_starts_again_on_the_same_slices(machine):
  """After a signal and after a crash: what lingers is cleared, nothing is sent twice; a lost
  connection attaches.
  """
  for _ in range(5):
    machine.answer('list', 'ACTIVE')
  for code in (75, 1, 255, 0):
    machine.answer('follow', code=code)
  machine.call('tpu_queued.sh', 'run', *QUEUED)
  again = ['list', 'start', 'follow']
  assert machine.verbs == [
    'list',
    *SEND,
    'start',
    'follow',
    'clear',
    *again,
    'clear',
    *again,
    *again,
    'delete',
  ]


@pytest.mark.parametrize(
  'code, ends, says', [(2, 2, 'bad input'), (3, 3, 'diverged'), (76, 75, 'saved')]
)
def test_queued_stops_where_trying_again_is_no_use(machine, code, ends, says):
  machine.answer('list', 'ACTIVE')
  machine.answer('follow', code=code)
  machine.call('tpu_queued.sh', 'run', *QUEUED, code=ends)
  assert (
    machine.verbs == ['list', *SEND, 'start', 'follow'] and says in machine.err
  )  # no delete: only ever said
  if ends != 75:
    assert 'tpu_queued.sh delete --name=pod --zone=us-west4-a' in machine.err


def test_queued_gives_up(machine):
  for _ in range(9):
    machine.answer('list', 'ACTIVE')
    machine.answer('follow', code=1)
  machine.call('tpu_queued.sh', 'run', *QUEUED, '--max_crashes=2', code=1)
  assert machine.verbs.count('follow') == 3 and 'delete' not in machine.verbs
  for rule in machine.rules:
    rule.unlink()
  for _ in range(3):
    machine.answer('list', 'FAILED')
  machine.call('tpu_queued.sh', 'run', *QUEUED, code=2)
  assert machine.verbs == ['list', 'delete', 'list', 'delete', 'list', 'describe']
  for _ in range(3):
    machine.answer('create', code=1)
  machine.call('tpu_queued.sh', 'run', *QUEUED, code=2)
  assert machine.verbs == ['list', 'create'] * 3


def test_queued_tries_again_when_gcloud_fails(machine):
  machine.answer('list', code=1)
  for _ in range(2):
    machine.answer('list', 'ACTIVE')
  machine.answer('scp', code=255)
  machine.call('tpu_queued.sh', 'run', *QUEUED)
  assert machine.verbs == [
    'list',
    'list',
    'archive',
    'scp',
    'list',
    *SEND,
    'start',
    'follow',
    'delete',
  ]

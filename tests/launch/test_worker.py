"""worker.sh: a run on one worker, with stand-ins for Python, uv and gcsfuse."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'

MAIN = """#!/bin/sh
echo "$@"
trap 'echo saved; exit 75' TERM
[ -f "$HOME/ends" ] && exit $(cat "$HOME/ends")
while :; do sleep 0.05; done
"""


class Worker:
  """A worker's home, with code in it whose Python is a stand-in."""

  def __init__(self, place):
    self.home, self.code = place / 'home', place / 'home/tips_jax-1'
    bin_ = place / 'bin'
    for folder in (self.code / '.venv/bin', self.code / 'launch', bin_):
      folder.mkdir(parents=True)
    self.calls = place / 'calls'
    shutil.copy(LAUNCH / 'worker.sh', self.code / 'launch')
    for path, text in [(self.code / '.venv/bin/python', MAIN)] + [
      (bin_ / name, f'#!/bin/sh\necho {name} "$@" >>{self.calls}\n{then}')
      for name, then in (('uv', ''), ('gcsfuse', ''), ('mountpoint', 'exit 1'), ('sudo', '"$@"'))
    ]:
      path.write_text(text)
      path.chmod(0o755)
    self.env = {
      'PATH': f'{bin_}:/usr/bin:/bin',
      'HOME': str(self.home),
      'TIPS_GCS': str(place / 'gcs'),
      'TIPS_DATA': str(place / 'data'),
      'TIPS_HUGE_PAGES': str(place / 'huge_pages'),
      'TIPS_PATIENCE': '5',
    }
    self.script = self.home / 'tips_run/worker.sh'

  def __call__(self, *args, code=0):
    script = self.code / 'launch/worker.sh' if args[0] == 'install' else self.script
    done = subprocess.run(
      ['bash', script, *args], env=self.env, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr

  def log(self, text):
    """Waits until the log has the text."""
    for _ in range(200):
      if (path := self.home / 'tips_run/log').exists() and text in path.read_text():
        return
      time.sleep(0.02)
    raise AssertionError(path.read_text())


@pytest.fixture
def worker(tmp_path):
  worker = Worker(tmp_path)
  worker('install')
  yield worker
  worker('clear')


def test_worker_installs_and_mounts(worker):
  worker('start', 'bucket', '--workdir=gs://bucket/run', '--config.data.store=gs://bucket/s')
  calls = worker.calls.read_text()
  assert 'uv pip install --quiet --python .venv/bin/python .[tpu]\n' in calls
  own, data = worker.env['TIPS_GCS'], worker.env['TIPS_DATA']
  mounts = [line.split() for line in calls.splitlines() if line.startswith('gcsfuse')]
  assert [mount[-2:] for mount in mounts] == [
    ['bucket', f'{own}/bucket'],
    ['bucket', f'{data}/bucket'],
  ]
  assert {'--metadata-cache-ttl-secs=0', '--rename-dir-limit=200000'} <= set(mounts[0])
  assert {'ro', '--metadata-cache-ttl-secs=-1'} <= set(mounts[1])
  paths = f'--workdir={own}/bucket/run --config.data.store={data}/bucket/s'
  worker.log(f'-m tips_jax.main --multihost {paths}\n')


def test_worker_asks_for_huge_pages(worker):
  setting = pathlib.Path(worker.env['TIPS_HUGE_PAGES'])
  setting.write_text('always [madvise] never')
  worker('start', 'bucket', '--workdir=gs://bucket/run')
  assert setting.read_text() == 'always\n'


@pytest.mark.parametrize('code', [0, 2, 3, 75])
def test_worker_keeps_the_exit_code(worker, code):
  (worker.home / 'ends').write_text(str(code))
  worker('start', 'bucket', '--a b')
  assert '--multihost --a b\n' in worker('follow', code=code)
  assert f'ended with code {code}\n' in worker('status')
  assert '--multihost --a b\n' in worker('follow', code=code)  # as often as one likes


def test_worker_stops_a_run(worker):
  """`stop` is told from a preemption by its code; both save. The next run starts as if nothing had
  been.
  """
  assert 'no run' in worker('status')
  worker('follow', code=2)
  worker('start', 'bucket', '--a')
  worker.log('--a')
  assert 'runs: -m tips_jax.main' in worker('status')
  assert 'ended with code 76' in worker('stop')
  assert 'saved\n' in worker('follow', code=76)
  worker('stop')
  worker('start', 'bucket', '--a')
  worker.log('--a')
  worker('clear')
  assert 'saved\n' in worker('follow', code=75)
  assert (worker.home / 'tips_run/log.1').read_text().endswith('saved\n')


def test_worker_runs_one_run(worker):
  worker('start', 'bucket', '--a')
  worker.log('--a')
  assert 'runs already' in worker('start', 'bucket', '--a')
  assert 'another run is under way' in worker('start', 'bucket', '--b', code=2)


def test_worker_tells_a_lost_run_from_one_that_ended(worker):
  worker('start', 'bucket', '--a')
  worker.log('--a')
  os.killpg(int((worker.home / 'tips_run/pid').read_text()), signal.SIGKILL)
  worker('follow', code=137)
  (worker.home / 'tips_run/pid').write_text(str(os.getpid()))  # the number is somebody else's now
  assert 'ended with code 137' in worker('status')
  assert 'started' in worker('start', 'bucket', '--b')

"""A run whose work folder is in a bucket (S3, as moto speaks it): two processes without a disk in
common are killed; one process on a third machine, whose disk is empty, goes on. It ends with the
parameters of a run on a disk that nobody stopped.
"""

import signal
import subprocess
import time

import pytest

from benchmarks import kills
from tests import bucket_server
from tests.runtime.test_multihost import free_port
from tips_jax.core import buckets
from tips_jax.interop import read
from tips_jax.runs import folder

pytestmark = pytest.mark.once

FIELDS = {
  'schedule.total_steps': 8,
  'checkpoint.every_steps': 2,
  'checkpoint.keep_last': 2,
  'evals.tasks': '()',
  'log.tensorboard': True,
}
CONFIG = 'configs/methods/clip.py:runlocal'
LIMIT_S = 250  # of any wait: the machine may be busy


@pytest.fixture(scope='module')
def bucket():
  with bucket_server.bucket('s3') as path:
    yield path


@pytest.fixture
def start(plain_xla, tmp_path):
  """start(workdir, machine, devices): a process that trains; its disk is the machine's."""
  running = []

  def run(workdir, machine, devices, **environment):
    env = {
      **kills.environment(tmp_path / 'compiled'),
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} {plain_xla}',
      'TIPS_JAX_CACHE': str(tmp_path / machine),
      **environment,
    }
    command = kills.command(workdir, config=CONFIG, **FIELDS)
    if environment:
      command.append('--multihost')
    with open(tmp_path / f'{machine}.err', 'w') as err:
      running.append(
        subprocess.Popen(command, env=env, cwd=kills.ROOT, stdout=subprocess.DEVNULL, stderr=err)
      )
    running[-1].err = tmp_path / f'{machine}.err'
    return running[-1]

  yield run
  for process in running:
    if process.poll() is None:
      process.kill()
      process.wait()


def test_two_processes_are_killed_and_a_third_machine_goes_on(bucket, start, tmp_path, monkeypatch):
  whole = start(tmp_path / 'whole', 'a', 2)
  assert whole.wait(LIMIT_S) == 0, whole.err.read_text()

  url = f'{bucket}/run'
  address = {'JAX_COORDINATOR_ADDRESS': f'localhost:{free_port()}', 'JAX_NUM_PROCESSES': '2'}
  pair = [start(url, f'b{i}', 1, **address, JAX_PROCESS_ID=str(i)) for i in range(2)]
  end = time.monotonic() + LIMIT_S
  while max(folder.in_bucket(url, 'test'), default=0) < 4:
    assert [p.poll() for p in pair] == [None, None] and time.monotonic() < end, [
      p.err.read_text() for p in pair
    ]
    time.sleep(0.05)
  for process in pair:
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert max(folder.in_bucket(url, 'test')) < 8
  assert {'metrics.jsonl', 'config.json'} < buckets.names(url, 'test').keys()
  monkeypatch.setenv('TIPS_JAX_CACHE', str(tmp_path / 'd'))
  assert read.read(url).about['step'] in range(4, 8)

  last = start(url, 'c', 2)
  assert last.wait(LIMIT_S) == 0, last.err.read_text()
  assert 'resumed from step' in last.err.read_text()
  assert folder.in_bucket(url, 'test') == [6, 8]
  assert kills.same(kills.arrays(url), kills.arrays(tmp_path / 'whole'))
  copy = buckets.local(url, 'test', wanted='metrics.jsonl'.__eq__)
  assert kills.curve(copy) == kills.curve(tmp_path / 'whole')

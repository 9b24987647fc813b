"""Worker processes: how they end, and what is said when one of them dies."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.data.reading.test_pipeline import config, read, write_store
from tips_jax.core.errors import AGAIN, InputError
from tips_jax.data.reading.pipeline import Pipeline
from tips_jax.data.reading.records import Records

LIMIT_S = 30  # of any wait: the machine may be busy
SHARED = pathlib.Path('/dev/shm')
needs_proc = pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc')
# Reads two batches, and then leaves the workers with queues that are full.
PROGRAM = """
import sys, time
from tips_jax.core.schema import Data, View
from tips_jax.data.reading.pipeline import Pipeline
if __name__ == '__main__':  # workers import the program
  views = {'global': View(size=64, count=4)}
  config = Data(store=sys.argv[1], views=views, texts={}, workers=2, prefetch=4)
  pipeline = Pipeline(config, batch_size=8, seed=0)
  next(pipeline), next(pipeline)
  print('ready', flush=True)
  time.sleep(600)
"""


def parent(pid):
  """The process that started one; None where there is no such process, or it has ended."""
  try:
    state, number = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[:2]
  except OSError:
    return None
  if state == 'Z':
    return None
  return int(number)


def children(pid):
  """Processes that a process has started: workers, and the tracker of their resources."""
  everyone = [int(name) for name in os.listdir('/proc') if name.isdigit()]
  return [child for child in everyone if parent(child) == pid]


def workers(pid):
  """The worker processes among its children."""
  found = []
  for child in children(pid):
    if b'spawn_main' in pathlib.Path(f'/proc/{child}/cmdline').read_bytes():
      found.append(child)
  return found


def shared():
  """What is in shared memory; other programs may have some there too."""
  return set(os.listdir(SHARED))


def until(condition):
  end = time.monotonic() + LIMIT_S
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.05)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  return {'main': write_store(tmp_path_factory.mktemp('stores') / 'main', 0, 40)}


@pytest.fixture
def two(folders):
  """A pipeline with two workers that are at work."""
  pipeline = Pipeline(config(folders, workers=2, threads=2, prefetch=2), batch_size=8, seed=3)
  read(pipeline, 1)
  yield pipeline
  pipeline.close()


@needs_proc
def test_they_and_their_shared_memory_end_with_a_killed_parent(folders, tmp_path):
  program = tmp_path / 'program.py'
  program.write_text(PROGRAM)
  root = pathlib.Path(__file__).parents[3]
  before = shared()
  process = subprocess.Popen(
    [sys.executable, program, folders['main']],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env={**os.environ, 'PYTHONPATH': str(root)},
  )
  try:
    assert process.stdout.readline() == b'ready\n'
    started = children(process.pid)
    assert len(workers(process.pid)) == 2
    until(lambda: shared() - before)
    made = shared() - before
  finally:
    process.kill()
    _, said = process.communicate()
  assert said == b''  # Python's tracker may clean up, and say nothing
  until(lambda: not any(map(parent, started)))
  until(lambda: not made & shared())


@needs_proc
def test_a_signal_to_the_group_does_not_reach_them(two):
  """One of them may have only begun: it would die before it has read what it is sent."""
  for worker in workers(os.getpid()):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      os.kill(worker, number)
  assert len(read(two, 8)) == 8


@needs_proc
@pytest.mark.parametrize(
  'number, code, said',
  [
    (signal.SIGKILL, AGAIN, 'was killed .SIGKILL., as the system does where memory runs out'),
    (signal.SIGSEGV, 2, 'died .exit code -11.; .* memory or /dev/shm may be full'),
  ],
)
def test_one_that_dies_is_one_line(two, number, code, said):
  os.kill(workers(os.getpid())[0], number)
  with pytest.raises(InputError, match=f'data.workers: a worker process {said}') as error:
    read(two, 40)
  assert error.value.code == code and '\n' not in str(error.value)


class NoMemory(Records):
  """Records that take more memory than there is."""

  def read(self, records):
    return np.empty(2**60, np.uint8)


@pytest.mark.parametrize('count', [0, 2])
def test_memory_that_runs_out_is_one_line(folders, monkeypatch, count):
  monkeypatch.setattr('tips_jax.data.reading.pipeline.Records', NoMemory)
  pipeline = Pipeline(config(folders, workers=count, threads=2), batch_size=8, seed=3)
  message = (
    'data: memory ran out while a batch was made .Unable to allocate 1.00 EiB.* data.workers'
  )
  with contextlib.closing(pipeline):
    with pytest.raises(InputError, match=message) as error:
      next(pipeline)
  assert error.value.code == AGAIN and '\n' not in str(error.value)


def test_too_little_shared_memory_for_the_workers_is_refused(folders, monkeypatch):
  little = shutil.disk_usage('/')._replace(free=10_000)
  monkeypatch.setattr('tips_jax.data.reading.workers.shutil.disk_usage', lambda path: little)
  message = 'data.workers: got 2, whose batches take .* MiB of /dev/shm; it has 0.0 MiB free'
  with pytest.raises(InputError, match=message):
    Pipeline(config(folders, workers=2), batch_size=8, seed=0)
  monkeypatch.setattr('tips_jax.data.reading.workers._SHARED_MEMORY', '/nowhere')
  with pytest.raises(InputError, match='MiB of /nowhere; it has 0.0 MiB free'):
    Pipeline(config(folders, workers=2), batch_size=8, seed=0)

"""Worker processes of the input pipeline.

They end with the process that started them, however that ends, and Python's resource tracker then
removes what was in shared memory. A signal to the whole group (Ctrl-C, a closed terminal, a
scheduler) does not reach them: the first process may need their batches until it stops.
"""

import contextlib
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags

from tips_jax.core import processes
from tips_jax.core.errors import InputError, PassingError
from tips_jax.core.schema import Data
from tips_jax.data.reading.batch import empty

_SHARED_MEMORY = '/dev/shm'
# Grain has no class for it.
_LOST = re.compile(r'Worker process was terminated unexpectedly with exit code (-?\d+)')
_QUIET = 'ignore:resource_tracker'
_TO_THE_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def start(batches: grain.IterDataset, config: Data) -> grain.DatasetIterator:
  """The same batches, made in `config.workers` processes."""
  if not flags.FLAGS.is_parsed():  # grain's workers read an absl flag
    flags.FLAGS.mark_as_parsed()
  options = grain.MultiprocessingOptions(
    num_workers=config.workers, per_worker_buffer_size=_batches_per_worker(config)
  )
  batches = batches.mp_prefetch(options, worker_init_fn=_begin)
  batches = grain.experimental.ThreadPrefetchIterDataset(
    batches.map(_copied), prefetch_buffer_size=1
  )
  # Python's tracker cleans up after a run that ends at once: its warnings would follow our line.
  if _QUIET not in sys.warnoptions:
    sys.warnoptions.append(_QUIET)
  iterator = iter(batches)
  # Threads and processes inherit what is blocked, from their first moment.
  before = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_THE_GROUP)
  try:
    resource_tracker.ensure_running()  # first, as starting it ends the block of some
    signal.pthread_sigmask(signal.SIG_BLOCK, _TO_THE_GROUP)
    iterator.start_prefetch()
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
  return iterator


@contextlib.contextmanager
def one_error() -> Iterator[None]:
  """Turns the error of a worker that died, or had no memory left, into one line: PassingError
  where it was killed or memory ran out, which it may not do again.
  """
  try:
    yield
  except MemoryError as error:  # of a thread too, without workers
    reason = f' ({error})' if str(error) else ''
    raise PassingError(
      f'data: memory ran out while a batch was made{reason}: run the same command again to go on '
      'from the last checkpoint, with fewer data.workers or data.threads, a smaller data.prefetch '
      'or a smaller schedule.batch_size should it come back'
    ) from error
  except RuntimeError as error:
    match = _LOST.search(str(error))
    if not match:
      raise
    code = int(match[1])
    if -code != signal.SIGKILL:
      raise InputError(
        f'data.workers: a worker process died (exit code {code}); expected none to: memory or '
        f'{_SHARED_MEMORY} may be full, or a decoder have crashed; data.workers=0 may show which'
      ) from error
    raise PassingError(
      'data.workers: a worker process was killed (SIGKILL), as the system does where memory runs '
      'out: run the same command again to go on from the last checkpoint, with fewer data.workers '
      'should it come back'
    ) from error


def check_shared_memory(config: Data, share: int) -> None:
  """InputError where the batches of `share` examples do not fit: workers hand them over in shared
  memory, and one that finds none is killed (SIGBUS).
  """
  if not config.workers or sys.platform != 'linux':
    return
  free = 0
  if os.path.isdir(_SHARED_MEMORY):
    free = shutil.disk_usage(_SHARED_MEMORY).free
  batch = sum(array.nbytes for array in empty(config, share).values())
  # Each worker makes one more than it keeps, and one is read.
  needed = batch * (config.workers * (_batches_per_worker(config) + 1) + 1)
  if free < needed:
    raise InputError(
      f'data.workers: got {config.workers}, whose batches take {needed / 2**20:,.1f} MiB of '
      f'{_SHARED_MEMORY}; it has {free / 2**20:,.1f} MiB free; enlarge it (docker: --shm-size), or '
      f'take fewer, or data.workers=0 with more data.threads'
    )


def _batches_per_worker(config):
  return math.ceil(config.prefetch / config.workers)


def _copied(batch):
  """A copy outside of grain's shared memory.

  That outlives the process if a batch is still held at exit.
  """
  return {name: np.array(x) for name, x in batch.items()}


# --- in a worker --------------------------------------------------------------------------------


def _begin(index, count):
  processes.end_with_parent()

"""Tasks done, in one process or in several, in the folder of a store in the making."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence

from tips_jax.core.errors import InputError
from tips_jax.core.log import Progress
from tips_jax.data import store
from tips_jax.data.ingest import processes, tasks
from tips_jax.data.ingest.records import GROWING
from tips_jax.data.ingest.tasks import Tasks

_LOCK_FILE = 'lock'
# For which a folder stays: results of tasks, answers of a captioner, a store that is complete.
_KEPT = ('tasks/[0-9]*.json', 'tasks/*.journal', store.INFO_FILE)
# What killed processes leave: files of theirs, of files.write and of TFDS that are not complete.
_LEFT = (f'*{GROWING}', f'tasks/*{GROWING}', '.*', 'tasks/.*', '*.incomplete*')

# Does tasks elsewhere: given what opens them there, and their numbers.
Run = Callable[[Callable[[], Tasks], Sequence[int]], None]


# --- the folder ---------------------------------------------------------------------------------


@contextlib.contextmanager
def disk_errors(output: str | os.PathLike) -> Iterator[None]:
  """Within it an error of the disk is an InputError that names the store."""
  try:
    yield
  except OSError as error:
    raise InputError(f'cannot write the store {str(output)!r} ({error})') from error


@contextlib.contextmanager
def work_folder(output: str | os.PathLike, *, alone: bool) -> Iterator[pathlib.Path]:
  """The folder of a store in the making. alone: nobody else works in it, and it goes away again
  where no task is done.
  """
  folder = store.work_folder(output)
  with open(folder / _LOCK_FILE, 'w') as lock:
    try:
      fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
      raise InputError(
        f'{str(folder)!r}: another process is writing this store; expected one at a time, or '
        f'--part of all'
      ) from None
    except OSError:  # a file system without locks
      pass
    if not alone:
      yield folder
      return
    _remove_left(folder)
    try:
      yield folder
    finally:
      done = [path for pattern in _KEPT for path in folder.glob(pattern)]
      if folder.exists() and not done:
        shutil.rmtree(folder)


def _remove_left(folder):
  """Removes what killed processes left; one that was just killed may be about to end."""
  for pattern in _LEFT:
    for path in folder.glob(pattern):
      path.unlink(missing_ok=True)


def publish(folder: pathlib.Path, output: str | os.PathLike) -> None:
  """Gives a complete store its name, without what was needed to make it."""
  _remove_left(folder)
  shutil.rmtree(folder / tasks.FOLDER, ignore_errors=True)
  (folder / _LOCK_FILE).unlink(missing_ok=True)
  store.publish(folder, output)


# --- doing --------------------------------------------------------------------------------------


def chosen(work: Tasks, part: tuple[int, int] | None, merge_only: bool) -> list[int]:
  """The numbers of the tasks that are to be done here; InputError where none may be missing."""
  numbers = work.missing()
  if merge_only and numbers:
    raise InputError(
      f'--merge: {len(numbers)} of {len(work.tasks)} tasks are not done, the first is task '
      f'{numbers[0]}; expected all; run the missing parts again, or without --merge to do them '
      f'here'
    )
  if part is not None:
    index, count = part
    # Neighbors, as these may be of one file.
    own = range(len(work.tasks) * index // count, len(work.tasks) * (index + 1) // count)
    numbers = sorted(set(numbers) & set(own))
  return numbers


def do(
  work: Tasks,
  numbers: Sequence[int],
  open_work: Callable[[], Tasks],
  *,
  workers: int = 1,
  run: Run | None = None,
  stream: typing.TextIO | None = None,
) -> None:
  """Does tasks and shows how far they are: in this process, in several, or by `run` elsewhere."""
  if run is not None:
    run(open_work, numbers)
    return
  if not numbers:
    return
  meter = _Meter(work, numbers, stream or sys.stderr)
  workers = min(workers, len(numbers))
  if workers > 1:
    processes.do(open_work, numbers, workers, meter.tell)
  else:
    for number in numbers:
      work.do(number, meter.tell, threads=os.cpu_count() or 1)
  meter.close()


class _Meter:
  """The progress of the tasks `numbers`, those that were done before included."""

  def __init__(self, work, numbers, stream):
    before = set(range(len(work.tasks))) - set(work.missing())
    self._size = sum(work.tasks[i].size for i in (*before, *numbers))
    self._left = sum(work.tasks[i].size for i in numbers)
    self._before = sum(map(work.images_read, before))
    self._images = 0
    self._read = 0.0
    self._start = time.monotonic()
    self._progress = Progress(0, label='images', every_s=5.0, stream=stream)

  def tell(self, images: int, size: float) -> None:
    self._images += images
    self._read += size
    done = self._before + self._images
    # Which images are to come is known by their bytes alone.
    share = (self._size - self._left + self._read) / max(self._size, 1)
    self._progress.total = max(round(done / share) if share else 0, done)
    rate = self._images / max(time.monotonic() - self._start, 1e-9)
    if share < 1:
      self._progress.update(done, images_per_s=rate)

  def close(self) -> None:
    done = self._before + self._images
    self._progress.total = done
    self._progress.update(done, images_per_s=self._images / (time.monotonic() - self._start))
    self._progress.close()

"""Images that are equal byte for byte, found with sorted hashes on disk: the memory that it takes
does not grow with their number.

A task leaves the hashes of its images, of copies that of the first alone, and a list of its copies.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from tips_jax.data.ingest.report import MAX_LISTED

DIGEST_BYTES = 12
_AT_ONCE = 2**20  # hashes that are compared together
# The hash of an image, the number of its split, and its number in that split of its task.
_ENTRY = np.dtype([('high', '<u8'), ('low', '<u4'), ('split', 'u1'), ('index', '<u4')])
_IMAGE = np.dtype([('task', '<u4'), ('split', 'u1'), ('index', '<u4')])
_COPY = np.dtype([*_IMAGE.descr, ('of', _IMAGE)])  # an image, and the first one like it


class Hashes:
  """The hashes of the images of a task, in their order."""

  def __init__(self):
    self._data = bytearray()

  def add(self, digest: bytes, split: int, index: int) -> None:
    """digest: DIGEST_BYTES; split: its number; index: that of the image in the split."""
    self._data += digest + bytes([split]) + index.to_bytes(4, 'little')

  def sorted(self) -> tuple[np.ndarray, np.ndarray]:
    """(the hashes, of copies that of the first alone, sorted; the copies)"""
    entries = np.frombuffer(bytes(self._data), _ENTRY)
    return _apart(entries, np.zeros(len(entries), np.uint32))


def _apart(entries, tasks):
  """(the first of each hash, sorted; the others as copies); tasks: those of the entries."""
  order = np.lexsort((entries['low'], entries['high']))  # stable: equal ones stay in their order
  entries = entries[order]
  tasks = tasks[order]
  new = np.ones(len(entries), bool)
  new[1:] = (entries['high'][1:] != entries['high'][:-1]) | (
    entries['low'][1:] != entries['low'][:-1]
  )
  first = np.maximum.accumulate(np.where(new, np.arange(len(entries)), 0))[~new]
  copies = np.zeros(len(first), _COPY)
  for images, chosen in ((copies, ~new), (copies['of'], first)):
    images['task'] = tasks[chosen]
    images['split'] = entries['split'][chosen]
    images['index'] = entries['index'][chosen]
  return entries[new], copies


@dataclasses.dataclass
class Found:
  """The copies in all tasks."""

  counts: np.ndarray  # by number of the split
  first: np.ndarray  # MAX_LISTED of them at most, in order


def find(tasks: Sequence[tuple[str, str]], splits: int) -> Found:
  """The copies in tasks, of each of which the paths of what `Hashes.sorted` gave are given.

  splits: how many there are.
  """
  counts = np.zeros(splits, np.int64)
  first = np.zeros(0, _COPY)
  for copies in _of_all(tasks):
    counts += np.bincount(copies['split'], minlength=splits)
    first = np.concatenate([first, copies])
    first = first[np.lexsort((first['index'], first['split'], first['task']))[:MAX_LISTED]]
  return Found(counts, first)


def _of_all(tasks) -> Iterator[np.ndarray]:
  """The copies, those inside of tasks first."""
  total = 0
  for number, (hashes, copies) in enumerate(tasks):
    inside = np.load(copies)
    inside['task'] = number
    inside['of']['task'] = number
    yield inside
    total += len(np.load(hashes, mmap_mode='r'))
  # Hashes are spread evenly.
  parts = max(-(-total // _AT_ONCE), 1)
  for part in range(parts):
    yield _between([hashes for hashes, _ in tasks], part / parts, (part + 1) / parts)


def _between(paths, start, stop):
  """The copies between tasks whose hashes are in a range of all, given as shares."""
  entries = []
  tasks = []
  for number, path in enumerate(paths):
    of_task = np.load(path, mmap_mode='r')
    first, last = np.searchsorted(
      of_task['high'].astype(np.float64), np.multiply([start, stop], 2.0**64)
    )
    if stop == 1:
      last = len(of_task)
    entries.append(np.array(of_task[first:last]))
    tasks.append(np.full(last - first, number, np.uint32))
  _, copies = _apart(np.concatenate(entries), np.concatenate(tasks))
  return copies

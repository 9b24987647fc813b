"""The last pass: the records that stay, copied byte for byte, task by task."""

import functools
import hashlib
import os
import pathlib
import typing
from collections.abc import Mapping

import numpy as np

from tips_jax.curation.measuring import tasks_of
from tips_jax.data import store
from tips_jax.data.ingest import records
from tips_jax.data.ingest.tasks import Tasks, Tell

_TOLD = 256  # records after which the progress is told


class Copying(Tasks):
  """Copies the records of a store: of curated splits those that stay, of the others all."""

  def __init__(
    self,
    opened: store.Store,
    stay: Mapping[str, str],
    folder: pathlib.Path,
    task_bytes: int,
  ):
    """stay: paths of the arrays, bool [R], that say which records of a split stay."""
    super().__init__(tasks_of(opened, list(opened.splits), task_bytes), folder, 'copy-')
    self._store = opened
    self._stay = {split: np.load(path, mmap_mode='r') for split, path in stay.items()}
    self._source = functools.cache(opened.source)

  def settings_of_input(self) -> Mapping[str, typing.Any]:
    """The store and what stays of it."""
    stay = {}
    for split, array in self._stay.items():
      stay[split] = hashlib.sha256(np.packbits(array).tobytes()).hexdigest()
    return {'of': self._store.fingerprint, 'stay': stay}

  def images_read(self, number: int) -> int:
    return self.load_result(number)['read']

  def do(self, number: int, tell: Tell, *, threads: int = 1) -> None:
    task = self.tasks[number]
    raw = self._source(task.split).raw
    shards = records.Shards(str(self.folder / f'{task.split}-{number:06d}'))
    stay = self._stay.get(task.split)
    read = 0
    for piece in task.pieces:
      each = piece.size / max(piece.stop - piece.first, 1)
      told = piece.first
      for row in range(piece.first, piece.stop):
        if stay is None or stay[row]:
          shards.add(raw[row])
        if row + 1 - told == _TOLD or row + 1 == piece.stop:
          tell(row + 1 - told, each * (row + 1 - told))
          told = row + 1
      read += piece.stop - piece.first
    written = [shard._replace(path=os.path.basename(shard.path)) for shard in shards.close()]
    self.write_result(number, {'read': read, 'shards': written})

  def shards(self) -> dict[str, list[records.Written]]:
    """Those of all tasks, by split, in order."""
    result = {split: [] for split in self._store.splits}
    for number, task in enumerate(self.tasks):
      for shard in self.load_result(number)['shards']:
        result[task.split].append(records.Written(*shard))
    return result


def reopen_copying(
  path: str, stay: Mapping[str, str], folder: pathlib.Path, *, task_bytes: int
) -> Copying:
  """The same tasks in another process."""
  return Copying(store.open_store(path, check_shards=False), stay, folder, task_bytes)

"""The shards of a data set: array_record files, opened side by side and read in runs of records.

Each mostly waits where files are far away: on a mounted bucket an open takes 0.1 s, a read 20 ms.
"""

import bisect
import concurrent.futures
import itertools
import os
import pathlib
import resource
from collections.abc import Iterable, Sequence
from typing import Any

from array_record.python import array_record_module

from tips_jax.core.errors import InputError

_THREADS = 64
_OTHER_FILES = 256  # that a process may open beside its shards: logs, checkpoints, sockets
_RUN_BYTES = 2**24  # of neighbors, read in one request; without it each record is one
_BUFFER_BYTES = 2**15  # read at least; a record alone is read to its byte where it is larger


class Shards(Sequence):
  """The serialized records of shards, one after another. Threads may share it; it can be pickled.

  A shard is opened when it is first read, or by `open`. Raises InputError for one that does not
  hold as many records as the metadata says. Other errors are array_record's own.
  """

  groups = None  # any order of records is as fast as another

  def __init__(self, where: str, instructions: Sequence[Any]):
    """where: whose shards they are, for messages. instructions: those of a split of TFDS."""
    self._where = where
    self._paths = [os.fspath(i.filename) for i in instructions]
    self._counts = [i.examples_in_shard for i in instructions]
    self._skips = [i.skip for i in instructions]
    # Number of each shard's first record, and of all.
    self._starts = list(itertools.accumulate((i.take for i in instructions), initial=0))
    self._readers = {}

  def __getstate__(self):
    return {**self.__dict__, '_readers': {}}

  def __len__(self) -> int:
    return self._starts[-1]

  def __getitem__(self, number: int) -> bytes:
    number = range(len(self))[number]
    return self.read(number, number + 1)[0]

  def open(self) -> None:
    """Opens all shards that are not open yet."""
    if len(self._readers) == len(self._paths):
      return
    closed = set(range(len(self._paths))) - set(self._readers)
    allow_open_files(self._where, len(closed))
    in_threads(self._reader, closed)

  def read(self, first: int, stop: int) -> list[bytes]:
    """The records first to stop - 1: one request for each shard that they are in."""
    records = []
    while first < stop:
      shard = bisect.bisect_right(self._starts, first) - 1
      end = min(stop, self._starts[shard + 1])
      offset = self._skips[shard] - self._starts[shard]
      records += self._reader(shard).read(first + offset, end + offset)
      first = end
    return records

  def _reader(self, shard):
    reader = self._readers.get(shard)
    if reader is None:
      path = self._paths[shard]
      reader = array_record_module.ArrayRecordReader(
        path,
        options=f'readahead_buffer_size:{_RUN_BYTES}',
        file_reader_buffer_size=_BUFFER_BYTES,
      )
      count = reader.num_records()
      if count != self._counts[shard]:
        raise InputError(
          f'{path!r}: got {count} records; expected {self._counts[shard]}, as dataset_info.json '
          'says; copy the data set again'
        )
      # Two threads may open it at once; one reader is closed with its last reference.
      self._readers[shard] = reader
    return reader


def sizes(paths: Iterable[pathlib.Path]) -> list[int | None]:
  """Bytes of each file, None for one that does not exist."""
  return in_threads(_size, paths)


def _size(path):
  try:
    return path.stat().st_size
  except FileNotFoundError:
    return None


def in_threads(function, items):
  """[function(item) of each], of a function that mostly waits; the first error is raised."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS, 'shards') as pool:
    return list(pool.map(function, items))


def allow_open_files(where: str, count: int) -> None:
  """Raises this process's limit of open files so that `count` more fit, with its children's.

  Raises InputError where the system does not allow that many.
  """
  needed = len(os.listdir('/dev/fd')) + count + _OTHER_FILES
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if _at_least(soft, needed):
    return
  if not _at_least(hard, needed):
    raise InputError(
      f'{where}: got {count:,} shards, each an open file, and a limit of {hard:,} open files; '
      f'expected at least {needed:,}: raise it with `ulimit -n {needed}`, as root or in the '
      f"system's settings"
    )
  # macOS takes no unlimited number.
  limit = hard
  if hard == resource.RLIM_INFINITY:
    limit = needed
  resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _at_least(limit, needed):
  return limit == resource.RLIM_INFINITY or limit >= needed

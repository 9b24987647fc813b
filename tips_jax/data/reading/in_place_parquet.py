"""Random access to the rows of parquet files, by groups of rows that stay decoded for a while."""

import bisect
import collections
import concurrent.futures
import itertools
import threading
import typing

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.arrow_rows import Row
from tips_jax.data.ingest.columnar import ParquetReader
from tips_jax.data.ingest.reader import Piece
from tips_jax.data.reading.records import Example, of_sample

# Groups among whose rows the order is random: together they have so many bytes at most, and are at
# least so many and at most so many.
_MIXED_BYTES = 64 * 2**20
_MIXED = (2, 64)
_KEPT = 3  # times as many stay decoded: those before and those that are read ahead


class Groups(typing.NamedTuple):
  """Records that are read together: only an order that stays among few groups is fast."""

  starts: tuple[int, ...]  # number of the first record of each group, and of all records
  mixed: int  # groups whose records may be in any order among each other


class Parquet:
  """The rows of a split one after another. Threads may share it; it can be pickled."""

  def __init__(self, reader: ParquetReader):
    self._reader = reader
    self._pieces = []  # of one group each
    self._befores = []  # rows of its file before it
    self._rows = []  # those of the split, by their place in the group; None: all
    counts = []
    for piece in reader.pieces(0):
      rows = reader.rows_of_split(piece)
      count = reader.count(piece) if rows is None else len(rows)
      if not count:
        continue
      counts.append(count)
      self._pieces.append(piece)
      self._befores.append(reader.count(piece._replace(first=0, stop=piece.first)))
      self._rows.append(rows)
    if not counts:
      raise InputError(f'data.store: {reader.files[:3]} have no rows; expected some')
    size = max(sum(piece.size for piece in self._pieces) // len(self._pieces), 1)
    least, most = _MIXED
    mixed = min(max(_MIXED_BYTES // size, least), most)
    self.groups = Groups(tuple(itertools.accumulate(counts, initial=0)), mixed)
    self._reset()

  def _reset(self):
    self._lock = threading.Lock()
    self._decoded = collections.OrderedDict()  # number -> a future, which threads may wait for
    self._metadata = {}

  def __getstate__(self):
    state = dict(self.__dict__)
    for name in ('_lock', '_decoded', '_metadata'):
      del state[name]
    return state

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._reset()

  def __len__(self) -> int:
    return self.groups.starts[-1]

  def open(self) -> None:
    """Nothing is kept open: a file is opened for each group."""

  def read(self, first: int, stop: int) -> list[Example]:
    """The records first to stop - 1; ValueError for one without a readable image."""
    examples = []
    for number in range(first, stop):
      group = bisect.bisect_right(self.groups.starts, number) - 1
      place = number - self.groups.starts[group]
      if self._rows[group] is not None:
        place = self._rows[group][place]
      row = self._group(group)[place]
      file = self._pieces[group].file
      sample = self._reader.sample(row, file, self._befores[group] + place)
      examples.append(of_sample(sample, self._reader))
    return examples

  def _group(self, number) -> list[Row]:
    """The rows of a group; the first thread that asks for it decodes it."""
    with self._lock:
      future = self._decoded.get(number)
      mine = future is None
      if future is None:
        future = self._decoded[number] = concurrent.futures.Future()
        while len(self._decoded) > _KEPT * self.groups.mixed:
          self._decoded.popitem(last=False)
      else:
        self._decoded.move_to_end(number)
    if mine:
      try:
        future.set_result(self._decode(self._pieces[number]))
      except BaseException as error:
        with self._lock:
          self._decoded.pop(number, None)  # a disk may be back a moment later
        future.set_exception(error)
    return future.result()

  def _decode(self, piece: Piece) -> list[Row]:
    metadata = self._metadata.get(piece.file)
    if metadata is None:
      metadata = self._metadata[piece.file] = self._reader.metadata(piece.file)
    return self._reader.rows(piece, metadata)

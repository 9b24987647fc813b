"""The first pass over a store, task by task: every record is judged by the steps that need no other
record, and what the other steps need of it is left on the disk.

A record that one of these steps drops is not encoded for the steps after it. In memory are a few
images at a time; on the disk some tens of bytes an image, and its features (float16).
"""

import functools
import hashlib
import itertools
import json
import pathlib
import typing
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tips_jax.core import files, strict
from tips_jax.core.errors import InputError
from tips_jax.curation import encoders, judging, looks, schema, texts
from tips_jax.curation.records import Pictures, Record
from tips_jax.data import store
from tips_jax.data.ingest import tfds_folder
from tips_jax.data.ingest.reader import Piece, ranges
from tips_jax.data.ingest.samples import growing, in_threads
from tips_jax.data.ingest.tasks import Task, Tasks, Tell, cut

STAYS = 255  # in `first`: no step drops the record by itself
_DIGEST = np.dtype([('high', '<u8'), ('low', '<u4')])
# What is known of each record, beside its features and `values`, one value for each step.
COLUMNS = {
  'first': np.dtype('u1'),  # number of the first step that drops it, 0 where it cannot be read
  'pixels': np.dtype('<u4'),
  'digest': _DIGEST,  # of the encoded image
  'hash': np.dtype('<u8'),  # of how it looks
  'template': np.dtype('<u8'),  # of the alt text
}


class _Part(typing.NamedTuple):
  """A split as `cut` wants it."""

  count: int
  size: int

  def pieces(self, size: int) -> Sequence[Piece]:
    return ranges(self.count, size, self.size)


def tasks_of(opened: store.Store, splits: Sequence[str], task_bytes: int) -> list[Task]:
  """Tasks, each a range of the records of a split."""
  infos = tfds_folder.open_builder(opened.path).info.splits
  parts = {split: _Part(opened.splits[split], infos[split].num_bytes) for split in splits}
  return cut(parts, task_bytes)


class Measuring(Tasks):
  """Measures the records of a store."""

  def __init__(
    self,
    opened: store.Store,
    curation: schema.Curation,
    folder: pathlib.Path,
    task_bytes: int,
  ):
    super().__init__(tasks_of(opened, curation.splits, task_bytes), folder)
    self.curation = curation
    self._store = opened
    self._source = functools.cache(opened.source)
    self._look = any(
      isinstance(step, (schema.NearDuplicates, schema.Decontaminate)) for step in curation.steps
    )
    # Encoders, with the number of the first step that asks for each.
    self.encoders = {}
    for number, step in enumerate(curation.steps, 1):
      if getattr(step, 'encoder', ''):
        self.encoders.setdefault(step.encoder, number)
    self._batched = [
      number for number, step in enumerate(curation.steps, 1) if isinstance(step, judging.BATCHED)
    ]

  def settings_of_input(self) -> Mapping[str, typing.Any]:
    """The store, the steps, their encoders and their sets of images."""
    return {
      'of': self._store.fingerprint,
      'curation': strict.plain(self.curation),
      'encoders': {name: encoders.identity(name) for name in self.encoders},
      'sets': {name: Pictures(name, 'sets').identity for name in self._sets()},
    }

  def _sets(self) -> list[str]:
    """The sets of images that steps ask for."""
    names = []
    for step in self.curation.steps:
      names += [*getattr(step, 'evaluations', ()), *getattr(step, 'queries', ())]
    return sorted(set(names))

  def images_read(self, number: int) -> int:
    return self.load_result(number)['read']

  def do(self, number: int, tell: Tell, *, threads: int = 1) -> None:
    task = self.tasks[number]
    count = sum(piece.stop - piece.first for piece in task.pieces)
    measured = _Measured(count, len(self.curation.steps), list(self.encoders))
    rows = itertools.chain.from_iterable(range(p.first, p.stop) for p in task.pieces)
    judge = functools.partial(self._judge, self._source(task.split))
    if threads > 1:
      judged = in_threads(judge, rows, threads)
    else:
      judged = ((row, judge(row)) for row in rows)
    each = task.size / max(count, 1)
    with (
      growing(self.path(number, 'ids')) as ids,
      growing(self.path(number, 'reasons')) as reasons,
    ):
      batches = iter(lambda: list(itertools.islice(judged, encoders.BATCH)), [])
      at = 0
      for batch in batches:
        alone = [each for _, each in batch]
        self._judge_together(alone, measured, at)
        for i, one in enumerate(alone):
          measured.put(at + i, one)
          line = json.dumps(one.id) + '\n'  # ASCII
          ids.write(line)
          measured.ends[at + i] = len(line)
          if one.reason:
            reasons.write(json.dumps([at + i, one.first, one.reason]) + '\n')
        at += len(batch)
        tell(len(batch), each * len(batch))
    for name, array in measured.arrays(self.encoders).items():
      files.write(self.path(number, f'{name}.npy'), functools.partial(np.save, arr=array))
    self.write_result(number, {'read': count})

  def _judge(self, source, row):
    """What a record by itself is, in a thread."""
    one = _One(len(self.curation.steps))
    try:
      record = Record(source[row])
      one.id = record.id
      height, width = record.size
      if self._look or self.encoders or self._batched:
        one.values_of['hash'] = looks.hashed(record.pixels)
    except ValueError as error:  # InputError is one: the record is damaged
      one.drop(0, str(error))
      one.id = one.id or str(row)
      return one
    digest = hashlib.sha256(record.image).digest()
    one.values_of['digest'] = (
      int.from_bytes(digest[:8], 'big'),
      int.from_bytes(digest[8:12], 'big'),
    )
    one.values_of['pixels'] = height * width
    one.values_of['template'] = texts.template(record.alt_text)
    for number, step in enumerate(self.curation.steps, 1):
      if number not in self._batched:
        one.values[number - 1], reason = judging.judge(step, record)
        if reason:
          one.drop(number, reason)
          break
    for name, number in self.encoders.items():
      if one.first >= number:
        one.prepared[name] = encoders.prepare(name, record.pixels)
    record.release()
    one.record = record
    return one

  def _judge_together(self, batch, measured, at):
    """Encodes a batch, and judges it by the steps that see several records at once."""
    last = max([0, *self._batched, *self.encoders.values()])
    features = {}
    for number in range(1, last + 1):
      step = self.curation.steps[number - 1]
      alive = [i for i, one in enumerate(batch) if one.first >= number]
      if not alive:
        break
      for name, first in self.encoders.items():
        if first == number:
          features[name] = self._encode(name, batch, alive)
          measured.put_features(name, at, features[name])
      if number in self._batched:
        records = [batch[i].record for i in alive]
        of_alive = {name: x[alive] for name, x in features.items()}
        found = judging.judge_all(step, records, of_alive)
        for i, (value, reason) in zip(alive, found):
          batch[i].values[number - 1] = value
          if reason:
            batch[i].drop(number, reason)

  def _encode(self, name, batch, alive):
    """float32 [B, E]; zeros where a record is not encoded."""
    encoded = encoders.image_features(name, [batch[i].prepared[name] for i in alive])
    result = np.zeros((len(batch), encoded.shape[1]), np.float32)
    result[alive] = encoded
    return result


def reopen_measuring(
  path: str, curation: schema.Curation, folder: pathlib.Path, *, task_bytes: int
) -> Measuring:
  """The same tasks in another process."""
  opened = store.open_store(path, check_shards=False)
  return Measuring(opened, curation, folder, task_bytes)


class _One:
  """What is known of one record."""

  def __init__(self, steps):
    self.id = ''
    self.record: Record | None = None
    self.first = STAYS
    self.reason = ''
    self.values = [judging.NAN] * steps
    self.values_of = {}  # COLUMNS
    self.prepared = {}  # image by encoder

  def drop(self, number, reason):
    if number < self.first:
      self.first = number
      self.reason = reason


class _Measured:
  """The arrays of a task."""

  def __init__(self, count, steps, names):
    self._columns = {name: np.zeros(count, dtype) for name, dtype in COLUMNS.items()}
    self.ends = np.zeros(count, np.int64)  # of the lines of ids: their lengths first
    self._values = np.full((steps, count), np.nan, np.float32)
    self._count = count
    self._features = dict.fromkeys(names)

  def put(self, at, one):
    self._columns['first'][at] = one.first
    for name, value in one.values_of.items():
      self._columns[name][at] = value
    self._values[:, at] = one.values

  def put_features(self, name, at, features):
    if self._features[name] is None:
      self._features[name] = np.zeros((self._count, features.shape[1]), np.float16)
    self._features[name][at : at + len(features)] = features

  def arrays(self, names):
    result = {**self._columns, 'ends': np.cumsum(self.ends)}
    result.update({f'value-{number}': row for number, row in enumerate(self._values, 1)})
    for number, name in enumerate(names):
      features = self._features[name]
      if features is None:  # none was encoded
        features = np.zeros((self._count, 0), np.float16)
      result[f'features-{number}'] = features
    return result


class Table:
  """What was measured of all records, which are counted through: the rows."""

  def __init__(self, measuring: Measuring, opened: store.Store):
    self._measuring = measuring
    self._source = functools.cache(opened.source)
    counts = [measuring.images_read(number) for number in range(len(measuring.tasks))]
    self._starts = np.cumsum([0, *counts])
    self.encoders = list(measuring.encoders)
    self._ids_of = functools.lru_cache(maxsize=1024)(self._load_ids)
    self._features_of = functools.lru_cache(maxsize=1024)(self._load_features)

  def __len__(self) -> int:
    return int(self._starts[-1])

  def column(self, name: str) -> np.ndarray:
    """One of COLUMNS, or value-N of step N, of all rows."""
    paths = [self._path(number, f'{name}.npy') for number in range(len(self._starts) - 1)]
    return np.concatenate([np.load(path) for path in paths])

  def features(self, name: str, rows: np.ndarray) -> np.ndarray:
    """float32 [n, E] of length one, of an encoder; zeros where a record was not encoded."""
    number = self.encoders.index(name)
    owners = np.searchsorted(self._starts, rows, side='right') - 1
    parts = []
    width = 0
    for owner in np.unique(owners).tolist():
      of_task = self._features_of(owner, number)
      width = max(width, of_task.shape[1])
      where = np.flatnonzero(owners == owner)
      parts.append((where, of_task[rows[where] - self._starts[owner]]))
    result = np.zeros((len(rows), width), np.float32)
    for where, found in parts:
      result[where, : found.shape[1]] = found
    # They were rounded.
    return result / np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)

  def _load_features(self, owner, number):
    return np.load(self._path(owner, f'features-{number}.npy'), mmap_mode='r')

  def id(self, row: int) -> str:
    number, within = self.place(row)
    lines, ends = self._ids_of(number)
    first = int(ends[within - 1]) if within else 0
    return json.loads(bytes(lines[first : int(ends[within])]))

  def _load_ids(self, number):
    lines = np.memmap(self._path(number, 'ids'), np.uint8, 'r')
    return lines, np.load(self._path(number, 'ends.npy'), mmap_mode='r')

  def place(self, row: int) -> tuple[int, int]:
    """(number of the task, number in the task) of a row."""
    number = int(np.searchsorted(self._starts, row, side='right')) - 1
    return number, row - int(self._starts[number])

  def split(self, row: int) -> str:
    return self._measuring.tasks[self.place(row)[0]].split

  def rows_of_split(self, split: str) -> Iterator[range]:
    """Those of its tasks, in order."""
    for number, task in enumerate(self._measuring.tasks):
      if task.split == split:
        yield range(int(self._starts[number]), int(self._starts[number + 1]))

  def record(self, row: int) -> Record:
    """Reads a record once more."""
    number, within = self.place(row)
    task = self._measuring.tasks[number]
    for piece in task.pieces:
      count = piece.stop - piece.first
      if within < count:
        return Record(self._source(task.split)[piece.first + within])
      within -= count
    raise InputError(f'row {row}: not in the store')

  def reasons(self) -> Iterator[tuple[int, int, str]]:
    """(row, number of the step, reason) of the rows that a step drops by itself, in order."""
    for number, start in enumerate(self._starts[:-1].tolist()):
      with open(self._path(number, 'reasons'), encoding='utf-8') as file:
        for line in file:
          within, step, reason = json.loads(line)
          yield start + within, step, reason

  def _path(self, number, name):
    return self._measuring.path(number, name)

"""A store in the making: tasks, each a range of the input, which any process does once.

A folder beside the store holds what is done. The tasks follow from the input and the settings
alone, and so does every byte that they write: whoever does them, in which order, and how often they
are killed, the store is the same. A task is done when its result is there, which is written last.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

from PIL import Image

import tips_jax
from tips_jax.core import files
from tips_jax.core.errors import InputError
from tips_jax.data.ingest import samples
from tips_jax.data.ingest.reader import Piece, Reader
from tips_jax.data.ingest.records import Written

_PLAN_FILE = 'plan.json'
TASKS_FOLDER = 'tasks'
# Bytes of the input that a task reads: what a kill costs, and what a shard of the store holds.
_TASKS = 64  # of a data set between the two bounds
_LEAST = 32 * 2**20
_MOST = 2**30

# Called with the images and the bytes of the input that were read since the last call.
Tell = Callable[[int, float], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What the store depends on beside its input."""

  min_side: int = 16
  max_pixels: int = 50_000_000
  limit: int = 0
  test_fraction: float = 0.0
  learn: bool = False  # whether the texts of the first split are kept, for a tokenizer
  task_bytes: int = 0  # of the input; 0: by its size


class Task(typing.NamedTuple):
  """Consecutive pieces of a split's input."""

  split: str
  pieces: tuple[Piece, ...]

  @property
  def size(self) -> int:
    """Bytes of the input, about."""
    return sum(piece.size for piece in self.pieces)


class Result(typing.NamedTuple):
  """What a task left."""

  splits: Mapping[str, Mapping[str, int]]  # counts
  shards: Mapping[str, Sequence[Written]]


class Work:
  """The tasks of a store, and what is done of them in a folder."""

  def __init__(self, readers: Mapping[str, Reader], folder: pathlib.Path, settings: Settings):
    self.readers = readers
    self.folder = folder
    self.settings = settings
    self.labels = samples.Labels(readers)
    self.splits = list(dict.fromkeys([*readers, samples.TEST]))
    self.tasks = _cut(readers, settings)

  def begin(self) -> None:
    """Begins in an empty folder, or goes on in that of the same input and settings; InputError for
    another's.
    """
    (self.folder / TASKS_FOLDER).mkdir(parents=True, exist_ok=True)
    path = self.folder / TASKS_FOLDER / _PLAN_FILE
    plan = json.loads(json.dumps(self._plan()))
    try:
      files.write(path, json.dumps(plan, indent=1), replace=False)
    except FileExistsError:
      begun = json.loads(path.read_text())
      for name, value in plan.items():
        if begun.get(name) != value:
          raise InputError(
            f'{str(self.folder)!r} was begun with {name} {begun.get(name)!r}; got {value!r}; '
            f'expected the same command, or remove the folder to begin anew'
          ) from None

  def _plan(self):
    plan = {'version': tips_jax.__version__, **dataclasses.asdict(self.settings)}
    for split, reader in self.readers.items():
      options = dataclasses.asdict(reader.options)
      del options['images']  # where it is may change, as that of the input may
      plan[f'input of {split}'] = {'kind': reader.kind, **options, **reader.settings}
    pieces = hashlib.sha256()
    for task in self.tasks:
      for piece in task.pieces:
        piece = piece._replace(file=os.path.basename(piece.file))
        pieces.update(repr((task.split, *piece)).encode())
    plan['files'] = pieces.hexdigest()
    return plan

  def missing(self) -> list[int]:
    """The numbers of the tasks that are not done."""
    done = set(os.listdir(self.folder / TASKS_FOLDER))
    return [i for i in range(len(self.tasks)) if os.path.basename(self._result(i)) not in done]

  def do(self, number: int, tell: Tell, *, threads: int = 1) -> None:
    """Does a task. threads: that decode images."""
    task = self.tasks[number]
    reader = self.readers[task.split]
    first = task.split == next(iter(self.readers))
    writer = samples.SampleWriter(
      reader,
      task.split,
      self.splits,
      self.labels,
      lambda name: self._path(number, name),
      max_pixels=self.settings.max_pixels,
      test_fraction=self.settings.test_fraction if first else 0.0,
      learn=self.settings.learn and first,
    )
    before = len(reader.notes)
    read = samples.checked(
      itertools.islice(self._read(reader, task, tell), self.settings.limit or None),
      min_side=self.settings.min_side,
      max_pixels=self.settings.max_pixels,
      threads=threads,
    )
    with warnings.catch_warnings():
      # check_image refuses such images itself.
      warnings.simplefilter('ignore', Image.DecompressionBombWarning)
      for sample, (check, digest) in read:
        writer.take(sample, check, digest)
    writer.note(task.split, reader.notes[before:])
    del reader.notes[before:]
    shards = writer.close()
    report = writer.report.content()
    files.write(self._path(number, 'rows.json'), json.dumps(report['rows']))
    result = {'splits': report['splits'], 'shards': {}}
    for split, written in shards.items():
      result['shards'][split] = [
        shard._replace(path=os.path.basename(shard.path)) for shard in written
      ]
    files.write(self._result(number), json.dumps(result))

  def _read(self, reader, task, tell):
    for piece in task.pieces:
      each = 0.0
      for sample in reader.read(piece):
        if self.settings.limit:
          each = task.size / self.settings.limit
        each = each or piece.size / max(reader.count(piece), 1)
        yield sample
        tell(1, each)

  # --- what is done -----------------------------------------------------------------------------

  def result(self, number: int) -> Result:
    """Of a task that is done."""
    content = json.loads(pathlib.Path(self._result(number)).read_text())
    shards = {}
    for split, written in content['shards'].items():
      shards[split] = [Written(*shard) for shard in written]
    return Result(content['splits'], shards)

  def rows(self, number: int) -> Mapping[str, Sequence[Mapping[str, str]]]:
    """The rows that a task lists, by kind."""
    return json.loads(pathlib.Path(self._path(number, 'rows.json')).read_text())

  def hashes(self, number: int) -> tuple[str, str]:
    """Paths of the arrays of `copies.Hashes.sorted`."""
    return self._path(number, 'hashes.npy'), self._path(number, 'copies.npy')

  def ids(self, number: int, split: str) -> list[str]:
    """The ids of a task's images, in the order of the split."""
    return list(self._lines(number, f'{split}.ids'))

  def texts(self) -> Iterator[str]:
    """The texts of the first split, in order."""
    for number in range(len(self.tasks)):
      yield from self._lines(number, 'texts')

  def _lines(self, number, name):
    path = self._path(number, name)
    if os.path.exists(path):
      with open(path, encoding='utf-8') as file:
        yield from map(json.loads, file)

  def _path(self, number, name):
    """Where a file of a task is; shards are where they stay."""
    if name in self.splits:
      return str(self.folder / f'{name}-{number:06d}')
    return str(self.folder / TASKS_FOLDER / f'{number:06d}.{name}')

  def _result(self, number):
    return self._path(number, 'json')


def _cut(readers, settings):
  size = settings.task_bytes
  if not size:
    total = sum(reader.size for reader in readers.values())
    size = min(max(total // _TASKS, _LEAST), _MOST)
  tasks = []
  for split, reader in readers.items():
    pieces = []
    taken = 0
    for piece in reader.pieces(size):
      # What is read of a limited input is known only while it is read: one task.
      if pieces and taken + piece.size / 2 > size and not settings.limit:
        tasks.append(Task(split, tuple(pieces)))
        pieces = []
        taken = 0
      pieces.append(piece)
      taken += piece.size
    if pieces:
      tasks.append(Task(split, tuple(pieces)))
  return tasks

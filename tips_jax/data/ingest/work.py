"""A store in the making from the samples of readers, task by task, in a folder beside it."""

import dataclasses
import itertools
import json
import os
import pathlib
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image

from tips_jax.core import files
from tips_jax.data.ingest import samples
from tips_jax.data.ingest.reader import Reader
from tips_jax.data.ingest.records import Written
from tips_jax.data.ingest.tasks import Tasks, Tell, cut


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What the store depends on beside its input."""

  min_side: int = 16
  max_pixels: int = 50_000_000
  limit: int = 0
  test_fraction: float = 0.0
  learn: bool = False  # whether the texts of the first split are kept, for a tokenizer
  task_bytes: int = 0  # of the input; 0: by its size


class Result(typing.NamedTuple):
  """What a task left."""

  splits: Mapping[str, Mapping[str, int]]  # counts
  shards: Mapping[str, Sequence[Written]]


class Work(Tasks):
  """The tasks of a store."""

  def __init__(self, readers: Mapping[str, Reader], folder: pathlib.Path, settings: Settings):
    super().__init__(cut(readers, settings.task_bytes, settings.limit), folder)
    self.readers = readers
    self.settings = settings
    self.labels = samples.Labels(readers)
    self.splits = list(dict.fromkeys([*readers, samples.TEST]))

  def settings_of_input(self) -> Mapping[str, typing.Any]:
    """The settings and the readers."""
    plan = dataclasses.asdict(self.settings)
    for split, reader in self.readers.items():
      options = dataclasses.asdict(reader.options)
      del options['images']  # where it is may change, as that of the input may
      plan[f'input of {split}'] = {'kind': reader.kind, **options, **reader.settings}
    return plan

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
      lambda name: self.path(number, name),
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
    files.write(self.path(number, 'rows.json'), json.dumps(report['rows']))
    result = {'splits': report['splits'], 'shards': {}}
    for split, written in shards.items():
      result['shards'][split] = [
        shard._replace(path=os.path.basename(shard.path)) for shard in written
      ]
    self.write_result(number, result)

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
    content = self.load_result(number)
    shards = {}
    for split, written in content['shards'].items():
      shards[split] = [Written(*shard) for shard in written]
    return Result(content['splits'], shards)

  def rows(self, number: int) -> Mapping[str, Sequence[Mapping[str, str]]]:
    """The rows that a task lists, by kind."""
    return json.loads(pathlib.Path(self.path(number, 'rows.json')).read_text())

  def hashes(self, number: int) -> tuple[str, str]:
    """Paths of the arrays of `copies.Hashes.sorted`."""
    return self.path(number, 'hashes.npy'), self.path(number, 'copies.npy')

  def ids(self, number: int, split: str) -> list[str]:
    """The ids of a task's images, in the order of the split."""
    return list(self._lines(number, f'{split}.ids'))

  def texts(self) -> Iterator[str]:
    """The texts of the first split, in order."""
    for number in range(len(self.tasks)):
      yield from self._lines(number, 'texts')

  def _lines(self, number, name):
    path = self.path(number, name)
    if os.path.exists(path):
      with open(path, encoding='utf-8') as file:
        yield from map(json.loads, file)

  def images_read(self, number: int) -> int:
    return sum(counts.get('read', 0) for counts in self.result(number).splits.values())

  def path(self, number: int, name: str) -> str:
    """Where a file of a task is; shards are where they stay."""
    if name in self.splits:
      return str(self.folder / f'{name}-{number:06d}')
    return super().path(number, name)

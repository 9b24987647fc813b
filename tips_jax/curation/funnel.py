"""The steps of a curation, one after the other; what each chose is kept on the disk."""

import functools
import json
import pathlib
import typing
from collections.abc import Iterator

import numpy as np

from tips_jax.core import files
from tips_jax.core.log import Progress
from tips_jax.curation import choosing, schema
from tips_jax.curation.choosing import Dropped
from tips_jax.curation.measuring import STAYS, Table
from tips_jax.data.ingest import tasks

UNREADABLE = 'unreadable'


class Funnel:
  """Which record goes by which step. Step 0 drops those that cannot be read."""

  def __init__(
    self,
    table: Table,
    curation: schema.Curation,
    folder: pathlib.Path,
    stream: typing.TextIO | None = None,
  ):
    """Runs the steps; those that were done before are read."""
    self.table = table
    self.curation = curation
    self.names = [UNREADABLE, *map(schema.title, curation.steps)]
    self._folder = folder / tasks.FOLDER
    alone = table.column('first')
    self.by = np.full(len(table), STAYS, np.uint8)  # number of the step that drops each row
    self.by[alone == 0] = 0
    progress = Progress(len(curation.steps), label='step', every_s=0.0, stream=stream)
    for number in range(1, len(self.names)):
      self.by[(self.by == STAYS) & (alone == number)] = number
      path = self._path(number, 'npy')
      if not path.exists():
        self._choose(number)
      self.by[np.load(path)] = number
      dropped = int(np.sum(self.by == number))
      progress.update(number, note=f'{self.names[number]}: {dropped:,} dropped')
    progress.close()

  def _path(self, number, ending):
    return self._folder / f'step-{number:03d}.{ending}'

  def _choose(self, number):
    rows = np.flatnonzero(self.by == STAYS)
    values = np.full(len(self.table), np.nan, np.float32)
    step = self.curation.steps[number - 1]
    dropped = []
    if len(rows):
      asked = choosing.Asked(step, number, self.table, rows, self.curation.seed, values)
      dropped = sorted(choosing.choose(asked), key=lambda each: each.row)
    lines = ''.join(json.dumps(each) + '\n' for each in dropped)
    files.write(self._path(number, 'jsonl'), lines)
    if np.isfinite(values).any():
      files.write(self._path(number, 'values'), functools.partial(np.save, arr=values))
    chosen = np.array([each.row for each in dropped], np.int64)
    # Last: it says that the step is done.
    files.write(self._path(number, 'npy'), functools.partial(np.save, arr=chosen))

  def counts(self) -> dict[str, int]:
    """Records that each step drops; steps of the same name are told apart by their numbers."""
    found = np.bincount(self.by, minlength=256)
    return {f'{number} {name}': int(found[number]) for number, name in enumerate(self.names)}

  def reached(self, number: int) -> np.ndarray:
    """The rows that no step before `number` drops."""
    return np.flatnonzero(self.by >= number)

  def stays(self, split: str) -> np.ndarray:
    """bool [R]: which records of a split stay."""
    parts = [self.by[rows.start : rows.stop] == STAYS for rows in self.table.rows_of_split(split)]
    return np.concatenate([np.zeros(0, bool), *parts])

  def values(self, number: int) -> np.ndarray:
    """float32 [rows]: what step `number` measured; nan where it did not."""
    path = self._path(number, 'values')
    if path.exists():
      return np.load(path)
    return self.table.column(f'value-{number}')

  def dropped(self) -> Iterator[tuple[int, Dropped]]:
    """(number of the step, what it dropped), step by step, by row."""
    for number in range(len(self.names)):
      for row, step, reason in self.table.reasons():
        if step == number == self.by[row]:
          yield number, Dropped(row, reason)
      if number:
        with open(self._path(number, 'jsonl'), encoding='utf-8') as file:
          for line in file:
            yield number, Dropped(*json.loads(line))

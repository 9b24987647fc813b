"""The order of a run's examples: shuffled, mixed, endless.

Which record is which example is a function of the seed and the example's index alone.
"""

import functools
import typing
from collections.abc import Sequence

import grain
import numpy as np

from tips_jax.data.reading.mixing import scheduled

_PLAIN_GROUP = 64  # records of a store, to be mixed with groups of others


class Groups(typing.Protocol):
  """Records that are read together: only an order that stays among few groups is fast."""

  starts: Sequence[int]  # number of the first record of each group, and of all records
  mixed: int  # groups whose records may be in any order among each other


def example_order(
  sizes: Sequence[int],
  weights: Sequence[float],
  seed: int,
  neighbors: int,
  *,
  groups: Sequence[Groups | None] = (),
  schedule: Sequence[tuple[float, ...]] = (),
  batch_size: int = 1,
) -> grain.MapDataset:
  """Global example index -> record number, as an endless MapDataset.

  Without weights one shuffle covers all stores, so every epoch sees each record once. Weighted
  stores interleave in fixed proportions (grain rounds them by less than 1 %), each shuffled anew in
  each of its own epochs. groups: of each store; None, or none at all: any order is fast.
  schedule: weights that change with the step (mixing.py), which is the index by batch_size.
  """
  groups = list(groups) or [None] * len(sizes)
  if len(sizes) == 1 or not (weights or schedule):
    groups = [_joined(sizes, groups)]
    sizes = [sum(sizes)]
    weights = schedule = ()
  parts = []
  end = 0
  for i, size in enumerate(sizes):
    start, end = end, end + size
    # Independent shuffles: equal keys would pair the records of stores of one size.
    key = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
    if groups[i] is not None:
      shuffled = _Grouped(start, groups[i], key)
      parts.append(grain.MapDataset.range(size).repeat().map_with_index(shuffled))
    elif min(neighbors, size) == 1:
      parts.append(grain.MapDataset.range(start, end).shuffle(seed=key).repeat())
    else:
      runs = _Runs(start, size, min(neighbors, size), key)
      parts.append(grain.MapDataset.range(size).repeat().map_with_index(runs))
  if schedule:
    return scheduled(parts, schedule, seed, batch_size)
  return grain.MapDataset.mix(parts, list(weights)) if weights else parts[0]


class _Joined(typing.NamedTuple):
  starts: Sequence[int]
  mixed: int


def _joined(sizes, groups):
  """The groups of stores end to end; None where none has any."""
  if not any(groups):
    return None
  starts = []
  first = 0
  for size, of_store in zip(sizes, groups):
    own = of_store.starts[:-1] if of_store else range(0, size, _PLAIN_GROUP)
    starts += [first + start for start in own]
    first += size
  return _Joined((*starts, first), min(g.mixed for g in groups if g))


class _Grouped:
  """Index -> record, by blocks of a few groups: groups are shuffled, and so is what is in a block.

  Every epoch sees each record once, and has other groups together.
  """

  def __init__(self, start: int, groups: Groups, key: int):
    self._start = start
    self._starts = np.array(groups.starts, np.int64)
    self._mixed = groups.mixed
    self._key = key

  def __getstate__(self):
    return {name: value for name, value in self.__dict__.items() if name[:5] != '_last'}

  def __call__(self, index: int, _: int) -> int:
    epoch, place = divmod(index, int(self._starts[-1]))
    ends = self._plan(epoch)[1]
    block = int(np.searchsorted(ends, place, 'right'))
    first = int(ends[block - 1]) if block else 0
    return self._start + int(self._block(epoch, block)[place - first])

  def _plan(self, epoch):
    """(groups in the order of an epoch, number of records up to the end of each block)."""
    last = getattr(self, '_last_plan', None)  # another thread may be in another epoch
    if last is None or last[0] != epoch:
      order = np.random.default_rng((self._key, epoch)).permutation(len(self._starts) - 1)
      ends = np.cumsum(np.diff(self._starts)[order])
      ends = np.append(ends[self._mixed - 1 : -1 : self._mixed], ends[-1])
      last = self._last_plan = (epoch, (order, ends))
    return last[1]

  def _block(self, epoch, block):
    """The records of a block, in their order."""
    last = getattr(self, '_last_block', None)
    if last is None or last[0] != (epoch, block):
      groups = self._plan(epoch)[0][block * self._mixed : (block + 1) * self._mixed]
      records = [np.arange(self._starts[group], self._starts[group + 1]) for group in groups]
      rng = np.random.default_rng((self._key, epoch, block))
      last = self._last_block = ((epoch, block), rng.permutation(np.concatenate(records)))
    return last[1]


class _Runs:
  """Index -> record, by runs of neighboring records: the runs are shuffled, not what is in them.

  Every epoch sees each record once, and has the runs begin elsewhere, so that other records are
  together. Those that fill no run are its last.
  """

  def __init__(self, start: int, size: int, length: int, key: int):
    self._start = start
    self._size = size
    self._length = length
    self._key = key
    self._count = size // length
    self._runs = grain.MapDataset.range(self._count).shuffle(seed=key).repeat()

  def __call__(self, index: int, _: int) -> int:
    epoch, place = divmod(index, self._size)
    run, within = divmod(place, self._length)
    if run < self._count:
      run = self._runs[epoch * self._count + run]
    turn = _turn(self._key, epoch, self._length)
    return self._start + (run * self._length + within + turn) % self._size


@functools.lru_cache(16)
def _turn(key, epoch, length):
  return int(np.random.default_rng((key, epoch)).integers(length))

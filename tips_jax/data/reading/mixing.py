"""Mixtures of stores whose weights change over a run.

Which example is of which store, and which of that store's own examples it is, is a function of the
seed and the example's index alone: counts by blocks of examples are tables, made once.
"""

import functools
from collections.abc import Sequence

import grain
import numpy as np

_BLOCK = 1024  # examples, at least
_MOST_BLOCKS = 1 << 16  # while weights change
_TAIL = 256  # blocks after it, which come again and again


def scheduled(
  parts: Sequence[grain.MapDataset],
  schedule: Sequence[tuple[float, ...]],
  seed: int,
  batch_size: int,
) -> grain.MapDataset:
  """The parts, each endless, mixed by weights that change, as an endless MapDataset.

  schedule: (step, weight of each part) in ascending order of steps; between two of them weights are
  on the line from one to the other, before the first and after the last constant. Each part is read
  in its order, and the number of examples that it has given up to any block is that of the weights,
  within as many as there are parts.
  """
  mixed = _Mixed(parts, schedule, seed, batch_size)
  return grain.MapDataset.range(1).repeat().map_with_index(mixed)


def weights_at(schedule: Sequence[tuple[float, ...]], steps: np.ndarray) -> np.ndarray:
  """Shares [N, parts], each row of sum 1, at steps [N]."""
  table = np.array(schedule, np.float64)
  columns = [np.interp(steps, table[:, 0], column) for column in table[:, 1:].T]
  weights = np.stack(columns, axis=1)
  return weights / weights.sum(axis=1, keepdims=True)


class _Mixed:
  """Index -> record."""

  def __init__(self, parts, schedule, seed, batch_size):
    self._parts = list(parts)
    self._seed = seed
    span = int(schedule[-1][0]) * batch_size  # examples until weights are constant
    self._block = max(_BLOCK, -(-span // _MOST_BLOCKS))
    changing = -(-span // self._block)
    middles = (np.arange(changing + _TAIL) + 0.5) * self._block / batch_size
    shares = weights_at(schedule, middles)
    shares[changing:] = weights_at(schedule, np.array([schedule[-1][0]]))
    self._counts = _apportion(shares * self._block)
    # Examples of each part before each block.
    zero = np.zeros((1, len(self._parts)), np.int64)
    self._before = np.concatenate([zero, np.cumsum(self._counts, axis=0)])
    self._changing = changing

  def __call__(self, index: int, _: int) -> int:
    block, place = divmod(index, self._block)
    part, number = _drawn(self, block)
    return self._parts[part[place]][number[place]]

  def draw(self, block: int) -> tuple[list[int], list[int]]:
    """(part of each example of a block, which of its part's examples it is)."""
    turns, row = 0, block
    if block >= len(self._counts):  # those after the end come again
      turns, row = divmod(block - self._changing, _TAIL)
      row += self._changing
    period = self._before[-1] - self._before[self._changing]
    before = self._before[row] + turns * period
    part = np.repeat(np.arange(len(self._parts)), self._counts[row])
    np.random.default_rng((self._seed, block)).shuffle(part)
    number = np.empty_like(part)
    for i, count in enumerate(self._counts[row]):
      number[part == i] = before[i] + np.arange(count)
    return part.tolist(), number.tolist()


@functools.lru_cache(8)
def _drawn(mixed, block):
  return mixed.draw(block)


def _apportion(wanted):
  """Whole numbers [blocks, parts] for real ones, each row of the same sum, which is whole.

  What a part lacks or has too much is carried to the next block, so sums over blocks stay close.
  """
  counts = np.empty(wanted.shape, np.int64)
  carried = np.zeros(wanted.shape[1])
  for i, row in enumerate(wanted):
    quota = row + carried
    count = np.floor(np.maximum(quota, 0)).astype(np.int64)
    left = int(round(row.sum())) - int(count.sum())
    while left:  # a few
      step = 1 if left > 0 else -1
      gap = np.where((count + step >= 0) & (row > 0), step * (quota - count), -np.inf)
      count[int(np.argmax(gap))] += step
      left -= step
    counts[i] = count
    carried = quota - count
  return counts

"""The order of a run's examples: shuffled, mixed, endless.

Which record is which example is a function of the seed and the example's index alone.
"""

import functools
from collections.abc import Sequence

import grain
import numpy as np


def example_order(
  sizes: Sequence[int], weights: Sequence[float], seed: int, neighbors: int
) -> grain.MapDataset:
  """Global example index -> record number, as an endless MapDataset.

  Without weights one shuffle covers all stores, so every epoch sees each record once. Weighted
  stores interleave in fixed proportions (grain rounds them by less than 1 %), each shuffled anew in
  each of its own epochs.
  """
  if not weights or len(sizes) == 1:
    sizes = [sum(sizes)]
    weights = ()
  parts = []
  end = 0
  for i, size in enumerate(sizes):
    start, end = end, end + size
    # Independent shuffles: equal keys would pair the records of stores of one size.
    key = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
    if min(neighbors, size) == 1:
      parts.append(grain.MapDataset.range(start, end).shuffle(seed=key).repeat())
    else:
      runs = _Runs(start, size, min(neighbors, size), key)
      parts.append(grain.MapDataset.range(size).repeat().map_with_index(runs))
  return grain.MapDataset.mix(parts, list(weights)) if weights else parts[0]


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

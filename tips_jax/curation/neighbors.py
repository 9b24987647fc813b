"""Neighbors among many, by faiss: of hashes, and of features that are read from the disk in blocks.

Features have length one; their products are cosines.
"""

import functools
import types
from collections.abc import Callable, Iterator

import numpy as np

from tips_jax.core.errors import InputError

BLOCK = 65_536  # rows of features that are in memory
_TABLES = 4  # of hashes: a pair that differs in few bits differs in few of those of one table
_ITERATIONS = 20  # of k-means

# The features of rows, float32 [n, E].
Features = Callable[[np.ndarray], np.ndarray]


@functools.cache
def library() -> types.ModuleType:
  """faiss; InputError where it is not installed."""
  try:
    import faiss
  except ImportError as error:
    raise InputError(
      f'steps: neighbors need faiss, which is not installed ({error}); expected pip install '
      f"'tips_jax[curate]'"
    ) from error
  return faiss


class Hashes:
  """Hashes of 64 bits, among which those are found that differ in at most `bits`: all of them."""

  def __init__(self, bits: int):
    self._bits = bits
    self._owners = []
    self._index = library().IndexBinaryMultiHash(64, _TABLES, 64 // _TABLES)
    self._index.nflip = bits // _TABLES

  def add(self, hashes: np.ndarray, owners: np.ndarray) -> None:
    """hashes: uint64 [n]; owners: [n] numbers of what they belong to."""
    if len(hashes):
      self._index.add(_as_bytes(hashes))
      self._owners.append(np.asarray(owners, np.int64))

  def near(self, hashes: np.ndarray) -> Iterator[np.ndarray]:
    """For each of uint64 [n] the owners of like hashes, the nearest first, each once."""
    if not self._owners:
      yield from [np.zeros(0, np.int64)] * len(hashes)
      return
    self._owners = [np.concatenate(self._owners)]
    limits, distances, found = self._index.range_search(_as_bytes(hashes), self._bits + 1)
    for first, last in zip(limits[:-1].tolist(), limits[1:].tolist()):
      owners = self._owners[0][found[first:last]]
      order = np.lexsort((owners, distances[first:last]))
      yield _unique(owners[order])


def _as_bytes(hashes):
  return np.ascontiguousarray(hashes, np.uint64).view(np.uint8).reshape(-1, 8)


def _unique(numbers):
  """The numbers in their order, each once."""
  _, first = np.unique(numbers, return_index=True)
  return numbers[np.sort(first)]


def nearest(
  features: Features, rows: np.ndarray, queries_QE: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
  """(cosines [R, count], numbers [R, count]) of the nearest queries of each row, best first; -1
  where there are no more.
  """
  cosines = np.full((len(rows), count), -np.inf, np.float32)
  numbers = np.full((len(rows), count), -1, np.int64)
  for first in range(0, len(rows), BLOCK):
    part = features(rows[first : first + BLOCK])
    found = _best(part, queries_QE, count)
    cosines[first : first + len(part)], numbers[first : first + len(part)] = found
  return cosines, numbers


def nearest_rows(
  features: Features, rows: np.ndarray, queries_QE: np.ndarray, count: int
) -> np.ndarray:
  """[Q, count] the rows nearest to each query, best first; -1 where there are no more."""
  best = np.full((len(queries_QE), 0), -np.inf, np.float32)
  numbers = np.zeros((len(queries_QE), 0), np.int64)
  for first in range(0, len(rows), BLOCK):
    some = rows[first : first + BLOCK]
    cosines, found = _best(queries_QE, features(some), count)
    found = np.where(found < 0, -1, some[found])
    best = np.concatenate([best, cosines], 1)
    numbers = np.concatenate([numbers, found], 1)
    order = np.argsort(-best, axis=1, kind='stable')[:, :count]
    best = np.take_along_axis(best, order, 1)
    numbers = np.take_along_axis(numbers, order, 1)
  return numbers


def _best(x, y, count):
  faiss = library()
  return faiss.knn(
    np.ascontiguousarray(x, np.float32),
    np.ascontiguousarray(y, np.float32),
    count,
    metric=faiss.METRIC_INNER_PRODUCT,
  )


def clusters(
  features: Features, rows: np.ndarray, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """(number of its cluster [R], cosine to its center [R]) of each row: spherical k-means, learned
  on some of the rows where they are very many.
  """
  faiss = library()
  count = min(count, len(rows))
  rng = np.random.default_rng(seed)
  some = rows
  most = max(256 * count, BLOCK)
  if len(rows) > most:
    some = np.sort(rng.choice(rows, most, replace=False))
  x = features(some)
  kmeans = faiss.Kmeans(
    x.shape[1],
    count,
    niter=_ITERATIONS,
    seed=seed,
    spherical=True,
    min_points_per_centroid=1,
    max_points_per_centroid=len(x),
  )
  kmeans.train(np.ascontiguousarray(x))
  cosines, numbers = nearest(features, rows, kmeans.centroids, 1)
  return numbers[:, 0], cosines[:, 0]

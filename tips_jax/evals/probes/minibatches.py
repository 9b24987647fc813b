"""Batches of cached features with the truth of their images, read ahead of the training."""

import concurrent.futures
from collections.abc import Callable, Iterator, Sequence

import numpy as np

# Row of an image -> its depth [H, W], or its normals [H, W, 3].
Truth = Callable[[int], np.ndarray]


def minibatches(
  arrays: Sequence[np.ndarray],
  truth: Truth,
  rows: Sequence[int],
  *,
  batch: int,
  steps: int,
  shape: Sequence[int],
  seed: int = 0,
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
  """Yields `steps` times (batch of each array, truths [B, *shape, ...]), reshuffled every epoch.

  Truths of another size than `shape` are resized, nearest pixel.
  """
  rng = np.random.default_rng(seed)
  size = min(batch, len(rows))
  order = np.zeros(0, np.int64)

  def read(chosen):
    inputs = [np.asarray(array[chosen], np.float32) for array in arrays]
    targets = [fitted(truth(int(i)), shape) for i in chosen]
    return inputs, np.stack(targets)

  # One batch is read ahead in a thread while the device works.
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    pending = None
    for _ in range(steps):
      if len(order) < size:
        order = np.concatenate([order, rng.permutation(rows)])
      coming = pool.submit(read, order[:size])
      order = order[size:]
      if pending:
        yield pending.result()
      pending = coming
    if pending:
      yield pending.result()


def fitted(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
  """[H, W, ...] resized to another (H, W) by the nearest pixel."""
  array = np.asarray(array)
  if array.shape[:2] == tuple(shape):
    return array
  rows = _nearest(array.shape[0], shape[0])
  columns = _nearest(array.shape[1], shape[1])
  return array[rows[:, None], columns]


def _nearest(size, target):
  """For each of `target` pixels the nearest of `size`: half-pixel centers."""
  centers = (np.arange(target) + 0.5) * size / target
  return np.minimum(centers.astype(int), size - 1)

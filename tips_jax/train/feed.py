"""What the loop takes its batches from, and where it lists images that could not be read."""

import collections
import concurrent.futures

import jax
import numpy as np

from tips_jax.core import log
from tips_jax.data.reading.batch import HOST
from tips_jax.data.reading.pipeline import Pipeline

_AHEAD = 2  # batches on their way to the device


class Prefetch:
  """The next batches, on their way to the device while it works."""

  def __init__(self, pipeline: Pipeline, to: jax.sharding.Sharding):
    self._pipeline = pipeline
    self._to = to
    # One thread: batches stay in order.
    self._pool = concurrent.futures.ThreadPoolExecutor(1, 'to-device')
    self._queue = collections.deque()
    for _ in range(_AHEAD):
      self._queue.append(self._pool.submit(self._load))

  def _load(self):
    batch = next(self._pipeline)
    host = {name: batch.pop(name) for name in HOST}
    for name, x in batch.items():
      batch[name] = jax.make_array_from_process_local_data(self._to, x)
    return batch, host

  def next(self) -> tuple[dict[str, jax.Array], dict[str, np.ndarray]]:
    """(the global batch on the devices, this process's entries that stay on the host)."""
    self._queue.append(self._pool.submit(self._load))
    return self._queue.popleft().result()

  def close(self) -> None:
    """Waits for the batch that is being loaded, and loads no more."""
    self._pool.shutdown(wait=True, cancel_futures=True)


class Quarantine:
  """Lists each unreadable image once, however often its epoch comes around."""

  def __init__(self, pipeline: Pipeline, lines: log.UniqueLines):
    self._pipeline = pipeline
    self._lines = lines
    self._records = set()

  def add(self, record: int) -> None:
    """Writes record, id and reason, unless this image is listed."""
    # To explain a record reads and decodes it again, so that is done once, too.
    if record in self._records:
      return
    self._records.add(record)
    name, reason = self._pipeline.explain(record)
    self._lines.add({'record': record, 'id': name, 'reason': reason})

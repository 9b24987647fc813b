import collections

import numpy as np
import pytest

from tips_jax.data.reading.order import example_order


def epochs(order, size, count):
  return np.array([order[i] for i in range(size * count)]).reshape(count, size)


@pytest.mark.parametrize('size', [40, 43, 5])
def test_runs_of_neighbors_cover_every_record_once_an_epoch(size):
  got = epochs(example_order([size], (), 3, 8), size, 4)
  for records in got:
    assert sorted(records) == list(range(size))
  length = min(8, size)
  whole = size // length * length
  runs = got[:, :whole].reshape(4, -1, length)
  assert ((np.diff(runs) - 1) % size == 0).all()  # the last record is followed by the first
  if size > 8:
    assert (got[0] != got[1]).any() and (got[1] != got[2]).any()
    # Runs begin elsewhere, so that not always the same records are together.
    assert len({records[0] % 8 for records in runs[:, 0]}) > 1


def test_the_seed_decides_which_runs_follow_each_other():
  one, same, other = (epochs(example_order([640], (), seed, 8), 640, 1) for seed in (3, 3, 4))
  assert (one == same).all() and (one != other).any()
  starts = one.reshape(-1, 8)[:, 0]
  assert (np.diff(starts) == 8).mean() < 0.1


def test_mixed_stores_are_each_read_in_runs_in_their_proportion():
  order = example_order([64, 32], (3.0, 1.0), 0, 4)
  records = [order[i] for i in range(128)]
  stores = collections.Counter(record >= 64 for record in records)
  assert abs(stores[False] - 96) <= 2
  for first, size in ((0, 64), (64, 32)):
    own = np.array([record - first for record in records if 0 <= record - first < size])
    runs = own[: len(own) // 4 * 4].reshape(-1, 4)
    assert ((np.diff(runs) - 1) % size == 0).all()


def test_without_neighbors_the_order_is_the_plain_shuffle():
  records = epochs(example_order([1000], (), 0, 1), 1000, 1)[0]
  assert (np.diff(records) == 1).sum() < 20

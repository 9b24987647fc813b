import dataclasses
import pickle

import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Data
from tips_jax.core.strict import build
from tips_jax.data.reading import mixing
from tips_jax.data.reading.order import example_order

SCHEDULE = ((100.0, 3.0, 1.0, 0.0), (300.0, 0.0, 1.0, 1.0))
SIZES = (700, 300, 50)
STARTS = np.array([0, 700, 1000])


def order(schedule=SCHEDULE, seed=0, batch_size=32):
  return example_order(SIZES, (), seed, 1, schedule=schedule, batch_size=batch_size)


def stores(records):
  return np.searchsorted(STARTS, records, 'right') - 1


def test_shares_follow_the_schedule():
  mixed = order(batch_size=16)
  got = stores([mixed[i] for i in range(7_500)])
  for step, expected in (
    (0, (3 / 4, 1 / 4, 0)),  # before the first step of the schedule: its weights
    (200, (1 / 2, 1 / 3, 1 / 6)),  # half way: 1.5, 1 and 0.5
    (400, (0, 1 / 2, 1 / 2)),  # after the last
  ):
    first = max(16 * step - 500, 0)
    share = np.bincount(got[first : first + 1000], minlength=3) / 1000
    np.testing.assert_allclose(share, expected, atol=0.04)
  assert (got[:1024] != 2).all()  # a weight of zero is none
  # In all, as many as the integral of the weights.
  wanted = mixing.weights_at(SCHEDULE, np.arange(7_168) / 16).sum(0)
  np.testing.assert_allclose(np.bincount(got[:7_168], minlength=3), wanted, atol=10)


def test_each_store_has_epochs_of_its_own():
  mixed = order()
  records = np.array([mixed[i] for i in range(6_000)])
  for store, size in enumerate(SIZES):
    own = records[stores(records) == store]
    for epoch in range(len(own) // size):
      assert len(set(own[epoch * size : (epoch + 1) * size])) == size


def test_long_after_the_schedule_nothing_is_left_out_or_twice():
  mixed = order(batch_size=1)
  start = 1024 * (mixing._TAIL - 1)  # where the blocks come again
  records = np.array([mixed[i] for i in range(start, start + 2 * 1024)])
  own = records[stores(records) == 2] - 1000
  whole = lambda first: own[first : first + (len(own) - 50) // 50 * 50].reshape(-1, 50)
  # From somewhere on, where an epoch begins, each 50 are all of them.
  assert any((np.sort(whole(first)) == np.arange(50)).all() for first in range(50))


def test_it_is_a_function_of_seed_and_index():
  one, same, other = order(), pickle.loads(pickle.dumps(order())), order(seed=1)
  places = [5, 9_000, 40_000, 2, 10**9]
  assert [one[i] for i in places] == [same[i] for i in reversed(places)][::-1]
  assert [one[i] for i in range(50)] != [other[i] for i in range(50)]


def test_small_weights_come_too():
  schedule = ((0.0, 1.0, 1e-3, 0.0),)
  mixed = order(schedule)
  got = stores([mixed[i] for i in range(8_192)])
  assert abs((got == 1).sum() - 8) <= 1


@pytest.mark.parametrize(
  'schedule, message',
  [
    (((0, 1),), 'expected a step and 2 weights'),
    (((0, 0, 0),), 'not all zero'),
    (((5, 1, 1), (5, 1, 2)), 'got step 5 after 5; expected ascending steps'),
    (((0, -1, 1),), 'mixture_schedule'),
    (((0.5, 1, 1),), 'expected a step'),
  ],
)
def test_a_wrong_schedule_is_one_line(schedule, message):
  with pytest.raises(InputError, match=message):
    build(Data, {'extra_stores': ('b',), 'views': {}, 'mixture_schedule': schedule}, 'data')


def test_one_of_mixture_and_schedule():
  data = build(Data, {'views': {}, 'mixture_schedule': ((0, 1), (8, 2))}, 'data')
  assert data.mixture_schedule == ((0.0, 1.0), (8.0, 2.0))
  with pytest.raises(InputError, match='one of them'):
    dataclasses.replace(data, mixture=(1.0,))

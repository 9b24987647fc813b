"""Minibatches visit every row, in the same order for the same seed."""

import numpy as np

from tips_jax.evals.probes.minibatches import minibatches


def test_minibatches_visit_every_row_once_an_epoch():
  values = np.arange(10, dtype=np.float32)
  truth = lambda i: np.full((2, 3), i)
  batches = list(minibatches([values], truth, np.arange(10), batch=4, steps=5, shape=(2, 3)))
  seen = np.concatenate([a for (a,), _ in batches])
  assert len(batches) == 5 and all(t.shape == (4, 2, 3) for _, t in batches)
  assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
  np.testing.assert_array_equal(seen, np.concatenate([t[:, 0, 0] for _, t in batches]))
  again = np.concatenate(
    [a for (a,), _ in minibatches([values], truth, np.arange(10), batch=4, steps=5, shape=(2, 3))]
  )
  np.testing.assert_array_equal(seen, again)
  assert len(list(minibatches([values], truth, [3], batch=4, steps=2, shape=(1, 1)))) == 2
  assert list(minibatches([values], truth, [3], batch=4, steps=0, shape=(1, 1))) == []

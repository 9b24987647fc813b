"""Metrics that show a collapse."""

import jax
import numpy as np
import pytest

from tips_jax.objectives import monitor

rng = np.random.default_rng(0)


def spread(x):
  return jax.tree.map(float, monitor.spread(np.asarray(x, np.float32)).metrics)


def test_uniform_directions_have_a_spread_of_one_and_full_rank():
  m = spread(rng.normal(size=(4000, 1, 8)))
  assert abs(m['std'] - 1) < 0.02 and abs(m['rank'] - 8) < 0.1


def test_a_collapse_has_none():
  m = spread(np.ones((64, 2, 8)) * rng.random((64, 2, 1)))
  assert m['std'] < 1e-3 and m['rank'] < 1e-3
  assert spread(np.zeros((4, 1, 8))) == {'std': 0.0, 'rank': 0.0}


@pytest.mark.parametrize('rows', [2000, 12])  # more rows than dimensions, and fewer
def test_rank_is_the_participation_ratio(rows):
  low = rng.normal(size=(rows, 3)) @ rng.normal(size=(3, 32))
  m = spread(low[:, None])
  x = low / np.linalg.norm(low, axis=1, keepdims=True)
  values = np.linalg.eigvalsh(np.cov(x.T))
  np.testing.assert_allclose(m['rank'], values.sum() ** 2 / (values**2).sum(), rtol=1e-3)
  assert m['rank'] < 3.01


@pytest.mark.parametrize('rank', [1, 2, 5])
def test_rank_of_equal_directions(rank):
  axes = np.eye(16)[:rank]
  m = spread(np.concatenate([axes, -axes] * 10)[:, None])
  np.testing.assert_allclose(m['rank'], rank, rtol=1e-4)


def test_views_count_as_images_and_no_gradient_flows():
  x = rng.normal(size=(6, 2, 4)).astype(np.float32)
  a, b = spread(x), spread(x.reshape(12, 1, 4))
  np.testing.assert_allclose([a['std'], a['rank']], [b['std'], b['rank']], rtol=1e-6)
  assert monitor.spread(x).value == 0
  grad = jax.grad(lambda x: sum(monitor.spread(x).metrics.values()) + monitor.spread(x).value)(x)
  assert not np.any(grad)

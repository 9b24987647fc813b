"""KoLeo against NumPy."""

import jax
import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.objectives import koleo

rng = np.random.default_rng(0)


def reference(features, group):
  """Image by image, in float64."""
  images, views, _ = features.shape
  x = features.astype(np.float64)
  x = x / np.linalg.norm(x, axis=-1, keepdims=True)
  total = 0
  for v in range(views):
    for i in range(images):
      first = i // group * group
      others = [j for j in range(first, first + group) if j != i]
      total -= np.log(min(np.linalg.norm(x[i, v] - x[j, v]) for j in others))
  return total / images


@pytest.mark.parametrize('group, whole', [(0, 12), (12, 12), (4, 4), (2, 2)])
def test_koleo_against_numpy(group, whole):
  x = rng.normal(size=(12, 2, 8)).astype(np.float32)
  got = koleo.koleo(x, group=group)
  np.testing.assert_allclose(got.value, reference(x, whole), rtol=1e-5)


def test_the_gradient_is_that_of_the_formula():
  x = rng.normal(size=(6, 2, 4)).astype(np.float32)
  grad = jax.grad(lambda x: koleo.koleo(x).value)(x)
  for index in [(0, 0, 0), (3, 1, 2), (5, 0, 3)]:
    step = np.zeros(x.shape)
    step[index] = 1e-5
    slope = (reference(x + step, 6) - reference(x - step, 6)) / 2e-5
    np.testing.assert_allclose(grad[index], slope, rtol=1e-3, atol=1e-4)


def test_lengths_do_not_count_and_views_of_an_image_are_no_neighbors():
  x = rng.normal(size=(5, 1, 8)).astype(np.float32)
  longer = x * rng.uniform(1, 9, (5, 1, 1)).astype(np.float32)
  np.testing.assert_allclose(koleo.koleo(longer).value, koleo.koleo(x).value, rtol=1e-5)
  twice = np.concatenate([x, x], axis=1)
  np.testing.assert_allclose(koleo.koleo(twice).value, 2 * koleo.koleo(x).value, rtol=1e-5)


def test_equal_features_cost_much_and_have_a_finite_gradient():
  x = np.ones((4, 1, 8), np.float32)
  value, grad = jax.value_and_grad(lambda x: koleo.koleo(x).value)(x)
  assert value > 10 and np.isfinite(grad).all()
  zero = np.zeros((4, 1, 8), np.float32)
  value, grad = jax.value_and_grad(lambda x: koleo.koleo(x).value)(zero)
  assert np.isfinite(value) and np.isfinite(grad).all()


def test_the_metric_is_the_mean_distance():
  x = np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[-1.0, 0.0]]], np.float32)
  np.testing.assert_allclose(koleo.koleo(x).metrics['distance'], np.sqrt(2), rtol=1e-5)


@pytest.mark.parametrize('group, batch', [(5, 12), (1, 12), (0, 1)])
def test_a_group_without_neighbors_is_named(group, batch):
  with pytest.raises(InputError, match=f'koleo.group: got {group} with a batch of {batch}; expect'):
    koleo.koleo(np.ones((batch, 1, 4), np.float32), group=group)

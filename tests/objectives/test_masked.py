"""Random masks, and the loss in pixel space."""

import jax
import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.objectives import masked

rng = np.random.default_rng(0)
draw = jax.jit(masked.random_mask, static_argnums=(1, 2))


@pytest.mark.parametrize('patches, ratio', [(256, 0.75), (9, 0.5), (7, 0.3), (16, 0.0), (5, 0.99)])
def test_counts_are_exact_and_parts_consistent(patches, ratio):
  m = jax.tree.map(np.asarray, draw(jax.random.key(0), (3, 2, patches), ratio))
  count = round(ratio * patches)
  assert m['mask'].dtype == bool and m['masked_indices'].dtype == m['visible'].dtype == np.int32
  assert m['masked_indices'].shape == (3, 2, count) and m['visible'].shape == (
    3,
    2,
    patches - count,
  )
  for i in np.ndindex(3, 2):
    np.testing.assert_array_equal(m['masked_indices'][i], np.flatnonzero(m['mask'][i]))
    np.testing.assert_array_equal(m['visible'][i], np.flatnonzero(~m['mask'][i]))


def test_masks_are_uniform_and_differ():
  mask = np.asarray(draw(jax.random.key(1), (4000, 2, 8), 0.75)['mask']).reshape(-1, 8)
  assert np.abs(mask.mean(0) - 0.75).max() < 0.03  # every patch as often, 6 standard deviations
  pairs = mask.T.astype(float) @ mask / len(mask)  # and every pair: 3/4 * 5/7
  assert np.abs(pairs[~np.eye(8, dtype=bool)] - 15 / 28).max() < 0.03
  assert (
    np.abs(mask[::2].mean(0) - mask[1::2].mean(0)).max() < 0.05
    and (mask[::2] != mask[1::2]).any(1).mean() > 0.9
  )
  again, other = (
    np.asarray(draw(jax.random.key(k), (4000, 2, 8), 0.75)['mask']).reshape(-1, 8) for k in (1, 2)
  )
  assert (again == mask).all() and (other != mask).any()


def reference(prediction, images, mask, patch, normalize):
  """MAE's loss, patch by patch."""
  errors, w = [], images.shape[3]
  for i, j, p in np.argwhere(mask):
    row, column = divmod(p, w // patch)
    target = (
      images[i, j, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
      .astype(np.float64)
      .ravel()
    )
    if normalize:
      target = (target - target.mean()) / np.sqrt(target.var() + 1e-6)
    errors.append(np.mean((prediction[i, j, p] - target) ** 2))
  return np.mean(errors)


@pytest.mark.parametrize('normalize', [0, 1])
def test_pixels_against_numpy(normalize):
  images = rng.random((2, 2, 8, 12, 3)).astype(np.float32)
  prediction, mask = rng.normal(size=(2, 2, 6, 48)).astype(np.float32), rng.random((2, 2, 6)) < 0.5
  fn = jax.jit(
    jax.value_and_grad(lambda x: masked.pixels(x, images, mask, patch=4, normalize=normalize).value)
  )
  value, grad = fn(prediction)
  np.testing.assert_allclose(value, reference(prediction, images, mask, 4, normalize), rtol=1e-5)
  assert not np.any(grad[~mask]) and np.all(np.any(grad[mask], axis=-1))


def test_bytes_are_floats_times_255():
  images = rng.integers(0, 256, (2, 1, 8, 8, 3), np.uint8)
  prediction, mask = rng.normal(size=(2, 1, 4, 48)).astype(np.float32), np.ones((2, 1, 4), bool)
  loss = lambda x: masked.pixels(prediction, x, mask, patch=4).value
  np.testing.assert_allclose(loss(images), loss(images.astype(np.float32) / 255), rtol=1e-5)


def test_nothing_masked_costs_nothing():
  x = np.ones((1, 1, 4, 48), np.float32)
  assert (
    masked.pixels(x, np.zeros((1, 1, 8, 8, 3), np.uint8), np.zeros((1, 1, 4), bool), patch=4).value
    == 0
  )


def test_images_must_be_whole_patches():
  with pytest.raises(
    InputError, match='pixels: got images of 10 x 8 pixels; expected multiples of the patch of 4'
  ):
    masked.pixels(
      np.zeros((1, 1, 6, 48)),
      np.zeros((1, 1, 10, 8, 3), np.uint8),
      np.ones((1, 1, 6), bool),
      patch=4,
    )

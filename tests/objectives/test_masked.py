"""The loss in pixel space."""

import jax
import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.objectives import masked

rng = np.random.default_rng(0)


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
      target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
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

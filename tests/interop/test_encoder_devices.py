"""An encoder over eight devices gives the very numbers of one device, with `exact`.

A device's rows are independent of those of the others. But XLA chooses how to compute a matrix
product by its shape, and with it the order in which float32 sums are rounded: an image that is
encoded in a call of another number of rows agrees only to some 1e-6, on one device as on many.
`exact` gives every call the same number of rows on each device.
"""

import functools

import jax
import numpy as np
import pytest

from tips_jax.core import schema
from tips_jax.interop.encoder import Encoder
from tips_jax.interop.weights import Weights
from tips_jax.models import towers

WIDTH = 48
TOWERS = {
  'image': schema.ViT(
    kind='vit', width=WIDTH, depth=3, heads=3, mlp=160, patch=4, grid=4, mask_token=True
  ),
  'text': schema.TextTower(kind='text', width=WIDTH, depth=2, heads=3, mlp=96, vocab=300),
  'image_head': schema.ProjectionHead(kind='projection', width=WIDTH, output=24),
  'text_head': schema.ProjectionHead(kind='projection', width=WIDTH, output=24),
}


@functools.cache
def weights():
  rng, params = np.random.default_rng(0), {}
  for name, tower in TOWERS.items():
    shapes = jax.eval_shape(functools.partial(towers.init, name, tower, seed=0))
    params[name] = jax.tree.map(
      lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), shapes
    )
  return Weights(name='test', towers=TOWERS, params=params, size=16, text_length=24)


@functools.cache
def encoder(devices, dtype='float32'):
  if len(jax.devices()) < devices:
    pytest.skip(f'needs {devices} devices')
  return Encoder(weights(), dtype=dtype, devices=jax.devices()[:devices], exact=True)


def images(count, size=16):
  return np.random.default_rng(size + count).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  'count, size', [(1, 16), (21, 22), (70, 16)]
)  # 22: padded by the tower to 24
def test_images_are_equal_to_the_last_bit(count, size, dtype):
  one, all_ = (encoder(n, dtype).features(images(count, size)) for n in (1, 8))
  assert set(one) == set(all_) == {'web', 'synthetic', 'patch', 'embedding'}
  for name in one:
    assert np.ptp(one[name]) > 0.1
    np.testing.assert_array_equal(one[name], all_[name], err_msg=name)


@pytest.mark.parametrize('count', [1, 21, 70])
def test_texts_are_equal_to_the_last_bit(count):
  rng = np.random.default_rng(0)
  ids = rng.integers(1, 300, (count, 24)).astype(np.int32)
  ids[::2, 10:] = 0  # one half is cut to 16 tokens, the other is not
  one, all_ = (encoder(n).encode_text(ids) for n in (1, 8))
  assert np.ptp(one) > 0.1
  np.testing.assert_array_equal(one, all_)


def test_neither_number_nor_order_of_the_images_matters():
  x, order = images(70), np.random.default_rng(0).permutation(70)
  whole, mixed, few = (
    encoder(1).features(x),
    encoder(8).features(x[order]),
    encoder(8).features(x[:5]),
  )
  for name in whole:
    np.testing.assert_array_equal(whole[name][order], mixed[name], err_msg=name)
    np.testing.assert_array_equal(whole[name][:5], few[name], err_msg=name)


def test_other_numbers_of_rows_are_near():
  one, all_ = (
    Encoder(weights(), devices=jax.devices()[:1]),
    Encoder(weights(), devices=jax.devices()),
  )
  for count in (1, 21, 32):
    a, b = one.features(images(count)), all_.features(images(count))
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-5, err_msg=name)

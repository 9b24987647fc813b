"""The image tower and the pixel decoder."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.core import config as schema
from tips_jax.models import towers, vit

F32 = schema.Compute(dtype='float32')
TINY = schema.ViT(kind='vit', width=16, depth=2, heads=2, mlp=32, patch=4, grid=3, mask_token=True)
rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (2, 2, 12, 12, 3), np.uint8)


def parameters(tower):
  """No leaf is at its initial zero or one, so that each counts."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(functools.partial(towers.init, 'image', tower, seed=0))
  return jax.tree.map(lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), shapes)


PARAMS = parameters(TINY)
apply = jax.jit(towers.apply, static_argnums=(1, 2))


def run(images=IMAGES, params=PARAMS, tower=TINY, **arrays):
  return apply(params, tower, F32, {'images': images, **arrays})


def same(a, b, rtol=1e-5, atol=2e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_outputs():
  out = run()
  assert {k: v.shape for k, v in out.items()} == {'web': (2, 2, 16), 'synthetic': (2, 2, 16), 'patch': (2, 2, 9, 16)}
  assert np.abs(out['web'] - out['synthetic']).max() > 0.1


def test_bytes_are_floats_times_255():
  same(run(), run(IMAGES.astype(np.float32) / 255))


def test_views_and_images_do_not_meet():
  out = run(IMAGES[1:, :1])
  same(jax.tree.map(lambda x: x[1:, :1], run()), out)


def test_sizes_that_do_not_divide_are_padded_around_the_centre():
  images = IMAGES[:, :, :9, :10]    # 3 rows are missing: 1 above, 2 below; 2 columns: 1 and 1
  padded = np.pad(images, [(0, 0), (0, 0), (1, 2), (1, 1), (0, 0)])
  same(run(images), run(padded))


def test_patches_are_in_reading_order():
  image = np.arange(2 * 6 * 4 * 3).reshape(2, 6, 4, 3)
  x = np.asarray(vit.patches(image, 2))
  assert x.shape == (2, 3, 2, 2, 2, 3)
  np.testing.assert_array_equal(x[1, 2, 1], image[1, 4:6, 2:4])


def test_patch_embedding_is_a_strided_convolution():
  embed = vit.PatchEmbedding(TINY, jnp.float32)
  params = {'kernel': rng.normal(size=(4, 4, 3, 16)).astype(np.float32), 'bias': np.ones(16, np.float32)}
  x = IMAGES[0].astype(np.float32) / 255
  y = jax.lax.conv_general_dilated(x, params['kernel'], (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  np.testing.assert_allclose(embed.apply({'params': params}, x), y + 1, rtol=1e-5, atol=1e-5)


def test_the_table_is_resized_to_the_grid_of_the_image():
  table = rng.normal(size=(1, 3, 3, 2)).astype(np.float32)
  np.testing.assert_array_equal(vit.positions(table, 3, 3), table)
  for h, w in ((6, 6), (2, 2), (3, 5)):
    np.testing.assert_allclose(vit.positions(table, h, w), jax.image.resize(table, (1, h, w, 2), 'bilinear'), rtol=1e-6)
  # Antialiased: halving a checkerboard gives grey, not one of its colours.
  board = (np.indices((8, 8)).sum(0) % 2).astype(np.float32)[None, :, :, None]
  assert np.abs(np.asarray(vit.positions(board, 4, 4))[0, 1:-1, 1:-1] - 0.5).max() < 0.05


def test_another_size_uses_the_resized_table():
  images = np.tile(IMAGES, (1, 1, 2, 2, 1))    # 24 x 24: a grid of 6 x 6
  out = run(images)
  assert out['patch'].shape == (2, 2, 36, 16)
  params = PARAMS | {'posembed': jax.image.resize(PARAMS['posembed'], (1, 6, 6, 16), 'bilinear')}
  same(run(images, params=params, tower=dataclasses.replace(TINY, grid=6)), out)


def test_the_mask_token_replaces_patches_before_positions():
  mask = np.zeros((2, 2, 9), bool)
  mask[:, :, [1, 5]] = True
  hidden = run(mask=mask)
  images = IMAGES.copy()
  images[:, :, :4, 4:8] = rng.integers(0, 256, (2, 2, 4, 4, 3))
  images[:, :, 4:8, 8:] = 0
  same(run(images, mask=mask), hidden)                       # what is under the mask does not count
  assert np.abs(run(images)['web'] - hidden['web']).max() > 1e-3
  other = PARAMS | {'mask_token': -PARAMS['mask_token']}
  assert np.abs(run(params=other, mask=mask)['patch'] - hidden['patch']).max() > 1e-3
  same(run(params=other), run())                          # and the token counts under the mask alone
  same(run(mask=np.zeros_like(mask)), run())
  a, b = (run(mask=np.ones_like(mask))['patch'][0, 0, i] for i in (0, 1))
  assert np.abs(a - b).max() > 1e-2                          # masked patches still have their positions


def test_a_zero_token_is_a_zero_embedding():
  still = PARAMS['embedding'] | {'bias': np.zeros(16, np.float32)}
  params = PARAMS | {'mask_token': np.zeros((1, 16), np.float32), 'embedding': still}
  images, mask = IMAGES.copy(), np.zeros((2, 2, 9), bool)
  images[:, :, 8:, :4] = 0
  mask[:, :, 6] = True
  same(run(params=params, mask=mask), run(images, params=params))


def test_a_tower_without_a_mask_token_takes_no_mask():
  bare = schema.ViT(kind='vit', width=16, depth=1, heads=2, mlp=32, patch=4, grid=3)
  assert 'mask_token' not in parameters(bare) and 'mask_token' in PARAMS
  assert set(towers.inputs(bare)) == {'images', 'kept'} and set(towers.inputs(TINY)) == {'images', 'kept', 'mask'}


def test_kept_tokens_alone_are_computed():
  everything = np.tile(np.arange(9), (2, 2, 1))
  same(run(kept=everything), run())
  kept = np.tile([2, 3, 7], (2, 2, 1))
  out = run(kept=kept)
  assert out['patch'].shape == (2, 2, 3, 16)
  images = IMAGES.copy()
  images[:, :, :4, :8] = 0                                   # patches 0 and 1 are not kept
  same(run(images, kept=kept), out)
  order = np.tile([7, 2, 3], (2, 2, 1))
  swapped = run(kept=order)
  same(swapped['web'], out['web'])
  same(swapped['patch'], out['patch'][:, :, [2, 0, 1]])      # tokens take their positions along


@pytest.mark.parametrize('names', [('cls',), ('a', 'b', 'c')])
def test_cls_tokens_have_names(names):
  tower = schema.ViT(kind='vit', width=8, depth=1, heads=2, mlp=8, patch=4, grid=3, cls=names)
  out = run(params=parameters(tower), tower=tower)
  assert set(out) == {*names, 'patch'} == towers.outputs(tower)


DECODER = schema.PixelDecoder(kind='pixel_decoder', width=16, decoder_width=8, depth=1, heads=2, mlp=16, patch=4,
                              grid=3)


def test_the_decoder_puts_visible_patches_back_in_their_places():
  params = parameters(DECODER)
  mask = np.ones((2, 1, 9), bool)
  kept = np.array([[[0, 4, 8]], [[1, 2, 5]]])
  np.put_along_axis(mask, kept, False, axis=2)
  patch = rng.normal(size=(2, 1, 3, 16)).astype(np.float32)
  decode = lambda params, patch: apply(params, DECODER, F32, {'patch': patch, 'kept': kept, 'mask': mask})['pixels']
  out = decode(params, patch)
  assert out.shape == (2, 1, 9, 48)
  # With the encoder's blocks out of the way, a pixel depends on its own token and position alone.
  still = jax.tree.map(np.zeros_like, params['decoder'])
  bare = lambda patch: decode(params | {'decoder': still}, patch)
  moved = patch.copy()
  moved[0, 0, 1] += rng.normal(size=16)                      # the patch at place 4 of image 0
  changed = np.abs(np.asarray(bare(moved)) - np.asarray(bare(patch))).max(-1)
  assert np.argwhere(changed > 1e-6).tolist() == [[0, 0, 4]]
  assert np.abs(np.asarray(out)[0, 0, 4] - np.asarray(out)[0, 0, 3]).max() > 1e-3

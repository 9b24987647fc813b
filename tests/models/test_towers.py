"""Towers by name: published sizes, initialization, types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.core import schema, tree
from tips_jax.models import towers

# name: width, depth, heads, mlp, ffn, text depth, text mlp, and parameters in millions as
# published: image tower with a table of 16 x 16 (TIPS) and 32 x 32 (TIPSv2), text tower.
PUBLISHED = {
  'S': (384, 12, 6, 1536, 'gelu', 12, 1536, '21.62', None, '33.58'),
  'B': (768, 12, 12, 3072, 'gelu', 12, 3072, '85.71', '86.30', '109.63'),
  'L': (1024, 24, 16, 4096, 'gelu', 12, 4096, '303.18', '303.97', '183.92'),
  'So400m': (1152, 27, 16, 4304, 'gelu', 27, 4304, '412.44', '413.33', '448.33'),
  'g': (1536, 40, 24, 4096, 'swiglu', 12, 6144, '1134.65', '1135.83', '389.13'),
}
TINY = {
  'image': schema.ViT(
    kind='vit', width=8, depth=2, heads=2, mlp=16, patch=4, grid=2, mask_token=True
  ),
  'text': schema.TextTower(kind='text', width=8, depth=1, heads=2, mlp=16, vocab=20),
  'head': schema.DINOHead(kind='dino_head', width=8, hidden=8, bottleneck=4, prototypes=16),
  'projection': schema.ProjectionHead(kind='projection', width=8, output=4),
  'decoder': schema.PixelDecoder(
    kind='pixel_decoder', width=8, decoder_width=8, depth=1, heads=2, mlp=8, patch=4, grid=2
  ),
  'logit': schema.Logit(kind='logit', bias=-10.0),
}


def shapes(name, tower, seed=0):
  return jax.eval_shape(functools.partial(towers.init, name, tower, seed=seed))


@functools.cache
def params(name, seed=0, called=None):
  return jax.jit(lambda: towers.init(called or name, TINY[name], seed=seed))()


def millions(tower):
  return f'{tree.size(shapes("x", tower)) / 1e6:.2f}'


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
  width, depth, heads, mlp, ffn, text_depth, text_mlp, grid16, grid32, text = PUBLISHED[name]
  vit = functools.partial(
    schema.ViT, kind='vit', width=width, depth=depth, heads=heads, mlp=mlp, ffn=ffn
  )
  assert millions(vit(grid=16)) == grid16
  assert grid32 is None or millions(vit(grid=32)) == grid32
  assert (
    millions(
      schema.TextTower(kind='text', width=width, depth=text_depth, heads=heads, mlp=text_mlp)
    )
    == text
  )


def test_the_mask_token_adds_one_row():
  vits = [schema.ViT(kind='vit', width=8, depth=1, heads=2, mlp=8, mask_token=m) for m in (0, 1)]
  sizes = [tree.size(shapes('x', vit)) for vit in vits]
  assert sizes[1] - sizes[0] == 8


@pytest.mark.parametrize('name', TINY)
def test_inputs_and_outputs_are_what_the_tower_takes_and_gives(name):
  tower, example = TINY[name], towers.inputs(TINY[name])
  call = lambda arrays: jax.eval_shape(
    lambda p: towers.apply(p, tower, schema.Compute(), arrays), shapes(name, tower)
  )
  assert set(call(example)) == towers.outputs(tower)
  optional = towers.module(tower).OPTIONAL
  if optional:
    assert set(call({k: v for k, v in example.items() if k not in optional})) == towers.outputs(
      tower
    )
  for missing in set(example) - optional:
    with pytest.raises((TypeError, KeyError)):
      call({k: v for k, v in example.items() if k != missing})


@pytest.mark.parametrize('name', TINY)
def test_parameters_are_float32(name):
  assert {x.dtype for x in jax.tree.leaves(shapes(name, TINY[name]))} == {jnp.dtype('float32')}


def test_initialization_depends_on_name_and_seed_alone():
  same = lambda a, b: all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))
  one = params('projection')
  together = jax.jit(lambda: {n: towers.init(n, TINY[n], seed=0) for n in ('head', 'projection')})()
  assert same(one, together['projection'])
  assert not same(one, params('projection', seed=1)) and not same(
    one, params('projection', called='other')
  )


def test_initial_values_are_the_documented_ones():
  p = params('image')
  assert not np.any(p['cls']) and not np.any(p['mask_token']) and not np.any(p['embedding']['bias'])
  assert abs(p['posembed'].std() * 8**0.5 - 1) < 0.4
  block = p['encoder']['blocks']
  assert 0 < np.abs(block['mlp']['up']['bias']).max() < 1e-5 and np.all(
    block['norm1']['scale'] == 1
  )
  # variance_scaling(1, 'fan_in', 'normal', out_axis=0) of [vocab, width]: std 1 / sqrt(width)
  table = params('text')['embedding']
  assert table.shape == (20, 8)
  assert abs(table.std() * 8**0.5 - 1) < 0.2


def test_bfloat16_compute_leaves_parameters_and_gradients_float32():
  image = np.random.default_rng(0).random((2, 1, 8, 8, 3)).astype(np.float32)

  def run(dtype):
    fn = lambda p: towers.apply(p, TINY['image'], schema.Compute(dtype=dtype), {'images': image})
    loss = lambda p: (fn(p)['patch'].astype(jnp.float32) ** 2)[..., 0].mean()
    return jax.jit(lambda p: (fn(p), jax.grad(loss)(p)))(params('image'))

  (out, grads), (exact, exact_grads) = run('bfloat16'), run('float32')
  assert {v.dtype for v in out.values()} == {jnp.dtype('bfloat16')}
  assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b, atol=0.1), out, exact
  )
  norm = lambda t: np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(t)))
  assert norm(jax.tree.map(jnp.subtract, grads, exact_grads)) < 0.05 * norm(exact_grads)

"""Adapters: against torch, gradients too; off at the start; scanned, sharded, in bfloat16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.methods import mae
from tips_jax.core import schema, strict, tree
from tips_jax.core.errors import InputError
from tips_jax.models import adapters, towers, vit
from tips_jax.train import method as method_lib

rng = np.random.default_rng(0)
F32 = schema.Compute(dtype='float32')
CONFIG = schema.Adapters(width=4)
TOWER = schema.ViT(kind='vit', width=16, depth=2, heads=2, mlp=32, patch=8, grid=4, adapters=CONFIG)
PLAIN = dataclasses.replace(TOWER, adapters=schema.Adapters())
IMAGES = rng.integers(256, size=(2, 2, 24, 32, 3), dtype=np.uint8)


def noisy(params):
  """Other numbers in the adapters than their first, which do nothing."""

  def change(name, x):
    if '/adapter' not in name:
      return x
    seed = np.random.default_rng(len(name) + x.size)
    return x + 0.3 * seed.normal(size=x.shape).astype(np.float32)

  return tree.map_named(change, params)


START = towers.init('image', TOWER, seed=0)
PARAMS = noisy(START)


@functools.partial(jax.jit, static_argnums=(0, 2))
def apply(tower, params, compute=F32, images=IMAGES, **options):
  return towers.apply(params, tower, compute, {'images': jnp.asarray(images)}, **options)


@pytest.mark.parametrize('grid, tokens', [((2, 3, 4), 14), ((1, 2, 2), 7), ((0, 1, 5), 5)])
def test_convpass_is_torchs(grid, tokens):
  """Value and gradients; of 7 tokens the last two are neither CLS nor patch, as cuDNN's padding."""
  torch = pytest.importorskip('torch')
  module = adapters.Convpass(CONFIG, 6, jnp.dtype('float32'))
  x = rng.normal(size=(2, tokens, 6)).astype(np.float32)
  out = rng.normal(size=x.shape).astype(np.float32)
  params = module.init(jax.random.key(0), x, grid)['params']
  params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)

  def loss(params, x):
    return (module.apply({'params': params}, x, grid) * out).sum()

  value, (of_params, of_x) = jax.value_and_grad(loss, (0, 1))(params, x)

  p = {name: torch.tensor(x, requires_grad=True) for name, x in tree.named_leaves(params)}
  t = torch.tensor(x, requires_grad=True)
  kernel = p['conv/kernel'].reshape(3, 3, 4, 4).permute(3, 2, 0, 1)

  def gelu(y):
    return y * torch.sigmoid(1.702 * y)

  def conv(y, h, w):
    y = y.reshape(-1, h, w, 4).permute(0, 3, 1, 2)
    y = torch.nn.functional.conv2d(y, kernel, p['conv/bias'], padding=1)
    return y.permute(0, 2, 3, 1)

  before, h, w = grid
  y = gelu(t @ p['down/kernel'] + p['down/bias'])
  parts = []
  for i in range(tokens):
    if before <= i < before + h * w:
      parts.append(None)
    else:
      parts.append(conv(y[:, i], 1, 1).reshape(2, 1, 4))
  parts[before : before + h * w] = [conv(y[:, before : before + h * w], h, w).reshape(2, h * w, 4)]
  y = gelu(torch.cat(parts, dim=1))
  want = ((y @ p['up/kernel'] + p['up/bias']) * 0.1 * torch.tensor(out)).sum()
  want.backward()

  np.testing.assert_allclose(value, want.item(), rtol=1e-4)
  np.testing.assert_allclose(of_x, t.grad, rtol=1e-3, atol=1e-4)
  for name, gradient in tree.named_leaves(of_params):
    np.testing.assert_allclose(gradient, p[name].grad, rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_at_the_start_they_change_nothing(dtype):
  compute = schema.Compute(dtype=dtype)
  plain = towers.init('image', PLAIN, seed=0)
  added = dict(tree.named_leaves(START)).keys() - dict(tree.named_leaves(plain)).keys()
  assert len(added) == 12 and all('/adapter' in name for name in added)

  # XLA may keep more digits of bfloat16 where it fuses more: not here.
  def run(tower, params):
    jitted = jax.jit(
      lambda params: apply(tower, params, compute),
      compiler_options={'xla_allow_excess_precision': False},
    )
    return jitted(params)

  want = run(PLAIN, plain)
  jax.tree.map(np.testing.assert_array_equal, run(TOWER, START), want)
  found = run(TOWER, PARAMS)
  for name, x in want.items():
    assert np.abs(np.asarray(found[name] - x, np.float32)).max() > 0.01, name


def test_scanned_unrolled_and_computed_again_are_the_same():
  def both(compute):
    def loss(params):
      patch = apply(TOWER, params, compute)['patch']
      return (patch * np.sin(np.arange(patch.size)).reshape(patch.shape)).sum()

    return jax.jit(jax.value_and_grad(loss))(PARAMS)

  want = both(F32)
  for changes in (dict(scan=False), dict(remat='products'), dict(remat='full')):
    got = both(dataclasses.replace(F32, **changes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)
  assert np.abs(np.asarray(want[1]['encoder']['blocks']['adapter2']['conv']['kernel'])).max() > 1e-3


def test_patches_of_other_crops_and_other_images_do_not_mix():
  small = IMAGES[:, :1, :16, :16]
  inputs = [{'images': jnp.asarray(IMAGES)}, {'images': jnp.asarray(small)}]
  together = jax.jit(lambda inputs: towers.apply_all(PARAMS, TOWER, F32, inputs))(inputs)
  for got, images in zip(together, (IMAGES, small)):
    for i in range(2):
      alone = apply(TOWER, PARAMS, images=images[i : i + 1])
      for name in alone:
        np.testing.assert_allclose(got[name][i : i + 1], alone[name], atol=2e-5)


def test_what_evaluations_read_is_what_a_pass_gives():
  reads = dict(intermediate_layers=(0, 1), values=True)
  got = vit.inspect(PARAMS, TOWER, F32, jnp.asarray(IMAGES), **reads)
  want = apply(TOWER, PARAMS)
  for name, x in want.items():
    np.testing.assert_allclose(got[name], x, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(got['intermediate_layers'][1][name], x, atol=2e-5, err_msg=name)
  plain = vit.inspect(START, TOWER, F32, jnp.asarray(IMAGES), **reads)
  assert np.abs(got['value_patch'] - plain['value_patch']).max() > 0.01


def test_dropout_is_that_of_the_images_number():
  key, rows = jax.random.key(1), jnp.arange(2)
  dropped = apply(TOWER, PARAMS, rng=key, rows=rows)['patch']
  assert np.abs(dropped - apply(TOWER, PARAMS)['patch']).max() > 1e-3
  second = apply(TOWER, PARAMS, images=IMAGES[1:], rng=key, rows=rows[1:])['patch']
  np.testing.assert_allclose(dropped[1:], second, atol=2e-5)
  never = dataclasses.replace(TOWER, adapters=schema.Adapters(width=4, dropout=0.0))
  without = apply(never, PARAMS, rng=key, rows=rows)
  jax.tree.map(np.testing.assert_array_equal, without, apply(TOWER, PARAMS))


def test_flops_are_those_of_the_products():
  shapes = {'images': (1, 24, 32, 3)}
  more = vit.ViT.flops(TOWER, shapes) - vit.ViT.flops(PLAIN, shapes)
  tokens = 2 + 3 * 4
  assert more == 2 * 2 * 2 * tokens * (16 * 4 + 9 * 4 * 4 + 4 * 16)


def test_merged_and_dropped_patches_are_refused():
  with pytest.raises(InputError, match='adapters.width: got 4 with reduce.keep=0.5; expected one'):
    dataclasses.replace(TOWER, reduce=schema.Reduction(keep=0.5, after=1))
  config = mae.get_config('runlocal')
  config.towers.image.adapters.width = 4
  with pytest.raises(InputError, match='inputs.visible: got it with towers.image.adapters.width=4'):
    method_lib.build(strict.build(schema.Config, config.to_dict()))

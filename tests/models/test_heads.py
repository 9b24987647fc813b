"""Heads against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.core import schema
from tips_jax.models import towers

F32 = schema.Compute(dtype='float32')
HEAD = schema.DINOHead(kind='dino_head', width=6, hidden=10, bottleneck=4, layers=3, prototypes=12)
rng = np.random.default_rng(0)
TOKENS = rng.normal(size=(2, 3, 5, 6)).astype(np.float32)


def parameters(tower):
  shapes = jax.eval_shape(functools.partial(towers.init, 'head', tower, seed=0))
  return jax.tree.map(
    lambda s: (0.5 * np.random.default_rng(s.size).normal(size=s.shape)).astype(np.float32), shapes
  )


def run(tower, arrays, compute=F32):
  return towers.apply(parameters(tower), tower, compute, arrays)


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize('layers', [1, 2, 3])
def test_the_head_is_an_mlp_onto_the_unit_sphere(layers):
  tower = schema.DINOHead(
    kind='dino_head', width=6, hidden=10, bottleneck=4, layers=layers, prototypes=12
  )
  params, x = parameters(tower), TOKENS
  for i in range(layers):
    x = (gelu(x) if i else x) @ params[f'layer{i}']['kernel'] + params[f'layer{i}']['bias']
  x = x / np.linalg.norm(x, axis=-1, keepdims=True)
  assert params['prototypes'].shape == (4, 12)
  np.testing.assert_allclose(run(tower, {'tokens': TOKENS})['z'], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'sizes, norm',
  [
    ((1536, 2048, 256), 2.3),  # ViT-g's: the deviation of DINO
    ((128, 256, 64), 3.1),  # of the quickstart; 0.048 with that deviation
    ((32, 32, 16), 1.5),  # of runlocal; 0.0014 with it
  ],
)
def test_the_bottleneck_starts_with_a_norm_of_about_one(sizes, norm):
  """Before the unit sphere, on tokens of unit variance."""
  width, hidden, bottleneck = sizes
  tower = schema.DINOHead(
    kind='dino_head', width=width, hidden=hidden, bottleneck=bottleneck, prototypes=4
  )
  params = towers.init('head', tower, seed=0)
  x = np.random.default_rng(0).normal(size=(256, width)).astype(np.float32)
  for i in range(3):
    x = (gelu(x) if i else x) @ params[f'layer{i}']['kernel'] + params[f'layer{i}']['bias']
  assert np.linalg.norm(x, axis=-1).mean() == pytest.approx(norm, rel=0.1)


def test_cls_tokens_have_no_patch_axis():
  z = run(HEAD, {'tokens': TOKENS[:, :, 0]})['z']
  assert z.shape == (2, 3, 4) and z.dtype == jnp.float32
  np.testing.assert_allclose(z, run(HEAD, {'tokens': TOKENS})['z'][:, :, 0], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(z, axis=-1), 1, rtol=1e-5)


def test_slots_choose_tokens():
  masked_indices = rng.permuted(np.tile(np.arange(5), (2, 3, 1)), axis=-1)[..., :2]
  z, chosen = (
    run(HEAD, {'tokens': TOKENS})['z'],
    run(HEAD, {'tokens': TOKENS, 'masked_indices': masked_indices})['z'],
  )
  np.testing.assert_allclose(
    chosen,
    np.take_along_axis(np.asarray(z), masked_indices[..., None], axis=2),
    rtol=1e-5,
    atol=1e-6,
  )


def test_bottlenecks_are_float32_whatever_computes_them():
  z = run(HEAD, {'tokens': TOKENS}, schema.Compute(dtype='bfloat16'))['z']
  assert z.dtype == jnp.float32
  np.testing.assert_allclose(np.linalg.norm(z, axis=-1), 1, rtol=1e-5)
  np.testing.assert_allclose(z, run(HEAD, {'tokens': TOKENS})['z'], atol=0.05)


def test_projection():
  tower = schema.ProjectionHead(kind='projection', width=6, output=7)
  y = run(tower, {'x': TOKENS.astype(jnp.bfloat16)}, schema.Compute())['embedding']
  assert y.dtype == jnp.float32
  expected = np.asarray(TOKENS.astype(jnp.bfloat16), np.float32) @ parameters(tower)['kernel']
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_logit_starts_where_the_config_says():
  make = lambda **kw: towers.init('logit', schema.Logit(kind='logit', **kw), seed=0)
  params = make(temperature=0.1, bias=-10.0)
  np.testing.assert_allclose(np.exp(params['log_temperature']), 0.1, rtol=1e-6)
  assert params['bias'] == -10 and set(make()) == {'log_temperature'}
  assert run(schema.Logit(kind='logit'), {}) == {}


REGION = schema.RegionHead(kind='region_head', width=6, output=6, samples=5)


def region_features(patch, boxes, samples):
  """The mean of bilinear samples of each box, point by point."""
  result = np.zeros((*boxes.shape[:2], patch.shape[-1]))
  side = int(np.sqrt(patch.shape[2]))
  grid = patch[:, 0].reshape(len(patch), side, side, -1)
  for b, r in np.ndindex(boxes.shape[:2]):
    ymin, xmin, ymax, xmax = boxes[b, r]
    for i, j in np.ndindex(samples, samples):
      y = np.clip((ymin + (ymax - ymin) * (i + 0.5) / samples) * side - 0.5, 0, side - 1)
      x = np.clip((xmin + (xmax - xmin) * (j + 0.5) / samples) * side - 0.5, 0, side - 1)
      top, left = min(int(y), side - 2), min(int(x), side - 2)
      for dy, dx in np.ndindex(2, 2):
        weight = (1 - abs(y - top - dy)) * (1 - abs(x - left - dx))
        result[b, r] += weight * grid[b, top + dy, left + dx] / samples**2
  return result


def test_a_region_is_the_mean_of_its_samples():
  patch = rng.normal(size=(2, 1, 16, 6)).astype(np.float32)
  boxes = np.array(
    [[[0, 0, 1, 1], [0.1, 0.3, 0.55, 0.4]], [[0.9, 0.9, 1, 1], [0.5, 0.5, 0.5, 0.5]]], np.float32
  )
  params = {'kernel': np.eye(6, dtype=np.float32)}
  arrays = {'patch': patch, 'boxes': boxes}
  found = towers.apply(params, REGION, F32, arrays)['embedding']
  np.testing.assert_allclose(found, region_features(patch, boxes, 5), rtol=1e-5, atol=1e-6)
  assert towers.outputs(REGION) == {'embedding'}


def test_a_region_head_projects():
  patch = rng.normal(size=(1, 1, 4, 6)).astype(np.float32)
  boxes = np.array([[[0, 0, 1, 1]]], np.float32)
  found = run(REGION, {'patch': patch, 'boxes': boxes})['embedding']
  kernel = parameters(REGION)['kernel']
  expected = patch.mean((1, 2)) @ kernel
  np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5, atol=1e-6)

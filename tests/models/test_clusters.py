"""Clusters of patches: against plain loops, gradients by finite differences, and in the tower."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.interop import write
from tips_jax.interop.weights import Weights
from tips_jax.models import clusters, towers, vit

rng = np.random.default_rng(0)
F32 = schema.Compute(dtype='float32')
QUARTER = schema.Reduction(keep=0.25, after=1, neighbors=3)
PLACES = np.stack(np.divmod(np.arange(16), 4), -1)[None]
TOWER = schema.ViT(
  kind='vit', width=16, depth=3, heads=2, mlp=32, patch=8, grid=4, mask_token=True, reduce=QUARTER
)
WHOLE = dataclasses.replace(TOWER, reduce=schema.Reduction())
PARAMS = towers.init('image', TOWER, seed=0)
IMAGES = rng.integers(256, size=(2, 1, 32, 32, 3), dtype=np.uint8)


def loops(x, places, config):
  """Cluster of each patch, as the docstring of `assign` says it."""
  patches = len(x)
  k = max(round(config.keep * patches), 1)
  d = np.zeros((patches, patches))
  for i, j in np.ndindex(d.shape):
    d[i, j] = np.mean((x[i] - x[j]) ** 2) + config.spatial * np.sum((places[i] - places[j]) ** 2)
  rho, delta = np.zeros(patches), np.zeros(patches)
  for i in range(patches):
    rho[i] = np.exp(-np.mean(sorted(np.delete(d[i], i))[: config.neighbors]))
  for i in range(patches):
    denser = [j for j in range(patches) if rho[j] > rho[i] or rho[j] == rho[i] and j < i]
    delta[i] = np.sqrt(min(d[i, denser])) if denser else np.sqrt(max(d[i]))
  centers = np.argsort(-rho * delta, kind='stable')[:k]
  found = np.array([np.argmin(d[i, centers]) for i in range(patches)])
  found[centers] = np.arange(k)
  return found


@pytest.mark.parametrize(
  'config, scale',
  [
    (QUARTER, 1),
    (schema.Reduction(keep=0.4, neighbors=40, spatial=0.1), 1),
    (QUARTER, 15),  # exp of what is so far away is 0 in float32
  ],
)
def test_clusters_are_those_of_loops(config, scale):
  x = scale * rng.normal(size=(3, 16, 5)).astype(np.float32)
  if scale > 1:
    distances = ((x[:, :, None] - x[:, None]) ** 2).mean(-1)
    nearest = np.sort(distances, -1)[..., 1 : 1 + config.neighbors].mean(-1)
    assert np.median(nearest) > 104
  found = np.asarray(clusters.assign(x, PLACES, config))
  assert found.shape == (3, 16, clusters.count(config, 16)) and (found.sum(-1) == 1).all()
  for one, of_one in zip(x, found.argmax(-1)):
    np.testing.assert_array_equal(of_one, loops(one.astype(np.float64), PLACES[0], config))
  merged = np.asarray(clusters.merge(x, found))
  unfolded = np.asarray(clusters.unfold(merged, found))
  for b, i in np.ndindex(3, 16):
    own = found[b].argmax(-1)
    np.testing.assert_allclose(unfolded[b, i], x[b, own == own[i]].mean(0), rtol=1e-5, atol=1e-6)


def test_equal_patches_leave_no_cluster_empty():
  x = jnp.ones((1, 16, 5), jnp.bfloat16)
  found = clusters.assign(x, PLACES, QUARTER)
  assert (np.asarray(found, np.float32).sum(1) > 0).all()
  assert np.asarray(clusters.merge(x, found) == 1).all()
  one = clusters.assign(x[:, :1], PLACES[:, :1], QUARTER)
  assert one.shape == (1, 1, 1) and one[0, 0, 0] == 1


def test_gradient_is_that_of_finite_differences():
  x = rng.normal(size=(1, 16, 4)).astype(np.float32)
  weights = rng.normal(size=(1, 16, 4)).astype(np.float32)

  def loss(x):
    of_patches = clusters.assign(x, PLACES, QUARTER)
    return (weights * clusters.unfold(jnp.tanh(clusters.merge(x, of_patches)), of_patches)).sum()

  check_grads(loss, (x,), order=1, modes=['rev'], atol=1e-2, rtol=1e-2, eps=1e-3)


# --- in the tower ---------------------------------------------------------------------------------


def run(tower, arrays, *, compute=F32, **options):
  return jax.jit(lambda: towers.apply(PARAMS, tower, compute, arrays, **options))()


def test_the_parameters_are_those_of_a_tower_without():
  whole = towers.init('image', WHOLE, seed=0)
  jax.tree.map(np.testing.assert_array_equal, PARAMS, whole)


def test_later_blocks_see_clusters_and_each_patch_gets_its_own():
  out = run(TOWER, {'images': IMAGES})
  assert out['patch'].shape == (2, 1, 16, 16)
  for patches in np.asarray(out['patch'][:, 0]):
    assert len(np.unique(patches.round(5), axis=0)) == 4
  assert not np.allclose(out['web'], run(WHOLE, {'images': IMAGES})['web'], atol=1e-3)
  unrolled = run(TOWER, {'images': IMAGES}, compute=schema.Compute(dtype='float32', scan=False))
  np.testing.assert_allclose(unrolled['patch'], out['patch'], rtol=1e-4, atol=1e-5)
  inside = vit.inspect(PARAMS, TOWER, F32, IMAGES, intermediate_layers=(0, 1, 2), values=True)
  np.testing.assert_allclose(inside['patch'], out['patch'], rtol=1e-4, atol=1e-5)
  # What the blocks before see is untouched; then patches are clusters, also as values.
  before = vit.inspect(PARAMS, WHOLE, F32, IMAGES, intermediate_layers=(0,))
  layers = inside['intermediate_layers']
  first = before['intermediate_layers'][0]['patch']
  np.testing.assert_allclose(layers[0]['patch'], first, rtol=1e-4, atol=1e-5)
  for patches in (layers[1]['patch'], layers[2]['patch'], inside['value_patch']):
    assert len(np.unique(np.asarray(patches[0, 0]).round(5), axis=0)) == 4


def test_values_of_a_last_block_that_follows_the_clusters():
  late = dataclasses.replace(TOWER, reduce=dataclasses.replace(QUARTER, after=2))
  inside = vit.inspect(PARAMS, late, F32, IMAGES, values=True)
  assert len(np.unique(np.asarray(inside['value_patch'][0, 0]).round(5), axis=0)) == 4


def test_masked_visible_and_dropped():
  tower = dataclasses.replace(TOWER, drop_path=0.5)
  mask = np.arange(16)[None, None] % 2 == np.zeros((2, 1, 1))
  masked = run(TOWER, {'images': IMAGES, 'mask': mask})['patch']
  # Equal mask tokens differ by their positions, and are clustered as any patch.
  assert np.isfinite(masked).all() and masked.shape == (2, 1, 16, 16)
  visible = np.tile(np.arange(0, 16, 2), (2, 1, 1)).astype(np.int32)
  some = run(TOWER, {'images': IMAGES, 'visible': visible})['patch']
  assert some.shape == (2, 1, 8, 16)
  assert len(np.unique(np.asarray(some[0, 0]).round(5), axis=0)) == 2
  still = run(tower, {'images': IMAGES})['web']
  dropped = run(tower, {'images': IMAGES}, rng=jax.random.key(0), rows=jnp.arange(2))['web']
  assert np.isfinite(dropped).all() and not np.allclose(dropped, still)


def test_the_gradient_reaches_all_blocks():
  gradient = jax.jit(
    jax.grad(lambda p: towers.apply(p, TOWER, F32, {'images': IMAGES})['patch'].sum(-1).var())
  )(PARAMS)
  kernel = np.asarray(gradient['encoder']['blocks']['mlp']['up']['kernel'])
  assert np.isfinite(kernel).all() and (np.abs(kernel).max((1, 2)) > 0).all()


def test_cost_and_refusals():
  shapes = {'images': (1, 448, 448, 3)}
  large = dataclasses.replace(TOWER, width=384, mlp=1536, heads=6, depth=12, patch=16)
  large = dataclasses.replace(large, reduce=schema.Reduction(keep=0.25, after=4))
  whole = dataclasses.replace(large, reduce=schema.Reduction())
  assert 0.4 < vit.ViT.flops(large, shapes) / vit.ViT.flops(whole, shapes) < 0.55
  with pytest.raises(InputError, match='reduce.after: got 3; expected less than the depth 3'):
    dataclasses.replace(TOWER, reduce=schema.Reduction(keep=0.5, after=3))


@pytest.mark.parametrize('format', ['hf', 'official_torch', 'official_jax', 'onnx'])
def test_formats_that_cannot_merge(format, tmp_path):
  weights = Weights(name='model', towers={'image': TOWER}, params={'image': PARAMS})
  with pytest.raises(InputError, match=f'--to={format}: got an image tower that merges patches'):
    write.write(weights, format, tmp_path)

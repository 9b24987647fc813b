"""Region contrast and tags against NumPy, in value, and in gradient against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.objectives import regions

B, R, C, K, T, D = 8, 3, 2, 2, 4, 5
rng = np.random.default_rng(0)
REGIONS = rng.normal(size=(B, R, D)).astype(np.float32)
CAPTIONS = rng.normal(size=(B, R, C, D)).astype(np.float32)
VALID = rng.random((B, R, C)) < 0.6
LOG_T = np.float32(np.log(0.2))
TAGS = rng.normal(size=(B, R, K, D)).astype(np.float32)
IDS = rng.integers(1, 3, (B, R, K, T)).astype(np.int32)  # of 16 tags: many are shared
HAS = rng.random((B, R, K)) < 0.7
MESHES = [(1, 1), (2, 1), (2, 4)]


def unit(x):
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def plain_contrast(images, texts):
  """Mean of both directions over all pairs, each caption number by itself."""
  total = 0.0
  for c in range(C):
    own = np.flatnonzero(VALID[:, :, c])
    x = unit(images.reshape(-1, D)[own])
    y = unit(texts[:, :, c].reshape(-1, D)[own])
    logits = jnp.dot(x, y.T, precision='highest') / 0.2
    for axis in (0, 1):
      total -= 0.5 * jnp.trace(jax.nn.log_softmax(logits, axis))
  return total / VALID.sum()


def smooth_l1(x, beta):
  return jnp.where(abs(x) < beta, 0.5 * x * x / beta, abs(x) - 0.5 * beta)


def plain_tags(images, texts, beta):
  """The mean over rows that have tags and all tags."""
  x = unit(images.reshape(-1, D))
  y = unit(texts.reshape(-1, D))[HAS.reshape(-1)]
  names = [tuple(ids) for ids in IDS.reshape(-1, T)[HAS.reshape(-1)]]
  rows = [
    {tuple(ids) for ids, has in zip(row, mask) if has}
    for row, mask in zip(IDS.reshape(-1, K, T), HAS.reshape(-1, K))
  ]
  target = np.array([[name in row for name in names] for row in rows], np.float32)
  loss = smooth_l1(jnp.dot(x, y.T, precision='highest') - target, beta)
  return loss[np.flatnonzero([bool(row) for row in rows])].mean()


def value_and_grad(fn):
  return jax.jit(jax.value_and_grad(fn, (0, 1)))


def close(found, expected):
  assert np.isfinite(found[0])
  np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)
  for a, b in zip(found[1], expected[1]):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('shape', MESHES)
def test_region_contrast_equals_the_plain_formula(mesh, shape):
  def fn(images, texts):
    return regions.contrastive(images, texts, LOG_T, VALID, block=5).value

  with mesh(*shape):
    found = value_and_grad(fn)(REGIONS, CAPTIONS)
  close(found, value_and_grad(plain_contrast)(REGIONS, CAPTIONS))


@pytest.mark.parametrize('shape', MESHES)
@pytest.mark.parametrize('beta', [1.0, 0.3])
def test_tags_equal_the_plain_formula(mesh, shape, beta):
  def fn(images, texts):
    return regions.tags(images, texts, IDS, HAS, beta=beta, block=5).value

  def plain(images, texts):
    return plain_tags(images, texts, beta)

  with mesh(*shape):
    found = value_and_grad(fn)(REGIONS, TAGS)
  close(found, value_and_grad(plain)(REGIONS, TAGS))


def test_tags_as_pairs_have_no_negatives():
  def fn(images, texts):
    return regions.tags(images, texts, IDS, HAS, target='pair', beta=0.3).value

  def plain(images, texts):
    loss = smooth_l1(unit(images)[:, :, None] - unit(texts), 0.3).mean(-1)
    return (loss * HAS).sum() / HAS.sum()

  close(value_and_grad(fn)(REGIONS, TAGS), value_and_grad(plain)(REGIONS, TAGS))


def test_tags_of_images_are_those_of_their_one_region():
  images = REGIONS[:, :1]
  found = regions.tags(images, TAGS[:, 0], IDS[:, 0], HAS[:, 0])
  expected = regions.tags(images, TAGS[:, :1], IDS[:, :1], HAS[:, :1])
  np.testing.assert_allclose(found.value, expected.value, rtol=1e-6)
  for name in ('own', 'others'):
    np.testing.assert_allclose(found.metrics[name], expected.metrics[name], rtol=1e-6)


def test_metrics_say_how_near_texts_are():
  """In NumPy: cosines with own and with other tags; nearest captions among the c-th of all."""
  x = np.asarray(unit(REGIONS)).reshape(-1, D)
  tags = np.asarray(unit(TAGS)).reshape(-1, K, D)
  has = HAS.reshape(-1, K)
  names = IDS.reshape(-1, K, T).tolist()
  own, others = [], []
  for i, j, k in np.ndindex(len(x), len(x), K):
    if has[j, k] and has[i].any():
      mine = any(has[i, m] and names[i][m] == names[j][k] for m in range(K))
      (own if mine else others).append(x[i] @ tags[j, k])
  found = regions.tags(REGIONS, TAGS, IDS, HAS, block=5).metrics
  np.testing.assert_allclose(found['own'], np.mean(own), rtol=1e-5)
  np.testing.assert_allclose(found['others'], np.mean(others), rtol=1e-5)
  hits = 0
  for c in range(C):
    rows = np.flatnonzero(VALID[:, :, c])
    cosines = x[rows] @ np.asarray(unit(CAPTIONS))[:, :, c].reshape(-1, D)[rows].T
    hits += (cosines.argmax(1) == np.arange(len(rows))).sum()
  found = regions.contrastive(REGIONS, CAPTIONS, LOG_T, VALID, block=5).metrics
  assert 0 < hits and found['pairs'] == VALID.sum()
  np.testing.assert_allclose(found['accuracy'], hits / VALID.sum(), rtol=1e-6)
  np.testing.assert_allclose(found['temperature'], 0.2, rtol=1e-6)


def test_a_batch_without_regions_or_tags_has_no_loss_and_a_finite_gradient():
  nothing = np.zeros_like(VALID)

  def contrast(images, texts):
    return regions.contrastive(images, texts, LOG_T, nothing).value

  def tags(images, texts):
    return regions.tags(images, texts, IDS, nothing).value

  for fn in (contrast, tags):
    value, grads = value_and_grad(fn)(REGIONS * 0, TAGS * 0)
    assert value == 0 and not any(np.any(g) for g in grads)


def test_only_equal_texts_have_equal_keys():
  ids = rng.integers(0, 4, (4000, 6)).astype(np.int32)
  keys = {tuple(key) for key in np.asarray(regions._keys(ids)).tolist()}
  assert len(keys) == len({tuple(row) for row in ids.tolist()})

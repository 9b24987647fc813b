"""Blocked, sharded contrastive losses against the plain formulas, in value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.objectives import contrastive

B, V, D = 16, 2, 6
rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(B, V, D)).astype(np.float32)
TEXTS = rng.normal(size=(B, D)).astype(np.float32)
VALID = np.array([1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1], bool)
EVERY = np.ones(B, bool)
LOG_T, BIAS = np.float32(np.log(0.2)), np.float32(-2)


def cosines(images, texts, log_t):
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  return jnp.einsum('ivd,jd->vij', unit(images), unit(texts), precision='highest') / jnp.exp(log_t)


def dense_softmax(images, texts, log_t, bias, rows, smoothing):
  """Mean over views and both directions of the cross-entropy with smoothed labels, over the valid
  rows alone.
  """
  logits = cosines(images[rows], texts[rows], log_t)
  n = logits.shape[1]
  labels = (1 - smoothing) * jnp.eye(n) + smoothing / n
  entropy = lambda axis: -(labels * jax.nn.log_softmax(logits, axis)).sum((1, 2)).mean() / n
  return 0.5 * (entropy(1) + entropy(2)) + 0 * bias


def dense_sigmoid(images, texts, log_t, bias, rows, smoothing):
  logits = cosines(images[rows], texts[rows], log_t) + bias
  n = logits.shape[1]
  return -jax.nn.log_sigmoid((2 * jnp.eye(n) - 1) * logits).sum((1, 2)).mean() / n


def run(kind, images, texts, log_t, bias, valid, **args):
  if kind == 'softmax':
    return contrastive.softmax(images, texts, log_t, valid, **args)
  return contrastive.sigmoid(images, texts, log_t, bias, valid, **args)


def value_and_grad(fn, *inputs):
  return jax.jit(jax.value_and_grad(fn, (0, 1, 2, 3)))(*inputs)


@functools.cache
def dense(kind, some, smoothing):
  rows = np.flatnonzero(VALID if some else EVERY)
  plain = {'softmax': dense_softmax, 'sigmoid': dense_sigmoid}[kind]
  fn = lambda *inputs: plain(*inputs, rows, smoothing)
  return value_and_grad(fn, IMAGES, TEXTS, LOG_T, BIAS)


def close(a, b):
  """1e-5 of the largest entry."""
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max() + 1e-9),
    a,
    b,
  )


CASES = [  # loss, mesh, some rows invalid, label smoothing, block
  ('softmax', (1, 1), False, 0.0, 1024),
  ('softmax', (1, 1), True, 0.1, 5),
  ('softmax', (2, 1), True, 0.1, 3),
  ('softmax', (2, 2), True, 0.1, 3),
  ('softmax', (2, 4), True, 0.1, 2),
  ('sigmoid', (1, 1), False, 0.0, 1024),
  ('sigmoid', (1, 1), True, 0.0, 5),
  ('sigmoid', (1, 2), True, 0.0, 3),
  ('sigmoid', (4, 1), True, 0.0, 3),
  ('sigmoid', (4, 2), True, 0.0, 1),
]


@pytest.mark.parametrize('kind, shape, some, smoothing, block', CASES)
def test_equals_the_plain_formula(mesh, kind, shape, some, smoothing, block):
  args = dict(block=block) | (dict(label_smoothing=smoothing) if kind == 'softmax' else {})
  fn = lambda *inputs: run(kind, *inputs, VALID if some else None, **args).value
  with mesh(*shape):
    result = value_and_grad(fn, IMAGES, TEXTS, LOG_T, BIAS)
  close(result, dense(kind, some, smoothing))


@pytest.mark.parametrize('kind', ['softmax', 'sigmoid'])
def test_invalid_rows_change_nothing_and_get_no_gradient(kind):
  def fn(images, texts, log_t, bias):
    loss = run(kind, images, texts, log_t, bias, VALID, block=4)
    return loss.value, loss.metrics

  fn = jax.jit(jax.value_and_grad(fn, (0, 1, 2, 3), has_aux=True))
  images, texts = IMAGES.copy(), TEXTS.copy()
  images[~VALID], texts[~VALID] = (
    images[0, 0],
    images[1, 0],
  )  # the best match of row 1, were it counted
  texts[2] = 0  # a row of padding
  a, b = fn(IMAGES, TEXTS, LOG_T, BIAS), fn(images, texts, LOG_T, BIAS)
  close(a[0], b[0])
  for grads in (a[1], b[1]):
    assert not np.any(grads[0][~VALID]) and not np.any(grads[1][~VALID])
    assert all(np.isfinite(g).all() for g in grads)
  close(a[1], b[1])


@pytest.mark.parametrize('kind', ['softmax', 'sigmoid'])
def test_a_batch_without_a_valid_row_is_zero(kind):
  fn = lambda *inputs: run(kind, *inputs, np.zeros(B, bool)).value
  value, grads = value_and_grad(fn, IMAGES, TEXTS, LOG_T, BIAS)
  assert value == 0 and not any(np.any(g) for g in grads)


@pytest.mark.parametrize('kind', ['softmax', 'sigmoid'])
def test_the_order_of_the_batch_does_not_matter(kind):
  fn = jax.jit(lambda x, y, valid: run(kind, x, y, LOG_T, BIAS, valid).value)
  order = np.random.default_rng(1).permutation(B)
  np.testing.assert_allclose(
    fn(IMAGES[order], TEXTS[order], VALID[order]), fn(IMAGES, TEXTS, VALID), rtol=1e-5
  )
  assert abs(fn(IMAGES[order], TEXTS, EVERY) - fn(IMAGES, TEXTS, EVERY)) > 1e-3


def test_random_embeddings_cost_log_b():
  x = np.random.default_rng(2).normal(size=(2, 256, 512)).astype(np.float32)
  loss = jax.jit(lambda x: contrastive.softmax(x[0][:, None], x[1], jnp.float32(0)).value)(x)
  assert abs(loss - np.log(256)) < 0.01


def test_accuracy_and_temperature():
  texts = np.eye(4, dtype=np.float32)
  images = texts[[0, 1, 3, 2]][:, None]
  for loss in (
    contrastive.softmax(images, texts, LOG_T),
    contrastive.sigmoid(images, texts, LOG_T, BIAS),
  ):
    assert loss.metrics['accuracy'] == 0.5
    np.testing.assert_allclose(loss.metrics['temperature'], 0.2, rtol=1e-5)
  # A text that does not count is no answer either.
  valid, texts = np.array([1, 1, 0, 0], bool), texts[[0, 1, 0, 1]] + 0.1 * texts
  for loss in (
    contrastive.softmax(texts[[2, 3, 0, 1]][:, None], texts, LOG_T, valid),
    contrastive.sigmoid(texts[[2, 3, 0, 1]][:, None], texts, LOG_T, BIAS, valid),
  ):
    assert loss.metrics['accuracy'] == 1


def test_the_temperature_is_not_clamped():
  t = np.float32(np.log(0.004))
  assert np.isclose(contrastive.softmax(IMAGES, TEXTS, t).metrics['temperature'], 0.004)


def test_half_precision_inputs_are_computed_in_float32():
  images, texts = IMAGES.astype(jnp.bfloat16), TEXTS.astype(jnp.bfloat16)
  loss = contrastive.softmax(images, texts, LOG_T)
  assert loss.value.dtype == jnp.float32
  exact = contrastive.softmax(images.astype(np.float32), texts.astype(np.float32), LOG_T)
  assert loss.value == exact.value


# --- softened labels -----------------------------------------------------------------------------

# Share of the label that the others have, and of that the part that goes by similarity.
SOFT = [(0.2, 0.0), (0.2, 1.0), (0.3, 0.4)]


def softened(images, texts, log_t, negatives, by_similarity):
  """Equations 6 to 8 of LightCLIP with labels that are written out, in float64."""
  unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
  logits = np.einsum('ivd,jd->vij', *map(unit, (images, texts))).astype(np.float64) / np.exp(log_t)
  n = logits.shape[1]
  total = 0
  for one in [*logits, *logits.swapaxes(1, 2)]:
    others = 1 - np.eye(n)
    likely = np.exp(one - one.max()) * others
    likely /= likely.sum(1, keepdims=True)
    even = others / (n - 1)
    labels = np.eye(n) * (1 - negatives)
    labels += negatives * ((1 - by_similarity) * even + by_similarity * likely)
    np.testing.assert_allclose(labels.sum(1), 1)
    top = one.max(1, keepdims=True)
    log_softmax = one - top - np.log(np.exp(one - top).sum(1, keepdims=True))
    total -= (labels * log_softmax).sum()
  return total / (2 * n * len(logits))


@pytest.mark.parametrize('negatives, by_similarity', SOFT)
@pytest.mark.parametrize('shape', [(1, 1), (2, 4)])
def test_softened_labels_equal_those_that_are_written_out(mesh, shape, negatives, by_similarity):
  args = dict(negatives=negatives, by_similarity=by_similarity)
  fn = jax.jit(lambda *a: contrastive.softmax(*a, LOG_T, VALID, block=3, **args).value)
  with mesh(*shape):
    got = fn(IMAGES, TEXTS)
  want = softened(IMAGES[VALID], TEXTS[VALID], LOG_T, negatives, by_similarity)
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize('negatives, by_similarity', SOFT)
def test_the_gradient_of_softened_labels_leaves_the_labels_alone(mesh, negatives, by_similarity):
  def plain(images, texts, log_t):
    logits = cosines(images, texts, log_t)
    n = logits.shape[1]
    total = 0
    for one in (logits, logits.swapaxes(1, 2)):
      masked = jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, one)
      likely = jax.lax.stop_gradient(jax.nn.softmax(masked, 2))
      even = (1 - jnp.eye(n)) / (n - 1)
      labels = (1 - negatives) * jnp.eye(n)
      labels += negatives * ((1 - by_similarity) * even + by_similarity * likely)
      total -= (labels * jax.nn.log_softmax(one, 2)).sum((1, 2)).mean() / n
    return total / 2

  def traced(images, texts, log_t, shares):
    args = dict(zip(('negatives', 'by_similarity'), shares))
    return contrastive.softmax(images, texts, log_t, block=3, **args).value

  grad = lambda fn: jax.jit(jax.grad(fn, (0, 1, 2)))
  with mesh(2, 2):
    got = grad(traced)(IMAGES, TEXTS, LOG_T, (negatives, by_similarity))
  close(got, grad(plain)(IMAGES, TEXTS, LOG_T))


def test_a_pair_that_stands_out_leaves_labels_for_the_others():
  logits = np.array([[200.0, 3, 2], [0, 200, 1], [0, 1, 200]]) / 200
  images, texts = np.linalg.qr(logits)[0].astype(np.float32)[:, None], np.eye(3, dtype=np.float32)
  args = dict(negatives=0.2, by_similarity=1.0)
  cold = np.float32(np.log(1 / 200))
  got = contrastive.softmax(images, texts, cold, **args)
  np.testing.assert_allclose(got.value, softened(images, texts, cold, 0.2, 1.0), rtol=1e-4)


def test_a_single_pair_keeps_its_label():
  loss = contrastive.softmax(IMAGES[:1], TEXTS[:1], LOG_T, negatives=0.2, by_similarity=0.5)
  assert abs(loss.value) < 1e-6

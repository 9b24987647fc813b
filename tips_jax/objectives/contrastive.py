"""Image-text contrast over the global batch, a block of rows at a time: [B, B] logits are never
held.
"""

import jax
import jax.numpy as jnp
from jax import lax

from tips_jax.core import parallel, schema
from tips_jax.core.types import Loss
from tips_jax.core.vectors import traced_unit

# Logits reach 1 / temperature = 280: products in bfloat16 would cost whole units.
_EXACT = lax.Precision.HIGHEST


def softmax(
  images: jax.Array,
  texts: jax.Array,
  log_temperature: jax.Array,
  valid: jax.Array | None = None,
  *,
  block: schema.Count = 1024,
  label_smoothing: schema.Share = 0.0,
  negatives: schema.Share = 0.0,
  by_similarity: schema.Share = 0.0,
) -> Loss:
  """Symmetric InfoNCE, -1/(2B) sum(log softmax over rows + over columns) of cos / temperature
  (CLIP, section 2.3).

  Labels may be softened, with numbers that change with progress (after LightCLIP, arXiv 2312.00674,
  equations 6 to 9): a row's label is 1 - `negatives` at its own column, and `negatives` is shared
  by the others, evenly but for the part `by_similarity`, which goes by their probabilities.

  Args:
    images, texts: [B, V, D] and [B, D], L2-normalized here; the loss is the mean over views.
    log_temperature: scalar, not clamped: at a bound its gradient would be zero for good.
    valid: [B] bool; pairs that are False are neither anchors nor negatives.
    block: rows of logits held at once.
    label_smoothing: share of a label that all columns have evenly, the own one too.
    negatives: share of a label that goes to the other columns.
    by_similarity: part of that share which follows the softmax over the other columns, without
      gradient.
  Metrics: temperature, and accuracy of the nearest text of each image.
  """
  scale = jnp.exp(-log_temperature.astype(jnp.float32))
  x, y, w = _prepare(images, texts, valid)
  labels = dict(smoothing=label_smoothing, negatives=negatives, by_similarity=by_similarity)
  # What is 0 for good is left out, and nothing of it computed.
  labels = {name: share for name, share in labels.items() if not _never(share)}

  def local(batch, shared, shard):
    x, y, w = batch
    scale, labels = shared
    # Each device scores its own rows against everybody's columns.
    y_all = shard.gather(y)
    w_all = shard.gather(w)
    first = shard.offset(len(w))
    sums = jnp.zeros(4)
    for v in range(x.shape[1]):
      xv = x[:, v]
      i2t, hit = _rows(xv, y_all, w_all, first, scale, block, labels)
      t2i, _ = _rows(y, shard.gather(xv), w_all, first, scale, block, labels)
      sums += jnp.stack([(i2t * w).sum(), (t2i * w).sum(), (hit * w).sum(), w.sum()])
    return sums

  i2t, t2i, hit, count = parallel.sum_over_batch(local, (x, y, w), (scale, labels))
  count = jnp.maximum(count, 1.0)  # a batch without any pair has no loss
  return Loss(0.5 * (i2t + t2i) / count, {'accuracy': hit / count, 'temperature': 1 / scale})


def sigmoid(
  images: jax.Array,
  texts: jax.Array,
  log_temperature: jax.Array,
  bias: jax.Array,
  valid: jax.Array | None = None,
  *,
  block: schema.Count = 1024,
) -> Loss:
  """SigLIP loss (arXiv 2303.15343, eq. 1): -1/B sum_ij log sigmoid(z_ij (cos_ij / temperature +
  bias)).

  Arguments as in `softmax`; bias: scalar. z is 1 for a pair and -1 elsewhere.
  """
  scale = jnp.exp(-log_temperature.astype(jnp.float32))
  x, y, w = _prepare(images, texts, valid)

  def local(batch, shared, shard):
    x, y, w = batch
    scale, bias = shared
    y_all = shard.gather(y)
    w_all = shard.gather(w)
    ids = shard.offset(len(w)) + jnp.arange(len(w))

    def row(args):
      x_i, i = args
      logits = jnp.dot(y_all, x_i, precision=_EXACT) * scale + bias
      signs = jnp.where(jnp.arange(len(y_all)) == i, 1.0, -1.0)
      hit = jnp.argmax(jnp.where(w_all > 0, logits, -jnp.inf)) == i
      return -(jax.nn.log_sigmoid(signs * logits) * w_all).sum(), hit

    sums = jnp.zeros(3)
    for v in range(x.shape[1]):
      # Checkpointed: the backward pass forms a row's logits again instead of keeping all.
      loss, hit = lax.map(jax.checkpoint(row), (x[:, v], ids), batch_size=min(block, len(w)))
      sums += jnp.stack([(loss * w).sum(), (hit * w).sum(), w.sum()])
    return sums

  loss, hit, count = parallel.sum_over_batch(local, (x, y, w), (scale, bias.astype(jnp.float32)))
  count = jnp.maximum(count, 1.0)
  return Loss(loss / count, {'accuracy': hit / count, 'temperature': 1 / scale, 'bias': bias})


def _prepare(images, texts, valid):
  """(unit vectors of images, of texts, weights of the pairs: 1 where valid, else 0)."""
  if valid is None:
    valid = jnp.ones(texts.shape[0])
  w = jnp.asarray(valid, jnp.float32)
  return traced_unit(images), traced_unit(texts), w


def _rows(x, y_all, w_all, first, scale, block, labels):
  """(cross-entropy with the labels, was the own column the largest) for each row of x against all
  columns.
  """

  def row(args):
    x_i, i = args
    logits = jnp.where(w_all > 0, jnp.dot(y_all, x_i, precision=_EXACT) * scale, -jnp.inf)
    # A row that is left out has -inf as its own logit: replaced, so that no NaN reaches the sum.
    total = jnp.where(w_all[i] > 0, jax.nn.logsumexp(logits), 0.0)
    own = jnp.where(w_all[i] > 0, logits[i], 0.0)
    finite = jnp.where(w_all > 0, logits, 0.0)
    target = own
    if 'negatives' in labels:
      others = (w_all > 0) & (jnp.arange(len(w_all)) != i)
      target += labels['negatives'] * (_of_others(finite, others, own, labels) - own)
    if 'smoothing' in labels:
      mean = finite.sum() / jnp.maximum(w_all.sum(), 1.0)
      target += labels['smoothing'] * (mean - target)
    return total - target, jnp.argmax(logits) == i

  rows = first + jnp.arange(len(x))
  # Checkpointed: the backward pass forms a block of logits again instead of keeping all.
  return lax.map(jax.checkpoint(row), (x, rows), batch_size=min(block, len(x)))


def _of_others(logits, others, own, labels):
  """Mean logit of the other columns as their labels weigh them; the own one where there is none."""
  count = jnp.maximum(others.sum(), 1)
  mean = jnp.where(others, logits, 0.0).sum() / count
  if 'by_similarity' in labels:
    fixed = lax.stop_gradient(logits)
    # From their own largest: beside a pair that stands out all their probabilities round to 0.
    largest = jnp.where(others, fixed, -jnp.inf).max()
    weights = jnp.where(others, jnp.exp(fixed - largest), 0.0)
    near = (weights * logits).sum() / jnp.maximum(weights.sum(), 1e-30)
    mean += labels['by_similarity'] * (near - mean)
  return jnp.where(others.any(), mean, own)


def _never(share):
  return isinstance(share, int | float) and share == 0

"""UMG-CLIP (arXiv 2401.06397), after the paper's description: contrast of regions with their
captions, and tags of images and of regions. The paper's equations leave points open; each says so.
"""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

from tips_jax.core import parallel, schema
from tips_jax.core.strict import Range
from tips_jax.core.types import Loss
from tips_jax.core.vectors import traced_unit
from tips_jax.objectives.contrastive import softmax

_EXACT = lax.Precision.HIGHEST  # as in contrastive.py
# Multipliers of two sums over a text's ids, modulo 2^32: equal texts have equal sums, and others
# with a chance of 2^-64.
_KEYS = (0x9E3779B1, 0x85EBCA77)


def contrastive(
  regions: jax.Array,
  texts: jax.Array,
  log_temperature: jax.Array,
  valid: jax.Array,
  *,
  block: schema.Count = 1024,
) -> Loss:
  """Symmetric InfoNCE of all regions of the global batch with their captions (L_cap of region
  level).

  Args:
    regions: [B, R, D], L2-normalized here, as texts [B, R, C, D].
    log_temperature: scalar.
    valid: [B, R, C] bool: which region has which caption; others take no part.
    block: rows of logits held at once.

  The c-th captions of all regions are one contrast: a region's other captions are no negatives. The
  loss is the mean over all pairs (how the paper counts several captions is not known). Metrics:
  accuracy of the nearest caption, temperature, and the number of pairs.
  """
  rows = regions.shape[0] * regions.shape[1]
  total = jnp.float32(0)
  hits = jnp.float32(0)
  pairs = jnp.float32(0)
  for c in range(texts.shape[2]):
    mask = valid[:, :, c].reshape(rows)
    one = softmax(
      regions.reshape(rows, 1, -1),
      texts[:, :, c].reshape(rows, -1),
      log_temperature,
      mask,
      block=block,
    )
    count = mask.sum().astype(jnp.float32)
    total += count * one.value
    hits += count * one.metrics['accuracy']
    pairs += count
  most = jnp.maximum(pairs, 1.0)
  metrics = {'accuracy': hits / most, 'temperature': jnp.exp(log_temperature), 'pairs': pairs}
  return Loss(total / most, metrics)


def tags(
  images: jax.Array,
  texts: jax.Array,
  ids: jax.Array,
  valid: jax.Array,
  *,
  target: Literal['multihot', 'pair'] = 'multihot',
  beta: Annotated[float, Range(1e-4, 1e4)] = 1.0,
  block: schema.Count = 1024,
) -> Loss:
  """Smooth L1 of images, or regions, and their tags (L_tag), which several of them may share.

  Args:
    images: [B, V, D] or [B, R, D], L2-normalized here, as texts.
    texts: [B, K, D], tags of images, or [B, R, K, D], of regions.
    ids: [..., K, T], their tokens, which say which tags are the same.
    valid: [..., K] bool.
    target: on what the paper takes Smooth L1 is not known. 'multihot': the cosine of each image
      with each tag of the global batch against 1 where the image has that tag, else 0. 'pair': the
      unit vectors of an image and of its own tags; no negatives.
    beta: where the square ends and the line begins.
    block: rows held at once.

  The loss is the mean over all pairs of an image that has tags and a tag. Metrics of 'multihot':
  mean cosine with own tags and with those of others.
  """
  if texts.ndim == 3:  # of images
    shape = (*images.shape[:2], *texts.shape[1:])
    texts = jnp.broadcast_to(texts[:, None], shape)
    ids = jnp.broadcast_to(ids[:, None], (*shape[:3], ids.shape[-1]))
    valid = jnp.broadcast_to(valid[:, None], shape[:3])
  batch = (traced_unit(images), traced_unit(texts), _keys(ids), valid.astype(jnp.float32))
  if target == 'pair':
    return _pairs(*batch, beta)

  def local(batch, _, shard):
    x, y, key, w = batch
    y_all = shard.gather(y).reshape(-1, y.shape[-1])
    key_all = shard.gather(key).reshape(-1, 2)
    w_all = shard.gather(w).reshape(-1)

    def row(args):
      x_i, key_i, w_i = args
      cosine = jnp.dot(y_all, x_i, precision=_EXACT)
      same = (key_all[:, None] == key_i).all(-1)  # [tags of all, tags of this one]
      own = (same & (w_i > 0)).any(-1).astype(jnp.float32)
      has = (w_i > 0).any()
      loss = optax.huber_loss(cosine, own, delta=beta) / beta
      weights = jnp.stack([w_all, w_all * own]) * has
      return (loss * w_all).sum() * has, weights.sum(1), weights @ cosine

    rows = (x.reshape(-1, x.shape[-1]), key.reshape(-1, *key.shape[2:]), w.reshape(-1, w.shape[-1]))
    # Checkpointed: the backward pass forms a row's cosines again instead of keeping all.
    result = lax.map(jax.checkpoint(row), rows, batch_size=min(block, len(rows[0])))
    return jax.tree.map(lambda a: a.sum(0), result)

  loss, (every, own), (cosines, own_cosines) = parallel.sum_over_batch(local, batch, ())
  metrics = {
    'own': own_cosines / jnp.maximum(own, 1.0),
    'others': (cosines - own_cosines) / jnp.maximum(every - own, 1.0),
  }
  return Loss(loss / jnp.maximum(every, 1.0), metrics)


def _pairs(x, y, _, w, beta):
  """Mean over the tags of images of the Smooth L1 of two unit vectors, which is a mean over D."""
  loss = optax.huber_loss(x[:, :, None], y, delta=beta).mean(-1) / beta
  return Loss((loss * w).sum() / jnp.maximum(w.sum(), 1.0), {})


def _keys(ids):
  """[..., T] ids -> [..., 2] uint32, a checksum that only equal texts share."""
  ids = ids.astype(jnp.uint32)
  keys = []
  for multiplier in _KEYS:
    powers = [1]
    for _ in range(ids.shape[-1] - 1):
      powers.append(powers[-1] * multiplier % 2**32)
    # Products and sums of unsigned numbers wrap around.
    keys.append((ids * jnp.array(powers, jnp.uint32)).sum(-1, dtype=jnp.uint32))
  return jnp.stack(keys, -1)

"""Masked words: which word of the vocabulary stood there."""

import jax
import jax.numpy as jnp
from jax import lax

from tips_jax.core import parallel, schema
from tips_jax.core.types import Loss


def prediction(
  tokens: jax.Array,
  targets: jax.Array,
  valid: jax.Array,
  kernel: jax.Array,
  bias: jax.Array,
  *,
  block: schema.Count = 1024,
) -> Loss:
  """-log softmax(token kernel + bias) at the word that was masked, the mean over the masked words
  of the global batch (BERT, arXiv 1810.04805, section 3.1).

  Args:
    tokens, targets, valid: [B, M, D], int [B, M] and bool [B, M]: the masked words of each text,
      and which of the M there are.
    kernel, bias: [D, V] and [V].
    block: words whose logits are held at once.
  Metric: accuracy, of the likeliest word.
  """

  def local(batch, shared, shard):
    x, target, w = (a.reshape(-1, *a.shape[2:]) for a in batch)
    kernel, bias = shared

    def word(args):
      x_i, target_i = args
      logits = (x_i @ kernel).astype(jnp.float32) + bias
      return jax.nn.logsumexp(logits) - logits[target_i], jnp.argmax(logits) == target_i

    # Checkpointed: the backward pass forms a block of logits again instead of keeping all.
    loss, hit = lax.map(jax.checkpoint(word), (x, target), batch_size=min(block, len(x)))
    w = w.astype(jnp.float32)
    return jnp.stack([(loss * w).sum(), (hit * w).sum(), w.sum()])

  shared = (kernel.astype(tokens.dtype), bias)
  loss, hit, count = parallel.sum_over_batch(local, (tokens, targets, valid), shared)
  count = jnp.maximum(count, 1.0)
  return Loss(loss / count, {'accuracy': hit / count})

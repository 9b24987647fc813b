"""The text tower of TIPS: bidirectional transformer, ReLU, mean over the tokens."""
import math

import flax.linen as nn
import jax.numpy as jnp

from tips_jax.core import config as schema
from tips_jax.models import layers


class TextTower(nn.Module):
  """Text encoder (official JAX inference code; tips.md, section 1).

  Input: ids [B, T] int32, 0 is padding. Output: `text` [B, D]. A row of padding alone gives zeros.
  """
  config: schema.TextTower
  compute: schema.Compute

  @nn.compact
  def __call__(self, ids, rows_B=None):
    c, dtype = self.config, jnp.dtype(self.compute.dtype)
    init = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
    # float32 again before the look-up: a word's gradient is a sum over all its places.
    table = layers.weight(self, 'embedding', init, (c.vocab, c.width), dtype).astype(jnp.float32)
    keep = ids != 0
    x = table[ids] * math.sqrt(c.width) + layers.sincos_positions(ids.shape[1], c.width)
    x = layers.Dropout(c.dropout)(x.astype(dtype), rows_B)
    # Attention over no key at all would be NaN; such a row reads its padding and is zeroed below.
    read = keep | ~keep.any(axis=1, keepdims=True)
    x = layers.Blocks(c.depth, c.heads, c.mlp, 'relu', c.dropout, self.compute, name='encoder')(x, read, rows_B)
    x = layers.Norm(name='norm')(x).astype(jnp.float32) * keep[..., None]
    return {'text': x.sum(axis=1) / jnp.maximum(keep.sum(axis=1, keepdims=True), 1)}

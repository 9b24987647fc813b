"""The text tower of TIPS: bidirectional transformer, ReLU, mean over the tokens."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from tips_jax.core import schema
from tips_jax.core.types import Shapes
from tips_jax.models import layers


class TextTower(nn.Module):
  """Text encoder (official JAX inference code; tips.md, section 1), of one or several batches of
  texts.

  Each input: ids [B, T] int32, 0 is padding; rows [B], their global numbers, for dropout; without
  them there is none.
  Each output: `text` [B, D]. A row of padding alone gives zeros.
  """

  config: schema.TextTower
  compute: schema.Compute

  OPTIONAL = frozenset()
  TOGETHER = True

  @staticmethod
  def inputs(config: schema.TextTower) -> dict[str, jax.Array]:
    return {'ids': jnp.zeros((1, 2), jnp.int32)}

  @staticmethod
  def outputs(config: schema.TextTower, inputs: Shapes) -> Shapes:
    return {'text': (config.width,)}

  @staticmethod
  def flops(config: schema.TextTower, inputs: Shapes) -> float:
    [tokens] = inputs['ids']
    return layers.stack_flops(config.width, config.depth, config.mlp, 'relu', tokens)

  @nn.compact
  def __call__(self, *inputs):
    c, dtype = self.config, jnp.dtype(self.compute.dtype)
    init = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
    # float32 again before the look-up: a word's gradient is a sum over all its places.
    table = layers.weight(self, 'embedding', init, (c.vocab, c.width), dtype).astype(jnp.float32)
    drop, rows = layers.Dropout(c.dropout), [one.get('rows') for one in inputs]
    keep = [one['ids'] != 0 for one in inputs]
    xs = [
      table[one['ids']] * math.sqrt(c.width) + layers.sincos_positions(one['ids'].shape[1], c.width)
      for one in inputs
    ]
    xs = [drop(x.astype(dtype), r) for x, r in zip(xs, rows)]
    # Attention over no key at all would be NaN; such a row reads its padding and is zeroed below.
    read = [k | ~k.any(axis=1, keepdims=True) for k in keep]
    xs = layers.Blocks(
      c.width, c.depth, c.heads, c.mlp, 'relu', c.dropout, self.compute, name='encoder'
    )(xs, read, rows)
    norm = layers.Norm(c.width, name='norm')
    xs = [norm(x).astype(jnp.float32) * k[..., None] for x, k in zip(xs, keep)]
    return [
      {'text': x.sum(axis=1) / jnp.maximum(k.sum(axis=1, keepdims=True), 1)}
      for x, k in zip(xs, keep)
    ]

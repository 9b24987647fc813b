"""The text tower of TIPS: bidirectional transformer, ReLU, mean over the tokens."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from tips_jax.core import schema
from tips_jax.core.types import Shapes
from tips_jax.models import layers, sines


class TextTower(nn.Module):
  """Text encoder (official JAX inference code; docs/method.md), of one or several batches of
  texts.

  Each input: ids [B, T] int32, 0 is padding, or [B, ..., T], several texts of an image; rows [B],
  their global numbers, for dropout; without them there is none; fused2, fused3 [B, T, D], of one
  text of an image, added to the tokens after half and after three quarters of the blocks, the ends
  of stages 2 and 3 of four.
  Each output: `text` [B, D] or [B, ..., D], a row of padding alone gives zeros; and `words`
  [B, ..., T, D], the tokens of which it is the mean.
  """

  config: schema.TextTower
  compute: schema.Compute

  OPTIONAL = frozenset({'fused2', 'fused3'})
  ANY_AXES = frozenset({'ids'})
  TOGETHER = True

  @staticmethod
  def inputs(config: schema.TextTower) -> dict[str, jax.Array]:
    fused = jnp.zeros((1, 2, config.width))
    return {'ids': jnp.zeros((1, 2), jnp.int32), 'fused2': fused, 'fused3': fused}

  @staticmethod
  def outputs(config: schema.TextTower, inputs: Shapes) -> Shapes:
    ids = inputs['ids']
    return {'text': (*ids[:-1], config.width), 'words': (*ids, config.width)}

  @staticmethod
  def flops(config: schema.TextTower, inputs: Shapes) -> float:
    *several, tokens = inputs['ids']
    one = layers.stack_flops(config.width, config.depth, config.mlp, 'relu', tokens)
    return math.prod(several) * one

  def setup(self) -> None:
    c = self.config
    dtype = jnp.dtype(self.compute.dtype)
    # The official variance_scaling(1, 'fan_in', 'normal', out_axis=0): the fan-in is the width.
    init = nn.initializers.normal(1 / math.sqrt(c.width))
    table = layers.weight(self, 'embedding', init, (c.vocab, c.width), dtype)
    # float32 again before the look-up: a word's gradient is a sum over all its places.
    self.embedding = table.astype(jnp.float32)
    self.drop = layers.Dropout(c.dropout)
    self.encoder = layers.Blocks(c.width, c.depth, c.heads, c.mlp, 'relu', c.dropout, self.compute)
    self.norm = layers.Norm(c.width)

  def __call__(self, *inputs):
    shapes = [one['ids'].shape[:-1] for one in inputs]
    inputs = [_flat(**one) for one in inputs]
    rows = [one.get('rows') for one in inputs]
    keep = [one['ids'] != 0 for one in inputs]
    xs = [self.tokens(one['ids'], one.get('rows')) for one in inputs]
    added = None
    if any('fused2' in one or 'fused3' in one for one in inputs):
      added = [self.after_stages(one) for one in inputs]
    # Attention over no key at all would be NaN; such a row reads its padding, and `mean` drops it.
    read = [k | ~k.any(axis=1, keepdims=True) for k in keep]
    xs = self.encoder(xs, read, rows, added)
    outputs = []
    for x, k, shape in zip(xs, keep, shapes):
      words = self.norm(x).astype(jnp.float32)
      texts = mean(words, k).reshape(*shape, -1)
      outputs.append({'text': texts, 'words': words.reshape(*shape, *words.shape[1:])})
    return outputs

  def after_stages(self, one: dict[str, jax.Array]) -> dict[int, jax.Array]:
    """{number of blocks: tokens that are added after them}."""
    added = {}
    for stage in (2, 3):
      if f'fused{stage}' in one:
        after = math.ceil(self.config.depth * stage / 4)
        added[after] = added.get(after, 0) + one[f'fused{stage}']
    return added

  def tokens(self, ids: jax.Array, rows: jax.Array | None = None) -> jax.Array:
    """What the first block reads: [B, T, D]."""
    # Scaled to the size of the positions: initial embeddings are about of length one.
    x = self.embedding[ids] * math.sqrt(self.config.width)
    x = x + sines.line(ids.shape[1], self.config.width)
    return self.drop(x.astype(self.compute.dtype), rows)


def mean(x_BTD: jax.Array, keep_BT: jax.Array) -> jax.Array:
  """Mean over the words, padding left out: [B, D]."""
  x = x_BTD * keep_BT[..., None]
  return x.sum(axis=1) / jnp.maximum(keep_BT.sum(axis=1, keepdims=True), 1)


def _flat(ids, rows=None, **fused):
  """ids [B, ..., T] as [N, T], and a number of its own for each of these texts."""
  flat = fused | {'ids': ids.reshape(-1, ids.shape[-1])}
  if rows is not None:
    several = len(flat['ids']) // len(ids)
    flat['rows'] = (rows[:, None] * several + jnp.arange(several)).reshape(-1)
  return flat

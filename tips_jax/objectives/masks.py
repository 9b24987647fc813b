"""Masks of patches: random ones, and blocks; and of words.

Shapes are static: a crop has as many slots as any may have masked patches, and `masked_valid` says
which are filled.
"""

import math

import jax
import jax.numpy as jnp

from tips_jax.core import schema

_UNKNOWN = 1  # the id of <unk>
_LEAST_AREA = 4  # patches of a block
_LEAST_ASPECT = 0.3  # height / width, to its inverse
_TRIES = 10  # misses in a row, then a mask stays as it is
# In all: the slowest of 20,000 masks of 16 x 16 patches, a tenth to half of them, took 30.
_ATTEMPTS = 64


def slots(mask: schema.Mask, patches: int) -> int:
  """The most patches of a crop, or tokens of a text, that are masked."""
  if isinstance(mask, schema.BlockMask):
    return int(mask.ratio[1] * patches)
  return max(round(mask.ratio * patches), isinstance(mask, schema.WordMask))


def outputs(mask: schema.Mask, patches: int = 0) -> dict[str, int]:
  """{name of an array that `draw` or `draw_words` gives: entries for a crop of so many patches, or
  a text of so many tokens}.
  """
  masked = slots(mask, patches)
  if isinstance(mask, schema.WordMask):
    sizes = dict.fromkeys(('masked_indices', 'masked_valid', 'targets'), masked)
    return sizes | {'ids': patches}
  sizes = {'mask': patches, 'masked_indices': masked, 'masked_valid': masked}
  if isinstance(mask, schema.RandomMask) and mask.probability == 1:
    sizes['visible'] = patches - masked  # only where all crops have as many
  return sizes


def draw(
  mask: schema.Mask, key: jax.Array, shape: tuple[int, int], grid: tuple[int, int]
) -> dict[str, jax.Array]:
  """Masks of `shape` (images, views) crops of grid[0] x grid[1] patches, P in all.

  Returns {'mask': bool [B, V, P], 'masked_indices': int32 [B, V, M] the masked ones in order, then
  others up to M = `slots`, 'masked_valid': bool [B, V, M], 'visible': int32 [B, V, P - M] the
  others in order (see `outputs`)}. Exactly round(probability * B * V) crops have a mask.
  """
  patches = math.prod(grid)
  if isinstance(mask, schema.BlockMask):
    hidden = _blocks(mask, key, math.prod(shape), grid).reshape(*shape, patches)
  else:
    hidden = _random(mask, key, (*shape, patches))
  count = slots(mask, patches)
  order = jnp.argsort(~hidden, axis=-1, stable=True).astype(jnp.int32)
  result = {
    'mask': hidden,
    'masked_indices': order[..., :count],
    'masked_valid': jnp.take_along_axis(hidden, order[..., :count], axis=-1),
  }
  if 'visible' in outputs(mask):
    result['visible'] = order[..., count:]
  return result


def draw_words(
  mask: schema.WordMask, key: jax.Array, ids_BT: jax.Array, vocab: int
) -> dict[str, jax.Array]:
  """Masked texts, of ids below `vocab`, where 0 is padding and 1 unknown.

  Returns {'ids': int32 [B, T] with the words of `mask` replaced, 'masked_indices': int32 [B, M]
  their places, in no order, 'masked_valid': bool [B, M], which of the M = `slots` are filled,
  'targets': int32 [B, M] the words that were there}.
  """
  rows, length = ids_BT.shape
  most = slots(mask, length)
  words = ids_BT > _UNKNOWN
  luck = jax.random.uniform(jax.random.fold_in(key, 0), (rows, length))
  places = jnp.argsort(jnp.where(words, luck, 2.0), axis=1)[:, :most].astype(jnp.int32)
  number = words.sum(axis=1, keepdims=True)
  count = jnp.minimum(jnp.maximum(jnp.round(mask.ratio * number), 1), number)
  valid = jnp.arange(most) < count
  targets = jnp.take_along_axis(ids_BT, places, axis=1)
  fate = jax.random.uniform(jax.random.fold_in(key, 1), (rows, most))
  other = jax.random.randint(jax.random.fold_in(key, 2), (rows, most), _UNKNOWN + 1, vocab)
  new = jnp.where(fate < mask.hidden + mask.swapped, other, targets)
  new = jnp.where(fate < mask.hidden, _UNKNOWN, new)
  new = jnp.where(valid, new, targets).astype(ids_BT.dtype)
  ids = jnp.put_along_axis(ids_BT, places, new, axis=1, inplace=False)
  return {'ids': ids, 'masked_indices': places, 'masked_valid': valid, 'targets': targets}


def _random(mask, key, shape):
  """round(ratio * P) patches, uniformly (TIPS, arXiv 2410.16512, table 11; MAE, arXiv 2111.06377,
  section 3).
  """
  order = jnp.argsort(jax.random.uniform(key, shape), axis=-1)
  hidden = jnp.argsort(order, axis=-1) < slots(mask, shape[-1])
  if mask.probability < 1:
    rank, chosen = _chosen(jax.random.fold_in(key, 1), math.prod(shape[:-1]), mask.probability)
    hidden &= (rank < chosen).reshape(*shape[:-1], 1)
  return hidden


def _blocks(mask, key, crops, grid):
  """Blocks of random sizes and places until the crop's share is masked: bool [crops, h, w].

  As DINOv2 (dinov2/data/masking.py:70 and collate.py:23), after BEiT (arXiv 2106.08254, algorithm
  1): of the crops that are masked, each has a share from its own part of the range. A block that
  would mask too much or nothing new is drawn again.
  """
  height, width = grid
  rank, chosen = _chosen(jax.random.fold_in(key, 0), crops, mask.probability)
  least, most = mask.ratio
  luck = jax.random.uniform(jax.random.fold_in(key, 1), (crops,))
  share = least + (most - least) * (rank + luck) / max(chosen, 1)
  goal = jnp.where(rank < chosen, jnp.floor(share * height * width), 0).astype(jnp.int32)
  rows, columns = jnp.arange(height), jnp.arange(width)

  def attempt(i, state):
    hidden, count, misses = state
    u = jax.random.uniform(jax.random.fold_in(key, i + 2), (4, crops))
    left_over = goal - count
    area = _LEAST_AREA + u[0] * (left_over - _LEAST_AREA)
    aspect = jnp.exp((1 - 2 * u[1]) * math.log(_LEAST_ASPECT))
    h = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    top = jnp.floor(u[2] * (height - h + 1)).astype(jnp.int32)
    left = jnp.floor(u[3] * (width - w + 1)).astype(jnp.int32)
    down = (rows >= top[:, None]) & (rows < (top + h)[:, None])
    across = (columns >= left[:, None]) & (columns < (left + w)[:, None])
    block = down[:, :, None] & across[:, None, :]
    new = (block & ~hidden).sum((1, 2))
    fits = (h < height) & (w < width) & (new > 0) & (new <= left_over) & (misses < _TRIES)
    hidden = hidden | (block & fits[:, None, None])
    return hidden, count + jnp.where(fits, new, 0), jnp.where(fits, 0, misses + 1)

  none = jnp.zeros(crops, jnp.int32)
  state = (jnp.zeros((crops, height, width), bool), none, none)
  return jax.lax.fori_loop(0, _ATTEMPTS, attempt, state)[0]


def _chosen(key, crops, probability):
  """(rank [crops], number of those chosen): crops of a lower rank are masked, exactly so many."""
  rank = jnp.argsort(jax.random.permutation(key, crops))
  return rank, round(probability * crops)

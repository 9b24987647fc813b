"""Masks of patches: random ones, and blocks.

Shapes are static: a crop has as many slots as any may have masked patches, and `masked_valid` says
which are filled.
"""

import math

import jax
import jax.numpy as jnp

from tips_jax.core import schema

_LEAST_AREA = 4  # patches of a block
_LEAST_ASPECT = 0.3  # height / width, to its inverse
_TRIES = 10  # misses in a row, then a mask stays as it is
# In all: the slowest of 20,000 masks of 16 x 16 patches, a tenth to half of them, took 30.
_ATTEMPTS = 64


def slots(mask: schema.Mask, patches: int) -> int:
  """The most patches of a crop that are masked."""
  if isinstance(mask, schema.BlockMask):
    return int(mask.ratio[1] * patches)
  return round(mask.ratio * patches)


def outputs(mask: schema.Mask, patches: int = 0) -> dict[str, int]:
  """{name of an array that `draw` gives: entries for a crop of so many patches}."""
  masked = slots(mask, patches)
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

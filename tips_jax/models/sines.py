"""Fixed positions of tokens: sines and cosines."""

import jax
import jax.numpy as jnp


def line(length: int, width: int) -> jax.Array:
  """[length, width] fixed positions, sines then cosines, timescales 1 to 1e4 (as the official text
  tower).
  """
  scales = width // 2
  rate = jnp.exp(-jnp.arange(scales) * (jnp.log(1e4) / max(scales - 1, 1)))
  angle = jnp.arange(length)[:, None] * rate[None]
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)


def grid(side: int, width: int) -> jax.Array:
  """[1, side, side, width] fixed positions of MAE (util/pos_embed.py:20): half of the channels say
  the column, half the row, each sines then cosines, timescales 1 to 1e4. width: a multiple of 4.
  """
  rate = 1e4 ** -(jnp.arange(width // 4) / (width // 4))
  angle = jnp.arange(side)[:, None] * rate
  line = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
  columns = jnp.broadcast_to(line[None], (side, side, width // 2))
  rows = jnp.broadcast_to(line[:, None], (side, side, width // 2))
  return jnp.concatenate([columns, rows], axis=2)[None]

"""Adapters: small branches of a ViT's blocks, which are trained where the blocks are frozen."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tips_jax.core import schema
from tips_jax.models import layers


class Convpass(nn.Module):
  """What an adapter adds to tokens [B, T, D] (arXiv 2207.07039, figure 2): few channels, a 3 x 3
  convolution over the grid of the patches, all channels again. At the start it adds zeros, and the
  convolution is the identity.

  grid: (tokens before the patches, rows, columns); a token that is no patch is a grid of its own.
  rows: the global numbers of the images, for dropout.
  """

  config: schema.Adapters
  width: int
  dtype: jnp.dtype

  def setup(self) -> None:
    narrow = self.config.width
    zeros = nn.initializers.zeros
    self.down = layers.Dense((self.width, narrow), self.dtype)
    self.conv = layers.Dense((9 * narrow, narrow), self.dtype, _center)
    self.up = layers.Dense((narrow, self.width), self.dtype, zeros)
    self.drop = layers.Dropout(self.config.dropout)

  def __call__(self, x_BTD, grid, rows_B=None):
    y = quick_gelu(layers.keep(self.down(x_BTD)))
    y = quick_gelu(layers.keep(self.conv(neighbors(y, grid))))
    return self.up(self.drop(y, rows_B)) * self.config.scale


def quick_gelu(x: jax.Array) -> jax.Array:
  """x sigmoid(1.702 x), of the first CLIP (its model.py, QuickGELU)."""
  return x * nn.sigmoid(1.702 * x)


def neighbors(x_BTC: jax.Array, grid: layers.Grid) -> jax.Array:
  """The 3 x 3 patches around each, row by row, zeros outside of the grid: [B, T, 9 C]. A 3 x 3
  convolution is a product with them.
  """
  before, h, w = grid
  images, _, channels = x_BTC.shape
  end = before + h * w
  square = x_BTC[:, before:end].reshape(images, h, w, channels)
  square = jnp.pad(square, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifted = [square[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
  patches = jnp.concatenate(shifted, axis=-1).reshape(images, h * w, 9 * channels)
  alone = jnp.pad(x_BTC, ((0, 0), (0, 0), (4 * channels, 4 * channels)))
  return jnp.concatenate([alone[:, :before], patches, alone[:, end:]], axis=1)


def flops(config: schema.Adapters, width: int, depth: int, tokens: int) -> float:
  """Of the two adapters of each block, forward, on one image."""
  if not config.width:
    return 0.0
  weights = 2 * config.width * width + 9 * config.width**2
  return 2 * depth * 2 * weights * tokens


def _center(key, shape):
  """The kernel that gives each patch itself."""
  narrow = shape[1]
  return jnp.zeros(shape).at[4 * narrow : 5 * narrow].set(jnp.eye(narrow))

"""The image tower: a ViT with named CLS tokens, and the pixel decoder of MAE."""
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from tips_jax.core import config as schema
from tips_jax.models import layers


def patches(images_BHWC, patch):
  """[B, h, w, patch, patch, 3] of images that are centre-padded with zeros to multiples of `patch`."""
  pads = [-s % patch for s in images_BHWC.shape[1:3]]
  x = jnp.pad(images_BHWC, [(0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)])
  b, h, w, c = x.shape
  return x.reshape(b, h // patch, patch, w // patch, patch, c).swapaxes(2, 3)


def positions(table_1GGD, h, w):
  """[1, h, w, D]: the table, resized (bilinear, antialiased) where the grid differs from it."""
  _, gh, gw, d = table_1GGD.shape
  return table_1GGD if (gh, gw) == (h, w) else jax.image.resize(table_1GGD, (1, h, w, d), 'bilinear')


class ViT(nn.Module):
  """ViT of TIPS (arXiv 2410.16512, section 3).

  Input: images [B, V, H, W, 3], uint8 or floats in [0, 1], not normalised further. mask [B, V, P] bool:
  patches replaced by the mask token, before positions are added. kept [B, V, M] int: only these patches are computed.
  Output: for every CLS name [B, V, D], and `patch` [B, V, P or M, D].
  """
  config: schema.ViT
  compute: schema.Compute

  @nn.compact
  def __call__(self, images, mask=None, kept=None):
    c, dtype = self.config, jnp.dtype(self.compute.dtype)
    lead = images.shape[:2]
    x = PatchEmbedding(c, dtype, name='embedding')(layers.merge_views(images))
    n, h, w, d = x.shape
    if c.mask_token:
      token = layers.weight(self, 'mask_token', nn.initializers.zeros, (1, d), dtype)
      if mask is not None:
        x = jnp.where(layers.merge_views(mask).reshape(n, h, w, 1), token, x)
    init = nn.initializers.normal(1 / math.sqrt(d))
    table = layers.weight(self, 'posembed', init, (1, c.grid, c.grid, d), jnp.float32)
    x = (x + positions(table, h, w).astype(dtype)).reshape(n, h * w, d)
    if kept is not None:
      x = layers.gather_tokens(x, layers.merge_views(kept))
    cls = layers.weight(self, 'cls', nn.initializers.zeros, (1, len(c.cls), d), dtype)
    x = jnp.concatenate([jnp.tile(cls, (n, 1, 1)), x], axis=1)
    x = layers.Blocks(c.depth, c.heads, c.mlp, c.ffn, 0.0, self.compute, name='encoder')(x)
    x = layers.Norm(name='norm')(x)
    x = x.reshape(*lead, *x.shape[1:])
    return {name: x[:, :, i] for i, name in enumerate(c.cls)} | {'patch': x[:, :, len(c.cls):]}


class PatchEmbedding(nn.Module):
  config: schema.ViT
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, images_BHWC):
    p, d = self.config.patch, self.config.width
    init = nn.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
    kernel = layers.weight(self, 'kernel', init, (p, p, 3, d), self.dtype)
    bias = layers.weight(self, 'bias', nn.initializers.zeros, (d,), self.dtype)
    x = jnp.einsum('bhwpqc,pqcd->bhwd', patches(images_BHWC, p).astype(self.dtype), kernel)
    if images_BHWC.dtype == jnp.uint8:    # 0..255 is exact in bfloat16; the scale comes after the sum
      x = x / 255
    return x + bias


class PixelDecoder(nn.Module):
  """MAE decoder (arXiv 2111.06377, section 3).

  Input: patch [B, V, M, D] of the kept patches, kept [B, V, M], mask [B, V, P].
  Output: pixels [B, V, P, patch * patch * 3].
  """
  config: schema.PixelDecoder
  compute: schema.Compute

  @nn.compact
  def __call__(self, patch, kept, mask):
    c, dtype = self.config, jnp.dtype(self.compute.dtype)
    lead, width = patch.shape[:2], c.decoder_width
    index, hidden = layers.merge_views(kept), layers.merge_views(mask)
    x = layers.Dense(width, name='embed')(layers.merge_views(patch).astype(dtype))
    token = layers.weight(self, 'mask_token', nn.initializers.normal(0.02), (1, 1, width), dtype)
    rank = jnp.cumsum(~hidden, axis=1) - 1        # place of a visible patch among the kept ones, which are sorted
    x = jnp.where(hidden[..., None], token, layers.gather_tokens(x, jnp.clip(rank, 0, index.shape[1] - 1)))
    side = math.isqrt(hidden.shape[1])
    init = nn.initializers.normal(1 / math.sqrt(width))
    table = layers.weight(self, 'posembed', init, (1, c.grid, c.grid, width), jnp.float32)
    x = x + positions(table, side, side).reshape(1, -1, width).astype(dtype)
    x = layers.Blocks(c.depth, c.heads, c.mlp, 'gelu', 0.0, self.compute, name='decoder')(x)
    x = layers.Dense(c.patch**2 * 3, name='pixels')(layers.Norm(name='norm')(x))
    return {'pixels': x.reshape(*lead, *x.shape[1:])}

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
  """ViT of TIPS (arXiv 2410.16512, section 3), of one or several batches of images.

  Each input: images [B, V, H, W, 3], uint8 or floats in [0, 1], not normalised further; mask [B, V, P] bool: patches
  replaced by the mask token, before positions are added; kept [B, V, M] int: only these patches are computed.
  Each output: for every CLS name [B, V, D], and `patch` [B, V, P or M, D].
  """
  config: schema.ViT
  compute: schema.Compute

  @nn.compact
  def __call__(self, *inputs):
    c, dtype, d = self.config, jnp.dtype(self.compute.dtype), self.config.width
    embedding = PatchEmbedding(c, dtype, name='embedding')
    token = layers.weight(self, 'mask_token', nn.initializers.zeros, (1, d), dtype) if c.mask_token else None
    init = nn.initializers.normal(1 / math.sqrt(d))
    table = layers.weight(self, 'posembed', init, (1, c.grid, c.grid, d), jnp.float32)
    cls = layers.weight(self, 'cls', nn.initializers.zeros, (1, len(c.cls), d), dtype)

    def tokens(images, mask=None, kept=None):
      x = embedding(layers.merge_views(images))
      n, h, w, _ = x.shape
      if mask is not None:
        x = jnp.where(layers.merge_views(mask).reshape(n, h, w, 1), token, x)
      x = (x + positions(table, h, w).astype(dtype)).reshape(n, h * w, d)
      if kept is not None:
        x = layers.gather_tokens(x, layers.merge_views(kept))
      return jnp.concatenate([jnp.tile(cls, (n, 1, 1)), x], axis=1)

    xs = layers.Blocks(d, c.depth, c.heads, c.mlp, c.ffn, 0.0, self.compute, name='encoder')(
        [tokens(**one) for one in inputs])
    norm, outputs = layers.Norm(d, name='norm'), []
    for one, x in zip(inputs, xs):
      x = norm(x).reshape(*one['images'].shape[:2], *x.shape[1:])
      outputs.append({name: x[:, :, i] for i, name in enumerate(c.cls)} | {'patch': x[:, :, len(c.cls):]})
    return outputs


class PatchEmbedding(nn.Module):
  config: schema.ViT
  dtype: jnp.dtype

  def setup(self):
    p, d = self.config.patch, self.config.width
    init = nn.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
    self.kernel = layers.weight(self, 'kernel', init, (p, p, 3, d), self.dtype)
    self.bias = layers.weight(self, 'bias', nn.initializers.zeros, (d,), self.dtype)

  def __call__(self, images_BHWC):
    x = patches(images_BHWC, self.config.patch).astype(self.dtype)
    x = jnp.einsum('bhwpqc,pqcd->bhwd', x, self.kernel)
    if images_BHWC.dtype == jnp.uint8:    # 0..255 is exact in bfloat16; the scale comes after the sum
      x = x / 255
    return x + self.bias


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
    x = layers.Dense((c.width, width), dtype, name='embed')(layers.merge_views(patch).astype(dtype))
    token = layers.weight(self, 'mask_token', nn.initializers.normal(0.02), (1, 1, width), dtype)
    rank = jnp.cumsum(~hidden, axis=1) - 1        # place of a visible patch among the kept ones, which are sorted
    x = jnp.where(hidden[..., None], token, layers.gather_tokens(x, jnp.clip(rank, 0, index.shape[1] - 1)))
    side = math.isqrt(hidden.shape[1])
    init = nn.initializers.normal(1 / math.sqrt(width))
    table = layers.weight(self, 'posembed', init, (1, c.grid, c.grid, width), jnp.float32)
    x = x + positions(table, side, side).reshape(1, -1, width).astype(dtype)
    [x] = layers.Blocks(width, c.depth, c.heads, c.mlp, 'gelu', 0.0, self.compute, name='decoder')([x])
    x = layers.Dense((width, c.patch**2 * 3), dtype, name='pixels')(layers.Norm(width, name='norm')(x))
    return {'pixels': x.reshape(*lead, *x.shape[1:])}

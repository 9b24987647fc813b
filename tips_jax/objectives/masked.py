"""Masked image modeling in pixel space (MAE)."""

from typing import Annotated

import jax
import jax.numpy as jnp

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.core.strict import Range
from tips_jax.core.types import Loss


def pixels(
  prediction: jax.Array,
  images: jax.Array,
  mask: jax.Array,
  *,
  patch: schema.Patch,
  normalize: Annotated[int, Range(0, 1)] = 1,
) -> Loss:
  """MAE loss (arXiv 2111.06377, section 3): mean squared error on masked patches, each normalized
  to unit variance.

  prediction: [B, V, P, patch * patch * 3]; images: [B, V, H, W, 3] uint8 or in [0, 1]; mask: [B, V,
  P].
  normalize: 0 compares plain pixels in [0, 1].
  """
  b, v, h, w, c = images.shape
  if h % patch or w % patch:
    raise InputError(
      f'pixels: got images of {h} x {w} pixels; expected multiples of the patch of {patch}'
    )
  x = images.astype(jnp.float32)
  if images.dtype == jnp.uint8:
    x = x / 255
  x = x.reshape(b, v, h // patch, patch, w // patch, patch, c).swapaxes(3, 4)
  x = x.reshape(b, v, -1, patch * patch * c)
  if normalize:
    # Unbiased, as torch's: var(dim=-1) in models_mae.py:207.
    variance = x.var(-1, keepdims=True, ddof=1)
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(variance + 1e-6)
  error = jnp.square(prediction.astype(jnp.float32) - x).mean(-1)
  weight = mask.astype(jnp.float32)
  return Loss((error * weight).sum() / jnp.maximum(weight.sum(), 1.0), {})

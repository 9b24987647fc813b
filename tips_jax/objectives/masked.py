"""Masked image modeling in pixel space, and the random masks of all masked objectives."""

import jax
import jax.numpy as jnp

from tips_jax.core.errors import InputError
from tips_jax.core.types import Loss


def random_mask(key: jax.Array, shape: tuple[int, ...], ratio: float) -> dict[str, jax.Array]:
  """Exactly round(ratio * P) of the P patches of each row, uniformly.

  shape: (..., P). Returns {'mask': bool [..., P], 'masked_indices': int32 [..., M] the masked ones
  in order, 'visible': int32 [..., P - M] the others in order}.
  """
  # A fixed number: shapes do not depend on what is drawn.
  count = round(ratio * shape[-1])
  order = jnp.argsort(jax.random.uniform(key, shape), axis=-1).astype(jnp.int32)
  masked_indices = jnp.sort(order[..., :count], axis=-1)
  visible = jnp.sort(order[..., count:], axis=-1)
  # The inverse of the order is each patch's rank in it.
  mask = jnp.argsort(order, axis=-1) < count
  return {'mask': mask, 'masked_indices': masked_indices, 'visible': visible}


def pixels(
  prediction: jax.Array, images: jax.Array, mask: jax.Array, *, patch: int, normalize: int = 1
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
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)
  error = jnp.square(prediction.astype(jnp.float32) - x).mean(-1)
  weight = mask.astype(jnp.float32)
  return Loss((error * weight).sum() / jnp.maximum(weight.sum(), 1.0), {})

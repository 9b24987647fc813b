"""KoLeo: features of different images keep their distance."""

import jax
import jax.numpy as jnp

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.core.types import Loss
from tips_jax.core.vectors import traced_unit

_EPS = 1e-8


def koleo(features: jax.Array, *, group: schema.Whole = 0) -> Loss:
  """-1/B sum_i log |x_i - nearest other x_j| over the images, summed over the views
  (Kozachenko-Leonenko entropy; arXiv 1806.03198, section 3, as DINOv2 has it,
  dinov2/loss/koleo_loss.py).

  features: [B, V, D], L2-normalized here; views of one image are never neighbors. group: images
  among which the neighbor is sought, B / group groups of consecutive ones (DINOv2: those of a
  device); 0, or more than B: all of the global batch. Metric: mean distance to the nearest
  neighbor.
  """
  images, views, width = features.shape
  size = group_size(group, images)
  x = traced_unit(features).reshape(-1, size, views, width).swapaxes(1, 2)
  fixed = jax.lax.stop_gradient(x)
  cosine = jnp.einsum('gvid,gvjd->gvij', fixed, fixed, precision='highest')
  cosine = jnp.where(jnp.eye(size, dtype=bool), -jnp.inf, cosine)
  nearest = jnp.argmax(cosine, axis=-1)
  neighbor = jnp.take_along_axis(x, nearest[..., None], axis=2)
  # The small number keeps the gradient finite where two features are equal.
  distance = jnp.sqrt(jnp.sum(jnp.square(x - neighbor + _EPS), axis=-1))
  value = -jnp.log(distance + _EPS).sum() / images
  return Loss(value, {'distance': distance.mean()})


def group_size(group: int, images: int) -> int:
  """Images of a group, see `koleo`. InputError for one that does not divide the batch, or has no
  neighbors in it.
  """
  size = min(group or images, images)
  if size < 2 or images % size:
    raise InputError(
      f'koleo.group: got {group} with a batch of {images}; expected a divisor of the batch, at '
      'least 2, or 0'
    )
  return size

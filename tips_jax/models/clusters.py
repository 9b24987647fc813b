"""Clusters of patches by the peaks of their density (DPC-kNN), in matrix products of static shapes.

Density peaks (Rodriguez and Laio, Science 344, 2014) with the density of Du et al. (2016), as
AiluRus and UMG-CLIP (arXiv 2401.06397) use them: a center is dense and far from all that is denser.
"""

import jax
import jax.numpy as jnp

from tips_jax.core import schema


def count(config: schema.Reduction, patches: int) -> int:
  """Tokens that are left of so many patches."""
  return max(round(config.keep * patches), 1)


def flops(config: schema.Reduction, patches: int, width: int) -> float:
  """Of the distances, of merging and of unfolding, of one image."""
  return 2 * width * (patches**2 + 2 * patches * count(config, patches))


def assign(x_BPD: jax.Array, places_BP2: jax.Array, config: schema.Reduction) -> jax.Array:
  """Which of K = count(config, P) clusters each patch is of: one-hot [B, P, K], without gradient.

  places: (row, column) of each patch. With d the mean square of the differences of two patches
  (plus `spatial` times the square of their distance in the image):
  rho_i = exp(-mean of d over the nearest `neighbors` other patches of i),
  delta_i = the least sqrt(d) to a patch of larger rho (of equal ones the first is the larger); of
  the largest rho the largest sqrt(d).
  The K largest rho * delta are centers; the others go to the nearest center. Both are compared by
  their logarithms: of features that lie far apart rho would be 0 for all.
  """
  x = jax.lax.stop_gradient(x_BPD).astype(jnp.float32)
  patches = x.shape[1]
  distance = _squares(x) / x.shape[2]
  if config.spatial:
    distance += config.spatial * _squares(places_BP2.astype(jnp.float32))
  numbers = jnp.arange(patches)
  itself = numbers[:, None] == numbers
  others = jnp.where(itself, jnp.inf, distance)
  near = min(config.neighbors, max(patches - 1, 1))
  nearest = -jax.lax.top_k(-others, near)[0]
  if patches == 1:  # no other one
    nearest = jnp.zeros_like(nearest)
  log_rho = -nearest.mean(-1)
  lower, higher = log_rho[:, :, None], log_rho[:, None, :]
  denser = (higher > lower) | (higher == lower) & (numbers < numbers[:, None])
  root = jnp.sqrt(distance)
  delta = jnp.where(denser, root, jnp.inf).min(-1)
  delta = jnp.where(jnp.isinf(delta), root.max(-1), delta)
  k = count(config, patches)
  centers = jax.lax.top_k(log_rho + jnp.log(delta), k)[1]
  is_center = numbers[:, None] == centers[:, None]  # [B, P, K]
  to_centers = jnp.take_along_axis(distance, centers[:, None], axis=2)
  # A center stays its own, also where another one is equal to it: no cluster is empty.
  to_centers = jnp.where(is_center, -1.0, to_centers)
  return jax.nn.one_hot(to_centers.argmin(-1), k, dtype=x_BPD.dtype)


def merge(x_BPD: jax.Array, clusters_BPK: jax.Array) -> jax.Array:
  """The mean of each cluster: [B, K, D]."""
  sizes = clusters_BPK.sum(1, dtype=jnp.float32)[..., None]
  sums = jnp.einsum('bpk,bpd->bkd', clusters_BPK, x_BPD, preferred_element_type=jnp.float32)
  return (sums / sizes).astype(x_BPD.dtype)


def unfold(y_BKD: jax.Array, clusters_BPK: jax.Array) -> jax.Array:
  """Each patch gets what its cluster has: [B, P, D]."""
  return jnp.einsum('bpk,bkd->bpd', clusters_BPK.astype(y_BKD.dtype), y_BKD)


def _squares(x_BPD):
  """Squared distances of all pairs, [B, P, P]."""
  # Less the mean: the products lose fewer digits.
  x = x_BPD - x_BPD.mean(1, keepdims=True)
  norms = (x * x).sum(-1)
  products = jnp.einsum('bpd,bqd->bpq', x, x, precision=jax.lax.Precision.HIGHEST)
  return jnp.maximum(norms[:, :, None] + norms[:, None] - 2 * products, 0)

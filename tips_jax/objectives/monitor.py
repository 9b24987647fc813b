"""What shows a collapse before the loss does. No gradient comes from here."""

import jax
import jax.numpy as jnp

from tips_jax.core.types import Loss


def spread(features: jax.Array) -> Loss:
  """Spread of features over the batch: [B, V, D], L2-normalized here. The value is zero.

  Metrics: `std`, of the components over the batch, times sqrt(D): 1 for uniform directions, 0 for a
  collapse; `rank`, the participation ratio (sum of eigenvalues)^2 / sum of squares of the
  covariance, from 1 to D.
  """
  x = jax.lax.stop_gradient(features.astype(jnp.float32)).reshape(-1, features.shape[-1])
  x = x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))
  x = x - x.mean(0)
  gram = (x.T @ x if x.shape[0] > x.shape[1] else x @ x.T) / x.shape[0]
  rank = jnp.trace(gram) ** 2 / jnp.maximum(jnp.sum(gram * gram), 1e-20)
  return Loss(jnp.float32(0), {'std': jnp.sqrt(x.var(0).mean() * x.shape[-1]), 'rank': rank})

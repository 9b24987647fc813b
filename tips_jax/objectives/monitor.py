"""What shows a collapse before the loss does. No gradient comes from here."""

import jax
import jax.numpy as jnp

from tips_jax.core.types import Loss
from tips_jax.core.vectors import traced_unit


def spread(features: jax.Array) -> Loss:
  """Spread of features over the batch: [B, V, D], L2-normalized here. The value is zero.

  Metrics: `std`, of the components over the batch, times sqrt(D): 1 for uniform directions, 0 for a
  collapse; `rank`, the participation ratio (sum of eigenvalues)^2 / sum of squares of the
  covariance, from 1 to D.
  """
  x = jax.lax.stop_gradient(features).reshape(-1, features.shape[-1])
  x = traced_unit(x)
  x = x - x.mean(0)
  # x^T x and x x^T have the same eigenvalues but for zeros: the smaller one.
  if x.shape[0] > x.shape[1]:
    gram = x.T @ x
  else:
    gram = x @ x.T
  gram = gram / x.shape[0]
  # The trace is the sum of the eigenvalues, the sum of squares that of theirs.
  rank = jnp.trace(gram) ** 2 / jnp.maximum(jnp.sum(gram * gram), 1e-20)
  return Loss(jnp.float32(0), {'std': jnp.sqrt(x.var(0).mean() * x.shape[-1]), 'rank': rank})

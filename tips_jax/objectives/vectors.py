"""Vectors of length one."""

import jax
import jax.numpy as jnp


def unit(x: jax.Array, *, axis: int = -1) -> jax.Array:
  """x / |x| in float32; the zero vector stays zero."""
  x = x.astype(jnp.float32)
  # Bounded inside of the root, whose gradient at zero would be infinite.
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), 1e-12))

"""Vectors of length one: NumPy's for encoders and evaluators, traced ones for heads and losses."""

import jax
import jax.numpy as jnp
import numpy as np


def unit(x: np.ndarray) -> np.ndarray:
  """float32 vectors of length 1 on the last axis; zeros stay zero."""
  x = np.asarray(x, np.float32)
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def traced_unit(x: jax.Array, *, axis: int = -1) -> jax.Array:
  """x / |x| in float32; the zero vector stays zero, with a finite gradient."""
  x = x.astype(jnp.float32)
  # Bounded inside of the root, whose gradient at zero would be infinite.
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), 1e-12))

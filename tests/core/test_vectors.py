"""Vectors of length one."""

import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.core import vectors


def test_vectors_get_length_one_and_zeros_stay_zero():
  x = np.array([[3, 4], [0, 0], [-0.5, 0]])
  result = vectors.unit(x)
  np.testing.assert_allclose(result, [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)
  assert result.dtype == np.float32


def test_traced_vectors_get_length_one_on_any_axis():
  x = jnp.array([[3, 4], [0, 0], [-0.5, 0]], jnp.bfloat16)
  result = vectors.traced_unit(x)
  np.testing.assert_allclose(result, [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)
  np.testing.assert_allclose(vectors.traced_unit(x.T, axis=0), result.T, rtol=1e-6)
  assert result.dtype == jnp.float32


def test_a_traced_zero_is_zero_with_a_finite_gradient():
  value, grad = jax.value_and_grad(lambda x: vectors.traced_unit(x).sum())(jnp.zeros(3))
  assert value == 0 and np.isfinite(grad).all()

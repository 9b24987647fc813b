"""Vectors of length one."""

import numpy as np

from tips_jax.core import vectors


def test_vectors_get_length_one_and_zeros_stay_zero():
  x = np.array([[3, 4], [0, 0], [-0.5, 0]])
  result = vectors.unit(x)
  np.testing.assert_allclose(result, [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)
  assert result.dtype == np.float32

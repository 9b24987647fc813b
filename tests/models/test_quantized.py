"""int8 products against NumPy, and a block that uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.core import schema
from tips_jax.models import layers, quantized


def reference(x, kernel):
  """Integers by NumPy, each row of x and each column of the kernel with its own scale."""
  rows = np.abs(x).max(1, keepdims=True) / 127
  columns = np.abs(kernel).max(0, keepdims=True) / 127
  rows[rows == 0] = 1
  columns[columns == 0] = 1
  return np.rint(x / rows).astype(int) @ np.rint(kernel / columns).astype(int) * rows * columns


@pytest.fixture
def factors():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 24)).astype(np.float32) * 10.0 ** rng.integers(-3, 3, (2, 5, 1))
  x[0, 1] = 0  # a row of zeros stays one
  kernel = rng.normal(size=(24, 12)).astype(np.float32) * 10.0 ** rng.integers(-3, 3, 12)
  return x.astype(np.float32), kernel.astype(np.float32), rng.normal(size=(2, 5, 12))


def test_the_product_is_that_of_scaled_integers(factors):
  x, kernel, _ = factors
  y = np.asarray(quantized.product(x, kernel)).reshape(10, 12)
  np.testing.assert_allclose(y, reference(x.reshape(10, 24), kernel), rtol=1e-5, atol=1e-30)
  assert not y[1].any()
  exact = x.reshape(10, 24) @ kernel
  assert 1e-4 < np.abs(y - exact).max() / np.abs(exact).max() < 0.02


def test_gradients_of_inputs_are_int8_and_those_of_the_kernel_are_not(factors):
  x, kernel, slope = factors
  dy = slope.astype(np.float32)
  _, pull = jax.vjp(quantized.product, x, kernel)
  dx, dkernel = pull(dy)
  wanted = reference(dy.reshape(10, 12), kernel.T)
  np.testing.assert_allclose(np.asarray(dx).reshape(10, 24), wanted, rtol=1e-5)
  exact = x.reshape(10, 24).T @ dy.reshape(10, 12)
  np.testing.assert_allclose(dkernel, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('ffn', ['gelu', 'swiglu'])
def test_every_product_of_a_block_is_int8(ffn):
  def block(matmul):
    compute = schema.Compute(matmul=matmul, attention='plain')
    return layers.Blocks(16, 2, 2, 32, ffn, 0.0, compute)

  x = jax.random.normal(jax.random.key(0), (2, 6, 16), jnp.bfloat16)
  params = block('dtype').init(jax.random.key(1), [x])
  text = str(jax.make_jaxpr(block('int8').apply)(params, [x]))
  assert text.count('preferred_element_type=int32') == {'gelu': 6, 'swiglu': 7}[ffn]
  [plain], [int8] = (block(matmul).apply(params, [x]) for matmul in ('dtype', 'int8'))
  assert int8.dtype == plain.dtype
  difference = np.abs(np.float32(plain) - np.float32(int8)).max()
  assert 0 < difference < 0.05 * np.abs(np.float32(plain)).max()

"""Matrix products of transformer blocks in int8 (`compute.matmul='int8'`)."""

import jax
import jax.numpy as jnp
from jax import lax

_LARGEST = 127.0


@jax.custom_vjp
def product(x: jax.Array, kernel_DK: jax.Array) -> jax.Array:
  """x [..., D] times kernel [D, K], in x's dtype: SwitchBack (arXiv 2304.13013, algorithm 1).

  Forward and the gradient of the inputs multiply int8 and sum int32, each row of the left and each
  column of the right factor with a scale of its own. The gradient of the kernel, which sums over
  all tokens of the batch, is the plain product.
  """
  return _int8(x, kernel_DK, 0)


def _int8(x, kernel, summed):
  """x times kernel over axis `summed` of the kernel."""
  x_int, x_scale = quantize(x, x.ndim - 1)
  kernel_int, kernel_scale = quantize(kernel, summed)
  axes = (((x.ndim - 1,), (summed,)), ((), ()))
  total = lax.dot_general(x_int, kernel_int, axes, preferred_element_type=jnp.int32)
  return (total.astype(jnp.float32) * x_scale * kernel_scale.ravel()).astype(x.dtype)


def quantize(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  """(int8, float32 scale): x is about their product. One scale for all numbers along `axis`, which
  the scale keeps with length 1: the largest magnitude becomes 127.
  """
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis, keepdims=True) / _LARGEST
  # Of zeros alone: any scale says them.
  scale = jnp.where(scale > 0, scale, 1.0)
  return jnp.round(x / scale).astype(jnp.int8), scale


def _forward(x, kernel):
  return product(x, kernel), (x, kernel)


def _backward(kept, dy):
  x, kernel = kept
  rows = tuple(range(x.ndim - 1))
  slope = lax.dot_general(x, dy, ((rows, rows), ((), ())))
  return _int8(dy, kernel, 1), slope.astype(kernel.dtype)


product.defvjp(_forward, _backward)

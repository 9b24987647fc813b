"""Linear probes close to the optimum of a loss, without a learning rate to choose.

Newton-like: the features are whitened by their (ridged) covariance, which turns Boehning's bound of
the Hessian of a cross-entropy (Annals of the Institute of Statistical Mathematics 44, 1992) into
the identity; L-BFGS then needs tens of steps, where it needs hundreds on raw features.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

# Rows that are held in float64 at once.
_BLOCK = 65_536


def standardize(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(features of mean 0 and variance 1, mean [D], scale [D]); constant features become 0."""
  x = np.asarray(features, np.float32)
  mean = x.mean(0, dtype=np.float64)
  square = 0
  # In blocks: a float64 copy of all rows may not fit in memory.
  for i in range(0, len(x), _BLOCK):
    square = square + np.square(x[i : i + _BLOCK] - mean).sum(0)
  scale = np.sqrt(square / len(x))
  scale = np.where(scale > 1e-6 * np.maximum(np.abs(mean), 1e-6), scale, np.inf)
  mean = mean.astype(np.float32)
  scale = scale.astype(np.float32)
  x = x - mean
  x /= scale  # in place: x may be most of the memory
  return x, mean, scale


def minimize(
  loss: Callable[[jax.Array, Any], jax.Array],
  x: np.ndarray,
  targets: Any,
  *,
  l2: float,
  start: np.ndarray,
  steps: int,
) -> np.ndarray:
  """Weights [D + 1, K] (last row: bias) that minimize loss(outputs [N, K], targets) + l2/2 |W|^2,
  without the bias, for features x [N, D] of mean about 0. Started from `start`.

  Runs over V with W = A V, where A A^T is the inverse of (second moments / 2 + l2).
  """
  x = jnp.asarray(x)
  targets = jax.tree.map(jnp.asarray, targets)
  moments = np.asarray(jnp.dot(x.T, x, precision='highest'), np.float64) / len(x)
  factor = np.linalg.cholesky(moments / 2 + (l2 + 1e-6) * np.eye(len(moments)))
  white = np.linalg.inv(factor).T.astype(np.float32)

  # SciPy's line search is in float64 on the host; loss and gradient are float32 on the device.
  def value_and_grad(flat):
    parameters = jnp.asarray(flat.reshape(start.shape), jnp.float32)
    value, grad = _objective(parameters, x, targets, white, l2, loss=loss)
    return float(value), np.asarray(grad, np.float64).ravel()

  first = np.concatenate([factor.T @ start[:-1], start[-1:]])
  optimum = scipy.optimize.minimize(
    value_and_grad,
    first.ravel(),
    jac=True,
    method='L-BFGS-B',
    # Of float32 rounding: a larger ftol ends where two steps in a row are short by chance.
    options={'maxiter': steps, 'maxcor': 20, 'ftol': 1e-8, 'gtol': 1e-5},
  )
  solution = optimum.x.reshape(start.shape)
  return np.concatenate([white @ solution[:-1], solution[-1:]]).astype(np.float32)


@functools.partial(jax.jit, static_argnames='loss')
@jax.value_and_grad
def _objective(parameters, x, targets, white, l2, *, loss):
  weights = jnp.dot(white, parameters[:-1], precision='highest')
  outputs = jnp.dot(x, weights, precision='highest') + parameters[-1:]
  return loss(outputs, targets) + l2 / 2 * jnp.sum(jnp.square(weights))

"""A linear probe on frozen features: multinomial logistic regression, close to its optimum.

Newton-like: the features are whitened by their (ridged) covariance, which turns Boehning's bound of
the Hessian (Annals of the Institute of Statistical Mathematics 44, 1992) into the identity; L-BFGS
then needs tens of steps, where it needs hundreds on raw features.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from tips_jax.evals.probes import masks

# Of the L2 penalty on standardized features, from strong to weak.
STRENGTHS = (1e-1, 1e-3, 1e-5)
# One group in this many chooses the strength.
HELD_OUT = 5
# Rows that are held in float64 at once.
_BLOCK = 65_536
# Rows that take part in the choice, and the share of the steps that each candidate gets.
_CHOOSING = 12_000
_CHOOSING_STEPS = 0.6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe:
  """Linear logits of raw features."""

  kernel: np.ndarray  # [D, K]
  bias: np.ndarray  # [K]
  l2: float  # the strength that was chosen

  def logits(self, features: np.ndarray) -> np.ndarray:
    """Features [..., D] -> logits [..., K], float32."""
    return np.asarray(features, np.float32) @ self.kernel + self.bias


def fit(
  features: np.ndarray,
  labels: np.ndarray,
  *,
  classes: int,
  groups: np.ndarray | None = None,
  strengths: tuple[float, ...] = STRENGTHS,
  steps: int = 50,
) -> LinearProbe:
  """Fits features [N, D] to labels [N] in 0..classes-1.

  Minimizes mean cross-entropy + l2/2 |W|^2 with W on standardized features. Of several `strengths`
  the one with the best mean intersection over union on held-out rows is taken, and all rows are
  fitted with it. Rows of one group (`groups` [N], for instance the image of a patch) are held out
  together.
  """
  x, mean, scale = standardize(features)
  y = np.asarray(labels, np.int32)
  if groups is None:
    groups = np.arange(len(y))
  seen, held_out = _hold_out(np.asarray(groups))
  l2 = strengths[0]
  start = np.zeros((x.shape[1] + 1, classes), np.float32)
  if len(strengths) > 1 and seen.any() and held_out.any():
    best = -1.0
    weights = start
    # From strong to weak: each starts where the stronger one ended.
    for strength in strengths:
      weights = _solve(x[seen], y[seen], strength, weights, int(_CHOOSING_STEPS * steps))
      predicted = np.argmax(x[held_out] @ weights[:-1] + weights[-1], -1)
      score = masks.mean_iou(masks.confusion(y[held_out], predicted, size=classes))
      if score > best:
        best, l2, start = score, strength, weights
  weights = _solve(x, y, l2, start, steps)
  # The standardization folds into kernel and bias.
  kernel = weights[:-1] / scale[:, None]
  return LinearProbe(kernel=kernel, bias=weights[-1] - mean @ kernel, l2=l2)


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


def _hold_out(groups):
  """Masks of the rows that learn and that judge: whole groups, about _CHOOSING rows together."""
  if not len(groups):
    return np.zeros(0, bool), np.zeros(0, bool)
  _, order = np.unique(groups, return_inverse=True)
  count = order.max() + 1
  order = np.random.default_rng(0).permutation(count)[order]
  drawn = order < min(1.0, _CHOOSING / len(order)) * count
  held_out = order % HELD_OUT == HELD_OUT - 1
  return drawn & ~held_out, drawn & held_out


def _solve(x, labels, l2, start, steps):
  """The optimum [D + 1, K] (last row: bias) for features of mean about 0, started from `start`.

  Runs over V with W = A V, where A A^T is the inverse of (second moments / 2 + l2).
  """
  x = jnp.asarray(x)
  labels = jnp.asarray(labels)
  moments = np.asarray(jnp.dot(x.T, x, precision='highest'), np.float64) / len(x)
  factor = np.linalg.cholesky(moments / 2 + (l2 + 1e-6) * np.eye(len(moments)))
  white = np.linalg.inv(factor).T.astype(np.float32)

  # SciPy's line search is in float64 on the host; loss and gradient are float32 on the device.
  def value_and_grad(flat):
    value, grad = _loss(jnp.asarray(flat.reshape(start.shape), jnp.float32), x, labels, white, l2)
    return float(value), np.asarray(grad, np.float64).ravel()

  first = np.concatenate([factor.T @ start[:-1], start[-1:]])
  optimum = scipy.optimize.minimize(
    value_and_grad,
    first.ravel(),
    jac=True,
    method='L-BFGS-B',
    options={'maxiter': steps, 'maxcor': 20, 'ftol': 1e-6, 'gtol': 1e-5},
  )
  solution = optimum.x.reshape(start.shape)
  return np.concatenate([white @ solution[:-1], solution[-1:]]).astype(np.float32)


@jax.jit
@jax.value_and_grad
def _loss(parameters, x, labels, white, l2):
  weights = jnp.dot(white, parameters[:-1], precision='highest')
  logits = jnp.dot(x, weights, precision='highest') + parameters[-1:]
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
  return cross_entropy + l2 / 2 * jnp.sum(jnp.square(weights))

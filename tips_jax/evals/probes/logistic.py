"""A linear probe on frozen features: multinomial logistic regression, brought close to its optimum.

Newton-like: the features are whitened by their own (ridged) covariance, which turns Boehning's
bound of the Hessian (Annals of the Institute of Statistical Mathematics 44, 1992) into the
identity; L-BFGS then needs tens of steps, where it needs hundreds on raw features.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from tips_jax.evals.probes import masks

STRENGTHS = (1e-1, 1e-3, 1e-5)  # of the L2 penalty on standardized features, from strong to weak
HELD_OUT = 5  # one group in this many chooses the strength
_BLOCK = 65_536  # rows that are held in float64 at once
_CHOOSING = 12_000  # rows that take part in the choice
_CHOOSING_STEPS = 0.6  # of the steps, for each strength on trial


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe:
  """Linear logits. `kernel` [D, K] and `bias` [K] act on raw features; `l2` is the strength that
  was chosen.
  """

  kernel: np.ndarray
  bias: np.ndarray
  l2: float

  def logits(self, features):
    """Features [..., D] -> logits [..., K], float32."""
    return np.asarray(features, np.float32) @ self.kernel + self.bias


def fit(features, labels, *, classes, groups=None, strengths=STRENGTHS, steps=50) -> LinearProbe:
  """Fits features [N, D] to labels [N] in 0..classes-1.

  Minimizes mean cross-entropy + l2/2 |W|^2 with W on standardized features. Where several
  `strengths` are given, rows whose group (`groups` [N], for instance the image of a patch) is held
  out choose the one of the best mean intersection over union; then all rows are fitted.
  """
  x, mean, scale = standardize(features)
  y = np.asarray(labels, np.int32)
  groups = np.arange(len(y)) if groups is None else np.asarray(groups)
  l2, start = strengths[0], np.zeros((x.shape[1] + 1, classes), np.float32)
  seen, held = _hold_out(groups)
  if len(strengths) > 1 and seen.any() and held.any():
    best, weights = -1.0, start
    for strength in strengths:  # each starts where the stronger one ended
      weights = _solve(x[seen], y[seen], strength, weights, int(_CHOOSING_STEPS * steps))
      score = masks.mean_iou(
        masks.confusion(y[held], np.argmax(x[held] @ weights[:-1] + weights[-1], -1), size=classes)
      )
      if score > best:
        best, l2, start = score, strength, weights
  weights = _solve(x, y, l2, start, steps)
  kernel = weights[:-1] / scale[:, None]
  return LinearProbe(kernel=kernel, bias=weights[-1] - mean @ kernel, l2=l2)


def standardize(features):
  """(features with mean 0 and variance 1, mean [D], scale [D]); constant features become 0."""
  x = np.asarray(features, np.float32)
  mean = x.mean(0, dtype=np.float64)
  square = sum(
    np.square(x[i : i + _BLOCK] - mean).sum(0) for i in range(0, len(x), _BLOCK)
  )  # no float64 copy of all
  scale = np.sqrt(square / len(x))
  scale = np.where(scale > 1e-6 * np.maximum(np.abs(mean), 1e-6), scale, np.inf)
  mean, scale = mean.astype(np.float32), scale.astype(np.float32)
  x = x - mean
  x /= scale  # in place: x may be most of the memory
  return x, mean, scale


def _hold_out(groups):
  """Masks of the rows that learn and of those that judge: whole groups, about _CHOOSING rows
  together.
  """
  _, order = np.unique(groups, return_inverse=True)
  order = np.random.default_rng(0).permutation(order.max() + 1)[order] if len(order) else order
  share = min(1.0, _CHOOSING / max(len(order), 1))
  drawn = order < share * (order.max(initial=0) + 1)
  held = order % HELD_OUT == HELD_OUT - 1
  return drawn & ~held, drawn & held


def _solve(x, labels, l2, start, steps):
  """The optimum [D + 1, K] (the last row is the bias) for features with mean about 0, started from
  `start`.

  Runs over V with W = A V, where A A^T is the inverse of (second moments / 2 + l2).
  """
  x = jnp.asarray(x)
  labels = jnp.asarray(labels)
  moments = np.asarray(jnp.dot(x.T, x, precision='highest'), np.float64) / len(x)
  factor = np.linalg.cholesky(moments / 2 + (l2 + 1e-6) * np.eye(len(moments)))
  white = np.linalg.inv(factor).T.astype(np.float32)

  def value_and_grad(flat):
    value, grad = _loss(jnp.asarray(flat.reshape(start.shape), jnp.float32), x, labels, white, l2)
    return float(value), np.asarray(grad, np.float64).ravel()

  first = np.concatenate([factor.T @ start[:-1], start[-1:]])
  found = scipy.optimize.minimize(
    value_and_grad,
    first.ravel(),
    jac=True,
    method='L-BFGS-B',
    options={'maxiter': steps, 'maxcor': 20, 'ftol': 1e-6, 'gtol': 1e-5},
  )
  solution = found.x.reshape(start.shape)
  return np.concatenate([white @ solution[:-1], solution[-1:]]).astype(np.float32)


@jax.jit
@jax.value_and_grad
def _loss(parameters, x, labels, white, l2):
  weights = jnp.dot(white, parameters[:-1], precision='highest')
  logits = jnp.dot(x, weights, precision='highest') + parameters[-1:]
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
  return cross_entropy + l2 / 2 * jnp.sum(jnp.square(weights))

"""A linear probe on frozen features: multinomial logistic regression, close to its optimum."""

import dataclasses

import numpy as np
import optax

from tips_jax.evals.probes import masks, optimum

# Of the L2 penalty on standardized features, from strong to weak.
STRENGTHS = (1e-1, 1e-3, 1e-5)
# One group in this many chooses the strength.
HELD_OUT = 5
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
  x, mean, scale = optimum.standardize(features)
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
  """The optimum [D + 1, K], last row: bias."""
  return optimum.minimize(_cross_entropy, x, labels, l2=l2, start=start, steps=steps)


def _cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

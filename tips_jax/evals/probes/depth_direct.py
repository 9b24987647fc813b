"""The linear depth head of depth_probe at the optimum of its loss, for the short recipe.

Some thousand steps of AdamW do not reach it: with few features the answer was worse than a
constant, and a good model was ranked below random weights (docs/lab.md). So a few images are taken
whole, with one value of depth for a patch, and L-BFGS goes to the minimum; the strength of an L2
penalty is chosen in place of a learning rate.
"""

import dataclasses
import functools

import numpy as np

from tips_jax.evals.probes import depth, depth_probe, optimum
from tips_jax.evals.probes.minibatches import Truth, fitted

# A bin that no depth falls into starts with this much weight: at zero it would get no gradient.
_LEAST = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectRecipe:
  """How the head is fitted. Bins and losses: as in depth_probe.DepthRecipe."""

  # Of the L2 penalty on standardized features, from strong to weak.
  strengths: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3)
  steps: int = 60
  # Whole images, evenly spaced, of about so many patches together.
  patches: int = 30_000
  bins: int = 64
  min_depth: float = depth.MIN_DEPTH
  max_depth: float = depth.MAX_DEPTH
  eps: float = depth.EPS
  sig_weight: float = 1.0
  gradient_weight: float = 0.5

  def __post_init__(self):
    object.__setattr__(self, 'strengths', tuple(self.strengths))


def fit(
  patch: np.ndarray, cls: np.ndarray, truth: Truth, *, recipe: DirectRecipe = DirectRecipe()
) -> depth_probe.DepthProbe:
  """Fits patch [N, h, w, D] and cls [N, C] to truth(i), depth [H, W] of image i (nearest pixel).

  The last fifth of the images chooses the strength by pooled RMSE; then all are fitted. InputError
  where no image has depth.
  """
  n, h, w, width = patch.shape
  rows = np.unique(np.linspace(0, n - 1, min(n, max(2, recipe.patches // (h * w)))).astype(int))
  meters = np.stack([fitted(truth(int(i)), (h, w)) for i in rows]).astype(np.float32)
  known = depth.known(meters, max_depth=recipe.max_depth)
  seen = len(rows) - len(rows) // depth_probe.HELD_OUT
  if not known[:seen].any():
    raise depth.nothing_known(recipe.max_depth, seen)
  patches = np.asarray(patch[rows], np.float32)
  shared = np.broadcast_to(cls[rows][:, None, None], (len(rows), h, w, cls.shape[-1]))
  features = np.concatenate([patches, shared], -1).reshape(-1, width + cls.shape[-1])
  x, mean, scale = optimum.standardize(features)
  solve = functools.partial(
    optimum.minimize, _loss(recipe), start=_start(meters[known], x.shape[1], recipe)
  )

  def probe(weights, **found):
    # The standardization folds into kernel and bias.
    kernel = weights[:-1] / scale[:, None]
    return depth_probe.DepthProbe(
      patch=kernel[:width],
      cls=kernel[width:],
      bias=weights[-1] - mean @ kernel,
      min_depth=recipe.min_depth,
      max_depth=recipe.max_depth,
      eps=recipe.eps,
      upsample=1,
      **found,
    )

  scores = {}
  for l2 in recipe.strengths:
    weights = solve(x[: seen * h * w], meters[:seen], l2=l2, steps=recipe.steps)
    part = probe(weights, chosen={'l2': l2}, validation={})
    scorer = depth.DepthScorer(max_depth=recipe.max_depth)
    for row, predicted in zip(rows[seen:], part.predict(patches[seen:], cls[rows[seen:]])):
      scorer.add(predicted, truth(int(row)))
    scores[l2] = scorer.result()['rmse_pooled']
  # Without a held-out image none has a score, and the strongest is taken.
  best = min(scores, key=lambda l2: np.nan_to_num(scores[l2], nan=np.inf))
  weights = solve(x, meters, l2=best, steps=recipe.steps)
  return probe(weights, chosen={'l2': best}, validation=scores)


def _start(meters, width, recipe):
  """Weights that answer about the mean depth for any features."""
  bounds = (recipe.min_depth, recipe.max_depth)
  share = np.histogram(meters, bins=recipe.bins, range=bounds)[0] / len(meters)
  start = np.zeros((width + 1, recipe.bins), np.float32)
  start[-1] = share * recipe.bins + _LEAST
  return start


@functools.lru_cache
def _loss(recipe):
  """loss(logits [N h w, K], meters [N, h, w])."""

  def loss(logits, meters):
    predicted = depth.expectation(
      logits.reshape(*meters.shape, -1),
      min_depth=recipe.min_depth,
      max_depth=recipe.max_depth,
      eps=recipe.eps,
    )
    valid = depth.known(meters, max_depth=recipe.max_depth)
    value = recipe.sig_weight * depth.sigloss(predicted, meters, valid)
    return value + recipe.gradient_weight * depth.gradient_loss(predicted, meters, valid)

  return loss

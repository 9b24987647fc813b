"""Linear depth on frozen features: 256 bins, scale-invariant log loss, RMSE in meters.

The protocol of DINOv2 on NYUv2 (Oquab et al. 2023, appendix; its eval/depth code), which TIPS uses:
each patch, concatenated with the global CLS token and upsampled 4x, goes through a linear layer to
256 uniform bins; ReLU, plus eps, divided by the sum, is a distribution, and its expectation is the
depth. A linear layer commutes with bilinear interpolation, so here the layer comes first and its
logits are upsampled: the same numbers for 1/16 of the products. What differs: features are cached,
hence no augmentation in training and no flipped second view in the test; several learning rates are
trained side by side and held-out training images choose one.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tips_jax.core.errors import InputError
from tips_jax.evals.probes import depth
from tips_jax.evals.probes.minibatches import Truth, minibatches

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
# One training image in this many, the last ones, chooses the learning rate.
HELD_OUT = 5
# Images from which mean and scale of the features are estimated.
_STATISTICS = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthRecipe:
  """How the linear depth probe is trained; the defaults are DINOv2's."""

  # Trained side by side; held-out images choose one.
  learning_rates: tuple[float, ...] = RATES
  steps: int = 38_400
  batch: int = 16
  # Share of the steps in which the learning rate rises linearly, on top of mmcv's cosine.
  warmup: float = 1 / 3
  # AdamW's.
  weight_decay: float = 0.01
  # Largest global norm of a gradient.
  clip: float = 35.0
  # Bilinear upsampling of the logits before they become depth.
  upsample: int = 4
  bins: int = depth.BINS
  # Meters of the first and the last bin. Truth beyond max_depth counts as missing.
  min_depth: float = depth.MIN_DEPTH
  max_depth: float = depth.MAX_DEPTH
  # Added to the weight of every bin.
  eps: float = depth.EPS
  # Weights of `sigloss` and `gradient_loss`.
  sig_weight: float = 1.0
  gradient_weight: float = 0.5
  # First steps, at most a tenth, with sigloss(only_mean).
  mean_steps: int = 100
  # The optimizer sees features of mean 0 and variance 1; the kernels are those of raw features.
  standardize: bool = True
  # Train on all images, the held-out ones too, at the learning rate that was chosen.
  refit: bool = True
  seed: int = 0

  def __post_init__(self):
    # A list, as configs and JSON have it, could not be a static argument of a compiled step.
    object.__setattr__(self, 'learning_rates', tuple(self.learning_rates))

  @property
  def optimizer(self) -> optax.GradientTransformation:
    return optax.chain(
      optax.clip_by_global_norm(self.clip),
      optax.scale_by_adam(),
      optax.add_decayed_weights(self.weight_decay),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthProbe:
  """A linear layer from patches and the CLS token to bins of depth."""

  # Kernels [D, K] and [C, K] on raw features, and bias [K].
  patch: np.ndarray
  cls: np.ndarray
  bias: np.ndarray
  # As in the recipe.
  min_depth: float
  max_depth: float
  eps: float
  upsample: int
  # The number that held-out images chose, by its name, and their pooled RMSE for each candidate;
  # empty where there was nothing to choose.
  chosen: dict[str, float]
  validation: dict[float, float]

  def predict(self, patch_BhwD: depth.Array, cls_BD: depth.Array | None = None) -> np.ndarray:
    """Depth [B, upsample h, upsample w] in meters; `DepthScorer.add` resizes it to the truth."""
    meters = _depth(
      {'patch': self.patch, 'cls': self.cls, 'bias': self.bias},
      np.asarray(patch_BhwD, np.float32),
      _or_empty(cls_BD, patch_BhwD),
      min_depth=self.min_depth,
      max_depth=self.max_depth,
      eps=self.eps,
      upsample=self.upsample,
    )
    return np.asarray(meters)


def fit(
  patch: np.ndarray,
  cls: np.ndarray | None,
  truth: Truth,
  *,
  recipe: DepthRecipe = DepthRecipe(),
  validation: Sequence[int] | None = None,
  shape: Sequence[int] | None = None,
) -> DepthProbe:
  """Fits the linear depth probe to patch [N, h, w, D] and cls [N, C] (or None); memory maps do.

  truth(i): depth [H, W] of image i; in training all take the size `shape`, or that of the first
  (nearest pixel). `validation`: rows that choose the learning rate by pooled RMSE; default: the
  last fifth, since neighbors in a video are alike. With too few images for that, the middle rate is
  taken. InputError where no training image has depth.
  """
  count = len(patch)
  if not count:
    raise InputError('depth: got no training image; expected at least one')
  cls = _or_empty(cls, patch)
  everything = np.arange(count)
  if validation is None:
    held_out = everything[count - count // HELD_OUT :]
  else:
    held_out = np.asarray(validation, np.int64)
  learning_rates = recipe.learning_rates
  training = everything
  if len(learning_rates) > 1 and len(held_out) < count:
    training = np.setdiff1d(everything, held_out)
  if not any(
    depth.known(np.asarray(truth(int(i))), max_depth=recipe.max_depth).any() for i in training
  ):
    raise depth.nothing_known(recipe.max_depth, len(training))
  if not len(held_out):
    learning_rates = learning_rates[len(learning_rates) // 2 :][:1]
  statistics = (0.0, 1.0, 0.0, 1.0)
  if recipe.standardize:
    statistics = _statistics(patch, cls)
  shape = tuple(shape or np.shape(truth(0))[:2])
  options = dict(recipe=recipe, statistics=statistics, shape=shape)
  probes = _train(patch, cls, truth, training, learning_rates, **options)
  if len(probes) == 1:
    return probes[0]
  scores = {
    rate: _pooled(probe, patch, cls, truth, held_out, recipe)
    for rate, probe in zip(learning_rates, probes)
  }
  # A diverged probe has no score and must not win.
  best = min(
    probes, key=lambda probe: np.nan_to_num(scores[probe.chosen['learning_rate']], nan=np.inf)
  )
  if recipe.refit:
    [best] = _train(patch, cls, truth, everything, (best.chosen['learning_rate'],), **options)
  return dataclasses.replace(best, validation=scores)


def _train(patch, cls, truth, rows, rates, *, recipe, statistics, shape):
  """A probe for each learning rate, trained side by side on the same minibatches."""
  width = patch.shape[-1] + cls.shape[-1]
  rng = np.random.default_rng(recipe.seed)
  drawn = rng.uniform(-1, 1, (width + 1, recipe.bins)).astype(np.float32) / math.sqrt(width)
  start = {'patch': drawn[: patch.shape[-1]], 'cls': drawn[patch.shape[-1] : -1], 'bias': drawn[-1]}
  # All probes start from the same weights, so that only the learning rate differs.
  weights = jax.tree.map(lambda x: jnp.repeat(x[None], len(rates), 0), start)
  state = weights, jax.vmap(recipe.optimizer.init)(weights)
  mean_p, scale_p, mean_c, scale_c = statistics
  batches = minibatches(
    (patch, cls),
    truth,
    rows,
    batch=recipe.batch,
    steps=recipe.steps,
    shape=shape,
    seed=recipe.seed,
  )
  for step, ((patch_batch, cls_batch), target) in enumerate(batches):
    state = _step(
      *state,
      (patch_batch - mean_p) / scale_p,
      (cls_batch - mean_c) / scale_c,
      np.asarray(target, np.float32),
      jnp.asarray(rates, jnp.float32),
      step,
      recipe=recipe,
    )
  probes = []
  for i, rate in enumerate(rates):
    trained = {name: np.asarray(x[i]) for name, x in state[0].items()}
    # The standardization folds into kernels and bias, which then act on raw features.
    kernel_p = (trained['patch'].T / scale_p).T
    kernel_c = (trained['cls'].T / scale_c).T
    probe = DepthProbe(
      patch=kernel_p,
      cls=kernel_c,
      bias=trained['bias'] - (kernel_p.T * mean_p).sum(-1) - (kernel_c.T * mean_c).sum(-1),
      min_depth=recipe.min_depth,
      max_depth=recipe.max_depth,
      eps=recipe.eps,
      upsample=recipe.upsample,
      chosen={'learning_rate': rate},
      validation={},
    )
    probes.append(probe)
  return probes


@functools.partial(jax.jit, static_argnames='recipe', donate_argnums=(0, 1))
def _step(weights, optimizer_state, patch, cls, truth, rates, step, *, recipe):
  """One update of every probe: (weights, optimizer state), each leaf with a first axis of rates."""
  valid = depth.known(truth, max_depth=recipe.max_depth)
  # mmcv multiplies its cosine by a linear warm-up from 1e-3.
  cosine = jnp.cos(jnp.pi * step / recipe.steps) * 0.5 + 0.5
  warmup = 1e-3 + (1 - 1e-3) * step / max(recipe.warmup * recipe.steps, 1e-9)
  factor = cosine * jnp.minimum(1.0, warmup)
  mean_steps = min(recipe.mean_steps, recipe.steps // 10)

  def loss(weights):
    small = _depth(
      weights,
      patch,
      cls,
      min_depth=recipe.min_depth,
      max_depth=recipe.max_depth,
      eps=recipe.eps,
      upsample=recipe.upsample,
    )
    predicted = depth.resize(small, truth.shape[1:])
    value = recipe.sig_weight * depth.sigloss(predicted, truth, valid, only_mean=step < mean_steps)
    if recipe.gradient_weight:
      value += recipe.gradient_weight * depth.gradient_loss(predicted, truth, valid)
    return value

  def update(weights, state, rate):
    updates, state = recipe.optimizer.update(jax.grad(loss)(weights), state, weights)
    return jax.tree.map(lambda w, u: w - rate * factor * u, weights, updates), state

  return jax.vmap(update)(weights, optimizer_state, rates)


@functools.partial(jax.jit, static_argnames=('min_depth', 'max_depth', 'eps', 'upsample'))
def _depth(weights, patch, cls, *, min_depth, max_depth, eps, upsample):
  """Depth [B, upsample h, upsample w]."""
  # The CLS token adds the same logits to all patches of an image.
  shared = jnp.dot(cls, weights['cls'], precision='highest') + weights['bias']
  logits = jnp.dot(patch, weights['patch'], precision='highest') + shared[:, None, None]
  if upsample > 1:
    logits = depth.resize(logits, (upsample * logits.shape[1], upsample * logits.shape[2]))
  return depth.expectation(logits, min_depth=min_depth, max_depth=max_depth, eps=eps)


def _pooled(probe, patch, cls, truth, rows, recipe):
  """RMSE over all pixels of the rows."""
  scorer = depth.DepthScorer(max_depth=recipe.max_depth)
  for i in range(0, len(rows), recipe.batch):
    chosen = rows[i : i + recipe.batch]
    for row, predicted in zip(chosen, probe.predict(patch[chosen], cls[chosen])):
      scorer.add(predicted, truth(int(row)))
  return scorer.result()['rmse_pooled']


def _statistics(patch, cls):
  """Mean and scale of each patch and CLS feature; constant features get an infinite scale."""
  # Evenly spaced images: a video or a sorted data set is not cut to its beginning.
  rows = np.unique(np.linspace(0, len(patch) - 1, min(_STATISTICS, len(patch))).astype(int))
  result = []
  for array in (patch, cls):
    total, squares, count = 0.0, 0.0, 0
    for row in rows:
      # -1 would fail for an array without features (no CLS token).
      x = np.asarray(array[row], np.float64).reshape(math.prod(array.shape[1:-1]), array.shape[-1])
      total = total + x.sum(0)
      squares = squares + np.square(x).sum(0)
      count += len(x)
    mean = total / count
    scale = np.sqrt(np.maximum(squares / count - mean * mean, 0))
    scale = np.where(scale > 1e-5 * np.maximum(np.abs(mean), 1e-5), scale, np.inf)
    result += [mean.astype(np.float32), scale.astype(np.float32)]
  return tuple(result)


def _or_empty(cls, patch):
  """cls, or features of width 0 where there is no CLS token."""
  if cls is None:
    return np.zeros((len(patch), 0), np.float32)
  return cls

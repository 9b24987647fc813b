"""Linear depth on frozen features: 256 bins, trained with the scale-invariant log loss; RMSE in meters.

The protocol of DINOv2 on NYUv2 (Oquab et al. 2023, appendix; its eval/depth code), which TIPS takes over: each patch,
with the global CLS token beside it, upsampled 4x, goes through one linear layer to 256 uniform bins; ReLU, plus eps,
divided by the sum, is a distribution, and its expectation the depth. A linear layer commutes with bilinear
interpolation, so here the layer comes first and its logits are upsampled: the same numbers for 1/16 of the products.
What differs: features are cached, hence no augmentation in training and no mirrored second view in the test; several
learning rates run side by side and held-out training images choose one.

Depth is float32 meters [H, W], 0 where it is missing; pixels beyond `max_depth` count as missing.
"""

import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tips_jax.core.errors import InputError

# Row of an image -> its depth [H, W], or its normals [H, W, 3].
Truth = Callable[[int], np.ndarray]

BINS, MIN_DEPTH, MAX_DEPTH = 256, 1e-3, 10.0
EPS = 0.1  # of the bins: DINOv2's; TIPS's released decoders have MIN_DEPTH
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
HELD_OUT = 5  # one training image in this many, the last, chooses the learning rate
_LOG_EPS = 1e-3  # of the losses: keeps the gradient of log finite
_NOTHING = (
  'depth: got no pixel with depth in (0, {}] m in {} training images; expected some, in meters'
)
_STATISTICS = 500  # images that tell mean and scale of the features


def decode(png: bytes) -> np.ndarray:
  """float32 meters [H, W], 0 = missing, of an encoded uint16 map in millimeters; ValueError where it is none."""
  depth = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED) if png else None
  if depth is None or depth.dtype != np.uint16:
    raise ValueError(
      f'depth: got {"no image" if depth is None else depth.dtype}; expected a 16-bit PNG in millimeters'
    )
  return (depth if depth.ndim == 2 else depth[..., 0]).astype(np.float32) / 1000


def known(truth, *, max_depth=MAX_DEPTH):
  """Mask of the pixels that count: neither missing (0, nan) nor beyond max_depth."""
  return (truth > 0) & (truth <= max_depth)


def expectation(logits, *, min_depth=MIN_DEPTH, max_depth=MAX_DEPTH, eps=EPS):
  """Depth [...] of logits [..., K] over K uniform bins from min_depth to max_depth (AdaBins, linear normalization)."""
  weight = jax.nn.relu(logits) + eps
  centers = jnp.linspace(min_depth, max_depth, logits.shape[-1])
  return jnp.dot(weight, centers, precision='highest') / weight.sum(-1)


# --- losses -------------------------------------------------------------------------------------


def sigloss(predicted, truth, valid, *, only_mean=False):
  """sqrt(mean(g^2) - 0.85 mean(g)^2), g = log predicted - log truth, over the valid pixels of all images together.

  Eigen et al. 2014, eq. 4, with AdaBins' root and weight. [B, H, W] each; 0 where nothing is valid. `only_mean`:
  sqrt(0.15) |mean(g)|, with which DINOv2 begins.
  """
  g = _log_error(predicted, truth, valid)
  count = jnp.maximum(valid.sum(), 1)
  mean = g.sum() / count
  spread = jnp.where(only_mean, 0.0, jnp.square(jnp.where(valid, g - mean, 0)).sum() / count)
  return jnp.sqrt(jnp.maximum(spread + 0.15 * mean * mean, 1e-12))


def gradient_loss(predicted, truth, valid):
  """Mean of |g(x + 1) - g(x - 1)| + |g(y + 1) - g(y - 1)| over valid pixels, summed over four scales.

  MegaDepth (Li and Snavely 2018), with every 1st, 2nd, 4th and 6th pixel as in DINOv2 and Probe3D; theirs, given
  [B, 1, H, W], takes the differences between the images of a batch, here they are those of neighbors in the image.
  """
  g = _log_error(predicted, truth, valid)
  total = 0.0
  for stride in (1, 2, 4, 6):
    e, v = g[:, ::stride, ::stride], valid[:, ::stride, ::stride]
    down = jnp.where(v[:, 2:] & v[:, :-2], jnp.abs(e[:, 2:] - e[:, :-2]), 0).sum()
    right = jnp.where(v[:, :, 2:] & v[:, :, :-2], jnp.abs(e[:, :, 2:] - e[:, :, :-2]), 0).sum()
    total += (down + right) / jnp.maximum(v.sum(), 1)
  return total


def _log_error(predicted, truth, valid):
  """log predicted - log truth where valid, else 0, without a nan in the gradient."""
  return jnp.where(
    valid,
    jnp.log(jnp.where(valid, predicted, 1) + _LOG_EPS)
    - jnp.log(jnp.where(valid, truth, 1) + _LOG_EPS),
    0,
  )


# --- measure ------------------------------------------------------------------------------------


class DepthScorer:
  """Depth errors over images, at the resolution of the truth; sums are exact, so that their order does not matter."""

  def __init__(self, *, max_depth=MAX_DEPTH, crop=None):
    self._max_depth, self._crop = max_depth, crop
    self.rows = []  # of each image with truth: valid pixels, sum of squares, sum of |error| / truth, within 1.25

  def add(self, predicted, truth):
    """predicted [h, w] (resized bilinearly, half-pixel centers) against truth [H, W], both in meters."""
    truth = np.asarray(truth, np.float64)
    predicted = cv2.resize(
      np.asarray(predicted, np.float32), truth.shape[::-1], interpolation=cv2.INTER_LINEAR
    )
    if self._crop:
      top, bottom, left, right = self._crop
      predicted, truth = predicted[top:bottom, left:right], truth[top:bottom, left:right]
    valid = known(truth, max_depth=self._max_depth)
    p, t = predicted[valid].astype(np.float64), truth[valid]
    if t.size:
      with np.errstate(divide='ignore'):
        near = np.maximum(p / t, t / p) < 1.25
      self.rows.append(
        (t.size, np.square(p - t).sum(), (np.abs(p - t) / t).sum(), int((near & (p > 0)).sum()))
      )

  def result(self) -> dict[str, float]:
    """'rmse', 'abs_rel' and 'delta1' are means over images of each image's value, as DINOv2 and Probe3D report them;
    'rmse_pooled' is that over all valid pixels alike. Images without a valid pixel are left out; nan without any."""
    if not self.rows:
      return dict.fromkeys(('rmse', 'rmse_pooled', 'abs_rel', 'delta1'), float('nan'))
    over_images = lambda values: math.fsum(values) / len(self.rows)
    pixels = sum(n for n, *_ in self.rows)
    return {
      'rmse': over_images(math.sqrt(s / n) for n, s, _, _ in self.rows),
      'rmse_pooled': math.sqrt(math.fsum(s for _, s, _, _ in self.rows) / pixels),
      'abs_rel': over_images(a / n for n, _, a, _ in self.rows),
      'delta1': over_images(d / n for n, _, _, d in self.rows),
    }


def naive(truth, rows, *, max_depth=MAX_DEPTH):
  """(mean depth in meters, mean depth image [H, W]) of the valid pixels of truth(i), i in rows: the naive baselines.

  The image has the size of the first truth; a pixel that is never valid gets the mean. InputError without any pixel.
  """
  total = count = None
  sums, pixels = [], 0
  for row in rows:
    depth = np.asarray(truth(int(row)), np.float64)
    valid = known(depth, max_depth=max_depth)
    sums.append(depth[valid].sum())
    pixels += int(valid.sum())
    if total is None:
      total, count = np.zeros(depth.shape), np.zeros(depth.shape, np.int64)
    depth = fitted(np.where(valid, depth, 0), total.shape)
    total += depth
    count += depth > 0
  if not pixels:
    raise InputError(_NOTHING.format(max_depth, len(rows)))
  mean = math.fsum(sums) / pixels
  return mean, np.where(count > 0, total / np.maximum(count, 1), mean).astype(np.float32)


def baselines(
  train, train_rows, test, test_rows, *, max_depth=MAX_DEPTH, crop=None
) -> dict[str, dict[str, float]]:
  """What `DepthScorer` says of answering 'constant' (the training mean) and 'mean_image' (it, pixel by pixel) everywhere."""
  mean, image = naive(train, train_rows, max_depth=max_depth)
  constant, by_pixel = (DepthScorer(max_depth=max_depth, crop=crop) for _ in range(2))
  for row in test_rows:
    depth = test(int(row))
    constant.add(np.full((1, 1), mean), depth)
    by_pixel.add(image, depth)
  return {'constant': constant.result(), 'mean_image': by_pixel.result()}


# --- the probe ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthRecipe:
  """How the linear depth probe is trained; the defaults are DINOv2's."""

  # Trained side by side; held-out images choose one.
  learning_rates: tuple[float, ...] = RATES
  steps: int = 38_400
  batch: int = 16
  # Share of the steps over which the learning rate rises linearly; mmcv's cosine runs meanwhile.
  warmup: float = 1 / 3
  weight_decay: float = 0.01
  # Largest global norm of a gradient.
  clip: float = 35.0
  # Bilinear upsampling of the logits before they become depth.
  upsample: int = 4
  bins: int = BINS
  # Meters of the first and the last bin. Truth beyond max_depth counts as missing.
  min_depth: float = MIN_DEPTH
  max_depth: float = MAX_DEPTH
  # Added to the weight of every bin.
  eps: float = EPS
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
  """Kernels [D, K] and [C, K] on raw patch and CLS features, bias [K]; `validation`: RMSE by learning rate."""

  patch: np.ndarray
  cls: np.ndarray
  bias: np.ndarray
  min_depth: float
  max_depth: float
  eps: float
  upsample: int
  learning_rate: float
  validation: dict

  def predict(self, patch_BhwD, cls_BD=None) -> np.ndarray:
    """Depth [B, upsample h, upsample w] in meters; `DepthScorer.add` brings it to the truth's size."""
    weights = {'patch': self.patch, 'cls': self.cls, 'bias': self.bias}
    return np.asarray(
      _depth(
        weights,
        np.asarray(patch_BhwD, np.float32),
        _no_cls(cls_BD, patch_BhwD),
        min_depth=self.min_depth,
        max_depth=self.max_depth,
        eps=self.eps,
        upsample=self.upsample,
      )
    )


def fit(
  patch: np.ndarray,
  cls: np.ndarray | None,
  truth: Truth,
  *,
  recipe: DepthRecipe = DepthRecipe(),
  validation: Sequence[int] | None = None,
  shape: Sequence[int] | None = None,
) -> DepthProbe:
  """Fits the linear depth probe to patch [N, h, w, D] and cls [N, C] (or None), which may be on disk.

  truth(i): depth [H, W] of image i; in training all take the size `shape`, or that of the first
  (nearest pixel). `validation`: rows that choose the learning rate by pooled RMSE; default: the last
  fifth, since neighbors in a video are alike. With too few images for one, the middle rate is taken.
  InputError where no training image has depth.
  """
  cls, count = _no_cls(cls, patch), len(patch)
  if not count:
    raise InputError('depth: got no training image; expected at least one')
  everything = np.arange(count)
  if validation is None:
    held = everything[count - count // HELD_OUT :]
  else:
    held = np.asarray(validation, np.int64)
  learning_rates = recipe.learning_rates
  training = everything
  if len(learning_rates) > 1 and len(held) < count:
    training = np.setdiff1d(everything, held)
  if not any(known(np.asarray(truth(int(i))), max_depth=recipe.max_depth).any() for i in training):
    raise InputError(_NOTHING.format(recipe.max_depth, len(training)))
  if not len(held):
    learning_rates = learning_rates[len(learning_rates) // 2 :][:1]
  statistics = (0.0, 1.0, 0.0, 1.0)
  if recipe.standardize:
    statistics = _statistics(patch, cls)
  options = dict(recipe=recipe, statistics=statistics, shape=tuple(shape or np.shape(truth(0))[:2]))
  probes = _train(patch, cls, truth, training, learning_rates, **options)
  if len(probes) == 1:
    return probes[0]
  scores = {
    probe.learning_rate: _pooled(probe, patch, cls, truth, held, recipe) for probe in probes
  }
  # A diverged probe has no score and must not win.
  best = min(probes, key=lambda probe: np.nan_to_num(scores[probe.learning_rate], nan=np.inf))
  if recipe.refit:
    [best] = _train(patch, cls, truth, everything, (best.learning_rate,), **options)
  return dataclasses.replace(best, validation=scores)


def minibatches(arrays, truth, rows, *, batch, steps, shape, seed=0):
  """Yields `steps` times (batch of each array, truths [B, *shape, ...]): rows in a new random order each epoch.

  The next batch is read in a thread meanwhile. Truths of another size than `shape` are brought to it, nearest pixel.
  """
  rng, size, order = np.random.default_rng(seed), min(batch, len(rows)), np.zeros(0, np.int64)

  def read(chosen):
    return [np.asarray(a[chosen], np.float32) for a in arrays], np.stack(
      [fitted(truth(int(i)), shape) for i in chosen]
    )

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    pending = None
    for _ in range(steps):
      if len(order) < size:
        order = np.concatenate([order, rng.permutation(rows)])
      chosen, order = order[:size], order[size:]
      coming = pool.submit(read, chosen)
      if pending:
        yield pending.result()
      pending = coming
    if pending:
      yield pending.result()


def fitted(array, shape):
  """[H, W, ...] brought to another (H, W) by the nearest pixel."""
  array = np.asarray(array)
  if array.shape[:2] == tuple(shape):
    return array
  y, x = (
    np.minimum(((np.arange(n) + 0.5) * m / n).astype(int), m - 1)
    for n, m in zip(shape, array.shape)
  )
  return array[y[:, None], x]


def _train(patch, cls, truth, rows, rates, *, recipe, statistics, shape):
  """A probe for each learning rate, trained side by side on the same minibatches."""
  width = patch.shape[-1] + cls.shape[-1]
  drawn = np.random.default_rng(recipe.seed).uniform(-1, 1, (width + 1, recipe.bins)).astype(
    np.float32
  ) / math.sqrt(width)
  start = {'patch': drawn[: patch.shape[-1]], 'cls': drawn[patch.shape[-1] : -1], 'bias': drawn[-1]}
  weights = jax.tree.map(lambda x: jnp.repeat(x[None], len(rates), 0), start)
  state = weights, jax.vmap(recipe.optimizer.init)(weights)
  mean_p, scale_p, mean_c, scale_c = statistics
  for i, ((x, c), depth) in enumerate(
    minibatches(
      (patch, cls),
      truth,
      rows,
      batch=recipe.batch,
      steps=recipe.steps,
      shape=shape,
      seed=recipe.seed,
    )
  ):
    state = _step(
      *state,
      (x - mean_p) / scale_p,
      (c - mean_c) / scale_c,
      np.asarray(depth, np.float32),
      jnp.asarray(rates, jnp.float32),
      i,
      recipe=recipe,
    )
  result = []
  for i, rate in enumerate(rates):
    one = {name: np.asarray(x[i]) for name, x in state[0].items()}
    kernel_p, kernel_c = (one['patch'].T / scale_p).T, (one['cls'].T / scale_c).T
    result.append(
      DepthProbe(
        patch=kernel_p,
        cls=kernel_c,
        bias=one['bias'] - (kernel_p.T * mean_p).sum(-1) - (kernel_c.T * mean_c).sum(-1),
        min_depth=recipe.min_depth,
        max_depth=recipe.max_depth,
        eps=recipe.eps,
        upsample=recipe.upsample,
        learning_rate=rate,
        validation={},
      )
    )
  return result


@functools.partial(jax.jit, static_argnames='recipe', donate_argnums=(0, 1))
def _step(weights, optimizer_state, patch, cls, truth, rates, step, *, recipe):
  """One update of every probe: (weights, optimizer state), each leaf with the learning rates in front."""
  valid = known(truth, max_depth=recipe.max_depth)
  progress = jnp.cos(jnp.pi * step / recipe.steps) * 0.5 + 0.5
  factor = progress * jnp.minimum(
    1.0, 1e-3 + (1 - 1e-3) * step / max(recipe.warmup * recipe.steps, 1e-9)
  )

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
    predicted = resize(small, truth.shape[1:])
    value = recipe.sig_weight * sigloss(predicted, truth, valid, only_mean=step < mean_steps)
    if recipe.gradient_weight:
      value += recipe.gradient_weight * gradient_loss(predicted, truth, valid)
    return value

  def update(weights, state, rate):
    updates, state = recipe.optimizer.update(jax.grad(loss)(weights), state, weights)
    return jax.tree.map(lambda w, u: w - rate * factor * u, weights, updates), state

  return jax.vmap(update)(weights, optimizer_state, rates)


@functools.partial(jax.jit, static_argnames=('min_depth', 'max_depth', 'eps', 'upsample'))
def _depth(weights, patch, cls, *, min_depth, max_depth, eps, upsample):
  """Depth [B, upsample h, upsample w]."""
  beside = jnp.dot(cls, weights['cls'], precision='highest') + weights['bias']
  logits = jnp.dot(patch, weights['patch'], precision='highest') + beside[:, None, None]
  if upsample > 1:
    logits = resize(logits, (upsample * logits.shape[1], upsample * logits.shape[2]))
  return expectation(logits, min_depth=min_depth, max_depth=max_depth, eps=eps)


def resize(maps, shape):
  """[B, h, w, ...] to [B, H, W, ...]: bilinear, half-pixel centers, no antialiasing, as PyTorch's interpolate."""
  return jax.image.resize(
    maps, (maps.shape[0], *shape, *maps.shape[3:]), 'bilinear', antialias=False
  )


def _pooled(probe, patch, cls, truth, rows, recipe):
  scorer = DepthScorer(max_depth=recipe.max_depth)
  for i in range(0, len(rows), recipe.batch):
    chosen = rows[i : i + recipe.batch]
    for row, depth in zip(chosen, probe.predict(patch[chosen], cls[chosen])):
      scorer.add(depth, truth(int(row)))
  return scorer.result()['rmse_pooled']


def _statistics(patch, cls):
  """Mean and scale of each feature over evenly spaced images; constant features get an infinite scale."""
  rows = np.unique(np.linspace(0, len(patch) - 1, min(_STATISTICS, len(patch))).astype(int))
  result = []
  for array in (patch, cls):
    total, squares, count = 0.0, 0.0, 0
    for row in rows:
      x = np.asarray(array[row], np.float64).reshape(math.prod(array.shape[1:-1]), array.shape[-1])
      total, squares, count = total + x.sum(0), squares + np.square(x).sum(0), count + len(x)
    mean = total / count
    scale = np.sqrt(np.maximum(squares / count - mean * mean, 0))
    scale = np.where(scale > 1e-5 * np.maximum(np.abs(mean), 1e-5), scale, np.inf)
    result += [mean.astype(np.float32), scale.astype(np.float32)]
  return tuple(result)


def _no_cls(cls, patch):
  return np.zeros((len(patch), 0), np.float32) if cls is None else cls

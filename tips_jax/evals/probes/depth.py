"""Depth maps: decoding, bins, losses, metrics and baselines without features.

Depth is float32 meters [H, W], 0 where it is missing; pixels beyond `max_depth` count as missing.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.evals.probes.minibatches import Truth, fitted

Array = np.ndarray | jax.Array

BINS = 256
MIN_DEPTH = 1e-3
MAX_DEPTH = 10.0
# Added to the weight of every bin: DINOv2's. TIPS's released decoders have MIN_DEPTH instead.
EPS = 0.1
# Of the losses: keeps the gradient of the logarithm finite.
_LOG_EPS = 1e-3


def decode(png: bytes) -> np.ndarray:
  """float32 meters [H, W] (0 = missing) of a uint16 PNG in millimeters; ValueError otherwise."""
  depth = None
  if png:
    depth = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
  if depth is None or depth.dtype != np.uint16:
    got = getattr(depth, 'dtype', 'no image')
    raise ValueError(f'depth: got {got}; expected a 16-bit PNG in millimeters')
  if depth.ndim == 3:
    depth = depth[..., 0]
  return depth.astype(np.float32) / 1000


def known(truth: Array, *, max_depth: float = MAX_DEPTH) -> Array:
  """Mask of the pixels that count: neither missing (0, nan) nor beyond max_depth."""
  return (truth > 0) & (truth <= max_depth)


def expectation(
  logits: Array, *, min_depth: float = MIN_DEPTH, max_depth: float = MAX_DEPTH, eps: float = EPS
) -> jax.Array:
  """Depth [...] of logits [..., K] over K uniform bins (AdaBins, linear normalization)."""
  weight = jax.nn.relu(logits) + eps
  centers = jnp.linspace(min_depth, max_depth, logits.shape[-1])
  return jnp.dot(weight, centers, precision='highest') / weight.sum(-1)


def resize(maps: Array, shape: Sequence[int]) -> jax.Array:
  """[B, h, w, ...] to [B, H, W, ...]: bilinear, half-pixel centers, as PyTorch's interpolate."""
  # PyTorch does not antialias when it shrinks a map.
  shape = (maps.shape[0], *shape, *maps.shape[3:])
  return jax.image.resize(maps, shape, 'bilinear', antialias=False)


# --- losses -------------------------------------------------------------------------------------


def sigloss(
  predicted: Array, truth: Array, valid: Array, *, only_mean: bool | jax.Array = False
) -> jax.Array:
  """sqrt(mean(g^2) - 0.85 mean(g)^2), g = log predicted - log truth, over all valid pixels.

  Eigen et al. 2014, eq. 4, with AdaBins' root and weight. [B, H, W] each; 0 where nothing is valid.
  `only_mean`: sqrt(0.15) |mean(g)|, which DINOv2 uses in the first steps.
  """
  g = _log_error(predicted, truth, valid)
  count = jnp.maximum(valid.sum(), 1)
  mean = g.sum() / count
  # The variance around the mean, and not mean(g^2) - mean(g)^2: that cancels in float32.
  spread = jnp.where(only_mean, 0.0, jnp.square(jnp.where(valid, g - mean, 0)).sum() / count)
  return jnp.sqrt(jnp.maximum(spread + 0.15 * mean * mean, 1e-12))


def gradient_loss(predicted: Array, truth: Array, valid: Array) -> jax.Array:
  """Mean of |g(x + 1) - g(x - 1)| + |g(y + 1) - g(y - 1)| of valid pixels, summed over 4 scales.

  MegaDepth (Li and Snavely 2018), with every 1st, 2nd, 4th and 6th pixel as in DINOv2 and Probe3D.
  Theirs, given [B, 1, H, W], takes differences between the images of a batch; here they are between
  neighbors in the image.
  """
  g = _log_error(predicted, truth, valid)
  total = 0.0
  for stride in (1, 2, 4, 6):
    e = g[:, ::stride, ::stride]
    v = valid[:, ::stride, ::stride]
    down = jnp.where(v[:, 2:] & v[:, :-2], jnp.abs(e[:, 2:] - e[:, :-2]), 0).sum()
    right = jnp.where(v[:, :, 2:] & v[:, :, :-2], jnp.abs(e[:, :, 2:] - e[:, :, :-2]), 0).sum()
    total += (down + right) / jnp.maximum(v.sum(), 1)
  return total


def _log_error(predicted, truth, valid):
  """log predicted - log truth where valid, else 0, without a nan in the gradient."""
  # The inner `where` matters: the gradient of log at an invalid pixel is nan, and 0 * nan is nan.
  predicted = jnp.log(jnp.where(valid, predicted, 1) + _LOG_EPS)
  truth = jnp.log(jnp.where(valid, truth, 1) + _LOG_EPS)
  return jnp.where(valid, predicted - truth, 0)


# --- metrics ------------------------------------------------------------------------------------


class _ImageErrors(NamedTuple):
  """Sums over the valid pixels of one image."""

  pixels: int
  squares: float
  # |error| / truth.
  relative: float
  # Pixels with a ratio of prediction and truth below 1.25.
  near: int


class DepthScorer:
  """Depth errors over images at the resolution of the truth.

  Sums are exact (math.fsum), so that the order of the images does not matter.
  """

  def __init__(
    self, *, max_depth: float = MAX_DEPTH, crop: tuple[int, int, int, int] | None = None
  ):
    self._max_depth = max_depth
    # Top, bottom, left, right of the pixels that are scored; None: all.
    self._crop = crop
    # Of each image with truth.
    self.rows: list[_ImageErrors] = []

  def add(self, predicted: Array, truth: np.ndarray) -> None:
    """predicted [h, w] (resized bilinearly, half-pixel centers) against truth [H, W], in meters."""
    truth = np.asarray(truth, np.float64)
    predicted = np.asarray(predicted, np.float32)
    predicted = cv2.resize(predicted, truth.shape[::-1], interpolation=cv2.INTER_LINEAR)
    if self._crop:
      top, bottom, left, right = self._crop
      predicted = predicted[top:bottom, left:right]
      truth = truth[top:bottom, left:right]
    valid = known(truth, max_depth=self._max_depth)
    p = predicted[valid].astype(np.float64)
    t = truth[valid]
    if not t.size:
      return
    # A prediction of 0 or less is never near, whatever the ratio is.
    with np.errstate(divide='ignore'):
      near = (np.maximum(p / t, t / p) < 1.25) & (p > 0)
    errors = _ImageErrors(
      pixels=t.size,
      squares=np.square(p - t).sum(),
      relative=(np.abs(p - t) / t).sum(),
      near=int(near.sum()),
    )
    self.rows.append(errors)

  def result(self) -> dict[str, float]:
    """'rmse', 'abs_rel' and 'delta1' are means over images of each image's value, as in DINOv2 and
    Probe3D; 'rmse_pooled' is over all valid pixels alike. Images without a valid pixel are left
    out; nan without any.
    """
    if not self.rows:
      return dict.fromkeys(('rmse', 'rmse_pooled', 'abs_rel', 'delta1'), float('nan'))
    count = len(self.rows)
    pixels = sum(row.pixels for row in self.rows)
    squares = math.fsum(row.squares for row in self.rows)
    return {
      'rmse': math.fsum(math.sqrt(row.squares / row.pixels) for row in self.rows) / count,
      'rmse_pooled': math.sqrt(squares / pixels),
      'abs_rel': math.fsum(row.relative / row.pixels for row in self.rows) / count,
      'delta1': math.fsum(row.near / row.pixels for row in self.rows) / count,
    }


def constant_answers(
  truth: Truth, rows: Sequence[int], *, max_depth: float = MAX_DEPTH
) -> tuple[float, np.ndarray]:
  """(mean depth in meters, mean depth image [H, W]) of the valid pixels of truth(i), i in rows.

  The image has the size of the first truth; a pixel that is never valid gets the mean. InputError
  where no pixel is valid.
  """
  total = count = None
  sums = []
  pixels = 0
  for row in rows:
    depth = np.asarray(truth(int(row)), np.float64)
    valid = known(depth, max_depth=max_depth)
    sums.append(depth[valid].sum())
    pixels += int(valid.sum())
    if total is None:
      total = np.zeros(depth.shape)
      count = np.zeros(depth.shape, np.int64)
    depth = fitted(np.where(valid, depth, 0), total.shape)
    total += depth
    count += depth > 0
  if not pixels:
    raise nothing_known(max_depth, len(rows))
  mean = math.fsum(sums) / pixels
  image = np.where(count > 0, total / np.maximum(count, 1), mean)
  return mean, image.astype(np.float32)


def baselines(
  train: Truth,
  train_rows: Sequence[int],
  test: Truth,
  test_rows: Sequence[int],
  *,
  max_depth: float = MAX_DEPTH,
  crop: tuple[int, int, int, int] | None = None,
) -> dict[str, dict[str, float]]:
  """Metrics of the answers 'constant' (training mean) and 'mean_image' (training mean by pixel)."""
  mean, image = constant_answers(train, train_rows, max_depth=max_depth)
  constant = DepthScorer(max_depth=max_depth, crop=crop)
  by_pixel = DepthScorer(max_depth=max_depth, crop=crop)
  for row in test_rows:
    depth = test(int(row))
    constant.add(np.full((1, 1), mean), depth)
    by_pixel.add(image, depth)
  return {'constant': constant.result(), 'mean_image': by_pixel.result()}


def nothing_known(max_depth: float, images: int) -> InputError:
  """The error of training images without depth."""
  return InputError(
    f'depth: got no pixel with depth in (0, {max_depth}] m in {images} training images; expected '
    'some, in meters'
  )

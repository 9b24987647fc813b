"""Surface normals: truth, losses and metrics of Probe3D (El Banani et al. 2024).

Normals are float32 [..., 3], unit length, x right, y up, z toward the viewer; zero length where
there is no truth. evals/probes/dpt.py is the decoder that predicts them, dpt_train.py its training.
"""

import math
from collections.abc import Sequence

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.evals.probes.depth import Array
from tips_jax.evals.probes.minibatches import Truth

# Degrees: thresholds of the accuracies.
WITHIN = (11.25, 22.5, 30.0)
# Of the histogram behind the median: 0.01 degrees each.
_BINS = 18_000
# Of the cosine in the loss: keeps the gradient of arccos finite.
_CLIP = 1e-4


def decode(png: bytes) -> np.ndarray:
  """float32 unit normals [H, W, 3] of an encoded uint8 n * 127.5 + 127.5; zeros for (0, 0, 0)."""
  image = None
  if png:
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
  if image is None:
    raise ValueError('normals: got no image; expected an 8-bit PNG of three channels')
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
    raise ValueError(
      f'normals: got {image.dtype} {image.shape}; expected an 8-bit PNG of three channels'
    )
  rgb = image[..., ::-1]  # OpenCV reads BGR
  vectors = unit(rgb.astype(np.float32) - 127.5)
  return np.where(rgb.any(-1, keepdims=True), vectors, np.float32(0))


def known(truth: np.ndarray) -> np.ndarray:
  """Mask [...] of the normals [..., 3] that count: finite and not of zero length."""
  truth = np.asarray(truth)
  return np.isfinite(truth).all(-1) & (np.abs(truth).max(-1) > 1e-6)


def unit(normals: np.ndarray) -> np.ndarray:
  """[..., 3] scaled to length 1; zeros stay zero."""
  length = np.sqrt(np.square(normals).sum(-1, keepdims=True))
  return normals / np.where(length > 1e-6, length, 1)


# --- losses -------------------------------------------------------------------------------------


def angle(predicted: Array, truth: Array) -> jax.Array:
  """Radians [...] between vectors [..., 3] of any length, for training (cosines are clipped)."""
  length = jnp.sqrt(
    jnp.maximum(jnp.square(predicted).sum(-1), 1e-12)
    * jnp.maximum(jnp.square(truth).sum(-1), 1e-12)
  )
  return jnp.arccos(jnp.clip((predicted * truth).sum(-1) / length, -1 + _CLIP, 1 - _CLIP))


def angular_loss(predicted: Array, truth: Array, valid: Array) -> jax.Array:
  """Mean angle in radians over the valid pixels of [..., 3]; 0 where nothing is valid."""
  return _mean(angle(predicted, truth), valid)


def uncertain_loss(predicted: Array, truth: Array, valid: Array) -> jax.Array:
  """Mean of log(1 + exp(-k pi)) - log(k^2 + 1) + k angle over the valid pixels of [..., 4].

  The negative log-likelihood of the angular von Mises-Fisher distribution (AngMF, Bae et al. 2021),
  up to a constant; its concentration k is elu of the fourth channel + 1.01, as in Probe3D.
  """
  kappa = jax.nn.elu(predicted[..., 3]) + 1.01
  regular = jnp.log1p(jnp.exp(-kappa * jnp.pi)) - jnp.log1p(jnp.square(kappa))
  return _mean(regular + kappa * angle(predicted[..., :3], truth), valid)


def _mean(values, valid):
  return jnp.where(valid, values, 0).sum() / jnp.maximum(valid.sum(), 1)


# --- metrics ------------------------------------------------------------------------------------


def degrees(predicted: Array, truth: np.ndarray) -> np.ndarray:
  """Angles [...] in degrees between [..., 3] of any length; 90 for a prediction of length 0."""
  predicted = np.asarray(predicted, np.float64)
  truth = np.asarray(truth, np.float64)
  # arctan2 is exact near 0 and 180 degrees, where arccos loses half of the digits.
  across = np.sqrt(np.square(np.cross(predicted, truth)).sum(-1))
  along = (predicted * truth).sum(-1)
  return np.degrees(np.where((across == 0) & (along == 0), np.pi / 2, np.arctan2(across, along)))


class NormalScorer:
  """Angular errors over images at the resolution of the truth.

  Sums are exact (math.fsum), so that the order of the images does not matter.
  """

  def __init__(self):
    # Of each image with truth: valid pixels, sum of squares, sum, counts within the thresholds.
    self.rows: list[tuple] = []
    self.histogram = np.zeros(_BINS, np.int64)

  def add(self, predicted: Array, truth: np.ndarray, *, valid: np.ndarray | None = None) -> None:
    """predicted [h, w, 3 or more] of any length (bicubic, as in Probe3D) against truth [H, W, 3].

    `valid` [H, W]: leaves out further pixels, for instance those without depth.
    """
    truth = np.asarray(truth)
    predicted = np.asarray(predicted, np.float32)[..., :3]
    if predicted.shape[:2] != truth.shape[:2]:
      predicted = cv2.resize(predicted, truth.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    mask = known(truth)
    if valid is not None:
      mask &= np.asarray(valid, bool)
    error = degrees(predicted[mask], truth[mask])
    if not error.size:
      return
    within = [int((error < threshold).sum()) for threshold in WITHIN]
    self.rows.append((error.size, np.square(error).sum(), error.sum(), *within))
    if np.isfinite(error).all():
      bins = np.minimum(error * (_BINS / 180), _BINS - 1).astype(int)
      self.histogram += np.bincount(bins, minlength=_BINS)

  def result(self) -> dict[str, float]:
    """Degrees, and shares in [0, 1]. 'angular_rmse' and 'within_11.25' ... are means over images of
    each image's value, as in Probe3D; 'rmse_pooled', 'mean' and 'median' (to 0.005 degrees) are
    over all valid pixels alike. Images without a valid pixel are left out; nan without any.
    """
    within = [f'within_{threshold:g}' for threshold in WITHIN]
    if not self.rows:
      return dict.fromkeys(('angular_rmse', 'rmse_pooled', 'mean', 'median', *within), float('nan'))
    count = len(self.rows)
    pixels, squares, errors, *hits = zip(*self.rows)
    result = {
      'angular_rmse': math.fsum(math.sqrt(s / n) for s, n in zip(squares, pixels)) / count,
      'rmse_pooled': math.sqrt(math.fsum(squares) / sum(pixels)),
      'mean': math.fsum(errors) / sum(pixels),
      'median': self._median(sum(pixels)),
    }
    for name, hit in zip(within, hits):
      result[name] = math.fsum(h / n for h, n in zip(hit, pixels)) / count
    return result

  def _median(self, pixels):
    total = int(self.histogram.sum())
    # An image with a prediction that is not finite has rows, but is not in the histogram.
    if total < pixels:
      return float('nan')
    below = np.cumsum(self.histogram)
    # The two middle ranks; they are one for an odd number of pixels.
    middle = np.searchsorted(below, [(total - 1) // 2, total // 2], side='right')
    return float((np.mean(middle) + 0.5) * 180 / _BINS)


def constant_answers(truth: Truth, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """(mean normal [3], mean normal image [H, W, 3]) of truth(i), i in rows, of unit length.

  The image has the size of the first truth; where nothing is known it holds the mean. InputError
  where no pixel has a normal.
  """
  mean = np.zeros(3)
  image = None
  pixels = 0
  for row in rows:
    normals = np.asarray(truth(int(row)), np.float64)
    valid = known(normals)
    normals = np.where(valid[..., None], normals, 0)
    pixels += int(valid.sum())
    mean += normals.sum((0, 1))
    if image is None:
      image = np.zeros(normals.shape)
    image += cv2.resize(normals, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
  if not pixels:
    raise InputError(
      f'normals: got no pixel with a normal in {len(rows)} training images; expected some'
    )
  mean = unit(mean)
  image = np.where(known(image)[..., None], unit(image), mean)
  return mean.astype(np.float32), image.astype(np.float32)


def baselines(
  train: Truth, train_rows: Sequence[int], test: Truth, test_rows: Sequence[int]
) -> dict[str, dict[str, float]]:
  """Metrics of the answers 'constant' (training mean) and 'mean_image' (training mean by pixel)."""
  mean, image = constant_answers(train, train_rows)
  constant = NormalScorer()
  by_pixel = NormalScorer()
  for row in test_rows:
    normals = test(int(row))
    constant.add(np.broadcast_to(mean, np.shape(normals)), normals)
    by_pixel.add(image, normals)
  return {'constant': constant.result(), 'mean_image': by_pixel.result()}

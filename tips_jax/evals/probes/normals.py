"""Surface normals: truth, losses and metrics of Probe3D (El Banani et al. 2024).

Normals are float32 [..., 3], unit length, x right, y up, z toward the viewer; zero length where
there is no truth. The decoder that predicts them is evals/probes/dpt.py, trained by
evals/probes/dpt_train.py.
"""

import math

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.core.errors import InputError

WITHIN = (11.25, 22.5, 30.0)  # degrees
_BINS = 18_000  # of the histogram behind the median: 0.01 degrees each
_CLIP = 1e-4  # of the cosine in the loss: keeps the gradient of arccos finite


def decode(png: bytes) -> np.ndarray:
  """float32 unit normals [H, W, 3] of an encoded uint8 map n * 127.5 + 127.5; zeros where it is (0,
  0, 0).
  """
  image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED) if png else None
  if image is None or image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
    found = 'no image' if image is None else f'{image.dtype} {image.shape}'
    raise ValueError(f'normals: got {found}; expected an 8-bit PNG of three channels')
  image = image[..., ::-1]
  return np.where(
    image.any(-1, keepdims=True), unit(image.astype(np.float32) - 127.5), np.float32(0)
  )


def known(truth):
  """Mask [...] of the normals [..., 3] that count: finite and not of zero length."""
  truth = np.asarray(truth)
  return np.isfinite(truth).all(-1) & (np.abs(truth).max(-1) > 1e-6)


def unit(normals):
  """[..., 3] scaled to length 1; zeros stay zero."""
  length = np.sqrt(np.square(normals).sum(-1, keepdims=True))
  return normals / np.where(length > 1e-6, length, 1)


# --- losses -------------------------------------------------------------------------------------


def angle(predicted, truth):
  """Radians [...] between vectors [..., 3] of any length, for training: kept off 0 and pi by a
  clipped cosine.
  """
  length = jnp.sqrt(
    jnp.maximum(jnp.square(predicted).sum(-1), 1e-12)
    * jnp.maximum(jnp.square(truth).sum(-1), 1e-12)
  )
  return jnp.arccos(jnp.clip((predicted * truth).sum(-1) / length, -1 + _CLIP, 1 - _CLIP))


def angular_loss(predicted, truth, valid):
  """Mean angle in radians over the valid pixels of predicted and truth [..., 3]; 0 where nothing is
  valid.
  """
  return _mean(angle(predicted, truth), valid)


def uncertain_loss(predicted, truth, valid):
  """Mean of log(1 + exp(-k pi)) - log(k^2 + 1) + k angle over the valid pixels of predicted [...,
  4].

  The negative log-likelihood of the angular von Mises-Fisher distribution (AngMF, Bae et al. 2021),
  up to a constant; its concentration k is elu of the fourth channel + 1.01, as in Probe3D.
  """
  kappa = jax.nn.elu(predicted[..., 3]) + 1.01
  regular = jnp.log1p(jnp.exp(-kappa * jnp.pi)) - jnp.log1p(jnp.square(kappa))
  return _mean(regular + kappa * angle(predicted[..., :3], truth), valid)


def _mean(values, valid):
  return jnp.where(valid, values, 0).sum() / jnp.maximum(valid.sum(), 1)


# --- measure ------------------------------------------------------------------------------------


def degrees(predicted, truth):
  """Angles [...] in degrees between [..., 3] of any length, exact near 0 and 180; 90 for a
  prediction of length 0.
  """
  predicted, truth = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
  across = np.sqrt(np.square(np.cross(predicted, truth)).sum(-1))
  along = (predicted * truth).sum(-1)
  return np.degrees(np.where((across == 0) & (along == 0), np.pi / 2, np.arctan2(across, along)))


class NormalScorer:
  """Angular errors over images, at the resolution of the truth; sums are exact, so that their order
  does not matter.
  """

  def __init__(self):
    # of each image with truth: valid pixels, sum of squares, sum, counts within the thresholds
    self.rows = []
    self.histogram = np.zeros(_BINS, np.int64)

  def add(self, predicted, truth, *, valid=None):
    """predicted [h, w, 3 or more] of any length (resized bicubically as Probe3D does) against truth
    [H, W, 3].

    `valid` [H, W]: further pixels to leave out, for instance those without depth.
    """
    truth = np.asarray(truth)
    predicted = np.asarray(predicted, np.float32)[..., :3]
    if predicted.shape[:2] != truth.shape[:2]:
      predicted = cv2.resize(predicted, truth.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    mask = known(truth) if valid is None else known(truth) & np.asarray(valid, bool)
    error = degrees(predicted[mask], truth[mask])
    if error.size:
      self.rows.append(
        (error.size, np.square(error).sum(), error.sum(), *(int((error < t).sum()) for t in WITHIN))
      )
      if np.isfinite(error).all():
        self.histogram += np.bincount(
          np.minimum(error * (_BINS / 180), _BINS - 1).astype(int), minlength=_BINS
        )

  def result(self) -> dict[str, float]:
    """Degrees, and shares in [0, 1]. 'rmse' and 'within_11.25' ... are means over images of each
    image's value, as in Probe3D; 'rmse_pooled', 'mean' and 'median' (to 0.005 degrees) are those
    over all valid pixels alike. Images without a valid pixel are left out; nan without any."""
    names = ('rmse', 'rmse_pooled', 'mean', 'median', *(f'within_{t:g}' for t in WITHIN))
    if not self.rows:
      return dict.fromkeys(names, float('nan'))
    over_images = lambda values: math.fsum(values) / len(self.rows)
    pixels = sum(row[0] for row in self.rows)
    values = [
      over_images(math.sqrt(row[1] / row[0]) for row in self.rows),
      math.sqrt(math.fsum(row[1] for row in self.rows) / pixels),
      math.fsum(row[2] for row in self.rows) / pixels,
      self._median(),
      *(over_images(row[3 + i] / row[0] for row in self.rows) for i in range(len(WITHIN))),
    ]
    return dict(zip(names, values))

  def _median(self):
    total = int(self.histogram.sum())
    if total < sum(row[0] for row in self.rows):  # some image had errors that are no numbers
      return float('nan')
    below = np.cumsum(self.histogram)
    middle = [np.searchsorted(below, rank, side='right') for rank in ((total - 1) // 2, total // 2)]
    return float((np.mean(middle) + 0.5) * 180 / _BINS)


def naive(truth, rows):
  """(mean normal [3], mean normal image [H, W, 3]) of truth(i), i in rows, unit length: the naive
  baselines.

  The image has the size of the first truth; where nothing is known it holds the mean. InputError
  without any pixel.
  """
  mean, image, pixels = np.zeros(3), None, 0
  for row in rows:
    normals = np.asarray(truth(int(row)), np.float64)
    valid = known(normals)
    normals, pixels = np.where(valid[..., None], normals, 0), pixels + int(valid.sum())
    mean += normals.sum((0, 1))
    if image is None:
      image = np.zeros(normals.shape)
    image += cv2.resize(normals, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
  if not pixels:
    raise InputError(
      f'normals: got no pixel with a normal in {len(rows)} training images; expected some'
    )
  mean = unit(mean)
  return mean.astype(np.float32), np.where(known(image)[..., None], unit(image), mean).astype(
    np.float32
  )


def baselines(train, train_rows, test, test_rows) -> dict[str, dict[str, float]]:
  """What `NormalScorer` says of answering 'constant' (the training mean) and 'mean_image' (it, pixel by
  pixel) everywhere.
  """
  mean, image = naive(train, train_rows)
  constant, by_pixel = NormalScorer(), NormalScorer()
  for row in test_rows:
    normals = test(int(row))
    constant.add(np.broadcast_to(mean, np.shape(normals)), normals)
    by_pixel.add(image, normals)
  return {'constant': constant.result(), 'mean_image': by_pixel.result()}

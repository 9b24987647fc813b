"""Color augmentation of a crop: jitter, gray, blur and solarization, in this order.

As DINOv2 composes torchvision's transforms (dinov2/data/augmentations.py:58), on bytes: each step
rounds and clips to 0 ... 255. What happens is a function of the numbers that `draw` takes from the
example's generator, always as many, so that a resumed run makes the same images.
"""

import itertools

import cv2
import numpy as np

from tips_jax.core.schema import View

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601
_BYTES = np.arange(256)
_INVERSE = np.where(_BYTES < 128, _BYTES, 255 - _BYTES).astype(np.uint8)
_BLUR_PLACES = np.arange(-4, 5)  # a kernel of 9 pixels
_DRAWS = 10
_ORDERS = tuple(itertools.permutations(range(4)))


def is_on(view: View) -> bool:
  """Whether any crop of a view may change its color."""
  return bool(view.jitter or view.gray or np.any(view.blur) or np.any(view.solarize))


def draw(view: View, rng: np.random.Generator) -> np.ndarray:
  """What decides the colors of an image's crops: uniform numbers [count, 10]."""
  return rng.random((view.count, _DRAWS))


def augment(crop: np.ndarray, view: View, index: int, drawn: np.ndarray) -> np.ndarray:
  """The crop (uint8 [size, size, 3] RGB), the `index`-th of its view, changed as its row of `drawn`
  says.
  """
  jitter, order, brightness, contrast, saturation, hue, gray, blur, sigma, solarize = drawn.tolist()
  if jitter < view.jitter:
    steps = (
      (_scale_brightness, _factor(view.brightness, brightness)),
      (_scale_contrast, _factor(view.contrast, contrast)),
      (_scale_saturation, _factor(view.saturation, saturation)),
      (_turn_hue, view.hue * (2 * hue - 1)),
    )
    for i in _ORDERS[int(order * len(_ORDERS))]:
      change, amount = steps[i]
      crop = change(crop, amount)
  if gray < view.gray:
    crop = _scale_saturation(crop, 0.0)
  if blur < _of_crop(view.blur, index):
    least, most = view.blur_sigma
    crop = _blur(crop, least + sigma * (most - least))
  if solarize < _of_crop(view.solarize, index):
    crop = cv2.LUT(crop, _INVERSE)
  return crop


def _of_crop(value, index):
  """The number of one crop, where a view gives one for all or one for each."""
  if isinstance(value, tuple):
    return value[index]
  return value


def _factor(strength, luck):
  """Uniform from 1 - strength to 1 + strength, not below zero."""
  least = max(0.0, 1 - strength)
  return least + luck * (1 + strength - least)


def _scale_brightness(x, factor):
  return _scale(x, factor, 0.0)


def _scale_contrast(x, factor):
  """Toward or away from the crop's mean gray."""
  mean = round(float(np.dot(cv2.mean(x)[:3], _LUMA)))
  return _scale(x, factor, mean * (1 - factor))


def _scale(x, factor, shift):
  # Rounded and clipped; faster than a table.
  return cv2.addWeighted(x, factor, x, 0.0, shift)


def _scale_saturation(x, factor):
  """Toward or away from each pixel's own gray."""
  gray = cv2.cvtColor(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
  return cv2.addWeighted(x, factor, gray, 1 - factor, 0)


def _turn_hue(x, turns):
  """turns: of the color circle, -0.5 to 0.5, to the nearest of 256 hues."""
  hues = round(turns * 256)
  if not hues:
    return x
  hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV_FULL)
  hsv[..., 0] += np.uint8(hues % 256)  # 256 hues are a circle: bytes wrap
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _blur(x, sigma):
  # A kernel of our own: cv2.GaussianBlur takes several times as long on bytes.
  kernel = np.exp(-(_BLUR_PLACES**2) / (2 * sigma**2))
  kernel = (kernel / kernel.sum()).astype(np.float32)
  return cv2.sepFilter2D(x, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)

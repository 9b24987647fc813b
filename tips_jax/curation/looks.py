"""How images look: a perceptual hash that finds like ones among many, and a comparison of the
pixels of two.

The hash says which of the lowest frequencies of the gray image are strong. That is pHash (Zauner,
Implementation and Benchmarking of Perceptual Image Hash Functions, 2010) but for the threshold,
there the median: noise would decide about the many frequencies that a symmetric drawing has not. It
is of an image as a whole, and a crop has another one. An image that shall be found in its crops
gets the hashes of several of them, which are so near to each other that any crop between them has a
hash like theirs.
"""

from collections.abc import Iterator

import cv2
import numpy as np

HASH = 32  # pixels of the gray image of a hash
LOW = 8  # frequencies in each direction
_STRONG = 0.2  # of their root mean square
SIDE = 64  # pixels of the images that are compared
_SIDES = (0.95, 0.9)  # of the crops, as shares of the image's
_PLACES = (0.0, 0.5, 1.0)  # of a crop, from one edge to the other
_SCALES = (1.0, 0.975, 0.95, 0.925, 0.9)
_STRETCH = 0.06  # largest difference of the two sides of a crop
_COLORS = 8  # parts of an image in each direction, whose colors are compared


def hashed(pixels_HWC: np.ndarray) -> int:
  """64 bits of uint8 [H, W, 3]."""
  gray = cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2GRAY)
  small = cv2.resize(gray, (HASH, HASH), interpolation=cv2.INTER_AREA)
  low = cv2.dct(small.astype(np.float32))[:LOW, :LOW].ravel()
  low[0] = 0  # the brightness
  bits = low > _STRONG * np.sqrt(np.mean(low**2))
  return int.from_bytes(np.packbits(bits).tobytes(), 'little')


def hashes_of_crops(pixels_HWC: np.ndarray) -> list[int]:
  """Hashes of the image and of its crops, of which the sides are down to 0.9 of its own."""
  return [hashed(crop) for crop in _crops(pixels_HWC)]


def _crops(pixels) -> Iterator[np.ndarray]:
  yield pixels
  height, width = pixels.shape[:2]
  for side in _SIDES:
    h = max(round(height * side), 1)
    w = max(round(width * side), 1)
    for down in _PLACES:
      for right in _PLACES:
        y = round((height - h) * down)
        x = round((width - w) * right)
        yield pixels[y : y + h, x : x + w]


def small(pixels_HWC: np.ndarray) -> np.ndarray:
  """uint8 [SIDE, SIDE, 3], as `alike` compares them."""
  return cv2.resize(pixels_HWC, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def alike(
  whole_SSC: np.ndarray, other_SSC: np.ndarray, least: float = 1.0, color: float = 0.0
) -> tuple[float, float]:
  """(correlation, difference of colors) of an image and another one, or of the part of it that is
  most like that, down to 0.9 of its sides. Both as from `small`. The difference, in [0, 1], is the
  largest of the mean colors of 64 parts: an arrow to the left and one to the right correlate.
  least, color: a correlation and a difference at which no better part is looked for.
  """
  best = (-1.0, 1.0)
  for down in _SCALES:
    for right in _SCALES:
      if abs(down - right) > _STRETCH:
        continue
      found = _at_scale(whole_SSC, other_SSC, (round(SIDE * right), round(SIDE * down)))
      if found[0] >= least and found[1] <= color:
        return found
      best = max(best, found)
  return best


def _at_scale(whole, other, size):
  part = cv2.resize(other, size, interpolation=cv2.INTER_AREA)
  if not part.std():
    return 0.0, 1.0  # without contrast there is nothing to correlate
  places = cv2.matchTemplate(whole, part, cv2.TM_CCOEFF_NORMED)
  y, x = np.unravel_index(np.argmax(places), places.shape)
  seen = whole[y : y + size[1], x : x + size[0]]
  return float(places[y, x]), _difference(seen, part)


def _difference(a, b):
  size = (_COLORS, _COLORS)
  a = cv2.resize(a, size, interpolation=cv2.INTER_AREA).astype(np.float32)
  b = cv2.resize(b, size, interpolation=cv2.INTER_AREA).astype(np.float32)
  return float(np.abs(a - b).mean(-1).max() / 255)

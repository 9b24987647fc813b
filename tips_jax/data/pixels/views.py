"""Views: from encoded image bytes to square uint8 crops, with one decode for all crops of an image.

A JPEG is decoded at the coarsest DCT scale (1/2, 1/4, 1/8) that still gives every crop at least one
pixel per output pixel; where the full image itself has fewer, it is decoded at full scale. The
scales between (7/8, 3/4 ...) cost more than a full decode. Crops are then read from a pyramid of
half octaves (halved, or blurred, and sampled linearly), so shrinking is antialiased. images.py says
how pixels are made of bytes, the same for training and evaluation.
"""

import math
from collections.abc import Mapping

import cv2
import numpy as np
from PIL import Image

from tips_jax.core.schema import View
from tips_jax.data.pixels import color, images

Box = tuple[int, int, int, int, bool]  # top, left, height, width in pixels, and whether to flip

_REDUCTIONS = (8, 4, 2)
_TRIES = 10
_BLUR_ABOVE = 1.2  # shrink factor from which aliasing costs more than the blur
# Of a 3-tap kernel with variance 1/4: with linear sampling that of a triangle filter at factor 1.6.
_BLUR_SIGMA = 0.507


def crops(
  data: bytes,
  views: Mapping[str, View],
  rng: np.random.Generator,
  out: Mapping[str, np.ndarray] | None = None,
  places: dict[str, tuple[Box, int, int]] | None = None,
) -> Mapping[str, np.ndarray]:
  """Random-resized crops of every view of one encoded image: {name: uint8 [V, size, size, 3] RGB}.

  `out` may hold contiguous arrays to fill. `places` gets, by view, the box of its first crop and
  the image's height and width in pixels. Boxes are those of `draw_boxes`, view after view; one
  that shrinks by 2^n or more is rounded to multiples of 2^n, the pixels of the level that it is
  read from (at most half an output pixel). Raises ValueError with the reason when the image cannot
  be decoded.
  """
  height, width, rgbx = images.encoded(data)
  boxes = {name: draw_boxes(height, width, view, rng) for name, view in views.items()}
  if places is not None:
    for name, drawn in boxes.items():
      places[name] = (drawn[0], height, width)
  colors = {name: color.draw(view, rng) for name, view in views.items() if color.is_on(view)}
  # Source pixels per output pixel of the crop that needs the finest image.
  least = min(min(box[2:4]) / views[name].size for name, drawn in boxes.items() for box in drawn)
  reduction = next((r for r in _REDUCTIONS if r <= least), 1)
  pyramid = _Pyramid(rgbx(reduction), reduction)
  out = out or {name: np.empty((v.count, v.size, v.size, 3), np.uint8) for name, v in views.items()}
  for name, drawn in boxes.items():
    for i, (top, left, box_height, box_width, flip) in enumerate(drawn):
      crop = pyramid.resize(top, left, box_height, box_width, views[name].size)
      if flip:
        crop = cv2.flip(crop, 1)
      target = out[name][i]
      cv2.cvtColor(crop, cv2.COLOR_RGBA2RGB, dst=target)
      if name in colors:
        target[:] = color.augment(target, views[name], i, colors[name][i])
  return out


def draw_boxes(height: int, width: int, view: View, rng: np.random.Generator) -> list[Box]:
  """The `view.count` random boxes of an image.

  Area uniform in `view.scale` of the image, log aspect ratio (width / height) uniform in
  `view.ratio`; after ten misses the largest central box within the ratios. (Inception, arXiv
  1409.4842; torchvision's RandomResizedCrop has this distribution.)
  """
  # All first tries in one call: a call of the generator costs more than its numbers.
  draws = rng.random((view.count, 5)).tolist()
  return [(*_box(height, width, view, rng, first), luck < view.flip) for *first, luck in draws]


def _box(height, width, view, rng, draw):
  """(top, left, height, width) from four uniform numbers, and more of them after a miss."""
  (least, most), (narrow, broad) = view.scale, view.ratio
  for _ in range(_TRIES):
    area, ratio, down, right = draw
    area = height * width * (least + area * (most - least))
    ratio = narrow * (broad / narrow) ** ratio
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    draw = rng.random(4).tolist()
  w = min(width, max(1, round(height * broad)))
  h = min(height, max(1, round(width / narrow)))
  return (height - h) // 2, (width - w) // 2, h, w


class _Pyramid:
  """Half octaves of a decoded image, each made when first needed.

  Even levels halve the level two before, odd ones blur the level before.
  """

  def __init__(self, image, reduction):
    self._levels = {0: image}
    self._reduction = reduction

  def _level(self, i):
    if i not in self._levels:
      if i % 2:
        self._levels[i] = cv2.GaussianBlur(self._level(i - 1), (3, 3), _BLUR_SIGMA)
      else:
        finer = self._level(i - 2)
        # An exact factor of two takes OpenCV's fast path.
        h, w = finer.shape[0] // 2, finer.shape[1] // 2
        self._levels[i] = cv2.resize(finer[: 2 * h, : 2 * w], (w, h), interpolation=cv2.INTER_AREA)
    return self._levels[i]

  def resize(self, top, left, height, width, size):
    """The box (in pixels of the full image), as [size, size, 4]."""
    octave = max(1, min(height, width) // (size * self._reduction)).bit_length() - 1
    scale = self._reduction << octave
    blur = height * width > (_BLUR_ABOVE * size * scale) ** 2
    level = self._level(2 * octave + blur)
    if scale > 1:
      top, height = _to_grid(top / scale, height / scale, level.shape[0])
      left, width = _to_grid(left / scale, width / scale, level.shape[1])
    box = level[top : top + height, left : left + width]
    return cv2.resize(box, (size, size), interpolation=cv2.INTER_LINEAR)


def _to_grid(start, length, limit):
  """(start, length) as whole pixels of a level with `limit` of them."""
  length = min(limit, max(1, round(length)))
  return min(round(start), limit - length), length


# --- evaluation ---------------------------------------------------------------------------------


def evaluation(data: bytes, size: int) -> np.ndarray:
  """The full image resized to a square, ignoring its aspect ratio: uint8 [size, size, 3] RGB.

  Bilinear and antialiased, as the official TIPS preprocessing. Raises ValueError with the reason.
  """
  image = Image.fromarray(images.decode(data))
  return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))

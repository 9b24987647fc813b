"""Views: from encoded image bytes to square uint8 crops, with one decode for all crops of an image.

A JPEG is decoded at the coarsest DCT scale (1/2, 1/4, 1/8) that still gives every crop at least one
pixel per output pixel; where the full image itself has fewer, it is decoded at full scale. The
scales between (7/8, 3/4 ...) cost more than a full decode. Crops are then read from a pyramid of
half octaves (halved, or blurred, and sampled linearly), so shrinking is antialiased. Other formats
go through Pillow: transparency is composited on white, gray and palettes become RGB, 16 bits are
scaled to 8, only the first frame counts. EXIF orientation is ignored everywhere, in training as in
evaluation.
"""

import io
import math
import struct
from collections.abc import Callable, Mapping

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from tips_jax.core.schema import View
from tips_jax.data import color

Box = tuple[int, int, int, int, bool]  # top, left, height, width in pixels, and whether to flip

MAX_PIXELS = 50_000_000
_REDUCTIONS = (8, 4, 2)
_TRIES = 10
_BLUR_ABOVE = 1.2  # shrink factor from which aliasing costs more than the blur
# Of a 3-tap kernel with variance 1/4: with linear sampling that of a triangle filter at factor 1.6.
_BLUR_SIGMA = 0.507

# The pipeline's threads each take an image; OpenCV's threads would only compete with them.
cv2.setNumThreads(0)


def crops(
  data: bytes,
  views: Mapping[str, View],
  rng: np.random.Generator,
  out: Mapping[str, np.ndarray] | None = None,
) -> Mapping[str, np.ndarray]:
  """Random-resized crops of every view of one encoded image: {name: uint8 [V, size, size, 3] RGB}.

  `out` may hold contiguous arrays to fill. Boxes are those of `draw_boxes`, view after view; one
  that shrinks by 2^n or more is rounded to multiples of 2^n, the pixels of the level that it is
  read from (at most half an output pixel). Raises ValueError with the reason when the image cannot
  be decoded.
  """
  height, width, decode = _open(data)
  boxes = {name: draw_boxes(height, width, view, rng) for name, view in views.items()}
  colors = {name: color.draw(view, rng) for name, view in views.items() if color.is_on(view)}
  # Source pixels per output pixel of the crop that needs the finest image.
  least = min(min(box[2:4]) / views[name].size for name, drawn in boxes.items() for box in drawn)
  reduction = next((r for r in _REDUCTIONS if r <= least), 1)
  pyramid = _Pyramid(decode(reduction), reduction)
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


# --- decoding -----------------------------------------------------------------------------------


def _open(data: bytes) -> tuple[int, int, Callable[[int], np.ndarray]]:
  """(height, width, decode) of encoded bytes.

  decode(reduction) gives uint8 [H, W, 4]: OpenCV is faster on four channels, of which the last is
  unused.
  """
  if data[:2] == b'\xff\xd8':
    try:
      height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):
      space = ''  # Pillow says what is wrong, or can read it
    if space in ('YCbCr', 'RGB', 'Gray'):
      _check_size(height, width)
      return height, width, lambda reduction: _decode_jpeg(data, height, width, reduction)
  image = _pillow(data)
  return image.height, image.width, lambda reduction: _reduced(_rgbx(rgb(image)), reduction)


def _decode_jpeg(data, height, width, reduction):
  try:
    return simplejpeg.decode_jpeg(
      data,
      'RGBX',
      fastdct=True,
      min_height=-(-height // reduction),
      min_width=-(-width // reduction),
    )
  except (ValueError, KeyError):
    # The decoder is strict: harmless oddities are errors too. Pillow tells them from damage.
    return _reduced(_rgbx(rgb(_pillow(data))), reduction)


def _rgbx(rgb):
  return cv2.cvtColor(rgb, cv2.COLOR_RGB2RGBA)


def _reduced(image, reduction):
  if reduction == 1:
    return image
  height, width = (-(-n // reduction) for n in image.shape[:2])
  below = height * reduction - image.shape[0]
  right = width * reduction - image.shape[1]
  padded = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE)
  return cv2.resize(padded, (width, height), interpolation=cv2.INTER_AREA)


def _check_size(height, width):
  if height * width > MAX_PIXELS:
    raise ValueError(
      f'image of {width} x {height} pixels; expected at most {MAX_PIXELS / 1e6:.0f} million'
    )


def _pillow(data):
  """An opened Pillow image whose pixels are not decoded yet."""
  try:
    image = Image.open(io.BytesIO(data))
  except (Image.DecompressionBombError, OSError, SyntaxError, struct.error) as error:
    reason = str(error)
    if isinstance(error, Image.UnidentifiedImageError):  # an OSError that prints the BytesIO
      reason = 'no known image format'
    raise ValueError(f'not a readable image: {reason} ({len(data)} bytes)') from error
  _check_size(image.height, image.width)
  return image


def rgb(image: Image.Image) -> np.ndarray:
  """uint8 [H, W, 3] RGB of an opened Pillow image."""
  try:
    image.load()
    if image.mode.startswith('I'):  # 16 bits; Pillow's conversion would clip them
      gray = np.asarray(image).astype(np.int64)
      return np.repeat(np.clip(gray >> 8, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La') or 'transparency' in image.info:
      image = image.convert('RGBA')
      image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return np.asarray(image.convert('RGB'))
  except Exception as error:  # Pillow's decoders raise whatever a broken file makes of them
    raise ValueError(f'broken {image.format or "image"}: {error}') from error


# --- evaluation ---------------------------------------------------------------------------------


def decode(data: bytes) -> np.ndarray:
  """The full image: uint8 [H, W, 3] RGB, exact decoder. Raises ValueError with the reason."""
  return rgb(_pillow(data))


def evaluation(data: bytes, size: int) -> np.ndarray:
  """The full image resized to a square, ignoring its aspect ratio: uint8 [size, size, 3] RGB.

  Bilinear and antialiased, as the official TIPS preprocessing. Raises ValueError with the reason.
  """
  return np.asarray(Image.fromarray(decode(data)).resize((size, size), Image.Resampling.BILINEAR))

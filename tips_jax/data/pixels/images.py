"""Encoded images: which are accepted, their size, and their pixels. Every image of training, of the
evaluations and of encode is decoded here.

Pixels are upright: the EXIF orientation, which phones write, is applied. JPEGs are decoded by
simplejpeg, whose pixels equal Pillow's bit for bit (with the exact DCT) and which is faster; all
others by Pillow. Transparency is composited on white, gray and palettes become RGB, 16 bits are
scaled to 8, only the first frame counts. What would take very long or much memory is refused by its
header, before it is decoded.
"""

import io
import re
import typing
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image

# Pillow knows forty more; EPS starts Ghostscript.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM', 'AVIF', 'JPEG2000')
MAX_PIXELS = 50_000_000
# An encoder writes about 10 scans of a progressive JPEG; each costs as much as the whole image.
MAX_SCANS = 50

# A JPEG marker that begins a segment: the others are stuffing, filling and restart marks.
_MARKER = re.compile(rb'\xff[^\x00\x01\xff\xd0-\xd7]')
_APP1, _SCAN, _END = 0xE1, 0xDA, 0xD9  # APP1 holds EXIF or XMP
_FRAMES = (0xC0, 0xC1, 0xC2)  # headers of what simplejpeg decodes; the last one is progressive
_BITS_PER_SAMPLE, _TILE_WIDTH, _TILE_HEIGHT = 258, 322, 323  # TIFF tags
# By EXIF orientation (tag 0x0112): whether to transpose, and how OpenCV then flips.
_TURNS = {
  2: (False, 1),
  3: (False, -1),
  4: (False, 0),
  5: (True, None),
  6: (True, 1),
  7: (True, -1),
  8: (True, 0),
}

# The pipeline's threads each take an image; OpenCV's threads would only compete with them.
cv2.setNumThreads(0)


class TooLarge(ValueError):
  """An image of more pixels than are accepted."""


class Encoded(typing.NamedTuple):
  """An image whose header was read; height and width are upright, in pixels.

  rgbx(reduction) decodes it to uint8 [H, W, 4] at 1/reduction (1, 2, 4 or 8) of its size, rounded
  up; OpenCV is faster on four channels, of which the last is unused. It raises ValueError with the
  reason when the data is broken.
  """

  height: int
  width: int
  rgbx: Callable[[int], np.ndarray]


def encoded(data: bytes) -> Encoded:
  """Reads the header of an encoded image. Raises ValueError with the reason."""
  fast = _for_simplejpeg(data)
  if fast:
    return fast
  image = open_image(data)
  return Encoded(*size(image), lambda reduction: _reduced(_rgbx(rgb(image)), reduction))


def decode(data: bytes) -> np.ndarray:
  """The full image: uint8 [H, W, 3] RGB, upright. Raises ValueError with the reason."""
  return cv2.cvtColor(encoded(data).rgbx(1), cv2.COLOR_RGBA2RGB)


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
  """An opened Pillow image whose pixels are not decoded yet.

  Raises TooLarge, or ValueError with the reason.
  """
  try:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image.height, image.width, max_pixels)
    if image.format in ('JPEG', 'MPO'):
      _jpeg_header(data)
    _check_depth(image)
  except Image.DecompressionBombError as error:
    raise TooLarge(str(error).partition(',')[0]) from error
  except Image.UnidentifiedImageError as error:  # it prints the BytesIO
    raise ValueError(f'no known image format ({len(data)} bytes)') from error
  except (ValueError, MemoryError):  # the latter says nothing of the image
    raise
  except Exception as error:  # Pillow raises whatever a broken file makes of it
    raise _broken('image', error) from error
  return image


def size(image: Image.Image) -> tuple[int, int]:
  """(height, width) of an opened image, upright."""
  return image.size if orientation(image) > 4 else (image.height, image.width)


def orientation(image: Image.Image) -> int:
  """The EXIF orientation of an opened image: 1 (upright) to 8; 1 where it has none.

  Pillow itself turns TIFFs when it loads them.
  """
  if image.format == 'TIFF':
    return 1
  try:
    value = image.getexif().get(ExifTags.Base.Orientation)
  except MemoryError:
    raise
  except Exception:  # the pixels of an image with broken EXIF may be whole
    return 1
  return value if value in _TURNS else 1


def rgb(image: Image.Image) -> np.ndarray:
  """uint8 [H, W, 3] RGB of an opened Pillow image, upright.

  Raises ValueError for a broken image, and for pixels of 32 bits: what is black and white in them
  is not known.
  """
  _check_depth(image)
  try:
    turn = orientation(image)
    return upright(_rgb(image), turn)
  except MemoryError:
    raise
  except Exception as error:
    if getattr(error, 'code', None) == cv2.Error.STS_NO_MEM:  # OpenCV's own MemoryError
      raise MemoryError(str(error)) from error
    raise _broken(image.format or 'image', error) from error


def upright(pixels: np.ndarray, turn: int) -> np.ndarray:
  """[H, W, ...] pixels, as they are stored, turned by an EXIF orientation."""
  transposed, flip = _TURNS.get(turn, (False, None))
  if transposed:
    pixels = cv2.transpose(pixels)
  if flip is not None:
    pixels = cv2.flip(pixels, flip)
  return pixels


def _rgb(image):
  image.load()
  if image.mode.startswith('I'):  # 16 bits; Pillow's conversion would clip them
    gray = np.asarray(image).astype(np.int64) >> 8
    return np.repeat(np.clip(gray, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
  if image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La') or 'transparency' in image.info:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  return np.asarray(image.convert('RGB'))


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


# --- checks of a header -------------------------------------------------------------------------


def _broken(what, error):
  return ValueError(f'broken {what}: {error or type(error).__name__}')


def _check_size(height, width, max_pixels=MAX_PIXELS):
  if height * width > max_pixels:
    raise TooLarge(f'image of {width} x {height} pixels; expected at most {max_pixels:,}')


def _check_depth(image):
  """Only 8 and 16 bits have a known white; Pillow reads 16 bits of PPM as 32."""
  if image.mode == 'F' or (image.mode == 'I' and image.format != 'PPM'):
    kind = 'floats' if image.mode == 'F' else 'integers of 32 bits'
    raise ValueError(f'{image.format or "image"} of {kind}; expected 8 or 16 bits')
  if image.format != 'TIFF':
    return
  for bits in image.tag_v2.get(_BITS_PER_SAMPLE, (8,)):
    if bits > 8 and bits != 16:
      raise ValueError(f'TIFF of {bits} bits; expected 8 or 16')
  # The decoder takes memory for a whole tile, however small the image is.
  _check_size(image.tag_v2.get(_TILE_HEIGHT, 1), image.tag_v2.get(_TILE_WIDTH, 1))


# --- JPEG ---------------------------------------------------------------------------------------


def _for_simplejpeg(data):
  """The Encoded of a JPEG of a kind that simplejpeg decodes; None for all others."""
  if data[:2] != b'\xff\xd8':
    return None
  known, described = _jpeg_header(data)
  if not known:
    return None
  try:
    height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
  except (ValueError, KeyError):
    return None
  if space not in ('YCbCr', 'RGB', 'Gray'):
    return None
  _check_size(height, width)
  turn = 1
  if described:
    turn = orientation(open_image(data))

  def rgbx(reduction):
    least = {'min_height': -(-height // reduction), 'min_width': -(-width // reduction)}
    try:
      return upright(simplejpeg.decode_jpeg(data, 'RGBX', **least), turn)
    except (ValueError, KeyError):
      # The decoder is strict: harmless oddities are errors too. Pillow tells them from damage.
      return _reduced(_rgbx(rgb(open_image(data))), reduction)

  if turn > 4:
    return Encoded(width, height, rgbx)
  return Encoded(height, width, rgbx)


def _jpeg_header(data):
  """(whether it has a frame that simplejpeg decodes, whether it has EXIF or XMP) of a JPEG.

  Raises ValueError for more than MAX_SCANS scans.
  """
  described = False
  frame = 0
  components = 0
  scans = 0
  for marker, body in _segments(data):
    described |= marker == _APP1
    if marker in _FRAMES:
      frame = marker
      components = int.from_bytes(body[5:6])
    elif marker == _SCAN:
      scans += 1
      # Without progression a scan of all components is the whole image; a decoder reads no other.
      if frame != _FRAMES[-1] and body[:1] == bytes([components]):
        break
  if scans > MAX_SCANS:
    raise ValueError(f'JPEG of {scans} scans or more; expected at most {MAX_SCANS}')
  return bool(frame and scans), described


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
  """(marker, content) of the segments of a JPEG: to its end, or one scan more than MAX_SCANS."""
  at = 2
  scans = 0
  while scans <= MAX_SCANS and (found := _MARKER.search(data, at)):
    marker = data[found.start() + 1]
    if marker == _END:
      return
    scans += marker == _SCAN
    start = found.end()
    at = start + int.from_bytes(data[start : start + 2])
    yield marker, data[start + 2 : at]

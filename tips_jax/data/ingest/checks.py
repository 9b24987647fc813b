"""What can be wrong with one encoded image or mask, told before it enters a store.

The header is read first, so that an image which would not fit in memory is refused without being
decoded.
"""

import io
import typing

from PIL import Image

_FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM')


class Check(typing.NamedTuple):
  """`problem` is '' or one of 'unreadable', 'tiny', 'giant'; `size` is (width, height), (0, 0)
  where unknown.
  """

  problem: str
  detail: str
  size: tuple[int, int]


def check_image(data, *, min_side, max_pixels):
  """Reads the header of an encoded image, then decodes it; `min_side` and `max_pixels` are in
  pixels.
  """
  size = (0, 0)
  try:
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    size = width, height = image.size
    shown = f'{width}x{height}'
    if width * height > max_pixels:
      return Check('giant', f'{shown} is more than {max_pixels:,} pixels', size)
    if min(size) < min_side:
      return Check('tiny', f'{shown} has a side under {min_side} pixels', size)
    image.draft(None, (1, 1))  # JPEG: reads every byte, but computes 1/8 of the pixels
    image.load()
  except Image.DecompressionBombError as error:
    return Check('giant', str(error).partition(',')[0], size)
  except Image.UnidentifiedImageError:
    return Check(
      'unreadable', f'{len(data)} bytes that are no image' if data else 'empty file', size
    )
  except Exception as error:  # decoders raise anything, and one bad file must not end the run
    return Check('unreadable', f'{type(error).__name__}: {error}', size)
  return Check('', '', size)


def mask_png(data, *, size, max_pixels):
  """A PNG of uint8 class ids of `size` (width, height) from an encoded mask; None where it is no
  such mask.

  A gray PNG stays as it is, byte for byte; a palette image becomes the indices of its palette.
  """
  try:
    mask = Image.open(io.BytesIO(data), formats=_FORMATS)
    if mask.size != size or size[0] * size[1] > max_pixels or mask.mode not in ('L', 'P'):
      return None
    mask.load()
  except Exception:  # as above
    return None
  if mask.format == 'PNG' and mask.mode == 'L':
    return data
  return _png(Image.frombytes('L', mask.size, mask.tobytes()))


def ignored_mask(size):
  """A PNG mask of `size` (width, height) that ignores every pixel (255)."""
  return _png(Image.new('L', size, 255))


def _png(image):
  out = io.BytesIO()
  image.save(out, 'png')
  return out.getvalue()

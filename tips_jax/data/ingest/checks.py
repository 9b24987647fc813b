"""Checks of one encoded image or mask before it enters a store.

The header is read first: an image too large for memory is refused without being decoded.
"""

import io
import typing

from PIL import Image

VOID = 255  # in a mask: a pixel without class, ignored in training and evaluation
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM')


class Check(typing.NamedTuple):
  """The verdict on one image."""

  problem: str  # '' (none), 'unreadable', 'tiny' or 'giant'
  detail: str
  size: tuple[int, int]  # (width, height); (0, 0) where unknown


def check_image(data: bytes, *, min_side: int, max_pixels: int) -> Check:
  """Checks the header of an encoded image, then decodes it. `min_side` is in pixels."""
  size = (0, 0)
  try:
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    size = width, height = image.size
    if width * height > max_pixels:
      return Check('giant', f'{width}x{height} is more than {max_pixels:,} pixels', size)
    if min(size) < min_side:
      return Check('tiny', f'{width}x{height} has a side under {min_side} pixels', size)
    image.draft(None, (1, 1))  # JPEG: reads every byte, but computes 1/8 of the pixels
    image.load()
  except Image.DecompressionBombError as error:
    return Check('giant', str(error).partition(',')[0], size)
  except Image.UnidentifiedImageError:
    detail = f'{len(data)} bytes that are no image' if data else 'empty file'
    return Check('unreadable', detail, size)
  except Exception as error:  # decoders raise anything, and one bad file must not end the run
    return Check('unreadable', f'{type(error).__name__}: {error}', size)
  return Check('', '', size)


def open_mask(data: bytes) -> Image.Image:
  """An opened mask of class ids, gray or palette; ValueError for colors or 16 bits."""
  mask = Image.open(io.BytesIO(data), formats=_FORMATS)
  if mask.mode not in ('L', 'P'):
    raise ValueError(f'mask: got mode {mask.mode}; expected class ids in a gray or palette PNG')
  return mask


def mask_png(data: bytes, *, size: tuple[int, int], max_pixels: int) -> bytes | None:
  """A PNG of uint8 class ids of `size` (width, height) from an encoded mask; None if it has none.

  A gray PNG stays as it is, byte for byte; a palette image becomes the indices of its palette.
  """
  try:
    mask = open_mask(data)
    if mask.size != size or size[0] * size[1] > max_pixels:
      return None
    mask.load()
  except Exception:  # as above
    return None
  if mask.format == 'PNG' and mask.mode == 'L':
    return data
  return png(Image.frombytes('L', mask.size, mask.tobytes()))


def ignored_mask(size: tuple[int, int]) -> bytes:
  """A PNG mask of `size` (width, height) in which every pixel is void."""
  return png(Image.new('L', size, VOID))


def png(image: Image.Image, **options: int) -> bytes:
  """The encoded PNG of an image; `options` are those of Pillow's encoder."""
  out = io.BytesIO()
  image.save(out, 'png', **options)
  return out.getvalue()

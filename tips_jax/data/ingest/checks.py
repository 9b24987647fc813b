"""Checks of one encoded image or mask before it enters a store.

The header is read first: an image too large for memory is refused without being decoded.
"""

import io
import sys
import typing

import numpy as np
import simplejpeg
from PIL import Image

from tips_jax.data.pixels import images

VOID = 255  # in a mask: a pixel without class, ignored in training and evaluation
_LOSSLESS = ('PNG', 'BMP', 'GIF', 'TIFF', 'PPM')
_NO_CLASS_IDS = {'1': '1 bit', 'I': '16 bits', 'I;16': '16 bits', 'I;16B': '16 bits'}  # by mode


class Check(typing.NamedTuple):
  """The verdict on one image."""

  problem: str  # '' (none), 'unreadable', 'tiny' or 'giant'
  detail: str
  size: tuple[int, int]  # (width, height), upright; (0, 0) where unknown
  orientation: int = 1  # EXIF's, as it is stored: 1 is upright


def check_image(data: bytes, *, min_side: int, max_pixels: int) -> Check:
  """Checks the header of an encoded image, then decodes it. `min_side` is in pixels."""
  size = (0, 0)
  if not data:
    return Check('unreadable', 'empty file', size)
  try:
    image = images.open_image(data, max_pixels=sys.maxsize)
    height, width = images.size(image)
    size = (width, height)
    if width * height > max_pixels:
      return Check('giant', f'{width}x{height} is more than {max_pixels:,} pixels', size)
    if min(size) < min_side:
      return Check('tiny', f'{width}x{height} has a side under {min_side} pixels', size)
    turn = images.orientation(image)
    if not _decodes_strictly(data):
      image.draft(None, (1, 1))  # JPEG: reads every byte, but computes 1/8 of the pixels
      image.load()
  except images.TooLarge as error:
    return Check('giant', str(error), size)
  except MemoryError:  # says nothing of the image
    raise
  except Exception as error:  # decoders raise anything, and one bad file must not end the run
    return Check('unreadable', str(error) or type(error).__name__, size)
  return Check('', '', size, turn)


def _decodes_strictly(data):
  """Whether it is a JPEG without any fault, told in half of Pillow's time."""
  try:
    return simplejpeg.decode_jpeg(data, 'GRAY', min_height=1, min_width=1) is not None
  except (ValueError, KeyError):
    return False


def open_mask(data: bytes, *, max_pixels: int = images.MAX_PIXELS) -> Image.Image:
  """An opened mask of class ids, gray or palette; ValueError says why it is none."""
  mask = images.open_image(data, max_pixels=max_pixels)
  if mask.format not in _LOSSLESS or mask.info.get('compression') == 'jpeg':
    raise ValueError(f'mask: got a lossy {mask.format}, which changes class ids; expected a PNG')
  if mask.mode not in ('L', 'P'):
    kind = _NO_CLASS_IDS.get(mask.mode, f'colors ({mask.mode})')
    raise ValueError(f'mask: got {kind}; expected class ids of 8 bits in a gray or palette PNG')
  return mask


def mask_png(data: bytes, image: Check, *, max_pixels: int) -> tuple[bytes | None, str]:
  """(PNG of the uint8 class ids, upright) of an encoded mask, or (None, why it has none).

  A gray PNG stays as it is, byte for byte; a palette image becomes the indices of its palette. A
  mask of the size that the image has before EXIF turns it was drawn on the stored pixels, and is
  turned along; one of the upright size is taken as upright.
  """
  if not data:
    return None, 'no mask'
  try:
    mask = open_mask(data, max_pixels=max_pixels)
    turn = images.orientation(mask)
    ids = images.upright(np.asarray(mask), turn)
  except MemoryError:
    raise
  except Exception as error:  # as above
    return None, str(error) or type(error).__name__
  if ids.shape[::-1] != image.size and ids.shape == image.size and image.orientation > 4:
    turn = image.orientation
    ids = images.upright(ids, turn)
  if ids.shape[::-1] != image.size:
    height, width = ids.shape
    return None, f'mask: got {width}x{height}; expected {image.size[0]}x{image.size[1]}, the image'
  if mask.format == 'PNG' and mask.mode == 'L' and turn == 1:
    return data, ''
  return png(Image.fromarray(ids)), ''


def ignored_mask(size: tuple[int, int]) -> bytes:
  """A PNG mask of `size` (width, height) in which every pixel is void."""
  return png(Image.new('L', size, VOID))


def png(image: Image.Image, **options: int) -> bytes:
  """The encoded PNG of an image; `options` are those of Pillow's encoder."""
  out = io.BytesIO()
  image.save(out, 'png', **options)
  return out.getvalue()

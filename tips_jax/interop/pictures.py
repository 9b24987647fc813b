"""Pictures as people hold them: paths, PIL images and arrays, made ready for an encoder."""

import contextlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from tips_jax.core.errors import InputError
from tips_jax.data.pixels import views
from tips_jax.data.pixels.images import rgb


def resize(image: Any, size: int) -> np.ndarray:
  """uint8 [size, size, 3] RGB of a path, a PIL image or a uint8 array, as the evaluators prepare
  theirs. InputError for one that cannot be read.
  """
  if isinstance(image, (str, os.PathLike)):
    try:
      return views.evaluation(pathlib.Path(image).read_bytes(), size)
    except OSError as error:
      raise InputError(f'image: cannot read {os.fspath(image)!r} ({error.strerror})') from None
    except ValueError as error:
      raise InputError(f'image {os.fspath(image)!r}: {error}') from None
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
      raise _unknown(f'{type(image).__name__} of shape {image.shape}, {image.dtype}')
    image = Image.fromarray(image)
  if not isinstance(image, Image.Image):
    raise _unknown(f'{type(image).__name__} {image!r:.80}')
  try:
    pixels = Image.fromarray(rgb(image))
  except ValueError as error:
    raise InputError(f'image: {error}') from None
  return np.asarray(pixels.resize((size, size), Image.Resampling.BILINEAR))


def _unknown(got):
  return InputError(f'image: got {got}; expected a path, a PIL image or uint8 [H, W, 3]')


def decode(images: Sequence[Any]) -> None:
  """Reads the pixels of PIL images now."""
  # Pillow does so at the first use, and one image in two threads is not safe.
  for image in images:
    if isinstance(image, Image.Image):
      # `resize` says what is wrong with it.
      with contextlib.suppress(Exception):
        image.load()


def checked(images: Any) -> np.ndarray:
  """uint8 or float32 [B, H, W, 3] of an array; InputError for anything else."""
  got = type(images).__name__
  shape = ()
  if hasattr(images, 'dtype') and hasattr(images, 'shape'):
    shape = images.shape
    got = f'an array of shape {shape}'
  if len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
    raise InputError(f'images: got {got}; expected a list of images or one array [B, H, W, 3]')
  x = np.asarray(images)
  if x.dtype == np.uint8:
    return x
  if x.dtype.kind not in 'fV':  # V: bfloat16
    raise InputError(f'images: got {x.dtype}; expected uint8, or floats in [0, 1]')
  x = x.astype(np.float32)
  if x.size and not (x.min() >= 0 and x.max() <= 1):  # also false for nan
    raise InputError(
      f'images: got floats from {x.min():.4g} to {x.max():.4g}; expected [0, 1], not normalized '
      'further'
    )
  return x

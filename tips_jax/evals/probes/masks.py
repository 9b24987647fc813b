"""Segmentation masks: labels of patches, class ids of pixels, mean intersection over union."""

import json
import pathlib

import cv2
import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.checks import VOID
from tips_jax.data.store import Store

_IDS = 256  # a mask is uint8


def class_names(store: Store) -> tuple[str, ...]:
  """The names of the mask classes, from the store's annotations.json; () where it has none."""
  path = pathlib.Path(store.path) / 'annotations.json'
  if not path.exists():
    return ()
  try:
    return tuple(map(str, json.loads(path.read_text()).get('mask_classes', ())))
  except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
    raise InputError(
      f"{str(path)!r}: got {type(error).__name__}; expected JSON with a list 'mask_classes'"
    ) from None


def decode_mask(png: bytes) -> np.ndarray:
  """Class ids uint8 [H, W] of an encoded mask."""
  mask = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
  if mask is None:
    raise ValueError('mask cannot be decoded')
  if mask.ndim == 3:  # gray, stored as color
    mask = mask[..., 0]
  return mask


def patch_labels(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """The commonest class [h, w] in each cell of a grid (h, w) over a mask [H, W]; ties: the lowest.

  VOID where more than half of the cell is void.
  """
  h, w = grid
  height, width = mask.shape
  # Cells of a grid that does not divide the mask would overlap: it is enlarged to whole cells.
  tall = -(-height // h)
  wide = -(-width // w)
  if (tall * h, wide * w) != mask.shape:
    mask = cv2.resize(mask, (wide * w, tall * h), interpolation=cv2.INTER_NEAREST_EXACT)
  # One histogram for all cells: the id of a pixel, moved by the number of its cell.
  cell = np.repeat(np.arange(h * w).reshape(h, w), tall, 0).repeat(wide, 1)
  counts = np.bincount((cell * _IDS + mask).ravel(), minlength=h * w * _IDS).reshape(h * w, _IDS)
  labels = counts[:, :VOID].argmax(1)
  return np.where(2 * counts[:, VOID] > tall * wide, VOID, labels).reshape(h, w)


def upsample_argmax(logits_hwK: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Logits [h, w, K], bilinearly resized (half-pixel centers), to class ids [H, W]."""
  planes = np.ascontiguousarray(np.moveaxis(logits_hwK, -1, 0))
  best = np.full(shape, -np.inf, planes.dtype)
  ids = np.zeros(shape, np.int64)
  # One class at a time: all of them at full resolution are hundreds of MB.
  for k, plane in enumerate(planes):
    plane = cv2.resize(plane, shape[::-1], interpolation=cv2.INTER_LINEAR)
    np.copyto(ids, k, where=plane > best)
    np.maximum(best, plane, out=best)
  return ids


def confusion(truth: np.ndarray, predicted: np.ndarray, *, size: int) -> np.ndarray:
  """Counts [size, size] int64 of (truth, predicted) pairs of class ids."""
  pairs = np.asarray(truth, np.int64).ravel() * size + np.asarray(predicted, np.int64).ravel()
  return np.bincount(pairs, minlength=size * size).reshape(size, size)


def class_iou(counts: np.ndarray) -> np.ndarray:
  """Intersection over union [K]; nan for a class that is neither in the truth nor predicted."""
  hit = np.diag(counts)
  union = counts.sum(0) + counts.sum(1) - hit
  return np.where(union > 0, hit / np.maximum(union, 1), np.nan)


def mean_iou(counts: np.ndarray) -> float:
  """Mean IoU of the classes that occur in the truth or in the prediction; nan without any."""
  iou = class_iou(counts)
  iou = iou[~np.isnan(iou)]
  if not len(iou):
    return float('nan')
  return float(iou.mean())


def majority(train_counts: np.ndarray, test_counts: np.ndarray) -> float:
  """mIoU of answering train's most frequent class everywhere; counts: pixels by class [256]."""
  predicted = np.zeros((_IDS, _IDS), np.int64)
  predicted[:, train_counts.argmax()] = test_counts
  return mean_iou(predicted)

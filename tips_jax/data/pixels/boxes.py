"""Boxes of an image, carried into a crop of it, cut out, and compared with each other."""

import math

import numpy as np

from tips_jax.data.pixels.views import Box

_TOUCH = 1e-3  # of a pixel


def to_crop(
  boxes_R4: np.ndarray, crop: Box, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
  """(boxes of the crop [R, 4], share [R] of each box's area that the crop keeps).

  Boxes are (ymin, xmin, ymax, xmax) in [0, 1]: of the upright image of `height` x `width` pixels
  that come in, of the crop, clipped to it, those that go out. A box without area keeps nothing.
  """
  top, left, crop_height, crop_width, flip = crop
  start = np.array([top, left, top, left], np.float64)
  scale = np.array([crop_height, crop_width] * 2, np.float64)
  boxes = (boxes_R4 * np.array([height, width] * 2) - start) / scale
  if flip:
    boxes = np.stack([boxes[:, 0], 1 - boxes[:, 3], boxes[:, 2], 1 - boxes[:, 1]], -1)
  inside = boxes.clip(0, 1)
  before = _area(boxes)
  kept = np.divide(_area(inside), before, out=np.zeros(len(boxes)), where=before > 0)
  return inside.astype(np.float32), kept


def _area(boxes):
  sides = (boxes[:, 2:] - boxes[:, :2]).clip(0)
  return sides[:, 0] * sides[:, 1]


def pixels(box_4: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
  """(left, top, right, bottom) of a box of an image of `height` x `width` pixels: all pixels that
  it touches, one at least.
  """
  ymin, xmin, ymax, xmax = (np.asarray(box_4, np.float64) * ([height, width] * 2)).tolist()
  # Numbers of a store are rounded.
  left, top = int(xmin + _TOUCH), int(ymin + _TOUCH)
  left, top = min(left, width - 1), min(top, height - 1)
  right, bottom = math.ceil(xmax - _TOUCH), math.ceil(ymax - _TOUCH)
  return left, top, max(right, left + 1), max(bottom, top + 1)


def overlaps(box_4: np.ndarray, boxes_R4: np.ndarray) -> np.ndarray:
  """[R] intersection over union of a box with others."""
  low = np.maximum(box_4[:2], boxes_R4[:, :2])
  high = np.minimum(box_4[2:], boxes_R4[:, 2:])
  both = _area(np.concatenate([low, high], -1))
  one = _area(boxes_R4) + _area(box_4[None]) - both
  return np.divide(both, one, out=np.zeros(len(boxes_R4)), where=one > 0)


def suppress(boxes_R4: np.ndarray, most: float) -> list[int]:
  """Non-maximum suppression: the numbers of the boxes, the surest first, of which none overlaps
  one before it by more than `most`, as intersection over union.
  """
  kept = []
  for number, box in enumerate(boxes_R4):
    if not (overlaps(box, boxes_R4[kept]) > most).any():
      kept.append(number)
  return kept

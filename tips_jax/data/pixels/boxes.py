"""Boxes of an image, carried into a crop of it."""

import numpy as np

from tips_jax.data.pixels.views import Box


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

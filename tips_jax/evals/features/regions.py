"""Regions of a split: boxes of its images that have texts of their own, and their features."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import jax
import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.evals.features import reading
from tips_jax.evals.features.splits import SplitFeatures
from tips_jax.models import heads

TEXTS = ('region_captions', 'region_tags')
# Images whose regions are pooled at once.
_IMAGES = 32
# Boxes of an image are padded to a multiple of this, so that few shapes are compiled.
_BOXES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regions:
  """Boxes [N, 4] in [0, 1] of the images `image` [N] of a part, and the texts of each."""

  image: np.ndarray
  boxes: np.ndarray
  texts: list[tuple[str, ...]]
  # Boxes that take no part: without a text, and of those with one, without an area.
  without_text: int
  without_area: int

  def __len__(self):
    return len(self.image)


def of_record(record: Mapping[str, Any], field: str) -> tuple[np.ndarray, list[tuple[str, ...]]]:
  """(boxes [R, 4], the different texts of each) of a record; `field` of TEXTS.

  There is one text for each box, or a number of its box for each (data/store.py). Raises
  ValueError for other numbers of them.
  """
  boxes = np.asarray(record['boxes'], np.float32).reshape(-1, 4)
  texts = record[field]
  owners = record.get(f'{field}_boxes', np.arange(len(boxes)))
  if len(texts) != len(owners):
    raise ValueError(f'got {len(texts)} {field} of {len(owners)} boxes; expected as many')
  result = [{} for _ in boxes]  # dicts keep the order, and each text once
  for text, owner in zip(texts, np.asarray(owners).tolist()):
    if not 0 <= owner < len(boxes):
      raise ValueError(f'got {field} of box {owner}; expected one below {len(boxes)}')
    for whole in reading.texts_of({field: [text]}, field):
      result[owner][whole.strip()] = None
  return boxes, [tuple(of_box) for of_box in result]


def of_part(part: SplitFeatures, field: str, where: str) -> Regions:
  """The regions of a part with an area and a text; InputError, which begins with `where`, without
  any.
  """
  image = []
  boxes = []
  texts = []
  without_text = 0
  without_area = 0
  for i in range(len(part)):
    for box, of_box in zip(*of_record(part.record(i), field)):
      box = box.clip(0, 1)
      if not of_box:
        without_text += 1
      elif not (box[2:] > box[:2]).all():  # nor a nan
        without_area += 1
      else:
        image.append(i)
        boxes.append(box)
        texts.append(of_box)
  if not texts:
    raise InputError(
      f'{where}: got {without_text + without_area} boxes, {without_area} of them without an area, '
      f'the others without {field}; expected some with both'
    )
  return Regions(
    image=np.array(image),
    boxes=np.stack(boxes),
    texts=texts,
    without_text=without_text,
    without_area=without_area,
  )


def pooled(part: SplitFeatures, regions: Regions, *, samples: int) -> np.ndarray:
  """float32 [N, E]: RoIAlign of the patches in the joint space, the mean of samples x samples
  points of each region.
  """
  grids = part.arrays['region_patch']
  counts = np.bincount(regions.image, minlength=len(part))
  first = np.cumsum(counts) - counts  # a part's regions stand together
  most = -(-int(counts.max()) // _BOXES) * _BOXES
  pool = jax.jit(functools.partial(heads.region_means, samples=samples))
  result = np.zeros((len(regions), grids.shape[-1]), np.float32)
  some = np.flatnonzero(counts)
  size = min(_IMAGES, len(some))
  for start in range(0, len(some), size):
    rows = some[start : start + size]
    boxes = np.zeros((size, most, 4), np.float32)
    of_rows = np.zeros((size, *grids.shape[1:]), np.float32)
    of_rows[: len(rows)] = grids[rows]
    for place, i in enumerate(rows):
      boxes[place, : counts[i]] = regions.boxes[first[i] : first[i] + counts[i]]
    means = np.asarray(pool(of_rows, boxes))
    for place, i in enumerate(rows):
      result[first[i] : first[i] + counts[i]] = means[place, : counts[i]]
  return result


# --- pictures -----------------------------------------------------------------------------------


def outlined(image_HWC: np.ndarray, box_4: Sequence[float]) -> np.ndarray:
  """A copy of an image uint8 [H, W, 3] with the outline of a box, white in black."""
  height, width = image_HWC.shape[:2]
  image = np.ascontiguousarray(image_HWC).copy()
  top, left, bottom, right = np.round(np.multiply(box_4, [height, width] * 2)).astype(int).tolist()
  line = max(1, min(height, width) // 100)
  corners = (left, top), (right - 1, bottom - 1)
  cv2.rectangle(image, *corners, (0, 0, 0), 3 * line)
  cv2.rectangle(image, *corners, (255, 255, 255), line)
  return image


def cut(image_HWC: np.ndarray, box_4: Sequence[float]) -> np.ndarray:
  """The square around a box, a quarter larger than it, as far as the image has it; its outline is
  drawn.
  """
  height, width = image_HWC.shape[:2]
  top, left, bottom, right = np.multiply(box_4, [height, width] * 2)
  side = round(min(1.25 * max(bottom - top, right - left, 8), height, width))
  y = int(np.clip(round((top + bottom - side) / 2), 0, height - side))
  x = int(np.clip(round((left + right - side) / 2), 0, width - side))
  return outlined(image_HWC, box_4)[y : y + side, x : x + side]

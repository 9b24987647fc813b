"""Images at their aspect ratio, seen through square windows, as in mmseg's sliding inference.

The short side of an image is resized to the side of a window; windows every `stride` pixels cover
it, the last ones end at its edge (DINOv2's protocol). All windows have one shape, so that images of
any shape fill whole batches.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import cv2
import numpy as np
from PIL import Image

from tips_jax.evals.features import splits
from tips_jax.evals.probes import masks

# Pixels of a window, and between windows: TCL's and TIPSv2's.
SIDE = 448
STRIDE = 336
# Upper bound of the windows of an image: number * _MOST + window identifies one.
_MOST = 10_000

# (rows, columns) of a window.
Place = tuple[slice, slice]


def resized(height: int, width: int, *, side: int = SIDE, patch: int = 14) -> tuple[int, int]:
  """(height, width) with a short side of `side` pixels and the same aspect, in whole patches.

  Rounding up to a multiple of `patch` stretches the image by less than a patch, as in TIPSv2's
  notebook; nothing is cut off or padded. (The notebook resizes twice, here it is once.)
  """
  short = min(height, width)
  rows = -(-(side * height // short) // patch)
  columns = -(-(side * width // short) // patch)
  return rows * patch, columns * patch


def windows(height: int, width: int, side: int = SIDE, stride: int = STRIDE) -> Iterator[Place]:
  """Yields the windows of `side` pixels that cover the image; the last ones end at its edge."""
  for top in _starts(height, side, stride):
    for left in _starts(width, side, stride):
      yield slice(top, min(top + side, height)), slice(left, min(left + side, width))


def _starts(size, side, stride):
  count = max(size - side + stride - 1, 0) // stride + 1
  # The last window moves back to end at the edge.
  return [max(min(i * stride, size - side), 0) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Windows:
  """What sees images through windows: a `prepare` of features.cache, one record a window."""

  side: int  # pixels of a window
  stride: int  # pixels from one window to the next

  def places(self, shape: Sequence[int]) -> list[Place]:
    """All windows of an image of `shape` (H, W), in its resized pixels."""
    return list(windows(*self.size(shape), self.side, self.stride))

  def size(self, shape: Sequence[int]) -> tuple[int, int]:
    """(height, width) that an image of `shape` (H, W) is resized to."""
    return resized(*shape[:2], side=self.side, patch=1)

  def __call__(self, record: Mapping) -> np.ndarray:
    """uint8 [side, side, 3]: window number `record['window']`."""
    image = splits.decode(record)
    rows, columns = self.places(image.shape)[record['window']]
    box = columns.start, rows.start, columns.stop, rows.stop
    size = self.size(image.shape)[::-1]
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR).crop(box))

  def masks(self, mask: np.ndarray) -> np.ndarray:
    """The mask [H, W] of an image as each window sees it: uint8 [n, side, side]."""
    small = cv2.resize(mask, self.size(mask.shape)[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return np.stack([small[place] for place in self.places(mask.shape)])

  def labels(self, logits_nhwK: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Class ids [H, W] of an image of `shape`: the largest mean of its windows' logits."""
    places = self.places(shape)
    size = self.size(shape)
    shape = shape[:2]
    count = np.zeros(size, np.float32)
    for place in places:
      count[place] += 1
    best = np.full(shape, -np.inf, np.float32)
    ids = np.zeros(shape, np.int64)
    # One class at a time: all of them at every pixel would be large.
    for k in range(logits_nhwK.shape[-1]):
      plane = np.zeros(size, np.float32)
      for place, logits in zip(places, logits_nhwK[..., k], strict=True):
        plane[place] += _resize(logits, (self.side, self.side))
      plane = _resize(plane / count, shape)
      ids[plane > best] = k
      best = np.maximum(best, plane)
    return ids

  def patches(self, patch_nhwD: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The patches of an image as one grid [h, w, D], for a picture; of overlaps the last window."""
    side = patch_nhwD.shape[1]
    starts = []
    for rows, columns in self.places(shape):
      # From pixels to patches.
      starts.append(tuple(round(part.start * side / self.side) for part in (rows, columns)))
    height, width = np.max(starts, axis=0) + side
    grid = np.zeros((height, width, patch_nhwD.shape[-1]), np.float32)
    for (top, left), patch in zip(starts, patch_nhwD, strict=True):
      grid[top : top + side, left : left + side] = patch
    return grid


class Whole:
  """As Windows, for images that are seen at once, squeezed into a square."""

  def masks(self, mask: np.ndarray) -> np.ndarray:
    return mask[None]

  def labels(self, logits_nhwK: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return masks.upsample_argmax(logits_nhwK[0], shape[:2])

  def patches(self, patch_nhwD: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return patch_nhwD[0]


class Source:
  """Every window of the records of a source as a record with its number, 'window'."""

  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source) * _MOST

  def __getitem__(self, code):
    return self._source[code // _MOST] | {'window': code % _MOST}


def codes(counts: Mapping[int, int]) -> np.ndarray:
  """Numbers in a Source of all windows of records; counts: number of a record -> its windows."""
  result = []
  for number, count in counts.items():
    result += range(number * _MOST, number * _MOST + count)
  return np.array(result, np.int64)


def by_image(codes: np.ndarray) -> list[np.ndarray]:
  """Positions of the windows of each image among codes, where they follow one another."""
  ends = np.flatnonzero(np.diff(np.asarray(codes) // _MOST)) + 1
  return np.split(np.arange(len(codes)), ends)


def _resize(plane, shape):
  return cv2.resize(np.ascontiguousarray(plane), shape[::-1], interpolation=cv2.INTER_LINEAR)

"""Images at their own aspect ratio, seen through square windows, as mmseg's sliding inference does
(DINOv2's protocol).

The short side of an image is resized to the side of a window; windows every `stride` pixels cover
it, the last ones end at its edge. All windows have one shape, so that images of any shape fill
whole batches.
"""

import dataclasses

import cv2
import numpy as np
from PIL import Image

from tips_jax.evals.features import splits as suite_parts
from tips_jax.evals.probes import masks as segmentation

SIDE, STRIDE = 448, 336  # pixels of a window and between windows: TCL's and TIPSv2's
_MOST = 10_000  # windows of one image: number * _MOST + window tells one


def resized(height: int, width: int, *, side: int = SIDE, patch: int = 14) -> tuple[int, int]:
  """(height, width) with a short side of `side` pixels and the same aspect; then each up to a
  multiple of `patch`.

  The last step stretches the image by less than a patch, as the notebook does; nothing is cut off
  or padded. (The notebook resizes twice, here it is once.)
  """
  scale = lambda n: side if n == min(height, width) else side * n // min(height, width)
  return tuple(-(-scale(n) // patch) * patch for n in (height, width))


def windows(height: int, width: int, side: int = SIDE, stride: int = STRIDE):
  """Yields (rows, columns), slices of windows of `side` pixels that cover the image; the last ones
  end at its edge.
  """
  starts = lambda n: [
    max(min(i * stride, n - side), 0) for i in range(max(n - side + stride - 1, 0) // stride + 1)
  ]
  for top in starts(height):
    for left in starts(width):
      yield slice(top, min(top + side, height)), slice(left, min(left + side, width))


@dataclasses.dataclass(frozen=True)
class Windows:
  """side, stride: pixels of a window, and from one to the next."""

  side: int
  stride: int

  def places(self, shape):
    """Slices (rows, columns) of all windows of an image of `shape` (H, W), in its resized pixels."""
    return list(windows(*self.size(shape), self.side, self.stride))

  def size(self, shape):
    """(height, width) that an image of `shape` (H, W) is resized to."""
    return resized(*shape[:2], side=self.side, patch=1)

  def __call__(self, record):
    """uint8 [side, side, 3]: window number `record['window']`."""
    image = suite_parts.decode(record)
    rows, columns = self.places(image.shape)[record['window']]
    box = columns.start, rows.start, columns.stop, rows.stop
    resized = Image.fromarray(image).resize(self.size(image.shape)[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized.crop(box))

  def masks(self, mask):
    """The mask [H, W] of an image as each window sees it: uint8 [n, side, side]."""
    resized = cv2.resize(mask, self.size(mask.shape)[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return np.stack([resized[place] for place in self.places(mask.shape)])

  def labels(self, logits_nhwK, shape):
    """Class ids [H, W] of an image of `shape`: the mean of its windows' logits at every pixel, then
    the largest.
    """
    places, (height, width) = self.places(shape), self.size(shape)
    count = np.zeros((height, width), np.float32)
    for place in places:
      count[place] += 1
    best, found = np.full(shape[:2], -np.inf, np.float32), np.zeros(shape[:2], np.int64)
    for k in range(
      logits_nhwK.shape[-1]
    ):  # one class at a time: all of them at every pixel would be large
      plane = np.zeros((height, width), np.float32)
      for place, one in zip(places, logits_nhwK[..., k], strict=True):
        plane[place] += _resize(one, (self.side, self.side))
      plane = _resize(plane / count, shape[:2])
      found[plane > best] = k
      best = np.maximum(best, plane)
    return found

  def patches(self, patch_nhwD, shape):
    """The patches of an image as one grid [h, w, D], for a picture: where windows overlap, the last
    one's.
    """
    side = patch_nhwD.shape[1]
    places = [
      [round(one.start * side / self.side) for one in place] for place in self.places(shape)
    ]
    grid = np.zeros(
      [max(starts) + side for starts in zip(*places)] + [patch_nhwD.shape[-1]], np.float32
    )
    for (top, left), one in zip(places, patch_nhwD, strict=True):
      grid[top : top + side, left : left + side] = one
    return grid


class Whole:
  """As Windows, of images that are seen at once, squeezed into a square."""

  def masks(self, mask):
    return mask[None]

  def labels(self, logits_nhwK, shape):
    return segmentation.upsample_argmax(logits_nhwK[0], shape[:2])

  def patches(self, patch_nhwD, shape):
    return patch_nhwD[0]


class Source:
  """Every window of the records of a source as a record of its own."""

  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source) * _MOST

  def __getitem__(self, code):
    return self._source[code // _MOST] | {'window': code % _MOST}


def codes(counts) -> np.ndarray:
  """Numbers in a Source of all windows of some records; counts: number of a record -> how many it
  has.
  """
  return np.array(
    [number * _MOST + i for number, count in counts.items() for i in range(count)], np.int64
  )


def by_image(codes) -> list[np.ndarray]:
  """Positions of the windows of each image among codes, which stand together."""
  return np.split(np.arange(len(codes)), np.flatnonzero(np.diff(np.asarray(codes) // _MOST)) + 1)


def _resize(plane, shape):
  return cv2.resize(np.ascontiguousarray(plane), shape[::-1], interpolation=cv2.INTER_LINEAR)

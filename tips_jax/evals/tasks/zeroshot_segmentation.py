"""Zero-shot segmentation as TIPSv2 does it (google-deepmind/tips,
pytorch/TIPS_zeroshot_segmentation.ipynb).

The patches are the values of the last block (`models.vit.inspect(values=True)`, after MaskCLIP), a
class is the mean of its texts in the nine templates of TCL (`prompts.TEMPLATES['tcl9']`,
`zeroshot.class_embeddings`), and a pixel is of the class with the largest cosine. Two ways to see
an image whose short side is 448 pixels:

whole: all of it at once; the cosines are resized to the mask. The paper's default; its shape
differs by image.
slide: windows of 448 pixels every 336, as in TCL: cosines at every pixel, softmax over the classes,
averaged where windows overlap, then resized to the mask. All windows have one shape.

Resizing of scores is bilinear with half-pixel centers. Background: data sets with a background
class (VOC21, PC60) give it a text like any other, 'background'; or
`background` is the cosine that stands for it, as TCL's constant. What TIPSv2's authors chose is not
published: their notebook has ADE150 alone, where there is none. VOC20, PC59 and ADE150 leave those
pixels out (`without_background`).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tips_jax.core import strict
from tips_jax.core.errors import InputError
from tips_jax.data.ingest.checks import VOID
from tips_jax.evals.features import reading as features
from tips_jax.evals.features.windows import SIDE, STRIDE, resized, windows
from tips_jax.evals.probes import masks

MODES = ('whole', 'slide')
_ROWS = 16  # rows of pixels whose scores are held at once
_ROUND = 64  # shapes are rounded up to this many pixels or patches, so that few are compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmenter:
  """Patches -> class ids.

  classes: [M, E], one row for each text vector. owner: [M], the class of each row, where a class
  has several: its largest cosine counts; None: row i is class i. background: a cosine; it becomes
  class 0, and the others move up by
  one. side, stride, patch: pixels of the short side and of a window, between windows, of a patch.
  """

  classes: np.ndarray
  owner: np.ndarray | None = None
  background: float | None = None
  mode: str = 'whole'
  side: int = SIDE
  stride: int = STRIDE
  patch: int = 14

  def __post_init__(self):
    if self.mode not in MODES:
      raise strict.unknown('zero-shot segmentation: mode', self.mode, MODES)
    if self.side % self.patch or self.mode == 'slide' and not 0 < self.stride <= self.side:
      raise InputError(
        f'zero-shot segmentation: got side {self.side}, stride {self.stride} and patch '
        f'{self.patch}; '
        'expected a side of whole patches, and a stride of at most a side'
      )
    if self.owner is not None:
      known = sorted({int(k) for k in self.owner})
      if len(self.owner) != len(self.classes) or known != list(range(len(known))):
        raise InputError(
          f'zero-shot segmentation: got owners {known} of {len(self.owner)} rows, and '
          f'{len(self.classes)} vectors; expected a class for each, from 0 on without a gap'
        )

  @property
  def count(self) -> int:
    """Number of classes, with the background."""
    named = len(self.classes) if self.owner is None else int(max(self.owner)) + 1
    return named + (self.background is not None)

  def size(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) that an image is resized to: see `resized`."""
    return resized(height, width, side=self.side, patch=self.patch if self.mode == 'whole' else 1)

  def views(self, image_HWC) -> np.ndarray:
    """What the encoder must see of an image uint8 [H, W, 3]: uint8 [n, h, w, 3], the whole image or
    all its windows.
    """
    height, width = self.size(*image_HWC.shape[:2])
    image = np.asarray(Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BICUBIC))
    if self.mode == 'whole':
      return image[None]
    return np.stack(
      [image[rows, columns] for rows, columns in windows(height, width, self.side, self.stride)]
    )

  def scores(self, patches_nhwE, shape) -> np.ndarray:
    """Scores [h, w, K] of the value patches of all views of an image of `shape` (H, W): cosines or
    probabilities.
    """
    cosines = _cosines(self.classes, patches_nhwE, self.owner, self.background)
    if self.mode == 'whole':
      return cosines[0]
    height, width = self.size(*shape[:2])
    return slide(cosines, height, width, side=self.side, stride=self.stride)

  def predict(self, patches_nhwE, shape, *, size=None) -> np.ndarray:
    """Class ids int32 of an image of `shape` (H, W), at the resolution `size` of the mask (default:
    the image's).
    """
    return labels(self.scores(patches_nhwE, shape), size or shape[:2])


def apart(names) -> tuple[tuple[str, ...], np.ndarray]:
  """(every name of every class, the class of each): so that the largest cosine counts (`owner`),
  not the mean text.
  """
  names = [(one,) if isinstance(one, str) else tuple(one) for one in names]
  return tuple(n for one in names for n in one), np.repeat(
    np.arange(len(names)), [len(one) for one in names]
  )


def cosines(classes_ME, patch_hwE, *, owner=None, background=None) -> np.ndarray:
  """Cosines [h, w, K] of patches to classes; owner and background as in `Segmenter`. Broken
  patches: 0 to all.
  """
  return _cosines(classes_ME, np.asarray(patch_hwE)[None], owner, background)[0]


def slide(
  cosines_nhwK, height: int, width: int, *, side: int = SIDE, stride: int = STRIDE
) -> np.ndarray:
  """Probabilities [height, width, K]: the mean over the windows of the softmax of their cosines at
  every pixel.
  """
  places = list(windows(height, width, side, stride))
  if len(places) != len(cosines_nhwK):
    raise InputError(
      f'zero-shot segmentation: got {len(cosines_nhwK)} views of {height} x {width} pixels; '
      'expected '
      f'{len(places)} windows'
    )
  total = np.zeros((height, width, cosines_nhwK.shape[-1]), np.float32)
  count = np.zeros((height, width, 1), np.float32)
  for place, one in zip(places, cosines_nhwK):
    shape = total[place].shape[:2]
    total[place] += _softmax(
      one, _between(one.shape[0], shape[0]), _between(one.shape[1], shape[1])
    )
    count[place] += 1
  return total / count


def labels(scores_hwK, size) -> np.ndarray:
  """Scores, bilinearly resized to size (H, W), to class ids int32 [H, W]; of equal scores the
  lowest class.
  """
  scores, (height, width) = np.asarray(scores_hwK), size
  rows, columns = _between(scores.shape[0], height), _between(scores.shape[1], width)
  up = lambda n: -(-n // _ROUND) * _ROUND
  scores = np.pad(scores, [(0, up(n) - n) for n in scores.shape[:2]] + [(0, 0)])
  rows, columns = (
    tuple(np.pad(x, (0, up(n) - n)) for x in line) for line, n in ((rows, height), (columns, width))
  )
  return np.asarray(_labels(scores, rows, columns))[:height, :width]


def without_background(mask) -> np.ndarray:
  """A mask whose class 0 does not count: it becomes void (255), and the other ids move down by
  one.
  """
  mask = np.asarray(mask, np.int64)
  return np.where((mask == 0) | (mask == VOID), VOID, mask - 1)


class SegmentationScorer:
  """Counts predictions against masks, void (255) left out. `counts` [K, K] int64: (truth,
  prediction) pixels.
  """

  def __init__(self, classes: int):
    self.counts = np.zeros((classes, classes), np.int64)

  def __call__(self, predicted, mask):
    """Class ids and mask of one shape. Raises InputError for ids of classes that there are not."""
    predicted, mask, size = np.asarray(predicted), np.asarray(mask), len(self.counts)
    if predicted.shape != mask.shape:
      raise InputError(
        f'zero-shot segmentation: got ids {predicted.shape} and a mask {mask.shape}; expected one '
        'shape'
      )
    known = mask != VOID
    truth, found = mask[known], predicted[known]
    if max(truth.max(initial=0), found.max(initial=0)) >= size:
      raise InputError(
        f'zero-shot segmentation: got class {truth.max(initial=0)} in a mask and '
        f'{found.max(initial=0)} in a prediction; expected ids below {size}, the number of classes'
      )
    self.counts += masks.confusion(truth, found, size=size)

  def classes(self) -> np.ndarray:
    """Intersection over union [K]; nan for a class that is neither in the truth nor predicted."""
    return masks.class_iou(self.counts)

  def result(self) -> dict[str, float]:
    """'miou', over the classes that occur in the truth or a prediction, and 'pixel_accuracy'; nan
    without pixels.
    """
    total = int(self.counts.sum())
    return {
      'miou': masks.mean_iou(self.counts),
      'pixel_accuracy': int(np.trace(self.counts)) / total if total else float('nan'),
    }

  def chance(self) -> dict[str, float]:
    """What classes drawn evenly for every pixel score on the masks that were counted."""
    truth, classes = self.counts.sum(1), len(self.counts)
    hit = truth / classes
    union = truth + truth.sum() / classes - hit
    return (
      {'miou': float((hit / union).mean()), 'pixel_accuracy': 1 / classes}
      if truth.any()
      else self.result()
    )


def evaluate(encode, examples, segmenter: Segmenter, *, visit=None) -> SegmentationScorer:
  """Scores (image uint8 [H, W, 3], mask [h, w]) pairs; `.result()` holds the metrics.

  encode: uint8 [n, H, W, 3] -> value patches [n, h, w, E] in the space of the texts. visit(image,
  ids, mask), if given, sees every prediction.
  """
  scorer = SegmentationScorer(segmenter.count)
  for image, mask in examples:
    predicted = segmenter.predict(encode(segmenter.views(image)), image.shape, size=mask.shape)
    scorer(predicted, mask)
    if visit:
      visit(image, predicted, mask)
  return scorer


def _cosines(classes_ME, patches_nhwE, owner, background):
  classes, patches = features.normalize(features.finite(classes_ME)), features.finite(patches_nhwE)
  if classes.ndim != 2 or patches.shape[-1] != classes.shape[1]:
    raise InputError(
      f'zero-shot segmentation: got patches {patches.shape} and classes {classes.shape}; expected '
      '[n, h, w, E] and [M, E]'
    )
  found = features.normalize(patches) @ classes.T
  if owner is not None:
    owner = np.asarray(owner)
    found = np.stack([found[..., owner == k].max(-1) for k in range(owner.max() + 1)], -1)
  if background is not None:
    found = np.concatenate([np.full((*found.shape[:-1], 1), background, np.float32), found], -1)
  return found


def _between(n, m):
  """For each of m pixels over n cells: the cell before its center, the cell after it, and the
  weight of that.
  """
  x = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
  low = x.astype(np.int32)
  return low, np.minimum(low + 1, n - 1).astype(np.int32), (x - low).astype(np.float32)


def _resize_rows(scores_hwK, row, columns):
  """One row [W, K] of the resized scores."""
  (low, high, weight), (left, right, share) = row, columns
  line = scores_hwK[low] * (1 - weight) + scores_hwK[high] * weight
  return line[left] * (1 - share[:, None]) + line[right] * share[:, None]


@jax.jit
def _labels(scores_hwK, rows, columns):
  one = lambda row: jnp.argmax(_resize_rows(scores_hwK, row, columns), -1).astype(jnp.int32)
  return jax.lax.map(one, rows, batch_size=_ROWS)


@jax.jit
def _softmax(scores_hwK, rows, columns):
  return jax.lax.map(
    lambda row: jax.nn.softmax(_resize_rows(scores_hwK, row, columns)), rows, batch_size=_ROWS
  )

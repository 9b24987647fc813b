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

Resizing of scores is bilinear with half-pixel centers. Data sets with a background class (VOC21,
PC60) give it a text like any other, 'background'; VOC20, PC59 and ADE150 leave those pixels out.
What TIPSv2's authors chose is not published: their notebook has ADE150 alone, where there is none.
"""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tips_jax.core import strict, vectors
from tips_jax.core.errors import InputError
from tips_jax.data.ingest.checks import VOID
from tips_jax.evals.datasets import protocols
from tips_jax.evals.features import reading, splits
from tips_jax.evals.features.splits import TaskInputs
from tips_jax.evals.features.windows import SIDE, STRIDE, resized, windows
from tips_jax.evals.probes import masks
from tips_jax.evals.tasks import prompts, zeroshot
from tips_jax.evals.tasks.common import (
  SEGMENTATION_METRICS,
  class_names,
  floats,
  whole_patches,
)
from tips_jax.evals.tasks.spec import Result, TaskSpec

MODES = ('whole', 'slide')
_ROWS = 16  # rows of pixels whose scores are held at once
_ROUND = 64  # shapes are rounded up to this many pixels or patches, so that few are compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmenter:
  """Patches -> class ids.

  classes: [K, E]. side, stride, patch: pixels of the short side and of a window, between windows,
  of a patch.
  """

  classes: np.ndarray
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

  @property
  def count(self) -> int:
    """Number of classes."""
    return len(self.classes)

  def size(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) that an image is resized to: see `resized`."""
    return resized(height, width, side=self.side, patch=self.patch if self.mode == 'whole' else 1)

  def views(self, image_HWC: np.ndarray) -> np.ndarray:
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

  def scores(self, patches_nhwE: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Scores [h, w, K] of the value patches of all views of an image of `shape` (H, W): cosines or
    probabilities.
    """
    cosines_nhwK = cosines(self.classes, patches_nhwE)
    if self.mode == 'whole':
      return cosines_nhwK[0]
    height, width = self.size(*shape[:2])
    return slide(cosines_nhwK, height, width, side=self.side, stride=self.stride)

  def predict(
    self, patches_nhwE: np.ndarray, shape: tuple[int, ...], *, size: tuple[int, int] | None = None
  ) -> np.ndarray:
    """Class ids int32 of an image of `shape` (H, W), at the resolution `size` of the mask (default:
    the image's).
    """
    return labels(self.scores(patches_nhwE, shape), size or shape[:2])


def slide(
  cosines_nhwK: np.ndarray, height: int, width: int, *, side: int = SIDE, stride: int = STRIDE
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


def labels(scores_hwK: np.ndarray, size: tuple[int, int]) -> np.ndarray:
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


def cosines(classes_ME: np.ndarray, patches_nhwE: np.ndarray) -> np.ndarray:
  """Cosines [n, h, w, M] of patches to classes. Broken patches: 0 to all."""
  classes = vectors.unit(reading.finite(classes_ME))
  patches = reading.finite(patches_nhwE)
  if classes.ndim != 2 or patches.shape[-1] != classes.shape[1]:
    raise InputError(
      f'zero-shot segmentation: got patches {patches.shape} and classes {classes.shape}; expected '
      '[n, h, w, E] and [M, E]'
    )
  return vectors.unit(patches) @ classes.T


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


def measure(work: TaskInputs) -> dict[str, Any]:
  """Zero-shot segmentation: each patch takes the class whose texts lie nearest. Images of one shape
  go together.
  """
  job, o = work.evaluation, work.evaluation.options
  names = class_names(job)
  classes = zeroshot.class_embeddings(work.texts, names, prompts.templates(o['templates']))
  segmenter = _segmenter(work, classes)
  side = segmenter.side
  field = 'value_patch' if o['value_attention'] else 'patch'
  scorer, examples, numbers = (
    SegmentationScorer(segmenter.count),
    [],
    work.parts.numbers(job, 'test'),
  )
  shown = set(numbers[reading.records(numbers, splits.EXAMPLES)].tolist())
  groups = _by_shape(job.data.source(job.splits['test']), numbers, segmenter)
  for size, group in groups.items():
    views = [
      work.parts.extract(
        [job],
        job.splits['test'],
        group,
        _View(segmenter, number),
        outputs={field},
        key=['aspect', segmenter.mode, side, segmenter.stride, *size, number],
      )
      for number in range(_views(segmenter, size))
    ]
    part = views[0]
    for i in range(len(part)):
      truth, shape = job.task.mask_ids(part.mask(i)), splits.header(part.record(i))
      found = segmenter.predict(
        np.stack([floats(view.arrays[field][i]) for view in views]), shape, size=truth.shape
      )
      scorer(found, truth)
      if int(part.rows[i]) in shown:
        examples.append({'image': part.image(i), 'truth': truth, 'predicted': found})
  return {
    'metrics': scorer.result(),
    'chance': scorer.chance(),
    'examples': examples,
    'confusion': scorer.counts,
    'classes': tuple(one if isinstance(one, str) else one[0] for one in names),
  }


def _segmenter(work, classes):
  o = work.evaluation.options
  side = whole_patches(work.evaluation.size or o['size'], work.encoder)
  return Segmenter(
    classes=classes,
    mode=o['mode'],
    side=side,
    stride=min(o['stride'], side),
    patch=work.encoder.patch,
  )


def cells(work: TaskInputs, shape: tuple[int, ...]) -> int:
  """Patches in all views of an image of `shape` (H, W) for zero-shot masks."""
  segmenter = _segmenter(work, np.zeros((1, 1)))
  size = segmenter.size(*shape)
  seen = size if segmenter.mode == 'whole' else (segmenter.side,) * 2
  return _views(segmenter, size) * int(np.prod([n // segmenter.patch for n in seen]))


class _View:
  """View `number` of an image as a Segmenter wants it: the whole, or a window."""

  def __init__(self, segmenter, number):
    self._segmenter, self._number = segmenter, number

  def __call__(self, record):
    return self._segmenter.views(splits.decode(record))[self._number]


def _views(segmenter, size):
  if segmenter.mode == 'whole':
    return 1
  return len(list(windows(*size, segmenter.side, segmenter.stride)))


def _by_shape(source, numbers, segmenter):
  """Numbers of the readable records by the size that their images are resized to."""
  groups = {}
  for number in numbers.tolist():
    try:
      height, width = splits.header(source[number])
    except ValueError as error:
      logging.warning('evaluation leaves out record %d, which cannot be read: %s', number, error)
    else:
      groups.setdefault(segmenter.size(height, width), []).append(number)
  return {size: np.array(group) for size, group in sorted(groups.items())}


def _draw(result: Result) -> bytes | None:
  from tips_jax.evals.report import plotting  # matplotlib is slow to import

  return plotting.segmented(result, overlay=True)


SPEC = TaskSpec(
  name='zeroshot_segmentation',
  title='Zero-shot segmentation',
  caption=(
    'Each patch takes the class whose texts lie nearest, drawn over the image beside the '
    'truth: good overlays cover whole objects and stop at their outlines.'
  ),
  measure=measure,
  metrics=SEGMENTATION_METRICS,
  draw=_draw,
  roles=('test',),
  outputs=('value_patch',),
  annotation='mask',
  needs_text=True,
  shape='aspect',
  cells=cells,
  constants=protocols.ZEROSHOT_SEGMENTATION,
  size_constant='size',
)

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
import functools
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
from tips_jax.evals.features.windows import SIDE, STRIDE, Place, resized, windows
from tips_jax.evals.probes import masks
from tips_jax.evals.tasks import drawing, prompts, zeroshot
from tips_jax.evals.tasks.common import (
  SEGMENTATION_METRICS,
  check_labeled,
  class_names,
  floats,
  readable,
  synonyms,
  whole_patches,
)
from tips_jax.evals.tasks.spec import TaskSpec

MODES = ('whole', 'slide')
# Rows of pixels whose scores are held at once: those of ADE150 at every pixel would be a GB.
_ROWS = 16
# Shapes are rounded up to this many pixels or patches, so that few are compiled.
_ROUND = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmenter:
  """Patches -> class ids."""

  # Embeddings [K, E].
  classes: np.ndarray
  mode: str = 'whole'
  # Pixels of the short side, and of a window.
  side: int = SIDE
  # Pixels between windows.
  stride: int = STRIDE
  # Pixels of a patch.
  patch: int = 14

  def __post_init__(self):
    if self.mode not in MODES:
      raise strict.unknown('zero-shot segmentation: mode', self.mode, MODES)
    if self.side % self.patch or self.mode == 'slide' and not 0 < self.stride <= self.side:
      raise InputError(
        f'zero-shot segmentation: got side {self.side}, stride {self.stride} and patch '
        f'{self.patch}; expected a side of whole patches, and a stride of at most a side'
      )

  def size(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) that an image is resized to: see `resized`."""
    # Windows are whole patches already; an image as a whole must become so.
    patch = 1
    if self.mode == 'whole':
      patch = self.patch
    return resized(height, width, side=self.side, patch=patch)

  def places(self, height: int, width: int) -> list[Place]:
    """The views of an image that was resized to `height` and `width`: (rows, columns) of each."""
    if self.mode == 'whole':
      return [(slice(0, height), slice(0, width))]
    return list(windows(height, width, self.side, self.stride))

  def views(self, image_HWC: np.ndarray) -> np.ndarray:
    """What the encoder must see of an image uint8 [H, W, 3]: uint8 [n, h, w, 3], the whole image or
    all its windows.
    """
    height, width = self.size(*image_HWC.shape[:2])
    image = np.asarray(Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BICUBIC))
    return np.stack([image[place] for place in self.places(height, width)])

  def scores(self, patches_nhwE: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Scores [h, w, K] of the value patches of all views of an image of `shape` (H, W): cosines or
    probabilities.
    """
    cosines_nhwK = cosines(self.classes, patches_nhwE)
    if self.mode == 'whole':
      return cosines_nhwK[0]
    height, width = self.size(*shape[:2])
    places = self.places(height, width)
    if len(places) != len(cosines_nhwK):
      raise InputError(
        f'zero-shot segmentation: got {len(cosines_nhwK)} views of {height} x {width} pixels; '
        f'expected {len(places)} windows'
      )
    total = np.zeros((height, width, cosines_nhwK.shape[-1]), np.float32)
    count = np.zeros((height, width, 1), np.float32)
    for place, cosines_hwK in zip(places, cosines_nhwK):
      # Probabilities are averaged, not cosines, as TCL does: a window may be surer than another.
      rows = _between(cosines_hwK.shape[0], total[place].shape[0])
      columns = _between(cosines_hwK.shape[1], total[place].shape[1])
      total[place] += _softmax(cosines_hwK, rows, columns)
      count[place] += 1
    return total / count

  def predict(
    self, patches_nhwE: np.ndarray, shape: tuple[int, ...], *, size: tuple[int, int] | None = None
  ) -> np.ndarray:
    """Class ids int32 of an image of `shape` (H, W), at the resolution `size` of the mask (default:
    the image's).
    """
    return labels(self.scores(patches_nhwE, shape), size or shape[:2])


def labels(scores_hwK: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Scores, bilinearly resized to size (H, W), to class ids int32 [H, W]; of equal scores the
  lowest class.
  """
  scores = np.asarray(scores_hwK)
  height, width = size
  # Nothing reads what is padded here: the weights are those of the true shapes.
  rows = _padded(_between(scores.shape[0], height))
  columns = _padded(_between(scores.shape[1], width))
  scores = np.pad(scores, [*((0, -n % _ROUND) for n in scores.shape[:2]), (0, 0)])
  return np.asarray(_labels(scores, rows, columns))[:height, :width]


class SegmentationScorer:
  """Counts predictions against masks, void (255) left out. `counts` [K, K] int64: (truth,
  prediction) pixels.
  """

  def __init__(self, classes: int):
    self.counts = np.zeros((classes, classes), np.int64)

  def __call__(self, predicted, mask):
    """Class ids and mask of one shape. Raises InputError for ids of classes that there are not."""
    predicted = np.asarray(predicted)
    mask = np.asarray(mask)
    size = len(self.counts)
    if predicted.shape != mask.shape:
      raise InputError(
        f'zero-shot segmentation: got ids {predicted.shape} and a mask {mask.shape}; '
        'expected one shape'
      )
    known = mask != VOID
    truth = mask[known]
    predicted = predicted[known]
    if max(truth.max(initial=0), predicted.max(initial=0)) >= size:
      raise InputError(
        f'zero-shot segmentation: got class {truth.max(initial=0)} in a mask and '
        f'{predicted.max(initial=0)} in a prediction; expected ids below {size}, the '
        'number of classes'
      )
    self.counts += masks.confusion(truth, predicted, size=size)

  def result(self) -> dict[str, float]:
    """'miou', over the classes that occur in the truth or a prediction, and 'pixel_accuracy'; nan
    without pixels.
    """
    total = int(self.counts.sum())
    if not total:
      return {'miou': float('nan'), 'pixel_accuracy': float('nan')}
    right = int(np.trace(self.counts))
    return {'miou': masks.mean_iou(self.counts), 'pixel_accuracy': right / total}

  def chance(self) -> dict[str, float]:
    """What classes drawn evenly for every pixel score on the masks that were counted."""
    truth = self.counts.sum(1)
    classes = len(self.counts)
    if not truth.any():
      return self.result()
    # Expected counts; every class is predicted, so that all of them are in the mean.
    hit = truth / classes
    union = truth + truth.sum() / classes - hit
    return {'miou': float((hit / union).mean()), 'pixel_accuracy': 1 / classes}


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


def _padded(interpolation):
  return tuple(np.pad(x, (0, -len(x) % _ROUND)) for x in interpolation)


def _resize_rows(scores_hwK, row, columns):
  """One row [W, K] of the resized scores."""
  low, high, weight = row
  left, right, share = columns
  line = scores_hwK[low] * (1 - weight) + scores_hwK[high] * weight
  return line[left] * (1 - share[:, None]) + line[right] * share[:, None]


@jax.jit
def _labels(scores_hwK, rows, columns):
  def classes(row):
    return jnp.argmax(_resize_rows(scores_hwK, row, columns), -1).astype(jnp.int32)

  return jax.lax.map(classes, rows, batch_size=_ROWS)


@jax.jit
def _softmax(scores_hwK, rows, columns):
  def probabilities(row):
    return jax.nn.softmax(_resize_rows(scores_hwK, row, columns))

  return jax.lax.map(probabilities, rows, batch_size=_ROWS)


def measure(inputs: TaskInputs) -> dict[str, Any]:
  """Zero-shot segmentation: each patch takes the class whose texts lie nearest."""
  evaluation = inputs.evaluation
  options = evaluation.options
  split = evaluation.splits['test']
  names = class_names(evaluation)
  templates = prompts.templates(options['templates'])
  segmenter = _segmenter(inputs, zeroshot.class_embeddings(inputs.texts, names, templates))
  field = 'patch'
  if options['value_attention']:
    field = 'value_patch'
  scorer = SegmentationScorer(len(names))
  examples = []
  numbers = inputs.parts.numbers(evaluation, 'test')
  drawn = set(numbers[reading.records(numbers, splits.EXAMPLES)].tolist())
  # Images of one shape go together: the encoder is compiled for each.
  groups = {}
  for number, shape in readable(evaluation.data.source(split), numbers):
    groups.setdefault(segmenter.size(*shape), []).append(number)
  for size, group in sorted(groups.items()):
    views = []
    for number in range(len(segmenter.places(*size))):
      part = inputs.parts.extract(
        [evaluation],
        split,
        np.array(group),
        functools.partial(_view, segmenter, number),
        outputs={field},
        key=['aspect', segmenter.mode, segmenter.side, segmenter.stride, *size, number],
      )
      views.append(part)
    part = views[0]
    for i in range(len(part)):
      truth = evaluation.task.mask_ids(part.mask(i))
      patches = np.stack([floats(view.arrays[field][i]) for view in views])
      predicted = segmenter.predict(patches, splits.header(part.record(i)), size=truth.shape)
      scorer(predicted, truth)
      if int(part.rows[i]) in drawn:
        examples.append({'image': part.image(i), 'truth': truth, 'predicted': predicted})
  check_labeled(scorer.counts, evaluation, 'test')
  return {
    'metrics': scorer.result(),
    'chance': scorer.chance(),
    'examples': examples,
    'confusion': scorer.counts,
    'classes': tuple(synonyms(name)[0] for name in names),
  }


def _segmenter(inputs, classes):
  options = inputs.evaluation.options
  side = whole_patches(inputs.evaluation.size or options['size'], inputs.encoder)
  return Segmenter(
    classes=classes,
    mode=options['mode'],
    side=side,
    stride=min(options['stride'], side),
    patch=inputs.encoder.patch,
  )


def cells(inputs: TaskInputs, shape: tuple[int, ...]) -> int:
  """Patches in all views of an image of `shape` (H, W)."""
  # How an image is seen does not depend on the classes, whose texts need the encoder.
  segmenter = _segmenter(inputs, np.zeros((1, 1)))
  patches = 0
  for rows, columns in segmenter.places(*segmenter.size(*shape)):
    height = (rows.stop - rows.start) // segmenter.patch
    patches += height * ((columns.stop - columns.start) // segmenter.patch)
  return patches


def _view(segmenter, number, record):
  """View `number` of the image of a record."""
  return segmenter.views(splits.decode(record))[number]


SPEC = TaskSpec(
  name='zeroshot_segmentation',
  title='Zero-shot segmentation',
  caption=(
    'Each patch takes the class whose texts lie nearest, drawn over the image beside the '
    'truth: good overlays cover whole objects and stop at their outlines.'
  ),
  measure=measure,
  metrics=SEGMENTATION_METRICS,
  draw=drawing.overlaid,
  roles=('test',),
  outputs=('value_patch',),
  annotation='mask',
  needs_text=True,
  shape='aspect',
  cells=cells,
  constants=protocols.ZEROSHOT_SEGMENTATION,
  size_constant='size',
)

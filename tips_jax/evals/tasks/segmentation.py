"""Linear segmentation: classes of pixels, by a linear probe on the patches."""

import os
from typing import Any

import numpy as np

from tips_jax.data.ingest.checks import VOID
from tips_jax.evals.datasets import protocols
from tips_jax.evals.features import splits, windows
from tips_jax.evals.features.splits import TaskInputs
from tips_jax.evals.probes import logistic, masks
from tips_jax.evals.tasks import drawing
from tips_jax.evals.tasks.common import (
  MASK_IDS,
  SEGMENTATION_METRICS,
  answers_without_features,
  check_labeled,
  floats,
  readable,
  share_right,
  whole_patches,
)
from tips_jax.evals.tasks.spec import TaskSpec


def measure(inputs: TaskInputs) -> dict[str, Any]:
  """A linear probe on the patches of the last layer, measured on images at their own aspect ratio.

  The protocol of DINOv2 (mmseg: BatchNorm and a 1x1 convolution, which is one linear layer on
  standardized patches): short side `crop`, windows of `crop` pixels every `stride`, the logits
  averaged where windows overlap, mIoU over all pixels of the split at the resolution of the masks.
  What differs: features are cached, so the probe learns from the windows that cover the training
  images, not from random, colored, mirrored crops; a patch has the commonest class of its pixels;
  and the probe is brought to its optimum (L-BFGS), not through 40,000 steps. Its strength is chosen
  on held-out training images. Mode 'square' squeezes whole images into one window.
  """
  train, view, train_images = _windowed(inputs, 'train')
  test, _, test_images = _windowed(inputs, 'test')
  probe, pixels, used = _fit_probe(inputs, train, view, train_images)
  counts = np.zeros((MASK_IDS, MASK_IDS), np.int64)
  examples = []
  drawn = set(test.shown())
  for rows in test_images:
    patches = floats(test.arrays['patch'][rows])
    truth = test.mask(rows[0])
    predicted = view.labels(probe.logits(patches), truth.shape)
    known = truth != VOID
    counts += masks.confusion(truth[known], predicted[known], size=MASK_IDS)
    # Several windows of one image may be shown: the limit is on images.
    if drawn & set(rows.tolist()) and len(examples) < splits.EXAMPLES:
      examples.append(
        {
          'image': test.image(rows[0]),
          'truth': truth,
          'predicted': predicted,
          'patch': view.patches(patches, truth.shape),
        }
      )
  check_labeled(counts, inputs.evaluation, 'test')
  result = {
    'metrics': {'miou': masks.mean_iou(counts), 'pixel_accuracy': share_right(counts)},
    'chance': {'miou': masks.majority(pixels, counts.sum(1))},
    'baselines': _baselines(inputs, train, train_images, test, test_images, np.flatnonzero(pixels)),
    'examples': examples,
    'options': {'patches': used},
    'chosen': {'l2': probe.l2},
  }
  names = tuple(inputs.evaluation.task.classes or inputs.evaluation.data.mask_classes)
  if names:
    result |= {'classes': names, 'confusion': counts[: len(names), : len(names)]}
  return result


def _baselines(inputs, train, train_images, test, test_images, classes):
  """Metrics of the answers without features, which know the `classes` of train, and of the oracle;
  images are squeezed into one window.
  """
  grid = train.arrays['patch'].shape[1:3]

  def cells(part, i):
    labels = masks.patch_labels(part.mask(i), grid)
    known = np.isin(labels, classes)
    return (labels[..., None] == classes).astype(np.float32), known

  answers = answers_without_features(
    train,
    [rows[0] for rows in train_images],
    test,
    [rows[0] for rows in test_images],
    grid=grid,
    patch=inputs.encoder.patch,
    cells=cells,
  )
  counts = {}
  for i, values in answers:
    truth = test.mask(i)
    known = truth != VOID
    for name, value in values.items():
      predicted = classes[masks.upsample_argmax(value, truth.shape)]
      confusion = masks.confusion(truth[known], predicted[known], size=MASK_IDS)
      counts[name] = counts.get(name, 0) + confusion
  metrics = {}
  for name, table in counts.items():
    metrics[name] = {'miou': masks.mean_iou(table), 'pixel_accuracy': share_right(table)}
  return metrics


def _windowed(inputs, role):
  """(SplitFeatures of all windows of the images of a split, what sees through them, the rows of
  each image).
  """
  evaluation = inputs.evaluation
  if evaluation.shape != 'aspect':
    part = inputs.part(role)
    return part, windows.Whole(), np.arange(len(part))[:, None]
  view = _windows(inputs)
  split = evaluation.splits[role]
  source = evaluation.data.source(split)
  counts = {}
  # The headers say how many windows there are, so that no image is decoded twice.
  for number, shape in readable(source, inputs.parts.numbers(evaluation, role)):
    counts[number] = len(view.places(shape))
  part = inputs.parts.extract(
    [evaluation],
    split,
    windows.codes(counts),
    view,
    outputs={'patch'},
    source=windows.Source(source),
    key=['windows', view.side, view.stride],
  )
  return part, view, windows.by_image(part.rows)


def _windows(inputs):
  """The windows of an evaluation: whole patches, at least as large as asked."""
  options = inputs.evaluation.options
  side = whole_patches(inputs.evaluation.size or options['crop'], inputs.encoder)
  # The share by which windows overlap is the protocol's at every size.
  return windows.Windows(side, max(1, side * options['stride'] // options['crop']))


def cells(inputs: TaskInputs, shape: tuple[int, int]) -> int:
  """Patches in all windows of an image of `shape` (H, W)."""
  view = _windows(inputs)
  return len(view.places(shape)) * (view.side // inputs.encoder.patch) ** 2


def _fit_probe(inputs, train, view, images):
  """(LinearProbe on training patches, pixels [256] of each class in the masks, patches of a window
  that it learned from: a number or 'all').
  """
  patch = train.arrays['patch']
  width = patch.shape[-1]
  pixels = np.zeros(MASK_IDS, np.int64)
  labels = []
  # The probe holds out whole images: windows of one overlap.
  image_of_window = []
  for number, rows in enumerate(images):
    mask = train.mask(rows[0])
    pixels += np.bincount(mask.ravel(), minlength=MASK_IDS)
    for window in view.masks(mask):
      labels.append(masks.patch_labels(window, patch.shape[1:3]).ravel())
      image_of_window.append(number)
  pixels[VOID] = 0
  chosen = [np.flatnonzero(classes != VOID) for classes in labels]
  total = sum(map(len, chosen))
  check_labeled(total, inputs.evaluation, 'train')
  most = min(inputs.evaluation.options['patches'], _fitting(width))
  used = 'all'
  if total > most:
    # As many of every window, so that no image outweighs the others; sorted, as a file is read.
    used = max(1, most // len(chosen))
    rng = np.random.default_rng(0)
    chosen = [np.sort(rng.permutation(candidates)[:used]) for candidates in chosen]
  counts = list(map(len, chosen))
  # Filled window by window: the features are on the disk, and a second copy may not fit.
  x = np.empty((sum(counts), width), np.float32)
  y = np.empty(len(x), np.int64)
  end = 0
  for window, rows in enumerate(chosen):
    start = end
    end += len(rows)
    x[start:end] = patch[window].reshape(-1, width)[rows]
    y[start:end] = labels[window][rows]
  groups = np.repeat(image_of_window, counts)
  probe = logistic.fit(x, y, classes=int(y.max()) + 1, groups=groups)
  return probe, pixels, used


def _fitting(width):
  """Rows of features that half of the memory holds: the probe has them thrice."""
  try:
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (ValueError, OSError):  # not every system has these names
    return 1 << 40
  return max(1, memory // 2 // (3 * 4 * width))


SPEC = TaskSpec(
  name='segmentation',
  title='Linear segmentation',
  caption=(
    'Test images, their true classes, those that a linear probe reads off the patches, and in '
    'red the pixels it gets wrong: good masks follow the outlines, and red remains only along '
    'borders.'
  ),
  measure=measure,
  metrics=SEGMENTATION_METRICS,
  draw=drawing.segmented,
  outputs=('patch',),
  annotation='mask',
  shape='aspect',
  cells=cells,
  constants=protocols.SEGMENTATION,
  short_constants={'mode': 'square', 'patches': 30_000},
  size_constant='crop',
)

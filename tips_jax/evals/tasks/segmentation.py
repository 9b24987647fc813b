"""Linear segmentation: classes of pixels, by a linear probe on the patches."""

import logging
import os
from typing import Any

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.checks import VOID
from tips_jax.evals.datasets import protocols
from tips_jax.evals.features import splits, windows
from tips_jax.evals.features.splits import TaskInputs
from tips_jax.evals.probes import logistic, masks
from tips_jax.evals.tasks.common import (
  MASK_IDS,
  SEGMENTATION_METRICS,
  floats,
  share_right,
  whole_patches,
)
from tips_jax.evals.tasks.spec import Result, TaskSpec


def measure(work: TaskInputs) -> dict[str, Any]:
  """A linear probe on the patches of the last layer, measured on images at their own aspect ratio.

  The protocol of DINOv2 (mmseg: BatchNorm and a 1x1 convolution, which is one linear layer on
  standardized patches): short side `crop`, windows of `crop` pixels every `stride`, the logits
  averaged where windows overlap, mIoU over all pixels of the split at the resolution of the masks.
  What differs: features are cached, so the probe learns from the windows that cover the training
  images, not from random, colored, mirrored crops; a patch has the commonest class of its pixels;
  and the probe is brought to its optimum (L-BFGS), not through 40,000 steps. Its strength is chosen
  on held-out training images. Mode 'square' squeezes whole images into one window.
  """
  (train, view), (test, _) = _seen(work, 'train'), _seen(work, 'test')
  probe, pixels, used = _patch_probe(work, train, view)
  counts, examples, shown = np.zeros((MASK_IDS, MASK_IDS), np.int64), [], set(test.shown())
  for rows in (
    windows.by_image(test.rows)
    if work.evaluation.shape == 'aspect'
    else np.arange(len(test))[:, None]
  ):
    patches, truth = floats(test.arrays['patch'][rows]), test.mask(rows[0])
    found, known = view.labels(probe.logits(patches), truth.shape), truth != VOID
    counts += masks.confusion(truth[known], found[known], size=MASK_IDS)
    if shown & set(rows.tolist()) and len(examples) < splits.EXAMPLES:
      examples.append(
        {
          'image': test.image(rows[0]),
          'truth': truth,
          'predicted': found,
          'patch': view.patches(patches, truth.shape),
        }
      )
  names = tuple(work.evaluation.task.classes or work.evaluation.data.mask_classes)
  return {
    'metrics': {'miou': masks.mean_iou(counts), 'pixel_accuracy': share_right(counts)},
    'chance': {'miou': masks.majority(pixels, counts.sum(1))},
    'classes': names,
    'examples': examples,
    'options': {'patches': used},
    'chosen': {'l2': probe.l2},
    'confusion': counts[: len(names), : len(names)] if names else None,
  }


def _seen(work, role):
  """(SplitFeatures of all windows of the images of a split, what sees through them)."""
  job = work.evaluation
  if job.shape != 'aspect':
    return work.part(role), windows.Whole()
  view, split = _windows(work), job.splits[role]
  source, counts = job.data.source(split), {}
  for number in work.parts.numbers(job, role).tolist():
    try:
      counts[number] = len(view.places(splits.header(source[number])))
    except ValueError as error:
      logging.warning('evaluation leaves out record %d, which cannot be read: %s', number, error)
  return work.parts.extract(
    [job],
    split,
    windows.codes(counts),
    view,
    outputs={'patch'},
    source=windows.Source(source),
    key=['windows', view.side, view.stride],
  ), view


def _windows(work):
  """The windows of a job: whole patches, at least as large as asked."""
  o = work.evaluation.options
  side = whole_patches(work.evaluation.size or o['crop'], work.encoder)
  return windows.Windows(side, max(1, side * o['stride'] // o['crop']))


def cells(work: TaskInputs, shape: tuple[int, int]) -> int:
  """Patches in all windows of an image of `shape` (H, W)."""
  view = _windows(work)
  return len(view.places(shape)) * (view.side // work.encoder.patch) ** 2


def _patch_probe(work, train, view):
  """(Probe on training patches, pixels [256] of each class in the masks, patches of a window: a
  number or 'all').
  """
  patch, labels, owner, pixels = train.arrays['patch'], [], [], np.zeros(MASK_IDS, np.int64)
  images = (
    windows.by_image(train.rows)
    if work.evaluation.shape == 'aspect'
    else np.arange(len(train))[:, None]
  )
  for number, rows in enumerate(images):
    mask = train.mask(rows[0])
    pixels += np.bincount(mask.ravel(), minlength=MASK_IDS)
    labels += [masks.patch_labels(one, patch.shape[1:3]).ravel() for one in view.masks(mask)]
    owner += [number] * len(rows)
  pixels[VOID] = 0
  chosen = [np.flatnonzero(one != VOID) for one in labels]
  total, used = sum(map(len, chosen)), 'all'
  if not total:
    raise InputError(
      f'{work.evaluation.dataset}: every pixel of the training masks is void; expected classes'
    )
  most = min(work.evaluation.options['patches'], _fitting(patch.shape[-1]))
  if total > most:
    rng, used = np.random.default_rng(0), max(1, most // len(chosen))
    chosen = [np.sort(rng.permutation(one)[:used]) for one in chosen]
  ends = np.cumsum([len(one) for one in chosen])
  x = np.empty((ends[-1], patch.shape[-1]), np.float32)
  for row, (one, end) in enumerate(zip(chosen, ends)):
    x[end - len(one) : end] = patch[row].reshape(-1, x.shape[1])[one]
  y = np.concatenate([label[one] for label, one in zip(labels, chosen)])
  groups = np.repeat(owner, [len(one) for one in chosen])
  return logistic.fit(x, y, classes=int(y.max()) + 1, groups=groups), pixels, used


def _fitting(width):
  """Rows of features that the memory holds: the probe has them thrice."""
  try:
    free = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (ValueError, OSError):  # not every system tells
    return 1 << 40
  return max(1, free // 2 // (3 * 4 * width))


def _draw(result: Result) -> bytes | None:
  from tips_jax.evals.report import plotting  # matplotlib is slow to import

  return plotting.segmented(result)


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
  draw=_draw,
  outputs=('patch',),
  annotation='mask',
  shape='aspect',
  cells=cells,
  constants=protocols.SEGMENTATION,
  short_constants={'mode': 'square', 'patches': 30_000},
  size_constant='crop',
)

"""The tasks of pixels: masks, depth, normals. Each takes a TaskInputs and gives the fields of an
Result.

Everything is measured at the resolution of the annotation.
"""

import functools
import json
import logging
import os
import pathlib

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.checks import VOID
from tips_jax.evals.features import reading as features
from tips_jax.evals.features import splits as suite_parts
from tips_jax.evals.features import windows
from tips_jax.evals.probes import depth, depth_probe, dpt, dpt_train, normals
from tips_jax.evals.probes import logistic as linear
from tips_jax.evals.probes import masks as segmentation
from tips_jax.evals.tasks import prompts, zeroshot
from tips_jax.evals.tasks import zeroshot_segmentation as zs
from tips_jax.evals.tasks.common import class_names

_BATCH = 32  # images whose predictions are held at once
_BASELINE_IMAGES = 2000  # training images that the baselines without features learn from
_IDS = 256  # a mask is uint8
_DEPTH = ('bins', 'min_depth', 'max_depth', 'steps', 'batch', 'learning_rates', 'upsample')
_DPT = {'hidden': 'channels', 'sigloss': 'sig_weight', 'gradient': 'gradient_weight'} | {
  name: name
  for name in (
    'learning_rate',
    'epochs',
    'warmup_epochs',
    'batch',
    'bins',
    'min_depth',
    'max_depth',
    'widths',
  )
}


def segments(work):
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
  counts, examples, shown = np.zeros((_IDS, _IDS), np.int64), [], set(test.shown())
  for rows in (
    windows.by_image(test.rows) if work.job.shape == 'own' else np.arange(len(test))[:, None]
  ):
    patches, truth = _floats(test.arrays['patch'][rows]), test.mask(rows[0])
    found, known = view.labels(probe.logits(patches), truth.shape), truth != VOID
    counts += segmentation.confusion(truth[known], found[known], size=_IDS)
    if shown & set(rows.tolist()) and len(examples) < suite_parts.EXAMPLES:
      examples.append(
        {
          'image': test.image(rows[0]),
          'truth': truth,
          'predicted': found,
          'patch': view.patches(patches, truth.shape),
        }
      )
  names = tuple(work.job.task.classes or work.job.data.mask_classes)
  return {
    'metrics': {'miou': segmentation.mean_iou(counts), 'pixel_accuracy': _right(counts)},
    'chance': {'miou': segmentation.majority(pixels, counts.sum(1))},
    'classes': names,
    'examples': examples,
    'options': {'patches': used},
    'chosen': {'l2': probe.l2},
    'confusion': counts[: len(names), : len(names)] if names else None,
  }


def _seen(work, role):
  """(SplitFeatures of all windows of the images of a split, what sees through them)."""
  job = work.job
  if job.shape != 'own':
    return work.part(role), windows.Whole()
  view, split = _windows(work), job.splits[role]
  source, counts = job.data.source(split), {}
  for number in work.parts.numbers(job, role).tolist():
    try:
      counts[number] = len(view.places(suite_parts.header(source[number])))
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
  o = work.job.options
  side = _whole(work.job.size or o['crop'], work.encoder)
  return windows.Windows(side, max(1, side * o['stride'] // o['crop']))


def window_cells(work, shape):
  """Patches in all windows of an image of `shape` (H, W)."""
  view = _windows(work)
  return len(view.places(shape)) * (view.side // work.encoder.patch) ** 2


def _patch_probe(work, train, view):
  """(Probe on training patches, pixels [256] of each class in the masks, patches of a window: a
  number or 'all').
  """
  patch, labels, owner, pixels = train.arrays['patch'], [], [], np.zeros(_IDS, np.int64)
  images = (
    windows.by_image(train.rows) if work.job.shape == 'own' else np.arange(len(train))[:, None]
  )
  for number, rows in enumerate(images):
    mask = train.mask(rows[0])
    pixels += np.bincount(mask.ravel(), minlength=_IDS)
    labels += [segmentation.patch_labels(one, patch.shape[1:3]).ravel() for one in view.masks(mask)]
    owner += [number] * len(rows)
  pixels[VOID] = 0
  chosen = [np.flatnonzero(one != VOID) for one in labels]
  total, used = sum(map(len, chosen)), 'all'
  if not total:
    raise InputError(
      f'{work.job.dataset}: every pixel of the training masks is void; expected classes'
    )
  most = min(work.job.options['patches'], _fitting(patch.shape[-1]))
  if total > most:
    rng, used = np.random.default_rng(0), max(1, most // len(chosen))
    chosen = [np.sort(rng.permutation(one)[:used]) for one in chosen]
  ends = np.cumsum([len(one) for one in chosen])
  x = np.empty((ends[-1], patch.shape[-1]), np.float32)
  for row, (one, end) in enumerate(zip(chosen, ends)):
    x[end - len(one) : end] = patch[row].reshape(-1, x.shape[1])[one]
  y = np.concatenate([label[one] for label, one in zip(labels, chosen)])
  groups = np.repeat(owner, [len(one) for one in chosen])
  return linear.fit(x, y, classes=int(y.max()) + 1, groups=groups), pixels, used


def _fitting(width):
  """Rows of features that the memory holds: the probe has them thrice."""
  try:
    free = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (ValueError, OSError):  # not every system tells
    return 1 << 40
  return max(1, free // 2 // (3 * 4 * width))


def linear_depth(work):
  """A linear layer to bins of depth; its learning rate is chosen on the last fifth of the training
  images.
  """
  train, test, o = work.part('train'), work.part('test'), work.job.options
  cls, most = work.encoder.cls_names[0], o['max_depth']
  patch, cells = (
    train.arrays['patch'],
    o.get('cells'),
  )  # a patch is so many pixels of truth in training; None: all
  probe = depth_probe.fit(
    patch,
    train.arrays[cls],
    train.depth,
    shape=cells and [cells * n for n in patch.shape[1:3]],
    recipe=depth_probe.DepthRecipe(**{name: o[name] for name in _DEPTH if name in o}),
  )
  scorer, examples, shown = (
    depth.DepthScorer(max_depth=most, crop=o.get('crop')),
    [],
    set(test.shown()),
  )
  for rows in _batches(test):
    patches = _floats(test.arrays['patch'][rows])
    for i, own, found in zip(rows, patches, probe.predict(patches, test.arrays[cls][rows])):
      truth = test.depth(i)
      scorer.add(found, truth)
      if i in shown:
        examples.append(
          {'image': test.image(i), 'truth': _counted(truth, most), 'predicted': found, 'patch': own}
        )
  baselines = depth.baselines(
    train.depth, _some(train), test.depth, range(len(test)), max_depth=most, crop=o.get('crop')
  )
  return {
    'metrics': scorer.result(),
    'chance': baselines['constant'],
    'examples': examples,
    'chosen': {'learning_rate': probe.learning_rate, 'mean_image': baselines['mean_image']},
  }


def decoder(work):
  """A DPT decoder of depth or normals on four layers. Nothing is chosen. It is kept beside the
  results.
  """
  train, test, o = work.part('train'), work.part('test'), work.job.options
  task = work.job.spec.needs
  truth = getattr(train, task)
  trained = _trained(work, train, truth, task)
  scorer = (
    depth.DepthScorer(max_depth=o['max_depth']) if task == 'depth' else normals.NormalScorer()
  )
  examples, shown = [], set(test.shown())
  for rows in _batches(test):
    found = trained.predict([(patch[rows], cls[rows]) for patch, cls in test.intermediate_layers])
    for i, one in zip(rows, found):
      one = one if task == 'depth' else one[..., :3]
      own = getattr(test, task)(i)
      scorer.add(one, own)
      if i in shown:
        own = _counted(own, o['max_depth']) if task == 'depth' else own
        examples.append(
          {
            'image': test.image(i),
            'truth': own,
            'predicted': one,
            'patch': _floats(test.intermediate_layers[-1][0][i]),
          }
        )
  naive = (
    functools.partial(depth.baselines, max_depth=o['max_depth'])
    if task == 'depth'
    else normals.baselines
  )
  baselines = naive(truth, _some(train), getattr(test, task), range(len(test)))
  rename = {'rmse': 'angular_rmse'} if task == 'normals' else {}
  named = lambda values: {rename.get(name, name): value for name, value in values.items()}
  return {
    'metrics': named(scorer.result()),
    'chance': named(baselines['constant']),
    'examples': examples,
    'chosen': {
      'intermediate_layers': dpt.intermediate_layers_of(work.encoder.depth),
      'mean_image': named(baselines['mean_image']),
    },
  }


def _trained(work, train, truth, task):
  """The decoder of a job: out of the cache, or trained; a copy goes to the output, in the official
  layout too.
  """
  o = work.job.options
  options = {ours: o[name] for name, ours in _DPT.items() if name in o}
  kept = work.cache.path('decoders', [train.key, task, json.loads(json.dumps(options))], '.npz')
  if kept.is_file():
    found = dpt_train.load(kept)
  else:
    recipe = dpt_train.DPTRecipe(task=task, **options)
    found = dpt_train.fit(train.intermediate_layers, truth, recipe)
    found.save(kept)
  if work.output:
    folder = pathlib.Path(work.output) / 'decoders'
    folder.mkdir(parents=True, exist_ok=True)
    found.save(folder / f'{work.job.dataset}_{work.job.task.kind}.npz')
    dpt.write_official(
      found.params, folder / f'{work.job.dataset}_{work.job.task.kind}_official.npz', task=task
    )
  return found


def named_segments(work):
  """Zero-shot segmentation: each patch takes the class whose texts lie nearest. Images of one shape
  go together.
  """
  job, o = work.job, work.job.options
  names = class_names(job)
  classes = zeroshot.class_embeddings(work.texts, names, prompts.templates(o['templates']))
  segmenter = _segmenter(work, classes)
  side = segmenter.side
  field = 'value_patch' if o['value_attention'] else 'patch'
  scorer, examples, numbers = (
    zs.SegmentationScorer(segmenter.count),
    [],
    work.parts.numbers(job, 'test'),
  )
  shown = set(numbers[features.records(numbers, suite_parts.EXAMPLES)].tolist())
  groups = _by_shape(job.data.source(job.splits['test']), numbers, segmenter)
  for size, group in groups.items():
    views = [
      work.parts.extract(
        [job],
        job.splits['test'],
        group,
        _View(segmenter, number),
        outputs={field},
        key=['own', segmenter.mode, side, segmenter.stride, *size, number],
      )
      for number in range(_views(segmenter, size))
    ]
    part = views[0]
    for i in range(len(part)):
      truth, shape = job.task.mask_ids(part.mask(i)), suite_parts.header(part.record(i))
      found = segmenter.predict(
        np.stack([_floats(view.arrays[field][i]) for view in views]), shape, size=truth.shape
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
  o = work.job.options
  side = _whole(work.job.size or o['size'], work.encoder)
  return zs.Segmenter(
    classes=classes,
    mode=o['mode'],
    side=side,
    stride=min(o['stride'], side),
    patch=work.encoder.patch,
  )


def view_cells(work, shape):
  """Patches in all views of an image of `shape` (H, W) for zero-shot segmentation."""
  segmenter = _segmenter(work, np.zeros((1, 1)))
  size = segmenter.size(*shape)
  seen = size if segmenter.mode == 'whole' else (segmenter.side,) * 2
  return _views(segmenter, size) * int(np.prod([n // segmenter.patch for n in seen]))


def _whole(pixels, encoder):
  """Pixels of whole patches, at least as many."""
  return -(-pixels // encoder.patch) * encoder.patch


class _View:
  """View `number` of an image as a Segmenter wants it: the whole, or a window."""

  def __init__(self, segmenter, number):
    self._segmenter, self._number = segmenter, number

  def __call__(self, record):
    return self._segmenter.views(suite_parts.decode(record))[self._number]


def _views(segmenter, size):
  if segmenter.mode == 'whole':
    return 1
  return len(list(windows.windows(*size, segmenter.side, segmenter.stride)))


def _by_shape(source, numbers, segmenter):
  """Numbers of the readable records by the size that their images are resized to."""
  groups = {}
  for number in numbers.tolist():
    try:
      height, width = suite_parts.header(source[number])
    except ValueError as error:
      logging.warning('evaluation leaves out record %d, which cannot be read: %s', number, error)
    else:
      groups.setdefault(segmenter.size(height, width), []).append(number)
  return {size: np.array(group) for size, group in sorted(groups.items())}


def _counted(truth, most):
  """Depth as it is scored: what lies beyond `most` meters is missing."""
  return np.where(depth.known(truth, max_depth=most), truth, 0)


def _batches(part):
  """Numbers of the images of a part, a few at a time."""
  return [np.arange(i, min(i + _BATCH, len(part))) for i in range(0, len(part), _BATCH)]


def _floats(array):
  return np.asarray(array, np.float32)


def _some(part):
  """Numbers of the images that the baselines learn from."""
  return features.records(part, _BASELINE_IMAGES)


def _right(counts):
  return int(np.trace(counts)) / max(int(counts.sum()), 1)

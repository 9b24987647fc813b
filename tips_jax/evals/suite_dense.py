"""The tasks of pixels: masks, depth, normals. Each takes a Work and gives the fields of an Outcome.

Everything is measured at the resolution of the annotation.
"""
import functools
import json
import logging
import pathlib

import numpy as np

from tips_jax.core.config import InputError
from tips_jax.evals import depth, dpt, dpt_train, features, normals, prompts, segmentation, suite_parts, zeroshot
from tips_jax.evals import zeroshot_segmentation as zs
from tips_jax.evals.suite_global import class_names

_BATCH = 32      # images whose predictions are held at once
_NAIVE = 2000    # training images that naive answers learn from
_DEPTH = ('bins', 'min_depth', 'max_depth', 'steps', 'batch', 'learning_rates', 'upsample')
_DPT = {'hidden': 'channels', 'sigloss': 'sig_weight', 'gradient': 'gradient_weight'} | {name: name for name in (
    'learning_rate', 'epochs', 'warmup_epochs', 'batch', 'bins', 'min_depth', 'max_depth', 'widths')}


def segments(work):
  """A linear probe on patches, its strength chosen on held-out training images."""
  train, test = work.part('train'), work.part('test')
  gather, pixels = segmentation.TrainingPatches(len(train)), np.zeros(256, np.int64)
  for rows in _batches(train):
    gather(_floats(train.arrays['patch'][rows]), [train.encoded('mask', i) for i in rows])
    pixels += sum(np.bincount(train.mask(i).ravel(), minlength=256) for i in rows)
  probe = gather.fit()
  if probe is None:
    raise InputError(f'{work.job.dataset}: every pixel of the training masks is void; expected classes')
  scorer, examples, shown = segmentation.Scorer(probe), [], set(test.shown())
  for rows in _batches(test):
    patches = _floats(test.arrays['patch'][rows])
    scorer(patches, [test.encoded('mask', i) for i in rows])
    for i, patch in zip(rows, patches):
      if i in shown:
        truth = test.mask(i)
        found = segmentation.upsample_argmax(probe.logits(patch), truth.shape)
        examples.append({'image': test.image(i), 'truth': truth, 'predicted': found, 'patch': patch})
  names, pixels[segmentation.IGNORE] = tuple(work.job.task.classes or work.job.data.mask_classes), 0
  return {'metrics': {'miou': scorer.mean_iou(), 'pixel_accuracy': _right(scorer.counts)},
          'naive': {'miou': segmentation.majority(pixels, scorer.counts.sum(1))}, 'classes': names,
          'examples': examples, 'options': {'l2': probe.l2},
          'confusion': scorer.counts[:len(names), :len(names)] if names else None}


def linear_depth(work):
  """A linear layer to bins of depth; its learning rate is chosen on the last fifth of the training images."""
  train, test, o = work.part('train'), work.part('test'), work.job.options
  cls, most = work.encoder.cls_names[0], o['max_depth']
  probe = depth.fit(train.arrays['patch'], train.arrays[cls], train.depth,
                    **{name: o[name] for name in _DEPTH if name in o})
  scorer, examples, shown = depth.Scorer(max_depth=most, crop=o.get('crop')), [], set(test.shown())
  for rows in _batches(test):
    patches = _floats(test.arrays['patch'][rows])
    for i, patch, found in zip(rows, patches, probe.predict(patches, test.arrays[cls][rows])):
      truth = test.depth(i)
      scorer.add(found, truth)
      if i in shown:
        examples.append({'image': test.image(i), 'truth': truth, 'predicted': found, 'patch': patch})
  baselines = depth.baselines(train.depth, _some(train), test.depth, range(len(test)), max_depth=most,
                              crop=o.get('crop'))
  return {'metrics': scorer.result(), 'naive': baselines['constant'], 'examples': examples,
          'options': {'learning_rate': probe.learning_rate, 'mean_image': baselines['mean_image']}}


def decoder(work):
  """A DPT decoder of depth or normals on four layers. Nothing is chosen. It is kept beside the results."""
  train, test, o = work.part('train'), work.part('test'), work.job.options
  task = work.job.about.needs
  truth = getattr(train, task)
  trained = _trained(work, train, truth, task)
  scorer = depth.Scorer(max_depth=o['max_depth']) if task == 'depth' else normals.Scorer()
  examples, shown = [], set(test.shown())
  for rows in _batches(test):
    found = trained.predict([(patch[rows], cls[rows]) for patch, cls in test.taps])
    for i, one in zip(rows, found):
      one = one if task == 'depth' else one[..., :3]
      own = getattr(test, task)(i)
      scorer.add(one, own)
      if i in shown:
        examples.append({'image': test.image(i), 'truth': own, 'predicted': one,
                         'patch': _floats(test.taps[-1][0][i])})
  naive = functools.partial(depth.baselines, max_depth=o['max_depth']) if task == 'depth' else normals.baselines
  baselines = naive(truth, _some(train), getattr(test, task), range(len(test)))
  rename = {'rmse': 'angular_rmse'} if task == 'normals' else {}
  named = lambda values: {rename.get(name, name): value for name, value in values.items()}
  return {'metrics': named(scorer.result()), 'naive': named(baselines['constant']), 'examples': examples,
          'options': {'taps': dpt.taps_of(work.encoder.depth), 'mean_image': named(baselines['mean_image'])}}


def _trained(work, train, truth, task):
  """The decoder of a job: out of the cache, or trained; a copy goes to the output, in the official layout too."""
  o = work.job.options
  options = {ours: o[name] for name, ours in _DPT.items() if name in o}
  kept = work.cache.path('decoders', [train.key, task, json.loads(json.dumps(options))], '.npz')
  if kept.is_file():
    found = dpt_train.load(kept)
  else:
    found = dpt_train.fit(train.taps, truth, task=task, **options)
    found.save(kept)
  if work.output:
    folder = pathlib.Path(work.output) / 'decoders'
    folder.mkdir(parents=True, exist_ok=True)
    found.save(folder / f'{work.job.dataset}_{task}.npz')
    dpt.write_official(found.params, folder / f'{work.job.dataset}_{task}_official.npz', task=task)
  return found


def named_segments(work):
  """Zero-shot segmentation: each patch takes the class whose texts lie nearest. Images of one shape go together."""
  job, o, encoder = work.job, work.job.options, work.encoder
  names = class_names(job)
  whole = lambda n: -(-n // encoder.patch) * encoder.patch
  side = whole(job.size or o['size'])
  segmenter = zs.Segmenter(
      classes=zeroshot.class_embeddings(work.texts, names, prompts.templates(o['templates'])), mode=o['mode'],
      side=side, stride=min(o['stride'], side), patch=encoder.patch)
  field = 'value_patch' if o['value_attention'] else 'patch'
  scorer, examples, numbers = zs.Scorer(segmenter.count), [], work.parts.numbers(job, 'test')
  shown = set(numbers[features.records(numbers, suite_parts.EXAMPLES)].tolist())
  groups = _by_shape(job.data.source(job.splits['test']), numbers, segmenter)
  for size, group in groups.items():
    views = [work.parts.extract([job], job.splits['test'], group, _View(segmenter, number), outputs={field},
                                key=['own', segmenter.mode, side, segmenter.stride, *size, number])
             for number in range(_views(segmenter, size))]
    part = views[0]
    for i in range(len(part)):
      truth, shape = job.task.mask_ids(part.mask(i)), suite_parts.header(part.record(i))
      found = segmenter.predict(np.stack([_floats(view.arrays[field][i]) for view in views]), shape, size=truth.shape)
      scorer(found, truth)
      if int(part.rows[i]) in shown:
        examples.append({'image': part.image(i), 'truth': truth, 'predicted': found})
  return {'metrics': scorer.result(), 'naive': scorer.chance(), 'examples': examples, 'confusion': scorer.counts,
          'classes': tuple(one if isinstance(one, str) else one[0] for one in names)}


class _View:
  """View `number` of an image as a Segmenter wants it: the whole, or a window."""

  def __init__(self, segmenter, number):
    self._segmenter, self._number = segmenter, number

  def __call__(self, record):
    return self._segmenter.views(suite_parts.decode(record))[self._number]


def _views(segmenter, size):
  if segmenter.mode == 'whole':
    return 1
  return len(list(zs.windows(*size, segmenter.side, segmenter.stride)))


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


def _batches(part):
  """Numbers of the images of a part, a few at a time."""
  return [np.arange(i, min(i + _BATCH, len(part))) for i in range(0, len(part), _BATCH)]


def _floats(array):
  return np.asarray(array, np.float32)


def _some(part):
  """Numbers of the images that naive answers learn from."""
  return features.records(part, _NAIVE)


def _right(counts):
  return int(np.trace(counts)) / max(int(counts.sum()), 1)

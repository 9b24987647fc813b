"""Checks of a data set that fail in seconds, before any feature is computed.

evals/datasets/on_disk.py checks public benchmarks more closely; this holds for any data set.
"""

from collections.abc import Sequence
from typing import Any

from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.data.ingest.checks import VOID
from tips_jax.evals.features import reading, regions, splits
from tips_jax.evals.probes import depth, masks, normals
from tips_jax.evals.tasks.spec import Evaluation, TaskSpec

# Records of a split that are opened: enough to find a wrong column, and done in a second.
SAMPLE = 24


# Annotations that are texts, of which a task needs some.
_TEXTS = ('captions', 'tags', *regions.TEXTS)


def required(spec: TaskSpec) -> set[str]:
  """Features that the records must have for a task; captions may be alt texts instead."""
  fields = {spec.annotation} - {''}
  if spec.annotation in regions.TEXTS:
    fields.add('boxes')
  return fields


def check(encoder: Any, evaluations: Sequence[Evaluation]) -> None:
  """Raises InputError for the first evaluation that cannot be measured.

  Found are: a task that needs texts and a checkpoint without a text tower or a tokenizer, a missing
  or empty split, missing annotations, classes without names, and, from a sample of each split:
  images that cannot be read, annotations of another size than their images, class ids out of range,
  captions without images, images without captions.
  """
  for evaluation in evaluations:
    _check_texts(encoder, evaluation)
  check_data(evaluations)


def check_data(evaluations: Sequence[Evaluation]) -> None:
  """As `check`, without a checkpoint."""
  if not evaluations:
    raise InputError('evaluation: got no task; expected at least one')
  # What costs nothing comes first, for all of them; then records are opened.
  for evaluation in evaluations:
    _check_splits(evaluation)
    _check_annotations(evaluation)
  opened = set()
  for evaluation in evaluations:
    for split in evaluation.splits.values():
      # Tasks that need the same annotation of the same records share a sample.
      key = id(evaluation.data), split, evaluation.spec.annotation
      if key not in opened:
        _check_sample(evaluation, split)
      opened.add(key)


def _check_splits(evaluation):
  counts = evaluation.data.counts
  missing = [role for role in evaluation.spec.roles if role not in evaluation.splits]
  if missing:
    verb = 'is'
    if len(counts) > 1:
      verb = 'are'
    raise InputError(
      f'{evaluation.dataset}: missing split {missing[0]!r}: {evaluation.task.name} needs it, and '
      f'there {verb} only {sorted(counts)}'
    )
  for split in evaluation.splits.values():
    if split not in counts:
      raise unknown(f'{evaluation.dataset}: missing split', split, counts)
    if not counts[split]:
      raise InputError(
        f'{evaluation.dataset}: split {split!r} is empty; expected images for '
        f'{evaluation.task.name}'
      )


def _check_texts(encoder, evaluation):
  if not evaluation.spec.needs_text:
    return
  if not encoder.has_text:
    raise InputError(
      f'{evaluation.dataset}: {evaluation.task.name} compares images with texts; got the '
      f'checkpoint {encoder.name!r} without a text tower; expected one with it, or tasks of images '
      'alone'
    )
  # Raises where the tokenizer is missing.
  encoder.encode_text([])


def _check_annotations(evaluation):
  annotation = evaluation.spec.annotation
  features = evaluation.data.features
  if 'alt_text' in features:
    # Alt texts serve where there are no captions.
    features = features | {'captions'}
  task = f'{evaluation.dataset}: {evaluation.task.name}'
  for name in sorted(required(evaluation.spec) - features):
    raise InputError(
      f'{task} needs the annotation {name!r}, and there is only {sorted(features)}; expected data '
      'with it'
    )
  # Only zero-shot tasks read the names of classes.
  if not evaluation.spec.needs_text or annotation not in ('label', 'mask'):
    return
  if annotation == 'mask':
    names = evaluation.data.mask_classes
  else:
    names = evaluation.data.label_names(evaluation.splits['test'])
  classes = evaluation.task.classes
  if not names and not classes:
    raise InputError(
      f'{task} needs the names of the classes of {annotation!r}, and there are none; expected them '
      'in annotations.json ("mask_classes"), or as a ClassLabel'
    )
  # The class that is void in this task has a name all the same.
  count = len(classes) + (evaluation.task.without is not None)
  if names and classes and len(names) != count:
    raise InputError(
      f'{evaluation.dataset}: wrong class count: got {len(names):,} classes of {annotation!r}; '
      f'expected {count:,}'
    )


def _check_sample(evaluation, split):
  """Opens some records of a split."""
  source = evaluation.data.source(split)
  annotation = evaluation.spec.annotation
  numbers = reading.records(source, SAMPLE)
  where = f'{evaluation.dataset}: split {split!r}'
  broken = []
  without_texts = 0
  without_images = 0
  for number in numbers.tolist():
    try:
      record = source[number]
    except ValueError as error:  # a damaged shard
      broken.append(f'record {number}: {error}')
      continue
    captions = annotation == 'captions' and _texts(evaluation, record, where)
    try:
      size = splits.header(record)
    except ValueError as error:
      broken.append(f'record {number}: {error}')
      without_images += bool(captions)
      continue
    if annotation in _TEXTS:
      without_texts += not _texts(evaluation, record, f'{where}: record {number}')
    elif annotation:
      _CHECKS[annotation](evaluation, split, record, size, f'{where}: record {number}')
  # Some broken images are left out, with a warning; texts without images are wrong candidates.
  if len(broken) == len(numbers) or without_images > len(numbers) // 10:
    what = 'images that cannot be read'
    if without_images:
      what = 'captions without images'
    raise InputError(f'{where}: {what}: {len(broken)} of {len(numbers)} opened ({broken[0]})')
  if annotation in _TEXTS and without_texts == len(numbers) - len(broken):
    raise InputError(
      f'{where}: images without {annotation}: {without_texts} of {len(numbers)} opened; expected '
      f'texts for {evaluation.task.name}'
    )


def _texts(evaluation, record, where):
  """The texts of a record that the task reads; InputError for texts of boxes that are not there."""
  annotation = evaluation.spec.annotation
  if annotation == 'captions':
    return reading.texts_of(record, evaluation.data.text_field)
  if annotation not in regions.TEXTS:
    return reading.texts_of(record, annotation)
  _, texts = _decoded(lambda record: regions.of_record(record, annotation), record, where)
  return [text for of_box in texts for text in of_box]


def _label(evaluation, split, record, size, where):
  names = evaluation.data.label_names(split)
  label = int(record.get('label', -1))
  if names and label >= len(names):
    raise InputError(
      f'{where}: wrong class count: got label {label}; expected one below {len(names)}'
    )


def _mask(evaluation, split, record, size, where):
  mask = _decoded(masks.decode_mask, record['mask'], where)
  names = evaluation.data.mask_classes
  _check_size('masks', mask, size, where)
  largest = int(mask[mask != VOID].max(initial=0))
  if names and largest >= len(names):
    raise InputError(
      f'{where}: wrong class count: got class {largest} in a mask; expected ids below '
      f'{len(names)}, or {VOID} for void'
    )


def _depth(evaluation, split, record, size, where):
  _check_size('depth', _decoded(depth.decode, record['depth'], where), size, where)


def _normals(evaluation, split, record, size, where):
  _check_size('normals', _decoded(normals.decode, record['normals'], where), size, where)


def _check_size(name, array, size, where):
  # A squeezed annotation would still be measured, at the wrong pixels.
  height, width = array.shape[:2]
  if (height, width) != size:
    raise InputError(
      f'{where}: {name} of another size than images: got {width}x{height}, the image is '
      f'{size[1]}x{size[0]}'
    )


def _decoded(decode, data, where):
  try:
    return decode(data)
  except ValueError as error:
    raise InputError(f'{where}: {error}') from None


# Annotation -> check of one record; captions are counted, as some images may have none.
_CHECKS = {
  'label': _label,
  'mask': _mask,
  'depth': _depth,
  'normals': _normals,
}

"""What makes a job pointless is said before any feature is computed, in one line.

Public benchmarks are looked at more closely by evals/datasets/on_disk.py; this holds for any data
set.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.data.ingest.checks import VOID
from tips_jax.evals.features import reading, splits
from tips_jax.evals.probes import depth, masks, normals
from tips_jax.evals.tasks.spec import Evaluation

SAMPLE = 24  # records of a split that are opened


def check(encoder: Any, jobs: Sequence[Evaluation]) -> None:
  """Raises InputError for the first job that cannot be measured.

  Told are: a task that needs texts and a checkpoint without a text tower or a tokenizer, a missing
  or empty split, missing annotations, classes without names, and, from a sample of each split:
  images that cannot be read, annotations of another size than their images, class ids out of range,
  captions without images, images without captions.
  """
  for job in jobs:
    _texts(encoder, job)
  check_data(jobs)


def check_data(jobs: Sequence[Evaluation]) -> None:
  """As `check`, without a checkpoint."""
  if not jobs:
    raise InputError('evaluation: got no task; expected at least one')
  seen = set()
  for job in jobs:
    _splits(job)
    _annotations(job)
  for job in jobs:
    for split in job.splits.values():
      key = id(job.data), split, job.spec.annotation
      if key not in seen:
        _sample(job, split)
      seen.add(key)


def _splits(job):
  missing = [role for role in job.spec.roles if role not in job.splits]
  if missing:
    raise InputError(
      f'{job.dataset}: missing split {missing[0]!r}: {job.task.name} needs it, and there '
      f'{"are" if len(job.data.counts) > 1 else "is"} only {sorted(job.data.counts)}'
    )
  for split in job.splits.values():
    if split not in job.data.counts:
      raise unknown(f'{job.dataset}: missing split', split, job.data.counts)
    if not job.data.counts[split]:
      raise InputError(
        f'{job.dataset}: split {split!r} is empty; expected images for {job.task.name}'
      )


def _texts(encoder, job):
  if not job.spec.needs_text:
    return
  if not encoder.has_text:
    raise InputError(
      f'{job.dataset}: {job.task.name} compares images with texts; got the checkpoint '
      f'{encoder.name!r} '
      'without a text tower; expected one with it, or tasks of images alone'
    )
  encoder.encode_text([])  # a tokenizer that is missing is said now


def _annotations(job):
  needs, there = job.spec.annotation, job.data.features
  there = there | ({'captions'} if 'alt_text' in there else set())
  if needs and needs not in there:
    raise InputError(
      f'{job.dataset}: {job.task.name} needs the annotation {needs!r}, and there is only '
      f'{sorted(there)}; expected data with it'
    )
  if job.spec.needs_text and needs in ('label', 'mask'):
    names = job.data.mask_classes if needs == 'mask' else job.data.label_names(job.splits['test'])
    wanted = len(job.task.classes) + (job.task.without is not None)
    if not names and not job.task.classes:
      raise InputError(
        f'{job.dataset}: {job.task.name} needs the names of the classes of {needs!r}, and there '
        'are '
        'none; expected them in annotations.json ("mask_classes"), or as a ClassLabel'
      )
    if names and job.task.classes and len(names) != wanted:
      raise InputError(
        f'{job.dataset}: wrong class count: got {len(names):,} classes of {needs!r}; expected '
        f'{wanted:,}'
      )


def _sample(job, split):
  """Opens some records of a split."""
  source = job.data.source(split)
  numbers = np.arange(min(SAMPLE, len(source))) * len(source) // min(SAMPLE, len(source))
  where, broken, silent, lost = f'{job.dataset}: split {split!r}', [], 0, 0
  for number in numbers.tolist():
    try:
      record = source[number]
    except ValueError as error:  # a damaged shard
      broken.append(f'record {number}: {error}')
      continue
    try:
      size = splits.header(record)
    except ValueError as error:
      broken.append(f'record {number}: {error}')
      lost += job.spec.annotation == 'captions' and bool(_captions(job, record))
      continue
    if job.spec.annotation == 'captions':
      silent += not _captions(job, record)
    elif job.spec.annotation:
      _CHECKS[job.spec.annotation](job, split, record, size, f'{where}: record {number}')
  if len(broken) == len(numbers) or lost > len(numbers) // 10:
    what = 'captions without images' if lost else 'images that cannot be read'
    raise InputError(f'{where}: {what}: {len(broken)} of {len(numbers)} opened ({broken[0]})')
  if job.spec.annotation == 'captions' and silent == len(numbers) - len(broken):
    raise InputError(
      f'{where}: images without captions: {silent} of {len(numbers)} opened; expected texts for '
      f'{job.task.name}'
    )


def _captions(job, record):
  return reading.texts_of(record, job.data.text_field)


def _label(job, split, record, size, where):
  names, label = job.data.label_names(split), int(record.get('label', -1))
  if names and label >= len(names):
    raise InputError(
      f'{where}: wrong class count: got label {label}; expected one below {len(names)}'
    )


def _mask(job, split, record, size, where):
  mask, names = _decoded(masks.decode_mask, record['mask'], where), job.data.mask_classes
  if mask.shape != size:
    raise InputError(
      f'{where}: masks of another size than images: got {mask.shape[1]}x{mask.shape[0]}, the image '
      'is '
      f'{size[1]}x{size[0]}'
    )
  found = int(mask[mask != VOID].max(initial=0))
  if names and found >= len(names):
    raise InputError(
      f'{where}: wrong class count: got class {found} in a mask; expected ids below {len(names)}, '
      'or '
      f'{VOID} for void'
    )


def _map(name, decode):
  def look(job, split, record, size, where):
    found = _decoded(decode, record[name], where)
    if found.shape[:2] != size:
      raise InputError(
        f'{where}: {name} of another size than images: got {found.shape[1]}x{found.shape[0]}, the '
        'image '
        f'is {size[1]}x{size[0]}'
      )

  return look


def _decoded(decode, data, where):
  try:
    return decode(data)
  except ValueError as error:
    raise InputError(f'{where}: {error}') from None


_CHECKS = {
  'label': _label,
  'mask': _mask,
  'depth': _map('depth', depth.decode),
  'normals': _map('normals', normals.decode),
}

"""Disk space for the features of an evaluation, checked before any is computed."""

import collections
import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence

import numpy as np

from tips_jax.evals.features import reading, splits
from tips_jax.evals.features.cache import DiskFull
from tips_jax.evals.features.splits import TaskInputs
from tips_jax.evals.probes import dpt

# Images from whose sizes the average of a split is estimated.
_LOOKED_AT = 16
# Splits that a message names.
_SHOWN = 3


def check(works: Sequence[TaskInputs], *, tell: Callable[[str], None] | None = None) -> None:
  """InputError where the disk of the cache is too small for the features of all `works`.

  What is in the cache already is not counted. tell(line): prints what is needed. Images of various
  shapes are estimated from a sample.
  """
  needs = needed(works)
  need = needs.total()
  names = [f'{name} {_text(size)}' for name, size in needs.most_common(_SHOWN) if size]
  if names and len(needs) > _SHOWN:
    names.append('...')
  largest = f' ({", ".join(names)})' if names else ''
  folder = works[0].cache.folder
  disk = folder.absolute()
  while not disk.is_dir():  # the cache may not exist yet
    disk = disk.parent
  free = shutil.disk_usage(disk).free
  if need > free:
    raise DiskFull(
      f'--cache: {str(folder)!r} has {_text(free)} free; the features take about {_text(need)} '
      f'more{largest}; expected a larger disk, --cache=DIR on another one, or --limit'
    )
  if tell:
    tell(
      f'features: about {_text(need)} to be written{largest}, {_text(free)} free in {str(folder)!r}'
    )


def needed(works: Sequence[TaskInputs]) -> collections.Counter[str]:
  """'data set split' -> bytes that are not yet in the cache."""
  tables = {}  # (data set, split, how images are seen) -> (work, role, outputs)
  for work in works:
    spec = work.evaluation.spec
    shape = work.evaluation.shape
    if shape != 'aspect':
      shape = splits.frame(work.evaluation, work.encoder)
    else:  # each of these tasks sees windows of its own
      shape = (shape, spec.measure)
    for role, split in work.evaluation.splits.items():
      key = (id(work.evaluation.data), split, shape)
      _, _, outputs = tables.setdefault(key, (work, role, set()))
      outputs.update(spec.outputs)
  kept = _kept(works[0])
  result = collections.Counter()
  for (_, split, shape), (work, role, outputs) in tables.items():
    data = work.evaluation.data
    key = (data.fingerprint(split), split, _seen(shape), tuple(sorted(outputs)))
    missing = _bytes(work, role, shape, outputs) - kept[key]
    result[f'{work.evaluation.dataset} {split}'] += max(missing, 0)
  return result


def _bytes(work, role, shape, outputs):
  """What a split takes: float32 for each CLS token and the embedding, float16 for patches."""
  encoder = work.encoder
  job = work.evaluation
  numbers = work.parts.numbers(job, role)
  if isinstance(shape, splits.Resize):
    cells = shape.height * shape.width / encoder.patch**2
  else:
    cells = _mean_cells(work, job.data.source(job.splits[role]), numbers)
  maps = len(outputs - {'intermediate_layers'})
  vectors = len(encoder.cls_names) + 1
  if 'intermediate_layers' in outputs:
    # Each keeps its patches and its CLS token.
    layers = len(dpt.intermediate_layers_of(encoder.depth))
    maps += layers
    vectors += layers
  return int(len(numbers) * encoder.width * (4 * vectors + 2 * cells * maps))


def _mean_cells(work, source, numbers):
  """Patches of an image on average, from a sample; broken images have none."""
  cells = []
  for i in numbers[reading.records(numbers, _LOOKED_AT)]:
    try:
      size = splits.header(source[int(i)])
    except ValueError:
      continue
    cells.append(work.evaluation.spec.cells(work, size))
  return np.mean(cells or [0])


def _kept(work):
  """(fingerprint, split, how images are seen, outputs) -> bytes of this checkpoint's features on
  the disk.
  """
  kept = collections.Counter()
  for path in (work.cache.folder / 'features').glob('*/about.json'):
    try:
      about = json.loads(path.read_text())
      key = about['key']
      outputs = list(about['outputs'])
      if about['intermediate_layers']:
        outputs.append('intermediate_layers')
      what = (key['data'], key['split'], _seen(key['frame']), tuple(sorted(outputs)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not ours
      continue
    if about.get('checkpoint') == work.encoder.sha256:
      # Blocks on the disk: where they were not taken beforehand, a half computed array has holes.
      blocks = sum(file.stat().st_blocks for file in path.parent.glob('*.npy'))
      kept[what] += 512 * blocks
  return kept


def _seen(shape):
  """How images are seen, as a text that a Resize and what a cache holds of it have in common."""
  if isinstance(shape, splits.Resize):
    return json.dumps(dataclasses.astuple(shape))
  return json.dumps(shape) if isinstance(shape[0], int) else 'aspect'


def _text(size):
  if size >= 1e8:
    return f'{size / 1e9:,.1f} GB'
  return f'{size / 1e6:,.1f} MB'

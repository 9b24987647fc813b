"""Features on disk: computed once for a checkpoint, a split and a size, kept as they come, opened
as they are after.

A folder of `features/` holds one array of a row for each record (`patch.npy`, `web.npy`, ...), what
it was made from (`about.json`) and `done.npy`: 0 to do, 1 there, 2 unreadable. A row is marked
after its features are on disk, so that a killed run goes on where it stopped.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
import time

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.evals.features import reading as features

VERSION = 1  # of what `prepare` and the encoder make of a record: another one is computed anew
_AHEAD = max(
  4, min(os.cpu_count() or 1, 16)
)  # batches that are read and decoded while the device works
_FLUSH_S = 2.0  # seconds of work that a kill may cost
_HALF = 65_504.0  # the largest float16
_DONE, _UNREADABLE = 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
  """Of the R readable records of a source. `rows` [R]: their numbers in it; `label` [R], -1
  without.

  `arrays`: name -> [R, ...] on disk: every CLS token and 'embedding' float32 [R, D]; 'patch' [R, h,
  w, D] and 'value_patch' [R, h, w, E] float16; `intermediate_layers`: (patch [R, h, w, D], cls [R,
  D]) by depth. `seconds` 'encoder' (in its calls) and 'reading' (waiting for images and the disk),
  of this run. `key`: the name of the folder.
  """

  arrays: dict
  intermediate_layers: tuple
  rows: np.ndarray
  label: np.ndarray
  seconds: dict
  key: str


class Rows:
  """Some rows of an array that stays on disk: shape, len and indexing are those of `array[rows]`."""

  def __init__(self, array, rows):
    self._array, self._rows = array, rows
    self.shape, self.dtype, self.ndim = (len(rows), *array.shape[1:]), array.dtype, array.ndim

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    return self._array[self._rows[index]]

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self._array[self._rows], dtype)


class Cache:
  """All that is kept of evaluations below one folder."""

  def __init__(self, folder):
    self.folder = pathlib.Path(folder).expanduser()

  def extract(
    self,
    encoder,
    source,
    prepare,
    *,
    key,
    outputs=(),
    intermediate_layers=(),
    batch_size=64,
    progress=None,
  ) -> Features:
    """The features of every record of `source`; what is on disk already is not computed again.

    source: len and [i] -> record; prepare(record): uint8 [H, W, 3] of one shape, or ValueError
    where the image cannot
    be read: such records are left out with a warning. key: what tells this source, its records and
    `prepare` from others (JSON-able). outputs: 'patch', 'value_patch', beside the CLS tokens and
    'embedding', which are always kept.
    intermediate_layers: blocks whose outputs are kept too. progress.update(done) is told of every
    batch. Raises InputError where nothing can be read, or where the disk has no room.
    """
    about = {
      'version': VERSION,
      'checkpoint': encoder.sha256,
      'outputs': sorted(outputs),
      'intermediate_layers': list(intermediate_layers),
      'count': len(source),
      'key': key,
    }
    folder = self.folder / 'features' / _digest(about)
    table, seconds = _Table(folder, about), {'encoder': 0.0, 'reading': 0.0}
    start = time.monotonic()
    options = {
      'intermediate_layers': tuple(intermediate_layers),
      'values': 'value_patch' in outputs,
      'patches': 'patch' in outputs,
    }

    def keep(rows, found, labels, bad):
      if len(rows):
        table.write(rows, _wanted(found, encoder.cls_names, outputs), labels)
      table.mark(bad, _UNREADABLE)
      if progress:
        progress.update(table.count())

    try:
      with concurrent.futures.ThreadPoolExecutor(
        1
      ) as disk:  # writes a batch while the next one is encoded
        kept = disk.submit(lambda: None)
        for rows, images, labels, bad in _batches(source, prepare, table.todo(), batch_size):
          begin = time.monotonic()
          found = encoder.inspect(images, **options) if len(rows) else None
          seconds['encoder'] += time.monotonic() - begin
          kept.result()
          kept = disk.submit(keep, rows, found, labels, bad)
        kept.result()
    finally:  # stopped: what was computed stays
      table.flush()
    seconds['reading'] = time.monotonic() - start - seconds['encoder']
    return table.features(seconds)

  def texts(self, encoder, texts, *, batch_size=1024, progress=None) -> tuple[np.ndarray, float]:
    """(float32 [T, E] of texts in the joint space, seconds in the encoder). Equal texts are encoded
    once.
    """
    unique, row = np.unique(np.array(texts, dtype=object), return_inverse=True)
    path = self.folder / 'texts' / f'{_digest([VERSION, encoder.sha256, list(unique)])}.npy'
    if path.is_file():
      return np.load(path)[row.ravel()], 0.0
    start, parts = time.monotonic(), []
    for i in range(0, len(unique), batch_size):
      parts.append(features.finite(encoder.encode_text(list(unique[i : i + batch_size]))))
      if progress:
        progress.update(min(i + batch_size, len(unique)))
    found = np.concatenate(parts)
    _write(path, lambda file: np.save(file, found))
    return found[row.ravel()], time.monotonic() - start

  def path(self, folder, key, suffix) -> pathlib.Path:
    """A place for a file of a task that was made from JSON-able `key`; its folder exists."""
    path = self.folder / folder / f'{_digest(key)}{suffix}'
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class _Table:
  """The arrays of a folder; they are made when the first batch tells their shapes."""

  def __init__(self, folder, about):
    self._folder, self._about, self._count = folder, about, about['count']
    self._arrays, self._pending, self._flushed = {}, [], time.monotonic()
    self._done = np.zeros(self._count, np.uint8)
    if folder.is_dir():
      self._open()

  def _open(self):
    try:
      arrays = {
        path.stem: np.load(path, mmap_mode='r+') for path in sorted(self._folder.glob('*.npy'))
      }
      done = arrays.pop('done')
      if any(len(array) != self._count for array in (done, *arrays.values())):
        raise ValueError(f'arrays of other lengths than {self._count}')
    except (OSError, ValueError, KeyError) as error:
      raise InputError(
        f'--cache: {str(self._folder)!r} cannot be read ({error}); remove it, and its features are '
        'computed again'
      ) from None
    done[:] = np.where(self._done > done, self._done, done)
    self._arrays, self._done = arrays, done

  def _create(self, values):
    shapes = {name: (self._count, *value.shape[1:]) for name, value in values.items()}
    self._folder.parent.mkdir(parents=True, exist_ok=True)
    need = sum(int(np.prod(shape)) * values[name].itemsize for name, shape in shapes.items())
    free = shutil.disk_usage(self._folder.parent).free
    if need > free:
      raise InputError(
        f'--cache: {str(self._folder.parent)!r} has {free / 1e9:.1f} GB free; these features take '
        f'{need / 1e9:.1f} GB; expected a larger disk, or --limit'
      )
    making = pathlib.Path(tempfile.mkdtemp(dir=self._folder.parent, prefix='.new-'))
    for name, shape in shapes.items():
      np.lib.format.open_memmap(making / f'{name}.npy', 'w+', values[name].dtype, shape).flush()
    np.save(making / 'done.npy', np.zeros(self._count, np.uint8))
    (making / 'about.json').write_text(json.dumps(self._about, indent=1))
    try:
      os.replace(making, self._folder)
    except OSError:  # another process was faster: both write the same
      shutil.rmtree(making)
    self._open()

  def todo(self):
    return np.flatnonzero(self._done == 0)

  def count(self):
    return int((self._done > 0).sum()) + sum(map(len, self._pending))

  def write(self, rows, values, labels):
    values = {**values, 'label': np.asarray(labels, np.int64)}
    if not self._arrays:
      self._create(values)
    for name, value in values.items():
      if value.shape[1:] != self._arrays[name].shape[1:]:
        raise InputError(
          f'--cache: {name}: got features of shape {value.shape[1:]}; expected '
          f'{self._arrays[name].shape[1:]} as before; remove {str(self._folder)!r}'
        )
      self._arrays[name][rows] = value[: len(rows)]
    self._pending.append(rows)
    if time.monotonic() - self._flushed > _FLUSH_S:
      self.flush()

  def mark(self, rows, state):
    self._done[np.asarray(rows, np.int64)] = state

  def flush(self):
    """First the features, then the marks that say that they are there."""
    for array in self._arrays.values():
      array.flush()
    for rows in self._pending:
      self.mark(rows, _DONE)
    if self._arrays:
      self._done.flush()
    self._pending, self._flushed = [], time.monotonic()

  def features(self, seconds):
    rows = np.flatnonzero(self._done == _DONE)
    if not len(rows):
      raise InputError(
        f'evaluation: none of {self._count} images can be read; expected at least one'
      )
    whole = len(rows) == self._count
    arrays = {name: array if whole else Rows(array, rows) for name, array in self._arrays.items()}
    label = np.asarray(arrays.pop('label'))
    intermediate_layers = tuple(
      (arrays.pop(f'layer{i}_patch'), arrays.pop(f'layer{i}_cls'))
      for i in range(len(self._about['intermediate_layers']))
    )
    return Features(
      arrays=arrays,
      intermediate_layers=intermediate_layers,
      rows=rows,
      label=label,
      seconds=seconds,
      key=self._folder.name,
    )


def _wanted(found, cls_names, outputs):
  """What is kept of an encoder's outputs, by the names of the files."""
  kept = {name: features.finite(found[name]) for name in (*cls_names, 'embedding')}
  for name in outputs:
    kept[name] = _half(found[name])
  for i, (patch, cls) in enumerate(found.get('intermediate_layers', ())):
    kept |= {f'layer{i}_patch': _half(patch), f'layer{i}_cls': features.finite(cls)}
  return kept


def _half(x):
  return np.clip(features.finite(x), -_HALF, _HALF).astype(np.float16)


def _batches(source, prepare, numbers, size):
  """Yields (rows, images uint8 [size, H, W, 3], labels, unreadable rows); images repeat the last
  one up to size.

  Of fewer images than that, size is the power of two that holds them.
  """
  size = min(size, 1 << max(len(numbers) - 1, 0).bit_length())

  def read(chunk):
    rows, images, labels, bad = [], [], [], []
    for number in chunk.tolist():
      try:
        record = source[number]
        images.append(prepare(record))
      except ValueError as error:
        logging.warning('evaluation leaves out record %d, which cannot be read: %s', number, error)
        bad.append(number)
      else:
        rows.append(number)
        labels.append(int(record.get('label', -1)))
    missing = size - len(rows)
    images, labels = images + images[-1:] * missing, labels + labels[-1:] * missing
    return np.array(rows, np.int64), np.stack(images) if rows else None, labels, bad

  chunks = [numbers[i : i + size] for i in range(0, len(numbers), size)]
  with concurrent.futures.ThreadPoolExecutor(_AHEAD) as pool:
    pending = [pool.submit(read, chunk) for chunk in chunks[:_AHEAD]]
    try:
      for i in range(len(chunks)):
        done = pending.pop(0).result()
        if i + _AHEAD < len(chunks):
          pending.append(pool.submit(read, chunks[i + _AHEAD]))
        yield done
    finally:
      for one in pending:
        one.cancel()


def _digest(about):
  return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _write(path, save):
  """A file, whole or absent."""
  path.parent.mkdir(parents=True, exist_ok=True)
  descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix='.new-')
  with os.fdopen(descriptor, 'wb') as file:
    save(file)
  os.replace(temporary, path)

"""Features on disk: computed once for a checkpoint, a split and a size, then memory-mapped.

A folder of `features/` holds arrays with a row for each record (`patch.npy`, `web.npy`, ...), what
they were made from (`about.json`) and `done.npy`: 0 to do, 1 done, 2 unreadable. A row is marked
after its features are on disk, so that a killed run continues where it stopped. `checksums.npy` has
a CRC-32 of each row: a row whose bytes changed on the disk is computed again.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tips_jax.core import files
from tips_jax.core.errors import InputError
from tips_jax.evals.features import reading
from tips_jax.interop import arrays

# Of what `prepare` and the encoder make of a record: features of another version are not used.
VERSION = 1
# Batches that are read and decoded while the device works.
_AHEAD = max(4, min(os.cpu_count() or 1, 16))
_FLUSH_S = 2.0  # seconds of work that a kill may cost
_HALF = 65_504.0  # the largest float16
_DONE = 1
_UNREADABLE = 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # by a file system


class DiskFull(InputError):
  """The features take more space than the disk of their cache has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedFeatures:
  """Features of the R readable records of a source."""

  # name -> [R, ...] on disk: every CLS token and 'embedding' float32 [R, D]; 'patch' [R, h, w, D],
  # 'value_patch' and 'region_patch' [R, h, w, E] float16.
  arrays: dict[str, 'np.ndarray | Rows']
  # (patch [R, h, w, D], cls [R, D]) by depth.
  intermediate_layers: tuple[tuple, ...]
  # [R] numbers in the source.
  rows: np.ndarray
  # [R] class ids, -1 without.
  label: np.ndarray
  # Of this run: 'encoder' (in its calls) and 'reading' (waiting for images and the disk).
  seconds: dict[str, float]
  # Name of the folder.
  key: str


class Rows:
  """Some rows of an array on disk: shape, len and indexing are those of `array[rows]`."""

  def __init__(self, array, rows):
    self._array = array
    self._rows = rows
    self.shape = (len(rows), *array.shape[1:])
    self.dtype = array.dtype
    self.ndim = array.ndim

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    return self._array[self._rows[index]]

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self._array[self._rows], dtype)


class Cache:
  """What evaluations keep below one folder: features, embeddings of texts, trained decoders."""

  def __init__(self, folder):
    self.folder = pathlib.Path(folder).expanduser()

  def extract(
    self,
    encoder: Any,
    source: Any,
    prepare: Callable[[Mapping], np.ndarray],
    *,
    key: Any,
    outputs: Collection[str] = (),
    intermediate_layers: Sequence[int] = (),
    batch_size: int = 64,
    progress: Any = None,
  ) -> CachedFeatures:
    """The features of every record of `source`; what is on disk already is not computed again.

    source: len and [i] -> record. prepare(record): uint8 [H, W, 3] of one shape, or ValueError
    where the image cannot be read: such records are left out with a warning. key: identifies
    this source, its records and `prepare` (JSON-able). outputs: 'patch', 'value_patch',
    'region_patch'; the CLS tokens and 'embedding' are always kept. intermediate_layers: blocks
    whose outputs are kept too. progress.update(done) is called for every batch. InputError where
    nothing can be read, or where the disk is too small.
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
    table = _Table(folder, about)
    encoder_seconds = 0.0
    start = time.monotonic()
    options = {
      'intermediate_layers': tuple(intermediate_layers),
      'values': 'value_patch' in outputs,
      'regions': 'region_patch' in outputs,
      'patches': 'patch' in outputs,
    }

    def keep(rows, encoded, labels, bad):
      if len(rows):
        table.write(rows, _arrays(encoded, encoder.cls_names, outputs), labels)
      table.mark(bad, _UNREADABLE)
      if progress:
        progress.update(table.count())

    try:
      # A thread writes a batch while the next one is encoded. Waiting for the previous write before
      # the next one is submitted keeps memory bounded and raises its errors.
      with concurrent.futures.ThreadPoolExecutor(1) as disk:
        kept = disk.submit(lambda: None)
        for rows, images, labels, bad in _batches(source, prepare, table.todo(), batch_size):
          encoded = None
          if len(rows):
            begin = time.monotonic()
            encoded = encoder.inspect(images, **options)
            encoder_seconds += time.monotonic() - begin
          kept.result()
          kept = disk.submit(keep, rows, encoded, labels, bad)
        kept.result()
    finally:  # also when it is interrupted: what was computed stays
      table.flush()
    reading_seconds = time.monotonic() - start - encoder_seconds
    return table.features({'encoder': encoder_seconds, 'reading': reading_seconds})

  def texts(
    self, encoder: Any, texts: Sequence[str], *, batch_size: int = 1024, progress: Any = None
  ) -> tuple[np.ndarray, float]:
    """(float32 [T, E] in the joint space, seconds in the encoder). Equal texts are encoded once."""
    unique, row = np.unique(np.array(texts, dtype=object), return_inverse=True)
    # An npz, as it has checksums.
    path = self.folder / 'texts' / f'{_digest([VERSION, encoder.sha256, list(unique)])}.npz'
    if path.is_file():
      return arrays.read_npz(path)['texts'][row.ravel()], 0.0
    start = time.monotonic()
    parts = []
    for i in range(0, len(unique), batch_size):
      parts.append(reading.finite(encoder.encode_text(list(unique[i : i + batch_size]))))
      if progress:
        progress.update(min(i + batch_size, len(unique)))
    embeddings = np.concatenate(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, lambda file: np.savez(file, texts=embeddings))
    return embeddings[row.ravel()], time.monotonic() - start

  def path(self, folder: str, key: Any, suffix: str) -> pathlib.Path:
    """Where to keep a file that a task made from JSON-able `key`; its folder is created."""
    path = self.folder / folder / f'{_digest(key)}{suffix}'
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class _Table:
  """The arrays of a folder; they are created with the shapes of the first batch."""

  def __init__(self, folder, about):
    self._folder = folder
    self._about = about
    self._count = about['count']
    self._arrays = {}
    # Rows that were written since the last flush, and its time.
    self._pending = []
    self._flushed = time.monotonic()
    self._done = np.zeros(self._count, np.uint8)
    self._checksums = np.zeros(self._count, np.uint32)
    if folder.is_dir():
      self._open()

  def _open(self):
    try:
      about = json.loads((self._folder / 'about.json').read_text())
      opened = {}
      for name, (dtype, shape) in about['arrays'].items():
        path = self._folder / f'{name}.npy'
        # Written to, a file that was cut would grow again, with zeros: opened for reading it fails.
        np.load(path, mmap_mode='r')
        opened[name] = np.load(path, mmap_mode='r+')
        if [str(opened[name].dtype), list(opened[name].shape)] != [dtype, shape]:
          raise ValueError(f'{path.name}: {opened[name].dtype} {opened[name].shape}')
      done = opened.pop('done')
      checksums = opened.pop('checksums')
    except Exception as error:  # damaged files raise a dozen kinds
      raise InputError(
        f'--cache: {str(self._folder)!r} cannot be read ({error}); remove it, and its features are '
        'computed again'
      ) from None
    # Unreadable records may have been marked in memory before the folder was created.
    marked = self._done > 0
    done[marked] = self._done[marked]
    checksums[marked] = self._checksums[marked]
    self._arrays = opened
    self._done = done
    self._checksums = checksums
    self._forget_damaged()
    if not self._done.all():  # files of an older version, and copies, may have holes
      with _room(self._folder):
        _allocate(self._folder)

  def _forget_damaged(self):
    """Marks rows whose bytes are not those that were written as still to do, and says so."""
    damaged = []
    for row in np.flatnonzero(self._done):
      if self._checksums[row] != self._checksum(row):
        damaged.append(row)
    if damaged:
      self._done[damaged] = 0
      logging.warning(
        'evaluation: %d rows of %s are damaged, and computed again', len(damaged), self._folder
      )

  def _checksum(self, row):
    """CRC-32 of everything that is kept of a record."""
    crc = zlib.crc32(bytes([self._done[row]]))
    if self._done[row] == _DONE:
      for name in sorted(self._arrays):
        crc = zlib.crc32(np.ascontiguousarray(self._arrays[name][row]), crc)
    return crc

  def _create(self, values):
    shapes = {}
    need = 0
    for name, value in values.items():
      shapes[name] = (self._count, *value.shape[1:])
      need += math.prod(shapes[name]) * value.itemsize
    self._folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(self._folder.parent).free
    if need > free:
      raise DiskFull(
        f'--cache: {str(self._folder.parent)!r} has {free / 1e9:.1f} GB free; these features take '
        f'{need / 1e9:.1f} GB; expected a larger disk, or --limit'
      )
    kinds = {name: [str(values[name].dtype), shape] for name, shape in shapes.items()}
    kinds |= {'done': ['uint8', [self._count]], 'checksums': ['uint32', [self._count]]}
    # Complete in a temporary folder first: a killed run leaves no folder that lacks an array.
    temporary = pathlib.Path(tempfile.mkdtemp(dir=self._folder.parent, prefix='.new-'))
    try:
      with _room(self._folder.parent):
        for name, shape in shapes.items():
          path = temporary / f'{name}.npy'
          np.lib.format.open_memmap(path, 'w+', values[name].dtype, shape).flush()
        np.save(temporary / 'done.npy', np.zeros(self._count, np.uint8))
        np.save(temporary / 'checksums.npy', np.zeros(self._count, np.uint32))
        _allocate(temporary)
        about = self._about | {'arrays': kinds}
        (temporary / 'about.json').write_text(json.dumps(about, indent=1))
    except BaseException:  # an interrupt too leaves nothing behind
      shutil.rmtree(temporary)
      raise
    try:
      os.replace(temporary, self._folder)
    except OSError:  # another process was first; both write the same numbers
      shutil.rmtree(temporary)
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
    for row in rows:
      self._checksums[row] = self._checksum(row)

  def flush(self):
    """First the features, then the marks that they are done: a kill in between loses nothing."""
    for array in self._arrays.values():
      array.flush()
    for rows in self._pending:
      self.mark(rows, _DONE)
    if self._arrays:
      self._checksums.flush()
      self._done.flush()
    self._pending = []
    self._flushed = time.monotonic()

  def features(self, seconds):
    rows = np.flatnonzero(self._done == _DONE)
    if not len(rows):
      raise InputError(
        f'evaluation: none of {self._count} images can be read; expected at least one'
      )
    arrays = dict(self._arrays)
    if len(rows) < self._count:
      arrays = {name: Rows(array, rows) for name, array in arrays.items()}
    label = np.asarray(arrays.pop('label'))
    layers = []
    for i in range(len(self._about['intermediate_layers'])):
      layers.append((arrays.pop(f'layer{i}_patch'), arrays.pop(f'layer{i}_cls')))
    return CachedFeatures(
      arrays=arrays,
      intermediate_layers=tuple(layers),
      rows=rows,
      label=label,
      seconds=seconds,
      key=self._folder.name,
    )


@contextlib.contextmanager
def _room(folder):
  """Within it a full disk is DiskFull."""
  try:
    yield
  except OSError as error:
    if error.errno not in _FULL:
      raise
    raise DiskFull(
      f'--cache: {str(folder)!r}: the features take more room than there is ({error.strerror}); '
      'expected a larger disk, --cache=DIR on another one, or --limit'
    ) from None


def _allocate(folder):
  """Takes the room on the disk for the arrays of a folder, which stay as they are.

  Without it a write to a mapped file on a full disk is no error: it ends the process (SIGBUS).
  """
  if not hasattr(os, 'posix_fallocate'):  # macOS
    return
  for path in folder.glob('*.npy'):
    with open(path, 'r+b') as file:
      try:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
      except OSError as error:
        if error.errno not in _UNSUPPORTED:
          raise


def _arrays(encoded, cls_names, outputs):
  """What is kept of an encoder's outputs, by the names of the files."""
  kept = {name: reading.finite(encoded[name]) for name in (*cls_names, 'embedding')}
  for name in outputs:
    kept[name] = _half(encoded[name])
  for i, (patch, cls) in enumerate(encoded.get('intermediate_layers', ())):
    kept |= {f'layer{i}_patch': _half(patch), f'layer{i}_cls': reading.finite(cls)}
  return kept


def _half(x):
  # Larger numbers would become infinities in float16.
  return np.clip(reading.finite(x), -_HALF, _HALF).astype(np.float16)


def _batches(source, prepare, numbers, size) -> Iterator[tuple]:
  """Yields (rows, images uint8 [size, H, W, 3], labels, unreadable rows).

  The last image is repeated up to `size`, so that the encoder compiles once.
  """
  # Of few images, no more than the next power of two are encoded.
  size = min(size, 1 << max(len(numbers) - 1, 0).bit_length())

  def read(chunk):
    rows = []
    images = []
    labels = []
    bad = []
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
    images += images[-1:] * missing
    labels += labels[-1:] * missing
    batch = None
    if rows:
      batch = np.stack(images)
    return np.array(rows, np.int64), batch, labels, bad

  chunks = [numbers[i : i + size] for i in range(0, len(numbers), size)]
  with concurrent.futures.ThreadPoolExecutor(_AHEAD) as pool:
    pending = collections.deque(pool.submit(read, chunk) for chunk in chunks[:_AHEAD])
    try:
      for i in range(len(chunks)):
        done = pending.popleft().result()
        if i + _AHEAD < len(chunks):
          pending.append(pool.submit(read, chunks[i + _AHEAD]))
        yield done
    finally:  # the consumer stopped early: leave the pool without reading the rest
      for future in pending:
        future.cancel()


def _digest(about):
  return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]

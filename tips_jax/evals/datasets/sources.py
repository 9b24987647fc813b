"""Data sets as the suite reads them.

Store is a user's store or TFDS folder, Benchmark a public benchmark. Both look alike: source(split)
has len and [i] -> record (as in a store), `counts` {split: images}, `features`, `text_field`,
`mask_classes`, label_names(split), instances(split) (the classes of each record for retrieval;
None: its label), fingerprint(split), which tells contents apart for the cache, and identity(split),
which does so on any machine.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from typing import Any

from tips_jax.data import store
from tips_jax.data.benchmarks import reader as benchmarks_reader
from tips_jax.data.benchmarks import table as benchmarks
from tips_jax.evals.datasets import protocols
from tips_jax.evals.features import reading
from tips_jax.evals.probes import masks

# Records that may show captions, and files that make a fingerprint.
_SAMPLE = 16


class Store:
  """A store that `prepare` wrote, or a TFDS folder."""

  def __init__(self, opened: store.Store):
    self._store = opened
    # A copy: a training run adds its `evals.split`, which may be a slice of a split.
    self.counts = dict(opened.splits)
    self.features = set(opened.features)
    self.mask_classes = masks.class_names(opened)
    self._sources = {}

  def source(self, split: str) -> Any:
    # Opened once: every task of the data set asks for it.
    if split not in self._sources:
      self._sources[split] = self._store.source(split)
    return self._sources[split]

  def fingerprint(self, split: str) -> str:
    return self._store.fingerprint

  # A store's fingerprint is of its records, not of its files: it is the same on any machine.
  identity = fingerprint

  def instances(self, split: str) -> None:
    return None

  def label_names(self, split: str) -> tuple[str, ...]:
    return self._store.label_names()

  @functools.cached_property
  def text_field(self) -> str:
    """'captions' where there are any, else the alt texts."""
    if 'alt_text' not in self.features:
      return 'captions'
    if 'captions' in self.features:
      # `prepare` writes the column in any case: only records show whether it is empty.
      for split in self.counts:
        source = self.source(split)
        for i in reading.records(source, _SAMPLE).tolist():
          if reading.texts_of(source[i], 'captions'):
            return 'captions'
    return 'alt_text'


class Benchmark:
  """Splits of a public benchmark in its official layout below a folder."""

  text_field = 'captions'

  def __init__(self, name: str, data_dir: str | os.PathLike, splits: Iterable[str]):
    self._readers = {split: benchmarks.open(name, data_dir, split) for split in splits}
    self._fingerprints = {}
    self.counts = {split: len(reader) for split, reader in self._readers.items()}
    first = next(iter(self._readers.values()))
    self.mask_classes = tuple(first.mask_classes)
    self.features = {'image', *first.annotations}
    if protocols.get(name).captions:
      self.features.add('captions')

  def source(self, split: str) -> '_Records':
    return _Records(self._readers[split])

  def label_names(self, split: str) -> tuple[str, ...]:
    return tuple(self._readers[split].label_names)

  def fingerprint(self, split: str) -> str:
    """Of the names of all files, and of size and time of some: a million would take too long."""
    if split not in self._fingerprints:
      self._fingerprints[split] = self._digest(split, str, _path_size_and_time)
    return self._fingerprints[split]

  def identity(self, split: str) -> str:
    """Of the names of all samples, and of the sizes of some files: the same wherever the data set
    is.
    """
    return self._digest(split, self._readers[split].key_of, _name_and_size)

  def _digest(self, split, name: Callable, describe: Callable):
    """SHA-256 of name(item) of all items and describe(path) of the files of some."""
    reader = self._readers[split]
    digest = hashlib.sha256(repr([reader.name, reader.official[split], len(reader)]).encode())
    for item in reader.items:
      digest.update(f'{name(item)}\n'.encode())
    for i in reading.records(reader, _SAMPLE).tolist():
      for path in filter(os.path.exists, reader.files_of(reader.items[i])):
        digest.update(f'{describe(path)}\n'.encode())
    return digest.hexdigest()

  def instances(self, split: str) -> list | None:
    # Read from the index files, so that no image is opened.
    if 'tags' not in self.features:
      return None
    reader = self._readers[split]
    return [reader.tags_of(item) for item in reader.items]


class _Records:
  """The samples of a reader as the records of a store."""

  def __init__(self, reader: benchmarks_reader.Benchmark):
    self._reader = reader

  def __len__(self):
    return len(self._reader)

  def __getitem__(self, i):
    sample = self._reader[i]
    record = {'image': sample.image, 'captions': sample.captions, 'problem': sample.problem}
    return record | sample.extra


def _path_size_and_time(path):
  status = os.stat(path)
  return f'{path} {status.st_size} {status.st_mtime_ns}'


def _name_and_size(path):
  return f'{os.path.basename(path)} {os.stat(path).st_size}'

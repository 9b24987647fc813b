"""The samples of one task on their way into a store: each is checked, counted and written."""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import typing
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from tips_jax.core import files
from tips_jax.data import store
from tips_jax.data.ingest import checks, records, regions
from tips_jax.data.ingest.cells import utf8
from tips_jax.data.ingest.copies import DIGEST_BYTES, Hashes
from tips_jax.data.ingest.reader import Note, Reader, Sample
from tips_jax.data.ingest.report import Report

TEST = 'test'  # the split of --test_fraction
_COUNTED = ('boxes', 'region_captions', 'region_tags', 'tags')  # annotations

Item = typing.TypeVar('Item')
Value = typing.TypeVar('Value')
Checked = tuple[Sample, tuple[checks.Check, bytes]]


def checked(
  samples: Iterable[Sample], *, min_side: int, max_pixels: int, threads: int
) -> Iterator[Checked]:
  """The samples with a Check and a hash of each image, in order."""
  check = functools.partial(_check, min_side=min_side, max_pixels=max_pixels)
  if threads > 1:
    return in_threads(check, samples, threads)  # decoding releases the GIL
  return ((sample, check(sample)) for sample in samples)


def _check(sample, *, min_side, max_pixels):
  if sample.image is None:
    return checks.Check('missing', sample.problem or 'no image', (0, 0)), b''
  check = checks.check_image(sample.image, min_side=min_side, max_pixels=max_pixels)
  return check, hashlib.sha256(sample.image).digest()[:DIGEST_BYTES]


def in_threads(
  function: Callable[[Item], Value],
  items: Iterable[Item],
  threads: int,
  stop: Callable[[], object] = lambda: None,
) -> Iterator[tuple[Item, Value]]:
  """Yields (item, function(item)) in order, some items ahead.

  stop: called where it ends early, to end soon what runs in the threads.
  """
  pending = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    try:
      for item in items:
        pending.append((item, pool.submit(function, item)))
        if len(pending) >= 4 * threads:
          item, result = pending.popleft()
          yield item, result.result()
      while pending:
        item, result = pending.popleft()
        yield item, result.result()
    except BaseException:
      for _, result in pending:
        result.cancel()
      stop()
      raise


class Labels:
  """The annotations that a store has, and its classes.

  A store has one set of features: the classes of all splits, and the annotations that come with
  every split.
  """

  def __init__(self, readers: Mapping[str, Reader]):
    self.ids = {}
    self.annotations = list(store.ANNOTATIONS)
    for reader in readers.values():
      for name in reader.label_names:
        self.ids.setdefault(name, len(self.ids))
      self.annotations = [name for name in self.annotations if name in reader.annotations]

  def features(self) -> typing.Any:
    """The TFDS features of the store."""
    return store.features(self.annotations, labels=list(self.ids))


class SampleWriter:
  """Writes samples to shards, their hashes, ids and texts beside them, and counts and lists what is
  wrong with them.
  """

  def __init__(
    self,
    reader: Reader,
    split: str,
    splits: Sequence[str],
    labels: Labels,
    path: Callable[[str], str],
    *,
    max_pixels: int,
    test_fraction: float,
    learn: bool,
  ):
    """path: where a file of this task belongs, by its name."""
    self.report = Report()
    self._reader = reader
    self._split = split
    self._splits = splits
    self._labels = labels
    self._serialize = records.Serializer(labels.features())
    self._path = path
    self._max_pixels = max_pixels
    self._test_fraction = test_fraction
    self._learn = learn
    self._hashes = Hashes()
    self._shards = {}
    self._written = collections.Counter()
    self._lines = {}  # files of lines
    self._stack = contextlib.ExitStack()

  def take(self, sample: Sample, check: checks.Check, digest: bytes) -> None:
    """Writes a sample, unless it cannot be used."""
    split = self._split
    learn = self._learn
    if self._test_fraction and int.from_bytes(digest[:8], 'big') < self._test_fraction * 2**64:
      split = TEST
      learn = False
    self.report.count('read', split)
    sample = sample._replace(key=utf8(sample.key))
    if check.problem:
      self.report.note(check.problem, split, sample.key, check.detail)
      return
    captions = [text for text in sample.captions if text]
    problems = {
      'no_text': not sample.alt_text and not captions,
      'no_alt_text': captions and not sample.alt_text,
      'no_captions': sample.alt_text and not captions,
      'empty_caption': len(captions) < len(sample.captions),
      'bad_metadata': sample.problem,
    }
    for kind, present in problems.items():
      if present:
        self.report.note(kind, split, sample.key, sample.problem)
    self.note(split, sample.notes, sample.key)
    # The bytes as they came: a store never encodes an image again.
    example = {
      'image': sample.image,
      'id': sample.key,
      'alt_text': sample.alt_text,
      'captions': captions,
      **self._annotated(sample, check, split),
    }
    # Copies stay: the same image with other texts is worth training on.
    self._hashes.add(digest, self._splits.index(split), self._written[split])
    self._written[split] += 1
    if split not in self._shards:
      self._shards[split] = records.Shards(self._path(split))
    self._shards[split].add(self._serialize(example))
    self._line(f'{split}.ids', sample.key)
    self.report.count('written', split)
    self.report.count('alt_texts', split, bool(sample.alt_text))
    self.report.count('captions', split, len(captions))
    if learn:
      for text in filter(None, (sample.alt_text, *captions)):
        self._line('texts', text)

  def _annotated(self, sample, check, split):
    """The annotations of a sample, complete: an unknown label is -1, an unusable mask all void."""
    annotations = self._labels.annotations
    values = {name: sample.extra[name] for name in annotations if name in sample.extra}
    if 'label' in annotations:
      label = values.get('label', -1)
      names = self._reader.label_names
      if not isinstance(label, str):
        label = names[label] if 0 <= label < len(names) else ''
      values['label'] = self._labels.ids.get(label, -1)
      if values['label'] == -1:
        self.report.note('no_label', split, sample.key, label)
    if 'mask' in annotations:
      data = values.get('mask') or b''
      mask, problem = checks.mask_png(data, check, max_pixels=self._max_pixels)
      if problem:
        self.report.note('bad_mask', split, sample.key, problem)
      values['mask'] = mask or checks.ignored_mask(check.size)
    if 'boxes' in annotations and 'regions' in sample.extra:
      options = self._reader.options
      of_boxes, problems = regions.placed(
        sample.extra['regions'], check.size, options.box_format, options.box_unit
      )
      values.update({name: of_boxes[name] for name in regions.ANNOTATIONS if name in annotations})
      values['boxes'] = np.array(of_boxes['boxes'], np.float32).reshape(-1, 4)
      for kind, detail in problems:
        self.report.note(kind, split, sample.key, detail)
    for name in _COUNTED:
      if name in values:
        self.report.count(name, split, len(values[name]))
    if check.orientation > 1 and set(values) & set(store.PLACED):
      detail = f'EXIF orientation {check.orientation}'
      self.report.note('turned', split, sample.key, detail)
    return values

  def note(self, split: str, notes: Sequence[Note], key: str = '') -> None:
    """Counts and lists notes of a reader, or of the sample `key`."""
    for note in notes:
      self.report.note(note.kind, split, key or note.id, note.detail, note.count)

  def _line(self, name, text):
    if name not in self._lines:
      self._lines[name] = self._stack.enter_context(growing(self._path(name)))
    self._lines[name].write(json.dumps(text) + '\n')

  def close(self) -> dict[str, list[records.Written]]:
    """Completes all files of the task; returns the shards by split."""
    self._stack.close()
    hashes, copies = self._hashes.sorted()
    for name, array in (('hashes.npy', hashes), ('copies.npy', copies)):
      files.write(self._path(name), functools.partial(np.save, arr=array))
    return {split: shards.close() for split, shards in self._shards.items()}


@contextlib.contextmanager
def growing(path: str) -> Iterator[typing.TextIO]:
  """A text file that gets its name when it is complete."""
  growing = f'{path}-{uuid.uuid4().hex[:12]}{records.GROWING}'
  with open(growing, 'w', encoding='utf-8') as file:
    yield file
  os.replace(growing, path)

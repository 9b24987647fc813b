"""Reader of data sets of TFDS, by its own data source, and of their TFRecord files, for which TFDS
needs TensorFlow.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds

from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.data import store
from tips_jax.data.ingest import crc32c, tfds_folder
from tips_jax.data.ingest.columns import NONE, guess
from tips_jax.data.ingest.reader import Options, Piece, Reader, Sample, ranges

_KEYS = ('id', 'image/filename', 'filename', 'file_name')


class TfdsReader(Reader):
  """A TFDS data set by folder or name; annotations are taken where they fit a store's features."""

  kind = 'TFDS'

  def __init__(self, name: str, options: Options):
    super().__init__(options)
    self._builder = _tfds_builder(name)
    info = self._builder.info
    if options.split not in info.splits:
      raise unknown(f'split of {name!r}', options.split, info.splits)
    features = dict(info.features.items())
    self._key = next((key for key in _KEYS if key in features), None)
    columns = options.columns
    for name in ('regions', 'region_captions', 'region_tags', 'tags'):
      if getattr(columns, name):
        raise InputError(
          f'--{name}_column: got it for {self.kind}, whose boxes and tags are '
          f'named as those of a store; expected it for tables, tars and parquet alone'
        )
    images = tfds_folder.images_of(self._builder)
    image = columns.image
    if not image and images:
      image = 'image' if 'image' in images else images[0]
    if image not in images:
      raise unknown('--image_column (image features)', image, images)
    columns = dataclasses.replace(columns, image=image)
    if not any(_is_text(feature) for key, feature in features.items() if key != 'id'):
      columns = dataclasses.replace(columns, alt_text=NONE, captions=(NONE,))
    self._columns = guess(columns, list(features))
    named = {'label': columns.label, 'mask': columns.mask}
    self._annotations = {}  # of a store -> feature of the data set
    for annotation in store.ANNOTATIONS:
      feature = named.get(annotation) or annotation
      if _fits(annotation, features.get(feature)):
        self._annotations[annotation] = feature
    self.annotations = tuple(self._annotations)
    if 'label' in self._annotations:
      self.label_names = tuple(features[self._annotations['label']].names)
    split = info.splits[options.split]
    self.total = split.num_examples
    self.size = split.num_bytes

  @property
  def annotations_json(self) -> bytes:
    path = pathlib.Path(self._builder.data_dir) / store.ANNOTATIONS_FILE
    return path.read_bytes() if path.is_file() else b''

  def pieces(self, size: int) -> Sequence[Piece]:
    if not self._in_tfrecords():
      return ranges(self.total, size, self.size)
    split = self._builder.info.splits[self.options.split]
    pieces = []
    first = 0
    for path, length in zip(sorted(map(os.fspath, split.filepaths)), split.shard_lengths):
      pieces.append(Piece(path, first, first + length, os.path.getsize(path)))
      first += length
    return pieces

  def read(self, piece: Piece) -> Iterator[Sample]:
    for number, record in enumerate(self._records(piece), piece.first):
      if isinstance(record, Exception):
        yield Sample(str(number), None, '', [], {}, f'damaged record: {record}')
      else:
        yield self._sample(number, record)

  def _in_tfrecords(self):
    return self._builder.info.file_format.value == 'tfrecord'

  def _sample(self, number, record):
    extra = {name: record[feature] for name, feature in self._annotations.items()}
    if 'boxes' in extra:
      extra['boxes'] = np.asarray(extra['boxes'], np.float32).reshape(-1, 4)
    key = record[self._key] if self._key else number
    key = key.decode('utf-8', 'replace') if isinstance(key, bytes) else str(key)
    alt_text, captions = self._texts([record], self._columns)
    return Sample(key, record[self._columns.image], alt_text, captions, extra)

  def _records(self, piece):
    """The records as dicts, or the errors of those that are damaged."""
    if not self._in_tfrecords():
      read = self._source.__getitem__
      items = range(piece.first, piece.stop)
    else:
      items = tfrecords(piece.file)
      read = functools.partial(
        self._builder.info.features.deserialize_example_np,
        decoders=tfds_folder.undecoded(self._builder),
      )
    for item in items:
      if isinstance(item, InputError):
        yield item
        continue
      try:
        yield read(item)
      except MemoryError:  # says nothing of the record
        raise
      except Exception as error:  # protobuf and TFDS raise their own
        yield error

  @functools.cached_property
  def _source(self):
    return tfds_folder.Source(self._builder, self.options.split)


def _is_text(feature):
  """Text, or a sequence of texts or of records with a text."""
  f = tfds.features
  if isinstance(feature, f.Text):
    return True
  if isinstance(feature, f.Sequence):
    return _is_text(feature.feature)
  return isinstance(feature, f.FeaturesDict) and any(
    _is_text(inner) for _, inner in feature.items()
  )


def _fits(annotation, feature):
  """Whether a feature of another data set can be stored under the name of an annotation."""
  f = tfds.features
  images = {'mask': (1, np.uint8), 'depth': (1, np.uint16), 'normals': (3, np.uint8)}
  if annotation == 'label':
    return isinstance(feature, f.ClassLabel)
  if annotation in images:
    channels, dtype = images[annotation]
    same_kind = isinstance(feature, f.Image) and feature.np_dtype == dtype
    return same_kind and feature.shape[-1] == channels
  if annotation == 'boxes':
    inner = feature.feature if isinstance(feature, f.Sequence) else feature
    return isinstance(inner, f.Tensor) and inner.shape[-1:] == (4,)
  if annotation.endswith('_boxes'):  # to which box each text belongs
    return isinstance(feature, f.Sequence) and feature.feature.np_dtype == np.int64
  return isinstance(feature, f.Sequence) and isinstance(feature.feature, f.Text)


def _tfds_builder(name):
  """The builder of a data set; TFDS downloads and prepares one that is not prepared yet."""
  try:
    folder = store.resolve(name)
  except InputError:
    return tfds_folder.prepare(name)
  builder = tfds_folder.open_builder(folder)
  for info in builder.info.splits.values():
    for path in map(os.fspath, info.filepaths):
      if not os.path.exists(path):
        raise InputError(f'{folder!r} is not a complete TFDS data set: {path!r} is missing')
  return builder


def tfrecords(path: str) -> Iterator[bytes | InputError]:
  """The records of a TFRecord file; an error in place of one that its checksum does not fit.

  Raises InputError, with the number of records before it, where the file is truncated, or a length
  does not fit its checksum: where the next record starts is then unknown.
  """
  with open(path, 'rb') as file:
    read = 0
    left = os.fstat(file.fileno()).st_size
    # A record: length (8 bytes), its checksum (4), the data, its checksum (4).
    while header := file.read(12):
      left -= 12
      length = header[:8]
      size = int.from_bytes(length, 'little')
      if len(header) == 12 and not _fits_checksum(length, header[8:]):
        raise InputError(
          f'{path!r} is damaged after {read} records: a length does not fit its checksum; copy it '
          f'again'
        )
      # Compared first: what is not there would be read into memory.
      if len(header) < 12 or size + 4 > left:
        raise InputError(f'{path!r} is truncated after {read} records; copy it again')
      data = file.read(size)
      if _fits_checksum(data, file.read(4)):
        yield data
      else:
        yield InputError(f'{path!r}: record {read} does not fit its checksum; copy it again')
      left -= size + 4
      read += 1


def _fits_checksum(data, checksum):
  return crc32c.masked(data) == int.from_bytes(checksum, 'little')

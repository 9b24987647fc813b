"""Readers of columnar and record files: parquet, Hugging Face `save_to_disk` folders and TFDS.

Parquet and Arrow are read by pyarrow in batches, TFDS by its own data source; TFRecord files are
read here, because TFDS needs TensorFlow for them.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds

from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.data import store, tfds_folder
from tips_jax.data.ingest.cells import label_names, label_text
from tips_jax.data.ingest.columns import IMAGE_NAMES, NONE, guess
from tips_jax.data.ingest.reader import Options, Reader, Sample, check_local

_BATCH_ROWS = 64  # decoded at a time: rows hold whole images
_KEYS = ('id', 'key', '__key__')
_TFDS_KEYS = ('id', 'image/filename', 'filename', 'file_name')


# --- Arrow --------------------------------------------------------------------------------------


class ArrowReader(Reader):
  """Tables of rows with encoded images; `_batches` yields their rows in parts."""

  def __init__(self, files: Sequence[str], schema: pa.Schema, options: Options):
    super().__init__(options)
    self._files = files
    self._schema = schema
    self._names = schema.names
    columns = options.columns
    images = [field.name for field in schema if _holds_images(field.type)]
    # A column of bytes is an image whatever its name, where no column has a usual one.
    if not columns.image and images and not set(images) & set(IMAGE_NAMES):
      columns = dataclasses.replace(columns, image=images[0])
    self._columns = guess(columns, schema.names)
    self.annotations = self._named_annotations()
    if 'label' in self.annotations:
      column = self._columns.label
      self._class_names = _class_names(schema, column)
      self.label_names = self._class_names or label_names(self._values(column))

  def _batches(self, names: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Yields (file, rows) with the columns `names`."""
    raise NotImplementedError

  def _values(self, column):
    for _, batch in self._batches([column]):
      yield from batch.column(0).to_pylist()

  def __iter__(self) -> Iterator[Sample]:
    c = self._columns
    needed = dict.fromkeys((c.image, c.alt_text, *c.captions, c.label, c.mask, *_KEYS))
    names = [name for name in needed if name in self._schema.names]
    current = None
    number = 0  # of the row in its file
    for file, batch in self._batches(names):
      if file != current:
        current = file
        number = 0
      for row in batch.to_pylist():
        yield self._sample(row, file, number)
        number += 1

  def _sample(self, row, file, number):
    c = self._columns
    image, path, problem = self._bytes_of(row[c.image], file)
    alt_text, captions = self._texts([row], c)
    extra = {}
    if 'label' in self.annotations:
      label = row[c.label]
      by_index = self._class_names and isinstance(label, int)
      extra['label'] = label if by_index else label_text(label)
    if 'mask' in self.annotations and row[c.mask]:
      extra['mask'], _, _ = self._bytes_of(row[c.mask], file)
    key = next((row[name] for name in _KEYS if row.get(name) is not None), path)
    key = str(key or f'{os.path.basename(file)}:{number}')
    return Sample(key, image, alt_text, captions, extra, problem)

  def _bytes_of(self, value, file):
    """(bytes or None, path, problem) of bytes, a path, or a Hugging Face image: {bytes, path}."""
    path = ''
    if isinstance(value, dict):
      path = value.get('path') or ''
      value = value.get('bytes') or path
    if isinstance(value, bytes):
      return value, path, ''
    if not value:
      return None, path, 'empty image cell'
    check_local([value], self._columns.image, file)
    for folder in (self.options.images, os.path.dirname(file)):
      place = pathlib.Path(folder, value).expanduser()
      if place.is_file():
        return place.read_bytes(), value, ''
    return None, value, 'no such file'


def _holds_images(kind):
  return (
    pa.types.is_binary(kind)
    or pa.types.is_large_binary(kind)
    or (pa.types.is_struct(kind) and kind.get_field_index('bytes') >= 0)
  )


def _class_names(schema, column):
  """The class names that Hugging Face keeps in the metadata of a schema; () if it has none."""
  try:
    kinds = json.loads((schema.metadata or {})[b'huggingface'])['info']['features']
    return tuple(kinds[column]['names'])
  except (KeyError, TypeError, ValueError):
    return ()


class ParquetReader(ArrowReader):
  """Parquet files with images as bytes, as {bytes, path}, or as paths beside the file."""

  kind = 'parquet'

  def __init__(self, files: Sequence[str], options: Options):
    opened = [_open_parquet(f) for f in files]
    self.total = sum(f.metadata.num_rows for f in opened)
    super().__init__(files, opened[0].schema_arrow, options)

  def _batches(self, names):
    for path in self._files:
      try:
        for batch in _open_parquet(path).iter_batches(batch_size=_BATCH_ROWS, columns=names):
          yield path, batch
      except (pa.ArrowException, OSError) as error:
        raise InputError(
          f'{path!r} is damaged or has other columns than the first file ({error})'
        ) from error


def _open_parquet(path):
  try:
    return pq.ParquetFile(path)
  except (pa.ArrowException, OSError) as error:
    raise InputError(
      f'{path!r} is not a complete parquet file ({error}); copy or write it again'
    ) from error


class HuggingFaceReader(ArrowReader):
  """A folder of `datasets.Dataset.save_to_disk`, or a DatasetDict, of which a split is read."""

  kind = 'Hugging Face datasets'

  def __init__(self, path: str, options: Options):
    folder = pathlib.Path(path)
    splits_file = folder / 'dataset_dict.json'
    if splits_file.exists():
      splits = _json_file(splits_file).get('splits', [])
      if options.split not in splits:
        raise unknown(f'split of {path!r}', options.split, splits)
      folder = folder / options.split
    state = _json_file(folder / 'state.json')
    if state.get('_indices_data_files'):
      raise InputError(
        f'{str(folder)!r} is an index into other files; save it again after flatten_indices()'
      )
    files = [str(folder / file['filename']) for file in state.get('_data_files', [])]
    if not files:
      raise InputError(
        f'{str(folder)!r}: its state.json names no data files; expected a save_to_disk folder'
      )
    self.total = sum(len(batch) for file in files for batch in _arrow_batches(file))
    super().__init__(files, _open_arrow(files[0]).schema, options)

  def _batches(self, names):
    for path in self._files:
      for batch in _arrow_batches(path):
        for start in range(0, len(batch), _BATCH_ROWS):
          yield path, batch.slice(start, _BATCH_ROWS).select(names)


def _open_arrow(path):
  try:
    return pa.ipc.open_stream(pa.memory_map(path))
  except (pa.ArrowException, OSError) as error:
    raise InputError(
      f'{path!r} is not an Arrow stream ({error}); copy or write it again'
    ) from error


def _arrow_batches(path):
  stream = _open_arrow(path)
  while True:
    try:
      batch = stream.read_next_batch()
    except StopIteration:
      return
    except (pa.ArrowException, OSError) as error:
      raise InputError(
        f'{path!r} is truncated or damaged ({error}); copy or write it again'
      ) from error
    yield batch


def _json_file(path):
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise InputError(
      f'{str(path)!r}: cannot be read ({error}); expected a Hugging Face save_to_disk folder'
    ) from error


# --- TFDS ---------------------------------------------------------------------------------------


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
    self._key = next((key for key in _TFDS_KEYS if key in features), None)
    columns = options.columns
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
    self.total = info.splits[options.split].num_examples

  @property
  def annotations_json(self) -> bytes:
    path = pathlib.Path(self._builder.data_dir) / store.ANNOTATIONS_FILE
    return path.read_bytes() if path.is_file() else b''

  def __iter__(self) -> Iterator[Sample]:
    for i, record in enumerate(self._records()):
      if isinstance(record, Exception):
        yield Sample(str(i), None, '', [], {}, f'damaged record: {record}')
      else:
        yield self._sample(i, record)

  def _sample(self, number, record):
    extra = {name: record[feature] for name, feature in self._annotations.items()}
    if 'boxes' in extra:
      extra['boxes'] = np.asarray(extra['boxes'], np.float32).reshape(-1, 4)
    key = record[self._key] if self._key else number
    key = key.decode('utf-8', 'replace') if isinstance(key, bytes) else str(key)
    alt_text, captions = self._texts([record], self._columns)
    return Sample(key, record[self._columns.image], alt_text, captions, extra)

  def _records(self):
    """The records as dicts, or the errors of those that are damaged."""
    info = self._builder.info
    split = self.options.split
    if info.file_format.value != 'tfrecord':
      source = tfds_folder.Source(self._builder, split)
      read = source.__getitem__
      numbers = range(len(source))
    else:
      paths = sorted(map(os.fspath, info.splits[split].filepaths))
      numbers = itertools.chain.from_iterable(map(tfrecords, paths))
      read = functools.partial(
        info.features.deserialize_example_np, decoders=tfds_folder.undecoded(self._builder)
      )
    for number in numbers:
      try:
        yield read(number)
      except Exception as error:  # protobuf and TFDS raise their own
        yield error


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


def tfrecords(path: str) -> Iterator[bytes]:
  """The records of a TFRecord file; InputError names the file and the count if it is truncated."""
  with open(path, 'rb') as file:
    read = 0
    left = os.fstat(file.fileno()).st_size
    # A record: length (8 bytes), its checksum (4), the data, its checksum (4).
    while header := file.read(12):
      left -= 12
      size = int.from_bytes(header[:8], 'little')
      # Compared first: a damaged length would be read into memory.
      if len(header) < 12 or size + 4 > left:
        raise InputError(f'{path!r} is truncated after {read} records; copy it again')
      yield file.read(size + 4)[:-4]
      left -= size + 4
      read += 1

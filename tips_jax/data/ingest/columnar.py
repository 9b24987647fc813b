"""Readers of columnar and record files: parquet, Hugging Face `save_to_disk` folders, and TFDS data
sets.

Parquet and Arrow are read by pyarrow in batches, TFDS by its own data source; TFRecord files are
read here, because TFDS needs TensorFlow for them.
"""

import json
import os
import struct
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds

from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.data import store
from tips_jax.data.ingest.columns import IMAGE_NAMES, NONE, guess
from tips_jax.data.ingest.reader import Reader, Sample
from tips_jax.data.ingest.tables import label_names

_BATCH_ROWS = 64


# --- Arrow --------------------------------------------------------------------------------------


class ArrowReader(Reader):
  """Tables of rows with encoded images: `batches()` yields (file, pyarrow batch) with the columns
  of `schema`.
  """

  def __init__(self, files, schema, options):
    super().__init__(options)
    self._files, self._schema = files, schema
    images = [field.name for field in schema if _holds_images(field.type)]
    if not options.columns.image and images and not set(images) & set(IMAGE_NAMES):
      options = self.options = replace(options, columns=replace(options.columns, image=images[0]))
    self._columns = guess(options.columns, schema.names)
    self.annotations = self._named_annotations()
    if 'label' in self.annotations:
      self.label_names = _class_names(schema, self._columns.label) or label_names(
        v for _, batch in self.batches([self._columns.label]) for v in batch.column(0).to_pylist()
      )

  def batches(self, names):
    raise NotImplementedError

  def __iter__(self):
    c = self._columns
    wanted = dict.fromkeys(
      (c.image, c.alt_text, *c.captions, c.label, c.mask, 'id', 'key', '__key__')
    )
    names = [name for name in wanted if name in self._schema.names]
    for file, first_row, batch in self._numbered(names):
      for i, row in enumerate(batch.to_pylist()):
        image, path, problem = self._bytes_of(row[c.image], file)
        alt_text, captions = self._texts([row], c)
        extra = {}
        if 'label' in self.annotations and row[c.label] is not None:
          extra['label'] = row[c.label] if isinstance(row[c.label], int) else str(row[c.label])
        if 'mask' in self.annotations and row[c.mask]:
          extra['mask'] = self._bytes_of(row[c.mask], file)[0]
        named = next(
          (row[name] for name in ('id', 'key', '__key__') if row.get(name) is not None), path
        )
        key = str(named or f'{os.path.basename(file)}:{first_row + i}')
        yield Sample(key, image, alt_text, captions, extra, problem)

  def _numbered(self, names):
    current, row = None, 0
    for file, batch in self.batches(names):
      row = row if file == current else 0
      current = file
      yield file, row, batch
      row += len(batch)

  def _bytes_of(self, value, file):
    """(bytes or None, path, problem) of bytes, a path, or the {bytes, path} of a Hugging Face
    image.
    """
    path = ''
    if isinstance(value, dict):
      value, path = value.get('bytes'), value.get('path') or ''
      value = value or path
    if isinstance(value, bytes):
      return value, path, ''
    if not value:
      return None, path, 'empty image cell'
    if value.startswith(('http://', 'https://')):
      raise InputError(
        f'--input: column {self._columns.image!r} of {file!r} holds web addresses; expected image bytes '
        f'or files; download them first, for example with img2dataset'
      )
    for folder in (self.options.images, os.path.dirname(file)):
      place = os.path.join(os.path.expanduser(folder), value)
      if os.path.isfile(place):
        with open(place, 'rb') as opened:
          return opened.read(), value, ''
    return None, value, 'no such file'


def _holds_images(kind):
  return (
    pa.types.is_binary(kind)
    or pa.types.is_large_binary(kind)
    or (pa.types.is_struct(kind) and 'bytes' in [field.name for field in kind])
  )


def _class_names(schema, column):
  """The class names that Hugging Face keeps in the metadata of a schema; () when there are none."""
  try:
    kinds = json.loads((schema.metadata or {})[b'huggingface'])['info']['features']
    return tuple(kinds[column]['names'])
  except (KeyError, TypeError, ValueError):
    return ()


class ParquetReader(ArrowReader):
  """Parquet files with images as bytes, as {bytes, path}, or as paths beside the file."""

  kind = 'parquet'

  def __init__(self, files, options):
    opened = [_open_parquet(f) for f in files]
    self.total = sum(f.metadata.num_rows for f in opened)
    super().__init__(files, opened[0].schema_arrow, options)

  def batches(self, names):
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
      f'{path!r} is not a whole parquet file ({error}); copy or write it again'
    ) from error


class HuggingFaceReader(ArrowReader):
  """A folder written by `datasets.Dataset.save_to_disk`, or a DatasetDict whose split is
  `options.split`.
  """

  kind = 'Hugging Face datasets'

  def __init__(self, path, options):
    folder = path
    if os.path.exists(os.path.join(path, 'dataset_dict.json')):
      splits = _json_file(os.path.join(path, 'dataset_dict.json')).get('splits', [])
      if options.split not in splits:
        raise unknown(f'split of {path!r}', options.split, splits)
      folder = os.path.join(path, options.split)
    state = _json_file(os.path.join(folder, 'state.json'))
    if state.get('_indices_data_files'):
      raise InputError(
        f'{folder!r} is an index into other files; save it again after flatten_indices()'
      )
    files = [os.path.join(folder, f['filename']) for f in state.get('_data_files', [])]
    if not files:
      raise InputError(
        f'{folder!r}: its state.json names no data files; expected a save_to_disk folder'
      )
    self.total = sum(len(batch) for f in files for batch in _arrow_batches(f))
    super().__init__(files, _open_arrow(files[0]).schema, options)

  def batches(self, names):
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
    with open(path) as file:
      return json.load(file)
  except (OSError, ValueError) as error:
    raise InputError(
      f'{path!r}: cannot be read ({error}); expected a Hugging Face save_to_disk folder'
    ) from error


# --- TFDS ---------------------------------------------------------------------------------------


class TfdsReader(Reader):
  """A TFDS data set by folder or name; annotations come along where they fit the features of a
  store.
  """

  kind = 'TFDS'

  def __init__(self, name, options):
    super().__init__(options)
    self._builder = _tfds_builder(name)
    info = self._builder.info
    if options.split not in info.splits:
      raise unknown(f'split of {name!r}', options.split, info.splits)
    self._features = dict(info.features.items())
    self._encoded = {
      k: tfds.decode.SkipDecoding()
      for k, f in self._features.items()
      if isinstance(f, tfds.features.Image)
    }
    wanted = options.columns
    image = wanted.image or ('image' if 'image' in self._encoded else next(iter(self._encoded), ''))
    if image not in self._encoded:
      raise unknown('--image_column (image features)', image, self._encoded)
    wanted = replace(wanted, image=image)
    if not any(_is_text(f) for k, f in self._features.items() if k != 'id'):
      wanted = replace(wanted, alt_text=NONE, captions=(NONE,))
    self._columns = guess(wanted, list(self._features))
    named = {'label': wanted.label, 'mask': wanted.mask}
    self._annotations = {
      a: named.get(a) or a
      for a in store.ANNOTATIONS
      if _fits(a, self._features.get(named.get(a) or a))
    }
    self.annotations = tuple(self._annotations)
    if 'label' in self._annotations:
      self.label_names = tuple(self._features[self._annotations['label']].names)
    self.total = info.splits[options.split].num_examples
    self.annotations_file = os.path.join(os.fspath(self._builder.data_dir), 'annotations.json')

  def __iter__(self):
    ids = [
      name for name in ('id', 'image/filename', 'filename', 'file_name') if name in self._features
    ]
    for i, record in enumerate(self._records()):
      extra = {name: record[column] for name, column in self._annotations.items()}
      if 'boxes' in extra:
        extra['boxes'] = np.asarray(extra['boxes'], np.float32).reshape(-1, 4)
      key = record[ids[0]] if ids else i
      key = key.decode('utf-8', 'replace') if isinstance(key, bytes) else str(key)
      alt_text, captions = self._texts([record], self._columns)
      yield Sample(key, record[self._columns.image], alt_text, captions, extra)

  def _records(self):
    if self._builder.info.file_format.value == 'tfrecord':
      info = self._builder.info.splits[self.options.split]
      for path in sorted(os.fspath(p) for p in info.filepaths):
        for record in tfrecords(path):
          yield self._builder.info.features.deserialize_example_np(record, decoders=self._encoded)
    else:
      yield from self._builder.as_data_source(self.options.split, decoders=self._encoded)


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
  """True where a feature of another data set can be stored under the name of an annotation."""
  f = tfds.features
  if annotation == 'label':
    return isinstance(feature, f.ClassLabel)
  if annotation in ('mask', 'depth', 'normals'):
    channels, kind = {'mask': (1, np.uint8), 'depth': (1, np.uint16), 'normals': (3, np.uint8)}[
      annotation
    ]
    return (
      isinstance(feature, f.Image) and feature.shape[-1] == channels and feature.np_dtype == kind
    )
  if annotation == 'boxes':
    inner = feature.feature if isinstance(feature, f.Sequence) else feature
    return isinstance(inner, f.Tensor) and inner.shape[-1:] == (4,)
  return isinstance(feature, f.Sequence) and isinstance(feature.feature, f.Text)


def _tfds_builder(name):
  """The builder of a prepared data set; a name that is not prepared yet is downloaded and prepared
  by TFDS.
  """
  try:
    folder = store.resolve(name)
  except InputError as missing:
    return _prepared_by_tfds(name, missing)
  try:
    builder = tfds.builder_from_directory(folder)
  except Exception as error:
    raise InputError(f'{folder!r} is not a whole TFDS data set ({error})') from error
  absent = [
    os.fspath(p)
    for info in builder.info.splits.values()
    for p in info.filepaths
    if not os.path.exists(p)
  ]
  if absent:
    raise InputError(f'{folder!r} is not a whole TFDS data set: {absent[0]!r} is missing')
  return builder


def _prepared_by_tfds(name, missing):
  try:
    builder = tfds.builder(name, file_format='array_record')
  except Exception as error:
    raise InputError(
      f'--input: got {name!r}, which is neither a path nor a TFDS data set known here'
    ) from error
  try:
    builder.download_and_prepare()
  except Exception as error:
    raise InputError(
      f'--input: TFDS could not prepare {name!r} ({error}); prepare it with TFDS elsewhere, and give '
      f'its folder'
    ) from missing
  return builder


def tfrecords(path):
  """The records of a TFRecord file; InputError names the file and the count where it is cut short."""
  with open(path, 'rb') as file:
    read = 0
    while header := file.read(12):
      size = struct.unpack('<Q', header[:8])[0] if len(header) == 12 else -1
      record = file.read(size + 4) if size >= 0 else b''
      if size < 0 or len(record) != size + 4:
        raise InputError(f'{path!r} is truncated after {read} records; copy it again')
      yield record[:-4]
      read += 1

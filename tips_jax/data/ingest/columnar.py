"""Readers of parquet and of Hugging Face `save_to_disk` folders, by pyarrow in batches."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.data.ingest import archives, arrow_sizes
from tips_jax.data.ingest.arrow_rows import Row, holds_images, rows
from tips_jax.data.ingest.arrow_rows import row as row_of
from tips_jax.data.ingest.cells import label_names, label_text
from tips_jax.data.ingest.checks import check_image
from tips_jax.data.ingest.columns import IMAGE_NAMES, guess, plain
from tips_jax.data.ingest.reader import Note, Options, Piece, Reader, Sample, check_local
from tips_jax.data.ingest.splits import select_values
from tips_jax.data.pixels.images import MAX_PIXELS

_MAX_HUGE = 16  # rows with larger cells: each takes a second, and may take only some bytes
_MAX_RATIO = 100  # between rows and what they take in the file: images hardly shrink
_FEW_ROWS = 16  # of a group, decoded at once
_BASE64 = re.compile(r'(data:[\w/;]*base64,)?[A-Za-z0-9+/\s]{200,}=*\s*')
_KEYS = ('id', 'key', '__key__')


# --- Arrow --------------------------------------------------------------------------------------


class ArrowReader(Reader):
  """Tables of rows with encoded images; `_batches` yields the rows of a piece, which is a range of
  the groups of a file.
  """

  def __init__(
    self,
    files: Sequence[str],
    schemas: Sequence[pa.Schema],
    groups: Sequence[Sequence[tuple[int, int]]],
    options: Options,
  ):
    """groups: (rows, bytes) of the groups of rows of each file."""
    super().__init__(options)
    self._groups = dict(zip(files, groups))
    self.size = sum(size for of_file in groups for _, size in of_file)
    self.total = sum(rows for of_file in groups for rows, _ in of_file)
    for file, schema in zip(files, schemas):
      with _damaged(file, 'a table whose columns have names in UTF-8'):
        list(schema.names)
    self._schema = schemas[0]
    self._names = self._schema.names
    self._splits = None  # values of the column 'split' in rows that are read; None: in any row
    self._split_column = next((name for name in self._names if plain(name) == 'split'), '')
    columns = options.columns
    if not columns.image:
      columns = dataclasses.replace(columns, image=self._image_column())
    self._columns = guess(columns, self._schema.names)
    for file, schema in zip(files, schemas):
      self._check(file, schema)
    if self._split_column:
      self._choose_split()
    self.annotations = self._named_annotations()
    if 'label' in self.annotations:
      column = self._columns.label
      self._class_names = _class_names(self._schema, column)
      self.label_names = self._class_names or label_names(self._values(column))

  def pieces(self, size: int) -> Sequence[Piece]:
    pieces = []
    for file, groups in self._groups.items():
      first = 0
      taken = 0
      for stop, (_, of_group) in enumerate(groups, 1):
        taken += of_group
        if taken >= size or stop == len(groups):
          pieces.append(Piece(file, first, stop, taken))
          first = stop
          taken = 0
    return pieces

  def count(self, piece: Piece) -> int:
    """The number of rows; those of other splits are among them."""
    return sum(rows for rows, _ in self._groups[piece.file][piece.first : piece.stop])

  def _batches(self, piece: Piece, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yields the rows with the columns `names`. One row at a time: a few bytes of a file may be the
    same huge cell in many rows.
    """
    raise NotImplementedError

  def _read(self, piece, names):
    """Yields (number in its file, row, problem) for the rows of the split."""
    if self._splits is not None:
      names = list(dict.fromkeys((*names, self._split_column)))
    before = self.count(piece._replace(first=0, stop=piece.first))
    huge = 0
    for number, batch in enumerate(self._batches(piece, names), before):
      row, problem = row_of(batch)
      huge += bool(problem)
      if huge > _MAX_HUGE:
        raise InputError(
          f'{piece.file!r}: {huge} rows have cells that are too large, the last one {problem}; is '
          f'it made to fill the memory?'
        )
      if self._splits is None or self._split_of(row) in self._splits:
        yield number, row, problem

  def _values(self, column):
    for piece in self.pieces(sys.maxsize):
      for _, row, _ in self._read(piece, [column]):
        yield row[column]

  def _choose_split(self):
    """Leaves out, and notes, the rows that a column 'split' gives to other splits."""
    column = self._split_column
    self._split_names = _class_names(self._schema, column)
    counts = collections.Counter(self._split_of({column: x}) for x in self._values(column))
    self._splits = select_values(counts, self.options.split, f'the column {column!r}')
    self.total = sum(counts[value] for value in self._splits)
    for value, count in counts.items():
      if value not in self._splits:
        self.notes.append(Note('other_split', value or '(none)', '', count))

  def _split_of(self, row):
    """What the column 'split' of a row says: a text, or the name of a class; '' for all else."""
    value = row[self._split_column]
    if isinstance(value, int) and 0 <= value < len(self._split_names):
      return self._split_names[value]
    return value.strip() if isinstance(value, str) else ''

  def _image_column(self):
    """The column of bytes that is an image, where none of them has a usual name; else ''."""
    held = [field.name for field in self._schema if holds_images(field.type)]
    if set(held) & set(IMAGE_NAMES):
      return ''
    for name in held:
      value = next(filter(None, self._values(name)), None)
      if isinstance(value, dict):
        value = value['bytes']
      if not check_image(value or b'', min_side=1, max_pixels=MAX_PIXELS).problem:
        return name
    return ''

  def _needed(self):
    """The columns that are read."""
    c = self._columns
    columns = (c.image, c.alt_text, *c.captions, c.label, c.mask, *_KEYS, self._split_column)
    columns += (c.regions, c.region_captions, c.region_tags, c.tags)
    names = dict.fromkeys(columns)
    return [name for name in names if name in self._schema.names]

  def _check(self, file, schema):
    """InputError for a file whose columns cannot be read as the first file's are."""
    for name in self._needed():
      count = schema.names.count(name)
      if count != 1:
        raise InputError(
          f'{file!r}: got {count} columns {name!r} among {schema.names}; expected one, as in the '
          f'first file'
        )
    column = self._columns.image
    kind = schema.field(column).type
    if not (holds_images(kind) or _names_images(kind)):
      held = [field.name for field in schema if holds_images(field.type)]
      raise InputError(
        f'{file!r}: image column {column!r} holds {kind}; expected encoded images as bytes or as '
        f'{{bytes, path}}, or file names; columns that do: {held}'
      )

  def read(self, piece: Piece) -> Iterator[Sample]:
    for number, row, problem in self._read(piece, self._needed()):
      yield self._sample(row, problem, piece.file, number)

  def sample(self, row: Row, file: str, number: int) -> Sample:
    """The sample of a row, which has this number in its file."""
    return self._sample(*row, file, number)

  def rows_of_split(self, piece: Piece) -> list[int] | None:
    """Which rows of a piece, by their place in it, are of the split; None: all of them."""
    if self._splits is None:
      return None
    before = self.count(piece._replace(first=0, stop=piece.first))
    return [number - before for number, _, _ in self._read(piece, [])]

  def _sample(self, row, problem, file, number):
    c = self._columns
    image, path, of_image = self._bytes_of(row[c.image], file)
    alt_text, captions = self._texts([row], c)
    extra = {}
    if 'label' in self.annotations:
      label = row[c.label]
      by_index = self._class_names and isinstance(label, int)
      extra['label'] = label if by_index else label_text(label)
    if 'mask' in self.annotations and row[c.mask]:
      extra['mask'], _, _ = self._bytes_of(row[c.mask], file)
    notes = self._take_regions([row], extra)
    key = next((row[name] for name in _KEYS if row.get(name) is not None), path)
    key = str(key or f'{os.path.basename(file)}:{number}')
    return Sample(key, image, alt_text, captions, extra, problem or of_image, notes)

  def _bytes_of(self, value, file):
    """(bytes or None, path, problem) of bytes, a path, or a Hugging Face image: {bytes, path}."""
    path = ''
    if isinstance(value, dict):
      path = str(value.get('path') or '')
      value = value.get('bytes') or path
    if isinstance(value, bytes):
      return value, path, ''
    if not value:
      return None, path, 'empty image cell'
    if not isinstance(value, str):
      return None, path, f'a cell of {type(value).__name__}, neither bytes nor a file name'
    check_local([value], self._columns.image, file)
    if _BASE64.fullmatch(value):
      raise InputError(
        f'{file!r}: image column {self._columns.image!r} holds base64 text ({value[:20]}...); '
        f'expected encoded images as bytes: write what base64.b64decode makes of it'
      )
    for folder in (self.options.images, os.path.dirname(file)):
      # No pathlib: what is no possible name (too long, with NUL) is an error to it.
      place = os.path.join(os.path.expanduser(folder), value)
      if os.path.isfile(place):
        return pathlib.Path(place).read_bytes(), value, ''
    return None, value, 'no such file'


def _names_images(kind):
  """Whether cells of an Arrow type may be file names; a column of nothing but nulls has no type."""
  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  if pa.types.is_struct(kind):
    at = kind.get_field_index('path')
    return at >= 0 and _names_images(kind.field(at).type)
  texts = (
    pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
  )
  return texts or pa.types.is_null(kind)


def _class_names(schema, column):
  """The class names that Hugging Face keeps in the metadata of a schema; () if it has none."""
  try:
    kinds = json.loads((schema.metadata or {})[b'huggingface'])['info']['features']
    names = kinds[column]['names']
  except (KeyError, TypeError, ValueError, RecursionError):
    return ()
  return tuple(map(str, names)) if isinstance(names, list) else ()


class ParquetReader(ArrowReader):
  """Parquet files with images as bytes, as {bytes, path}, or as paths beside the file."""

  kind = 'parquet'

  def __init__(self, files: Sequence[str], options: Options):
    schemas = []
    groups = []
    for path in files:
      with _damaged(path, 'a complete parquet file'), _open_parquet(path) as file:
        schemas.append(file.schema_arrow)
        metadata = file.metadata
        of_file = []
        for number in range(metadata.num_row_groups):
          group = metadata.row_group(number)
          of_file.append((group.num_rows, _sizes(group)[0]))
        groups.append(of_file)
    super().__init__(files, schemas, groups, options)

  def _batches(self, piece, names):
    groups = range(piece.first, piece.stop)
    with _damaged(piece.file, 'a complete parquet file'), _open_parquet(piece.file) as file:
      yield from file.iter_batches(batch_size=1, row_groups=groups, columns=names)

  def rows(self, piece: Piece, metadata: pq.FileMetaData) -> list[Row]:
    """The rows of a piece, for `sample`.

    metadata: of the file. InputError for a damaged file, and for rows that take
    far more room in memory than in the file.
    """
    found = []
    size = 0
    groups = range(piece.first, piece.stop)
    with (
      _damaged(piece.file, 'a complete parquet file'),
      _open_parquet(piece.file, metadata) as file,
    ):
      # A few rows at a time, as the same huge cell may be in all of them.
      batches = file.iter_batches(batch_size=_FEW_ROWS, row_groups=groups, columns=self._needed())
      for batch in batches:
        size += batch.nbytes
        _check_expansion(piece.file, piece.size, size)
        found += rows(batch)
    return found

  def metadata(self, path: str) -> pq.FileMetaData:
    """What the end of a file says of its groups of rows."""
    with _damaged(path, 'a complete parquet file'):
      return pq.read_metadata(path)


def _open_parquet(path, metadata=None):
  file = pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True)
  if metadata is not None:  # checked before
    return file
  for number in range(file.num_row_groups):
    _check_expansion(path, *_sizes(file.metadata.row_group(number)))
  return file


def _sizes(group):
  """(bytes of a group of rows in the file, bytes in memory, at least)"""
  taken = 0
  size = 0
  for number in range(group.num_columns):
    column = group.column(number)
    taken += column.total_compressed_size
    # The same value many times takes no bytes in a file, and a few in a column.
    size += max(column.total_uncompressed_size, 4 * column.num_values)
  return taken, size


def _check_expansion(path, taken, size):
  """InputError for rows that are made to fill the memory."""
  if size > max(archives.MAX_BYTES, _MAX_RATIO * taken):
    raise InputError(
      f'{path!r}: {taken:,} bytes of it expand to {size:,} or more; expected at most {_MAX_RATIO} '
      f'times as many; is it made to fill the memory?'
    )


class HuggingFaceReader(ArrowReader):
  """A folder of `datasets.Dataset.save_to_disk`, or a DatasetDict, of which a split is read."""

  kind = 'Hugging Face datasets'

  def __init__(self, path: str, options: Options):
    folder = pathlib.Path(path)
    splits_file = folder / 'dataset_dict.json'
    if splits_file.exists():
      splits = _names_in(splits_file, _json_file(splits_file).get('splits'))
      if options.split not in splits:
        raise unknown(f'split of {path!r}', options.split, splits)
      folder = folder / options.split
    state_file = folder / 'state.json'
    state = _json_file(state_file)
    if state.get('_indices_data_files'):
      raise InputError(
        f'{str(folder)!r} is an index into other files; save it again after flatten_indices()'
      )
    data_files = state.get('_data_files')
    if isinstance(data_files, list) and all(isinstance(file, dict) for file in data_files):
      data_files = [file.get('filename') for file in data_files]
    files = [str(folder / name) for name in _names_in(state_file, data_files)]
    schemas = []
    groups = []
    for file in files:
      with _damaged(file, 'an Arrow stream'), _open_arrow(file) as stream:
        schemas.append(stream.schema)
        # Of the buffers alone: offsets are not checked yet.
        groups.append([(len(batch), batch.get_total_buffer_size()) for batch in stream])
    super().__init__(files, schemas, groups, options)

  def _batches(self, piece, names):
    with _damaged(piece.file, 'an Arrow stream'), _open_arrow(piece.file) as stream:
      for whole in itertools.islice(stream, piece.first, piece.stop):
        batch = whole.select(names)
        # Offsets that point outside of the file would end the process.
        batch.validate(full=True)
        for number in range(len(batch)):
          yield batch.slice(number, 1)


def _open_arrow(path):
  # Of the whole stream: dictionaries stay in memory, and grow from one batch to the next.
  _check_expansion(path, *arrow_sizes.of_stream(path))
  return pa.ipc.open_stream(pa.memory_map(path))


@contextlib.contextmanager
def _damaged(path, expected):
  """What pyarrow raises while it reads a file, as InputError."""
  try:
    yield
  except (InputError, MemoryError):  # the latter says nothing of the file
    raise
  except Exception as error:
    raise InputError(
      f'{path!r} is truncated or damaged, not {expected} ({error}); copy or write it again'
    ) from error


def _json_file(path):
  try:
    content = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(
      f'{str(path)!r}: cannot be read ({error}); expected a Hugging Face save_to_disk folder'
    ) from error
  if not isinstance(content, dict):
    raise InputError(f'{str(path)!r}: got {type(content).__name__}; expected a JSON object')
  return content


def _names_in(file, names):
  """A list of names of files beside `file`, which holds them. Names from files are never paths."""
  if not isinstance(names, list) or not names:
    raise InputError(
      f'{str(file)!r}: names no data files; expected a Hugging Face save_to_disk folder'
    )
  for name in names:
    if not isinstance(name, str) or os.path.basename(name) != name or name in ('', '.', '..'):
      raise InputError(f'{str(file)!r}: got {name!r}; expected the name of a file beside it')
  return names

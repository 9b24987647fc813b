"""Reader of tables (CSV, TSV, JSON, JSONL) that name image files in a folder or a zip."""

import collections
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.archives import is_hidden, open_zip, read_member, reason
from tips_jax.data.ingest.cells import brief, label_names, label_text
from tips_jax.data.ingest.columns import guess, plain
from tips_jax.data.ingest.image_files import ImageFiles
from tips_jax.data.ingest.reader import (
  IMAGES,
  Note,
  Options,
  Piece,
  Reader,
  Sample,
  check_local,
  ranges,
)
from tips_jax.data.ingest.rows import TABLES, parse_table
from tips_jax.data.ingest.splits import select, select_values, splits_in

_PROBE_ROWS = 100
_SIZED_ROWS = 32


class TableReader(Reader):
  """A CSV, TSV, JSON or JSONL table whose image column names files in a folder or a zip.

  Rows that name the same image are one sample. Images are searched in --images, or beside the
  table.
  """

  kind = 'table'

  def __init__(self, path: str, options: Options):
    super().__init__(options)
    self.path = path
    name = path  # of a table in a zip: the path of the zip and that in the zip
    if path.lower().endswith('.zip'):
      name, data, problem = self._from_zip()
    else:
      data, problem = read_table(path)
    if data is None:
      raise InputError(f'--input: cannot read the table {name!r} ({problem}); copy it again')
    rows, notes = parse_table(data, name)
    self.notes += notes
    self._names = _column_names(rows)
    self._columns = guess(options.columns, self._names)
    rows = self._of_split(rows)
    self._rows = {}
    for number, row in enumerate(rows, 1):
      image = row.get(self._columns.image)
      if isinstance(image, (list, dict)):
        self.notes.append(Note('bad_row', f'row {number}', f'its image is {brief(image)}'))
      else:
        self._rows.setdefault(_word(image), []).append(row)
    self.total = len(self._rows)
    self._files = self._image_files(name)
    self.annotations = self._named_annotations()
    if 'label' in self.annotations:
      self.label_names = label_names(row.get(self._columns.label) for row in rows)
    self._probe()

  def _from_zip(self):
    """(name, bytes or None, reason) of the table inside a zip; notes the others."""
    with open_zip(self.path) as archive:
      found = table_names(name for name in archive.namelist() if not is_hidden(name))
      read = functools.partial(read_member, archive)
      tables = found
      if len(found) > 1:
        tables = with_rows(found, read, self.options)
      if len(tables) > 1:
        tables, _ = select(tables, self.options.split, f'the tables in {self.path!r}')
      if len(tables) != 1:
        raise InputError(
          f'--input: got {self.path!r} with the tables {(tables or found)[:5]}; expected one table '
          f'({", ".join(TABLES)}) in it; or give the path of the table as --input and the zip as '
          f'--images'
        )
      (name,) = tables
      for other in found:
        if other != name:
          self.notes.append(Note('other_file', other, f'the table is {name!r}'))
      return os.path.join(self.path, name), *read(name)

  def _image_files(self, name):
    if self.options.images:
      return ImageFiles(*_in_images(self.options.images))
    if name != self.path:
      inside = os.path.relpath(os.path.dirname(name), self.path)
      return ImageFiles([], [self.path], table_folder=inside)
    return ImageFiles(*_beside(name))

  def _of_split(self, rows):
    """The rows of the split that is read, where a column or the images' folders name splits."""
    values = self._split_values(rows)
    counts = collections.Counter(values)
    chosen = select_values(counts, self.options.split, f'the table {self.path!r}')
    for value, count in counts.items():
      if value not in chosen:
        self.notes.append(Note('other_split', value or '(none)', '', count))
    return [row for row, value in zip(rows, values) if value in chosen]

  def _split_values(self, rows):
    """What may name the split of each row: a column, or the folder of its image."""
    for name in self._names:
      if plain(name) == 'split':
        return [_word(row.get(name)) for row in rows]
    folders = [os.path.dirname(_word(row.get(self._columns.image))) for row in rows]
    if len(set().union(*map(splits_in, set(folders)))) > 1:
      return folders
    return [''] * len(rows)

  def _probe(self):
    """Fails early if none of the first images is found: the folder must be wrong."""
    first = list(self._rows)[:_PROBE_ROWS]
    if not first:
      raise InputError(f'--input: no row of {self.path!r} names one image; {self.notes[0].detail}')
    check_local(first, self._columns.image, self.path)
    if not self._files.settle(first):
      raise InputError(
        f'--images: none of the first {len(first)} images of {self.path!r} (such as {first[0]!r}) '
        f'is in {self._files}; say where they are with --images=FOLDER or --images=ZIP'
      )

  @functools.cached_property
  def size(self) -> int:
    """By some of the images: the sizes of all would take as long as reading some thousands."""
    names = list(self._rows)[:: max(len(self._rows) // _SIZED_ROWS, 1)]
    sizes = []
    for name in names:
      image, _ = self._files.read(name)
      sizes.append(len(image or b''))
    return sum(sizes) * len(self._rows) // len(names)

  def pieces(self, size: int) -> Sequence[Piece]:
    return ranges(len(self._rows), size, self.size)

  def read(self, piece: Piece) -> Iterator[Sample]:
    for name, rows in itertools.islice(self._rows.items(), piece.first, piece.stop):
      alt_text, captions = self._texts(rows, self._columns)
      image, problem = self._files.read(name)
      extra = {}
      notes = ()
      if 'label' in self.annotations:
        notes = self._take_label(name, rows, extra)
      notes += self._take_regions(rows, extra)
      mask = rows[0].get(self._columns.mask)
      if 'mask' in self.annotations and mask:
        extra['mask'], _ = self._files.read(_word(mask))
      yield Sample(name, image, alt_text, captions, extra, problem, notes)

  def _take_label(self, name, rows, extra):
    """Puts the label of an image into `extra`; returns notes of what is not as written."""
    written = [row.get(self._columns.label) for row in rows]
    labels = list(filter(None, dict.fromkeys(map(label_text, written))))
    if not labels:
      return ()
    extra['label'] = labels[0]
    if len(labels) > 1:
      return (Note('other_label', name, f'{labels}: the first is taken'),)
    if isinstance(written[0], str) and written[0] != labels[0]:
      return (Note('label_spaces', name, repr(written[0])),)
    return ()


def table_names(names: Iterable[str]) -> list[str]:
  """The names of tables; JSON beside an image of its name is about that image."""
  images = set()
  tables = []
  for name in names:
    stem, end = os.path.splitext(name)
    if end[1:].lower() in IMAGES:
      images.add(stem)
    elif end.lower() in TABLES:
      tables.append(name)
  found = []
  for name in tables:
    stem, end = os.path.splitext(name)
    if end.lower() != '.json' or stem not in images:
      found.append(name)
  return found


def with_rows(
  names: Iterable[str], read: Callable[[str], tuple[bytes | None, str]], options: Options
) -> list[str]:
  """Those of the tables that have rows with an image and a text; `read` gives their bytes."""
  found = []
  for name in names:
    data, _ = read(name)
    try:
      rows, _ = parse_table(data or b'', name)
      guess(options.columns, _column_names(rows))
    except InputError:
      continue
    found.append(name)
  return found


def _word(cell):
  """A name in a cell; '' for none and for what is no name."""
  if cell is None or isinstance(cell, (list, dict)):
    return ''
  return str(cell).strip()


def _column_names(rows):
  # Rows of JSON may lack columns.
  return list(dict.fromkeys(itertools.chain.from_iterable(rows)))


def read_table(path: str) -> tuple[bytes | None, str]:
  """(bytes, '') of a table on disk, which may be of any size, or (None, the reason)."""
  try:
    return pathlib.Path(path).read_bytes(), ''
  except OSError as error:
    return None, reason(error)


def _in_images(images):
  """(folders, zips) of --images."""
  images = os.path.expanduser(images)
  if not os.path.exists(images):
    raise InputError(f'--images: got {images!r}, which does not exist; expected a folder or a zip')
  if os.path.isdir(images):
    return [images], []
  return [], [images]


def _beside(table):
  """(folders, zips) beside a table, of the zips the one of its name."""
  path = pathlib.Path(table).absolute()
  zips = []
  for other in sorted(path.parent.iterdir()):
    if other.suffix.lower() == '.zip' and not is_hidden(other.name):
      zips.append(other)
  same_name = path.with_suffix('.zip')
  if same_name in zips:
    zips = [same_name]
  return [path.parent], zips

"""Reader of tables (CSV, TSV, JSON, JSONL) that name image files in a folder or a zip."""

import csv
import functools
import itertools
import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.columns import guess
from tips_jax.data.ingest.reader import Options, Reader, Sample, check_local, parse_json

TABLES = ('.csv', '.tsv', '.jsonl', '.ndjson', '.json')
_PROBE_ROWS = 100

Path = str | pathlib.Path
# A file on disk, or a member of a zip.
Place = str | tuple[zipfile.ZipFile, str]


class TableReader(Reader):
  """A CSV, TSV, JSON or JSONL table whose image column names files in a folder or a zip.

  Rows that name the same image are one sample. Images are searched in --images, or beside the
  table.
  """

  kind = 'table'

  def __init__(self, path: str, options: Options):
    super().__init__(options)
    self.path = path
    if path.lower().endswith('.zip'):
      rows = _zip_table(path)
      zips = [path]
    else:
      rows = _read_table(path)
      zips = []
    # Rows of JSON may lack columns.
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    self._columns = guess(options.columns, names)
    self._rows = {}
    for row in rows:
      self._rows.setdefault(str(row.get(self._columns.image) or ''), []).append(row)
    self.total = len(self._rows)
    self._files = ImageFiles(*_image_places(path, options.images, zips))
    self.annotations = self._named_annotations()
    if 'label' in self.annotations:
      self.label_names = label_names(row.get(self._columns.label) for row in rows)
    self._probe()

  def _probe(self):
    """Fails early if none of the first images is found: the folder must be wrong."""
    first = list(self._rows)[:_PROBE_ROWS]
    check_local(first, self._columns.image, self.path)
    if not any(map(self._files.find, first)):
      raise InputError(
        f'--images: none of the first {len(first)} images of {self.path!r} (such as {first[0]!r}) '
        f'is in {self._files}; say where they are with --images=FOLDER or --images=ZIP'
      )

  def __iter__(self) -> Iterator[Sample]:
    label, mask = self._columns.label, self._columns.mask
    for name, rows in self._rows.items():
      alt_text, captions = self._texts(rows, self._columns)
      image, problem = self._files.read(name)
      extra = {}
      if 'label' in self.annotations and rows[0].get(label) is not None:
        extra['label'] = str(rows[0][label])
      if 'mask' in self.annotations and rows[0].get(mask):
        extra['mask'], _ = self._files.read(str(rows[0][mask]))
      yield Sample(name, image, alt_text, captions, extra, problem)


def label_names(values: Iterable[object]) -> tuple[str, ...]:
  """Class names of a label column: '0'..'max' for whole numbers, else the distinct values."""
  values = {str(v) for v in values if v is not None and v != ''}
  if values and all(v.isdigit() for v in values):
    return tuple(map(str, range(max(map(int, values)) + 1)))
  return tuple(sorted(values))


def _read_table(path):
  try:
    with open(path, encoding='utf-8-sig', newline='') as file:
      return _parse_table(path, file)
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f'--input: cannot read {path!r} as UTF-8 text ({error})') from error


def _zip_table(path):
  """The rows of the one table inside a zip."""
  with _open_zip(path) as archive:
    tables = []
    for name in archive.namelist():
      if name.lower().endswith(TABLES) and not name.endswith('meta.json'):
        tables.append(name)
    if len(tables) != 1:
      raise InputError(
        f'--input: got {path!r} with the tables {tables[:5]}; expected one table '
        f'({", ".join(TABLES)}) in it; or give the path of the table as --input and the zip as '
        f'--images'
      )
    text = archive.read(tables[0]).decode('utf-8-sig').splitlines(keepends=True)
  return _parse_table(tables[0], text)


def _parse_table(path, lines):
  end = os.path.splitext(path)[1].lower()
  if end in ('.csv', '.tsv'):
    lines = iter(lines)
    header = next(lines, '')
    # What people call CSV has one of these between its columns.
    delimiter = '\t' if end == '.tsv' else max(',;\t|', key=header.count)
    names = next(csv.reader([header], delimiter=delimiter), [])
    rows = list(csv.DictReader(lines, names, delimiter=delimiter, restkey='(beyond the header)'))
  elif end == '.json':
    rows = parse_json(''.join(lines), f'--input: {path}')
  else:
    rows = []
    for number, line in enumerate(lines, 1):
      if line.strip():
        rows.append(parse_json(line, f'--input: {path}:{number}'))
  if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
    raise InputError(
      f'--input: {path!r} has no rows; expected a header and rows (CSV), or one object a row (JSON)'
    )
  return rows


def _image_places(table, images, zips):
  """(folders, zips) to search: --images alone, or else everything beside the table."""
  if images:
    images = os.path.expanduser(images)
    if not os.path.exists(images):
      raise InputError(
        f'--images: got {images!r}, which does not exist; expected a folder or a zip'
      )
    return ([images], []) if os.path.isdir(images) else ([], [images])
  if zips:
    return [], zips
  path = pathlib.Path(table).absolute()
  zips = sorted(p for p in path.parent.iterdir() if p.suffix.lower() == '.zip')
  same_name = path.with_suffix('.zip')
  return [path.parent], [same_name] if same_name in zips else zips


class ImageFiles:
  """Files by name in folders and zips: by full name, or by base name where only one file has it."""

  def __init__(self, folders: Sequence[Path], zips: Sequence[Path]):
    self._folders = folders
    self._zips = zips
    self._members = {}  # name -> archive
    for path in zips:
      archive = _open_zip(path)
      self._members.update(dict.fromkeys(archive.namelist(), archive))

  def __str__(self):
    return ' or '.join(repr(str(path)) for path in (*self._folders, *self._zips))

  def find(self, name: str) -> Place | None:
    """Where the file of a name is; None if it is nowhere."""
    if not name:
      return None
    if name in self._members:
      return self._members[name], name
    for folder in self._folders:
      for path in (os.path.join(folder, name), os.path.join(folder, 'images', name)):
        if os.path.isfile(path):
          return path
    # Tables often hold the paths of another machine.
    return self._by_base.get(os.path.basename(name))

  def read(self, name: str) -> tuple[bytes | None, str]:
    """(bytes, '') of a file, or (None, the reason)."""
    place = self.find(name)
    if place is None:
      return None, 'no such file'
    try:
      if isinstance(place, tuple):
        archive, member = place
        return archive.read(member), ''
      return pathlib.Path(place).read_bytes(), ''
    # A zip may be damaged, encrypted, or compressed in an unknown way.
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
      return None, str(error)

  @functools.cached_property
  def _by_base(self):
    """Base name -> the file's place; None where several files have it."""
    places = {}

    def add(name, place):
      places[name] = None if name in places else place

    for name, archive in self._members.items():
      add(os.path.basename(name), (archive, name))
    for folder in self._folders:
      for root, _, names in os.walk(folder):
        for name in names:
          add(name, os.path.join(root, name))
    return places


def _open_zip(path):
  try:
    return zipfile.ZipFile(path)
  except (OSError, zipfile.BadZipFile) as error:
    raise InputError(
      f'{path!r} is not a complete zip ({error}); expected a zip of images; copy it again'
    ) from error

"""Reader of tables (CSV, TSV, JSON, JSONL) that name image files in a folder or a zip."""

import csv
import json
import os
import zipfile

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.columns import guess
from tips_jax.data.ingest.reader import Reader, Sample

TABLES = ('.csv', '.tsv', '.jsonl', '.ndjson', '.json')
_PROBE_ROWS = 100


class TableReader(Reader):
  """A CSV, TSV, JSON or JSONL table whose image column names files in a folder or a zip.

  Rows that name the same image are one sample. The images are looked for in --images, or beside the
  table.
  """

  kind = 'table'

  def __init__(self, path, options):
    super().__init__(options)
    self.path = path
    rows, zips = _zip_table(path) if path.lower().endswith('.zip') else (_read_table(path), None)
    names = list(dict.fromkeys(name for row in rows for name in row))
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
    """Stops before the work where not one of the first images is found: the place must be wrong."""
    first = list(self._rows)[:_PROBE_ROWS]
    if any(name.startswith(('http://', 'https://')) for name in first):
      raise InputError(
        f'--input: column {self._columns.image!r} of {self.path!r} holds web addresses; expected files; '
        f'download them first, for example with img2dataset'
      )
    if not any(self._files.find(name) for name in first):
      raise InputError(
        f'--images: none of the first {len(first)} images of {self.path!r} (such as {first[0]!r}) is '
        f'in {self._files}; say where they are with --images=FOLDER or --images=ZIP'
      )

  def __iter__(self):
    for name, rows in self._rows.items():
      alt_text, captions = self._texts(rows, self._columns)
      image, problem = self._files.read(name)
      extra = {}
      if 'label' in self.annotations and rows[0].get(self._columns.label) is not None:
        extra['label'] = str(rows[0][self._columns.label])
      if 'mask' in self.annotations and rows[0].get(self._columns.mask):
        extra['mask'] = self._files.read(str(rows[0][self._columns.mask]))[0]
      yield Sample(name, image, alt_text, captions, extra, problem)


def label_names(values):
  """Class names of a label column: '0'..'max' for whole numbers, else the distinct values in order."""
  values = {str(v) for v in values if v is not None and v != ''}
  if values and all(v.isdigit() for v in values):
    return tuple(str(i) for i in range(max(map(int, values)) + 1))
  return tuple(sorted(values))


def _read_table(path):
  try:
    with open(path, encoding='utf-8-sig', newline='') as file:
      return _parse_table(path, file)
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f'--input: cannot read {path!r} as UTF-8 text ({error})') from error


def _zip_table(path):
  """The rows of the one table inside a zip, and the zip as the place of the images."""
  with _open_zip(path) as archive:
    tables = [
      n for n in archive.namelist() if n.lower().endswith(TABLES) and not n.endswith('meta.json')
    ]
    if len(tables) != 1:
      raise InputError(
        f'--input: got {path!r} with the tables {tables[:5]}; expected one table ({", ".join(TABLES)}) '
        f'in it; or give the path of the table as --input and the zip as --images'
      )
    text = archive.read(tables[0]).decode('utf-8-sig').splitlines(keepends=True)
  return _parse_table(tables[0], text), [path]


def _parse_table(path, lines):
  end = os.path.splitext(path)[1].lower()
  if end in ('.csv', '.tsv'):
    lines = iter(lines)
    header = next(lines, '')
    delimiter = '\t' if end == '.tsv' else max(',;\t|', key=header.count)
    names = next(csv.reader([header], delimiter=delimiter), [])
    rows = list(csv.DictReader(lines, names, delimiter=delimiter, restkey='(beyond the header)'))
  elif end == '.json':
    rows = _json(path, ''.join(lines))
  else:
    rows = [_json(f'{path}:{i}', line) for i, line in enumerate(lines, 1) if line.strip()]
  if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
    raise InputError(
      f'--input: {path!r} has no rows; expected a header and rows (CSV), or one object a row (JSON)'
    )
  return rows


def _json(where, text):
  try:
    return json.loads(text)
  except ValueError as error:
    raise InputError(f'--input: {where} is not JSON ({error})') from error


def _image_places(table, images, zips):
  """(folders, zips) to look in: --images alone, or else everything beside the table."""
  if images:
    images = os.path.expanduser(images)
    if not os.path.exists(images):
      raise InputError(
        f'--images: got {images!r}, which does not exist; expected a folder or a zip'
      )
    return ([images], []) if os.path.isdir(images) else ([], [images])
  if zips:
    return [], zips
  folder, stem = (
    os.path.dirname(os.path.abspath(table)),
    os.path.splitext(os.path.basename(table))[0],
  )
  beside = sorted(f for f in os.listdir(folder) if f.lower().endswith('.zip'))
  own = [f for f in beside if f == f'{stem}.zip'] or beside
  return [folder], [os.path.join(folder, f) for f in own]


class ImageFiles:
  """Files by name in folders and zips: by full name, or by base name where only one file has it."""

  def __init__(self, folders, zips):
    self._folders = folders
    self._zips = zips
    self._archives = [_open_zip(path) for path in zips]
    self._members = {
      info.filename: archive for archive in self._archives for info in archive.infolist()
    }
    self._by_base = None

  def __str__(self):
    return ' or '.join(map(repr, (*self._folders, *self._zips)))

  def find(self, name):
    """A zip member (archive, name), a file path, or None."""
    if not name:
      return None
    if name in self._members:
      return self._members[name], name
    for folder in self._folders:
      for path in (os.path.join(folder, name), os.path.join(folder, 'images', name)):
        if os.path.isfile(path):
          return path
    return self._bases().get(os.path.basename(name))

  def read(self, name):
    """(bytes, '') of a file, or (None, why not)."""
    place = self.find(name)
    if place is None:
      return None, 'no such file'
    try:
      if isinstance(place, tuple):
        return place[0].read(place[1]), ''
      with open(place, 'rb') as file:
        return file.read(), ''
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
      return None, str(error)

  def _bases(self):
    if self._by_base is None:
      places = [(archive, name) for name, archive in self._members.items()]
      places += [
        os.path.join(root, f)
        for folder in self._folders
        for root, _, fs in os.walk(folder)
        for f in fs
      ]
      self._by_base = {}
      for place in places:
        base = os.path.basename(place[1] if isinstance(place, tuple) else place)
        self._by_base[base] = None if base in self._by_base else place
    return self._by_base


def _open_zip(path):
  try:
    return zipfile.ZipFile(path)
  except (OSError, zipfile.BadZipFile) as error:
    raise InputError(
      f'{path!r} is not a whole zip ({error}); expected a zip of images; copy it again'
    ) from error

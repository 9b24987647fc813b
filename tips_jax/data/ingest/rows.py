"""Rows of text tables: CSV and TSV as programs write them, and JSON in its usual forms.

Nothing is cut or merged: where a text can be read in several ways, the one is taken in which every
row fits the header; a row that fits in none is left out and noted.
"""

import csv
import io
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.cells import decode_text
from tips_jax.data.ingest.columns import IMAGE_NAMES, plain
from tips_jax.data.ingest.reader import IMAGES, Note
from tips_jax.data.ingest.splits import splits_in

SEPARATED = ('.csv', '.tsv')
TABLES = (*SEPARATED, '.jsonl', '.ndjson', '.json')

# A caption may be longer than csv's 131,072 characters; the limit is one for the whole process, so
# it does not depend on the table.
csv.field_size_limit(1 << 30)
# Separators that texts do not have, so that quotes are seldom put around them.
_NOT_IN_TEXTS = '\t|'

Row = dict[str, typing.Any]
# Number of the last line of a row, and its fields.
Fields = tuple[int, list[str]]


def parse_table(data: bytes, name: str) -> tuple[list[Row], list[Note]]:
  """Rows of a table by column name, and what was left out; InputError if it is no table.

  `name` says by its ending which form it has; the messages cite it.
  """
  try:
    text = decode_text(data)
  except ValueError as error:
    raise InputError(
      f'--input: cannot read {name!r} as UTF-8 text ({error}); write it again in UTF-8'
    ) from error
  notes = []
  if name.lower().endswith(SEPARATED):
    rows = _separated(text, name, notes)
  else:
    rows = _json(text, name, notes)
  if not rows:
    left_out = f'; of {len(notes)} left out, the first: {notes[0].detail}' if notes else ''
    raise InputError(
      f'--input: {name!r} has no rows; expected a header and rows (CSV), or JSON: one object a '
      f'line, a list of objects, COCO, pandas, or texts by image name{left_out}'
    )
  return rows, notes


def _record(pairs: Iterable[tuple[str, object]]) -> Row:
  """A row; the values of a column that is there twice become a list, so that none is lost."""
  pairs = list(pairs)
  row = dict(pairs)
  if len(row) == len(pairs):
    return row
  values = {}
  for name, value in pairs:
    values.setdefault(name, []).append(value)
  for name, several in values.items():
    if len(several) > 1:
      row[name] = several
  return row


# --- CSV and TSV --------------------------------------------------------------------------------


def _separated(text, where, notes):
  first, _, _ = text.lstrip().partition('\n')
  # What people call CSV has one of these between its columns.
  separator = max(',;\t|', key=first.count)
  header, *rows = _fields(text, separator, where) or [(0, [])]
  names = header[1]
  found = []
  for line, fields in rows:
    if len(fields) > len(names):
      detail = f'line {line}: {len(fields)} fields, the header has {len(names)}'
      notes.append(Note('bad_row', f'{where}:{line}', detail))
      continue
    if len(fields) < len(names):
      detail = f'{len(fields)} fields, the header has {len(names)}'
      notes.append(Note('short_row', f'{where}:{line}', detail))
    found.append(_record(zip(names, fields)))
  return found


def _fields(text, separator, where) -> Sequence[Fields]:
  """The rows in the first way of reading in which all fit the header; else as CSV is meant."""
  padded = f'{separator} ' in text.partition('\n')[0]
  readings = [_quoted, _escaped, _by_line]
  if separator in _NOT_IN_TEXTS:
    readings = [_by_line, _quoted, _escaped]
  found = {}
  failure = None
  for reading in readings:
    try:
      rows = list(reading(text, separator, padded))
    except csv.Error as error:
      failure = failure or error
      continue
    counts = {len(fields) for _, fields in rows}
    if len(counts) == 1 or reading != _by_line and rows and max(counts) == len(rows[0][1]):
      return rows
    found[reading] = rows
  if separator in _NOT_IN_TEXTS:
    return found[_by_line]
  if _quoted not in found:
    raise InputError(
      f'--input: {where!r} is not a whole CSV table ({failure}); expected quotes around a text '
      f'with quotes, line breaks or {separator!r}, and quotes inside it doubled'
    )
  return found[_quoted]


def _quoted(text, separator, padded) -> Iterator[Fields]:
  """CSV as defined: quotes around a field, doubled inside it."""
  reader = csv.reader(
    io.StringIO(text, newline=''), delimiter=separator, skipinitialspace=padded, strict=True
  )
  try:
    for fields in reader:
      if fields:
        yield reader.line_num, fields
  except csv.Error as error:
    raise csv.Error(f'line {reader.line_num}: {error}') from error


def _escaped(text, separator, padded) -> Iterator[Fields]:
  """Quotes inside a field have a backslash before them, as MySQL and Spark write them."""

  def doubled(match):
    return '""' if match[1] == '"' else match[1]

  return _quoted(re.sub(r'\\(["\\])', doubled, text), separator, padded)


def _by_line(text, separator, padded) -> Iterator[Fields]:
  """One row a line; quotes that do not enclose a field are part of it."""
  for number, line in enumerate(io.StringIO(text, newline=None), 1):
    line = line.removesuffix('\n')
    if not line.strip():
      continue
    fields = line.split(separator)
    if padded:
      fields = [field.lstrip(' ') for field in fields]
    try:
      ((_, quoted),) = _quoted(line, separator, padded)
    except csv.Error:
      quoted = fields
    yield number, quoted if len(quoted) == len(fields) else fields


# --- JSON ---------------------------------------------------------------------------------------


def _json(text, where, notes):
  values = list(_values(text, where))
  if len(values) == 1 and isinstance(values[0], dict):
    values = list(_of_object(values[0], notes))
  elif len(values) == 1 and isinstance(values[0], list):
    (values,) = values
  rows = []
  for number, value in enumerate(values, 1):
    if isinstance(value, dict):
      rows.append(_of_visual_genome(value))
    else:
      detail = f'value {number}: {type(value).__name__}; expected an object'
      notes.append(Note('bad_row', f'{where}: {number}', detail))
  return rows


def _values(text, where) -> Iterator[object]:
  """The JSON values of a text one after the other: a whole file, or JSON Lines."""
  decoder = json.JSONDecoder(object_pairs_hook=_record)
  blank = re.compile(r'\s*')
  at = blank.match(text).end()
  while at < len(text):
    try:
      value, at = decoder.raw_decode(text, at)
    except json.JSONDecodeError as error:
      raise InputError(
        f'--input: {where}:{error.lineno} is not JSON ({error.msg}); copy it again'
      ) from error
    # Brackets in brackets, thousands deep, or a number of as many digits, end the parser.
    except (ValueError, RecursionError) as error:
      raise InputError(f'--input: {where} is not JSON ({error}); copy it again') from error
    yield value
    at = blank.match(text, at).end()


def _of_object(value, notes) -> Iterable[object]:
  """The rows of a file that is one JSON object: those of its form, none if it has no known one."""
  tables = {name: rows for name, rows in value.items() if _are_rows(rows)}
  if 'images' in tables and isinstance(value.get('annotations'), list):
    return _coco(value, notes)
  if isinstance(value.get('columns'), list) and isinstance(value.get('data'), list):
    return _split_by_pandas(value['columns'], value['data'])
  if _names_image(value):
    return _of_columns(value)
  if any(name.lower().endswith(IMAGES) for name in value):
    return _by_name(value)
  if len(tables) == 1:
    return next(iter(tables.values()))
  if tables and all(map(splits_in, tables)):
    return _of_splits(tables)
  if all(map(_names_image, value.values())):
    return value.values()  # to_json(orient='index')
  return []


def _are_rows(value):
  return isinstance(value, list) and value != [] and all(isinstance(row, dict) for row in value)


def _names_image(row):
  return isinstance(row, dict) and not set(map(plain, row)).isdisjoint(IMAGE_NAMES)


def _coco(value, notes):
  """One row for each annotation of an image, and for each image without any."""
  names = {}
  for category in filter(_is_object, value.get('categories') or ()):
    names[str(category.get('id'))] = category.get('name')
  of_image = {}
  for annotation in filter(_is_object, value['annotations']):
    of_image.setdefault(str(annotation.get('image_id')), []).append(annotation)
  for image in value['images']:
    for annotation in of_image.pop(str(image.get('id')), [{}]):
      category = names.get(str(annotation.get('category_id')))
      yield {**image, **annotation, 'category': category}
  for image_id, annotations in of_image.items():
    detail = f'annotations of image_id {image_id}, which is no image'
    notes.append(Note('bad_row', f'image_id {image_id}', detail, len(annotations)))


def _of_visual_genome(row):
  """A row of region_descriptions.json with the name of its image, which follows from its number;
  any other row as it is.
  """
  regions = row.get('regions')
  number = row.get('id', row.get('image_id'))
  if isinstance(regions, list) and isinstance(number, int) and not _names_image(row):
    return {'image': f'{number}.jpg', **row}
  return row


def _is_object(value):
  return isinstance(value, Mapping)


def _split_by_pandas(columns, data):
  """to_json(orient='split')."""
  for cells in data:
    if isinstance(cells, list) and len(cells) == len(columns):
      yield _record(zip(map(str, columns), cells))
    else:
      yield cells


def _of_columns(value):
  """Columns as lists, or by row as pandas writes them; else the object is one row."""
  cells = list(value.values())
  if all(isinstance(column, list) for column in cells) and len(set(map(len, cells))) == 1:
    return [dict(zip(value, row)) for row in zip(*cells)]
  if not all(map(_is_object, cells)):
    return [value]
  rows = {}
  for name, column in value.items():
    for index, cell in column.items():
      rows.setdefault(index, {})[name] = cell
  return rows.values()


def _of_splits(tables):
  """A list of rows by split."""
  for split, rows in tables.items():
    for row in rows:
      yield {'split': split, **row}


def _by_name(value):
  """Texts, or rows, by the name of their image."""
  for name, cell in value.items():
    if _is_object(cell):
      yield {'image': name, **cell}
    else:
      yield {'image': name, 'captions': cell}

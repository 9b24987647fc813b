"""What the cell of a table says: its texts, or its label.

Programs write missing values as words and lists as text; a cell is read as it was meant.
"""

import ast
import codecs
import json
import re
import reprlib
from collections.abc import Iterable, Mapping

# How pandas, NumPy, Python, spreadsheets and MySQL write that there is no value.
MISSING = frozenset(r'#N/A #NA -NaN -nan <NA> N/A NA NULL NaN None n/a nan null \N'.split())
# Of a caption that is itself a record.
_TEXT_KEYS = ('text', 'caption', 'raw', 'sentence', 'value')
_MAX_DEPTH = 8  # of lists in lists; deeper ones are text of some other kind
_MAX_CLASSES = 100_000
# UTF-32 first: its mark begins as that of UTF-16.
_MARKS = {
  codecs.BOM_UTF8: 'utf-8-sig',
  codecs.BOM_UTF32_LE: 'utf-32',
  codecs.BOM_UTF32_BE: 'utf-32',
  codecs.BOM_UTF16_LE: 'utf-16',
  codecs.BOM_UTF16_BE: 'utf-16',
}
_STRING = r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+\""""
_STRINGS = re.compile(rf'\[(?:[\s,]|{_STRING})*+\]')  # NumPy puts no commas between them
_ARRAY = re.compile(r'array\((\[.*\])(?:, dtype=\w+)?\)')
_WHOLE = re.compile(r'0|[1-9][0-9]{0,17}')
_BRIEF = reprlib.Repr()
_BRIEF.maxlist = 20
_BRIEF.maxstring = 120
_BRIEF.maxother = 120


def brief(value: object) -> str:
  """The value as Python writes it, shortened, for messages."""
  return _BRIEF.repr(value)


def one_line(text: str) -> str:
  """The text with single spaces for line breaks, zero bytes and runs of spaces, and '?' for lone
  surrogates: the tokenizer and class names are files of lines.
  """
  return utf8(' '.join(text.replace('\0', ' ').split()))


def utf8(text: str) -> str:
  """The text with '?' for lone surrogates, which JSON and file names may hold and UTF-8 may not."""
  return text.encode('utf-8', 'replace').decode()


def decode_text(data: bytes) -> str:
  """The text of a file in UTF-8, or in what its byte order mark says; ValueError for any other: a
  guess would put wrong letters into texts.
  """
  for mark, encoding in _MARKS.items():
    if data.startswith(mark):
      return data.decode(encoding)
  if b'\0' in data[:1024]:
    raise ValueError('zero bytes: UTF-16 without a byte order mark, or no text')
  return data.decode('utf-8')


# --- texts --------------------------------------------------------------------------------------


def as_texts(value: object, depth: int = 0) -> list[str]:
  """The strings in a table cell: a string, a list of strings (also as Python, NumPy or JSON write
  it), a record with a text, the values of a language dictionary, or a list of those.

  No value gives none; what has no text, or says that it is missing, gives '', to be counted.
  """
  if _is_missing(value):
    return []
  if isinstance(value, (bytes, bytearray)):
    try:
      value = decode_text(bytes(value))
    except ValueError:
      return ['']
  if isinstance(value, str):
    return _of_string(one_line(value), depth)
  if isinstance(value, Mapping):
    return _of_record(value, depth)
  if not hasattr(value, '__iter__'):
    return [str(value)]
  if depth == _MAX_DEPTH:
    return ['']
  texts = []
  for item in _items(value):
    texts += as_texts(item, depth + 1)
  return texts


def _is_missing(value):
  # NaN is not equal to itself; an array has no single truth value.
  return value is None or not hasattr(value, '__len__') and value != value


def _of_string(text, depth):
  if text in MISSING:
    return ['']
  found = _literal(text)
  if found is None or depth == _MAX_DEPTH:
    return [text]
  return as_texts(found, depth + 1)


def _of_record(record, depth):
  for key in _TEXT_KEYS:
    if key in record:
      return as_texts(record[key], depth + 1)
  values = list(record.values())
  if depth < _MAX_DEPTH and all(isinstance(value, (str, list, type(None))) for value in values):
    return as_texts(values, depth + 1)
  return ['']


def _items(value):
  """The items of a list; of an Arrow map, which is a list of (key, value), the values."""
  items = list(value)
  if all(isinstance(item, tuple) and len(item) == 2 for item in items):
    return [item[1] for item in items]
  return items


def _literal(text):
  """The list or dict that a text writes out; None if it is just text."""
  array = _ARRAY.fullmatch(text)
  if array:
    text = array[1]
  if text[:1] + text[-1:] not in ('[]', '{}') or _is_deep(text):
    return None
  for parse in (json.loads, _strings, ast.literal_eval):
    try:
      found = parse(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
      continue
    # '[2020]' is text, and a set has no order.
    if isinstance(found, dict) or isinstance(found, list) and all(map(_may_hold_text, found)):
      return found
  return None


def _is_deep(text):
  """Whether lists are nested deeper than texts are: what parsers make of that depends on Python."""
  depth = 0
  for bracket in re.findall(r'[][{}]', text):
    depth += 1 if bracket in '[{' else -1
    if depth > _MAX_DEPTH:
      return True
  return False


def _may_hold_text(item):
  return isinstance(item, (str, list, dict, type(None)))


def _strings(text):
  """A list of strings as Python or NumPy writes it. ast would join strings without a comma."""
  if not _STRINGS.fullmatch(text):
    raise ValueError('not a list of strings')
  return list(map(ast.literal_eval, re.findall(_STRING, text)))


# --- labels -------------------------------------------------------------------------------------


def label_text(value: object) -> str:
  """The class that a cell names, on one line; '' for none, and for a list of several."""
  if isinstance(value, (list, tuple)) and len(value) == 1:
    value = value[0]
  if isinstance(value, bytes):
    value = value.decode('utf-8', 'replace')
  if _is_missing(value) or not isinstance(value, str) and hasattr(value, '__len__'):
    return ''
  text = one_line(str(value))
  return '' if text in MISSING else text


def label_names(values: Iterable[object]) -> tuple[str, ...]:
  """Class names of a label column: '0'..'max' for whole numbers (-1 among them is no class), else
  the distinct values as written.
  """
  names = set(map(label_text, values)) - {''}
  whole = set(filter(_WHOLE.fullmatch, names))
  if not whole or names - whole - {'-1'}:
    return tuple(sorted(names))
  classes = max(map(int, whole)) + 1
  # Ids of a database are no positions in a list.
  if classes > _MAX_CLASSES:
    return tuple(sorted(whole, key=int))
  return tuple(map(str, range(classes)))

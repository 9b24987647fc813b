"""What the rows of an index file say: values of the types that are read, names that stay inside.

Others wrote these files, and they may be damaged or made up. ValueError says what does not fit.
"""

from typing import Any

from tips_jax.data.ingest.cells import brief


def get(row: object, field: str, *kinds: type) -> Any:
  """The value of a field, which has one of the types `kinds` (True is no int)."""
  if isinstance(row, dict) and field in row:
    return of_kind(row[field], field, *kinds)
  raise ValueError(f'got {brief(row)}; expected an object with {field!r}')


def get_list(row: object, field: str, *kinds: type) -> list:
  """The value of a field, which is a list of values of the types `kinds`."""
  values = get(row, field, list)
  for value in values:
    of_kind(value, field, *kinds)
  return values


def get_name(row: object, field: str) -> str:
  """The value of a field, which names a file."""
  return inside(get(row, field, str))


def of_kind(value: object, field: str, *kinds: type) -> Any:
  """The value as it is."""
  if type(value) not in kinds:
    expected = ' or '.join(kind.__name__ for kind in kinds)
    raise ValueError(f'{field}: got {brief(value)}; expected {expected}')
  return value


def inside(name: str) -> str:
  """The relative path of a file as it is. Names from files never lead out of their folder."""
  if not name or name.startswith('/') or '..' in name.split('/'):
    raise ValueError(f'got the file {brief(name)}; expected one inside of the data set')
  return name

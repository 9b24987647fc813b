"""Rows of Arrow tables as values of Python, within bounds.

A few bytes of a file may be the same huge cell many times.
"""

import contextlib

import pyarrow as pa

from tips_jax.data.ingest import archives

_MAX_TEXTS = 2**24  # bytes of a cell that holds no image

Row = tuple[dict[str, object], str]  # values by column, problem


def holds_images(kind: pa.DataType) -> bool:
  """Whether cells of an Arrow type may be encoded images."""
  if pa.types.is_struct(kind):
    at = kind.get_field_index('bytes')
    return at >= 0 and _is_bytes(kind.field(at).type)
  return _is_bytes(kind)


def _is_bytes(kind):
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def rows(batch: pa.RecordBatch) -> list[Row]:
  """What `row` makes of each row, all at once where nothing is large or odd."""
  if batch.nbytes <= _MAX_TEXTS and all(_is_plain(field.type) for field in batch.schema):
    with contextlib.suppress(UnicodeDecodeError):
      return [(values, '') for values in batch.to_pylist()]
  return [row(batch.slice(number, 1)) for number in range(len(batch))]


def _is_plain(kind):
  """Whether values of an Arrow type take in Python about what they take in Arrow."""
  if pa.types.is_struct(kind):
    return all(_is_plain(kind.field(i).type) for i in range(kind.num_fields))
  if pa.types.is_list(kind):
    return _is_plain(kind.value_type)
  of_bytes = pa.types.is_binary(kind) or pa.types.is_string(kind)
  return of_bytes or pa.types.is_integer(kind) or pa.types.is_floating(kind)


def row(batch: pa.RecordBatch) -> Row:
  """(values by column, problem) of a batch of one row.

  Bytes of a text that are not UTF-8 become the replacement character; a cell that is too large is
  None, and the problem.
  """
  values = {}
  problem = ''
  for name, column in zip(batch.schema.names, batch.columns):
    most = archives.MAX_BYTES if holds_images(column.type) else _MAX_TEXTS
    size = _size(column)
    if size > most:
      values[name] = None
      problem = f'{name}: {archives.too_large(size, most)}'
      continue
    [values[name]] = map(_replaced, column)
  return values, problem


def _size(column: pa.Array) -> int:
  """About how many bytes the values are in Python, however few they take in Arrow."""
  kind = column.type
  size = 8 * len(column)
  if size > _MAX_TEXTS:
    return size
  if pa.types.is_dictionary(kind):
    for item in column.indices.drop_null().value_counts().to_pylist():
      size += item['counts'] * _size(column.dictionary.slice(item['values'], 1))
  elif pa.types.is_struct(kind):
    size += sum(map(_size, column.flatten()))
  elif isinstance(column, pa.lib.BaseListArray):
    for cell in column:
      if cell.is_valid:
        size += _size(cell.values)
  elif pa.types.is_binary_view(kind) or pa.types.is_string_view(kind):
    size += column.cast(pa.large_binary()).nbytes  # nbytes of a view are those of all rows
  else:
    size += column.nbytes
  return size


def _replaced(cell: pa.Scalar) -> object:
  """The value of a cell with text that is not UTF-8, at any depth."""
  try:
    return cell.as_py()
  except UnicodeDecodeError:
    pass
  if isinstance(cell, (pa.DictionaryScalar, pa.ExtensionScalar)):
    return _replaced(cell.value)
  if isinstance(cell, pa.ListScalar):
    return [_replaced(item) for item in cell.values]
  if isinstance(cell, pa.StructScalar):
    return {name: _replaced(cell[name]) for name in cell}
  return cell.as_buffer().to_pybytes().decode('utf-8', 'replace')

"""How much an Arrow stream expands to, read before pyarrow makes room for any of it.

pyarrow hands out a stream's messages, but not what a message says of its buffers: that is in a
flatbuffer, as format/Message.fbs of apache/arrow declares it. What is needed of it is read here.
"""

import struct

import pyarrow as pa

# Numbers of fields in the tables of Message.fbs.
_KIND, _HEADER = 1, 2  # Message
_DICTIONARY_ROWS = 1  # DictionaryBatch
_NODES, _BUFFERS, _COMPRESSION = 1, 2, 3  # RecordBatch
# Kinds of messages.
_DICTIONARY, _ROWS = 2, 3
# So Arrow 0.17 named a compression; pyarrow still reads it.
_EARLY_COMPRESSION = b'ARROW:experimental_compression'


def of_stream(path: str) -> tuple[int, int]:
  """(bytes that the columns of a file take in it, bytes in memory, at least), of all its batches.

  Raises what pyarrow and struct do for a damaged file.
  """
  taken = 0
  size = 0
  for message in pa.ipc.MessageReader.open_stream(pa.memory_map(path)):
    taken += message.body.size
    size += _of_message(memoryview(message.metadata), memoryview(message.body))
  return taken, size


def _of_message(metadata, body):
  root = _follow(metadata, 0)
  [kind] = struct.unpack_from('<B', metadata, _field(metadata, root, _KIND))
  rows = _follow(metadata, _field(metadata, root, _HEADER))
  if kind == _DICTIONARY:
    rows = _follow(metadata, _field(metadata, rows, _DICTIONARY_ROWS))
  elif kind != _ROWS:
    return 0
  size = 0
  compressed = _field(metadata, rows, _COMPRESSION) or _EARLY_COMPRESSION in bytes(metadata)
  for offset, length in _pairs(metadata, _field(metadata, rows, _BUFFERS)):
    if compressed and length:
      [declared] = struct.unpack_from('<q', body, offset)
      length -= 8
      if declared != -1:  # else it is kept as it is
        length = max(declared, 0)
    size += length
  # A column of nulls takes no bytes, and a few for each row in Python.
  values = sum(count for count, _ in _pairs(metadata, _field(metadata, rows, _NODES)))
  return max(size, 4 * values)


def _follow(data, place):
  """Where the table or vector is whose distance stands at a place."""
  return place + struct.unpack_from('<I', data, place)[0]


def _field(data, table, number):
  """Where a field of a table is; 0 where the table has none."""
  layout = table - struct.unpack_from('<i', data, table)[0]
  entry = 4 + 2 * number
  if entry >= struct.unpack_from('<H', data, layout)[0]:
    return 0
  distance = struct.unpack_from('<H', data, layout + entry)[0]
  return distance and table + distance


def _pairs(data, field):
  """The structs of a vector, each of two int64."""
  if not field:
    return []
  start = _follow(data, field)
  count = struct.unpack_from('<I', data, start)[0]
  return struct.iter_unpack('<qq', data[start + 4 : start + 4 + 16 * count])

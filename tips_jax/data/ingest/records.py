"""Records and shards of a store: of the same examples the same bytes, in every process."""

import contextlib
import hashlib
import os
import typing
import uuid
from collections.abc import Iterator, Mapping

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

# Images are compressed already: zstd would take ten times as long as all else that writing does,
# and save the texts' share alone. Each record is a chunk of its own, to be read alone.
_OPTIONS = 'group_size:1,uncompressed,max_parallelism:1'
GROWING = '.growing'  # the end of names of files that are not complete
SHARD_BYTES = 256 * 2**20
_LARGEST = 16  # times the first one
_FIRST = 32  # shards before they grow with the split, to a 32nd of what it holds


class Serializer:
  """Examples (dicts by feature name; images as encoded bytes) -> serialized tf.train.Examples.

  As TFDS does it, but for the order of the fields, which is theirs by name: protobuf's own varies
  by process. Encoded images and texts, most of what there is, do not pass through arrays.
  """

  def __init__(self, features: tfds.features.FeaturesDict):
    f = tfds.features
    self._names = set(features)
    self._single = set()
    self._several = set()
    self._others = {}
    for name, feature in features.items():
      if isinstance(feature, (f.Text, f.Image)):
        self._single.add(name)
      elif isinstance(feature, f.Sequence) and isinstance(feature.feature, f.Text):
        self._several.add(name)
      self._others[name] = f.FeaturesDict({name: feature})

  def __call__(self, example: Mapping[str, typing.Any]) -> bytes:
    if example.keys() != self._names:
      raise ValueError(f'example: got {sorted(example)}; expected {sorted(self._names)}')
    record = tf_example_pb2.Example()
    fields = record.features.feature
    for name, value in example.items():
      if name in self._single and isinstance(value, (bytes, str)):
        fields[name].bytes_list.value.append(_bytes(value))
      elif name in self._several and isinstance(value, list):
        fields[name].bytes_list.SetInParent()  # a field without values is there
        fields[name].bytes_list.value.extend(map(_bytes, value))
      else:
        other = self._others[name]
        record.MergeFromString(other.serialize_example(other.encode_example({name: value})))
    return record.SerializeToString(deterministic=True)


def _bytes(text):
  return text.encode() if isinstance(text, str) else text


class Written(typing.NamedTuple):
  """A shard that is complete."""

  path: str
  examples: int
  size: int  # bytes of its records
  sha256: str  # of its records


class Shard:
  """An array_record file that is being written, at a path that nobody else writes to."""

  def __init__(self, path: str):
    self._path = path
    self.examples = 0
    self.size = 0  # bytes of the records
    self._digest = hashlib.sha256()
    with self._disk_errors():
      self._writer = array_record_module.ArrayRecordWriter(path, _OPTIONS)

  def write(self, record: bytes) -> None:
    with self._disk_errors():
      self._writer.write(record)
    self._digest.update(len(record).to_bytes(8, 'little'))
    self._digest.update(record)
    self.examples += 1
    self.size += len(record)

  def close(self, path: str) -> Written:
    """Checks the number of records on disk, and moves the file to its place."""
    with self._disk_errors():
      self._writer.close()
    reader = array_record_module.ArrayRecordReader(self._path)
    on_disk = reader.num_records()
    reader.close()
    if on_disk != self.examples:
      raise OSError(
        f'{path}: {on_disk} records on disk after writing {self.examples}; is the disk full?'
      )
    os.replace(self._path, path)
    return Written(path, self.examples, self.size, self._digest.hexdigest())

  @contextlib.contextmanager
  def _disk_errors(self) -> Iterator[None]:
    """array_record reports a full disk as a RuntimeError; callers expect an OSError."""
    try:
      yield
    except (RuntimeError, ValueError) as error:
      folder = os.path.dirname(self._path)
      raise OSError(f'writing into {folder} failed; is the disk full? {error}') from error


class Shards:
  """The shards of one split, one after another.

  Those of large splits are larger: each is an open file to a reader, and a request to open it.
  """

  def __init__(self, prefix: str, *, shard_bytes: int = SHARD_BYTES):
    """prefix: of the paths of the shards, before their numbers."""
    self._prefix = prefix
    self._shard_bytes = shard_bytes
    self._written = []
    self._open = None
    self._full = 0

  def add(self, record: bytes) -> None:
    if self._open is not None and self._open.size >= self._full:
      self._close()
    if self._open is None:
      share = sum(shard.size for shard in self._written) // _FIRST
      self._full = min(max(self._shard_bytes, share), _LARGEST * self._shard_bytes)
      self._open = Shard(f'{self._path()}-{uuid.uuid4().hex[:12]}{GROWING}')
    self._open.write(record)

  def close(self) -> list[Written]:
    """All of them, complete and in order."""
    if self._open is not None:
      self._close()
    return self._written

  def _close(self):
    self._written.append(self._open.close(self._path()))
    self._open = None

  def _path(self):
    return f'{self._prefix}-{len(self._written):05d}.shard'

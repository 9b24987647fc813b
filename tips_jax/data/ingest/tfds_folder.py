"""TFDS folders, also those that others wrote: opened without running code, read record by record.

features.json names a Python class for each feature, and TFDS imports it. So only the classes of
TFDS itself are accepted: a data folder must not choose what is imported.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import socket
import typing
import urllib.parse
import urllib.request
from collections.abc import Iterator

import tensorflow_datasets as tfds

from tips_jax.core.errors import InputError
from tips_jax.data.reading.shards import Shards

_CLASSES = 'tensorflow_datasets.core.features.'
_CLASS_KEYS = ('pythonClassName', 'python_class_name', 'type')  # the last one in older files

Path = str | os.PathLike


def open_builder(folder: Path) -> tfds.core.DatasetBuilder:
  """The builder of a TFDS data set on disk. Raises InputError for one that cannot be read."""
  features = pathlib.Path(folder, 'features.json')
  try:
    for name in _class_names(json.loads(features.read_bytes())):
      if not name.startswith(_CLASSES):
        raise InputError(
          f'{str(features)!r}: got a feature of class {name!r}; expected one of '
          f'tensorflow_datasets.features: no code is imported for a data folder'
        )
    builder = tfds.builder_from_directory(os.fspath(folder))
    for split in builder.info.splits.values():
      list(split.filepaths)  # made of a template and numbers that the files hold
    return builder
  except InputError:
    raise
  except Exception as error:  # TFDS raises whatever a broken file makes of it
    raise InputError(
      f'{str(folder)!r} is not a complete TFDS data set: its metadata cannot be read ({error})'
    ) from error


def _class_names(content: typing.Any) -> Iterator[str]:
  """The names of the Python classes anywhere in the content of a features.json."""
  if isinstance(content, list):
    for value in content:
      yield from _class_names(value)
  if isinstance(content, dict):
    for key, value in content.items():
      if key in _CLASS_KEYS and isinstance(value, str):
        yield value
      else:
        yield from _class_names(value)


class Source:
  """The records of a split by number, as dicts; images stay encoded. Picklable.

  Raises InputError for a record that is damaged, and when it is made for an unknown split or a
  slice that is none. check_shards: also for a shard that does not hold what the metadata says; all
  are opened for that, else each when it is first read.
  """

  raw: Shards  # the records as serialized tf.train.Example

  def __init__(self, builder: tfds.core.DatasetBuilder, split: str, *, check_shards: bool = True):
    self._where = f'split {split!r} of {os.fspath(builder.data_dir)!r}'
    try:
      self._source = builder.as_data_source(split, decoders=undecoded(builder))
      # In place of array_record's own reader, which opens one shard at a time.
      self.raw = Shards(self._where, builder.info.splits[split].file_instructions)
      self._source.data_source = self.raw
      if check_shards:
        self.raw.open()
    except InputError:
      raise
    except Exception as error:  # as above; AssertionError for a slice
      raise InputError(
        f'{self._where}: cannot be opened ({error}); expected a split of '
        f'{sorted(builder.info.splits)}, or a slice such as train[:10%]'
      ) from error

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, number: int) -> dict[str, typing.Any]:
    try:
      return self._source[number]
    except (IndexError, MemoryError):  # the latter says nothing of the record
      raise
    except Exception as error:  # array_record, protobuf and TFDS each raise their own
      raise InputError(f'{self._where}: record {number} is damaged ({error})') from error

  def __iter__(self) -> Iterator[dict[str, typing.Any]]:
    for number in range(len(self)):
      yield self[number]


def images_of(builder: tfds.core.DatasetBuilder) -> list[str]:
  """The names of the image features."""
  features = builder.info.features.items()
  return [name for name, feature in features if isinstance(feature, tfds.features.Image)]


def undecoded(builder: tfds.core.DatasetBuilder) -> dict[str, tfds.decode.SkipDecoding]:
  """TFDS decoders that leave the images encoded, by feature name."""
  return dict.fromkeys(images_of(builder), tfds.decode.SkipDecoding())


# --- by name ------------------------------------------------------------------------------------


def root() -> pathlib.Path:
  """The folder of the data sets that TFDS prepares."""
  return pathlib.Path(os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')).expanduser()


def prepare(name: str) -> tfds.core.DatasetBuilder:
  """Has TFDS download and prepare a data set by name; nothing of a failure remains in its way.

  Raises InputError for an unknown name, and at once where TFDS cannot work.
  """
  try:
    builder = tfds.builder(name, data_dir=os.fspath(root()), file_format='array_record')
  except tfds.core.DatasetNotFoundError as error:
    raise InputError(
      f'--input: got {name!r}, which is neither a path nor a TFDS data set known here'
    ) from error
  except Exception as error:  # of the code of this data set
    raise _not_prepared(name, error) from error
  lacking = ', '.join(_lacking())
  if lacking:
    raise _not_prepared(name, lacking)
  try:
    builder.download_and_prepare()
  except Exception as error:
    raise _not_prepared(name, error) from error
  finally:
    with contextlib.suppress(OSError):  # not empty: it is prepared
      os.removedirs(pathlib.Path(builder.data_dir).parent)
  return builder


def _not_prepared(name, why):
  return InputError(
    f'--input: TFDS cannot prepare {name!r} here ({why}); prepare it with TFDS elsewhere, and give '
    f'its folder'
  )


def _lacking() -> Iterator[str]:
  """What TFDS needs to prepare a data set, and would miss only after long retries."""
  if not importlib.util.find_spec('tensorflow'):
    yield 'tensorflow is not installed'
  if not urllib.request.getproxies():
    try:
      socket.getaddrinfo(urllib.parse.urlsplit(tfds.core.constants.SRC_BASE_URL).hostname, None)
    except OSError:
      yield 'no network'

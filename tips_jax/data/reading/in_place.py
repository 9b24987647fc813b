"""Webdataset tars and parquet files read as they lie, without a store made of them.

They are random access to a pipeline as the shards of a store are, and what is an image or a text of
them is what `prepare` would write: its readers say so.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import sys
from typing import Any, Protocol

from tips_jax.core import buckets
from tips_jax.core.errors import InputError
from tips_jax.core.schema import Data
from tips_jax.core.strict import unknown
from tips_jax.data import store
from tips_jax.data.ingest.columnar import ParquetReader
from tips_jax.data.ingest.columns import Columns
from tips_jax.data.ingest.formats import local_input, open_input
from tips_jax.data.ingest.reader import Options, Reader
from tips_jax.data.ingest.tars import TarReader
from tips_jax.data.reading.in_place_parquet import Parquet
from tips_jax.data.reading.in_place_tars import Tars, tar_index

_ENDINGS = re.compile(r'\.(tar|tgz|parquet|tar\.(gz|bz2|xz))[})\]]*$', re.IGNORECASE)
_NO_COLUMNS = ('first_caption_as_alt_text', 'box_format', 'box_unit')  # in data.columns
_PATTERN = re.compile(r'[*?,\[{]')


class Source(Protocol):
  """The records of a split."""

  raw: Any  # shards.Shards, or what reads records as it does

  def __len__(self) -> int: ...


class Opened(Protocol):
  """A store, or what is read in its place."""

  path: str
  fingerprint: str
  tokenizer_path: str | None
  features: tuple[str, ...]

  def source(self, split: str) -> Source: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class InPlace:
  """Tars or parquet files, open."""

  path: str
  split: str
  fingerprint: str  # SHA-256 of the names and the sizes of the files, and of what is read of them
  features: tuple[str, ...]  # those that a store of them would have
  records: Tars | Parquet
  tokenizer_path: str | None = None

  def source(self, split: str) -> 'InPlaceSource':
    """The records of the split that it was opened for."""
    if split != self.split:
      raise unknown(f'split of {self.path!r}', split, [self.split])
    return InPlaceSource(self.records)


@dataclasses.dataclass(frozen=True)
class InPlaceSource:
  """The records of a split, as tfds_folder.Source has them."""

  raw: Tars | Parquet

  def __len__(self) -> int:
    return len(self.raw)


def open_data(path: str, config: Data, *, check_shards: bool = True) -> Opened:
  """A store (`store.open_store`), or what `data.store` names instead of one: a folder, a file or a
  pattern of webdataset tars or of parquet files.

  Raises InputError as open_store does, and for files that cannot be read in place.
  """
  here = path
  if buckets.is_bucket(path):
    here = local_input(path, '', 'data.store')
  if not lies(here):
    return store.open_store(path, check_shards=check_shards)
  chosen = dataclasses.asdict(config.columns)
  others = {name: chosen.pop(name) for name in _NO_COLUMNS}
  options = Options(columns=Columns(**chosen), split=config.split, **others)
  try:
    reader = open_input(here, options)
  except InputError as error:
    # These are the flags of prepare.
    said = str(error).replace('--input_split', 'data.split').replace('--input', 'data.store')
    said = re.sub(r'--(\w+)_column', r'data.columns.\1', said)
    raise InputError(said) from error
  return _opened(reader, path, here, options)


def lies(path: str | os.PathLike) -> bool:
  """Whether a path on this machine is read in place: it has tars or parquet files, and no store."""
  path = os.path.expanduser(os.fspath(path))
  if not os.path.isdir(path):
    return bool(_ENDINGS.search(path)) and (os.path.isfile(path) or bool(_PATTERN.search(path)))
  folder = path
  for _ in range(4):  # the folder of a split or of versions, of a clone of a hub
    names = [name for name in os.listdir(folder) if not name.startswith('.')]
    if store.looks_written(folder):
      return False
    if any(map(_ENDINGS.search, names)):
      return True
    below = [name for name in names if os.path.isdir(os.path.join(folder, name))]
    if not below:
      return False
    folder = os.path.join(folder, 'data' if 'data' in below else sorted(below)[0])
  return False


def _opened(reader: Reader, path: str, here: str, options: Options) -> InPlace:
  files = [[os.path.basename(file), os.path.getsize(file)] for file in reader.files]
  about = dataclasses.asdict(options)
  if isinstance(reader, TarReader):
    place = _index_folder(path, here, reader.files[0], about)
    records = Tars(reader, tar_index(reader, place, files, path, sys.stderr))
  elif isinstance(reader, ParquetReader):
    records = Parquet(reader)
  else:
    raise InputError(
      f'data.store: got {path!r} with {reader.kind}, which are not read in place; expected a store '
      f'(python -m tips_jax.prepare --input={path} --output=STORE), webdataset tars or parquet'
    )
  content = json.dumps([files, about, reader.settled()])
  return InPlace(
    path=path,
    split=options.split,
    fingerprint=hashlib.sha256(content.encode()).hexdigest(),
    features=('alt_text', 'captions', 'id', 'image', *reader.annotations),
    records=records,
  )


def _index_folder(path, here, first, about) -> pathlib.Path:
  """Where the index of tars is: beside them, or below the cache where nothing can be written."""
  name = os.path.basename(os.path.normpath(here))
  own = hashlib.sha256(json.dumps([name, about]).encode()).hexdigest()[:12]
  folder = pathlib.Path(first).absolute().parent
  # A copy of a bucket is made equal to the bucket.
  if not buckets.is_bucket(path):
    beside = folder / '.tips_jax' / own
    if beside.exists() or os.access(folder, os.W_OK):
      return beside
  where = hashlib.sha256(os.fspath(folder).encode()).hexdigest()[:12]
  return buckets.cache() / 'indexes' / where / own

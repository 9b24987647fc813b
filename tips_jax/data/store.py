"""The store: an array_record data set that TFDS opens, and a `store.json` that proves it complete.

A store is built in a sibling folder and renamed into place, so a path holds a complete store or
nothing. Images stay encoded, byte for byte. `prepare` and `scenes` write stores; the
pipeline and the evaluations read them. A complete TFDS folder without `store.json` opens too.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import typing
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds

from tips_jax.core import buckets, files
from tips_jax.core.errors import InputError
from tips_jax.core.strict import did_you_mean, unknown
from tips_jax.data.ingest import records, tfds_folder
from tips_jax.data.reading.shards import sizes

FORMAT = 1
INFO_FILE = 'store.json'
TOKENIZER_FILE = 'tokenizer.model'
ANNOTATIONS_FILE = 'annotations.json'  # names of the mask classes
TFDS_FILES = ('dataset_info.json', 'features.json')
TFDS_NAME = r'\w+(/[\w.-]+)*(:[\w.]+)?'  # name/config:1.0.0
TEMPORARY_SUFFIX = '.partial'
ANNOTATIONS = (
  'label',
  'mask',
  'depth',
  'normals',
  'boxes',
  'region_captions',
  'region_captions_boxes',
  'region_tags',
  'region_tags_boxes',
  'tags',
)
PLACED = ('mask', 'depth', 'normals', 'boxes')  # annotations of places in the upright image
_DIGESTS_FILE = 'digests.json'  # of the shards, until store.json is there

Path = str | os.PathLike


# --- writing ------------------------------------------------------------------------------------


def features(
  annotations: Sequence[str] = (), *, labels: Sequence[str] | None = None
) -> tfds.features.FeaturesDict:
  """The TFDS features of a store: image, id, alt_text, captions and the named annotations.

  `labels` are the class names of 'label'. Image features take encoded bytes.
  """
  f = tfds.features
  texts = f.Sequence(f.Text())
  numbers = f.Sequence(np.int64)
  known = {
    'label': f.ClassLabel(names=labels) if labels else None,
    # Class ids; 255 is void.
    'mask': f.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format='png'),
    # Millimeters; 0 is missing.
    'depth': f.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format='png'),
    # n * 127.5 + 127.5.
    'normals': f.Image(shape=(None, None, 3), dtype=np.uint8, encoding_format='png'),
    # (ymin, xmin, ymax, xmax) in [0, 1].
    'boxes': f.Tensor(shape=(None, 4), dtype=np.float32),
    # One per box; or any number, with the number of its box for each.
    'region_captions': texts,
    'region_captions_boxes': numbers,
    'region_tags': texts,
    'region_tags_boxes': numbers,
    'tags': texts,
  }
  chosen = {
    'image': f.Image(shape=(None, None, 3)),
    'id': f.Text(),
    'alt_text': f.Text(),
    'captions': texts,
  }
  for name in annotations:
    if known.get(name) is None:
      what = 'annotation' if name != 'label' else 'annotation without class names'
      raise unknown(what, name, ANNOTATIONS)
    chosen[name] = known[name]
  return f.FeaturesDict(chosen)


class Writer:
  """Streams examples to array_record shards in a folder, in order and in constant memory.

  Usage: `add(split, example)` for each, then `close()`, then `finish(folder, path, info)`.
  """

  def __init__(
    self,
    folder: Path,
    feature_dict: tfds.features.FeaturesDict,
    *,
    name: str = 'store',
    description: str = '',
    shard_bytes: int = records.SHARD_BYTES,
  ):
    self._folder = os.fspath(folder)
    self._features = feature_dict
    self._about = {'name': name, 'description': description}
    self._serialize = records.Serializer(feature_dict)
    self._shard_bytes = shard_bytes
    self._shards = {}  # by split

  def add(self, split: str, example: Mapping[str, typing.Any]) -> None:
    """Appends one example (a dict by feature name; images as encoded bytes) to a split."""
    if split not in self._shards:
      prefix = os.path.join(self._folder, split)
      self._shards[split] = records.Shards(prefix, shard_bytes=self._shard_bytes)
    self._shards[split].add(self._serialize(example))

  def close(self) -> dict[str, int]:
    """Closes the shards, checks their record counts and writes the TFDS metadata.

    Returns the number of examples by split.
    """
    written = {split: shards.close() for split, shards in self._shards.items()}
    return complete(self._folder, self._features, written, **self._about)


def complete(
  folder: Path,
  feature_dict: tfds.features.FeaturesDict,
  splits: Mapping[str, Sequence[records.Written]],
  *,
  name: str = 'store',
  description: str = '',
) -> dict[str, int]:
  """Names the shards in a folder as TFDS does, and writes its metadata. May be called again.

  Returns the number of examples by split.
  """
  folder = os.fspath(folder)
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=name, version=tfds.core.Version('1.0.0'), data_dir=folder, module_name=__name__
  )
  info = tfds.core.DatasetInfo(builder=identity, features=feature_dict, description=description)
  info.set_file_format('array_record', override=True)
  infos = []
  digests = {}
  for split, shards in splits.items():
    template = tfds.core.ShardedFileTemplate(
      data_dir=folder, dataset_name=name, split=split, filetype_suffix='array_record'
    )
    # The names hold the number of shards, which is known only now.
    for i, shard in enumerate(shards):
      path = os.fspath(template.sharded_filepath(shard_index=i, num_shards=len(shards)))
      if not os.path.exists(path):
        os.replace(os.path.join(folder, os.path.basename(shard.path)), path)
      digests[os.path.basename(path)] = shard.sha256
    infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[shard.examples for shard in shards],
        num_bytes=sum(shard.size for shard in shards),
        filename_template=template,
      )
    )
  info.set_splits(tfds.core.SplitDict(infos))
  info.write_to_directory(folder)
  files.write(os.path.join(folder, _DIGESTS_FILE), json.dumps(digests))
  return {info.name: info.num_examples for info in infos}


def temporary_folder(path: Path) -> pathlib.Path:
  """Makes an empty sibling folder to build the store `path` in.

  Folders that killed runs left behind for the same `path` are removed (writing always starts anew);
  those of live processes are left alone. Raises InputError if `path` exists or is not writable.
  """
  path = _absolute(path)
  refuse_existing(path)
  left_behind = re.compile(rf'\.{re.escape(path.name)}-(\d+)-\w+{re.escape(TEMPORARY_SUFFIX)}')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    for sibling in path.parent.iterdir():
      owner = left_behind.fullmatch(sibling.name)
      if owner and not _alive(int(owner[1])):
        shutil.rmtree(sibling)
    prefix = f'.{path.name}-{os.getpid()}-'
    return pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=TEMPORARY_SUFFIX))
  except OSError as error:
    raise _not_writable(path, error) from error


def work_folder(path: Path) -> pathlib.Path:
  """Makes the folder beside `path` in which a store is built by several calls or processes, unless
  it is there. Raises InputError if `path` exists or is not writable.
  """
  refuse_existing(path)
  folder = work_path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise _not_writable(path, error) from error
  return folder


def work_path(path: Path) -> pathlib.Path:
  """Where `work_folder` is."""
  path = _absolute(path)
  return path.with_name(path.name + TEMPORARY_SUFFIX)


def _not_writable(path, error):
  return InputError(
    f'store: cannot write {str(path)!r} ({error.strerror}); expected a path in a writable folder'
  )


def _alive(pid):
  try:
    os.kill(pid, 0)  # signal 0 only checks
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True


def finish(tmp_dir: Path, path: Path, info: Mapping[str, typing.Any]) -> str:
  """Turns a complete TFDS folder into the store `path`, and returns `path`.

  `tmp_dir` must be on the file system of `path` and hold what `complete` left and, if there is one,
  tokenizer.model. `info` (a JSON-able dict) is kept as `Store.info`. Raises InputError if `path`
  exists already.
  """
  refuse_existing(path)
  seal(tmp_dir, info)
  return publish(tmp_dir, path)


def seal(folder: Path, info: Mapping[str, typing.Any]) -> None:
  """Writes store.json into the folder of a store: proof that all else is there."""
  folder = pathlib.Path(folder)
  splits, shards = _splits_and_shards(tfds.builder_from_directory(os.fspath(folder)))
  digests = json.loads((folder / _DIGESTS_FILE).read_text())
  tokenizer = folder / TOKENIZER_FILE
  content = {
    'format': FORMAT,
    'splits': splits,
    'fingerprint': _fingerprint(shards, digests),
    'tokenizer_sha256': _sha256(tokenizer) if tokenizer.exists() else None,
    'files': {shard: (folder / shard).stat().st_size for shard in shards},
    'info': info,
  }
  (folder / _DIGESTS_FILE).unlink()
  # Whole at once: that it is there says that all is.
  files.write(folder / INFO_FILE, json.dumps(content, indent=1))


def publish(folder: Path, path: Path) -> str:
  """Gives a sealed folder its name in one atomic rename, and returns it.

  Raises InputError if `path` exists already.
  """
  folder = pathlib.Path(folder)
  path = _absolute(path)
  refuse_existing(path)
  folder.chmod(0o755)  # mkdtemp's is 0o700
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    os.replace(folder, path)
  except OSError as error:
    refuse_existing(path)
    raise InputError(
      f'store: cannot move {str(folder)!r} to {str(path)!r} ({error.strerror})'
    ) from error
  return str(path)


def _absolute(path):
  return pathlib.Path(os.path.abspath(os.path.expanduser(path)))  # pathlib does not resolve '..'


def refuse_existing(path: Path) -> None:
  """Raises InputError if there is anything at `path` but an empty folder."""
  path = _absolute(path)
  if path.is_dir() and not any(path.iterdir()):
    return
  if os.path.lexists(path):
    raise InputError(
      f'store: {str(path)!r} exists already; expected a new path (remove it yourself to write it '
      f'anew)'
    )


def _fingerprint(shards, digests):
  """SHA-256 over the names of the shards, in order, and the digests of their records."""
  digest = hashlib.sha256()
  for shard in shards:
    digest.update(f'{shard} {digests[shard]}\n'.encode())
  return digest.hexdigest()


def _sha256(path):
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


# --- reading ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
  """An open store."""

  path: str
  splits: dict[str, int]  # number of examples by name
  fingerprint: str  # SHA-256 of the records
  tokenizer_path: str | None
  tokenizer_sha256: str | None
  features: tuple[str, ...]  # names
  info: dict  # as given to `finish`
  check_shards: bool  # as given to `open_store`

  def source(self, split: str) -> tfds_folder.Source:
    """The records of one split: 'train', or a TFDS slice as 'train[:10%]'.

    Each is a dict: image features as encoded bytes, texts as bytes. Raises InputError for an
    unknown split.
    """
    for part in split.split('+'):
      if part.partition('[')[0].strip() not in self.splits:
        raise unknown(f'split of store {self.path!r}', part, self.splits)
    builder = tfds_folder.open_builder(self.path)
    return tfds_folder.Source(builder, split, check_shards=self.check_shards)

  def label_names(self) -> tuple[str, ...]:
    """The class names of the 'label' feature; () if it has none."""
    feature = dict(tfds_folder.open_builder(self.path).info.features.items()).get('label')
    return tuple(feature.names) if isinstance(feature, tfds.features.ClassLabel) else ()


def open_store(path: Path, *, check_shards: bool = True) -> Store:
  """Opens a store folder, a complete TFDS folder, or a prepared TFDS data set by name.

  Raises InputError if it is missing (with the nearest name beside it), half-written, or not
  array_record. check_shards: whether this and `source` look at each shard; of the processes of a
  run one is enough.
  """
  folder = pathlib.Path(resolve(path))
  content = _read_info(folder)
  builder = _builder(folder)
  if builder.info.file_format is None or builder.info.file_format.value != 'array_record':
    raise InputError(
      f'store: {str(folder)!r} is a TFDS data set whose records are not array_record; convert it '
      f'with: python -m tips_jax.prepare --input={path} --output=STORE'
    )
  splits, shards = _splits_and_shards(builder)
  if check_shards:
    _check_files(folder, content.get('files') or dict.fromkeys(shards))
  if content and content['splits'] != splits:
    raise _half_written(
      folder, f'{INFO_FILE} has the splits {content["splits"]}, the records have {splits}'
    )
  tokenizer = folder / TOKENIZER_FILE
  return Store(
    path=str(folder),
    splits=splits,
    fingerprint=content.get('fingerprint') or _metadata_fingerprint(folder, shards),
    tokenizer_path=str(tokenizer) if tokenizer.exists() else None,
    tokenizer_sha256=content.get('tokenizer_sha256'),
    features=tuple(sorted(builder.info.features)),
    info=content.get('info', {}),
    check_shards=check_shards,
  )


def names_beside(path: Path) -> list[str]:
  """The other names in the folder of a path, for messages; [] where there is no such folder."""
  path = _absolute(path)
  if not path.parent.is_dir():
    return []
  return [name for name in os.listdir(path.parent) if name != path.name]


def resolve(path: Path) -> str:
  """The folder with dataset_info.json, of a folder, a folder of versions, or a TFDS name.

  A TFDS name ('name/config:1.0.0') is looked up under $TFDS_DATA_DIR (default
  ~/tensorflow_datasets); of one in a bucket a copy is made. Raises InputError if there is none.
  """
  name = buckets.local(path, 'store')
  if not name:
    raise InputError(
      "store: got ''; expected the folder written by tips_jax.prepare, or a TFDS name"
    )
  folder = _absolute(name)
  if not folder.exists() and re.fullmatch(TFDS_NAME, name):
    by_name = tfds_folder.root() / name.replace(':', '/')
    # TFDS leaves an empty folder where it failed to prepare a data set.
    if next(by_name.rglob(TFDS_FILES[0]), None):
      folder = by_name
  if not folder.is_dir():
    raise InputError(
      f'store: got {name!r}, which is not a folder; expected the folder written by '
      f'tips_jax.prepare{did_you_mean(folder.name, names_beside(folder))}'
    )
  # TFDS nests: name/config/1.0.0. Descend where there is no choice; of versions take the newest.
  while not looks_written(folder):
    inside = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith('.')]
    versions = [p for p in inside if re.fullmatch(r'\d+\.\d+\.\d+', p.name)]
    if versions:
      folder = max(versions, key=lambda p: tuple(map(int, p.name.split('.'))))
    elif len(inside) == 1:
      folder = inside[0]
    else:
      break
  return str(folder)


def looks_written(folder: Path) -> bool:
  """Whether a folder holds a store or a TFDS data set, or one that is not complete."""
  return any(
    name in (*TFDS_FILES, INFO_FILE) or '.array_record' in name or name.endswith('.growing')
    for name in os.listdir(folder)
  )


def _is_tfds(folder):
  return all((folder / name).exists() for name in TFDS_FILES)


def _half_written(folder, why):
  return InputError(f'half-written store {str(folder)!r}: {why}; write it again')


def _read_info(folder):
  """The content of store.json; {} for a TFDS folder that never had one."""
  incomplete = _half_written(folder, f'it has no complete {INFO_FILE}')
  if folder.name.endswith(TEMPORARY_SUFFIX):
    raise incomplete
  path = folder / INFO_FILE
  if not path.exists():
    if looks_written(folder) and not _is_tfds(folder):
      raise incomplete
    return {}
  try:
    content = json.loads(path.read_text())
    known = content['format'] == FORMAT
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise incomplete from error
  if not known:
    raise InputError(f'store {str(folder)!r}: got format {content["format"]!r}; expected {FORMAT}')
  return content


def _builder(folder):
  if not _is_tfds(folder):
    if (folder / INFO_FILE).exists():
      raise _half_written(folder, f'{" or ".join(TFDS_FILES)} is missing')
    raise InputError(
      f'store: got {str(folder)!r}, which holds no store; expected the folder written by '
      f'tips_jax.prepare'
    )
  return tfds_folder.open_builder(folder)


def _splits_and_shards(builder):
  """(examples by split, file names of the shards in order)."""
  splits = {}
  shards = []
  for name, info in builder.info.splits.items():
    splits[name] = info.num_examples
    shards += sorted(info.filenames)
  return splits, shards


def _check_files(folder, expected):
  """Checks that every shard exists, and has the size it was written with where that is known."""
  for (shard, size), on_disk in zip(expected.items(), sizes(folder / name for name in expected)):
    if on_disk is None:
      raise _half_written(folder, f'{shard} is missing')
    if size not in (None, on_disk):
      raise _half_written(folder, f'{shard} is {on_disk} bytes long, not {size}')


def _metadata_fingerprint(folder, shards):
  """Of a TFDS folder: reading all of its records just to open it would take too long."""
  digest = hashlib.sha256()
  for shard, size in zip(shards, sizes(folder / name for name in shards)):
    digest.update(f'{shard}:{size}\n'.encode())
  for name in TFDS_FILES:
    digest.update((folder / name).read_bytes())
  return digest.hexdigest()

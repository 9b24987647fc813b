"""The store: an array_record data set that TFDS opens, with a `store.json` that proves it is whole.

A store is built in a temporary sibling folder and renamed into place, so a path either holds a
whole store or nothing. Images stay encoded, byte for byte as they came. `prepare` and `scenes`
write stores; the pipeline and evaluators read them. A complete TFDS folder without `store.json`
opens too.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from tips_jax.core.errors import InputError
from tips_jax.core.strict import did_you_mean, unknown

FORMAT = 1
INFO_FILE = 'store.json'
TOKENIZER_FILE = 'tokenizer.model'
TEMPORARY_SUFFIX = '.partial'
ANNOTATIONS = ('label', 'mask', 'depth', 'normals', 'boxes', 'region_captions', 'tags')
_SHARD_BYTES = 256 * 2**20
_TFDS_FILES = ('dataset_info.json', 'features.json')


# --- writing ------------------------------------------------------------------------------------


def features(annotations=(), *, labels=None):
  """The TFDS features of a store: image, id, alt_text, captions and the named annotations.

  `labels` are the class names of 'label'. Image features take encoded bytes. Sizes in pixels: mask
  uint8 class ids (255: ignore), depth uint16 millimeters, normals uint8 (n * 127.5 + 127.5), boxes
  (ymin, xmin, ymax, xmax) in [0, 1].
  """
  f = tfds.features
  texts = f.Sequence(f.Text())
  known = {
    'label': f.ClassLabel(names=labels) if labels else None,
    'mask': f.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format='png'),
    'depth': f.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format='png'),
    'normals': f.Image(shape=(None, None, 3), dtype=np.uint8, encoding_format='png'),
    'boxes': f.Tensor(shape=(None, 4), dtype=np.float32),
    'region_captions': texts,
    'tags': texts,
  }
  for name in annotations:
    if known.get(name) is None:
      raise unknown(
        'annotation' if name != 'label' else 'annotation without class names', name, ANNOTATIONS
      )
  core = {
    'image': f.Image(shape=(None, None, 3)),
    'id': f.Text(),
    'alt_text': f.Text(),
    'captions': texts,
  }
  return f.FeaturesDict({**core, **{name: known[name] for name in annotations}})


class Writer:
  """Streams examples to array_record shards in a folder, in order and in constant memory.

  Usage: `add(split, example)` for each, then `close()`, then `finish(folder, path, info)`.
  """

  def __init__(
    self, folder, feature_dict, *, name='store', description='', shard_bytes=_SHARD_BYTES
  ):
    self.folder = os.fspath(folder)
    self._features = feature_dict
    self._shard_bytes = shard_bytes
    identity = tfds.core.dataset_info.DatasetIdentity(
      name=name, version=tfds.core.Version('1.0.0'), data_dir=self.folder, module_name=__name__
    )
    self._info = tfds.core.DatasetInfo(
      builder=identity, features=feature_dict, description=description
    )
    self._shards = {}  # split -> list of [writer or None, examples, bytes]

  def add(self, split, example):
    """Appends one example (a dict by feature name; images as encoded bytes) to a split."""
    record = self._features.serialize_example(self._features.encode_example(example))
    shards = self._shards.setdefault(split, [])
    if not shards or shards[-1][2] >= self._shard_bytes:
      self._close_last(shards)
      with _disk_errors(self.folder):
        writer = array_record_module.ArrayRecordWriter(
          self._growing(split, len(shards)), 'group_size:1'
        )
      shards.append([writer, 0, 0])
    with _disk_errors(self.folder):
      shards[-1][0].write(record)
    shards[-1][1] += 1
    shards[-1][2] += len(record)

  def close(self):
    """Closes the shards, checks their record counts, writes the TFDS metadata; returns {split:
    examples}.
    """
    self._info.set_file_format('array_record', override=True)
    infos = []
    for split, shards in self._shards.items():
      self._close_last(shards)
      template = tfds.core.ShardedFileTemplate(
        data_dir=self.folder,
        dataset_name=self._info.name,
        split=split,
        filetype_suffix='array_record',
      )
      for i, (_, count, _) in enumerate(shards):
        path = os.fspath(template.sharded_filepath(shard_index=i, num_shards=len(shards)))
        os.replace(self._growing(split, i), path)
        _check_records(path, count)
      infos.append(
        tfds.core.SplitInfo(
          name=split,
          shard_lengths=[s[1] for s in shards],
          num_bytes=sum(s[2] for s in shards),
          filename_template=template,
        )
      )
    self._info.set_splits(tfds.core.SplitDict(infos))
    self._info.write_to_directory(self.folder)
    return {info.name: info.num_examples for info in infos}

  def _growing(self, split, index):
    return os.path.join(self.folder, f'{split}-{index:05d}.growing')

  def _close_last(self, shards):
    if shards and shards[-1][0] is not None:
      writer, shards[-1][0] = shards[-1][0], None
      with _disk_errors(self.folder):
        writer.close()


@contextlib.contextmanager
def _disk_errors(folder):
  """array_record reports a full disk as a RuntimeError; callers await an OSError."""
  try:
    yield
  except (RuntimeError, ValueError) as error:
    raise OSError(f'writing into {folder} failed; is the disk full? {error}') from error


def _check_records(path, count):
  reader = array_record_module.ArrayRecordReader(path)
  found = reader.num_records()
  reader.close()
  if found != count:
    raise OSError(f'{path}: {found} records on disk after writing {count}; is the disk full?')


def temporary_folder(path):
  """Makes an empty sibling folder to build the store `path` in; InputError when `path` is taken or
  unwritable.

  Folders that killed runs left behind for the same `path` are removed (writing always starts anew);
  those of live processes are left alone.
  """
  path = _absolute(path)
  refuse_existing(path)
  parent, name = os.path.split(path)
  try:
    os.makedirs(parent, exist_ok=True)
    for left in os.listdir(parent):
      owner = re.fullmatch(rf'\.{re.escape(name)}-(\d+)-\w+{re.escape(TEMPORARY_SUFFIX)}', left)
      if owner and not _alive(int(owner[1])):
        shutil.rmtree(os.path.join(parent, left))
    return tempfile.mkdtemp(dir=parent, prefix=f'.{name}-{os.getpid()}-', suffix=TEMPORARY_SUFFIX)
  except OSError as error:
    reason = (
      f'store: cannot write {path!r} ({error.strerror}); expected a path in a writable folder'
    )
    raise InputError(reason) from error


def _alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True


def finish(tmp_dir, path, info):
  """Turns a complete TFDS folder into the store `path`: fingerprint, `store.json` last, one atomic
  rename.

  `tmp_dir` must be on the file system of `path` and hold dataset_info.json, the shards and, if
  there is one, tokenizer.model. `info` (a JSON-able dict) is kept as `Store.info`. Returns `path`.
  Raises InputError when `path` exists already.
  """
  tmp_dir, path = os.fspath(tmp_dir), _absolute(path)
  refuse_existing(path)
  splits, shards = _splits_and_shards(tfds.builder_from_directory(tmp_dir))
  tokenizer = os.path.join(tmp_dir, TOKENIZER_FILE)
  content = {
    'format': FORMAT,
    'splits': splits,
    'fingerprint': _fingerprint([os.path.join(tmp_dir, shard) for shard in shards]),
    'tokenizer_sha256': _sha256(tokenizer) if os.path.exists(tokenizer) else None,
    'files': {shard: os.path.getsize(os.path.join(tmp_dir, shard)) for shard in shards},
    'info': info,
  }
  with open(os.path.join(tmp_dir, INFO_FILE), 'w') as file:
    json.dump(content, file, indent=1)
    file.flush()
    os.fsync(file.fileno())
  os.chmod(tmp_dir, 0o755)
  os.makedirs(os.path.dirname(path), exist_ok=True)
  try:
    os.replace(tmp_dir, path)
  except OSError as error:
    refuse_existing(path)
    raise InputError(f'store: cannot move {tmp_dir!r} to {path!r} ({error.strerror})') from error
  return path


def _absolute(path):
  return os.path.abspath(os.path.expanduser(os.fspath(path)))


def refuse_existing(path):
  """Raises InputError when there is anything at `path` but an empty folder."""
  path = _absolute(path)
  if os.path.isdir(path) and not os.listdir(path):
    return
  if os.path.lexists(path):
    raise InputError(
      f'store: {path!r} exists already; expected a new path (remove it yourself to write it anew)'
    )


def _fingerprint(shards):
  """sha256 over the records in order, each with its fields sorted: protobuf's own order varies by
  process.
  """
  digest = hashlib.sha256()
  for shard in shards:
    digest.update(os.path.basename(shard).encode())
    reader = array_record_module.ArrayRecordReader(shard)
    for _ in range(reader.num_records()):
      record = tf_example_pb2.Example.FromString(reader.read()).SerializeToString(
        deterministic=True
      )
      digest.update(len(record).to_bytes(8, 'little') + record)
    reader.close()
  return digest.hexdigest()


def _sha256(path):
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


# --- reading ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
  """An open store. `splits`: examples by split; `fingerprint`: sha256 of the records; `features`:
  their names.
  """

  path: str
  splits: dict[str, int]
  fingerprint: str
  tokenizer_path: str | None
  tokenizer_sha256: str | None
  features: tuple[str, ...]
  info: dict

  def source(self, split):
    """A picklable random-access source of one split ('train', or a TFDS slice such as
    'train[:10%]').

    Each record is a dict: image features as encoded bytes, texts as bytes. Raises InputError for an
    unknown split.
    """
    for part in split.split('+'):
      if part.partition('[')[0].strip() not in self.splits:
        raise unknown(f'split of store {self.path!r}', part, self.splits)
    builder = tfds.builder_from_directory(self.path)
    encoded = {
      name: tfds.decode.SkipDecoding()
      for name, feature in builder.info.features.items()
      if isinstance(feature, tfds.features.Image)
    }
    try:
      return builder.as_data_source(split, decoders=encoded)
    except (ValueError, AssertionError) as error:
      raise InputError(
        f'split of store {self.path!r}: got {split!r}; expected a name of {sorted(self.splits)}, or a '
        f'slice such as train[:10%]'
      ) from error

  def label_names(self):
    """The class names of the 'label' feature; () when there is none."""
    feature = dict(tfds.builder_from_directory(self.path).info.features.items()).get('label')
    return tuple(feature.names) if isinstance(feature, tfds.features.ClassLabel) else ()


def open_store(path):
  """Opens a store folder, a complete TFDS folder, or a prepared TFDS data set by name.

  Raises InputError when it is missing (with the nearest name beside it), half-written, or not
  array_record.
  """
  folder = resolve(path)
  content = _read_info(folder)
  builder = _builder(folder)
  if builder.info.file_format is None or builder.info.file_format.value != 'array_record':
    raise InputError(
      f'store: {folder!r} is a TFDS data set whose records are not array_record; convert it with: '
      f'python -m tips_jax.prepare --input={path} --output=STORE'
    )
  splits, shards = _splits_and_shards(builder)
  _check_files(folder, content.get('files') or dict.fromkeys(shards))
  if content and content['splits'] != splits:
    raise InputError(
      f'half-written store {folder!r}: {INFO_FILE} has the splits {content["splits"]}, the records '
      f'have {splits}; write it again'
    )
  tokenizer = os.path.join(folder, TOKENIZER_FILE)
  return Store(
    path=folder,
    splits=splits,
    fingerprint=content.get('fingerprint') or _metadata_fingerprint(folder, shards),
    tokenizer_path=tokenizer if os.path.exists(tokenizer) else None,
    tokenizer_sha256=content.get('tokenizer_sha256'),
    features=tuple(sorted(builder.info.features)),
    info=content.get('info', {}),
  )


def resolve(path):
  """The folder that holds dataset_info.json for a folder, a folder of versions, or a TFDS name
  ('name/config:1.0.0').

  A TFDS name is looked up under $TFDS_DATA_DIR (default ~/tensorflow_datasets). Raises InputError
  when there is none.
  """
  name = os.fspath(path)
  if not name:
    raise InputError(
      "store: got ''; expected the folder written by tips_jax.prepare, or a TFDS name"
    )
  folder = _absolute(name)
  if not os.path.exists(folder) and re.fullmatch(r'\w+(/[\w.-]+)*(:[\w.]+)?', name):
    root = os.path.expanduser(os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets'))
    by_name = os.path.join(root, name.replace(':', '/'))
    folder = by_name if os.path.exists(by_name) else folder
  if not os.path.isdir(folder):
    parent = os.path.dirname(folder)
    beside = os.listdir(parent) if os.path.isdir(parent) else []
    raise InputError(
      f'store: got {name!r}, which is not a folder; expected the folder written by tips_jax.prepare'
      f'{did_you_mean(os.path.basename(folder), beside)}'
    )
  while not _looks_written(folder):
    inside = [
      f
      for f in os.listdir(folder)
      if os.path.isdir(os.path.join(folder, f)) and not f.startswith('.')
    ]
    if not inside:
      break
    versions = [f for f in inside if re.fullmatch(r'\d+\.\d+\.\d+', f)]
    if not versions and len(inside) > 1:
      break
    newest = max(versions, key=lambda v: tuple(map(int, v.split('.')))) if versions else inside[0]
    folder = os.path.join(folder, newest)
  return folder


def _looks_written(folder):
  return any(
    f in (*_TFDS_FILES, INFO_FILE) or '.array_record' in f or f.endswith('.growing')
    for f in os.listdir(folder)
  )


def _read_info(folder):
  """The content of store.json; {} for a TFDS folder that never had one."""
  half = InputError(f'half-written store {folder!r}: it has no whole {INFO_FILE}; write it again')
  if folder.endswith(TEMPORARY_SUFFIX):
    raise half
  path = os.path.join(folder, INFO_FILE)
  if not os.path.exists(path):
    if _looks_written(folder) and not all(
      os.path.exists(os.path.join(folder, f)) for f in _TFDS_FILES
    ):
      raise half
    return {}
  try:
    with open(path) as file:
      content = json.load(file)
    known = content['format'] == FORMAT
  except (ValueError, KeyError, TypeError) as error:
    raise half from error
  if not known:
    raise InputError(f'store {folder!r}: got format {content["format"]!r}; expected {FORMAT}')
  return content


def _builder(folder):
  if not all(os.path.exists(os.path.join(folder, f)) for f in _TFDS_FILES):
    if os.path.exists(os.path.join(folder, INFO_FILE)):
      raise InputError(
        f'half-written store {folder!r}: dataset_info.json or features.json is gone; write it again'
      )
    raise InputError(
      f'store: got {folder!r}, which holds no store; expected the folder written by tips_jax.prepare'
    )
  try:
    return tfds.builder_from_directory(folder)
  except Exception as error:
    raise InputError(f'store {folder!r}: TFDS cannot read its metadata ({error})') from error


def _splits_and_shards(builder):
  infos = builder.info.splits
  return (
    {name: info.num_examples for name, info in infos.items()},
    [name for info in infos.values() for name in sorted(info.filenames)],
  )


def _check_files(folder, sizes):
  """Every shard is there, and has the size it was written with where that is known."""
  for shard, size in sizes.items():
    path = os.path.join(folder, shard)
    found = os.path.getsize(path) if os.path.exists(path) else None
    if found is None or size not in (None, found):
      state = 'missing' if found is None else f'{found} bytes long, not {size}'
      raise InputError(f'half-written store {folder!r}: {shard} is {state}; write or copy it again')


def _metadata_fingerprint(folder, shards):
  digest = hashlib.sha256()
  for shard in shards:
    digest.update(f'{shard}:{os.path.getsize(os.path.join(folder, shard))}\n'.encode())
  for name in _TFDS_FILES:
    with open(os.path.join(folder, name), 'rb') as file:
      digest.update(file.read())
  return digest.hexdigest()

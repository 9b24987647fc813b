"""Readers of webdataset tars, and of the same layout as loose files.

One sample is the files of one key: KEY.jpg, KEY.txt, KEY.json.
"""

import json
import os
import pathlib
import tarfile
from collections.abc import Iterator, Sequence

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.columns import NONE, guess
from tips_jax.data.ingest.reader import Options, Reader, Sample

IMAGES = ('jpg', 'jpeg', 'png', 'webp', 'bmp', 'gif', 'tif', 'tiff', 'ppm')
_PROBE_SAMPLES = 100


class _MembersReader(Reader):
  """Samples whose members differ by the ending of their names.

  The columns are the fields of the JSON and the endings of the other members.
  """

  def __init__(self, options: Options):
    super().__init__(options)
    self._columns = None  # until a sample shows them
    self._unclear = []  # the errors of samples that do not
    # The features of a store, with its class names, are fixed before the first sample.
    if options.columns.label not in ('', NONE):
      raise InputError(
        f'--label_column: got {self.kind}, whose class names are unknown before the last one; '
        f'expected a table or parquet'
      )
    self.annotations = self._named_annotations()

  def _members(self):
    """Yields (key, {ending: bytes})."""
    raise NotImplementedError

  def __iter__(self) -> Iterator[Sample]:
    for key, members in self._members():
      yield self._sample(key, members)
    if self._columns is None and self._unclear:
      raise self._unclear[0]

  def _sample(self, key, members):
    image = next((members.pop(end) for end in IMAGES if end in members), None)
    problem = '' if image is not None else 'no image member'
    try:
      row = {**json.loads(members.pop('json', b'{}')), **members}
    except (ValueError, TypeError):
      row = members
      problem = problem or 'its .json is not a JSON object'
    if 'txt' in row and _text(row['txt']) == row.get('caption'):
      del row['caption']  # img2dataset writes the same text twice
    columns = self._columns or self._guess(row)
    if columns is None:
      return Sample(key, image, '', [], {}, problem)
    alt_text, captions = self._texts([row], columns)
    extra = {}
    if 'mask' in self.annotations and row.get(columns.mask):
      extra['mask'] = row[columns.mask]
    return Sample(key, image, alt_text, captions, extra, problem)

  def _guess(self, row):
    """The columns, from the first sample that has all given ones and a text (some lack them)."""
    try:
      self._columns = guess(self.options.columns, list(row), need_image=False)
    except InputError as error:
      self._unclear.append(error)
      if len(self._unclear) == _PROBE_SAMPLES:
        raise
    return self._columns


class TarReader(_MembersReader):
  """Webdataset tars, img2dataset's too: consecutive members of one key are a sample.

  Raises InputError for a truncated tar.
  """

  kind = 'webdataset tars'

  def __init__(self, files: Sequence[str], options: Options):
    super().__init__(options)
    self._files = files
    self._sizes = [os.path.getsize(f) for f in files]

  def _members(self):
    done = 0  # bytes of the tars before
    read = 0  # samples
    for path, size in zip(self._files, self._sizes):
      for key, members, position in _tar_samples(path, read):
        read += 1
        # A tar does not say how many samples it has: extrapolate from the bytes read.
        self.total = round(read * sum(self._sizes) / (done + position))
        yield key, members
      done += size
    self.total = read


class LooseReader(_MembersReader):
  """The same layout as files in folders, as img2dataset writes them with --output_format=files."""

  kind = 'images with text files beside them'

  def __init__(self, path: str, options: Options):
    super().__init__(options)
    groups = {}
    for root, folders, names in os.walk(path):
      folders.sort()  # os.walk descends in this order
      for name in sorted(names):
        key, end = _split(os.path.relpath(os.path.join(root, name), path))
        groups.setdefault(key, {})[end] = pathlib.Path(root, name)
    self._groups = {k: group for k, group in groups.items() if not group.keys().isdisjoint(IMAGES)}
    self.total = len(self._groups)

  def _members(self):
    for key, group in self._groups.items():
      yield key, {end: path.read_bytes() for end, path in group.items()}


def has_loose_samples(path: str) -> bool:
  """Whether the folder, or the first one in it, has an image with a .txt or .json of its name."""
  for _, (_, folders, names) in zip(range(2), os.walk(path)):
    folders.sort()
    keys = {_split(name) for name in names}
    for key, end in keys:
      if end in IMAGES and not keys.isdisjoint({(key, 'txt'), (key, 'json')}):
        return True
  return False


def _split(name):
  """(key, ending): the key is the path up to the first dot of its base name."""
  folder, base = os.path.split(name)
  stem, _, end = base.partition('.')
  return os.path.join(folder, stem) if stem else '', end.lower()


def _text(value):
  return value.decode('utf-8', 'replace') if isinstance(value, bytes) else value


def _tar_samples(path, read_before):
  """Yields (key, {ending: bytes}, position in bytes) by sample."""
  key = None
  members = {}
  last = 'its first member'
  read = read_before
  try:
    with tarfile.open(path, 'r:*') as tar:
      for member in tar:
        last = repr(member.name)
        member_key, end = _split(member.name)
        if not member.isfile() or not member_key or not end:
          continue
        if member_key != key:
          if key is not None:
            yield key, members, member.offset
            read += 1
          key = member_key
          members = {}
        data = tar.extractfile(member).read()
        # tarfile reads past the end of a cut file without an error.
        if len(data) != member.size:
          raise tarfile.ReadError('unexpected end of data')
        members[end] = data
      if not _has_end_mark(tar):
        raise tarfile.ReadError('no end-of-archive mark')
  except (tarfile.TarError, EOFError, OSError) as error:
    raise InputError(
      f'{path!r} is truncated or damaged at {last} ({error}), after {read} samples; expected a '
      f'complete tar; copy or write it again, or leave it out'
    ) from error
  if key is not None:
    yield key, members, tar.offset


def _has_end_mark(tar):
  """Whether a block of zeros follows the last member; tarfile accepts a file cut there."""
  tar.fileobj.seek(tar.offset)
  block = tar.fileobj.read(tarfile.BLOCKSIZE)
  return len(block) == tarfile.BLOCKSIZE and not any(block)

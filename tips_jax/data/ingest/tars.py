"""Readers of webdataset tars, and of the same layout as loose files: one sample is the members of
one key.
"""

import json
import os
import tarfile

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.columns import NONE, guess
from tips_jax.data.ingest.reader import Reader, Sample

IMAGES = ('jpg', 'jpeg', 'png', 'webp', 'bmp', 'gif', 'tif', 'tiff', 'ppm')
_PROBE_SAMPLES = 100


class _MembersReader(Reader):
  """Samples whose members are told apart by the ending of their names: KEY.jpg, KEY.txt, KEY.json.

  The columns are the fields of the JSON and the endings of the other members.
  """

  def __init__(self, options):
    super().__init__(options)
    self._columns, self._unclear = None, []  # the errors of samples that do not tell the columns
    if options.columns.label not in ('', NONE):
      raise InputError(
        f'--label_column: got {self.kind}, whose class names are unknown before the last one; '
        f'expected a table or parquet'
      )
    self.annotations = self._named_annotations()

  def _members(self):
    """Yields (key, {ending: bytes})."""
    raise NotImplementedError

  def __iter__(self):
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
      row, problem = members, problem or 'its .json is not a JSON object'
    if 'txt' in row and _text(row['txt']) == row.get('caption'):
      del row['caption']  # img2dataset writes the same text twice
    columns = self._columns or self._guess(row)
    if columns is None:
      return Sample(key, image, '', [], {}, problem)
    alt_text, captions = self._texts([row], columns)
    extra = (
      {'mask': row[columns.mask]} if 'mask' in self.annotations and row.get(columns.mask) else {}
    )
    return Sample(key, image, alt_text, captions, extra, problem)

  def _guess(self, row):
    """The columns, from the first sample that has all the named ones and a text; samples may lack
    some.
    """
    try:
      self._columns = guess(self.options.columns, list(row), need_image=False)
    except InputError as error:
      self._unclear.append(error)
      if len(self._unclear) == _PROBE_SAMPLES:
        raise
    return self._columns


class TarReader(_MembersReader):
  """Webdataset tars, img2dataset's too: consecutive members of one key are a sample. InputError for
  a truncated tar.
  """

  kind = 'webdataset tars'

  def __init__(self, files, options):
    super().__init__(options)
    self._files = files
    self._sizes = [os.path.getsize(f) for f in files]

  def _members(self):
    done = read = 0
    for path, size in zip(self._files, self._sizes):
      for key, members, position in _tar_samples(path, read):
        read += 1
        self.total = round(read * sum(self._sizes) / (done + position))
        yield key, members
      done += size
    self.total = read


class LooseReader(_MembersReader):
  """The same layout as files in folders, as img2dataset writes them with --output_format=files."""

  kind = 'images with text files beside them'

  def __init__(self, path, options):
    super().__init__(options)
    self._groups = {}
    for root, folders, names in os.walk(path):
      folders.sort()
      for name in sorted(names):
        key, end = _split(os.path.relpath(os.path.join(root, name), path))
        self._groups.setdefault(key, {})[end] = os.path.join(root, name)
    self._groups = {
      key: group for key, group in self._groups.items() if not set(group).isdisjoint(IMAGES)
    }
    self.total = len(self._groups)

  def _members(self):
    for key, group in self._groups.items():
      members = {}
      for end, path in group.items():
        with open(path, 'rb') as file:
          members[end] = file.read()
      yield key, members


def has_loose_samples(path):
  """True where the folder, or the first folder in it, holds an image with a .txt or .json of the
  same name.
  """
  for _, (_, folders, names) in zip(range(2), os.walk(path)):
    folders.sort()
    keys = {_split(name) for name in names}
    if any((key, text) in keys for key, end in keys if end in IMAGES for text in ('txt', 'json')):
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
  """(key, {ending: bytes}, position in bytes) by sample."""
  key, members, last, read = None, {}, 'its first member', read_before
  try:
    with tarfile.open(path, 'r:*') as tar:
      for member in tar:
        last = repr(member.name)
        found, end = _split(member.name)
        if not member.isfile() or not found or not end:
          continue
        if found != key:
          if key is not None:
            yield key, members, member.offset
            read += 1
          key, members = found, {}
        data = tar.extractfile(member).read()
        if len(data) != member.size:
          raise tarfile.ReadError('unexpected end of data')
        members[end] = data
      if not _ends_as_tars_do(tar):
        raise tarfile.ReadError('no end-of-archive mark')
  except (tarfile.TarError, EOFError, OSError) as error:
    raise InputError(
      f'{path!r} is truncated or damaged at {last} ({error}), after {read} samples; expected a whole '
      f'tar; copy or write it again, or leave it out'
    ) from error
  if key is not None:
    yield key, members, tar.offset


def _ends_as_tars_do(tar):
  """True where a block of zeros follows the last member: without it, tarfile takes a cut file for a
  whole one.
  """
  tar.fileobj.seek(tar.offset)
  block = tar.fileobj.read(tarfile.BLOCKSIZE)
  return len(block) == tarfile.BLOCKSIZE and not any(block)

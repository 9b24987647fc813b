"""Readers of webdataset tars, and of the same layout as loose files.

One sample is the files of one key: KEY.jpg, KEY.txt, KEY.json.
"""

import itertools
import json
import operator
import os
import typing
from collections.abc import Collection, Iterable, Iterator, Sequence

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.archives import Tar, is_hidden, read_file, reason
from tips_jax.data.ingest.cells import decode_text
from tips_jax.data.ingest.columns import ALT_TEXT_NAMES, CAPTIONS_NAMES, NONE, guess, plain
from tips_jax.data.ingest.reader import IMAGES, Note, Options, Reader, Sample

_TEXTS = ('txt', 'json')
_PROBE_SAMPLES = 100

# The content of a file, or None and the reason.
Content = tuple[bytes | None, str]


class _Row(typing.NamedTuple):
  """A sample before its columns are known."""

  key: str
  image: bytes | None
  fields: dict[str, typing.Any]
  problem: str
  notes: tuple[Note, ...]


class _MembersReader(Reader):
  """Samples whose members differ by the ending of their names.

  The columns are the fields of the JSON and the endings of the other members.
  """

  def __init__(self, options: Options):
    super().__init__(options)
    # The features of a store, with its class names, are fixed before the first sample.
    if options.columns.label not in ('', NONE):
      raise InputError(
        f'--label_column: got {self.kind}, whose class names are unknown before the last one; '
        f'expected a table or parquet'
      )
    self.annotations = self._named_annotations()

  def _members(self) -> Iterator[tuple[str, dict[str, Content]]]:
    """Yields (key, {ending: content})."""
    raise NotImplementedError

  def __iter__(self) -> Iterator[Sample]:
    rows = itertools.starmap(self._row, self._members())
    first = []
    failure = None
    try:
      for row in itertools.islice(rows, _PROBE_SAMPLES):
        first.append(row)
    except InputError as error:
      failure = error
    if first:
      self._guess(first)
    for row in first:
      yield self._sample(row)
    if failure is not None:
      raise failure
    for row in rows:
      yield self._sample(row)

  def _guess(self, rows):
    """The columns, from the fields of all the first samples: some lack one or the other."""
    names = itertools.chain.from_iterable(row.fields for row in rows)
    self._names = list(dict.fromkeys(names))
    self._columns = guess(self.options.columns, self._names, need_image=False)

  def _row(self, key, members):
    mask = self.options.columns.mask
    images = [end for end in IMAGES if end in members and end != mask]
    image = None
    problem = 'no image member'
    notes = []
    if images:
      image, problem = members.pop(images[0])
    for end in images[1:]:
      notes.append(Note('other_image', key, f'its .{end} is left out for its .{images[0]}'))
    fields = {}
    for end, (data, why) in members.items():
      if data is None:
        problem = problem or f'its .{end}: {why}'
      elif end == 'json':
        try:
          fields.update(json.loads(data))
        except (ValueError, TypeError, RecursionError):
          problem = problem or 'its .json is not a JSON object'
      elif end not in images:
        fields[end] = data
    if 'txt' in fields:
      try:
        fields['txt'] = decode_text(fields['txt'])
      except ValueError as error:
        problem = problem or f'its .txt is left out: it is not UTF-8 ({reason(error)})'
        del fields['txt']
    if fields.get('txt') == fields.get('caption'):
      fields.pop('caption', None)  # img2dataset writes the same text twice
    return _Row(key, image, fields, problem, tuple(notes))

  def _sample(self, row):
    columns = self._columns
    alt_text, captions = self._texts([row.fields], columns)
    extra = {}
    if 'mask' in self.annotations and row.fields.get(columns.mask):
      extra['mask'] = row.fields[columns.mask]
    notes = row.notes
    for name in row.fields:
      if name not in self._names and plain(name) in (*ALT_TEXT_NAMES, *CAPTIONS_NAMES):
        notes += (Note('other_field', row.key, f'{name!r} is not among the columns read'),)
    return Sample(row.key, row.image, alt_text, captions, extra, row.problem, notes)


class TarReader(_MembersReader):
  """Webdataset tars, img2dataset's too: consecutive members of one key are a sample.

  Raises InputError for a truncated or damaged tar, and for a key that comes back.
  """

  kind = 'webdataset tars'

  def __init__(self, files: Sequence[str], options: Options):
    super().__init__(options)
    self._files = files
    self._sizes = list(map(os.path.getsize, files))

  def _members(self):
    done = 0  # bytes of the tars before
    read = 0  # samples
    for path, size in zip(self._files, self._sizes):
      for key, members, share in self._of_tar(path, read):
        read += 1
        # The number of samples in the tars to come is extrapolated.
        self.total = round(read * sum(self._sizes) / (done + max(share * size, 1)))
        yield key, members
      done += size
    self.total = read

  def _of_tar(self, path, read_before):
    """Yields (key, {ending: content}, share of the tar that is read) by sample."""
    names = _names_in(path)
    keys = keys_of(names, self.options.columns.mask)
    _check_order(path, names, keys)
    for name in names:
      if name not in keys:
        self.notes.append(Note('other_file', f'{path}: {name}', 'of no sample'))
    total = len(set(map(operator.itemgetter(0), keys.values())))
    key = None
    members = {}
    last = 'its first member'
    read = 0
    try:
      with Tar(path) as tar:
        for member in tar:
          last = repr(member.name)
          if not _is_file(member) or member.name not in keys:
            continue
          member_key, end = keys[member.name]
          if member_key != key and key is not None:
            read += 1
            yield key, members, read / total
            members = {}
          key = member_key
          members[end] = tar.read(member)
    except InputError:
      raise
    except Exception as error:  # a damaged file makes tarfile and its decompressors raise anything
      raise InputError(
        f'{path!r} is truncated or damaged at {last} ({reason(error)}), after '
        f'{read_before + read} samples; expected a complete tar; copy or write it again, or leave '
        f'it out'
      ) from error
    if key is not None:
      yield key, members, 1.0


def _names_in(path):
  """Names of the files in a tar, up to where it is damaged; reading it will say so."""
  names = []
  try:
    with Tar(path) as tar:
      for member in tar:
        if _is_file(member) and not is_hidden(member.name):
          names.append(member.name)
  except Exception:  # as above
    pass
  return names


def _is_file(member):
  return member.isreg() or member.islnk() or member.issym()


def _check_order(path, names, keys):
  """InputError if the members of a key are not together, or one is there twice."""
  ends = {}  # by key
  current = None
  for name in filter(keys.get, names):
    key, end = keys[name]
    if key in ends and (key != current or end in ends[key]):
      raise InputError(
        f'{path!r}: key {key!r} comes back with {name!r}; expected the members of a key together, '
        f'each once; write the tar again, sorted by name (tar --sort=name)'
      )
    ends.setdefault(key, set()).add(end)
    current = key


class LooseReader(_MembersReader):
  """The same layout as files in folders, as img2dataset writes them with --output_format=files."""

  kind = 'images with text files beside them'

  def __init__(self, path: str, options: Options):
    super().__init__(options)
    self._root = path
    names = self._files_below(path)
    keys = keys_of(names, options.columns.mask)
    with_image = set()
    for key, end in keys.values():
      if end in IMAGES:
        with_image.add(key)
    self._groups = {}
    for name in names:
      key, end = keys.get(name, ('', ''))
      group = self._groups.setdefault(key, {}) if key in with_image else None
      if group is None:
        self.notes.append(Note('other_file', name, 'no image of its name'))
      elif end in group:
        self.notes.append(Note('other_file', name, f'another name of {group[end]!r}'))
      else:
        group[end] = name
    self.total = len(self._groups)

  def _files_below(self, path):
    """Relative paths of all files, folder by folder."""
    found = []
    for root, folders, names in os.walk(path):
      folders.sort()  # os.walk descends in this order
      relative = os.path.relpath(root, path)
      for name in folders:
        if os.path.islink(os.path.join(root, name)):
          self.notes.append(Note('other_file', os.path.join(relative, name), 'a link to a folder'))
      for name in sorted(names):
        file = os.path.normpath(os.path.join(relative, name))
        if not is_hidden(file):
          found.append(file)
    return found

  def _members(self):
    for key, group in self._groups.items():
      members = {}
      for end, name in group.items():
        members[end] = read_file(os.path.join(self._root, name))
      yield key, members


def has_loose_samples(path: str) -> bool:
  """Whether the folder, or the first one in it, has an image with a .txt or .json of its name."""
  for _, (_, folders, names) in zip(range(2), os.walk(path)):
    folders.sort()
    if _stems(names, IMAGES) & _stems(names, _TEXTS):
      return True
  return False


def keys_of(names: Collection[str], mask: str = '') -> dict[str, tuple[str, str]]:
  """(key, ending) by name, of the files that belong to a sample.

  Names may hold dots: a key is the name of an image or a text without its last ending, unless it
  extends another key by a word, and has not both: a.seg.png belongs to a.jpg, but a.5.jpg is a
  sample, and so is a.cat.jpg with a.cat.txt. `mask` is the ending of masks, which are no images.
  """
  images = _stems((name for name in names if not mask or not name.endswith('.' + mask)), IMAGES)
  texts = _stems(names, _TEXTS)
  keys = set()
  for stem in sorted(images | texts, key=len):
    parent = _longest(stem, keys)
    extends = parent and stem[len(parent) + 1 :][:1].isalpha()
    if not extends or stem in images and stem in texts:
      keys.add(stem)
  found = {}
  for name in names:
    key = _longest(name, keys)
    if key:
      found[name] = (key, name[len(key) + 1 :].lower())
  return found


def _stems(names: Iterable[str], endings) -> set[str]:
  """The names with one of the endings, without it."""
  stems = set()
  for name in names:
    stem, end = os.path.splitext(name)
    if end[1:].lower() in endings:
      stems.add(stem)
  return stems


def _longest(name: str, keys: Collection[str]) -> str:
  """The longest key that `name` extends by a dot and more; '' if there is none."""
  stem = name
  while True:
    stem, dot, _ = stem.rpartition('.')
    if not dot or '/' in name[len(stem) :]:
      return ''
    if stem in keys:
      return stem

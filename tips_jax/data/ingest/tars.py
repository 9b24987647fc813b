"""Readers of webdataset tars, and of the same layout as loose files.

One sample is the files of one key: KEY.jpg, KEY.txt, KEY.json.
"""

import bisect
import functools
import itertools
import json
import operator
import os
import sys
import tarfile
import typing
from collections.abc import Collection, Iterable, Iterator, Sequence

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.archives import Tar, is_compressed, is_hidden, read_file, reason
from tips_jax.data.ingest.cells import decode_text
from tips_jax.data.ingest.columns import ALT_TEXT_NAMES, CAPTIONS_NAMES, NONE, guess, plain
from tips_jax.data.ingest.reader import IMAGES, Note, Options, Piece, Reader, Sample, ranges

_TEXTS = ('txt', 'json')
_PROBE_SAMPLES = 100
_SIZED_SAMPLES = 100
_END = sys.maxsize  # of a tar: where it is in one that is compressed is not known

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

  def _members(self, piece: Piece) -> Iterator[tuple[str, dict[str, Content]]]:
    """Yields (key, {ending: content})."""
    raise NotImplementedError

  def read(self, piece: Piece) -> Iterator[Sample]:
    self.settle()
    for key, members in self._members(piece):
      yield self.sample(key, members)

  def sample(self, key: str, members: dict[str, Content]) -> Sample:
    """The sample of members by ending; only after `settle`."""
    return self._sample(self._row(key, members))

  def settle(self) -> None:
    """Decides once which columns are read."""
    if self._columns is None:
      self._settle()

  def _settle(self):
    """Takes the columns from the first samples of the whole input, whichever piece is read."""
    members = itertools.chain.from_iterable(map(self._members, self.pieces(sys.maxsize)))
    first = []
    before = len(self.notes)
    try:
      for key, content in itertools.islice(members, _PROBE_SAMPLES):
        first.append(self._row(key, content))
    except InputError:  # who reads it will see
      pass
    del self.notes[before:]
    if first:
      self._guess(first)

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
    notes = row.notes + self._take_regions([row.fields], extra)
    for name in row.fields:
      if name not in self._names and plain(name) in (*ALT_TEXT_NAMES, *CAPTIONS_NAMES):
        notes += (Note('other_field', row.key, f'{name!r} is not among the columns read'),)
    return Sample(row.key, row.image, alt_text, captions, extra, row.problem, notes)


class TarReader(_MembersReader):
  """Webdataset tars, img2dataset's too: consecutive members of one key are a sample.

  A tar that is not compressed is read in ranges of bytes: a sample is of the range in which its
  first member begins. Raises InputError for a truncated or damaged tar, and for a key that comes
  back.
  """

  kind = 'webdataset tars'

  def __init__(self, files: Sequence[str], options: Options):
    super().__init__(options)
    self._sizes = dict(zip(files, map(os.path.getsize, files)))
    self.size = sum(self._sizes.values())

  def pieces(self, size: int) -> Sequence[Piece]:
    pieces = []
    for path, of_file in self._sizes.items():
      count = max(round(of_file / size), 1)
      if count > 1 and is_compressed(path):
        count = 1
      bounds = [of_file * i // count for i in range(count)]
      for first, stop in itertools.pairwise([*bounds, _END]):
        pieces.append(Piece(path, first, stop, of_file // count))
    return pieces

  def count(self, piece: Piece) -> int:
    return len(_in_piece(self.listing(piece.file).samples, piece))

  def listing(self, path: str) -> 'Listing':
    """What is in one of the tars."""
    return _list(path, self.options.columns.mask)

  def _members(self, piece):
    path = piece.file
    listing = self.listing(piece.file)
    for member in _in_piece(listing.strays, piece):
      self.notes.append(Note('other_file', f'{path}: {member.name}', 'of no sample'))
    samples = _in_piece(listing.samples, piece)
    read = bisect.bisect_left(listing.samples, piece.first, key=_offset)
    last = listing.last
    try:
      with Tar(path) as tar:
        content = _in_order(tar) if tar.compressed else functools.partial(_content, tar)
        for sample in samples:
          members = {}
          for member, end in zip(sample.members, sample.ends):
            last = repr(member.name)
            members[end] = content(member)
          yield sample.key, members
          read += 1
        if listing.failure is not None and piece.stop == _END:
          last = listing.last
          raise listing.failure
    except (InputError, MemoryError):  # the latter says nothing of the tar
      raise
    except Exception as error:  # a damaged file makes tarfile and its decompressors raise anything
      raise damaged(path, last, error, read) from error


def damaged(path: str, last: str, error: Exception, samples: int) -> InputError:
  """What is said of a tar that cannot be read behind the member `last`."""
  return InputError(
    f'{path!r} is truncated or damaged at {last} ({reason(error)}), after {samples} samples; '
    f'expected a complete tar; copy or write it again, or leave it out'
  )


class _Member(typing.NamedTuple):
  """A file in a tar."""

  name: str
  offset: int  # of its header
  start: int  # of its data
  size: int
  info: tarfile.TarInfo | None  # of one whose data is not just there: a link, a sparse file


class _TarSample(typing.NamedTuple):
  key: str
  offset: int
  members: list[_Member]
  ends: list[str]


class Listing(typing.NamedTuple):
  """What is in a tar, in its order, up to where it is damaged."""

  samples: list[_TarSample]  # those that are whole
  strays: list[_Member]
  last: str  # the last member that could be read
  failure: Exception | None


# The pieces of a tar are mostly read one after another.
@functools.lru_cache(maxsize=1)
def _list(path: str, mask: str) -> Listing:
  members = []
  last = 'its first member'
  failure = None
  try:
    with Tar(path) as tar:
      for info in tar:
        last = repr(info.name)
        if _is_file(info) and not is_hidden(info.name):
          odd = info if info.issparse() or not info.isreg() else None
          members.append(_Member(info.name, info.offset, info.offset_data, info.size, odd))
  except MemoryError:
    raise
  except Exception as error:  # as above
    failure = error
  names = [member.name for member in members]
  keys = keys_of(names, mask)
  _check_order(path, names, keys)
  samples = []
  strays = []
  for member in members:
    if member.name not in keys:
      strays.append(member)
      continue
    key, end = keys[member.name]
    if not samples or samples[-1].key != key:
      samples.append(_TarSample(key, member.offset, [], []))
    samples[-1].members.append(member)
    samples[-1].ends.append(end)
  if failure is not None:
    samples = samples[:-1]
  return Listing(samples, strays, last, failure)


_offset = operator.attrgetter('offset')


def _in_piece(items, piece):
  """The samples or members that begin in a range of bytes."""
  first = bisect.bisect_left(items, piece.first, key=_offset)
  return items[first : bisect.bisect_left(items, piece.stop, key=_offset)]


def _content(tar, member):
  if member.info is not None:
    return tar.read(member.info)
  return tar.read_at(member.start, member.size)


def _in_order(tar):
  """A function that reads members of a compressed tar in their order."""
  infos = iter(tar)

  def content(member):
    return tar.read(next(info for info in infos if info.offset == member.offset))

  return content


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

  @functools.cached_property
  def size(self) -> int:
    """By some of the files: asking for all takes long on a network's disk."""
    groups = list(self._groups.values())[:: max(len(self._groups) // _SIZED_SAMPLES, 1)]
    sizes = []
    for group in groups:
      for name in group.values():
        path = os.path.join(self._root, name)
        if os.path.isfile(path):
          sizes.append(os.path.getsize(path))
    return sum(sizes) * len(self._groups) // max(len(groups), 1)

  def pieces(self, size: int) -> Sequence[Piece]:
    return ranges(len(self._groups), size, self.size)

  def _members(self, piece):
    for key, group in itertools.islice(self._groups.items(), piece.first, piece.stop):
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

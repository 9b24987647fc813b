"""Random access to webdataset tars, by an index of where the members of each sample are."""

import fcntl
import functools
import json
import os
import pathlib
import shutil
import tarfile
import typing
import uuid
from collections.abc import Sequence

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.core.log import Progress
from tips_jax.data.ingest import samples
from tips_jax.data.ingest.archives import MAX_BYTES, is_compressed, too_large
from tips_jax.data.ingest.cells import brief
from tips_jax.data.ingest.reader import IMAGES
from tips_jax.data.ingest.tars import TarReader, damaged
from tips_jax.data.reading.records import Example, of_sample
from tips_jax.data.reading.shards import allow_open_files, in_threads

_FORMAT = 1
_META = 'index.json'
_MAX_LISTED = 10_000  # of what is left out, by kind
_HEADER = tarfile.BLOCKSIZE  # before a member
_SIZE_FIELD = slice(124, 136)  # of it
_THREADS = 4  # that list tars: on a disk across a network each waits for most of its time
_GAP = 2**16  # bytes between members that are read along with them, rather than in two requests
_ODD = -1  # in place of where the data of a link or a sparse file is

Files = Sequence[Sequence[typing.Any]]  # (name, bytes) of each


class Tars:
  """The samples of tars one after another. Threads may share it; it can be pickled.

  Each is one request for the bytes from its first member to its last, and neighbors are one
  together.
  """

  groups = None  # any order of records is as fast as another

  def __init__(self, reader: TarReader, index: pathlib.Path):
    self._reader = reader
    self._paths = reader.files
    self._index = index
    meta = json.loads((index / _META).read_text())
    self._endings = meta['endings']
    self._length = meta['samples']
    self._arrays = {}
    self._files = {}

  def __getstate__(self):
    return {**self.__dict__, '_arrays': {}, '_files': {}}

  def __len__(self) -> int:
    return self._length

  def open(self) -> None:
    """Opens all tars that are not open yet."""
    closed = set(range(len(self._paths))) - set(self._files)
    if closed:
      allow_open_files(f'{self._paths[0]!r} and those beside it', len(closed))
      in_threads(self._file, closed)

  def read(self, first: int, stop: int) -> list[Example]:
    """The records first to stop - 1; ValueError for one without a readable image."""
    files = self._array('file')
    examples = []
    while first < stop:
      file = int(files[first])
      end = min(stop, first + int(np.searchsorted(files[first:stop], file, 'right')))
      examples += self._read_of(file, first, end)
      first = end
    return examples

  def _read_of(self, file, first, stop):
    """The records first to stop - 1, which are in one tar."""
    starts = self._array('members')[first : stop + 1].tolist()
    members = slice(starts[0], starts[-1])
    places = self._array('place')[members].tolist()
    sizes = self._array('size')[members].tolist()
    contents = _contents(self._file(file), places, sizes)
    endings = [self._endings[i] for i in self._array('ending')[members].tolist()]
    key_starts = self._array('key_starts')[first : stop + 1].tolist()
    keys = self._array('keys')[key_starts[0] : key_starts[-1]].tobytes()
    examples = []
    for i in range(stop - first):
      key = keys[key_starts[i] - key_starts[0] : key_starts[i + 1] - key_starts[0]].decode()
      own = slice(starts[i] - starts[0], starts[i + 1] - starts[0])
      sample = self._reader.sample(key, dict(zip(endings[own], contents[own])))
      examples.append(of_sample(sample, self._reader))
    return examples

  def _file(self, number):
    file = self._files.get(number)
    if file is None:
      file = open(self._paths[number], 'rb', buffering=0)
      # Two threads may open it at once; one is closed with its last reference.
      self._files[number] = file
    return file

  def _array(self, name):
    array = self._arrays.get(name)
    if array is None:
      # Mapped: an index may be larger than the memory, and processes share what they read of it.
      # As plain arrays: each slice of a memmap takes microseconds.
      array = np.asarray(np.load(self._index / f'{name}.npy', mmap_mode='r'))
      self._arrays[name] = array
    return array


def _contents(file, places, sizes):
  """(bytes or None, reason) of each member."""
  regular = [i for i, place in enumerate(places) if place != _ODD and sizes[i] <= MAX_BYTES]
  contents = [(None, 'a link or a sparse file') for _ in places]
  for i, size in enumerate(sizes):
    if size > MAX_BYTES:
      contents[i] = (None, too_large(size))
  runs = []
  end = 0
  for i in regular:
    if not runs or not 0 <= places[i] - end <= _GAP:
      runs.append([])
    runs[-1].append(i)
    end = places[i] + sizes[i]
  for run in runs:
    start = places[run[0]] - _HEADER
    data = _pread(file, places[run[-1]] + sizes[run[-1]] - start, start)
    for i in run:
      at = places[i] - start
      content = data[at : at + sizes[i]]
      if len(content) < sizes[i] or not _is_of_size(data[at - _HEADER : at], sizes[i]):
        raise ValueError('the tar has changed since its index was made; remove the index')
      contents[i] = (content, '')
  return contents


def _is_of_size(header, size):
  """Whether the header of a member says so: a tar may have changed, and be as long as before."""
  try:
    return tarfile.nti(header[_SIZE_FIELD]) == size
  except tarfile.HeaderError:
    return False


def _pread(file, size, start):
  """Bytes of a file; fewer at its end. One call may return less than it is asked for."""
  data = os.pread(file.fileno(), size, start)
  while len(data) < size:
    more = os.pread(file.fileno(), size - len(data), start + len(data))
    if not more:
      break
    data += more
  return data


# --- the index ----------------------------------------------------------------------------------


def tar_index(
  reader: TarReader, folder: pathlib.Path, files: Files, path: str, stream: typing.TextIO
) -> pathlib.Path:
  """The folder of the index of tars, which is made where there is none, or an old one.

  The reader then reads the columns that were settled with it. Raises InputError for a tar that is
  damaged, compressed, or without samples.
  """
  folder.parent.mkdir(parents=True, exist_ok=True)
  with open(folder.with_name(f'{folder.name}.lock'), 'a') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes here one makes it
    except OSError:  # a file system without locks: each makes it, and the first is taken
      pass
    meta = _read_meta(folder)
    if meta is not None and meta['files'] != [list(file) for file in files]:
      stream.write(
        f'data.store: {path!r} has changed since its index was made ({_change(meta, files)}); it '
        f'is made again\n'
      )
      shutil.rmtree(folder)
      meta = None
    if meta is None:
      meta = _make(reader, folder, files, path, stream)
  reader.settle_as(meta['settled'])
  return folder


def _read_meta(folder):
  """What an index says of itself; None where there is none that this version reads."""
  try:
    meta = json.loads((folder / _META).read_text())
    return meta if meta['format'] == _FORMAT else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _change(meta, files):
  before = dict(map(tuple, meta['files']))
  now = dict(map(tuple, files))
  changed = [name for name in now if before.get(name) != now[name]]
  changed += [name for name in before if name not in now]
  names = changed or [name for name, _ in files]  # the order alone
  first = names[0]
  sizes = [f'{kept[first]:,} bytes' if first in kept else 'absent' for kept in (before, now)]
  return f'{len(names)} of {len(now)} files, the first is {first!r}: {sizes[0]}, now {sizes[1]}'


def _make(reader, folder, files, path, stream):
  reader.settle()
  index = _Index()
  progress = Progress(sum(size for _, size in files), label='bytes indexed', stream=stream)
  done = 0
  listings = samples.in_threads(functools.partial(_list, reader), reader.files, _THREADS)
  for number, ((file, listing), (_, size)) in enumerate(zip(listings, files)):
    progress.update(done)
    index.add(number, file, listing)
    done += size
  progress.update(done)
  progress.close()
  if not index.keys:
    raise InputError(f'data.store: got {path!r}, no sample of which has an image; expected some')
  meta = {
    'format': _FORMAT,
    'files': list(map(list, files)),
    'settled': reader.settled(),
    'samples': len(index.keys),
    'endings': list(index.endings),
    'left_out': index.left_out,
    'counts': index.counts,
  }
  temporary = folder.with_name(f'{folder.name}.{uuid.uuid4().hex[:12]}')
  temporary.mkdir()
  for name, array in index.arrays().items():
    np.save(temporary / f'{name}.npy', array)
  (temporary / _META).write_text(json.dumps(meta, indent=1))
  try:
    os.replace(temporary, folder)
  except OSError:  # another process was first
    shutil.rmtree(temporary)
    if _read_meta(folder) is None:
      raise
  stream.write(
    f'data.store: index of {path!r}: {meta["samples"]:,} samples in {len(files):,} tars'
    f'{_said_left_out(index, folder)}\n'
  )
  return meta


def _list(reader, file):
  """What is in a tar; InputError for one that cannot be read in place."""
  if is_compressed(file):
    raise InputError(
      f'{file!r} is compressed, so that it can only be read from its beginning; expected a tar '
      f'without compression (gunzip), or a store made of it with python -m tips_jax.prepare'
    )
  listing = reader.listing(file)
  if listing.failure is not None:
    raise damaged(file, listing.last, listing.failure, len(listing.samples))
  return listing


def _said_left_out(index, folder):
  if not index.counts:
    return ''
  counts = ', '.join(f'{count:,} {kind}' for kind, count in index.counts.items())
  first = {kind: names[0] for kind, names in index.left_out.items()}
  return f'; left out: {counts}, such as {brief(first)}; {folder / _META} lists them'


class _Index:
  """The arrays of an index while it grows."""

  def __init__(self):
    self.keys = []
    self.endings = {}
    self.counts = {}
    self.left_out = {}
    self._file = []
    self._members = [0]
    self._place = []
    self._size = []
    self._ending = []

  def add(self, number, file, listing):
    """Adds what is in a tar, the one of this number."""
    for stray in listing.strays:
      self._leave_out('files of no sample', f'{file}: {stray.name}')
    for sample in listing.samples:
      if not set(sample.ends) & set(IMAGES):
        self._leave_out('samples without an image', f'{file}: {sample.key}')
        continue
      self.keys.append(sample.key.encode('utf-8', 'replace'))
      self._file.append(number)
      for member, end in zip(sample.members, sample.ends):
        self._place.append(_ODD if member.info is not None else member.start)
        self._size.append(member.size)
        self._ending.append(self.endings.setdefault(end, len(self.endings)))
      self._members.append(len(self._place))

  def _leave_out(self, kind, name):
    self.counts[kind] = self.counts.get(kind, 0) + 1
    names = self.left_out.setdefault(kind, [])
    if len(names) < _MAX_LISTED:
      names.append(name)

  def arrays(self):
    """By name: of each sample its tar, its first member and its key; of each member the rest."""
    lengths = [len(key) for key in self.keys]
    return {
      'file': np.array(self._file, np.int32),
      'members': np.array(self._members, np.int64),
      'key_starts': np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
      'keys': np.frombuffer(b''.join(self.keys), np.uint8),
      'place': np.array(self._place, np.int64),
      'size': np.array(self._size, np.int64),
      'ending': np.array(self._ending, np.int32),
    }

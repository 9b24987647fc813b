"""Reading files, zips and tars that may be damaged, or made to fill the memory.

Nothing is read before its size is known to be acceptable.
"""

import bz2
import gzip
import io
import lzma
import os
import pathlib
import tarfile
import typing
import zipfile

from tips_jax.core.errors import InputError

MAX_BYTES = 2**28  # of one file: an image, a text, or a table in a zip
_MAX_HEADER = 2**20  # of a header of a tar: names and attributes
# Photos hardly shrink, and texts 10 times; an archive beyond both bounds is made to fill a disk.
_MAX_RATIO = 100
_MAX_EXPANDED = 2**30
_COMPRESSIONS = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zXZ\0': lzma.open}

Path = str | pathlib.Path


def is_hidden(name: str) -> bool:
  """Whether a path is what a Mac or a version control system puts beside the data."""
  parts = name.replace('\\', '/').split('/')
  return any(part == '__MACOSX' or part.startswith('.') and part.strip('.') for part in parts)


def reason(error: Exception) -> str:
  """What a library's error says, on one line of at most 200 characters."""
  return ' '.join(str(error).split())[:200] or type(error).__name__


def read_file(path: Path) -> tuple[bytes | None, str]:
  """(bytes, '') of a file, or (None, why it cannot be read)."""
  try:
    size = os.path.getsize(path)
    if size > MAX_BYTES:
      return None, too_large(size)
    return pathlib.Path(path).read_bytes(), ''
  except OSError as error:
    return None, error.strerror or reason(error)


def too_large(size: int, most: int = MAX_BYTES) -> str:
  """The reason for a file or a cell that is not read for its size."""
  return f'{size:,} bytes; expected at most {most:,}'


def open_zip(path: Path) -> zipfile.ZipFile:
  """An opened zip; InputError if it is none."""
  try:
    return zipfile.ZipFile(path)
  except Exception as error:  # a damaged directory makes zipfile raise nearly anything
    raise InputError(
      f'{str(path)!r} is not a complete zip ({reason(error)}); expected a zip; copy it again'
    ) from error


def read_member(archive: zipfile.ZipFile, name: str) -> tuple[bytes | None, str]:
  """(bytes, '') of a member of a zip, or (None, why it cannot be read)."""
  size = archive.getinfo(name).file_size
  if size > MAX_BYTES:
    return None, too_large(size)
  try:
    return archive.read(name), ''
  except MemoryError:  # says nothing of the member
    raise
  except Exception as error:  # damaged, encrypted, or compressed in an unknown way
    return None, reason(error)


class Tar:
  """A tar, compressed or not; a context manager. It is read from its beginning to its end, but for
  `read_at`.

  Raises tarfile.ReadError or what the decompressor raises.
  """

  def __init__(self, path: Path):
    opener = _opener(path)
    self._file = _Bounded(opener(path, 'rb'), _MAX_EXPANDED + _MAX_RATIO * os.path.getsize(path))
    self.compressed = opener is not open
    try:
      self._tar = tarfile.open(fileobj=typing.cast(typing.BinaryIO, self._file), mode='r:')
    except BaseException:
      self._file.close()
      raise

  def __enter__(self) -> 'Tar':
    return self

  def __exit__(self, *error: object) -> None:
    self._file.close()

  def __iter__(self) -> typing.Iterator[tarfile.TarInfo]:
    """The members in order; ReadError where the tar ends too early."""
    members = iter(self._tar)
    while True:
      self._file.at_once = _MAX_HEADER
      member = next(members, None)
      self._file.at_once = MAX_BYTES
      if member is None:
        break
      if self.compressed and member.size > MAX_BYTES:
        raise tarfile.ReadError(f'a member of {too_large(member.size)}')
      yield member
    self._read_end()

  def read(self, member: tarfile.TarInfo) -> tuple[bytes | None, str]:
    """(bytes, '') of a member or of the one that it links to, or (None, why it is not read)."""
    if not 0 <= member.size <= MAX_BYTES:
      return None, too_large(member.size)
    self._file.at_once = MAX_BYTES
    try:
      file = self._tar.extractfile(member)
      data = file.read(MAX_BYTES)
      if file.read(1):  # a link has no size of its own
        return None, too_large(MAX_BYTES + 1)
    # A link whose target is not in the tar, or leads back to itself.
    except (KeyError, AttributeError, RecursionError):
      return None, 'a link without a target in the tar'
    if member.isreg() and len(data) != member.size:
      # tarfile reads past the end of a cut file without an error.
      raise tarfile.ReadError('unexpected end of data')
    return data, ''

  def read_at(self, start: int, size: int) -> tuple[bytes | None, str]:
    """The same of a regular member of a tar that is not compressed, by where its data is."""
    if not 0 <= size <= MAX_BYTES:
      return None, too_large(size)
    self._file.at_once = MAX_BYTES
    self._file.seek(start)
    data = self._file.read(size)
    if len(data) != size:
      raise tarfile.ReadError('unexpected end of data')
    return data, ''

  def _read_end(self):
    """Blocks of zeros follow the last member; tarfile accepts a file that is cut there. The check
    sum of a compressed tar is behind them.
    """
    self._file.seek(self._tar.offset)
    block = self._file.read(tarfile.BLOCKSIZE)
    if len(block) != tarfile.BLOCKSIZE or any(block):
      raise tarfile.ReadError('no end-of-archive mark')
    while self.compressed and self._file.read(2**20):
      pass


def is_compressed(path: Path) -> bool:
  """Whether a tar is compressed, so that it can only be read from its beginning."""
  return _opener(path) is not open


def _opener(path):
  with open(path, 'rb') as file:
    start = file.read(6)
  for mark, compression in _COMPRESSIONS.items():
    if start.startswith(mark):
      return compression
  return open


class _Bounded:
  """A file that refuses to read, at once or in all, more than its bounds."""

  def __init__(self, file: typing.BinaryIO, most: int):
    self._file = file
    self._most = most
    self.at_once = _MAX_HEADER
    self.tell = file.tell
    self.close = file.close

  def read(self, size: int = -1) -> bytes:
    # Headers too are read at once, and say themselves how long they are.
    if not 0 <= size <= self.at_once:
      raise tarfile.ReadError(f'a record of {size:,} bytes')
    self._check(self._file.tell())
    return self._file.read(size)

  def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
    self._check(position)
    return self._file.seek(position, whence)

  def _check(self, position):
    if not 0 <= position <= self._most:
      raise tarfile.ReadError(f'it declares or expands to more than {self._most:,} bytes')

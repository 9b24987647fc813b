"""Checksums of a checkpoint's files, in a file beside them: bits that flipped, files that were cut
short or are gone are known before anything is read.

Orbax's arrays have none, and its decoder takes most flipped bits for numbers. CRC32 (ISO 3309) as
faults are met here, not attacks; one core reads about 1 GB/s.
"""

import concurrent.futures
import functools
import json
import os
import pathlib
import zlib

from tips_jax.core import files

FILE = 'digests.json'
_CHUNK = 1 << 22  # bytes read at once
_THREADS = 8  # zlib computes without Python's lock


def compute(path: pathlib.Path) -> dict[str, list[int]]:
  """{name: [bytes, CRC32]} of the files of a complete checkpoint."""
  names = []
  for file in path.rglob('*'):
    if file.is_file() and file != path / FILE:
      names.append(file.relative_to(path).as_posix())
  return dict(zip(names, _digests(path, names)))


def write(path: pathlib.Path, digests: dict[str, list[int]] | None = None) -> None:
  """Puts the file of the digests, as of `compute`, into a checkpoint."""
  if digests is None:
    digests = compute(path)
  files.write(path / FILE, json.dumps({'step': int(path.name), 'files': digests}, indent=1))


def problem(path: pathlib.Path, within: str = '') -> str:
  """What is wrong with a checkpoint, in words; '' where nothing is, or where it has no digests: a
  kill came before them.

  within: only of this file or folder of it.
  """
  try:
    saved = json.loads((path / FILE).read_text())
    step = saved['step']
    digests = saved['files'].items()
  except FileNotFoundError:
    return ''
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    return f'{FILE} cannot be read ({type(error).__name__})'
  if str(step) != path.name:
    return f'it is a copy of step {step}'
  wanted = {}
  for name, digest in digests:
    if name == within or name.startswith(within and f'{within}/'):
      wanted[name] = digest
  try:
    found = _digests(path, wanted)
  except OSError as error:
    return f'{os.path.relpath(error.filename or path, path)}: {error.strerror}'
  for (name, digest), now in zip(wanted.items(), found):
    if digest != now:
      return f'{name} is not as it was written'
  return ''


def _digests(path, names):
  """[[bytes, CRC32]] of files of a folder."""
  with concurrent.futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
    return list(pool.map(functools.partial(_digest, path), names))


def _digest(path, name):
  size = 0
  crc = 0
  with open(path / name, 'rb') as file:
    while chunk := file.read(_CHUNK):
      size += len(chunk)
      crc = zlib.crc32(chunk, crc)
  return [size, crc]

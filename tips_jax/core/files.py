"""Files that are written whole or not at all, and where they can be."""

import contextlib
import os
import pathlib
import tempfile
import uuid
from collections.abc import Iterator
from typing import BinaryIO, Callable

from tips_jax.core import buckets, errors
from tips_jax.core.errors import InputError

_PROBE_BYTES = 4096  # of a file that shows whether a disk has room


def require_writable(path: str | os.PathLike, what: str) -> None:
  """InputError, which names the flag or field `what`, where no file or folder can be made at a
  path, here or in a bucket. Makes nothing that stays.
  """
  if buckets.is_bucket(path):
    buckets.require_writable(os.fspath(path), what)
    return
  try:
    folder = _nearest_folder(pathlib.Path(path).absolute())
    # Tried rather than asked: to root the system says that all is permitted, also in /proc.
    with tempfile.TemporaryFile(dir=folder) as file:
      file.write(bytes(_PROBE_BYTES))
  except (OSError, ValueError) as error:  # ValueError: a NUL
    reason = getattr(error, 'strerror', None) or str(error)
    raise InputError(
      f'{what}: got {os.fspath(path)!r}; expected a path in a writable folder ({reason})'
    ) from None


def _nearest_folder(path):
  """The folder that a path is, or the first above it that exists."""
  while True:
    try:
      os.lstat(path)
    except FileNotFoundError:
      path = path.parent
      continue
    os.listdir(path)  # an error for a file on the way, and for a link that leads nowhere
    return path


def check_name(name: str, what: str) -> str:
  """A name that may become that of a file; InputError for a path, and for what no disk can hold."""
  if name in ('', '.', '..') or not name.isprintable() or {*'/\\'} & {*name} or len(name) > 128:
    raise InputError(f'{what}: got {name!r}; expected a name: no path, at most 128 characters')
  return name


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
  """Within it an error of a disk is one line that begins with `what`: '--output: cannot write X'.

  InputError where somebody has to act (a full disk), PassingError where another try may do. Errors
  that are not of a disk pass through.
  """
  try:
    yield
  except InputError:
    raise
  except OSError as error:
    kind = InputError
    if errors.may_pass(error):
      kind = errors.PassingError
    raise kind(f'{what} ({error.strerror or error})') from error
  except Exception as error:
    number = errors.disk_error(error)
    # Libraries wrap errors of the system. Of theirs only those count that are surely of a disk.
    if number is None or errors.may_pass(error):
      raise
    raise InputError(f'{what} ({os.strerror(number)})') from error


def write(
  path: str | os.PathLike,
  content: str | bytes | Callable[[BinaryIO], object],
  *,
  replace: bool = True,
) -> None:
  """Writes text (UTF-8), bytes, or what a function writes into the open binary file.

  A reader sees the old file or the new one, never a part; after an error only the old one is left.
  Errors of the disk are those of `writing`. replace=False: FileExistsError where a file of that
  name is or appears meanwhile.
  """
  path = pathlib.Path(path)
  # In the same folder, as a rename is atomic only within one file system. Its name is new for each
  # call: processes on several hosts may write the same file.
  temporary = path.with_name(f'.{path.name}-{uuid.uuid4().hex[:12]}')
  try:
    with writing(f'cannot write {os.fspath(path)!r}'):
      _fill(temporary, content)
      if replace:
        os.replace(temporary, path)
    if not replace:
      _move_to_new(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _fill(path, content):
  with open(path, 'xb') as file:
    if callable(content):
      content(file)
    elif isinstance(content, str):
      file.write(content.encode())
    else:
      file.write(content)


def _move_to_new(temporary, path):
  try:
    # Unlike a rename, a link never replaces a file that has appeared in the meantime.
    os.link(temporary, path)
  except FileExistsError:
    raise
  except OSError:  # a file system without links
    if os.path.lexists(path):
      raise FileExistsError(str(path)) from None
    os.rename(temporary, path)

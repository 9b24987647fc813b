"""Files that are written whole or not at all."""

import os
import pathlib
import uuid
from typing import BinaryIO, Callable


def write(
  path: str | os.PathLike,
  content: str | bytes | Callable[[BinaryIO], object],
  *,
  replace: bool = True,
) -> None:
  """Writes text (UTF-8), bytes, or what a function writes into the open binary file.

  A reader sees the old file or the new one, never a part; after an error only the old one is left.
  replace=False: FileExistsError where a file of that name is or appears meanwhile.
  """
  path = pathlib.Path(path)
  # In the same folder, as a rename is atomic only within one file system. Its name is new for each
  # call: processes on several hosts may write the same file.
  temporary = path.with_name(f'.{path.name}-{uuid.uuid4().hex[:12]}')
  try:
    with open(temporary, 'xb') as file:
      if callable(content):
        content(file)
      elif isinstance(content, str):
        file.write(content.encode())
      else:
        file.write(content)
    if replace:
      os.replace(temporary, path)
    else:
      _move_to_new(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


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

"""The image files that a table names, in folders and zips."""

import functools
import os
import posixpath
import re
import zipfile
from collections.abc import Sequence

from tips_jax.data.ingest.archives import Path, is_hidden, open_zip, read_file, read_member

# A file on disk, or a member of a zip.
Place = str | tuple[zipfile.ZipFile, str]


class ImageFiles:
  """Files by name in folders and zips.

  Names are read in one way, the same for all: as paths from where the table is; else as the ends of
  paths anywhere; else, for tables from another machine, without the folders that all names begin
  with. Otherwise an absent cats/1.jpg would be found as dogs/1.jpg.
  """

  def __init__(self, folders: Sequence[Path], zips: Sequence[Path], *, table_folder: str = ''):
    self._folders = folders
    self._zips = zips
    # Of zips, which name their members from their own top.
    self._roots = dict.fromkeys(('', 'images', table_folder, f'{table_folder}/images'.strip('/')))
    self._members = {}  # path -> places of it
    for path in zips:
      archive = open_zip(path)
      for name in archive.namelist():
        if not is_hidden(name) and not name.endswith('/'):
          self._members.setdefault(_plain(name), []).append((archive, name))
    self._prefix = ''
    self._anywhere = False

  def __str__(self):
    return ' or '.join(repr(str(path)) for path in (*self._folders, *self._zips))

  def settle(self, names: Sequence[str]) -> bool:
    """Decides by some names how all are read; False if none of them is found in any way."""
    plain = list(map(_plain, filter(None, names)))
    shared = _shared_folders(plain)
    absolute = shared[:1] == [''] or re.fullmatch('[A-Za-z]:', ''.join(shared[:1]))
    for dropped in range(len(shared) + 1):
      self._prefix = ''.join(folder + '/' for folder in shared[:dropped])
      # A folder that is dropped may not be replaced by another one.
      for self._anywhere in (False, True) if absolute or not dropped else (False,):
        if any(map(self._places, names)):
          return True
    return False

  def read(self, name: str) -> tuple[bytes | None, str]:
    """(bytes, '') of a file, or (None, the reason)."""
    places = self._places(name)
    if not places:
      return None, 'no such file'
    if len(places) > 1:
      return None, f'{len(places)} files of this name'
    (place,) = places
    if isinstance(place, str):
      return read_file(place)
    return read_member(*place)

  def _places(self, name) -> list[Place]:
    """Where files of a name are."""
    if not name:
      return []
    short = _plain(name).removeprefix(self._prefix)
    return self._at(name) or self._at(short) or self._anywhere and self._below(short) or []

  def _at(self, name):
    """Files at a path from one of the roots, a folder before a zip."""
    for folder in self._folders:
      for root in ('', 'images'):
        path = os.path.join(folder, root, name)
        if os.path.isfile(path):
          return [path]
    for root in self._roots:
      member = posixpath.normpath(posixpath.join(root, name))
      if member in self._members:
        return self._members[member]
    return []

  def _below(self, name):
    """Files whose path ends with a name."""
    places = []
    for path, place in self._by_base.get(posixpath.basename(name), ()):
      if f'/{path}'.endswith(f'/{name}'):
        places.append(place)
    return places

  @functools.cached_property
  def _by_base(self):
    """Base name -> (path, place) of the files that have it."""
    files = {}
    for path, places in self._members.items():
      for place in places:
        files.setdefault(posixpath.basename(path), []).append((path, place))
    for top in self._folders:
      for folder, _, names in os.walk(top):
        for name in names:
          path = os.path.join(folder, name)
          files.setdefault(name, []).append((os.path.relpath(path, top), path))
    return files


def _plain(name):
  """A name as a path with slashes, as other machines write it."""
  return posixpath.normpath(name.replace('\\', '/').removeprefix('file://'))


def _shared_folders(names):
  """The leading folders that all names have."""
  folders = [name.split('/')[:-1] for name in names]
  return os.path.commonprefix(folders)

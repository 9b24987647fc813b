"""Paths in buckets, such as gs://BUCKET/FOLDER: the one place that knows them.

What is read is copied to this machine first (`local`); what is written is written here and goes up
when it is whole (`output`, `upload`). So all that reads and writes files (array_record, orbax,
SentencePiece, safetensors) knows files alone, and is the same for every kind of bucket. fsspec
transfers; it is imported where a path asks for it, as it is an extra.

An object appears in a bucket whole or not at all, and is there for all who look from then on. A
folder is whole when its last object, which proves the others (`store.json`, `tips_jax.json`,
`digests.json`), is there.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tips_jax.core import errors
from tips_jax.core.errors import InputError, PassingError
from tips_jax.core.strict import did_you_mean

_URL = re.compile(r'([A-Za-z][A-Za-z0-9+.-]*)://')
# Scheme -> the package that fsspec needs for it. memory:// ends with the process.
_PACKAGES = {
  'gs': 'gcsfs',
  's3': 's3fs',
  'az': 'adlfs',
  'abfs': 'adlfs',
  'oss': 'ossfs',
  'memory': 'fsspec',
}
_EXTRA = ('gcsfs', 's3fs', 'fsspec')
# Whose errors are of the way to a bucket, beside those of the system.
_CLIENTS = {
  'aiohttp',
  'azure',
  'botocore',
  'fsspec',
  'gcsfs',
  'google',
  'requests',
  's3fs',
}
_MARKS = ('ETag', 'etag', 'generation', 'md5Hash', 'content_md5', 'created')
_THREADS = 16  # requests under way at once: each waits for the network
_SPARE = 2**30  # bytes of a disk that copies leave free
_TELL = 64 * 2**20  # bytes from which on a copy is worth a line


def is_bucket(path: str | os.PathLike) -> bool:
  """Whether a path is a URL, of whatever scheme: it must never become a folder named 'gs:'."""
  return bool(_URL.match(os.fspath(path)))


def check(path: str | os.PathLike, what: str) -> None:
  """InputError, which names the flag or field `what`, for a URL that cannot be used here: its
  scheme is unknown, its package is not installed, or it names no bucket.
  """
  path = os.fspath(path)
  match = _URL.match(path)
  if not match:
    return
  scheme = match[1]
  if scheme not in _PACKAGES:
    known = [f'{name}://' for name in _PACKAGES]
    raise InputError(
      f'{what}: got {path!r}; expected a path on this machine, or in a bucket: '
      f'{", ".join(known)}{did_you_mean(f"{scheme.lower()}://", known)}'
    )
  package = _PACKAGES[scheme]
  if importlib.util.find_spec(package) is None:
    extra = package
    if package in _EXTRA:
      extra = "-e '.[buckets]'"
    raise InputError(
      f'{what}: got {path!r}, for which {package} is not installed; expected it: '
      f'pip install {extra}'
    )
  names = path[match.end() :].rstrip('/').split('/')
  if not path.isprintable() or {'', '.', '..'} & set(names):
    raise InputError(
      f'{what}: got {path!r}; expected {scheme}://BUCKET/FOLDER, no empty name, . or ..'
    )


def require_local(path: str | os.PathLike, what: str) -> None:
  """InputError, which names the flag or field `what`, for a URL where only files will do."""
  path = os.fspath(path)
  if is_bucket(path):
    raise InputError(
      f'{what}: got {path!r}; expected a path on this machine: a bucket is mounted first (gcsfuse)'
    )


def require_writable(path: str, what: str) -> None:
  """InputError, which names the flag or field `what`, where nothing can be written at a path in a
  bucket. Makes nothing that stays.
  """
  check(path, what)
  # Tried rather than asked: what an account may do is not to be had from all kinds of buckets.
  probe = join(path, f'.writable-{uuid.uuid4().hex[:12]}')
  with _one_error(f'{what}: cannot write {path!r}'):
    _system(path).pipe_file(probe, b'')
    _system(path).rm_file(probe)


def join(path: str, name: str) -> str:
  """The path of a name below a path; of '' the path itself."""
  return f'{path.rstrip("/")}/{name}'.rstrip('/')


def cache() -> pathlib.Path:
  """The folder on this machine for copies: $TIPS_JAX_CACHE, or tips_jax in the user's cache."""
  own = os.environ.get('TIPS_JAX_CACHE')
  if own:
    return pathlib.Path(own).absolute()
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'tips_jax'


def mirror(path: str, kind: str) -> pathlib.Path:
  """The folder or file on this machine that stands for a path in a bucket, below `cache()/kind`."""
  scheme, _, rest = path.partition('://')
  return cache() / kind / scheme / rest.rstrip('/')


@contextlib.contextmanager
def _one_error(what: str) -> Iterator[None]:
  """Within it an error of a bucket is one line that begins with `what`: PassingError where another
  try may do, InputError where somebody has to act.
  """
  try:
    yield
  except InputError:
    raise
  except Exception as error:
    if not _of_a_bucket(error):
      raise
    lines = str(error).strip().splitlines() or ['']
    kind = PassingError
    if _lasts(error):
      kind = InputError
    raise kind(f'{what} ({type(error).__name__}: {lines[0][:300]})') from error


def _of_a_bucket(error):
  return isinstance(error, OSError) or type(error).__module__.split('.')[0] in _CLIENTS


def _lasts(error):
  """Whether somebody has to act: a bucket or a right that is missing, a full disk."""
  lasting = (FileNotFoundError, PermissionError)
  while error is not None:
    name = type(error).__name__
    if isinstance(error, lasting) or 'Credentials' in name or 'NoSuchBucket' in str(error):
      return True
    if isinstance(error, OSError) and error.errno and not errors.may_pass(error):
      return True
    error = error.__cause__
  return False


def _system(path) -> Any:
  """fsspec's file system of a path."""
  import fsspec

  # What others write must be seen at once.
  return fsspec.filesystem(_URL.match(path)[1], use_listings_cache=False)


# --- looking ------------------------------------------------------------------------------------


def names(path: str, what: str) -> dict[str, tuple[int, str]]:
  """{name below the path: (bytes, mark)} of all objects; {'': ...} where the path is one itself.

  The mark changes with the content. InputError and PassingError begin with `what`.
  """
  check(path, what)
  with _one_error(f'{what}: cannot read {path!r}'):
    system = _system(path)
    system.invalidate_cache()
    try:
      found = system.find(path, detail=True)
    except FileNotFoundError:
      return {}
  prefix = system._strip_protocol(path).strip('/')
  result = {}
  for name, info in found.items():
    # Some programs make an object for a folder.
    if info['type'] != 'file' or name.endswith('/'):
      continue
    below = name.strip('/').removeprefix(prefix).lstrip('/')
    if '..' in below.split('/'):  # a copy of it would be outside of the folder for copies
      raise InputError(f'{what}: got {name!r}; expected names without ..')
    mark = next((str(info[key]) for key in _MARKS if info.get(key)), '')
    result[below] = (info['size'], mark)
  return result


def exists(path: str, what: str) -> bool:
  """Whether there is anything at or below a path."""
  check(path, what)
  with _one_error(f'{what}: cannot read {path!r}'):
    system = _system(path)
    system.invalidate_cache()
    return system.exists(path)


def read(path: str, what: str) -> bytes | None:
  """The content of an object; None where there is none."""
  with _one_error(f'{what}: cannot read {path!r}'):
    try:
      return _system(path).cat_file(path)
    except FileNotFoundError:
      return None


# --- copying here -------------------------------------------------------------------------------


def local(
  path: str | os.PathLike, what: str, *, wanted: Callable[[str], bool] | None = None
) -> str:
  """The path itself, or where a copy of what it names in a bucket is on this machine.

  Only what is new or has changed is copied; the copy stays, for the next time. what: the flag or
  field that errors name. wanted: which names below the path; all. InputError where there is
  nothing, or no room for it.
  """
  path = os.fspath(path)
  if not is_bucket(path):
    return path
  found = names(path, what)
  if not found:
    raise InputError(f'{what}: got {path!r}, which does not exist; expected a file or a folder')
  copy = mirror(path, 'copies')
  if list(found) != [''] or wanted:
    fetch(path, copy, what, wanted=wanted)
    return str(copy)
  folder, _, name = path.rpartition('/')
  fetch(folder, copy.parent, what, wanted=name.__eq__)
  return str(copy)


def fetch(
  path: str,
  folder: pathlib.Path,
  what: str,
  *,
  wanted: Callable[[str], bool] | None = None,
) -> list[str]:
  """Makes a folder here equal to what is below a path in a bucket; returns the names.

  wanted: the names that count; of the others nothing is copied, and nothing removed here.
  """
  found = {name: entry for name, entry in names(path, what).items() if name}
  if wanted:
    found = {name: entry for name, entry in found.items() if wanted(name)}
  with _one_error(f'{what}: cannot copy {path!r} to {str(folder)!r}'):
    folder.mkdir(parents=True, exist_ok=True)
    # Beside it: what is in the folder is what is in the bucket. Of several processes here one
    # copies, and the others find what it has copied.
    with open(folder.with_name(f'.{folder.name}.index'), 'a+') as index:
      fcntl.flock(index, fcntl.LOCK_EX)
      known = _known(index)
      for name in known.keys() - found.keys():
        if not wanted or wanted(name):
          (folder / name).unlink(missing_ok=True)
          del known[name]
      changed = {}
      for name, entry in found.items():
        if known.get(name) != list(entry) or _size(folder / name) != entry[0]:
          changed[name] = entry[0]
      _require_room(path, folder, sum(changed.values()), what)
      get = functools.partial(_get, _system(path), path, folder)
      try:
        for name in _in_threads(get, changed.items()):
          known[name] = list(found[name])
      finally:
        index.truncate(0)
        json.dump(known, index)
  return list(found)


def _known(index):
  """{name: [bytes, mark]} of what was copied before."""
  index.seek(0)
  try:
    return json.loads(index.read())
  except ValueError:  # it is new, or a kill has cut it short
    return {}


def _size(path):
  try:
    return path.stat().st_size
  except (FileNotFoundError, NotADirectoryError):
    return None


def _require_room(path, folder, size, what):
  if size < _TELL:
    return
  free = shutil.disk_usage(folder).free - _SPARE
  if size > free:
    raise InputError(
      f'{what}: got {path!r}, of which {size / 1e9:,.1f} GB are to be copied to {str(folder)!r}; '
      f'expected room for it there, and {max(free, 0) / 1e9:,.1f} GB are free: $TIPS_JAX_CACHE '
      'names another disk; what is larger than any is mounted (gcsfuse)'
    )
  print(f'{path}: {size / 1e9:,.1f} GB are copied to {folder}', file=sys.stderr, flush=True)


def _get(system, path, folder, item):
  """Copies one object; a file of its name is whole or not there."""
  name, size = item
  target = folder / name
  target.parent.mkdir(parents=True, exist_ok=True)
  part = target.with_name(f'.{target.name}-{uuid.uuid4().hex[:12]}')
  try:
    system.get_file(join(path, name), str(part))
    if part.stat().st_size != size:
      raise OSError(f'{name}: got {part.stat().st_size} bytes of {size}')
    os.replace(part, target)
  finally:
    part.unlink(missing_ok=True)
  return name


# --- copying there ------------------------------------------------------------------------------


@contextlib.contextmanager
def output(path: str, what: str, *, last: str) -> Iterator[str]:
  """Within it a path on this machine to write a new folder to: the path itself, or one that goes up
  to the bucket at the end, `last` (a name in it) after all others, and is then removed here.

  After an error nothing is in the bucket. It is the same path for the same bucket path, so that
  what lies beside it (work that goes on after a stop) is found. InputError, before anything is
  written, where the bucket holds something at the path.
  """
  if not is_bucket(path):
    yield path
    return
  if names(path, what):
    raise InputError(
      f'{what}: got {path!r}, which exists; expected a new folder: nothing is overwritten (a '
      f'folder without {last} was cut off: remove it)'
    )
  folder = mirror(path, 'outputs')
  shutil.rmtree(folder, ignore_errors=True)
  folder.parent.mkdir(parents=True, exist_ok=True)
  yield str(folder)
  try:
    upload(folder, path, what, last=last)
  except BaseException:  # also after a signal
    with contextlib.suppress(Exception):
      remove(path, what, last=last)
    raise
  finally:
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def updated(path: str, what: str, *, last: str) -> Iterator[pathlib.Path]:
  """Within it a folder on this machine with what is at a path: the path itself, or a copy of what
  is in a bucket, which goes up at the end, `last` after all others.
  """
  if not is_bucket(path):
    yield pathlib.Path(path)
    return
  folder = mirror(path, 'outputs')
  fetch(path, folder, what)
  yield folder
  upload(folder, path, what, last=last)


def upload(
  folder: pathlib.Path,
  path: str,
  what: str,
  *,
  only: Sequence[str] | None = None,
  last: str = '',
) -> None:
  """Copies files of a folder to a path in a bucket: all, or `only` those names; `last` after all
  others, so that who finds it finds them.
  """
  sent = list(files_below(folder) if only is None else only)
  if last:
    sent.remove(last)
  put = functools.partial(_put, _system(path), path, folder)
  with _one_error(f'{what}: cannot write {path!r}'):
    _in_threads(put, sent)
    if last:
      put(last)


def files_below(folder: pathlib.Path) -> list[str]:
  """The names of all files below a folder."""
  found = [p for p in folder.rglob('*') if p.is_file()]
  return sorted(p.relative_to(folder).as_posix() for p in found)


def _put(system, path, folder, name):
  system.put_file(str(folder / name), join(path, name))


def write(path: str, content: bytes, what: str) -> None:
  """Writes an object, which replaces one of that name."""
  with _one_error(f'{what}: cannot write {path!r}'):
    _system(path).pipe_file(path, content)


def remove(path: str, what: str, *, last: str) -> None:
  """Removes all that is below a path; first what proves it whole, the name `last`."""
  found = names(path, what)
  gone = functools.partial(_remove, _system(path), path)
  with _one_error(f'{what}: cannot remove {path!r}'):
    if last in found:
      gone(last)
    _in_threads(gone, found.keys() - {last})


def _remove(system, path, name):
  with contextlib.suppress(FileNotFoundError):
    system.rm_file(join(path, name))


def move(path: str, to: str, what: str) -> None:
  """Gives all that is below a path another path in the same bucket."""
  found = names(path, what)
  system = _system(path)
  with _one_error(f'{what}: cannot move {path!r} to {to!r}'):
    _in_threads(lambda name: system.cp_file(join(path, name), join(to, name)), found)
  remove(path, what, last='')


def _in_threads(function, items):
  """[function(item) of each], of a function that mostly waits; the first error is raised."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS, 'bucket') as pool:
    try:
      return list(pool.map(function, items))
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise

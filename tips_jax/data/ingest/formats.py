"""Recognizes the format of image-text data, and opens the reader for it.

Formats: tables beside images or zips, webdataset tars or loose files, parquet, Hugging Face
folders, TFDS. Readers yield `Sample`s one by one, and decode no image.
"""

import fnmatch
import functools
import glob
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from tips_jax.core import buckets
from tips_jax.core.errors import InputError
from tips_jax.core.strict import did_you_mean
from tips_jax.data.ingest.archives import is_hidden
from tips_jax.data.ingest.columnar import HuggingFaceReader, ParquetReader
from tips_jax.data.ingest.reader import Note, Options, Reader
from tips_jax.data.ingest.rows import TABLES
from tips_jax.data.ingest.splits import select, splits_in
from tips_jax.data.ingest.tables import TableReader, read_table, table_names, with_rows
from tips_jax.data.ingest.tars import LooseReader, TarReader, has_loose_samples
from tips_jax.data.ingest.tfds_reader import TfdsReader
from tips_jax.data.store import TFDS_FILES, TFDS_NAME, names_beside

_TARS = ('.tar', '.tar.gz', '.tgz', '.tar.bz2', '.tbz2', '.tar.xz', '.txz')
_FILES = (*TABLES, *_TARS, '.zip', '.parquet')
_MAX_FILES = 100_000  # of a pattern
_PATTERN = r'[*?,\[{]'
_COMMAS = r',(?![^{}]*\})'  # those between braces are _expanded's


def open_input(path: str | pathlib.Path, options: Options) -> Reader:
  """A Reader for a file, folder, pattern, list with commas or TFDS name; InputError says what was
  found when it has no known format.
  """
  path = os.path.expanduser(os.fspath(path))
  if os.path.isdir(path):
    return _of_folder(path, options)
  if os.path.isfile(path):
    return _of_files([path], options)
  if re.search(_PATTERN, path):
    return _of_files(_matches(path), options)
  if re.fullmatch(TFDS_NAME, path) and not path.lower().endswith(_FILES):
    return TfdsReader(path, options)
  raise InputError(
    f'--input: got {path!r}, which does not exist; expected a file, a folder or the name of a TFDS '
    f'data set{did_you_mean(os.path.basename(path), names_beside(path))}'
  )


def open_inputs(inputs: Mapping[str, tuple[str, Options]]) -> dict[str, Reader]:
  """The Readers of several inputs by split, each given as its path and options."""
  return {split: open_input(path, options) for split, (path, options) in inputs.items()}


def local_input(path: str, images: str, what: str) -> str:
  """A file, folder, pattern or list as it is on this machine: of what is in a bucket a copy is
  made. images: where those of a table are; '': beside it. what: names the flag in errors.
  """
  return ','.join(_local_part(part, images, what) for part in re.split(_COMMAS, path))


def _local_part(path, images, what):
  if not buckets.is_bucket(path):
    return path
  pattern = re.search(_PATTERN, path)
  # Images lie beside the table that names them.
  table = path.lower().endswith(TABLES) and not images
  if not pattern and not table:
    return buckets.local(path, what)
  start = pattern.start() if pattern else len(path)
  folder = path[:start].rpartition('/')[0]
  rest = path[len(folder) + 1 :]
  patterns = [part.split('/') for part in _expanded(rest)]

  def wanted(name):
    parts = name.split('/')
    fits = lambda p: len(p) == len(parts) and all(map(fnmatch.fnmatchcase, parts, p))
    return table or any(map(fits, patterns))

  return os.path.join(buckets.local(folder, what, wanted=wanted), rest)


# --- files --------------------------------------------------------------------------------------


def _of_files(files: Sequence[str], options: Options) -> Reader:
  files, others = _of_one_split(files, options)
  return _noted(_reader_of(files, options), 'other_split', others)


def _noted(reader: Reader, kind: str, paths: Iterable[str]) -> Reader:
  """The reader, which notes paths that it does not read."""
  for path in paths:
    reader.notes.append(Note(kind, path))
  return reader


def _ending(names, ends):
  return [name for name in names if name.lower().endswith(ends)]


def _of_one_split(files, options):
  """(files of the split, others): a pattern may match several splits, or be meant for another."""
  bases = {os.path.basename(file): file for file in files}
  if len(set().union(*map(splits_in, bases))) < 2:
    return files, []
  chosen, _ = select(bases, options.split, 'files')
  of_split = [file for file in files if os.path.basename(file) in chosen]
  return of_split, [file for file in files if file not in of_split]


def _reader_of(files, options):
  if _ending(files, _TARS) == files:
    return TarReader(files, options)
  if _ending(files, '.parquet') == files:
    return ParquetReader(files, options)
  if len(files) == 1 and _ending(files, (*TABLES, '.zip')):
    return TableReader(files[0], options)
  more = f' and {len(files) - 1} more' if len(files) > 1 else ''
  raise InputError(
    f'--input: got {files[0]!r}{more}; expected tars, parquet files, a zip, or one table '
    f'({", ".join(TABLES)})'
  )


def _matches(pattern: str) -> list[str]:
  """The files of a pattern, with * ? [ ], braces as {000..012} or {a,b}, and commas between."""
  files = []
  for part in itertools.chain.from_iterable(map(_expanded, re.split(_COMMAS, pattern))):
    matched = [part] if os.path.isfile(part) else sorted(glob.glob(part))
    if not matched:
      raise InputError(
        f'--input: got the pattern {pattern!r}, of which no file matches {part!r}; expected files'
        f'{did_you_mean(os.path.basename(part), names_beside(part))}'
      )
    files += matched
  return list(dict.fromkeys(files))


def _expanded(pattern):
  """The patterns that the braces of a pattern stand for, in order."""
  inner = re.search(r'\{([^{}]*)\}', pattern)
  if not inner:
    return [pattern]
  found = []
  for choice in _choices(inner[1]):
    found += _expanded(pattern.replace(inner[0], choice, 1))
    if len(found) > _MAX_FILES:
      raise InputError(f'--input: got a pattern of more than {_MAX_FILES:,} files; expected less')
  return found


def _choices(inside):
  bounds = re.fullmatch(r'(\d{1,9})\.\.(\d{1,9})', inside)
  if not bounds:
    return inside.split(',')
  first, last = map(int, bounds.groups())
  if last - first >= _MAX_FILES:
    raise InputError(f'--input: got {{{inside}}}; expected at most {_MAX_FILES:,} files')
  return [f'{i:0{len(bounds[1])}}' for i in range(first, last + 1)]


# --- folders ------------------------------------------------------------------------------------


def _of_folder(path: str, options: Options) -> Reader:
  try:
    names = sorted(itertools.filterfalse(is_hidden, os.listdir(path)))
  except OSError as error:
    raise InputError(f'--input: cannot read the folder {path!r} ({error.strerror})') from error
  if 'dataset_dict.json' in names or 'state.json' in names:
    return HuggingFaceReader(path, options)
  if set(TFDS_FILES) <= set(names):
    return TfdsReader(path, options)
  folders = [name for name in names if os.path.isdir(os.path.join(path, name))]
  files = sorted(set(names) - set(folders))
  used, reader = _of_listing(path, files, folders, options)
  if reader is None:
    return _of_table_or_below(path, names, folders, options)
  others = sorted(set(_ending(names, _FILES)) - set(used))
  return _noted(reader, 'other_file', map(functools.partial(os.path.join, path), others))


def _of_listing(path, names, folders, options):
  """(names that are read, reader or None) of the files of a folder."""
  where = f'the folder {path!r}'
  # Before tables and loose files: img2dataset leaves JSON and parquet beside its tars.
  tars = _ending(names, _TARS)
  if tars:
    return _several(path, tars, TarReader, options)
  parquet = _ending(names, '.parquet')
  zips = _ending(names, '.zip')
  loose = not any(map(splits_in, folders)) and has_loose_samples(path)
  candidates = table_names(names)
  tables = candidates
  # Of several forms a table is one only if its rows say so: stats and settings are JSON too.
  if len(candidates) > 1 or loose or parquet or zips or folders:
    tables = with_rows(candidates, lambda name: read_table(os.path.join(path, name)), options)
  if len(tables) > 1:
    tables, _ = select(tables, options.split, where)
  if len(tables) > 1:
    raise InputError(
      f'--input: got {path!r} with the tables {tables}; expected one, or one named after the split '
      f'{options.split!r}; give the path of the table itself'
    )
  if tables:
    select(tables, options.split, where)
    return tables, TableReader(os.path.join(path, tables[0]), options)
  if loose:
    return names, LooseReader(path, options)
  if parquet:
    return _several(path, parquet, ParquetReader, options)
  if len(zips) == 1:
    return zips, TableReader(os.path.join(path, zips[0]), options)
  return [], None


def _several(path, names, kind, options):
  chosen, others = select(names, options.split, f'the folder {path!r}')
  in_folder = functools.partial(os.path.join, path)
  reader = kind(list(map(in_folder, chosen)), options)
  return names, _noted(reader, 'other_split', map(in_folder, others))


def _of_table_or_below(path, names, folders, options):
  """The reader of a folder inside; else of a table, which says itself what is wrong with it."""
  tables = table_names(names)
  stray = _ending(tables, '.json') == tables
  try:
    if stray:
      return _below(path, names, folders, options)
  except InputError:
    if not tables:
      raise
  return TableReader(os.path.join(path, tables[0]), options)


def _below(path, names, folders, options):
  """The reader of the folder of the split, of 'data' in a clone of a hub, or of the only one."""
  if any(re.fullmatch(r'\d+\.\d+\.\d+', name) for name in folders):
    return TfdsReader(path, options)  # a folder of versions
  others = []
  if any(map(splits_in, folders)):
    chosen, others = select(folders, options.split, f'the folder {path!r}')
  elif 'data' in folders:
    chosen = ['data']
  else:
    chosen = folders
  if len(chosen) == 1:
    reader = _of_folder(os.path.join(path, chosen[0]), options)
    in_folder = functools.partial(os.path.join, path)
    _noted(reader, 'other_split', map(in_folder, others))
    rest = sorted(set(names) - {*chosen, *others})
    return _noted(reader, 'other_file', map(in_folder, rest))
  listing = names if len(names) <= 8 else [*names[:8], '...']
  raise InputError(
    f'--input: got the folder {path!r} with {listing}; expected a table ({", ".join(TABLES)}) '
    f'naming the images, webdataset tars or loose files, parquet files, a Hugging Face '
    f'save_to_disk folder or a TFDS data set'
  )

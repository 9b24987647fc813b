"""Recognizes the format of image-text data, and opens the reader for it.

Formats: tables beside images or zips, webdataset tars or loose files, parquet, Hugging Face
folders, TFDS. Readers yield `Sample`s one by one, and decode no image.
"""

import glob
import os
import pathlib
import re
from collections.abc import Sequence

from tips_jax.core.errors import InputError
from tips_jax.core.strict import did_you_mean
from tips_jax.data.ingest.archives import is_hidden
from tips_jax.data.ingest.columnar import HuggingFaceReader, ParquetReader, TfdsReader
from tips_jax.data.ingest.reader import Note, Options, Reader
from tips_jax.data.ingest.rows import TABLES
from tips_jax.data.ingest.splits import select, splits_in
from tips_jax.data.ingest.tables import TableReader, read_table, table_names, with_rows
from tips_jax.data.ingest.tars import LooseReader, TarReader, has_loose_samples
from tips_jax.data.store import TFDS_FILES, TFDS_NAME, names_beside

_TARS = ('.tar', '.tar.gz', '.tgz', '.tar.bz2', '.tbz2', '.tar.xz', '.txz')
_FILES = (*TABLES, *_TARS, '.zip', '.parquet')
_MAX_FILES = 100_000  # of a pattern


def open_input(path: str | pathlib.Path, options: Options) -> Reader:
  """A Reader for a file, folder, pattern, list with commas or TFDS name; InputError says what was
  found when it has no known format.
  """
  path = os.path.expanduser(os.fspath(path))
  if os.path.isdir(path):
    return _of_folder(path, options)
  if os.path.isfile(path):
    return _of_files([path], options)
  if re.search(r'[*?,\[{]', path):
    return _of_files(_matches(path), options)
  if re.fullmatch(TFDS_NAME, path) and not path.lower().endswith(_FILES):
    return TfdsReader(path, options)
  raise InputError(
    f'--input: got {path!r}, which does not exist; expected a file, a folder or the name of a TFDS '
    f'data set{did_you_mean(os.path.basename(path), names_beside(path))}'
  )


# --- files --------------------------------------------------------------------------------------


def _of_files(files: Sequence[str], options: Options) -> Reader:
  files, others = _of_one_split(files, options)
  reader = _reader_of(files, options)
  reader.notes += [Note('other_split', other) for other in others]
  return reader


def _of_one_split(files, options):
  """(files of the split, others): a pattern may match several splits, or be meant for another."""
  bases = {os.path.basename(file): file for file in files}
  if len(set().union(*map(splits_in, bases))) < 2:
    return files, []
  chosen, _ = select(bases, options.split, 'files')
  of_split = [file for file in files if os.path.basename(file) in chosen]
  return of_split, [file for file in files if file not in of_split]


def _reader_of(files, options):
  if all(file.lower().endswith(_TARS) for file in files):
    return TarReader(files, options)
  if all(file.lower().endswith('.parquet') for file in files):
    return ParquetReader(files, options)
  if len(files) == 1 and files[0].lower().endswith((*TABLES, '.zip')):
    return TableReader(files[0], options)
  more = f' and {len(files) - 1} more' if len(files) > 1 else ''
  raise InputError(
    f'--input: got {files[0]!r}{more}; expected tars, parquet files, a zip, or one table '
    f'({", ".join(TABLES)})'
  )


def _matches(pattern: str) -> list[str]:
  """The files of a pattern, with * ? [ ], braces as {000..012} or {a,b}, and commas between."""
  files = []
  for part in _expanded(f'{{{pattern}}}'):
    matched = [part] if os.path.isfile(part) else sorted(glob.glob(part))
    if not matched:
      raise InputError(
        f'--input: got the pattern {pattern!r}, of which no file matches {part!r}; expected files'
        f'{did_you_mean(os.path.basename(part), names_beside(part))}'
      )
    files += matched
  return list(dict.fromkeys(files))


def _expanded(pattern):
  """The patterns that braces stand for, the innermost first."""
  found = [pattern]
  while True:
    inner = re.search(r'\{([^{}]*)\}', found[0])
    if not inner:
      return found
    choices = _choices(inner[1])
    if len(found) * len(choices) > _MAX_FILES:
      raise InputError(f'--input: got a pattern of more than {_MAX_FILES:,} files; expected less')
    found = [part.replace(inner[0], choice, 1) for part in found for choice in choices]


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
  names = sorted(name for name in os.listdir(path) if not is_hidden(name))
  if 'dataset_dict.json' in names or 'state.json' in names:
    return HuggingFaceReader(path, options)
  if set(TFDS_FILES) <= set(names):
    return TfdsReader(path, options)
  folders = [name for name in names if os.path.isdir(os.path.join(path, name))]
  used, reader = _of_listing(path, names, folders, options)
  if reader is None:
    return _below(path, names, folders, options)
  for name in names:
    if name.lower().endswith(_FILES) and name not in used:
      reader.notes.append(Note('other_file', os.path.join(path, name)))
  return reader


def _of_listing(path, names, folders, options):
  """(names that are read, reader or None) of the files of a folder."""
  where = f'the folder {path!r}'
  # Before tables and loose files: img2dataset leaves JSON and parquet beside its tars.
  tars = [name for name in names if name.lower().endswith(_TARS)]
  if tars:
    return _several(path, tars, TarReader, options)
  parquet = [name for name in names if name.lower().endswith('.parquet')]
  zips = [name for name in names if name.lower().endswith('.zip')]
  loose = not any(map(splits_in, folders)) and has_loose_samples(path)
  candidates = table_names(names)
  tables = candidates
  # Of several forms a table is one only if its rows say so: stats and settings are JSON too.
  if len(candidates) > 1 or loose or parquet or folders:
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
  if candidates and not folders:  # its own message says what is wrong with it
    return candidates, TableReader(os.path.join(path, candidates[0]), options)
  return [], None


def _several(path, names, kind, options):
  chosen, others = select(names, options.split, f'the folder {path!r}')
  reader = kind([os.path.join(path, name) for name in chosen], options)
  reader.notes += [Note('other_split', os.path.join(path, name)) for name in others]
  return names, reader


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
    for name in names:
      if name in others:
        reader.notes.append(Note('other_split', os.path.join(path, name)))
      elif name not in chosen:
        reader.notes.append(Note('other_file', os.path.join(path, name)))
    return reader
  listing = names if len(names) <= 8 else [*names[:8], '...']
  raise InputError(
    f'--input: got the folder {path!r} with {listing}; expected a table ({", ".join(TABLES)}) '
    f'naming the images, webdataset tars or loose files, parquet files, a Hugging Face '
    f'save_to_disk folder or a TFDS data set'
  )

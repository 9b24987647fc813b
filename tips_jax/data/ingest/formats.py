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
from tips_jax.data.ingest.columnar import HuggingFaceReader, ParquetReader, TfdsReader
from tips_jax.data.ingest.reader import Options, Reader
from tips_jax.data.ingest.tables import TABLES, TableReader
from tips_jax.data.ingest.tars import LooseReader, TarReader, has_loose_samples
from tips_jax.data.store import TFDS_FILES, TFDS_NAME, names_beside

_FILES = (*TABLES, '.tar', '.zip', '.parquet')


def open_input(path: str | pathlib.Path, options: Options) -> Reader:
  """A Reader for a file, folder, glob pattern or TFDS name; InputError says what was found when it
  has no known format.
  """
  path = os.path.expanduser(os.fspath(path))
  if os.path.isdir(path):
    return _of_folder(path, options)
  if os.path.isfile(path):
    return _of_files([path], options)
  if glob.has_magic(path):
    files = sorted(glob.glob(path))
    if not files:
      raise InputError(f'--input: got the pattern {path!r}, which no file matches')
    return _of_files(files, options)
  if re.fullmatch(TFDS_NAME, path) and not path.endswith(_FILES):
    return TfdsReader(path, options)
  raise InputError(
    f'--input: got {path!r}, which does not exist; expected a file, a folder or the name of a TFDS '
    f'data set{did_you_mean(os.path.basename(path), names_beside(path))}'
  )


def _of_files(files: Sequence[str], options: Options) -> Reader:
  ends = {pathlib.Path(file).suffix.lower() for file in files}
  if ends == {'.tar'}:
    return TarReader(files, options)
  if ends == {'.parquet'}:
    return ParquetReader(files, options)
  if len(files) == 1 and ends <= {*TABLES, '.zip'}:
    return TableReader(files[0], options)
  more = f' and {len(files) - 1} more' if len(files) > 1 else ''
  raise InputError(
    f'--input: got {files[0]!r}{more}; expected tars, parquet files, a zip, or one table '
    f'({", ".join(TABLES)})'
  )


def _of_folder(path: str, options: Options) -> Reader:
  names = sorted(os.listdir(path))

  def ending(*suffixes):
    return [name for name in names if name.lower().endswith(suffixes)]

  if 'dataset_dict.json' in names or 'state.json' in names:
    return HuggingFaceReader(path, options)
  if set(TFDS_FILES) <= set(names):
    return TfdsReader(path, options)
  # Before tables and loose files: img2dataset leaves JSON and parquet beside its tars.
  tars = ending('.tar')
  if tars:
    return TarReader(_of_split(path, tars, options.split), options)
  tables = [name for name in ending(*TABLES) if name not in ('meta.json', 'dataset_info.json')]
  of_split = [name for name in tables if os.path.splitext(name)[0] == options.split]
  if len(tables) == 1 or len(of_split) == 1:
    return TableReader(os.path.join(path, (of_split or tables)[0]), options)
  if has_loose_samples(path):
    return LooseReader(path, options)
  parquet = ending('.parquet')
  if parquet:
    return ParquetReader(_of_split(path, parquet, options.split), options)
  if tables:
    raise InputError(
      f'--input: got {path!r} with the tables {tables}; expected one, or one named after the split '
      f'{options.split!r}; give the path of the table itself'
    )
  if any(re.fullmatch(r'\d+\.\d+\.\d+', name) for name in names):
    return TfdsReader(path, options)  # a folder of versions
  zips = ending('.zip')
  if len(zips) == 1:
    return TableReader(os.path.join(path, zips[0]), options)
  listing = names if len(names) <= 8 else [*names[:8], '...']
  raise InputError(
    f'--input: got the folder {path!r} with {listing}; expected a table ({", ".join(TABLES)}) '
    f'naming the images, webdataset tars or loose files, parquet files, a Hugging Face '
    f'save_to_disk folder or a TFDS data set'
  )


def _of_split(folder, names, split):
  """Paths of the files named after the split ('train-00000-of-00004.parquet'), else of all."""
  of_split = [name for name in names if re.match(rf'{re.escape(split)}\b', name)]
  return [os.path.join(folder, name) for name in of_split or names]

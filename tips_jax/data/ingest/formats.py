"""Tells in which form a person keeps images with texts, and opens the reader for it.

Tables beside images or zips, webdataset tars or loose files, parquet, Hugging Face folders, TFDS.
Readers yield one `Sample` after the other, and decode no image.
"""

import glob
import os
import re

from tips_jax.core.errors import InputError
from tips_jax.core.strict import did_you_mean
from tips_jax.data.ingest.columnar import HuggingFaceReader, ParquetReader, TfdsReader
from tips_jax.data.ingest.reader import Options, Reader, Sample
from tips_jax.data.ingest.tables import TABLES, TableReader
from tips_jax.data.ingest.tars import LooseReader, TarReader, has_loose_samples

__all__ = ['Options', 'Reader', 'Sample', 'open_input']


def open_input(path, options):
  """A Reader for a file, folder, glob pattern or TFDS name; InputError says what was found when it
  fits no form.
  """
  path = os.path.expanduser(os.fspath(path))
  if glob.has_magic(path) and not os.path.exists(path):
    files = sorted(glob.glob(path))
    if not files:
      raise InputError(f'--input: got the pattern {path!r}, which no file matches')
    return _of_files(files, options)
  if os.path.isfile(path):
    return _of_files([path], options)
  if not os.path.isdir(path):
    if re.fullmatch(r'\w+(/[\w.-]+)*(:[\w.]+)?', path) and not path.endswith(
      (*TABLES, '.tar', '.zip', '.parquet')
    ):
      return TfdsReader(path, options)
    parent = os.path.dirname(os.path.abspath(path))
    beside = os.listdir(parent) if os.path.isdir(parent) else []
    raise InputError(
      f'--input: got {path!r}, which does not exist; expected a file, a folder or the name of a TFDS '
      f'data set{did_you_mean(os.path.basename(path), beside)}'
    )
  return _of_folder(path, options)


def _of_files(files, options):
  ends = {os.path.splitext(f)[1].lower() for f in files}
  if ends == {'.tar'}:
    return TarReader(files, options)
  if ends == {'.parquet'}:
    return ParquetReader(files, options)
  if len(files) == 1 and ends <= set(TABLES):
    return TableReader(files[0], options)
  if len(files) == 1 and ends == {'.zip'}:
    return TableReader(files[0], options)
  more = f' and {len(files) - 1} more' if len(files) > 1 else ''
  raise InputError(
    f'--input: got {files[0]!r}{more}; expected tars, parquet files, a zip, or one table '
    f'({", ".join(TABLES)})'
  )


def _of_folder(path, options):
  names = sorted(os.listdir(path))
  if 'dataset_dict.json' in names or 'state.json' in names:
    return HuggingFaceReader(path, options)
  if 'features.json' in names and 'dataset_info.json' in names:
    return TfdsReader(path, options)
  tars = [os.path.join(path, n) for n in names if n.endswith('.tar')]
  if tars:
    return TarReader(_of_split(tars, options.split), options)
  tables = [
    n for n in names if n.lower().endswith(TABLES) and n not in ('meta.json', 'dataset_info.json')
  ]
  of_split = [n for n in tables if os.path.splitext(n)[0] == options.split]
  if len(tables) == 1 or len(of_split) == 1:
    return TableReader(os.path.join(path, (of_split or tables)[0]), options)
  if has_loose_samples(path):
    return LooseReader(path, options)
  parquet = [os.path.join(path, n) for n in names if n.endswith('.parquet')]
  if parquet:
    return ParquetReader(_of_split(parquet, options.split), options)
  if tables:
    raise InputError(
      f'--input: got {path!r} with the tables {tables}; expected one, or one named after the split '
      f'{options.split!r}; give the path of the table itself'
    )
  folders = [n for n in names if re.fullmatch(r'\d+\.\d+\.\d+', n)]
  if folders:
    return TfdsReader(path, options)
  zips = [n for n in names if n.endswith('.zip')]
  if len(zips) == 1:
    return TableReader(os.path.join(path, zips[0]), options)
  shown = names[:8] + (['...'] if len(names) > 8 else [])
  raise InputError(
    f'--input: got the folder {path!r} with {shown}; expected a table ({", ".join(TABLES)}) naming the '
    f'images, webdataset tars or loose files, parquet files, a Hugging Face save_to_disk folder or a '
    f'TFDS data set'
  )


def _of_split(files, split):
  """The files named after the split ('train-00000-of-00004.parquet'), where any is; else all."""
  return [f for f in files if re.match(rf'{re.escape(split)}\b', os.path.basename(f))] or files

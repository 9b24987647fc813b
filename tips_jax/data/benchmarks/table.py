"""Public benchmarks by name, each read from its official folder layout (docs/datasets.md).

  reader = benchmarks.open('voc', data_dir, 'test')    # len(reader), reader[i], iteration: Samples
  convert.convert({'test': reader}, 'store')           # or a store of it, as `prepare` writes one

Splits have the same names everywhere: `train` to learn from, `test` to measure on, and `index`
where retrieval searches a separate set (`reader.official` maps them to the data set's names). Masks
are uint8 class ids with 255 for void, depth uint16 millimeters with 0 for missing, normals uint8
n * 127.5 + 127.5 with (0, 0, 0) for missing.
"""

import pathlib

from tips_jax.core.strict import unknown
from tips_jax.data.benchmarks import dense, images, packs
from tips_jax.data.benchmarks.reader import Benchmark

READERS = {reader.name: reader for reader in (*dense.READERS, *images.READERS, *packs.READERS)}
PACKS = tuple(reader.name for reader in packs.READERS)


def open(name: str, data_dir: str | pathlib.Path, split: str = 'test') -> Benchmark:
  """The reader of one split of a benchmark below the folder `data_dir`.

  Raises InputError for an unknown name or split (with the nearest one), and for a data set or split
  whose files are missing.
  """
  if name not in READERS:
    raise unknown('data set', name, READERS)
  return READERS[name](data_dir, split)


def present(name: str, data_dir: str | pathlib.Path) -> bool:
  """Whether the data folder has any of the folders of a benchmark."""
  root = pathlib.Path(data_dir).expanduser()
  return any((root / folder).is_dir() for folder in READERS[name].folders)

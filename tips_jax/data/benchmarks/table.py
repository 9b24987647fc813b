"""Public benchmarks by name, each read from its official folder layout (docs/datasets.md shows
them).

  reader = benchmarks.open('voc', data_dir, 'test')    # len(reader), reader[i], iteration: Samples
  with annotations
  convert.convert({'test': reader}, 'store')           # or a store of it, as `prepare` would write

Splits are named alike everywhere: `train` to learn from, `test` to measure on (the data set's own
name is in `reader.official`), `index` where retrieval searches a set of its own. Masks are uint8
class ids with 255 for void, depth uint16 millimeters with 0 for missing, normals uint8 n * 127.5 +
127.5 with (0, 0, 0) for missing.
"""

import pathlib

from tips_jax.core.strict import unknown
from tips_jax.data.benchmarks import dense as benchmarks_dense
from tips_jax.data.benchmarks import images as benchmarks_images
from tips_jax.data.benchmarks import packs as benchmarks_packs

READERS = {
  reader.name: reader
  for reader in (*benchmarks_dense.READERS, *benchmarks_images.READERS, *benchmarks_packs.READERS)
}
PACKS = tuple(reader.name for reader in benchmarks_packs.READERS)


def open(name, data_dir, split='test'):  # as gzip.open, Image.open: read it as benchmarks.open
  """The Reader of one split of a benchmark below the folder `data_dir`.

  `reader.annotations`, `label_names` and `mask_classes` say what its samples carry. Raises
  InputError for an unknown name or split (with the nearest one), a data set that is not there and a
  split whose files are not.
  """
  if name not in READERS:
    raise unknown('data set', name, READERS)
  return READERS[name](data_dir, split)


def splits(name):
  """The splits of a benchmark by the house's names."""
  if name not in READERS:
    raise unknown('data set', name, READERS)
  return tuple(READERS[name].official)


def present(name, data_dir):
  """Whether the data folder has any of the folders of a benchmark."""
  return any(
    (pathlib.Path(data_dir).expanduser() / folder).is_dir() for folder in READERS[name].folders
  )

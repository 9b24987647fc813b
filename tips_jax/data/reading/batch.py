"""The layout of a batch: names, shapes and dtypes of its arrays."""

from typing import NamedTuple

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Data
from tips_jax.core.strict import unknown

Batch = dict[str, np.ndarray]
# What stays on the host, int64 [B]: the record that a row was made from, numbered over all stores,
# and the unreadable record that it replaces, else -1.
HOST = ('index', 'bad')
BOXES = 'boxes'  # (ymin, xmin, ymax, xmax) in [0, 1] of the crop that data.regions.view names
_VALID = '_valid'


class Entry(NamedTuple):
  """One array, without its first axis, the batch."""

  shape: tuple[int, ...]
  dtype: type


def layout(config: Data) -> dict[str, Entry]:
  """{name: Entry} of what goes to the devices: images of each view, ids of each text and whether
  there is one; boxes of regions, and their texts.
  """
  entries = {}
  for name, view in config.views.items():
    entries[name] = Entry((view.count, view.size, view.size, 3), np.uint8)
  for name in config.texts:
    entries[name] = Entry((config.text_length,), np.int32)
    entries[valid(name)] = Entry((), np.bool_)
  for name, tags in config.tags.items():
    _add_texts(entries, name, (tags.count,), tags.length or config.text_length)
  regions = config.regions
  if regions.texts:
    entries[BOXES] = Entry((regions.count, 4), np.float32)
    entries[valid(BOXES)] = Entry((regions.count,), np.bool_)
  for name, text in regions.texts.items():
    length = text.length or config.text_length
    _add_texts(entries, name, (regions.count, text.count), length)
  return entries


def _add_texts(entries, name, shape, length):
  entries[name] = Entry((*shape, length), np.int32)
  entries[valid(name)] = Entry(shape, np.bool_)


def empty(config: Data, size: int) -> Batch:
  """A batch of `size` examples, to be filled: black images, no texts, no record."""
  arrays = {name: np.zeros((size, *e.shape), e.dtype) for name, e in layout(config).items()}
  return arrays | {name: np.full(size, -1, np.int64) for name in HOST}


def valid(text: str) -> str:
  """Name of the array that says which rows have a text."""
  return text + _VALID


def check(config: Data) -> None:
  """InputError for a batch without arrays, and for two arrays of one name."""
  if not config.views and not config.texts:
    raise InputError('data.views: got none; expected at least one view')
  names = [*config.views, *config.texts, *config.tags, *config.regions.texts]
  for name in names:
    if name in (*HOST, BOXES) or name.endswith(_VALID) or names.count(name) > 1:
      raise InputError(
        f'data: got {name!r} as the name of a view or a text; expected one that no other entry of '
        'the batch has'
      )
  if config.regions.texts and config.regions.view not in config.views:
    raise unknown('data.regions.view', config.regions.view, config.views)

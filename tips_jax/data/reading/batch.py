"""The layout of a batch: names, shapes and dtypes of its arrays."""

from typing import NamedTuple

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Data

Batch = dict[str, np.ndarray]
# What stays on the host, int64 [B]: the record that a row was made from, numbered over all stores,
# and the unreadable record that it replaces, else -1.
HOST = ('index', 'bad')
_VALID = '_valid'


class Entry(NamedTuple):
  """One array, without its first axis, the batch."""

  shape: tuple[int, ...]
  dtype: type


def layout(config: Data) -> dict[str, Entry]:
  """{name: Entry} of what goes to the devices: images of each view, ids of each text and whether
  there is one.
  """
  entries = {}
  for name, view in config.views.items():
    entries[name] = Entry((view.count, view.size, view.size, 3), np.uint8)
  for name in config.texts:
    entries[name] = Entry((config.text_length,), np.int32)
    entries[valid(name)] = Entry((), np.bool_)
  return entries


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
  names = [*config.views, *config.texts]
  for name in names:
    if name in HOST or name.endswith(_VALID) or names.count(name) > 1:
      raise InputError(
        f'data: got {name!r} as the name of a view or a text; expected one that no other entry of '
        'the batch has'
      )

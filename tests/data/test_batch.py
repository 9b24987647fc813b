"""Tests of the layout of a batch."""

import numpy as np

from tips_jax.core.schema import Data, Text, View
from tips_jax.data import batch

CONFIG = Data(
  views={'local': View(size=8, count=3)}, texts={'web': Text(field='alt_text')}, text_length=12
)


def test_the_layout_names_every_view_and_text():
  assert batch.layout(CONFIG) == {
    'local': ((3, 8, 8, 3), np.uint8),
    'web': ((12,), np.int32),
    'web_valid': ((), np.bool_),
  }


def test_an_empty_batch_has_no_text_and_no_record():
  arrays = batch.empty(CONFIG, 4)
  assert {name: (x.shape, x.dtype.name) for name, x in arrays.items()} == {
    'local': ((4, 3, 8, 8, 3), 'uint8'),
    'web': ((4, 12), 'int32'),
    'web_valid': ((4,), 'bool'),
    'index': ((4,), 'int64'),
    'bad': ((4,), 'int64'),
  }
  assert not arrays['web_valid'].any() and (arrays['index'] == -1).all()


def test_names_that_a_batch_needs_itself_are_reserved():
  assert [n for n in ('index', 'bad', 'web_valid', 'web', 'valid') if batch.is_reserved(n)] == [
    'index',
    'bad',
    'web_valid',
  ]

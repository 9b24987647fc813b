"""Tests of the layout of a batch."""

import dataclasses

import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Data, Text, View
from tips_jax.data.reading import batch

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


@pytest.mark.parametrize('name', ['index', 'bad', 'web_valid', 'web'])
def test_a_view_has_no_name_that_the_batch_needs(name):
  config = dataclasses.replace(CONFIG, views={name: View(size=8)})
  with pytest.raises(InputError, match=f'data: got {name!r} as the name of a view or a text'):
    batch.check(config)


def test_other_names_are_free():
  batch.check(dataclasses.replace(CONFIG, views={'valid': View(size=8)}))

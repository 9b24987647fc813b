"""Reading a split: which records, which texts, and numbers that are not finite."""

import numpy as np
import pytest

from tips_jax.evals.features import reading


def test_a_limit_takes_evenly_spaced_records():
  assert reading.records(range(40), 8).tolist() == [0, 5, 10, 15, 20, 25, 30, 35]
  assert reading.records(range(3), 10).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
  'field, texts',
  [('captions', ['two words', 'caf\ufffd']), ('alt_text', ['red'])],
)
def test_empty_texts_are_left_out_and_a_broken_byte_is_replaced(field, texts):
  record = {'alt_text': b'red', 'captions': [b'two words', b'', b'  ', b'caf\xe9']}
  assert reading.texts_of(record, field) == texts


def test_rows_that_are_not_finite_become_zero():
  x = np.array([[1.0, 2.0], [np.nan, 1.0], [np.inf, 0.0], [-1.0, 0.0]])
  assert reading.finite(x).tolist() == [[1, 2], [0, 0], [0, 0], [-1, 0]]

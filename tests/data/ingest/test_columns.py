import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.columns import Columns, as_texts, guess


@pytest.mark.parametrize(
  'names, image, alt_text, captions',
  [
    (['image', 'alt_text', 'captions'], 'image', 'alt_text', ('captions',)),
    (['file_name', 'text'], 'file_name', 'text', ('none',)),
    (['Filepath', 'Title'], 'Filepath', 'Title', ('none',)),
    (['image', 'captions'], 'image', 'none', ('captions',)),
    (['image', 'alt_text', 'caption'], 'image', 'alt_text', ('caption',)),
    (['path', 'caption', 'caption_1', 'caption_2'], 'path', 'caption', ('caption_1', 'caption_2')),
    (['img', 'TITLE', 'synthetic caption', 'width'], 'img', 'TITLE', ('synthetic caption',)),
  ],
)
def test_guessed_columns(names, image, alt_text, captions):
  columns = guess(Columns(), names)
  assert (columns.image, columns.alt_text, columns.captions) == (image, alt_text, captions)


def test_named_columns_win_and_unknown_ones_are_errors():
  columns = guess(Columns(image='b', alt_text='none', captions=('d',)), ['a', 'b', 'caption', 'd'])
  assert (columns.image, columns.alt_text, columns.captions) == ('b', 'none', ('d',))
  with pytest.raises(InputError, match="--captions_column: got 'captoin'.*did you mean 'caption'"):
    guess(Columns(captions=('captoin',)), ['image', 'caption'])
  with pytest.raises(InputError, match='image column'):
    guess(Columns(), ['url', 'caption'])
  with pytest.raises(InputError, match='text columns'):
    guess(Columns(), ['image', 'width'])


def test_cells_become_texts():
  assert as_texts(' a\n  b\0c ') == ['a b c']
  assert as_texts('["a", "b"]') == ['a', 'b'] and as_texts('[sic] a') == ['[sic] a']
  assert as_texts([b'x', None, {'raw': 'y', 'id': 3}, {'text': np.array([b'z'], object)}]) == [
    'x',
    'y',
    'z',
  ]
  assert as_texts('a \ud800') == ['a ?']
  assert (
    as_texts(None) == as_texts(float('nan')) == [] and as_texts('') == [''] and as_texts(3) == ['3']
  )

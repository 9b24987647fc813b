import pytest

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.columns import Columns, guess, texts_of


@pytest.mark.parametrize(
  'names, image, alt_text, captions',
  [
    (['image', 'alt_text', 'captions'], 'image', 'alt_text', ('captions',)),
    (['file_name', 'text'], 'file_name', 'text', ('none',)),
    (['Filepath', 'Title'], 'Filepath', 'Title', ('none',)),
    (['image', 'captions'], 'image', 'none', ('captions',)),
    (['image', 'alt_text', 'caption'], 'image', 'alt_text', ('caption',)),
    (['path', 'caption', 'caption_1', 'caption_2'], 'path', 'caption', ('caption_1', 'caption_2')),
    (['image_name', ' comment_number', ' comment'], 'image_name', 'none', (' comment',)),
    (['image', 'caption', 'comment'], 'image', 'caption', ('none',)),
    (['image', 'captions', 'comment'], 'image', 'none', ('captions',)),
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


def test_spaces_around_a_name_need_not_be_given():
  names = ['image_name', ' comment_number', ' comment']
  assert guess(Columns(captions=('comment',)), names).captions == (' comment',)
  assert guess(Columns(captions=(' comment',)), names).captions == (' comment',)


def test_names_that_differ_by_case_or_spaces_are_all_taken():
  columns = guess(Columns(), ['image', 'Caption', ' caption', 'CAPTION '])
  assert (columns.alt_text, columns.captions) == ('Caption', (' caption', 'CAPTION '))


def test_an_empty_alt_text_beside_one_of_another_row_is_no_second_one():
  rows = [{'alt': ''}, {'alt': 'a'}, {'alt': 'NaN'}]
  assert texts_of(rows, Columns(alt_text='alt', captions=('none',))) == ('a', [])

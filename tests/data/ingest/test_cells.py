import numpy as np
import pytest

from tips_jax.data.ingest.cells import as_texts, decode_text, label_names, label_text


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


@pytest.mark.parametrize(
  'cell, texts',
  [
    ("['a', 'b']", ['a', 'b']),
    ('["it\'s", \'a "b"\', None]', ["it's", 'a "b"']),
    (str(np.array(['a b', "c's"])), ['a b', "c's"]),
    (repr(np.array(['a', 'b'], object)), ['a', 'b']),
    (str(np.array([f'word {i}' for i in range(40)])), [f'word {i}' for i in range(40)]),
    ('[{"raw": "a", "id": 1}, {"raw": "b"}]', ['a', 'b']),
    ("{'en': 'a', 'de': 'b'}", ['a', 'b']),
    ('{"a", "b"}', ['{"a", "b"}']),  # a set has no order
    ('[a dog] (left)', ['[a dog] (left)']),
    ('[a dog]', ['[a dog]']),
    ('[2020]', ['[2020]']),
    ('[' * 4000 + ']' * 4000, ['[' * 4000 + ']' * 4000]),
    ("['" + "\\'" * 100_000 + ']', ["['" + "\\'" * 100_000 + ']']),
  ],
)
def test_lists_written_as_text_by_json_python_and_numpy_are_lists(cell, texts):
  assert as_texts(cell) == texts


@pytest.mark.parametrize('cell', ['NaN', 'nan', 'None', 'null', ' NULL ', '<NA>', r'\N', 'N/A'])
def test_words_for_missing_values_are_no_texts(cell):
  assert as_texts(cell) == [''] and as_texts(['a', cell]) == ['a', '']
  assert as_texts(f'{cell.strip()} bread') == [f'{cell.strip()} bread']


def test_of_language_dictionaries_and_arrow_maps_the_values_are_texts():
  assert as_texts({'en': 'a', 'de': ['b', 'c'], 'fr': None}) == ['a', 'b', 'c']
  assert as_texts([('en', 'a'), ('de', 'b')]) == ['a', 'b']
  assert as_texts({'id': 3, 'box': [1, 2]}) == ['']


def test_nesting_without_end_is_an_empty_text():
  deep = 'a'
  for _ in range(5000):
    deep = [deep]
  assert as_texts(deep) == ['']


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32'])
def test_texts_are_read_in_utf_8_and_by_their_byte_order_mark(encoding):
  assert decode_text('café'.encode(encoding)) == 'café'


@pytest.mark.parametrize('encoding', ['latin-1', 'utf-16-le', 'utf-32-be', 'shift-jis'])
def test_other_encodings_are_errors_and_not_wrong_letters(encoding):
  with pytest.raises(ValueError):
    decode_text('café ア'.encode(encoding, 'ignore'))


@pytest.mark.parametrize(
  'values, names',
  [
    ([2, 0, None], ('0', '1', '2')),
    (['1', '-1', '3'], ('0', '1', '2', '3')),
    (['cat', '-1'], ('-1', 'cat')),
    (['007', '7'], ('007', '7')),
    (['1000000007', '5', '7'], ('5', '7', '1000000007')),
    (['9' * 5000, '1'], ('1', '9' * 5000)),
    (['²', '1'], ('1', '²')),
    (['apple', ' apple', 'apple\n', 'new\nline'], ('apple', 'new line')),
    ([['cat'], ['cat', 'dog'], [], {'a': 1}], ('cat',)),
    (['', 'NaN', float('nan'), 'a'], ('a',)),
    ([], ()),
  ],
)
def test_class_names_are_the_labels_as_written_or_whole_numbers_from_0(values, names):
  assert label_names(values) == names


def test_a_label_is_one_line_and_several_are_none():
  assert label_text(' new\nline ') == 'new line' and label_text(3) == '3'
  assert label_text(['a', 'b']) == label_text(None) == label_text({}) == ''

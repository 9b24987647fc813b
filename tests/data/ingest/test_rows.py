import json

import pytest

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.rows import parse_table


def parse(text, name='t.csv'):
  return parse_table(text.encode(), name)


def rows_of(text, name='t.csv'):
  rows, notes = parse(text, name)
  assert not notes
  return rows


# --- CSV and TSV --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'written, read',
  [
    ('"a \\"red, big\\" dog"', 'a "red, big" dog'),
    ('"a \\"red\\" dog"', 'a "red" dog'),
    ('"C:\\\\x \\"y\\""', 'C:\\x "y"'),
    ('"a ""red, big"" dog"', 'a "red, big" dog'),
    ('"two\nlines, one text"', 'two\nlines, one text'),
    ('a 5" pipe', 'a 5" pipe'),
    ('a\u2028b\x0bc\x0cd\x85e', 'a\u2028b\x0bc\x0cd\x85e'),
    ('x' * 200_000, 'x' * 200_000),
  ],
)
@pytest.mark.parametrize('line_end', ['\n', '\r\n'])
def test_a_csv_text_is_read_as_it_was_meant(written, read, line_end):
  text = line_end.join(['image,caption', f'0.jpg,{written}', '1.jpg,b', ''])
  assert rows_of(text) == [
    {'image': '0.jpg', 'caption': read},
    {'image': '1.jpg', 'caption': 'b'},
  ]


@pytest.mark.parametrize('separator, name', [('\t', 't.tsv'), ('\t', 't.csv'), (',', 't.csv')])
def test_a_quote_that_is_never_closed_swallows_no_row(separator, name):
  lines = ['image,caption', '0.jpg,"a dog', '1.jpg,b', '2.jpg,c "d" e']
  rows = rows_of('\n'.join(lines).replace(',', separator), name)
  assert [row['caption'] for row in rows] == ['"a dog', 'b', 'c "d" e']


@pytest.mark.parametrize('line_end', ['\n', '\r\n', '\r'])
def test_line_ends_are_no_part_of_a_text(line_end):
  text = line_end.join(['image\tcaption', '0.jpg\t"a dog', '1.jpg\tb', ''])
  assert [row['caption'] for row in rows_of(text, 't.tsv')] == ['"a dog', 'b']


def test_two_quotes_that_are_never_closed_merge_no_rows_of_a_tsv():
  rows = rows_of('image\tcaption\n0.jpg\t"a dog\n1.jpg\ta cat"\n2.jpg\tc\n', 't.tsv')
  assert [row['caption'] for row in rows] == ['"a dog', 'a cat"', 'c']


def test_quotes_around_whole_fields_of_a_tsv_are_no_part_of_them():
  assert rows_of('image\tcaption\n0.jpg\t"a ""b"""\n', 't.tsv')[0]['caption'] == 'a "b"'
  assert rows_of('image\tcaption\n0.jpg\t"a\nb"\n', 't.tsv')[0]['caption'] == 'a\nb'


def test_rows_with_more_fields_than_the_header_are_left_out_and_noted():
  rows, notes = parse('image,caption\n0.jpg,a red dog, running, fast\n1.jpg,a cat\n')
  assert rows == [{'image': '1.jpg', 'caption': 'a cat'}]
  assert [(note.kind, note.id, note.detail) for note in notes] == [
    ('bad_row', 't.csv:2', 'line 2: 4 fields, the header has 2')
  ]
  with pytest.raises(InputError, match='no rows.*of 1 left out, the first: line 2: 3 fields'):
    parse('image,caption\n0.jpg,a,b\n')


def test_rows_with_fewer_fields_are_kept_and_noted():
  rows, notes = parse('image,caption,more\n0.jpg,a\n')
  assert rows == [{'image': '0.jpg', 'caption': 'a'}] and notes[0].kind == 'short_row'


def test_columns_of_one_name_are_a_list():
  assert rows_of('image,caption,caption\n0.jpg,first,second\n') == [
    {'image': '0.jpg', 'caption': ['first', 'second']}
  ]
  (row,) = rows_of('{"image": "0.jpg", "caption": "first", "caption": "second"}', 't.json')
  assert row['caption'] == ['first', 'second']


def test_spaces_after_the_separator_are_no_part_of_a_field():
  rows = rows_of('image_name| comment_number| comment\n0.jpg| 0| "Two" people .\n')
  assert rows == [{'image_name': '0.jpg', 'comment_number': '0', 'comment': '"Two" people .'}]


def test_a_short_row_beside_quotes_does_not_stop_the_table_of_flickr30k():
  rows, notes = parse(
    'image_name| comment_number| comment\n0.jpg| 0| "Wait" sign .\n1.jpg| 4   A dog runs .\n'
  )
  assert rows[0]['comment'] == '"Wait" sign .'
  assert rows[1] == {'image_name': '1.jpg', 'comment_number': '4   A dog runs .'}
  assert [note.kind for note in notes] == ['short_row']


def test_csv_that_no_way_of_reading_fits_names_its_line():
  with pytest.raises(InputError, match='not a whole CSV table.*line 3'):
    parse('image,caption,x\n0.jpg,a,b\n1.jpg,"a "b" c\n')


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_tables_with_a_byte_order_mark(encoding):
  rows, _ = parse_table('image,caption\n0.jpg,ä\n'.encode(encoding), 't.csv')
  assert rows == [{'image': '0.jpg', 'caption': 'ä'}]


@pytest.mark.parametrize('name', ['t.csv', 't.json', 't.jsonl'])
def test_tables_in_other_encodings_are_errors_of_one_line(name):
  for text in ('image,caption\n0.jpg,café'.encode('latin-1'), 'image,caption'.encode('utf-16-le')):
    with pytest.raises(InputError, match='as UTF-8 text') as error:
      parse_table(text, name)
    assert '\n' not in str(error.value)


# --- JSON ---------------------------------------------------------------------------------------

ROWS = [{'image': '0.jpg', 'caption': 'a'}, {'image': '1.jpg', 'caption': 'b'}]
COCO = {
  'images': [{'id': 1, 'file_name': '0.jpg'}, {'id': 2, 'file_name': '1.jpg'}],
  'annotations': [
    {'image_id': 2, 'caption': 'b', 'category_id': 7},
    {'image_id': 1, 'caption': 'a'},
    {'image_id': 1, 'caption': 'c'},
  ],
  'categories': [{'id': 7, 'name': 'dog'}],
}


@pytest.mark.parametrize('name', ['t.json', 't.jsonl', 't.ndjson'])
@pytest.mark.parametrize(
  'text',
  [
    json.dumps(ROWS),
    json.dumps(ROWS, indent=1),
    '\n'.join(map(json.dumps, ROWS)) + '\n\n',
    '\r\n'.join(json.dumps(row, indent=1) for row in ROWS),
    json.dumps({'version': 1, 'data': ROWS}),
    json.dumps({'image': ['0.jpg', '1.jpg'], 'caption': ['a', 'b']}),
    json.dumps({'image': {'0': '0.jpg', '1': '1.jpg'}, 'caption': {'0': 'a', '1': 'b'}}),
    json.dumps(
      {'columns': ['image', 'caption'], 'index': [0, 1], 'data': [['0.jpg', 'a'], ['1.jpg', 'b']]}
    ),
    json.dumps({'0': ROWS[0], '1': ROWS[1]}),
    json.dumps({'0.jpg': {'caption': 'a'}, '1.jpg': {'caption': 'b'}}),
  ],
)
def test_every_usual_form_of_json_is_read_under_every_ending(text, name):
  assert rows_of(text, name) == ROWS


def test_texts_by_image_name():
  assert rows_of('{"0.jpg": ["a", "b"], "1.JPG": "c"}', 't.json') == [
    {'image': '0.jpg', 'captions': ['a', 'b']},
    {'image': '1.JPG', 'captions': 'c'},
  ]
  one = {'train_0.jpg': [{'caption': 'a'}]}
  assert rows_of(json.dumps(one), 't.json') == [
    {'image': 'train_0.jpg', 'captions': [{'caption': 'a'}]}
  ]


def test_one_object_with_an_image_is_one_row():
  assert rows_of('{"image": "0.jpg", "caption": "a"}', 't.json') == ROWS[:1]


def test_coco_annotations_join_their_images():
  rows = rows_of(json.dumps(COCO), 't.json')
  assert [(row['file_name'], row['caption'], row['category']) for row in rows] == [
    ('0.jpg', 'a', None),
    ('0.jpg', 'c', None),
    ('1.jpg', 'b', 'dog'),
  ]
  other = {
    **COCO,
    'annotations': [{'image_id': 1, 'caption': 'a'}, {'image_id': 9, 'caption': 'x'}],
  }
  rows, notes = parse(json.dumps(other), 't.json')
  assert [row.get('caption') for row in rows] == ['a', None]
  assert [(note.kind, note.id) for note in notes] == [('bad_row', 'image_id 9')]


def test_lists_by_split_say_their_split():
  rows = rows_of(json.dumps({'train': ROWS[:1], 'val': ROWS[1:]}), 't.json')
  assert [(row['image'], row['split']) for row in rows] == [('0.jpg', 'train'), ('1.jpg', 'val')]


@pytest.mark.parametrize('text', ['{}', '{"count": 1}', '{"default": {}}', '[]', '3', '[[1]]', ''])
def test_json_that_is_no_table_says_which_forms_are(text):
  with pytest.raises(InputError, match='no rows.*COCO, pandas'):
    parse(text, 't.json')


def test_values_that_are_no_objects_are_noted():
  rows, notes = parse('[{"image": "0.jpg"}, 3, ["x"]]', 't.json')
  assert len(rows) == 1 and [note.detail for note in notes] == [
    'value 2: int; expected an object',
    'value 3: list; expected an object',
  ]


@pytest.mark.parametrize(
  'text, message',
  [
    ('{"image": "0.jpg"}\n{oops\n', 't.json:2 is not JSON'),
    ('[{"image": "0.jpg"},\n', 't.json:2 is not JSON'),
    ('[' * 100_000, 'is not JSON'),
    ('{"a":' * 100_000, 'is not JSON'),
    ('9' * 5000, 'is not JSON'),
  ],
)
def test_damaged_json_names_its_line(text, message):
  with pytest.raises(InputError, match=message) as error:
    parse(text, 't.json')
  assert '\n' not in str(error.value)

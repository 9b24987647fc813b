import csv
import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.columns import Columns
from tips_jax.data.ingest.formats import open_input
from tips_jax.data.ingest.reader import Options


def jpeg(i, *, size=(24, 20), kind='jpeg'):
  pixels = np.random.default_rng(i).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, kind)
  return out.getvalue()


def write_images(folder, count):
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(count):
    (folder / f'{i}.jpg').write_bytes(jpeg(i))


def write_zip(path, count, prefix=''):
  with zipfile.ZipFile(path, 'w') as archive:
    for i in range(count):
      archive.writestr(f'{prefix}{i}.jpg', jpeg(i))


def write_jsonl(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def write_csv(path, header, rows, delimiter=','):
  with open(path, 'w', newline='') as file:
    csv.writer(file, delimiter=delimiter).writerows([header, *rows])


def read(path, **options):
  return list(open_input(str(path), Options(**options)))


@pytest.mark.parametrize('separator', ['|', '| '])  # the authors', and Kaggle's results.csv
def test_flickr30k_needs_no_flag(tmp_path, separator):
  write_images(tmp_path, 2)
  rows = [['image_name', 'comment_number', 'comment']]
  for image in range(2):
    for number in range(5):
      rows.append([f'{image}.jpg', str(number), f'Text {number} of {image} , "as said" .'])
  lines = [separator.join(row) + '\n' for row in rows]
  (tmp_path / 'results.csv').write_text(''.join(lines))
  samples = read(tmp_path / 'results.csv')
  assert [s.key for s in samples] == ['0.jpg', '1.jpg']
  assert samples[1].alt_text == ''
  assert samples[1].captions == [f'Text {n} of 1 , "as said" .' for n in range(5)]


def test_folder_with_jsonl(tmp_path):
  write_images(tmp_path / 'images', 3)
  write_jsonl(
    tmp_path / 'data.jsonl',
    [{'image': f'{i}.jpg', 'alt_text': f'alt {i}', 'captions': ['x', f'y{i}']} for i in range(3)],
  )
  samples = read(tmp_path)
  assert [s.key for s in samples] == ['0.jpg', '1.jpg', '2.jpg']
  assert [s.image for s in samples] == [jpeg(i) for i in range(3)]
  assert (
    samples[2].alt_text == 'alt 2' and samples[2].captions == ['x', 'y2'] and samples[2].extra == {}
  )


@pytest.mark.parametrize(
  'delimiter, name', [(',', 'a.csv'), (';', 'a.csv'), ('\t', 'a.csv'), ('\t', 'a.tsv')]
)
def test_csv_with_numbered_captions_quotes_and_byte_order_mark(tmp_path, delimiter, name):
  write_images(tmp_path, 2)
  write_csv(
    tmp_path / name,
    ['file_name', 'caption', 'caption_1', 'caption_2'],
    [['0.jpg', 'a, "b"; c\nd', 'Ä', ''], ['1.jpg', '', 'x', 'y']],
    delimiter,
  )
  text = (tmp_path / name).read_bytes()
  (tmp_path / name).write_bytes(b'\xef\xbb\xbf' + text)
  first, second = read(tmp_path / name)
  assert first.alt_text == 'a, "b"; c d' and first.captions == ['Ä', '']
  assert second.alt_text == '' and second.captions == ['x', 'y']


def test_zip_beside_the_table_of_its_name_and_split(tmp_path):
  for split, count in (('train', 2), ('dev', 1)):
    write_zip(tmp_path / f'{split}.zip', count)
    write_jsonl(
      tmp_path / f'{split}.jsonl',
      [{'image': f'{i}.jpg', 'captions': list('abcde')} for i in range(count)],
    )
  assert len(read(tmp_path)) == 2 and len(read(tmp_path, split='dev')) == 1
  assert len(read(tmp_path / 'dev.jsonl')) == 1
  with pytest.raises(InputError, match="'train.jsonl'], none of split 'tset'"):
    read(tmp_path, split='tset')
  sample = read(tmp_path, first_caption_as_alt_text=True)[0]
  assert sample.alt_text == 'a' and sample.captions == list('bcde') and sample.image == jpeg(0)


def test_table_inside_the_zip_and_images_in_a_folder_of_it(tmp_path):
  write_zip(tmp_path / 'all.zip', 2, prefix='photos/')
  with zipfile.ZipFile(tmp_path / 'all.zip', 'a') as archive:
    archive.writestr('meta.csv', 'image,text\n0.jpg,zero\n1.jpg,one\n')
  assert [(s.image, s.alt_text) for s in read(tmp_path / 'all.zip')] == [
    (jpeg(0), 'zero'),
    (jpeg(1), 'one'),
  ]
  assert len(read(tmp_path)) == 2


def test_images_flag(tmp_path):
  write_images(tmp_path / 'far' / 'away', 2)
  (tmp_path / 'tables').mkdir()
  write_jsonl(
    tmp_path / 'tables' / 'a.jsonl',
    [{'image': '0.jpg', 'text': 'x'}, {'image': '1.jpg', 'text': 'y'}],
  )
  assert len(read(tmp_path / 'tables', images=str(tmp_path / 'far'))) == 2
  with pytest.raises(InputError, match='none of the first 2 images'):
    read(tmp_path / 'tables')
  with pytest.raises(InputError, match='does not exist'):
    read(tmp_path / 'tables', images=str(tmp_path / 'fra'))


def test_rows_that_repeat_an_image_are_one_sample(tmp_path):
  write_images(tmp_path, 2)
  write_csv(
    tmp_path / 'captions.csv',
    ['image', 'caption'],
    [['0.jpg', 'a'], ['1.jpg', 'x'], ['0.jpg', 'b'], ['0.jpg', 'a']],
  )
  first, second = read(tmp_path)
  assert (first.key, first.alt_text, first.captions) == ('0.jpg', '', ['a', 'b'])
  assert (second.alt_text, second.captions) == ('x', [])
  write_csv(
    tmp_path / 'captions.csv',
    ['image', 'alt', 'caption'],
    [['0.jpg', 'web', 'a'], ['0.jpg', 'web', 'b']],
  )
  (only,) = read(tmp_path)
  assert (only.alt_text, only.captions) == ('web', ['a', 'b'])


def test_labels_and_masks_of_a_table(tmp_path):
  write_images(tmp_path, 2)
  write_jsonl(
    tmp_path / 'a.jsonl',
    [
      {'image': '0.jpg', 'text': 'x', 'kind': 'dog', 'seg': '1.jpg'},
      {'image': '1.jpg', 'text': 'y', 'kind': 'cat'},
    ],
  )
  reader = open_input(str(tmp_path), Options(columns=Columns(label='kind', mask='seg')))
  assert reader.annotations == ('label', 'mask') and reader.label_names == ('cat', 'dog')
  assert [s.extra for s in reader] == [{'label': 'dog', 'mask': jpeg(1)}, {'label': 'cat'}]


def test_missing_files_are_samples_with_a_problem(tmp_path):
  write_images(tmp_path, 1)
  rows = [{'image': '0.jpg', 'text': 'x'}, {'image': 'gone.jpg', 'text': 'y'}, {'text': 'z'}]
  write_jsonl(tmp_path / 'a.jsonl', rows)
  problems = [(s.image is None, s.problem) for s in read(tmp_path)]
  assert problems == [(False, ''), (True, 'no such file'), (True, 'no such file')]


def test_damaged_zip_member_is_a_sample_with_a_problem(tmp_path):
  write_zip(tmp_path / 'a.zip', 2)
  data = bytearray((tmp_path / 'a.zip').read_bytes())
  at = data.find(jpeg(1)[-200:])
  data[at : at + 20] = bytes(20)
  (tmp_path / 'a.zip').write_bytes(data)
  write_jsonl(tmp_path / 'a.jsonl', [{'image': f'{i}.jpg', 'text': 'x'} for i in range(2)])
  good, bad = read(tmp_path)
  assert good.image == jpeg(0) and bad.image is None and 'CRC' in bad.problem


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('a.jsonl', b'{"image": "0.jpg"}\n{oops\n', r'a.jsonl:2 is not JSON'),
    ('a.jsonl', b'', 'has no rows'),
    ('a.json', b'{"image": 1}', 'text columns'),
    ('a.json', b'{"count": 1}', 'has no rows'),
    ('a.csv', b'image,text\n', 'has no rows'),
    ('a.csv', b'image,text\n0.jpg,\xff\xfe\n', 'as UTF-8'),
    ('a.zip', b'PK no zip', 'is not a complete zip'),
    ('a.jsonl', b'{"image": "http://x/y.jpg", "text": "t"}\n', 'web addresses.*img2dataset'),
    ('a.npz', b'', 'expected tars, parquet files, a zip, or one table'),
  ],
)
def test_bad_tables(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(InputError, match=message):
    read(tmp_path / name)


# --- which file an image name means -------------------------------------------------------------


def found(path, **options):
  return {sample.key: sample.image or sample.problem for sample in read(path, **options)}


def write_at(path, i):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(jpeg(i))


def test_an_absent_image_is_never_replaced_by_one_of_another_folder(tmp_path):
  write_at(tmp_path / 'dogs' / '1.jpg', 1)
  write_at(tmp_path / 'dogs' / '2.jpg', 2)
  rows = [['cats/1.jpg', 'a cat'], ['dogs/2.jpg', 'a dog']]
  write_csv(tmp_path / 't.csv', ['image', 'caption'], rows)
  assert found(tmp_path) == {'cats/1.jpg': 'no such file', 'dogs/2.jpg': jpeg(2)}
  write_csv(tmp_path / 't.csv', ['image', 'caption'], rows[:1])
  with pytest.raises(InputError, match='none of the first 1 images'):
    read(tmp_path)


def test_an_absent_image_is_never_replaced_by_one_of_another_zip(tmp_path):
  write_zip(tmp_path / 'images.zip', 1)
  write_zip(tmp_path / 'masks.zip', 2, prefix='masks/')
  write_csv(tmp_path / 't.csv', ['image', 'caption'], [['0.jpg', 'a'], ['1.jpg', 'b']])
  assert found(tmp_path) == {'0.jpg': jpeg(0), '1.jpg': 'no such file'}


def test_one_name_in_two_zips_is_not_guessed(tmp_path):
  write_zip(tmp_path / 'a.zip', 1)
  write_zip(tmp_path / 'b.zip', 2)
  write_csv(tmp_path / 't.csv', ['image', 'caption'], [['0.jpg', 'a'], ['1.jpg', 'b']])
  assert found(tmp_path) == {'0.jpg': '2 files of this name', '1.jpg': jpeg(1)}


def test_names_without_folders_are_found_in_any_folder(tmp_path):
  write_at(tmp_path / '00000' / '0.jpg', 0)
  write_at(tmp_path / '00001' / '1.jpg', 1)
  write_at(tmp_path / '00001' / '2.jpg', 2)
  write_at(tmp_path / '00002' / '2.jpg', 3)
  write_csv(tmp_path / 't.csv', ['image', 'caption'], [[f'{i}.jpg', 'a'] for i in range(3)])
  assert found(tmp_path) == {
    '0.jpg': jpeg(0),
    '1.jpg': jpeg(1),
    '2.jpg': '2 files of this name',
  }


@pytest.mark.parametrize(
  'names',
  ['/home/x/train/{}/1.jpg', 'C:\\x\\{}\\1.jpg', './{}/1.jpg', 'x/{}/1.jpg', 'file:///x/{}/1.jpg'],
)
def test_paths_of_another_machine_keep_the_folders_in_which_they_differ(tmp_path, names):
  write_at(tmp_path / 'cats' / '1.jpg', 1)
  write_at(tmp_path / 'dogs' / '1.jpg', 2)
  rows = [[names.format(kind), kind] for kind in ('cats', 'dogs', 'birds')]
  write_csv(tmp_path / 't.csv', ['image', 'caption'], rows)
  assert list(found(tmp_path).values()) == [jpeg(1), jpeg(2), 'no such file']


def test_a_folder_of_hidden_files_of_a_mac_is_no_second_table(tmp_path):
  write_images(tmp_path, 1)
  write_csv(tmp_path / 't.csv', ['image', 'caption'], [['0.jpg', 'a']])
  (tmp_path / '._t.csv').write_bytes(b'\0\5\x16\7mac')
  assert found(tmp_path) == {'0.jpg': jpeg(0)}
  with zipfile.ZipFile(tmp_path / 'all.zip', 'w') as archive:
    archive.writestr('data/0.jpg', jpeg(0))
    archive.writestr('data/t.csv', 'image,caption\n0.jpg,a\n')
    archive.writestr('__MACOSX/data/._0.jpg', b'mac')
    archive.writestr('__MACOSX/data/._t.csv', b'\0mac')
  assert found(tmp_path / 'all.zip') == {'0.jpg': jpeg(0)}


# --- tables in zips -----------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['t.csv', 't.jsonl'])
def test_line_separators_inside_a_caption_split_no_row_of_a_zip(tmp_path, name):
  captions = ['a red\u2028dog', 'b\x0bc', 'd\x85e']
  lines = [f'{i}.jpg,{caption}' for i, caption in enumerate(captions)]
  text = '\n'.join(['image,caption', *lines])
  if name == 't.jsonl':
    rows = [{'image': f'{i}.jpg', 'caption': text} for i, text in enumerate(captions)]
    text = '\n'.join(json.dumps(row, ensure_ascii=False) for row in rows)
  write_zip(tmp_path / 'a.zip', 3)
  with zipfile.ZipFile(tmp_path / 'a.zip', 'a') as archive:
    archive.writestr(name, text)
  assert [s.alt_text for s in read(tmp_path / 'a.zip')] == ['a red dog', 'b c', 'd e']


def damaged_zip(path, damage):
  """A zip with a table, whose bytes are changed by `damage`."""
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('t.csv', 'image,caption\n' + '0.jpg,a\n' * 50)
    archive.writestr('0.jpg', jpeg(0))
  data = bytearray(path.read_bytes())
  damage(data)
  path.write_bytes(data)


def encrypt(data):
  data[6] |= 1
  data[data.find(b'PK\1\2') + 8] |= 1


def cut_header(data):
  data[:4] = b'xxxx'


def flip(data):
  data[45] ^= 255


def unknown_compression(data):
  data[data.find(b'PK\1\2') + 10] = 77


@pytest.mark.parametrize('damage', [encrypt, cut_header, flip, unknown_compression])
def test_a_table_that_cannot_be_taken_from_its_zip_is_an_error_of_one_line(tmp_path, damage):
  damaged_zip(tmp_path / 'a.zip', damage)
  with pytest.raises(InputError, match='a.zip/t.csv') as error:
    read(tmp_path / 'a.zip')
  assert '\n' not in str(error.value)


def test_a_member_that_declares_gigabytes_is_not_read(tmp_path):
  write_zip(tmp_path / 'a.zip', 2)
  data = bytearray((tmp_path / 'a.zip').read_bytes())
  at = data.find(b'PK\1\2') + 24
  data[at : at + 4] = (2**32 - 2).to_bytes(4, 'little')
  (tmp_path / 'a.zip').write_bytes(data)
  write_csv(tmp_path / 'a.csv', ['image', 'caption'], [['0.jpg', 'a'], ['1.jpg', 'b']])
  bad, good = read(tmp_path / 'a.csv')
  assert bad.image is None and '4,294,967,294 bytes; expected at most' in bad.problem
  assert good.image == jpeg(1)


# --- splits and labels --------------------------------------------------------------------------


def test_a_column_named_split_chooses_rows_and_counts_the_others(tmp_path):
  write_images(tmp_path, 4)
  splits = ['train', 'val', 'restval', 'val']
  rows = [[f'{i}.jpg', 'x', split] for i, split in enumerate(splits)]
  write_csv(tmp_path / 't.csv', ['image', 'caption', 'split'], rows)
  reader = open_input(str(tmp_path), Options())
  assert [s.key for s in reader] == ['0.jpg']
  assert [(n.kind, n.id, n.count) for n in reader.notes] == [
    ('other_split', 'val', 2),
    ('other_split', 'restval', 1),
  ]
  assert [s.key for s in read(tmp_path, split='validation')] == ['1.jpg', '3.jpg']
  with pytest.raises(InputError, match="none of split 'test'"):
    read(tmp_path, split='test')


def test_rows_whose_images_are_in_folders_of_splits_do_not_mix(tmp_path):
  write_at(tmp_path / 'train' / '0.jpg', 0)
  write_at(tmp_path / 'test' / '1.jpg', 1)
  write_csv(tmp_path / 'm.csv', ['file_name', 'text'], [['train/0.jpg', 'a'], ['test/1.jpg', 'b']])
  assert found(tmp_path) == {'train/0.jpg': jpeg(0)}
  assert found(tmp_path, split='test') == {'test/1.jpg': jpeg(1)}


def test_a_column_of_other_words_named_split_chooses_nothing(tmp_path):
  write_images(tmp_path, 2)
  rows = [['0.jpg', 'x', 'left'], ['1.jpg', 'y', 'right']]
  write_csv(tmp_path / 't.csv', ['image', 'caption', 'split'], rows)
  assert len(read(tmp_path)) == 2 and len(read(tmp_path, split='left')) == 1


def test_labels_are_names_as_written_and_what_differs_is_noted(tmp_path):
  write_images(tmp_path, 5)
  labels = ['007', ' 007', 'new\nline', None, ['a', 'b']]
  rows = [{'image': f'{i}.jpg', 'text': 'x', 'k': label} for i, label in enumerate(labels)]
  write_jsonl(tmp_path / 'a.jsonl', [*rows, {'image': '0.jpg', 'text': 'x', 'k': '7'}])
  reader = open_input(str(tmp_path), Options(columns=Columns(label='k')))
  assert reader.label_names == ('007', '7', 'new line')
  samples = list(reader)
  assert [s.extra.get('label') for s in samples] == ['007', '007', 'new line', None, None]
  assert [[note.kind for note in s.notes] for s in samples] == [
    ['other_label'],
    ['label_spaces'],
    ['label_spaces'],
    [],
    [],
  ]


def test_an_image_cell_with_several_names_is_a_bad_row(tmp_path):
  write_images(tmp_path, 1)
  rows = [{'image': ['0.jpg', '1.jpg'], 'text': 'x'}, {'image': '0.jpg', 'text': 'y'}]
  write_jsonl(tmp_path / 'a.jsonl', rows)
  reader = open_input(str(tmp_path), Options())
  assert [s.alt_text for s in reader] == ['y'] and reader.notes[0].kind == 'bad_row'
  write_jsonl(tmp_path / 'a.jsonl', rows[:1])
  with pytest.raises(InputError, match='no row .* names one image'):
    read(tmp_path)


@pytest.mark.parametrize('column', ['image', 'text', 'split', 'kind'])
def test_brackets_in_brackets_are_no_name_and_no_text(tmp_path, column):
  write_images(tmp_path, 1)
  deep = '[' * 900 + ']' * 900
  plain = {'image': '"0.jpg"', 'text': '"x"', 'split': '"train"', 'kind': '"k"'}
  lines = []
  for cells in (plain, {**plain, column: deep}):
    lines.append('{' + ', '.join(f'"{name}": {cell}' for name, cell in cells.items()) + '}')
  (tmp_path / 't.jsonl').write_text('\n'.join(lines))
  (sample,) = read(tmp_path, columns=Columns(label='kind'))
  assert (sample.key, sample.alt_text, sample.extra) == ('0.jpg', 'x', {'label': 'k'})


def test_folders_that_are_named_as_data_are_none(tmp_path):
  write_images(tmp_path, 1)
  write_csv(tmp_path / 't.csv', ['image', 'caption'], [['0.jpg', 'a']])
  for name in ('x.tar', 'y.csv', 'z.parquet'):
    (tmp_path / name).mkdir()
  assert found(tmp_path) == {'0.jpg': jpeg(0)}

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
  with pytest.raises(InputError, match="expected one, or one named after the split 'tset'"):
    read(tmp_path, split='tset')
  sample = read(tmp_path, first_caption_as_alt_text=True)[0]
  assert sample.alt_text == 'a' and sample.captions == list('bcde') and sample.image == jpeg(0)


def test_table_inside_the_zip_and_images_in_a_folder_of_it(tmp_path):
  write_zip(tmp_path / 'all.zip', 2, prefix='photos/')
  with zipfile.ZipFile(tmp_path / 'all.zip', 'a') as archive:
    archive.writestr('meta.csv', 'image,text\n0.jpg,zero\nphotos/1.jpg,one\n')
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
    ('a.json', b'{"image": 1}', 'has no rows'),
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

import base64
import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from hypothesis import given
from PIL import Image
from tensorboardX import record_writer

from tests.damage import FUZZ, damaged
from tips_jax.core.errors import InputError
from tips_jax.data.ingest import archives, arrow_rows, columnar
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


def read(path, **options):
  return list(open_input(str(path), Options(**options)))


def image_rows(count):
  return {
    'image': [{'bytes': jpeg(i), 'path': f'{i}.jpg'} for i in range(count)],
    'caption': [f'alt {i}' for i in range(count)],
    'recaptions': [['long', f'short {i}'][: i % 3] for i in range(count)],
    'label': [i % 2 for i in range(count)],
  }


def hf_table(count):
  features = {
    'label': {'_type': 'ClassLabel', 'names': ['cat', 'dog']},
    'image': {'_type': 'Image'},
  }
  metadata = {'huggingface': json.dumps({'info': {'features': features}})}
  table = pa.table(image_rows(count))
  return table.replace_schema_metadata(metadata)


def check_rows(samples, count):
  assert [s.image for s in samples] == [jpeg(i) for i in range(count)]
  assert [s.alt_text for s in samples] == [f'alt {i}' for i in range(count)]
  assert [s.captions for s in samples] == [['long', f'short {i}'][: i % 3] for i in range(count)]


def test_parquet_with_structs_over_several_files_of_a_split(tmp_path):
  pq.write_table(hf_table(100), tmp_path / 'train-00000-of-00002.parquet', row_group_size=30)
  pq.write_table(hf_table(100).slice(0, 0), tmp_path / 'train-00001-of-00002.parquet')
  pq.write_table(hf_table(2), tmp_path / 'test-00000-of-00001.parquet')
  check_rows(read(tmp_path), 100)
  check_rows(read(tmp_path, split='test'), 2)
  reader = open_input(str(tmp_path), Options(columns=Columns(label='label')))
  assert (
    reader.label_names == ('cat', 'dog')
    and reader.total == 100
    and next(iter(reader)).extra == {'label': 0}
  )
  assert next(iter(reader)).key == '0.jpg'


def test_parquet_with_bytes_under_an_unusual_name_and_with_paths(tmp_path):
  pq.write_table(pa.table({'picture': [jpeg(0), None], 'TEXT': ['a', 'b']}), tmp_path / 'a.parquet')
  first, second = read(tmp_path / 'a.parquet')
  assert first.image == jpeg(0) and first.alt_text == 'a' and first.key == 'a.parquet:0'
  assert second.image is None and second.problem == 'empty image cell'
  write_images(tmp_path / 'pictures', 1)
  pq.write_table(
    pa.table({'path': ['pictures/0.jpg', 'gone.jpg'], 'text': ['a', 'b']}), tmp_path / 'b.parquet'
  )
  first, second = read(tmp_path / 'b.parquet')
  assert (
    first.image == jpeg(0) and first.key == 'pictures/0.jpg' and second.problem == 'no such file'
  )
  pq.write_table(pa.table({'image': ['https://x/y.jpg'], 'text': ['a']}), tmp_path / 'c.parquet')
  with pytest.raises(InputError, match='web addresses'):
    read(tmp_path / 'c.parquet')


def test_labels_of_parquet_are_names_as_written(tmp_path):
  labels = [1_000_000_007, 5, None]
  rows = {'image': [jpeg(i) for i in range(3)], 'text': ['a'] * 3, 'k': labels}
  pq.write_table(pa.table(rows), tmp_path / 'a.parquet')
  reader = open_input(str(tmp_path), Options(columns=Columns(label='k')))
  assert reader.label_names == ('5', '1000000007')
  assert [s.extra['label'] for s in reader] == ['1000000007', '5', '']


def test_names_of_columns_that_are_not_utf8_are_an_error_in_one_line(tmp_path):
  save_to_disk(tmp_path / 'one', pa.table({'image': [jpeg(0)], 'caption': ['a']}))
  file = tmp_path / 'one' / 'data-00000-of-00001.arrow'
  file.write_bytes(file.read_bytes().replace(b'caption', b'c\xb0ption'))
  with pytest.raises(InputError, match='names in UTF-8') as error:
    read(tmp_path / 'one')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('form', ['parquet', 'arrow'])
def test_a_column_named_split_chooses_rows_and_counts_the_others(tmp_path, form):
  splits = ['train', 'val', 'restval', 'train', None]
  rows = {
    'image': [jpeg(i) for i in range(5)],
    'text': ['a'] * 5,
    'k': list('abcde'),
    'Split': splits,
  }
  if form == 'parquet':
    pq.write_table(pa.table(rows), tmp_path / 'a.parquet')
  else:
    save_to_disk(tmp_path / 'one', pa.table(rows))
  reader = open_input(str(tmp_path), Options(columns=Columns(label='k')))
  assert [sample.image for sample in reader] == [jpeg(0), jpeg(3)]
  assert reader.total == 2 and reader.label_names == ('a', 'd')
  notes = [(note.kind, note.id, note.count) for note in reader.notes if note.kind == 'other_split']
  assert notes == [
    ('other_split', 'val', 1),
    ('other_split', 'restval', 1),
    ('other_split', '(none)', 1),
  ]
  (sample,) = read(tmp_path, split='validation')
  assert sample.image == jpeg(1) and sample.key.endswith(':1')
  with pytest.raises(InputError, match="column 'Split'.*none of split 'test'"):
    read(tmp_path, split='test')


@pytest.mark.parametrize('cells', [['left', 'right'], [1, 2], [['train'], ['test']]])
def test_a_column_of_other_cells_named_split_chooses_nothing(tmp_path, cells):
  rows = {'image': [jpeg(0), jpeg(1)], 'text': ['a', 'b'], 'split': cells}
  pq.write_table(pa.table(rows), tmp_path / 'a.parquet')
  assert len(read(tmp_path)) == 2


def test_splits_that_hugging_face_keeps_as_classes_choose_rows(tmp_path):
  rows = pa.table({'image': [jpeg(0), jpeg(1)], 'text': ['a', 'b'], 'split': [1, 0]})
  features = {'split': {'_type': 'ClassLabel', 'names': ['train', 'test']}}
  metadata = {'huggingface': json.dumps({'info': {'features': features}})}
  pq.write_table(rows.replace_schema_metadata(metadata), tmp_path / 'a.parquet')
  assert [sample.image for sample in read(tmp_path)] == [jpeg(1)]


def test_of_arrow_maps_the_values_are_captions(tmp_path):
  texts = pa.array([[('en', 'a'), ('de', 'b')]], pa.map_(pa.string(), pa.string()))
  pq.write_table(pa.table({'image': [jpeg(0)], 'captions': texts}), tmp_path / 'a.parquet')
  assert read(tmp_path)[0].captions == ['a', 'b']


@pytest.mark.parametrize(
  'cells, kind',
  [
    ([1, 2], 'int64'),
    ([0.5, None], 'double'),
    ([[jpeg(0)], [jpeg(1)]], 'list<element: binary>'),
    ([[{'bytes': jpeg(0), 'path': 'a'}], []], 'list<element: struct'),
    ([[[[1, 2, 3]]]] * 2, 'list<element: list'),
    ([{'bytes': 'text', 'other': 1}] * 2, 'struct<bytes: string'),
    ([True, False], 'bool'),
  ],
)
def test_an_image_column_of_another_kind_is_an_error_in_one_line(tmp_path, cells, kind):
  table = pa.table({'image': cells, 'text': ['a', 'b'], 'photo': [jpeg(0)] * 2})
  pq.write_table(table, tmp_path / 'a.parquet')
  message = f"image column 'image' holds {kind}.*expected encoded images as bytes.*'photo'"
  with pytest.raises(InputError, match=message) as error:
    read(tmp_path / 'a.parquet', columns=Columns(image='image'))
  assert '\n' not in str(error.value)
  # Without the flag the column that can be read is taken.
  assert read(tmp_path / 'a.parquet')[1].image == jpeg(0)


def test_images_as_base64_text_are_refused_with_the_remedy(tmp_path):
  text = base64.b64encode(jpeg(0)).decode()
  for i, cell in enumerate((text, 'data:image/jpeg;base64,' + text)):
    file = tmp_path / f'{i}.parquet'
    pq.write_table(pa.table({'image': [cell], 'text': ['a']}), file)
    with pytest.raises(InputError, match='holds base64 text .*base64.b64decode'):
      read(file)


def test_odd_names_of_image_files_are_missing_files(tmp_path):
  names = ['a' * 190 + '-' * 4000, 'with\0nul', '~nobody/x.jpg', '', None, '../' * 40, '.']
  table = pa.table({'image': names, 'text': ['a'] * len(names)})
  pq.write_table(table, tmp_path / 'a.parquet')
  samples = read(tmp_path / 'a.parquet')
  assert [sample.image for sample in samples] == [None] * len(names)
  assert {sample.problem for sample in samples} == {'no such file', 'empty image cell'}


def test_the_bytes_that_are_images_are_found_among_other_bytes(tmp_path):
  columns = {'digest': [b'0' * 20], 'picture': [jpeg(0)], 'path': ['first/name.jpg'], 'text': ['a']}
  pq.write_table(pa.table(columns), tmp_path / 'a.parquet')
  assert [sample.image for sample in read(tmp_path / 'a.parquet')] == [jpeg(0)]


def not_utf8(texts):
  return pa.array(texts, pa.binary()).view(pa.string())


def test_text_that_is_not_utf8_is_read_with_replacement_characters(tmp_path):
  texts = not_utf8([b'\xffab', b'whole'])
  lists = pa.ListArray.from_arrays([0, 1, 2], texts)
  table = pa.table({'image': [jpeg(0), jpeg(1)], 'text': texts, 'captions': lists})
  pq.write_table(table, tmp_path / 'a.parquet')
  first, second = read(tmp_path / 'a.parquet')
  assert (first.alt_text, first.captions) == ('\ufffdab', ['\ufffdab'])
  assert (second.alt_text, second.captions) == ('whole', ['whole'])


def test_a_column_that_is_missing_or_twice_is_an_error(tmp_path):
  table = pa.table({'image': [jpeg(0)], 'text': ['a']})
  pq.write_table(table, tmp_path / 'train-00000.parquet')
  pq.write_table(table.rename_columns(['image', 'words']), tmp_path / 'train-00001.parquet')
  with pytest.raises(InputError, match="train-00001.*got 0 columns 'text'"):
    read(tmp_path)
  pq.write_table(table.append_column('text', [['b']]), tmp_path / 'twice.parquet')
  with pytest.raises(InputError, match="got 2 columns 'text'"):
    read(tmp_path / 'twice.parquet')


def test_truncated_parquet(tmp_path):
  pq.write_table(hf_table(20), tmp_path / 'a.parquet')
  os.truncate(tmp_path / 'a.parquet', 3000)
  with pytest.raises(InputError, match='not a complete parquet file'):
    read(tmp_path)


def save_to_disk(folder, table):
  folder.mkdir(parents=True)
  with pa.ipc.new_stream(str(folder / 'data-00000-of-00001.arrow'), table.schema) as writer:
    writer.write_table(table, max_chunksize=70)
  (folder / 'state.json').write_text(
    json.dumps({'_data_files': [{'filename': 'data-00000-of-00001.arrow'}]})
  )
  (folder / 'dataset_info.json').write_text('{}')


def repeated(value, count):
  """An array of `count` times the same value, held once."""
  return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int8()), [value])


def test_cells_that_are_too_large_are_counted_with_their_column(tmp_path, monkeypatch):
  monkeypatch.setattr(archives, 'MAX_BYTES', 30_000)
  monkeypatch.setattr(arrow_rows, '_MAX_TEXTS', 2_000)
  rows = {
    'image': [jpeg(0), bytes(40_000), jpeg(2), jpeg(3)],
    'caption': ['a', 'b', 'c' * 3_000, 'd'],
    'captions': [['e'], ['f'], ['g'], ['h'] * 300],  # of eight bytes each, at least
  }
  pq.write_table(pa.table(rows), tmp_path / 'a.parquet', compression='none')
  samples = read(tmp_path / 'a.parquet')
  assert [sample.image for sample in samples] == [jpeg(0), None, jpeg(2), jpeg(3)]
  assert [sample.problem for sample in samples] == [
    '',
    'image: 40,012 bytes; expected at most 30,000',
    'caption: 3,012 bytes; expected at most 2,000',
    'captions: 2,408 bytes; expected at most 2,000',
  ]
  assert [sample.alt_text for sample in samples] == ['a', 'b', '', 'd']
  assert [sample.captions for sample in samples] == [['e'], ['f'], ['g'], []]


def test_parquet_that_expands_too_far_is_one_line_before_a_row_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(archives, 'MAX_BYTES', 2**20)
  monkeypatch.setattr(columnar.ParquetReader, '_batches', None)
  file = tmp_path / 'a.parquet'
  rows = {'image': [bytes(2**18)] * 5, 'caption': ['a'] * 5}
  pq.write_table(pa.table(rows), file, compression='zstd', use_dictionary=False)
  with pytest.raises(InputError, match='bytes of it expand to 1,310,') as error:
    read(file)
  assert '\n' not in str(error.value)
  many = pa.ListArray.from_arrays([0, 2**20], pa.nulls(2**20, pa.int8()))  # no bytes at all
  pq.write_table(pa.table({'image': [jpeg(0)], 'caption': many}), file)
  with pytest.raises(InputError, match='expand to 4,19'):
    read(file)


def test_one_huge_text_in_many_rows_ends_in_one_line(tmp_path):
  rows = {'image': repeated(jpeg(0), 100), 'caption': repeated('a' * 2**24, 100)}
  file = tmp_path / 'a.parquet'
  pq.write_table(pa.table(rows), file, compression='zstd', store_schema=False)
  with pytest.raises(InputError, match='17 rows have cells that are too large, the last one capt'):
    read(file)


def test_hugging_face_folder(tmp_path):
  save_to_disk(tmp_path / 'one', hf_table(100))
  check_rows(read(tmp_path / 'one'), 100)
  reader = open_input(str(tmp_path / 'one'), Options(columns=Columns(label='label')))
  assert reader.total == 100 and reader.label_names == ('cat', 'dog')


def test_hugging_face_dict_of_splits(tmp_path):
  for split, count in (('train', 4), ('validation', 2)):
    save_to_disk(tmp_path / 'both' / split, hf_table(count))
  (tmp_path / 'both' / 'dataset_dict.json').write_text('{"splits": ["train", "validation"]}')
  check_rows(read(tmp_path / 'both'), 4)
  check_rows(read(tmp_path / 'both', split='validation'), 2)
  with pytest.raises(InputError, match="got 'valid'.*did you mean 'validation'"):
    read(tmp_path / 'both', split='valid')


def test_truncated_arrow(tmp_path):
  save_to_disk(tmp_path / 'cut', hf_table(100))
  file = tmp_path / 'cut' / 'data-00000-of-00001.arrow'
  os.truncate(file, file.stat().st_size // 2)
  with pytest.raises(InputError, match='truncated or damaged'):
    read(tmp_path / 'cut')


def test_offsets_that_point_outside_of_an_arrow_file_are_an_error(tmp_path):
  """They ended the process."""
  save_to_disk(tmp_path / 'odd', hf_table(3))
  file = tmp_path / 'odd' / 'data-00000-of-00001.arrow'
  data = file.read_bytes()
  size = len(jpeg(0))
  offsets = np.array([0, size, size + len(jpeg(1))], np.int32).tobytes()
  assert data.count(offsets) == 1
  file.write_bytes(data.replace(offsets, offsets[:4] + b'\x00\x00\x00\x7f' + offsets[8:]))
  with pytest.raises(InputError, match='truncated or damaged, not an Arrow stream .*bounds'):
    read(tmp_path / 'odd')


@pytest.mark.parametrize(
  'state',
  [
    '[]',
    '{}',
    'null',
    '{"_data_files": 3}',
    '{"_data_files": ["a"]}',
    '{"_data_files": [{}]}',
    '{"_data_files": [{"filename": 3}]}',
    '{"_data_files": [{"filename": "../one/data-00000-of-00001.arrow"}]}',
    '{"_data_files": [{"filename": "gone.arrow"}]}',
    '[' * 100_000,
    b'\xff\xfe',
  ],
)
def test_an_odd_state_of_a_hugging_face_folder_is_an_error_in_one_line(tmp_path, state):
  save_to_disk(tmp_path / 'one', hf_table(3))
  state = state if isinstance(state, bytes) else state.encode()
  (tmp_path / 'one' / 'state.json').write_bytes(state)
  with pytest.raises(InputError) as error:
    read(tmp_path / 'one')
  assert 'one' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('form', ['parquet', 'plain parquet', 'arrow', 'state.json'])
def test_damaged_files_are_read_or_an_input_error(tmp_path, form):
  table = hf_table(3)
  folder = tmp_path / 'one'
  save_to_disk(folder, table)
  file = tmp_path / 'a.parquet'
  if form == 'parquet':
    pq.write_table(table, file)
  elif form == 'plain parquet':
    pq.write_table(table, file, use_dictionary=False, compression='none', write_statistics=False)
  elif form == 'arrow':
    file = folder / 'data-00000-of-00001.arrow'
  else:
    file = folder / 'state.json'
  whole = file.read_bytes()

  @FUZZ
  @given(damaged(whole))
  def check(data):
    file.write_bytes(data)
    try:
      for sample in read(file if 'parquet' in form else folder, columns=Columns(label='label')):
        assert sample.image is not None or sample.problem
    except InputError as error:
      assert '\n' not in str(error)

  check()


class CocoLike(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('2.0.0')

  def _info(self):
    f = tfds.features
    return tfds.core.DatasetInfo(
      builder=self,
      features=f.FeaturesDict(
        {
          'image': f.Image(shape=(None, None, 3), encoding_format='jpeg'),
          'image/filename': f.Text(),
          'captions': f.Sequence({'id': np.int64, 'text': f.Text()}),
          'label': f.ClassLabel(names=['cat', 'dog']),
          'mask': f.Image(shape=(None, None, 1), encoding_format='png'),
          'depth': f.Tensor(shape=(2,), dtype=np.float32),
          'boxes': f.Sequence(f.BBoxFeature()),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(6), 'test': self._generate_examples(2)}

  def _generate_examples(self, count):
    for i in range(count):
      yield (
        i,
        {
          'image': io.BytesIO(jpeg(i)),
          'image/filename': f'{i}.jpg',
          'label': i % 2,
          'mask': b'png',
          'depth': np.zeros(2, np.float32),
          'boxes': [tfds.features.BBox(0.0, 0.0, 0.5, 1.0)] * (i % 2),
          'captions': [{'id': 1, 'text': f'c{i}'}, {'id': 2, 'text': 'd'}],
        },
      )


def check_coco(samples):
  assert len(samples) == 6
  for sample in samples:
    i = int(sample.key.split('.')[0])
    assert sample.image == jpeg(i) and sample.alt_text == '' and sample.captions == [f'c{i}', 'd']
    assert set(sample.extra) == {'label', 'mask', 'boxes'} and sample.extra['label'] == i % 2
    assert sample.extra['boxes'].shape == (i % 2, 4) and sample.extra['mask'] == b'png'


def test_tfds_by_folder_and_name_with_annotations_that_fit(tmp_path, monkeypatch):
  CocoLike(data_dir=str(tmp_path), file_format='array_record').download_and_prepare()
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  folder = tmp_path / 'coco_like' / '2.0.0'
  for name in ('coco_like', folder, folder.parent):
    reader = open_input(str(name), Options())
    assert reader.annotations == ('label', 'mask', 'boxes') and reader.label_names == ('cat', 'dog')
    check_coco(list(reader))
  assert open_input('coco_like', Options(split='test')).total == 2
  with pytest.raises(InputError, match="did you mean 'train'"):
    open_input('coco_like', Options(split='trian'))


def damaged_at(data, place):
  return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def as_tfrecords(folder):
  """Rewrites a prepared array_record data set in TFRecord, the format of most TFDS data sets."""
  for path in list(folder.glob('*.array_record*')):
    reader = array_record_module.ArrayRecordReader(str(path))
    writer = record_writer.RecordWriter(str(path).replace('.array_record', '.tfrecord'))
    for record in reader.read_all():
      writer.write(record)
    writer.close()
    path.unlink()
  info = folder / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))


def test_tfds_in_tfrecord_format_without_tensorflow(tmp_path):
  CocoLike(data_dir=str(tmp_path), file_format='array_record').download_and_prepare()
  folder = tmp_path / 'coco_like' / '2.0.0'
  as_tfrecords(folder)
  check_coco(read(folder))
  file = next(folder.glob('*train.tfrecord*'))
  whole = file.read_bytes()
  file.write_bytes(damaged_at(whole, whole.rindex(b'\xff\xd9')))
  *good, bad = read(folder)
  assert bad.image is None and bad.problem.endswith(
    'record 5 does not fit its checksum; copy it again'
  )
  assert all(sample.image for sample in good)
  file.write_bytes(damaged_at(whole, 5))
  with pytest.raises(InputError, match='after 0 records: a length does not fit its checksum'):
    read(folder)
  file.write_bytes(whole)
  os.truncate(file, file.stat().st_size - 10)
  with pytest.raises(InputError, match='truncated after 5 records'):
    read(folder)
  file.unlink()
  with pytest.raises(InputError, match='is missing'):
    read(folder)

import json
import os
import zipfile

import pytest

from tests.data.ingest.test_tars import write_tar
from tests.data.pictures import picture
from tips_jax.core.errors import InputError
from tips_jax.data.ingest.columns import Columns
from tips_jax.data.ingest.formats import open_input
from tips_jax.data.ingest.reader import Options


def read(path, **options):
  return list(open_input(str(path), Options(**options)))


def test_what_is_no_input_at_all(tmp_path):
  (tmp_path / 'flickr').mkdir()
  with pytest.raises(InputError, match="did you mean 'flickr'"):
    read(tmp_path / 'flikr')
  with pytest.raises(InputError, match='expected a table'):
    read(tmp_path / 'flickr')
  with pytest.raises(InputError, match='no file matches'):
    read(tmp_path / '*.tar')


def test_several_files_of_a_pattern_must_be_of_one_form(tmp_path):
  for name in ('a.csv', 'b.csv'):
    (tmp_path / name).write_text('image,text\n')
  with pytest.raises(InputError, match='a.csv.* and 1 more; expected tars'):
    read(tmp_path / '*.csv')


def jsonl(rows):
  return ''.join(json.dumps(row) + '\n' for row in rows).encode()


ROWS = jsonl([{'file_name': '0.jpg', 'text': 'zero'}])


def write(folder, **files):
  """Files by path; '__' in a name is '/', and the last '_' the dot."""
  for name, data in files.items():
    stem, _, end = name.replace('__', '/').rpartition('_')
    path = folder / f'{stem}.{end}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def tars(folder, *names):
  for name in names:
    write_tar(folder / name, [(f'{name}.jpg', picture(0)), (f'{name}.txt', name.encode())])


def texts(path, **options):
  return [sample.alt_text for sample in read(path, **options)]


# --- patterns -----------------------------------------------------------------------------------


def test_patterns_with_braces_commas_and_stars(tmp_path):
  tars(tmp_path, '00.tar', '01.tar', '02.tar', 'b.tar')
  for pattern in ('{00..01}.tar', '{00,01}.tar', '0{0,1}.tar', '0[01].tar'):
    assert texts(tmp_path / pattern) == ['00.tar', '01.tar']
  assert texts(f'{tmp_path}/02.tar,{tmp_path}/0{{0,1}}.tar') == ['02.tar', '00.tar', '01.tar']
  with pytest.raises(InputError, match="no file matches '.*03.tar'.*did you mean '02.tar'"):
    read(tmp_path / '{00..03}.tar')
  with pytest.raises(InputError, match='at most 100,000 files'):
    read(tmp_path / '{0..999999999}.tar')
  with pytest.raises(InputError, match='more than 100,000 files'):
    read(tmp_path / '{0..9999}{0..9999}.tar')


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
  tars(tmp_path, 'a,{b}[1].tar')
  assert texts(tmp_path / 'a,{b}[1].tar') == ['a,{b}[1].tar']


# --- splits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'train, other',
  [
    ('cc3m-train-0000.tar', 'cc3m-validation-0000.tar'),
    ('train_0.tar', 'val_0.tar'),
    ('coco-training-0.tar', 'coco-test-0.tar'),
    ('train2017.tar', 'val2017.tar'),
  ],
)
def test_other_splits_never_flow_into_train(tmp_path, train, other):
  tars(tmp_path, train, other)
  for path in (tmp_path, tmp_path / '*.tar'):
    reader = open_input(str(path), Options())
    assert [s.alt_text for s in reader] == [train]
    assert [(n.kind, n.id) for n in reader.notes] == [('other_split', str(tmp_path / other))]


def test_where_the_split_cannot_be_told_the_files_are_listed(tmp_path):
  tars(tmp_path, 'a.tar', 'test.tar')
  with pytest.raises(InputError, match=r"\['a.tar'\], whose split cannot be told.*\['test.tar'\]"):
    read(tmp_path)
  assert texts(tmp_path / 'test.tar') == ['test.tar']


def test_a_folder_with_test_alone_is_no_train(tmp_path):
  tars(tmp_path, 'test.tar')
  with pytest.raises(InputError, match='--input_split'):
    read(tmp_path)
  assert texts(tmp_path, split='test') == ['test.tar']


def test_folders_of_splits_with_metadata_as_in_image_folders(tmp_path):
  other = jsonl([{'file_name': '0.jpg', 'text': 'other'}])
  write(tmp_path, train__metadata_jsonl=ROWS, test__metadata_jsonl=other)
  write(tmp_path, train__0_jpg=picture(0), test__0_jpg=picture(1))
  assert texts(tmp_path) == ['zero'] and texts(tmp_path, split='test') == ['other']


def test_loose_files_in_folders_of_splits_do_not_mix(tmp_path):
  write(
    tmp_path, train__0_jpg=picture(0), train__0_txt=b'a', val__1_jpg=picture(1), val__1_txt=b'b'
  )
  assert texts(tmp_path) == ['a'] and texts(tmp_path, split='validation') == ['b']


# --- folders with other files beside the data ---------------------------------------------------


def test_metadata_csv_at_the_top_of_an_image_folder(tmp_path):
  write(tmp_path, metadata_csv=b'file_name,text\nin/0.jpg,zero\n', in__0_jpg=picture(0))
  assert texts(tmp_path) == ['zero']


def test_a_clone_of_a_hub_has_its_data_below(tmp_path):
  (tmp_path / 'data').mkdir()
  tars(tmp_path / 'data', 'train-0.tar', 'test-0.tar')
  write(tmp_path, dataset_infos_json=b'{"default": {}}', README_md=b'# about')
  reader = open_input(str(tmp_path), Options())
  assert [s.alt_text for s in reader] == ['train-0.tar']
  kinds = {os.path.basename(note.id): note.kind for note in reader.notes}
  assert kinds == {
    'dataset_infos.json': 'other_file',
    'README.md': 'other_file',
    'test-0.tar': 'other_split',
  }


@pytest.mark.parametrize(
  'stray', [b'{}', b'{"count": 1}', b'[{"package": "x", "version": 3}]', b'{oops', b'\xff\xfe']
)
def test_json_beside_the_data_is_no_table(tmp_path, stray):
  write(tmp_path / 'loose', a_jpg=picture(0), a_txt=b'a', settings_json=stray)
  write(tmp_path / 'shard', s__a_jpg=picture(0), s__a_json=b'{"caption": "a"}', s_stats_json=stray)
  write(tmp_path / 'table', t_csv=b'image,caption\na.jpg,a\n', a_jpg=picture(0), info_json=stray)
  for folder in ('loose', 'table'):
    reader = open_input(str(tmp_path / folder), Options())
    assert [s.alt_text for s in reader] == ['a']
    assert [note.kind for note in reader.notes] == ['other_file']
  assert texts(tmp_path / 'shard') == ['a']


def test_one_damaged_table_in_a_folder_says_what_is_wrong_with_it(tmp_path):
  write(tmp_path, t_csv='image,caption\n0.jpg,café\n'.encode('latin-1'), a_json=b'{}')
  write(tmp_path, x_jpg=picture(0))
  with pytest.raises(InputError, match='t.csv.* as UTF-8|a.json.* has no rows'):
    read(tmp_path)


@pytest.mark.parametrize('name', ['t_csv', 't_json'])
def test_a_table_beside_its_images_says_itself_which_column_is_wrong(tmp_path, name):
  data = ROWS if name == 't_json' else b'file_name,text\n0.jpg,zero\n'
  write(tmp_path, **{name: data, 'images__0_jpg': picture(0)})
  with pytest.raises(InputError, match="--alt_text_column: got 'txet'.*did you mean 'text'"):
    read(tmp_path, columns=Columns(alt_text='txet'))


def test_json_beside_a_zip_with_a_table_is_none(tmp_path):
  with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as archive:
    archive.writestr('0.jpg', picture(0))
    archive.writestr('t.jsonl', ROWS)
  write(tmp_path, settings_json=b'{}')
  assert texts(tmp_path) == ['zero']

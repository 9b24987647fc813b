import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given

from tests.damage import FUZZ, damaged
from tips_jax.core.errors import InputError
from tips_jax.data import store
from tips_jax.data.ingest import tfds_folder
from tips_jax.data.ingest.formats import open_input
from tips_jax.data.ingest.reader import Options


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A TFDS folder of 8 records."""
  path = tmp_path_factory.mktemp('tfds') / 'store'
  folder = store.temporary_folder(path)
  writer = store.Writer(folder, store.features(['label'], labels=['cat', 'dog']))
  for i in range(8):
    image = np.random.default_rng(i).bytes(400)
    example = {'image': image, 'id': f'id{i}', 'alt_text': 'a', 'captions': [], 'label': i % 2}
    writer.add('train', example)
  writer.close()
  return pathlib.Path(store.finish(folder, path, {}))


@pytest.fixture
def folder(written, tmp_path):
  """A copy to damage, without our store.json."""
  path = tmp_path / 'copy'
  shutil.copytree(written, path)
  (path / store.INFO_FILE).unlink()
  return path


CLASSES = ('{"pythonClassName": %s}', '{"python_class_name": %s}', '{"type": %s, "content": "{}"}')


@pytest.mark.parametrize('form', CLASSES)
@pytest.mark.parametrize('nested', [False, True])
def test_no_code_is_imported_by_a_name_in_features_json(
  folder, tmp_path, monkeypatch, form, nested
):
  (tmp_path / 'evil').mkdir()
  (tmp_path / 'evil' / 'payload.py').write_text('raise SystemExit("code of a data folder ran")')
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  feature = json.loads(form % '"evil.payload.Feature"')
  if nested:
    whole = json.loads((folder / 'features.json').read_text())
    whole['featuresDict']['features']['image'] = feature
    feature = whole
  (folder / 'features.json').write_text(json.dumps(feature))
  for opened in (store.open_store, lambda path: open_input(str(path), Options())):
    with pytest.raises(InputError, match="got a feature of class 'evil.payload.Feature'"):
      opened(folder)
  assert 'evil.payload' not in sys.modules


def test_all_features_of_tfds_are_accepted(tmp_path):
  f = tfds.features
  kinds = {
    'image': f.Image(),
    'text': f.Text(),
    'label': f.ClassLabel(names=['a']),
    'boxes': f.Sequence({'box': f.BBoxFeature(), 'type': f.Text()}),
    'tensor': f.Tensor(shape=(2,), dtype=np.float32),
    'scalar': f.Scalar(np.int64),
    'translation': f.Translation(['en', 'de']),
  }
  tmp = store.temporary_folder(tmp_path / 'x')
  writer = store.Writer(tmp, f.FeaturesDict(kinds))
  writer.close()
  assert set(tfds_folder.open_builder(tmp).info.features) == set(kinds)


def test_a_damaged_record_is_left_out_and_listed(folder):
  shard = next(folder.glob('*.array_record*'))
  data = bytearray(shard.read_bytes())
  data[data.index(b'id3')] ^= 1
  shard.write_bytes(data)
  samples = list(open_input(str(folder), Options()))
  assert [sample.image is None for sample in samples] == [i == 3 for i in range(8)]
  assert samples[3].problem.startswith('damaged record: ') and 'hash mismatch' in samples[3].problem
  source = store.open_store(folder).source('train')
  assert source[2]['id'] == b'id2'
  with pytest.raises(InputError, match="split 'train' of .*: record 3 is damaged"):
    source[3]


@pytest.mark.parametrize('count', [7, 9, 2**31])
def test_files_that_hold_other_counts_than_the_metadata_says_are_an_error_in_one_line(
  folder, count
):
  path = folder / 'dataset_info.json'
  content = json.loads(path.read_text())
  content['splits'][0]['shardLengths'] = [str(count)]
  path.write_text(json.dumps(content))
  with pytest.raises(InputError, match=f'got 8 records; expected {count}') as error:
    list(open_input(str(folder), Options()))
  assert '\n' not in str(error.value)


def test_a_name_that_cannot_be_prepared_says_why_and_leaves_nothing(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))

  def no_network(*args):
    raise OSError('name or service not known')

  monkeypatch.setattr('socket.getaddrinfo', no_network)
  monkeypatch.setattr('urllib.request.getproxies', dict)
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  message = r"cannot prepare 'mnist' here \(tensorflow is not installed, no network\)"
  with pytest.raises(InputError, match=message):
    open_input('mnist', Options())
  assert not (tmp_path / 'tfds').exists()
  with pytest.raises(InputError, match='neither a path nor a TFDS data set'):
    open_input('mnitsx', Options())


def test_what_tfds_leaves_behind_does_not_block_a_name(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  (tmp_path / 'mnist' / 'incomplete.ABC_3.0.1').mkdir(parents=True)
  with pytest.raises(InputError, match="got 'mnist', which is not a folder"):
    store.resolve('mnist')

  def fail(self):
    (tmp_path / 'coco' / '1.0.0').mkdir(parents=True)
    (tmp_path / 'coco' / '1.0.0').rmdir()
    raise ConnectionError('reset\nby peer')

  builder = type('Builder', (), {'download_and_prepare': fail, 'data_dir': tmp_path / 'coco/1.0.0'})
  monkeypatch.setattr('tensorflow_datasets.builder', lambda name, **options: builder())
  monkeypatch.setattr(tfds_folder, '_lacking', lambda: iter(()))
  with pytest.raises(InputError, match=r"cannot prepare 'coco' here \(reset by peer\)"):
    tfds_folder.prepare('coco')
  assert not (tmp_path / 'coco').exists()


@pytest.mark.filterwarnings('ignore')
def test_damaged_files_of_a_tfds_folder_are_read_or_an_input_error(written, tmp_path_factory):
  folder = tmp_path_factory.mktemp('fuzz') / 'copy'
  shutil.copytree(written, folder)
  (folder / store.INFO_FILE).unlink()

  def read(name):
    whole = (folder / name).read_bytes()

    @FUZZ
    @given(damaged(whole))
    def check(data):
      (folder / name).write_bytes(data)
      try:
        for sample in open_input(str(folder), Options()):
          assert sample.image is not None or sample.problem
        opened = store.open_store(folder)
        opened.label_names()
        opened.source('train')
      except InputError as error:
        assert '\n' not in str(error)

    check()
    (folder / name).write_bytes(whole)

  for name in ('dataset_info.json', 'features.json', next(folder.glob('*.array_record*')).name):
    read(name)

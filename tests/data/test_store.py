import json
import os
import pathlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from tips_jax.core.errors import InputError
from tips_jax.data import store


def example(i):
  return {
    'image': b'image %d' % i * 50,
    'id': str(i),
    'alt_text': 'Ä' * (i % 2),
    'captions': ['one', 'Two'][: i % 3],
  }


def build(path, *, train=7, test=3, shard_bytes=1200, annotate=False, info=None):
  folder = store.temporary_folder(path)
  features = (
    store.features(store.ANNOTATIONS, labels=['cat', 'dog']) if annotate else store.features()
  )
  writer = store.Writer(folder, features, shard_bytes=shard_bytes)
  for i in range(train + test):
    more = (
      dict(
        label=i % 2,
        mask=b'mask',
        depth=b'depth',
        normals=b'normals',
        tags=['t'] * (i % 2),
        boxes=np.full((i % 3, 4), 0.5, np.float32),
        region_captions=['r'] * (i % 3),
        region_captions_boxes=list(range(i % 3)),
        region_tags=['s', 't'] * (i % 3),
        region_tags_boxes=[0, 0] * (i % 3),
      )
      if annotate
      else {}
    )
    writer.add('train' if i < train else 'test', example(i) | more)
  assert writer.close() == {'train': train, 'test': test}
  with open(os.path.join(folder, store.TOKENIZER_FILE), 'wb') as file:
    file.write(b'model')
  return store.finish(folder, path, info or {})


@pytest.fixture
def path(tmp_path):
  return build(str(tmp_path / 'store'), info={'size': 3})


def test_what_was_written_is_read_back_byte_for_byte(path):
  opened = store.open_store(path)
  assert opened.splits == {'train': 7, 'test': 3} and opened.info == {'size': 3}
  assert set(opened.features) == {'image', 'id', 'alt_text', 'captions'}
  assert (
    opened.tokenizer_path == os.path.join(path, 'tokenizer.model')
    and len(opened.tokenizer_sha256) == 64
  )
  source = opened.source('train')
  assert len(source) == 7
  for i in (6, 0, 3):
    record, wanted = source[i], example(i)
    assert record['image'] == wanted['image'] and record['id'] == wanted['id'].encode()
    assert record['alt_text'] == wanted['alt_text'].encode()
    assert [c.decode() for c in record['captions']] == wanted['captions']


def test_several_shards_and_no_temporary_files_remain(path):
  names = sorted(os.listdir(path))
  assert sum('train.array_record' in name for name in names) == 3
  assert not [n for n in names if 'growing' in n] and os.listdir(os.path.dirname(path)) == ['store']


def test_shards_grow_with_the_split_up_to_sixteen_times_the_first(tmp_path):
  path = build(str(tmp_path / 'large'), train=3000, shard_bytes=600)
  records = iter(store.open_store(path).source('train').raw)
  sizes = []
  for length in tfds.builder_from_directory(path).info.splits['train'].shard_lengths:
    sizes.append([len(next(records)) for _ in range(length)])
  assert next(records, None) is None
  # A shard is full with the record that reaches its size.
  full = [(sum(shard[:-1]), sum(shard)) for shard in sizes[:-1]]
  assert all(before < 600 <= after for before, after in full[:32])
  assert full[60][0] < sum(map(sum, sizes[:60])) / 32 <= full[60][1]
  assert all(before < 16 * 600 <= after for before, after in full[150:])


def test_tfds_opens_it_without_our_code(path):
  source = tfds.builder_from_directory(path).as_data_source(
    'train[2:4]', decoders={'image': tfds.decode.SkipDecoding()}
  )
  assert [record['id'] for record in source] == [b'2', b'3']


def test_source_slices_and_pickles(path):
  source = pickle.loads(pickle.dumps(store.open_store(path).source('test')))
  assert [record['id'] for record in source] == [b'7', b'8', b'9']
  assert len(store.open_store(path).source('train[:2]+test')) == 5


def test_a_process_that_need_not_check_asks_for_no_shard(path, monkeypatch):
  def asked(*args, **kwargs):
    raise AssertionError('a request for a shard')

  monkeypatch.setattr(store, 'sizes', asked)
  monkeypatch.setattr(array_record_module, 'ArrayRecordReader', asked)
  assert len(store.open_store(path, check_shards=False).source('train')) == 7
  with pytest.raises(AssertionError):
    store.open_store(path)


def test_annotations_round_trip(tmp_path):
  opened = store.open_store(build(str(tmp_path / 'annotated'), annotate=True))
  assert opened.label_names() == ('cat', 'dog')
  record = opened.source('train')[5]
  assert record['label'] == 1 and record['mask'] == b'mask' and record['depth'] == b'depth'
  assert record['boxes'].shape == (2, 4) and list(record['region_captions']) == [b'r', b'r']
  assert list(record['region_tags']) == [b's', b't'] * 2
  assert list(record['region_captions_boxes']) == [0, 1]
  assert opened.source('train')[0]['boxes'].shape == (0, 4)
  with pytest.raises(InputError, match="got 'boxs'.*did you mean 'boxes'"):
    store.features(['boxs'])


def test_fingerprint_depends_on_the_records_alone(tmp_path, path):
  code = (
    f'import sys; sys.path[:0] = {sys.path!r}\nimport test_store; test_store.build(sys.argv[1])'
  )
  other = str(tmp_path / 'other')
  subprocess.run(
    [sys.executable, '-c', code, other],
    check=True,
    env={**os.environ, 'PYTHONHASHSEED': '7'},
    cwd=os.path.dirname(__file__),
  )
  assert store.open_store(other).fingerprint == store.open_store(path).fingerprint
  changed = build(str(tmp_path / 'changed'), train=6, test=4)
  assert store.open_store(changed).fingerprint != store.open_store(path).fingerprint


def test_existing_path_is_never_overwritten(tmp_path, path):
  before = store.open_store(path).fingerprint
  with pytest.raises(InputError, match='exists already'):
    store.temporary_folder(path)
  late = str(tmp_path / 'late')
  folder = store.temporary_folder(late)
  writer = store.Writer(folder, store.features())
  writer.add('train', example(0))
  writer.close()
  os.rename(path, late)  # somebody else finishes first
  with pytest.raises(InputError, match='exists already'):
    store.finish(folder, late, {})
  assert store.open_store(late).fingerprint == before


def test_empty_folder_is_a_good_place(tmp_path):
  (tmp_path / 'empty').mkdir()
  assert store.open_store(build(str(tmp_path / 'empty'))).splits['train'] == 7


def test_leftovers_of_dead_processes_are_removed_and_those_of_live_ones_kept(tmp_path):
  dead = subprocess.Popen([sys.executable, '-c', ''])
  dead.wait()
  (tmp_path / f'.store-{dead.pid}-abc.partial').mkdir()
  (tmp_path / f'.store-{os.getpid()}-abc.partial').mkdir()
  (tmp_path / f'.store2-{dead.pid}-abc.partial').mkdir()
  build(str(tmp_path / 'store'))
  kept = [f'.store-{os.getpid()}-abc.partial', f'.store2-{dead.pid}-abc.partial', 'store']
  assert sorted(os.listdir(tmp_path)) == kept


def test_unwritable_place(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='cannot write'):
    store.temporary_folder(str(tmp_path / 'file' / 'store'))


def test_missing_store_names_the_nearest(path):
  with pytest.raises(InputError, match="did you mean 'store'"):
    store.open_store(os.path.join(os.path.dirname(path), 'stroe'))
  with pytest.raises(InputError, match='holds no store'):
    store.open_store(os.path.dirname(os.path.dirname(path)))
  # A file is not the name that was meant.
  file = os.path.join(path, 'store.json')
  with pytest.raises(InputError, match='which is not a folder') as raised:
    store.open_store(file)
  assert "mean 'store.json'" not in str(raised.value)
  with pytest.raises(InputError, match="got ''"):
    store.open_store('')


def test_missing_split_names_the_nearest(path):
  with pytest.raises(
    InputError, match=r"got 'trian'; expected one of \['test', 'train'\]; did you mean 'train'"
  ):
    store.open_store(path).source('trian')
  with pytest.raises(InputError, match='slice'):
    store.open_store(path).source('train[:oops]')


def shard(path):
  return os.path.join(
    path, next(name for name in sorted(os.listdir(path)) if 'train.array_record' in name)
  )


def test_half_written_store_is_refused(tmp_path):
  def spoil(name, action):
    path = build(str(tmp_path / name))
    action(path)
    with pytest.raises(InputError, match='half-written store'):
      store.open_store(path)

  spoil('shard', lambda p: os.remove(shard(p)))
  spoil('cut', lambda p: os.truncate(shard(p), 1000))
  spoil('json', lambda p: os.truncate(os.path.join(p, 'store.json'), 20))
  spoil('metadata', lambda p: os.remove(os.path.join(p, 'features.json')))
  spoil(
    'both', lambda p: [os.remove(os.path.join(p, n)) for n in ('store.json', 'dataset_info.json')]
  )


def test_store_json_that_is_nested_too_deep_is_refused(path):
  (pathlib.Path(path) / store.INFO_FILE).write_text('[' * 100_000)
  with pytest.raises(InputError, match='no complete store.json'):
    store.open_store(path)


def test_temporary_folder_is_not_a_store(tmp_path):
  folder = store.temporary_folder(str(tmp_path / 'store'))
  writer = store.Writer(folder, store.features())
  writer.add('train', example(0))
  with pytest.raises(InputError, match='half-written store'):
    store.open_store(folder)
  writer.close()  # all that TFDS wants is there now
  with pytest.raises(InputError, match='half-written store'):
    store.open_store(folder)


READ_ALL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (100, int(sys.argv[1])))
from tips_jax.core.errors import InputError
from tips_jax.data import store
try:
  print(len([record['id'] for record in store.open_store(sys.argv[2]).source('train')]))
except InputError as error:
  print(error)
"""


@pytest.mark.parametrize('limit', [1000, 500])
def test_the_limit_of_open_files_is_raised_or_said_to_be_too_low(tmp_path, limit):
  path = build(str(tmp_path / 'many'), train=400, shard_bytes=1)  # a record fills a shard
  got = subprocess.run(
    [sys.executable, '-c', READ_ALL, str(limit), path], check=True, capture_output=True, text=True
  ).stdout
  if limit == 1000:
    assert got == '400\n'
  else:
    assert re.fullmatch(
      rf"split 'train' of '{path}': got 400 shards, each an open file, and a limit of 500 open "
      r'files; expected at least (6\d\d): raise it with `ulimit -n \1`.*\n',
      got,
    )


def test_other_format_number_is_refused(path):
  name = os.path.join(path, 'store.json')
  content = json.load(open(name))
  json.dump({**content, 'format': 99}, open(name, 'w'))
  with pytest.raises(InputError, match='got format 99'):
    store.open_store(path)


class Pets(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.2.0')

  def _info(self):
    features = {'image': tfds.features.Image(shape=(None, None, 3)), 'name': tfds.features.Text()}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {'train': ((i, {'image': b'bytes', 'name': str(i)}) for i in range(5))}

  def _generate_examples(self):
    raise NotImplementedError


def prepare_pets(root):
  Pets(data_dir=root, file_format='array_record').download_and_prepare()
  return os.path.join(root, 'pets', '1.2.0')


def test_plain_tfds_data_opens_by_folder_and_by_name(tmp_path, monkeypatch):
  folder = prepare_pets(str(tmp_path))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  for name in (folder, os.path.dirname(folder), 'pets', 'pets:1.2.0'):
    opened = store.open_store(name)
    assert opened.path == folder and opened.splits == {'train': 5} and opened.tokenizer_path is None
    assert len(opened.fingerprint) == 64 and opened.info == {}
  assert opened.source('train')[0]['image'] == b'bytes'
  os.remove(shard(folder))
  with pytest.raises(InputError, match='missing'):
    store.open_store(folder)


def test_no_tensorflow_and_no_jax_are_imported():
  code = (
    f'import sys; sys.path[:0] = {sys.path!r}\n'
    f'import tips_jax.data.store, tips_jax.data.tokenizer\n'
    f'print([m for m in ("tensorflow", "jax", "torch") if m in sys.modules])'
  )
  assert (
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout
    == '[]\n'
  )

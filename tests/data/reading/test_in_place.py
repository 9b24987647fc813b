import collections
import dataclasses
import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Columns, Data, Text, View
from tips_jax.data import store, tokenizer
from tips_jax.data.ingest import convert
from tips_jax.data.ingest.formats import open_input
from tips_jax.data.ingest.reader import Options
from tips_jax.data.reading.in_place import lies, open_data
from tips_jax.data.reading.order import example_order
from tips_jax.data.reading.pipeline import Pipeline
from tips_jax.data.reading.records import Records, first, values

COUNT = 40
TEXTS = {'web': Text(field='alt_text'), 'synthetic': Text(field='captions')}
VIEWS = {'global': View(size=16)}


def image(i):
  pixels = np.full((24, 32, 3), (i * 5, 255 - i * 5, i * 3), np.uint8)
  return simplejpeg.encode_jpeg(pixels, quality=95)


def row(i):
  return {'alt_text': f'Web text {i}', 'captions': [f'caption {i} {c}' for c in 'abc'[: i % 4]]}


def write_tar(path, numbers, extra=()):
  with tarfile.open(path, 'w') as tar:
    for i in numbers:
      members = {'jpg': image(i), 'json': json.dumps(row(i)).encode(), 'cls': b'7'}
      for end, data in members.items():
        info = tarfile.TarInfo(f'{"long" * 30 if i == 3 else "key"}{i:03}.{end}')
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    for name, data in extra:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


def write_parquet(path, numbers, rows=4, **columns):
  table = {'image': [image(i) for i in numbers], 'id': [f'key{i:03}' for i in numbers]}
  for name in ('alt_text', 'captions'):
    table[name] = [row(i)[name] for i in numbers]
  pq.write_table(pa.table({**table, **columns}), path, row_group_size=rows)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp('lies')
  for name in ('tars', 'parquet'):
    (root / name).mkdir()
  write_tar(root / 'tars' / '0.tar', range(15), extra=[('only.txt', b'words'), ('notes.md', b'x')])
  write_tar(root / 'tars' / '1.tar', range(15, COUNT))
  write_parquet(root / 'parquet' / '0.parquet', range(15))
  write_parquet(root / 'parquet' / '1.parquet', range(15, COUNT), rows=8)
  for name in ('tars', 'parquet'):
    convert.convert({'train': open_input(root / name, Options())}, root / f'{name}-store')
  texts = [text for i in range(COUNT) for text in (row(i)['alt_text'], *row(i)['captions'])]
  tokenizer.train(texts, root / 'tokenizer.model', vocab_size=300)
  return root


def config(folders, name, **changes):
  return Data(
    store=str(folders / name),
    tokenizer=str(folders / 'tokenizer.model'),
    views=VIEWS,
    texts=TEXTS,
    threads=2,
    **changes,
  )


def records_of(data):
  return Records([open_data(data.store, data).source(data.split)])


def contents(records, numbers):
  found = []
  for example in records.read(numbers):
    fields = {name: values(example, name)[:] for name in ('image', 'id', 'alt_text', 'captions')}
    found.append(fields)
  return found


@pytest.mark.parametrize('name', ['tars', 'parquet'])
def test_records_are_those_of_a_store_made_of_the_files(folders, name):
  here = records_of(config(folders, name))
  there = records_of(config(folders, f'{name}-store'))
  assert len(here) == len(there) == COUNT
  numbers = list(range(12, 20)) + [39, 0, 3, 21]
  assert contents(here, numbers) == contents(there, numbers)
  again = pickle.loads(pickle.dumps(here))  # to worker processes
  assert contents(again, numbers) == contents(there, numbers)


def test_a_run_on_tars_has_the_batches_of_a_run_on_a_store(folders):
  pipelines = [
    Pipeline(config(folders, name, neighbors=4), batch_size=8, seed=3)
    for name in ('tars', 'tars-store')
  ]
  for _ in range(7):
    here, there = map(next, pipelines)
    for name in here:
      np.testing.assert_array_equal(here[name], there[name], err_msg=name)
  for pipeline in pipelines:
    pipeline.close()


@pytest.mark.parametrize('name', ['tars', 'parquet'])
def test_resumes_and_shards_exactly(folders, name):
  data = config(folders, name)
  whole = Pipeline(data, batch_size=8, seed=0)
  batches = [next(whole) for _ in range(8)]
  whole.close()
  numbers = collections.Counter(np.concatenate([b['index'] for b in batches[:5]]).tolist())
  assert numbers == dict.fromkeys(range(COUNT), 1)  # an epoch
  for rows in ([0, 1, 5], [2, 3, 4, 6, 7]):  # two hosts
    part = Pipeline(data, batch_size=8, seed=0, rows=rows, start=24)
    for batch in batches[3:6]:
      own = next(part)
      for field in own:
        np.testing.assert_array_equal(own[field], batch[field][rows], err_msg=field)
    part.close()


def test_workers_give_the_same_batches(folders):
  schedule = ((0.0, 1.0, 1.0), (400.0, 0.0, 1.0))
  both = dict(extra_stores=(str(folders / 'parquet'),), mixture_schedule=schedule)
  threads = Pipeline(config(folders, 'tars', **both), batch_size=8, seed=0)
  workers = Pipeline(config(folders, 'tars', workers=1, **both), batch_size=8, seed=0)
  for _ in range(2):
    one, other = next(threads), next(workers)
    assert 0 < (one['index'] >= COUNT).sum() < 8  # of both
    for field in one:
      np.testing.assert_array_equal(one[field], other[field])
  threads.close()
  workers.close()


def test_an_index_is_made_once_and_says_what_it_leaves_out(folders, tmp_path, capfd):
  shutil.copytree(folders / 'tars', tmp_path / 'tars', ignore=lambda *_: ['.tips_jax'])
  data = config(tmp_path, 'tars', columns=Columns(captions=('none',)))
  before = open_data(data.store, data)
  said = capfd.readouterr().err
  assert '40 samples in 2 tars' in said
  assert '1 files of no sample' in said and '1 samples without an image' in said
  (meta,) = (tmp_path / 'tars').glob('.tips_jax/*/index.json')
  assert json.loads(meta.read_text())['left_out']['samples without an image'][0].endswith('only')
  open_data(data.store, data)
  assert not capfd.readouterr().err

  write_tar(tmp_path / 'tars' / '1.tar', range(15, 30))
  after = open_data(data.store, data)
  (line, *_) = [x for x in capfd.readouterr().err.splitlines() if 'has changed' in x]
  assert "1 of 2 files, the first is '1.tar'" in line
  assert len(after.source('train')) == 30
  assert before.fingerprint != after.fingerprint
  example = records_of(data)[29]
  assert first(example, 'id') == b'key029' and not values(example, 'captions')


def test_an_index_of_a_folder_that_cannot_be_written_is_in_the_cache(
  folders, tmp_path, monkeypatch
):
  shutil.copytree(folders / 'tars', tmp_path / 'tars', ignore=lambda *_: ['.tips_jax'])
  monkeypatch.setenv('TIPS_JAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(os, 'access', lambda path, mode: False)
  assert len(records_of(config(tmp_path, 'tars'))) == COUNT
  assert not (tmp_path / 'tars' / '.tips_jax').exists()
  assert list(tmp_path.glob('cache/indexes/*/*/index.json'))


def test_broken_images_are_replaced_and_counted(folders, tmp_path):
  (tmp_path / 'parquet').mkdir()
  images = [image(i)[: 100 if i == 5 else None] for i in range(12)]
  images[6] = None
  write_parquet(tmp_path / 'parquet' / 'a.parquet', range(12), image=images)
  data = dataclasses.replace(config(folders, ''), store=str(tmp_path / 'parquet'))
  data = dataclasses.replace(data, max_bad_fraction=0.5)
  pipeline = Pipeline(data, batch_size=12, seed=0)
  bad = next(pipeline)['bad']
  reasons = [pipeline.explain(record)[1] for record in (5, 6)]
  pipeline.close()
  assert sorted(bad[bad >= 0]) == [5, 6]
  assert reasons[0] and 'empty image cell' in reasons[1]


def test_a_tar_that_has_changed_and_is_as_long_as_before_is_not_read_at_the_old_places(
  folders, tmp_path
):
  write_tar(tmp_path / '0.tar', range(4), extra=[('x.txt', b'x')])
  data = dataclasses.replace(config(folders, ''), store=str(tmp_path))
  before = contents(records_of(data), range(4))
  size = os.path.getsize(tmp_path / '0.tar')
  write_tar(tmp_path / '0.tar', (3, 0, 1, 2), extra=[('x.txt', b'x')])
  assert os.path.getsize(tmp_path / '0.tar') == size
  found = records_of(data).read(range(4))
  assert any(isinstance(one, ValueError) and 'has changed' in str(one) for one in found)
  for one, old in zip(found, before):
    if not isinstance(one, ValueError):
      assert (
        values(one, 'image')[:] == old['image'] or values(one, 'alt_text')[:] != old['alt_text']
      )


def test_a_column_split_chooses_rows(folders, tmp_path):
  split = ['test' if i % 3 == 0 else 'train' for i in range(12)]
  write_parquet(tmp_path / 'a.parquet', range(12), split=split)
  data = dataclasses.replace(config(folders, ''), store=str(tmp_path / 'a.parquet'))
  records = records_of(data)
  ids = [first(example, 'id').decode() for example in records.read(range(len(records)))]
  assert ids == [f'key{i:03}' for i in range(12) if i % 3]


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda path: write_tar(path / 'a.tar', []), 'no sample of which has an image'),
    (lambda path: tarfile.open(path / 'a.tar.gz', 'w:gz').close(), 'is compressed'),
    (lambda path: (path / 'a.tar').write_bytes(b'x' * 2000), 'truncated or damaged'),
    (lambda path: (path / 'a.parquet').write_bytes(b'x' * 2000), 'truncated or damaged'),
    (lambda path: write_parquet(path / 'a.parquet', []), 'have no rows'),
  ],
)
def test_what_cannot_be_read_in_place_is_one_line(folders, tmp_path, make, message):
  make(tmp_path)
  data = dataclasses.replace(config(folders, ''), store=str(tmp_path))
  with pytest.raises(InputError, match=message) as error:
    open_data(data.store, data)
  assert '--input' not in str(error.value)


def test_a_wrong_column_is_named_as_the_field_of_the_config(folders):
  data = config(folders, 'parquet', columns=Columns(alt_text='alt_txt'))
  with pytest.raises(InputError, match=r"data.columns.alt_text: got 'alt_txt'.*did you mean"):
    open_data(data.store, data)


def test_stores_are_stores(folders):
  assert not lies(folders / 'tars-store')
  assert not lies(folders / 'nothing')
  assert lies(folders / 'tars') and lies(folders / 'parquet' / '{0,1}.parquet')
  assert isinstance(open_data(str(folders / 'tars-store'), config(folders, '')), store.Store)


def test_groups_are_mixed_and_each_epoch_sees_each_record_once(folders):
  data = config(folders, 'parquet')
  groups = open_data(data.store, data).source('train').raw.groups
  assert groups.starts == (0, 4, 8, 12, 15, 23, 31, 39, 40)
  few = groups._replace(mixed=2)
  order = example_order([COUNT], (), 1, 1, groups=[few])
  epochs = [[order[i] for i in range(e * COUNT, (e + 1) * COUNT)] for e in range(3)]
  assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) == 3
  owner = np.searchsorted(few.starts, epochs[0], 'right')
  changes = (np.diff(owner) != 0).sum()
  assert changes > len(few.starts)  # two at a time take turns
  last = {group: np.flatnonzero(owner == group) for group in set(owner)}
  assert max(np.ptp(at) for at in last.values()) < 16  # and are soon over
  # Stores that are mixed without weights are one epoch.
  both = example_order([COUNT, 30], (), 1, 1, groups=[few, None])
  assert sorted(both[i] for i in range(70)) == list(range(70))

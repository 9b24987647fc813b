"""Tasks: the same store however they are done, and what is done stays done."""

import functools
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from tests.data.ingest.test_tars import img2dataset, write_files, write_tar
from tests.data.pictures import picture
from tips_jax import prepare
from tips_jax.core.errors import InputError, PassingError
from tips_jax.data import store
from tips_jax.data.ingest import convert, copies, processes, records, report, work
from tips_jax.data.ingest.formats import open_input, open_inputs
from tips_jax.data.ingest.reader import Options

COUNT = 60


def members(indices):
  """Samples with copies in the same task and in others, some without text, some broken."""
  for i in indices:
    data = picture(i - 7 if i % 10 == 9 else i // 2 * 2 if i % 6 == 1 else i)
    if i % 13 == 5:
      data = data[:300]
    yield f'{i:05d}.jpg', data
    if i % 11:
      yield f'{i:05d}.txt', f'a text of number {i} with words {i % 5} and {i % 3}'.encode()


@pytest.fixture
def source(tmp_path):
  folder = tmp_path / 'source'
  folder.mkdir()
  write_tar(folder / '0.tar', members(range(0, 35)))
  write_tar(folder / '1.tar', [*members(range(35, COUNT)), ('README', b'of no sample')])
  return folder


def contents(folder):
  """The bytes of every file, as hashes."""
  found = {}
  for root, _, names in os.walk(folder):
    for name in names:
      path = os.path.join(root, name)
      with open(path, 'rb') as file:
        found[os.path.relpath(path, folder)] = hashlib.file_digest(file, 'sha256').hexdigest()
  return found


FLAGS = ('--tokenizer', '--vocab_size=300', '--test_fraction=0.3', '--task_mib=0.01')


def run(source, output, *flags):
  return prepare.main(['prepare', f'--input={source}', f'--output={output}', *FLAGS, *flags])


def counts(path):
  return json.loads((path / 'report.json').read_text())['splits']


@pytest.fixture
def alone(tmp_path, source):
  """The store of one undisturbed process."""
  assert run(source, tmp_path / 'alone', '--workers=1') == 0
  return tmp_path / 'alone'


def test_two_processes_write_the_store_of_one(tmp_path, source, alone):
  assert run(source, tmp_path / 'two', '--workers=2') == 0
  assert contents(tmp_path / 'two') == contents(alone)
  assert len([name for name in contents(alone) if 'train.array_record' in name]) > 3


def test_a_store_of_many_tasks_holds_what_one_task_writes(tmp_path, source, alone):
  assert run(source, tmp_path / 'one', '--workers=1', '--task_mib=64') == 0
  for split in ('train', 'test'):
    many, one = (list(store.open_store(path).source(split)) for path in (alone, tmp_path / 'one'))
    assert [record['id'] for record in many] == [record['id'] for record in one]
    assert [record['image'] for record in many] == [record['image'] for record in one]
  assert counts(alone) == counts(tmp_path / 'one')
  assert counts(alone)['train']['duplicate'] == 10 and counts(alone)['train']['other_file'] == 1
  models = [(path / 'tokenizer.model').read_bytes() for path in (alone, tmp_path / 'one')]
  assert models[0] == models[1]


def test_what_is_done_is_not_done_again(tmp_path, source, alone, monkeypatch):
  done = []
  do = work.Work.do

  def until(self, number, *args, **kwargs):
    if len(done) == 3:
      raise KeyboardInterrupt
    do(self, number, *args, **kwargs)
    done.append(number)

  monkeypatch.setattr(work.Work, 'do', until)
  assert run(source, tmp_path / 'store', '--workers=1') == 130
  assert done == [0, 1, 2] and not (tmp_path / 'store').exists()
  done.append('again')
  # As kills leave them.
  for name in ('.digests.json-0123456789ab', 'train-000003-00000.shard-ab.growing'):
    (tmp_path / 'store.partial' / name).write_text('')
    (tmp_path / 'store.partial' / 'tasks' / name).write_text('')
  assert run(source, tmp_path / 'store', '--workers=1') == 0
  assert done[4:] == list(range(3, 3 + len(done[4:])))
  assert contents(tmp_path / 'store') == contents(alone)


@pytest.mark.parametrize('after', ['complete', 'seal', 'publish'])
def test_a_kill_while_it_is_put_together_loses_nothing(tmp_path, source, alone, monkeypatch, after):
  function = getattr(store, after)

  def killed(*args, **kwargs):
    if after != 'publish':
      function(*args, **kwargs)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(store, after, killed)
    assert run(source, tmp_path / 'store', '--workers=1') == 130
  monkeypatch.setattr(work.Work, 'do', None)  # nothing is read again
  assert run(source, tmp_path / 'store', '--workers=1') == 0
  assert contents(tmp_path / 'store') == contents(alone)


def test_killed_with_its_processes_it_goes_on(tmp_path, source, alone):
  """Real kills, wherever they fall."""
  command = [sys.executable, '-m', 'tips_jax.prepare', f'--input={source}', *FLAGS]
  command += [f'--output={tmp_path / "store"}', '--workers=2']
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
  process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
  partial = tmp_path / 'store.partial' / 'tasks'
  while process.poll() is None and not list(partial.glob('*.json')):
    pass
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert run(source, tmp_path / 'store', '--workers=2') == 0
  assert contents(tmp_path / 'store') == contents(alone)


def test_parts_in_any_order_and_a_merge_write_the_same_store(tmp_path, source, alone, capsys):
  output = tmp_path / 'store'
  assert run(source, output, '--part=2/3') == run(source, output, '--part=0/3', '--workers=1') == 0
  assert not output.exists()
  capsys.readouterr()
  assert run(source, output, '--merge') == 2
  assert 'tasks are not done, the first is task' in capsys.readouterr().err
  assert run(source, output, '--part=1/3', '--workers=1') == 0
  assert run(source, output, '--merge') == 0
  assert contents(output) == contents(alone)


@pytest.mark.parametrize('part', ['3/3', '1', '-1/3', '1/3/5', 'a/b'])
def test_a_part_that_is_none_is_an_error(source, tmp_path, capsys, part):
  assert run(source, tmp_path / 'store', f'--part={part}') == 2
  assert 'expected I/N with I from 0 to N - 1' in capsys.readouterr().err


def test_parts_run_at_once_and_a_merge_waits_for_them(source, tmp_path, monkeypatch, capsys):
  output = tmp_path / 'store'
  do = work.Work.do
  codes = []

  def meanwhile(self, *args, **kwargs):
    monkeypatch.setattr(work.Work, 'do', do)
    codes.append(run(source, output, '--part=1/2', '--workers=1'))
    codes.append(run(source, output, '--merge'))
    do(self, *args, **kwargs)

  monkeypatch.setattr(work.Work, 'do', meanwhile)
  assert run(source, output, '--part=0/2', '--workers=1') == 0
  assert codes == [0, 2] and 'another process is writing' in capsys.readouterr().err


def test_beam_writes_the_same_store(tmp_path, source, alone):
  pytest.importorskip('apache_beam')
  assert run(source, tmp_path / 'store', '--runner=DirectRunner') == 0
  assert contents(tmp_path / 'store') == contents(alone)


def test_an_error_of_a_task_comes_through_beam_in_one_line(tmp_path, source, capsys):
  pytest.importorskip('apache_beam')
  with open(source / '1.tar', 'r+b') as file:
    file.truncate(60_000)
  assert run(source, tmp_path / 'store', '--runner=DirectRunner') == 2
  lines = capsys.readouterr().err.splitlines()
  assert lines[-1].startswith('error: ') and 'truncated or damaged' in lines[-1]


def test_without_beam_one_line_says_what_to_install(tmp_path, source, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  assert run(source, tmp_path / 'store', '--runner=DirectRunner') == 2
  assert "pip install 'tips_jax[beam]'" in capsys.readouterr().err
  assert not (tmp_path / 'store.partial').exists()


def test_another_input_does_not_go_on(tmp_path, source, capsys, monkeypatch):
  monkeypatch.setattr(convert, 'merge', lambda *args: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    run(source, tmp_path / 'store', '--workers=1')
  write_tar(source / '2.tar', members(range(100, 101)))
  assert run(source, tmp_path / 'store', '--workers=1') == 2
  assert 'was begun with files' in capsys.readouterr().err


# --- processes ----------------------------------------------------------------------------------


class Fake:
  """Work that fails as it is told."""

  def __init__(self, how):
    self._how = how

  def do(self, number, tell):
    if number == 3:
      if self._how == 'killed':
        os.kill(os.getpid(), signal.SIGKILL)
      raise {'input': InputError('bad'), 'crash': ZeroDivisionError(), 'disk': OSError('full')}[
        self._how
      ]
    tell(2, 5.0)


@pytest.mark.parametrize(
  'how, kind, text',
  [
    ('killed', PassingError, 'a process died .exit code -9'),
    ('input', InputError, 'bad'),
    ('disk', InputError, 'cannot write.*full'),
    ('crash', RuntimeError, 'ZeroDivisionError'),
  ],
)
def test_what_goes_wrong_in_a_process_is_raised_here(how, kind, text):
  told = []
  with pytest.raises(kind, match=text):
    processes.do(functools.partial(Fake, how), range(5), 1, lambda *more: told.append(more))
  assert np.sum(told, axis=0).tolist() in ([4, 10], [6, 15])


# --- pieces -------------------------------------------------------------------------------------


def tars(folder):
  write_tar(folder / 'a.tar', [*img2dataset(range(5)), ('stray', b'')])
  write_tar(folder / 'b.tar', img2dataset(range(5, 7)))
  return folder


def compressed_tar(folder):
  with tarfile.open(folder / 'a.tar.gz', 'w:gz') as tar:
    for name, data in img2dataset(range(5)):
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return folder


def loose(folder):
  write_files(folder, img2dataset(range(5)))
  return folder


def table(folder):
  write_files(folder, [(f'{i}.jpg', picture(i)) for i in range(7)])
  rows = ''.join(f'{i}.jpg,text {i}\n' for i in range(7))
  (folder / 'a.csv').write_text('image,text\n' + rows)
  return folder


def parquet(folder):
  for name, numbers in (('a', range(7)), ('b', range(7, 9))):
    columns = {'image': [picture(i) for i in numbers], 'text': [f'text {i}' for i in numbers]}
    pq.write_table(pa.table(columns), folder / f'{name}.parquet', row_group_size=2)
  return folder


def hugging_face(folder):
  table = pa.table({'image': [picture(i) for i in range(7)], 'text': [f't {i}' for i in range(7)]})
  with pa.ipc.new_stream(folder / 'data-0.arrow', table.schema) as stream:
    for batch in table.to_batches(max_chunksize=3):
      stream.write_batch(batch)
  (folder / 'state.json').write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
  return folder


def tfds_folder(folder):
  building = store.temporary_folder(folder / 'store')
  writer = store.Writer(building, store.features())
  for i in range(7):
    example = {'image': picture(i), 'id': str(i), 'alt_text': f'text {i}', 'captions': []}
    writer.add('train', example)
  writer.close()
  return store.finish(building, folder / 'store', {})


@pytest.mark.parametrize(
  'write', [tars, compressed_tar, loose, table, parquet, hugging_face, tfds_folder]
)
def test_the_pieces_of_an_input_are_the_whole(tmp_path, write):
  path = str(write(tmp_path))
  whole = open_input(path, Options())
  expected = list(whole)
  assert len(expected) >= 5 and all(sample.image and sample.alt_text for sample in expected)
  numbers = []
  for size in (1, 3000, 2**40):
    reader = open_input(path, Options())
    pieces = reader.pieces(size)
    samples = [list(reader.read(piece)) for piece in pieces]
    assert list(itertools.chain.from_iterable(samples)) == expected
    assert [reader.count(piece) for piece in pieces] == list(map(len, samples))
    assert reader.notes == whole.notes
    numbers.append(len(pieces))
    # One that reads a piece alone, as another process does.
    assert list(open_input(path, Options()).read(pieces[-1])) == samples[-1]
  assert numbers[0] > numbers[-1] or write is compressed_tar
  assert reader.size == pytest.approx(sum(len(s.image) for s in expected), rel=0.3, abs=30_000)


# --- copies and records -------------------------------------------------------------------------


@pytest.mark.parametrize('at_once', [1, 10, 10_000])
def test_copies_are_found_in_order_and_counted(tmp_path, monkeypatch, at_once):
  monkeypatch.setattr(copies, '_AT_ONCE', at_once)
  rng = np.random.default_rng(0)
  seen = {}
  expected = []
  tasks = []
  for task in range(9):
    hashes = copies.Hashes()
    mine = {}
    for index in range(40):
      digest = hashlib.sha256(rng.integers(250).tobytes()).digest()[: copies.DIGEST_BYTES]
      hashes.add(digest, task % 2, index)
      first = mine.get(digest) or seen.get(digest)
      if first:
        expected.append(((task, task % 2, index), first))
      seen.setdefault(digest, (task, task % 2, index))
      mine.setdefault(digest, (task, task % 2, index))
    paths = [str(tmp_path / f'{task}.{name}.npy') for name in 'hc']
    for path, array in zip(paths, hashes.sorted()):
      np.save(path, array)
    tasks.append(tuple(paths))
  found = copies.find(tasks, 2)
  got = [(tuple(row.tolist())[:3], row['of'].tolist()) for row in found.first]
  assert got == expected
  assert found.counts.tolist() == [sum(c[1] == split for c, _ in expected) for split in (0, 1)]
  monkeypatch.setattr(copies, 'MAX_LISTED', 5)
  assert len(copies.find(tasks, 2).first) == 5


def test_records_are_those_of_tfds_with_sorted_fields():
  names = [name for name in store.ANNOTATIONS if name != 'depth']
  features = store.features(names, labels=['cat', 'dog'])
  example = {
    'image': b'image',
    'id': 'ä',
    'alt_text': b'x',
    'captions': [],
    'label': 1,
    'mask': b'mask',
    'normals': b'normals',
    'boxes': np.full((2, 4), 0.5, np.float32),
    'region_captions': ['a', 'b'],
    'region_captions_boxes': [1, 0],
    'region_tags': [],
    'region_tags_boxes': [],
    'tags': [],
  }
  record = records.Serializer(features)(example)
  expected = features.serialize_example(features.encode_example(example))
  parse = tf_example_pb2.Example.FromString
  assert parse(record) == parse(expected)
  assert record == parse(expected).SerializeToString(deterministic=True)
  with pytest.raises(ValueError, match='expected'):
    records.Serializer(features)(example | {'more': 1})


def test_reports_are_added_and_lists_are_short(monkeypatch):
  monkeypatch.setattr(report, 'MAX_LISTED', 3)
  whole = report.Report()
  for number in range(3):
    part = report.Report()
    part.count('read', 'train', 2)
    part.note('tiny', 'train', f'{number}a')
    part.note('tiny', 'train', f'{number}b', 'why', 5)
    content = part.content()
    assert whole.add(content['splits']) == (number < 2)
    whole.list('tiny', content['rows']['tiny'])
  assert whole.content() == {
    'splits': {'train': {'read': 6, 'tiny': 18}},
    'rows': {
      'tiny': [
        {'split': 'train', 'id': '0a'},
        {'split': 'train', 'id': '0b', 'detail': 'why'},
        {'split': 'train', 'id': '1a'},
      ]
    },
  }


def test_tfds_reads_it(alone):
  assert len(tfds.builder_from_directory(str(alone)).as_data_source('train')) > 20


def test_inputs_open_again(source):
  readers = open_inputs({'train': (str(source), Options())})
  assert len(list(readers['train'])) == COUNT

"""The programs on buckets: memory://, and S3 and GCS as servers on this machine speak them. Each
gives what it gives on files.
"""

import json
import pathlib

import numpy as np
import pytest

import tips_jax
from configs import vits
from tests import bucket_server
from tests.data.pictures import picture
from tests.test_export import save_run
from tips_jax import evaluate, export, prepare
from tips_jax.core import buckets, schema, strict
from tips_jax.core.errors import InputError
from tips_jax.data import store
from tips_jax.data.reading.pipeline import Pipeline
from tips_jax.evals.report import figures
from tips_jax.interop import read
from tips_jax.interop.weights import flat
from tips_jax.runs import folder as runs

CONFIG = 'v1,runlocal'


@pytest.fixture(scope='module', params=bucket_server.SCHEMES)
def bucket(request, tmp_path_factory):
  with (
    bucket_server.bucket(request.param) as path,
    pytest.MonkeyPatch.context() as patch,
  ):
    patch.setenv('TIPS_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield path


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A folder with a table and its images."""
  folder = tmp_path_factory.mktemp('source')
  rows = []
  for i in range(40):
    (folder / f'{i}.jpg').write_bytes(picture(i))
    rows.append({'image': f'{i}.jpg', 'alt_text': f'alt of {i}', 'captions': [f'the {i}']})
  (folder / 'data.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return folder


@pytest.fixture(scope='module')
def local_store(source):
  path = source.parent / 'store'
  assert prepare.main(_prepare(source, path)) == 0
  return str(path)


@pytest.fixture(scope='module')
def bucket_store(bucket, source):
  buckets.upload(source, f'{bucket}/source', 'source')
  path = f'{bucket}/store'
  assert prepare.main(_prepare(f'{bucket}/source/data.jsonl', path)) == 0
  return path


def _prepare(source, path):
  flags = ['--tokenizer', '--vocab_size=300', '--test_fraction=0.3']
  return ['prepare', f'--input={source}', f'--output={path}', *flags]


@pytest.fixture(scope='module')
def local_run(tmp_path_factory):
  """A work folder of two checkpoints."""
  workdir = tmp_path_factory.mktemp('runs') / 'run'
  save_run(workdir, vits.get_config(CONFIG).to_dict(), (4, 8))
  return workdir


@pytest.fixture(scope='module')
def bucket_run(bucket, local_run):
  buckets.upload(local_run, f'{bucket}/run', 'run')
  return f'{bucket}/run'


def batches(path, count=6):
  plain = vits.get_config(CONFIG).to_dict()
  config = strict.build(schema.Config, plain | {'data': plain['data'] | {'store': path}})
  pipeline = Pipeline(config.data, batch_size=8, seed=3)
  try:
    return [next(pipeline) for _ in range(count)], pipeline.fingerprint
  finally:
    pipeline.close()


def test_a_store_that_was_prepared_in_a_bucket_trains_as_a_local_one(bucket_store, local_store):
  ours, fingerprint = batches(bucket_store)
  theirs, expected = batches(local_store)
  assert fingerprint == expected
  for one, other in zip(ours, theirs, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_store_is_not_written_twice(bucket_store, source, capsys):
  assert prepare.main(_prepare(source, bucket_store)) == 2
  assert f'--output: got {bucket_store!r}, which exists' in capsys.readouterr().err


def test_an_upload_that_was_cut_off_is_no_store(bucket, bucket_store):
  half = f'{bucket}/half'
  copy = pathlib.Path(buckets.local(bucket_store, 'store'))
  names = [name for name in buckets.files_below(copy) if name != store.INFO_FILE]
  buckets.upload(copy, half, 'store', only=names[1:])
  with pytest.raises(InputError, match='half-written store'):
    store.open_store(half)


def test_patterns_and_lists(bucket, bucket_store, source, capsys):
  for part in ('a', 'b'):
    for name in ('data.jsonl', '0.jpg', '1.jpg'):
      buckets.write(f'{bucket}/{part}/{name}', (source / name).read_bytes(), 'test')
  flags = [f'--output={source.parent}/of_patterns-{bucket[:2]}']
  assert prepare.main(['prepare', f'--input={bucket}/[ab]/*.jsonl', *flags]) == 2
  assert "a/data.jsonl' and 1 more; expected tars" in capsys.readouterr().err
  lists = f'{bucket}/a/*.none,{bucket}/b/{{0..1}}.jpg'
  assert prepare.main(['prepare', f'--input={lists}', *flags]) == 2
  assert 'of which no file matches' in capsys.readouterr().err


def test_a_run_loads(bucket_run, local_run):
  model = tips_jax.load(f'{bucket_run}@4').weights
  assert model.tokenizer and model.about['step'] == 4
  assert_equal(flat(model.params), flat(read.read(f'{local_run}@4').params))


# One server is enough for what takes longer: what differs is tested with all of them.
@pytest.mark.parametrize('bucket', ['gs'], indirect=True)
def test_an_export(bucket, bucket_run, local_run):
  output = f'{bucket}/exported'
  words = ['export', f'--checkpoint={bucket_run}@4', '--to=safetensors', f'--output={output}']
  assert export.main(words) == 0
  assert_equal(flat(read.read(output).params), flat(read.read(f'{local_run}@4').params))


def assert_equal(got, want):
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_of_a_run_that_is_read_only_what_is_needed_is_copied(bucket_run):
  path = runs.find(bucket_run, 'test', without=('train',))
  copied = {name.split('/')[0] for name in buckets.files_below(path)}
  assert {'params', 'digests.json'} <= copied and 'train' not in copied


def test_a_checkpoint_that_was_cut_off_does_not_count(bucket, bucket_run, local_run):
  half = f'{bucket}/half_run'
  names = [n for n in buckets.files_below(local_run) if not n.endswith('8/digests.json')]
  buckets.upload(local_run, half, 'run', only=names)
  assert runs.find(half, 'test').name == '4'
  with pytest.raises(InputError, match=r'test: got step 8; expected one that .* has: \[4\]'):
    runs.find(f'{half}@8', 'test')


@pytest.mark.parametrize('bucket', ['memory'], indirect=True)
def test_official_files_come_in_pairs(bucket, bucket_run, local_run, tmp_path):
  output = tmp_path / 'npz'
  words = ['export', f'--checkpoint={local_run}', '--to=official_jax', f'--output={output}']
  assert export.main(words) == 0
  (output / 'tips_jax.json').unlink()
  buckets.upload(output, f'{bucket}/npz', 'npz')
  [name] = [n for n in buckets.files_below(output) if n.endswith('_vision.npz')]
  model = read.read(f'{bucket}/npz/{name}')
  assert set(model.towers) == {'image', 'text', 'logit'} and model.tokenizer


@pytest.mark.parametrize('bucket', ['s3'], indirect=True)
def test_an_evaluation(bucket, bucket_run, bucket_store, capsys, monkeypatch):
  monkeypatch.setattr(figures, 'sections', lambda *_: [])  # no pictures, which take their time
  flags = [f'--checkpoint={bucket_run}', f'--store={bucket_store}', '--task=retrieval']
  flags += ['--recipe=short', '--size=32']
  for _ in range(2):
    assert evaluate.main(['evaluate', *flags]) == 0, capsys.readouterr().err
  output = f'{bucket_run}/evaluation/store-retrieval'
  assert f'written: {output}/index.html' in capsys.readouterr().out
  assert {'results.json', 'index.html'} <= buckets.names(output, 'test').keys()
  assert evaluate.main(['evaluate', f'--compare={output},{output}']) == 0
  assert 'retrieval' in capsys.readouterr().out

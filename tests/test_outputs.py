"""Where a program cannot write, it says so in one line before any work, and writes nothing."""

import os
import pathlib

import pytest

from tips_jax import encode, evaluate, export, plan, prepare
from tips_jax.core import buckets

CONFIG = str(pathlib.Path(__file__).parent.parent / 'configs/quickstart.py')
# The command without its output; all of it but the output is looked at later.
PROGRAMS = {
  'prepare': (prepare, ['--input=data'], '--output'),
  'export': (export, ['--checkpoint=run', '--to=hf'], '--output'),
  'encode': (encode, ['--checkpoint=run', '--texts=data'], '--output'),
  'evaluate': (evaluate, ['--checkpoint=run', '--suite=quick'], '--output'),
  'evaluate_cache': (evaluate, ['--checkpoint=run', '--suite=quick'], '--cache'),
  'plan': (plan, [f'--config={CONFIG}', '--topology=cpu'], '--dump'),
}
OUTPUTS = {
  'a bucket without its package': 'gs://bucket/out.npz',
  'another bucket': 's3://bucket/out.npz',
  'an unknown scheme': 'foo://bucket/out.npz',
  'a URL of a file': 'file:///out.npz',
  'in /proc': '/proc/out.npz',
  'under a file': 'file/out.npz',
  'deep under a file': 'file/a/b/out.npz',
  'a NUL byte': 'a\0b.npz',
  'a link to nothing': 'link.npz',
  'through a link to nothing': 'link.npz/a/out.npz',
  'a name that is too long': f'{"x" * 300}.npz',
}


@pytest.fixture
def here(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('in the way')
  os.symlink('nowhere', tmp_path / 'link.npz')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(buckets.importlib.util, 'find_spec', lambda name: None)
  return tmp_path


@pytest.mark.parametrize('output', OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize('program', PROGRAMS)
def test_one_line_and_nothing_written(here, capsys, program, output):
  module, words, flag = PROGRAMS[program]
  before = sorted(here.rglob('*'))
  assert module.main([program, *words, f'{flag}={output}']) == 2
  out, err = capsys.readouterr()
  assert out == '' and err.startswith(f'error: {flag}: got ') and err.count('\n') == 1, err
  assert sorted(here.rglob('*')) == before


NAMES_BUCKETS = [
  (prepare, ['--input={}', '--output=store']),
  (prepare, ['--input=data', '--output=store', '--tokenizer={}']),
  (prepare, ['--input=data', '--output={}']),
  (export, ['--checkpoint={}', '--to=hf', '--output=out']),
  (export, ['--checkpoint=run', '--to=hf', '--output', '{}']),
  (encode, ['--checkpoint={}', '--texts=data', '--output=out.npz']),
  (evaluate, ['--checkpoint={}@5', '--suite=quick']),
  (evaluate, ['--checkpoint=run', '--store={}']),
  (evaluate, ['--compare=out,{}']),
  (plan, [f'--config={CONFIG}', '--topology=cpu', '--config.data.store={}']),
  (plan, [f'--config={CONFIG}', '--topology=cpu', "--config.data.extra_stores=('a','{}')"]),
  (plan, [f'--config={CONFIG}', '--topology=cpu', '--config.init_from={}']),
]


@pytest.mark.parametrize('module, words', NAMES_BUCKETS)
@pytest.mark.parametrize(
  'path, says',
  [
    ('gs://bucket/x', "for which gcsfs is not installed; expected it: pip install -e '.[buckets]'"),
    ('gss://bucket/x', 'expected a path on this machine, or in a bucket: gs://, s3://, az://, '),
  ],
)
def test_a_bucket_that_cannot_be_used_is_one_line(here, capsys, module, words, path, says):
  before = sorted(here.rglob('*'))
  assert module.main(['program', *(word.format(path) for word in words)]) == 2
  err = capsys.readouterr().err
  assert f'got {path!r}' in err.replace('@5', '') and says in err and err.count('\n') == 1
  if path.startswith('gss'):
    assert "; did you mean 'gs://'?" in err
  assert sorted(here.rglob('*')) == before


@pytest.mark.parametrize(
  'module, words',
  [
    (encode, ['--checkpoint=run', '--images=s3://bucket/*.jpg', '--output=out.npz']),
    (encode, ['--checkpoint=run', '--texts=data', '--output=gs://bucket/out.npz']),
    (evaluate, ['--checkpoint=run', '--suite=quick,voc', '--data=gs://bucket/data']),
    (evaluate, ['--checkpoint=run', '--suite=quick', '--cache=gs://bucket/cache']),
    (plan, [f'--config={CONFIG}', '--topology=cpu', '--dump=gs://bucket/dump']),
    (plan, ['--config', 'gs://bucket/config.py', '--topology=cpu']),
  ],
)
def test_where_only_files_will_do_a_bucket_is_one_line(here, capsys, module, words):
  assert module.main(['program', *words]) == 2
  err = capsys.readouterr().err
  assert '://bucket/' in err and 'expected a path on this machine' in err and err.count('\n') == 1

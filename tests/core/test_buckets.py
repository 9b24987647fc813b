"""Paths in buckets: memory://, and S3 and GCS as servers on this machine speak them."""

import os
import pathlib

import pytest

from tests import bucket_server
from tips_jax.core import buckets, files
from tips_jax.core.errors import InputError, PassingError


@pytest.fixture(scope='module', params=bucket_server.SCHEMES)
def bucket(request):
  with bucket_server.bucket(request.param) as path:
    yield path


@pytest.fixture
def path(bucket, request):
  """A path in a bucket where nothing is."""
  return f'{bucket}/{request.node.originalname}/x'


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / 'written'
  (folder / 'a').mkdir(parents=True)
  (folder / 'a' / '0').write_bytes(b'zero')
  (folder / 'a b#?%.txt').write_text('no plain name')
  (folder / 'last').write_bytes(b'')
  return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('TIPS_JAX_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


def content(folder):
  folder = pathlib.Path(folder)
  return {name: (folder / name).read_bytes() for name in buckets.files_below(folder)}


def test_what_goes_up_comes_back(path, folder, cache):
  assert not buckets.exists(path, '--a')
  assert buckets.names(path, '--a') == {}
  buckets.upload(folder, path, '--a', last='last')
  assert buckets.exists(path, '--a')
  sizes = {name: size for name, (size, _) in buckets.names(path, '--a').items()}
  assert sizes == {'a/0': 4, 'a b#?%.txt': 13, 'last': 0}
  copy = buckets.local(path, '--a')
  assert content(copy) == content(folder)
  assert copy == str(cache / 'copies' / path.replace('://', '/'))
  file = buckets.local(f'{path}/a/0', '--a')
  assert pathlib.Path(file).read_bytes() == b'zero'
  buckets.remove(path, '--a', last='last')
  assert buckets.names(path, '--a') == {}


def test_only_what_has_changed_is_copied_again(path, folder, monkeypatch):
  buckets.upload(folder, path, '--a')
  copy = pathlib.Path(buckets.local(path, '--a'))
  buckets.write(f'{path}/a/0', b'ONE!', '--a')  # as many bytes
  buckets.write(f'{path}/new', b'new', '--a')
  buckets.remove(f'{path}/last', '--a', last='')
  (copy / 'a b#?%.txt').write_text('cut')
  copied = []
  get = buckets._get
  monkeypatch.setattr(buckets, '_get', lambda *args: copied.append(args[-1][0]) or get(*args))
  buckets.local(path, '--a')
  assert sorted(copied) == ['a b#?%.txt', 'a/0', 'new']
  assert content(copy) == {'a/0': b'ONE!', 'a b#?%.txt': b'no plain name', 'new': b'new'}
  buckets.local(path, '--a')
  assert len(copied) == 3


def test_what_is_not_wanted_is_neither_copied_nor_removed(path, folder):
  buckets.upload(folder, path, '--a')
  copy = pathlib.Path(buckets.local(path, '--a', wanted=lambda name: name == 'last'))
  assert list(content(copy)) == ['last']
  buckets.local(path, '--a', wanted=lambda name: name.startswith('a/'))
  assert list(content(copy)) == ['a/0', 'last']


def test_an_output_is_there_when_it_is_whole(path, folder):
  with buckets.output(path, '--output', last='last') as local:
    os.rename(folder, local)
    assert buckets.names(path, '--output') == {}
  assert len(buckets.names(path, '--output')) == 3
  with pytest.raises(InputError, match='--output: got .* which exists; expected a new folder'):
    with buckets.output(path, '--output', last='last'):
      pass


@pytest.mark.parametrize('kind', [KeyboardInterrupt, OSError])
def test_of_an_output_that_is_cut_off_nothing_stays(path, folder, cache, monkeypatch, kind):
  put = buckets._put
  order = []

  def fail(system, path, folder, name):
    order.append(name)
    if name == 'last':
      raise kind
    put(system, path, folder, name)

  monkeypatch.setattr(buckets, '_put', fail)
  with pytest.raises((KeyboardInterrupt, PassingError)):
    with buckets.output(f'{path}-{kind.__name__}', '--output', last='last') as local:
      os.rename(folder, local)
  assert order[-1] == 'last' and len(order) == 3
  assert buckets.names(f'{path}-{kind.__name__}', '--output') == {}
  assert buckets.files_below(cache) == []


def test_an_update_keeps_what_was_there(path, folder):
  buckets.upload(folder, path, '--a')
  with buckets.updated(path, '--output', last='last') as local:
    assert content(local) == content(folder)
    (local / 'last').write_text('second')
  assert buckets.read(f'{path}/last', '--a') == b'second'
  assert len(buckets.names(path, '--a')) == 3


def test_a_cut_off_copy_is_an_error_and_leaves_no_file(path, folder, monkeypatch):
  buckets.upload(folder, path, '--a')
  system = buckets._system(path)
  monkeypatch.setattr(system, 'get_file', lambda there, here: open(here, 'w').close())
  with pytest.raises(PassingError, match='--a: cannot copy .* of'):
    buckets.local(path, '--a')
  assert content(buckets.mirror(path, 'copies')).keys() <= {'last'}


def test_what_is_missing_is_said(path):
  assert buckets.read(f'{path}/none', '--a') is None
  with pytest.raises(InputError, match=f"--a: got '{path}', which does not exist"):
    buckets.local(path, '--a')


def test_an_object_that_would_leave_the_folder_is_refused(cache):
  with bucket_server.bucket('memory') as bucket:
    buckets._system(bucket).pipe_file(f'{bucket}/x/../../outside', b'')
    with pytest.raises(InputError, match=r'--a: got .*outside.; expected names without \.\.'):
      buckets.local(bucket, '--a')
  assert buckets.files_below(cache) == []


def test_where_it_can_be_written_nothing_stays(path):
  files.require_writable(path, '--output')
  assert buckets.names(path, '--output') == {}


@pytest.mark.parametrize('scheme', ['s3', 'gs'])
def test_a_bucket_that_does_not_exist(scheme):
  with bucket_server.bucket(scheme):
    with pytest.raises(InputError, match=f"--output: cannot write '{scheme}://nobodys/x'"):
      files.require_writable(f'{scheme}://nobodys/x', '--output')
    with pytest.raises(InputError, match=f'--store: (got|cannot read) .{scheme}://nobodys/x'):
      buckets.local(f'{scheme}://nobodys/x', '--store')


def test_room_is_looked_for_first(path, folder, monkeypatch):
  buckets.upload(folder, path, '--a')
  monkeypatch.setattr(buckets, '_TELL', 0)
  monkeypatch.setattr(buckets, '_SPARE', 2**62)
  with pytest.raises(InputError, match='--store: got .* are to be copied .* 0.0 GB are free'):
    buckets.local(path, '--store')
  assert content(buckets.mirror(path, 'copies')) == {}


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
  'path, says',
  [
    ('foo://b/x', 'expected a path on this machine, or in a bucket: gs://, s3://'),
    ('gcs://b/x', "did you mean 'gs://'"),
    ('S3://b/x', "did you mean 's3://'"),
    ('file:///x', 'expected a path on this machine'),
    ('gs://', 'expected gs://BUCKET/FOLDER'),
    ('gs:///x', 'expected gs://BUCKET/FOLDER'),
    ('gs://b//x', 'expected gs://BUCKET/FOLDER'),
    ('gs://b/../x', 'expected gs://BUCKET/FOLDER'),
    ('gs://b/a\0b', 'expected gs://BUCKET/FOLDER'),
  ],
)
def test_refused(monkeypatch, path, says):
  monkeypatch.setattr(buckets.importlib.util, 'find_spec', lambda name: True)
  with pytest.raises(InputError, match='^--a: got ') as error:
    buckets.check(path, '--a')
  assert says in str(error.value)


@pytest.mark.parametrize(
  'path, package, install',
  [
    ('gs://b/x', 'gcsfs', "-e '.[buckets]'"),
    ('s3://b/x', 's3fs', "-e '.[buckets]'"),
    ('az://b/x', 'adlfs', 'adlfs'),
  ],
)
def test_without_its_package(monkeypatch, path, package, install):
  monkeypatch.setattr(buckets.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(InputError) as error:
    buckets.check(path, '--a')
  assert str(error.value) == (
    f'--a: got {path!r}, for which {package} is not installed; expected it: pip install {install}'
  )


def test_paths_of_this_machine_pass(tmp_path):
  for path in ('x', '/x/y', 'C:/x', 'name:1.0.0', 'gs:/x', tmp_path):
    assert not buckets.is_bucket(path)
    buckets.check(path, '--a')
    assert buckets.local(path, '--a') == os.fspath(path)


def test_our_own_faults_keep_their_traceback():
  with pytest.raises(TypeError), buckets._one_error('cannot write'):
    raise TypeError('ours')

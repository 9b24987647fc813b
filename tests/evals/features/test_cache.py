"""The cache: what is read is what was computed, nothing is computed twice, and a killed run goes
on.
"""

import errno
import os
import threading

import numpy as np
import pytest

from tests.disk import full_disk
from tests.evals.stub_encoder import Stub
from tips_jax.core.errors import InputError
from tips_jax.evals.features import cache as cache_lib

COUNT, SIDE = 23, 16


class Source:
  """Records of random images; `broken` ones raise when they are prepared."""

  def __init__(self, broken=(), count=COUNT):
    self.images = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3)).astype(np.uint8)
    self.broken, self.read = set(broken), []

  def __len__(self):
    return len(self.images)

  def __getitem__(self, i):
    self.read.append(i)
    return {'number': i, 'label': i % 3}

  def prepare(self, record):
    if record['number'] in self.broken:
      raise ValueError('no image')
    return self.images[record['number']]


@pytest.fixture
def cache(tmp_path):
  return cache_lib.Cache(tmp_path / 'cache')


def extract(cache, encoder, source, **options):
  options = {
    'outputs': ('patch', 'value_patch'),
    'intermediate_layers': (0, 3),
    'key': 'data',
    'batch_size': 4,
  } | options
  return cache.extract(encoder, source, source.prepare, **options)


def test_features_are_those_of_the_encoder(cache):
  source = Source()
  found = extract(cache, Stub(), source)
  wanted = Stub().inspect(source.images, intermediate_layers=(0, 3), values=True)
  for name in ('web', 'synthetic', 'embedding'):
    assert found.arrays[name].dtype == np.float32
    np.testing.assert_allclose(found.arrays[name], wanted[name], rtol=1e-5, atol=1e-6)
  for name in ('patch', 'value_patch'):
    assert found.arrays[name].dtype == np.float16
    np.testing.assert_allclose(found.arrays[name], wanted[name], rtol=1e-3, atol=1e-3)
  for (patch, cls), (wanted_patch, wanted_cls) in zip(
    found.intermediate_layers, wanted['intermediate_layers'], strict=True
  ):
    np.testing.assert_allclose(patch, wanted_patch, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(cls, wanted_cls, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(found.rows, np.arange(COUNT))
  np.testing.assert_array_equal(found.label, np.arange(COUNT) % 3)
  assert set(found.seconds) == {'encoder', 'reading'} and min(found.seconds.values()) >= 0


def test_only_what_is_asked_for_is_kept(cache):
  found = extract(cache, Stub(), Source(), outputs=(), intermediate_layers=())
  assert set(found.arrays) == {'web', 'synthetic', 'embedding'} and found.intermediate_layers == ()


@pytest.mark.parametrize(
  'wanted',
  [{}, {'outputs': ('patch',)}, {'outputs': ('value_patch',)}, {'intermediate_layers': (0,)}],
)
def test_only_what_is_kept_is_asked_for(cache, wanted):
  class Asked(Stub):
    def inspect(self, images, **options):
      asked.append(options)
      return super().inspect(images, **options)

  asked, wanted = [], {'outputs': (), 'intermediate_layers': ()} | wanted
  extract(cache, Asked(), Source(), **wanted)
  outputs = wanted['outputs']
  options = {
    'intermediate_layers': wanted['intermediate_layers'],
    'patches': 'patch' in outputs,
    'values': 'value_patch' in outputs,
    'regions': 'region_patch' in outputs,
  }
  assert asked == [options] * 6


def test_a_second_time_nothing_is_computed(cache):
  first = extract(cache, Stub(), Source())
  again, source = Stub(), Source()
  second = extract(cache, again, source)
  assert again.images == 0 and source.read == [] and second.key == first.key
  np.testing.assert_array_equal(second.arrays['patch'], first.arrays['patch'])


@pytest.mark.parametrize(
  'change',
  [
    dict(key='other'),
    dict(outputs=('patch',)),
    dict(intermediate_layers=(1, 2)),
    dict(seed=1),
    dict(count=COUNT - 1),
  ],
)
def test_anything_else_is_computed_anew(cache, change):
  extract(cache, Stub(), Source())
  encoder, source = Stub(seed=change.pop('seed', 0)), Source(count=change.pop('count', COUNT))
  extract(cache, encoder, source, **change)
  assert encoder.images >= len(source)


def test_a_killed_run_goes_on(cache, tmp_path):
  """Interrupted after three batches: those are not computed again, and the result is that of a
  whole run.
  """
  with pytest.raises(KeyboardInterrupt):
    extract(cache, Stub(stop_after=12), Source())
  encoder, source = Stub(), Source()
  found = extract(cache, encoder, source, batch_size=5)  # another batch size goes on, too
  assert sorted(source.read) == list(range(12, COUNT)) and encoder.images == 15
  whole = extract(cache_lib.Cache(tmp_path / 'whole'), Stub(), Source())
  for name in whole.arrays:
    np.testing.assert_allclose(found.arrays[name], whole.arrays[name], rtol=1e-3, atol=1e-5)
  np.testing.assert_array_equal(found.label, whole.label)


def test_marks_are_on_disk_only_after_the_features(cache, monkeypatch):
  """Without a flush nothing is marked, so that a crash leaves no marked row without features."""
  monkeypatch.setattr(cache_lib, '_FLUSH_S', 1e9)
  seen = []
  original = cache_lib._Table.write

  def write(self, rows, values, labels):
    original(self, rows, values, labels)
    seen.append(int(np.load(next(cache.folder.glob('features/*/done.npy'))).sum()))

  monkeypatch.setattr(cache_lib._Table, 'write', write)
  extract(cache, Stub(), Source())
  assert set(seen) == {0} and np.load(next(cache.folder.glob('features/*/done.npy'))).sum() == COUNT


@pytest.mark.parametrize('broken', [(0, 1, 2, 3, 4), (7,), (22,), tuple(range(1, COUNT))])
def test_unreadable_images_are_left_out(cache, broken, caplog):
  source = Source(broken)
  for _ in range(2):  # computed, and from the disk
    found = extract(cache, Stub(), source)
    rest = np.setdiff1d(np.arange(COUNT), broken)
    np.testing.assert_array_equal(found.rows, rest)
    np.testing.assert_array_equal(found.label, rest % 3)
    wanted = Stub().inspect(source.images[rest])
    patch = found.arrays['patch']
    assert patch.shape == wanted['patch'].shape and len(patch) == len(rest)
    np.testing.assert_allclose(np.asarray(patch), wanted['patch'], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(patch[np.array([0, -1])], np.asarray(patch)[[0, -1]])
    np.testing.assert_array_equal(patch[:1], np.asarray(patch)[:1])
  assert len(caplog.records) == len(broken)  # said once


@pytest.mark.parametrize('count, encoded', [(1, 1), (3, 4), (8, 8), (9, 16), (23, 24)])
def test_few_images_are_not_filled_up_to_a_batch(cache, count, encoded):
  """Batches of 8; images of one shape among many shapes are few."""
  encoder = Stub()
  assert len(extract(cache, encoder, Source(count=count), batch_size=8).rows) == count
  assert encoder.images == encoded


def test_a_batch_is_written_while_the_next_one_is_encoded(cache, monkeypatch):
  writing, encoded = threading.Event(), threading.Event()

  class Slow(Stub):
    def inspect(self, images, **options):
      assert not self.images or writing.wait(10)
      out = super().inspect(images, **options)
      if self.images > 4:
        encoded.set()
      return out

  def write(self, *args, original=cache_lib._Table.write):
    writing.set()
    assert encoded.wait(10)  # of the batch after this one
    original(self, *args)

  monkeypatch.setattr(cache_lib._Table, 'write', write)
  assert len(extract(cache, Slow(), Source()).rows) == COUNT


def test_a_write_that_fails_is_said(cache, monkeypatch):
  def write(*_):
    raise InputError('disk')

  monkeypatch.setattr(cache_lib._Table, 'write', write)
  encoder = Stub()
  with pytest.raises(InputError, match='disk'):
    extract(cache, encoder, Source())
  assert encoder.images <= 8  # no more than was under way


def test_nothing_readable(cache):
  with pytest.raises(InputError, match='none of 23 images can be read'):
    extract(cache, Stub(), Source(range(COUNT)))


def test_no_room(cache, monkeypatch):
  monkeypatch.setattr(cache_lib.shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 1000})())
  with pytest.raises(
    InputError, match=r'--cache: .* 0.0 GB free; these features take .* expected a larger disk'
  ):
    extract(cache, Stub(), Source())
  assert list(cache.folder.glob('features/*')) == []


def holes(folder):
  """Files with fewer bytes on the disk than they have."""
  return [x.name for x in folder.iterdir() if 512 * x.stat().st_blocks < x.stat().st_size]


needs_fallocate = pytest.mark.skipif(not hasattr(os, 'posix_fallocate'), reason='no such call')


@needs_fallocate
def test_files_have_all_their_room_with_the_first_batch(cache):
  with pytest.raises(KeyboardInterrupt):
    extract(cache, Stub(stop_after=4), Source(count=2000))
  [folder] = cache.folder.glob('features/*')
  assert holes(folder) == []
  # As a copy, or an older version, may have left them: the room is taken before more is written.
  size = (folder / 'patch.npy').stat().st_size
  os.truncate(folder / 'patch.npy', size // 2)
  os.truncate(folder / 'patch.npy', size)
  assert holes(folder) == ['patch.npy']
  with pytest.raises(KeyboardInterrupt):
    extract(cache, Stub(stop_after=4), Source(count=2000))
  assert holes(folder) == []


@needs_fallocate
@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_one_line_and_not_a_signal(cache, monkeypatch, number):
  def allocate(*_):
    raise OSError(number, os.strerror(number))

  message = f'--cache: .*features.: the features take more room .*{os.strerror(number)}.*--limit'
  with monkeypatch.context() as patch:
    patch.setattr(os, 'posix_fallocate', allocate)
    with pytest.raises(cache_lib.DiskFull, match=message) as error:
      extract(cache, Stub(), Source())
    assert '\n' not in str(error.value)
    assert list(cache.folder.glob('features/*')) == []
  with pytest.raises(KeyboardInterrupt):
    extract(cache, Stub(stop_after=4), Source())
  monkeypatch.setattr(os, 'posix_fallocate', allocate)
  with pytest.raises(cache_lib.DiskFull, match='the features take more room'):
    extract(cache, Stub(), Source())


def test_files_that_may_not_grow_are_one_line(cache):
  with full_disk(20_000), pytest.raises(cache_lib.DiskFull, match='File too large'):
    extract(cache, Stub(), Source(count=2000))
  assert list(cache.folder.glob('features/*')) == []


@needs_fallocate
def test_a_disk_that_cannot_promise_room_is_used_all_the_same(cache, monkeypatch):
  def allocate(*_):
    raise OSError(errno.EOPNOTSUPP, 'no such operation')

  monkeypatch.setattr(os, 'posix_fallocate', allocate)
  assert len(extract(cache, Stub(), Source()).rows) == COUNT


def test_a_damaged_folder_is_said(cache):
  extract(cache, Stub(), Source())
  next(cache.folder.glob('features/*/patch.npy')).write_bytes(b'no array')
  with pytest.raises(InputError, match='cannot be read .*; remove it'):
    extract(cache, Stub(), Source())


def test_a_file_that_was_cut_is_said_and_never_filled_with_zeros(cache):
  extract(cache, Stub(), Source())
  path = next(cache.folder.glob('features/*/patch.npy'))
  data = path.read_bytes()
  path.write_bytes(data[:-100])
  with pytest.raises(InputError, match='cannot be read .*; remove it'):
    extract(cache, Stub(), Source())
  assert len(path.read_bytes()) == len(data) - 100


@pytest.mark.parametrize('name', ['patch', 'web', 'label', 'layer0_cls', 'done', 'checksums'])
def test_a_row_with_a_flipped_bit_is_computed_again(cache, caplog, name):
  source = Source(broken=[5])
  wanted = extract(cache, Stub(), source)
  values = {key: np.array(x) for key, x in wanted.arrays.items()}
  path = next(cache.folder.glob(f'features/*/{name}.npy'))
  data = bytearray(path.read_bytes())
  data[-1] ^= 1  # of the last row
  path.write_bytes(data)
  source.read.clear()
  found = extract(cache, Stub(), source)
  assert source.read == [COUNT - 1]
  if data[-1] or name != 'done':  # a row that is marked as still to do is no damage
    assert '1 rows of' in caplog.text
  np.testing.assert_array_equal(found.rows, wanted.rows)
  # A batch of another size is rounded in another order.
  for key, x in values.items():
    np.testing.assert_allclose(found.arrays[key], x, rtol=1e-3, atol=1e-6)


def test_features_without_numbers_are_zero(cache):
  class Broken(Stub):
    def inspect(self, images, **options):
      out = super().inspect(images, **options)
      out['web'][0, 0] = np.nan
      out['patch'][0, 0, 0] = 1e6  # beyond float16
      return out

  found = extract(cache, Broken(), Source(), batch_size=COUNT)
  assert (found.arrays['web'][0] == 0).all() and (found.arrays['web'][1] != 0).all()
  assert np.isfinite(found.arrays['patch']).all() and found.arrays['patch'][0, 0, 0, 0] == 65504


def test_progress_tells_of_every_batch(cache):
  told = []
  bar = type('Bar', (), {'update': lambda _, done: told.append(done)})()
  with pytest.raises(KeyboardInterrupt):
    extract(cache, Stub(stop_after=8), Source(), progress=bar)
  extract(cache, Stub(), Source([20]), progress=bar)
  assert told == [4, 8, 12, 16, 20, 23]


def test_texts(cache):
  texts = ['a cat', 'a dog', 'a cat', 'grass']
  encoder = Stub()
  found, seconds = cache.texts(encoder, texts, batch_size=2)
  assert sorted(encoder.texts) == ['a cat', 'a dog', 'grass'] and seconds > 0
  np.testing.assert_array_equal(found, Stub().encode_text(texts))
  again = Stub()
  second, seconds = cache.texts(again, texts[::-1])
  np.testing.assert_array_equal(second, found[::-1])
  assert again.texts == [] and seconds == 0
  cache.texts(other := Stub(seed=1), texts)
  assert len(other.texts) == 3

"""Masks, depth and normals of the dense benchmarks."""

import gzip
import io
import os
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data.benchmarks import fake_benchmarks as fake
from tips_jax.core.errors import InputError
from tips_jax.data.benchmarks import dense, pickled
from tips_jax.data.benchmarks import table as benchmarks
from tips_jax.evals.datasets import on_disk


def test_voc_and_context_masks_are_the_palette_indices(tmp_path):
  fake.voc(tmp_path)
  fake.context(tmp_path)
  for name, values, classes in (('voc', [0, 1, 20, 255], 21), ('context', [0, 1, 59], 60)):
    reader = benchmarks.open(name, tmp_path, 'test')
    assert len(reader.mask_classes) == classes and reader.mask_classes[0] == 'background'
    mask = Image.open(io.BytesIO(reader[1].extra['mask']))
    assert mask.mode == 'L'
    np.testing.assert_array_equal(np.asarray(mask), fake.ids(values, 1))


def test_ade20k_moves_other_to_void_and_classes_down_by_one(tmp_path):
  fake.ade20k(tmp_path)
  reader = benchmarks.open('ade20k', tmp_path, 'test')
  official = fake.ids([0, 1, 2, 150], 2)
  expected = np.where(official == 0, 255, official.astype(int) - 1)
  np.testing.assert_array_equal(fake.array(reader[2].extra['mask']), expected)
  assert reader.mask_classes[0] == 'wall' and reader.mask_classes[149] == 'flag'


def test_nyu_is_found_where_bts_unpacks_it(tmp_path):
  fake.nyu(tmp_path)
  plain = [sample.key for sample in benchmarks.open('nyu', tmp_path, 'test')]
  for split, inside in (('train', 'sync'), ('test', 'official_splits/test')):
    for folder in {
      line.split()[0].strip('/').split('/')[0]
      for line in (tmp_path / 'nyu' / f'nyu_{split}.txt').read_text().splitlines()
    }:
      os.renames(tmp_path / 'nyu' / folder, tmp_path / 'nyu' / inside / folder)
    reader = benchmarks.open('nyu', tmp_path, split)
    assert reader.missing() == [] and reader[0].problem == ''
  assert [sample.key for sample in benchmarks.open('nyu', tmp_path, 'test')] == plain


def test_geonet_files_give_back_image_depth_and_normals(tmp_path):
  fake.nyu_geonet(tmp_path)
  reader = benchmarks.open('nyu_normals', tmp_path, 'train')
  assert len(reader) == 3
  sample = reader[1]
  np.testing.assert_allclose(
    fake.array(sample.image).astype(int), fake.pixels(1).astype(int), atol=1
  )
  depth = fake.array(sample.extra['depth'])
  assert depth[5, 5] == 2000 and depth[0, 0] == 0
  np.testing.assert_allclose(
    fake.array(sample.extra['normals']) / 127.5 - 1, fake.unit_normals(1), atol=0.005
  )


def test_geonet_leaves_out_two_files_by_number(tmp_path, monkeypatch):
  fake.nyu_geonet(tmp_path)
  monkeypatch.setattr(dense.NyuNormals, 'left_out', (2, 0))
  assert benchmarks.open('nyu_normals', tmp_path, 'train').items == ['kitchen_0001_1.mat']


def test_labeled_nyu_reads_the_test_numbers(tmp_path):
  pytest.importorskip('h5py')
  fake.nyu_labeled(tmp_path)
  reader = benchmarks.open('nyu_normals', tmp_path, 'test')
  assert reader.items == [1, 3]
  np.testing.assert_array_equal(fake.array(reader[1].image), fake.pixels(3))
  np.testing.assert_allclose(
    fake.array(reader[1].extra['normals']) / 127.5 - 1, fake.unit_normals(3), atol=0.005
  )
  assert (fake.array(reader[1].extra['depth']) == 1500).all()


def test_a_pickle_that_is_more_than_arrays_is_refused(tmp_path):
  with gzip.open(tmp_path / 'p', 'wb') as file:
    pickle.dump(os.getcwd, file)
  with (
    gzip.open(tmp_path / 'p') as file,
    pytest.raises(pickle.UnpicklingError, match='NumPy arrays only'),
  ):
    pickled.arrays_of_pickle(file)


def test_arrays_of_any_pickle_protocol_are_read():
  arrays = {'c': np.arange(6.0).reshape(2, 3), 'f': np.asfortranarray(np.arange(6).reshape(2, 3))}
  for protocol in (0, 2, 4, 5):
    found = pickled.arrays_of_pickle(io.BytesIO(pickle.dumps(arrays, protocol)))
    for name, x in arrays.items():
      np.testing.assert_array_equal(found[name], x)


class Crafted:
  """A pickle of an array with a state that NumPy itself did not make."""

  def __init__(self, *state):
    self.state = state

  def __reduce__(self):
    return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b'b'), self.state


@pytest.mark.parametrize(
  'state',
  [
    (1, (1 << 40,), np.dtype('f8'), False, b'12345678'),
    (1, (-1,), np.dtype('f8'), False, b'12345678'),
    (1, (1,), np.dtype('O'), False, b'12345678'),
    (1, (1,), 7, False, b'12345678'),
    (1, (1,), np.dtype('f8'), False, 3),
    (1,),
  ],
)
def test_crafted_states_are_errors_and_no_crash(state):
  with pytest.raises((pickle.UnpicklingError, ValueError, TypeError, AttributeError)):
    pickled.arrays_of_pickle(io.BytesIO(pickle.dumps(Crafted(*state))))


def test_a_flipped_bit_at_the_end_of_the_normals_is_noticed(tmp_path):
  pytest.importorskip('h5py')
  fake.nyu_labeled(tmp_path)
  [file] = tmp_path.rglob('all_normals.pklz')
  data = bytearray(file.read_bytes())
  data[-6] ^= 1  # of the checksum
  file.write_bytes(data)
  with pytest.raises(
    InputError, match='all_normals.pklz no pickle of arrays .*CRC.*; copy it again'
  ):
    benchmarks.open('nyu_normals', tmp_path, 'test')[0]


def test_labeled_nyu_without_h5py_is_one_error_for_all_samples(tmp_path, monkeypatch):
  pytest.importorskip('h5py')  # which writes the file
  fake.nyu_labeled(tmp_path)
  monkeypatch.setitem(sys.modules, 'h5py', None)  # as if it were not installed
  reader = benchmarks.open('nyu_normals', tmp_path, 'test')
  with pytest.raises(InputError, match='expected h5py: pip install h5py'):
    list(reader)
  report = on_disk.check('nyu_normals', tmp_path, tasks=['dpt_normals'])
  assert sum('pip install h5py' in problem for problem in report.problems) == 1


@pytest.mark.parametrize('content', ['{}', '[1]', '[{"img": 7}]', '[{"img": "x_y.png"}]', 'null'])
def test_an_index_file_of_other_types_is_one_line(tmp_path, content):
  fake.nyu_labeled(tmp_path)
  [file] = tmp_path.rglob('test_SN40.json')
  file.write_text(content)
  with pytest.raises(InputError, match="^nyu_normals: .*split 'test'") as error:
    benchmarks.open('nyu_normals', tmp_path, 'test')
  assert '\n' not in str(error.value)


def test_navi_is_cut_around_the_object(tmp_path):
  fake.navi(tmp_path)
  reader = benchmarks.open('navi', tmp_path, 'train')
  assert [sample.key for sample in reader][:2] == [
    'dog/multiview-00-pixel_5/000.jpg',
    'dog/multiview-00-pixel_5/001.jpg',
  ]  # no cat: it has no wild set
  sample = benchmarks.open('navi', tmp_path, 'test')[0]
  depth, normals = fake.array(sample.extra['depth']), fake.array(sample.extra['normals'])
  assert fake.array(sample.image).shape == (512, 512, 3) and depth.shape == (512, 512)
  # 30 x 20 pixels of object: a square of 30 holds all of its width and two thirds of its height.
  known = depth > 0
  assert known.any(0).all() and abs(known.any(1).mean() - 2 / 3) < 0.05
  assert set(np.unique(depth)) == {0, 500}
  inner = normals[246:266, 246:266].reshape(-1, 3) / 127.5 - 1
  assert (inner[:, 2] > 0.5).all()
  assert (normals[~known] == 0).all()

"""Splits, masks and boxes of the small packs."""

import json

import numpy as np
import pytest

from tests.data.benchmarks import fake_benchmarks as fake
from tips_jax.core.errors import InputError
from tips_jax.data.benchmarks import table as benchmarks


def test_camvid_holds_out_a_sequence_and_knows_its_void(tmp_path):
  fake.camvid(tmp_path)
  reader = benchmarks.open('camvid', tmp_path, 'test')
  assert {row['sequence'] for row in reader.items} == {'0001TP'}
  assert '0001TP' not in {
    row['sequence'] for row in benchmarks.open('camvid', tmp_path, 'train').items
  }
  official = fake.ids([0, 10, 11], 1)
  np.testing.assert_array_equal(
    fake.array(reader[0].extra['mask']), np.where(official == 11, 255, official)
  )


def test_coco_mini_classes_are_contiguous_and_boxes_are_fractions(tmp_path):
  fake.coco_mini(tmp_path)
  reader = benchmarks.open('coco_mini', tmp_path, 'test')
  official = fake.ids([0, 1, 184, 200])
  expected = np.select([official == 0, official == 1, official == 184], [255, 0, 1], 2)
  np.testing.assert_array_equal(fake.array(reader[0].extra['mask']), expected)
  assert reader.mask_classes == ('person', 'tree-merged', 'rug-merged')
  np.testing.assert_allclose(reader[0].extra['boxes'], [[6 / 30, 10 / 40, 18 / 30, 30 / 40]])
  assert reader[0].extra['tags'] == reader[0].extra['region_tags'] == ['person']
  assert benchmarks.open('coco_mini', tmp_path, 'captions')[0].extra['boxes'].shape == (0, 4)


def test_rgbd_holds_out_the_last_fifth_and_faces_the_viewer(tmp_path):
  fake.rgbd(tmp_path)
  reader = benchmarks.open('rgbd', tmp_path, 'test')
  assert [row['image'] for row in reader.items] == ['4.jpg']
  normals = fake.array(reader[0].extra['normals'])
  np.testing.assert_array_equal(normals[15, 20], [128, 128, 255])
  assert (normals[0, 0] == 0).all()
  assert fake.array(reader[0].extra['depth'])[15, 20] == 1500


@pytest.mark.parametrize(
  'row',
  [[1], {'captions': ['a']}, {'image': 1}, {'image': 'a.jpg', 'captions': [True]}],
  ids=['no row', 'no image', 'a number', 'no text'],
)
def test_a_row_of_other_types_is_one_line(tmp_path, row):
  fake.flickr8k(tmp_path)
  fake.put(tmp_path / 'flickr8k' / 'dev.jsonl', json.dumps(row))
  with pytest.raises(InputError, match='an index file in .* is damaged or another'):
    benchmarks.open('flickr8k', tmp_path, 'test')


def test_classes_that_are_no_text_are_one_line(tmp_path):
  fake.cifar10(tmp_path)
  fake.put(tmp_path / 'cifar10' / 'meta.json', json.dumps({'classes': ['a', 1]}))
  with pytest.raises(InputError, match='classes: got 1; expected str'):
    benchmarks.open('cifar10', tmp_path, 'test')

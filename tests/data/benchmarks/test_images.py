"""Classes, instances and captions of the benchmarks of whole images."""

import os

import pytest

from tests.data.benchmarks import fake_benchmarks as fake
from tips_jax.core.errors import InputError
from tips_jax.data.benchmarks import table as benchmarks


def test_imagenet_labels_are_the_sorted_wordnet_ids(tmp_path):
  fake.imagenet(tmp_path)
  for split in ('train', 'test'):
    reader = benchmarks.open('imagenet', tmp_path, split)
    assert reader.label_names == fake.WNIDS
    for sample in reader:
      assert sample.key.startswith(reader.label_names[sample.extra['label']])


def test_imagenet_as_kaggle_has_it(tmp_path):
  fake.imagenet_kaggle(tmp_path)
  reader = benchmarks.open('imagenet', tmp_path, 'test')
  assert [sample.extra['label'] for sample in reader] == [2, 1, 0]
  (tmp_path / 'imagenet/LOC_val_solution.csv').unlink()
  with pytest.raises(InputError, match='no folders of classes'):
    benchmarks.open('imagenet', tmp_path, 'test')


def test_uned_classes_carry_their_domain(tmp_path):
  for domain in ('gldv2', 'rp2k'):
    fake.WRITE[f'uned_{domain}'](tmp_path)
  assert benchmarks.open('uned_gldv2', tmp_path, 'test')[0].extra['tags'] == ['gldv2/3', 'gldv2/4']
  assert [s.extra['tags'] for s in benchmarks.open('uned_gldv2', tmp_path, 'index')][0] == [
    'gldv2/7'
  ]
  assert all(
    sample.image for sample in benchmarks.open('uned_rp2k', tmp_path, 'test')
  )  # one name is escaped
  with pytest.raises(InputError, match="split.*'index'"):
    benchmarks.open('uned_rp2k', tmp_path, 'index')


def test_karpathy_splits_and_captions(tmp_path):
  fake.coco(tmp_path)
  fake.flickr30k(tmp_path)
  for name in ('coco', 'flickr30k'):
    reader = benchmarks.open(name, tmp_path, 'test')
    assert reader[0].captions == [f'A caption {k} of 3 .' for k in range(5)]
    assert len(benchmarks.open(name, tmp_path, 'train')) == 2  # train and restval


def test_coco_takes_the_images_of_2017_too(tmp_path):
  fake.coco(tmp_path)
  before = [sample.image for sample in benchmarks.open('coco', tmp_path, 'test')]
  for folder in ('train2014', 'val2014'):
    for path in sorted((tmp_path / 'coco' / folder).iterdir()):
      os.renames(path, tmp_path / 'coco' / 'val2017' / path.name.rpartition('_')[2])
  assert [sample.image for sample in benchmarks.open('coco', tmp_path, 'test')] == before

"""Benchmarks by name: every official layout, as a tiny folder, is read and becomes a store."""

import io
import json
import pickle

import numpy as np
import pytest

from tests.data.benchmarks import fake_benchmarks as fake
from tips_jax.core.errors import InputError
from tips_jax.data import store
from tips_jax.data.benchmarks import table as benchmarks
from tips_jax.data.ingest import convert


@pytest.mark.parametrize('name', fake.WRITE)
def test_every_layout_is_read(tmp_path, name):
  fake.WRITE[name](tmp_path)
  for split, count in fake.COUNTS[name].items():
    reader = benchmarks.open(name, tmp_path, split)
    samples = list(reader)
    assert len(reader) == len(samples) == reader.total == count
    assert reader.missing() == []
    assert len({sample.key for sample in samples}) == count
    for sample in samples:
      assert sample.problem == ''
      assert set(sample.extra) == set(reader.annotations)
      shape = fake.array(sample.image).shape[:2]
      for kind in {'mask', 'depth', 'normals'} & set(reader.annotations):
        assert fake.array(sample.extra[kind]).shape[:2] == shape
    again = pickle.loads(pickle.dumps(reader))  # for worker processes
    assert again[0].image == samples[0].image


def test_every_benchmark_has_a_fake():
  assert set(fake.WRITE) | {'nyu_normals'} == set(benchmarks.READERS)


@pytest.mark.parametrize('name', [n for n in fake.WRITE if n not in ('navi', 'imagenet')])
def test_a_store_is_made_of_it(tmp_path, name):
  fake.WRITE[name](tmp_path)
  readers = {split: benchmarks.open(name, tmp_path, split) for split in list(fake.COUNTS[name])[:2]}
  if name == 'coco_mini':
    readers.pop('captions')
  report = convert.convert(readers, str(tmp_path / 'store'), stream=io.StringIO())
  found = store.open_store(tmp_path / 'store')
  first = next(iter(readers))
  assert found.splits == {split: len(reader) for split, reader in readers.items()}
  assert set(readers[first].annotations) <= set(found.features)
  assert 'missing' not in report['splits'][first]
  record, sample = found.source(first)[0], readers[first][0]
  assert record['image'] == sample.image
  if 'mask' in readers[first].annotations:
    np.testing.assert_array_equal(fake.array(record['mask']), fake.array(sample.extra['mask']))
    with open(tmp_path / 'store' / 'annotations.json') as file:
      assert tuple(json.load(file)['mask_classes']) == readers[first].mask_classes
  if 'label' in readers[first].annotations:
    assert found.label_names()[record['label']] == readers[first].label_names[sample.extra['label']]
  if 'tags' in readers[first].annotations:
    assert [tag.decode() for tag in record['tags']] == sample.extra['tags']


def test_unknown_names_and_missing_data(tmp_path):
  with pytest.raises(InputError, match="did you mean 'ade20k'"):
    benchmarks.open('ade20', tmp_path)
  with pytest.raises(InputError, match='missing data set.*ADEChallengeData2016.*docs/datasets.md'):
    benchmarks.open('ade20k', tmp_path)
  fake.voc(tmp_path)
  with pytest.raises(InputError, match="did you mean 'train'"):
    benchmarks.open('voc', tmp_path, 'training')
  (tmp_path / 'VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt').unlink()
  with pytest.raises(InputError, match="missing split 'test'.*val.txt"):
    benchmarks.open('voc', tmp_path, 'test')
  fake.put(tmp_path / 'VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt', '\n')
  with pytest.raises(InputError, match="missing split 'test'.*names no sample"):
    benchmarks.open('voc', tmp_path, 'test')

"""The protocols hold together, and the checker tells each thing that can be wrong with a data set
before a run.
"""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from tests.data.benchmarks import fake_benchmarks as fake
from tips_jax.core.errors import InputError
from tips_jax.data.benchmarks import table as benchmarks
from tips_jax.evals.datasets import on_disk, protocols, published
from tips_jax.evals.tasks import table

ALL = list(protocols.PROTOCOLS)


@pytest.fixture
def small(monkeypatch):
  """Protocols whose counts and classes are those of the fakes."""
  for name, protocol in protocols.PROTOCOLS.items():
    counts = fake.COUNTS.get(name, {})
    splits = {
      split: dataclasses.replace(s, count=counts.get(split), also=())
      for split, s in protocol.splits.items()
    }
    labels = len(fake.WNIDS) if name == 'imagenet' else protocol.labels
    depth_mm = (100, 10_000)
    monkeypatch.setitem(
      protocols.PROTOCOLS,
      name,
      dataclasses.replace(protocol, splits=splits, labels=labels, depth_mm=depth_mm),
    )


# --- the records --------------------------------------------------------------------------------


def test_every_benchmark_has_a_protocol_and_the_other_way_round():
  assert set(protocols.PROTOCOLS) == set(benchmarks.READERS)


@pytest.mark.parametrize(
  'metric, unit',
  [
    ('depth/rmse', ('m', 'lower')),
    ('nyu/dpt_depth/rmse_pooled', ('m', 'lower')),
    ('depth/abs_rel', ('%', 'lower')),
    ('depth/delta1', ('%', 'higher')),
    ('dpt_normals/angular_rmse', ('deg', 'lower')),
    ('navi/dpt_normals/median', ('deg', 'lower')),
    ('nyu_normals/dpt_normals/within_11.25', ('%', 'higher')),
    ('linear/synthetic/accuracy', ('%', 'higher')),
    ('voc/zeroshot_segmentation_voc21/miou', ('%', 'higher')),
    ('retrieval/t2i_r1', ('%', 'higher')),
  ],
)
def test_units(metric, unit):
  found = table.metric(metric)
  assert (found.unit, found.better) == unit


@pytest.mark.parametrize('name', ALL)
def test_a_protocol_fits_its_reader(name):
  protocol, reader = protocols.get(name), benchmarks.READERS[name]
  assert set(protocol.splits) <= set(reader.official)
  assert len({task.name for task in protocol.tasks}) == len(protocol.tasks) > 0
  for task in protocol.tasks:
    assert set(task.splits) <= set(protocol.splits)
    assert task.metrics and set(task.metrics) <= {m.name for m in table.spec(task.kind).metrics}
    assert task.options().keys() == task.constants.keys()
    for constant in task.constants.values():
      assert constant.trust in ('V', 'T', 'T2', 'M', 'I', '?')
    needs = {
      'depth': 'depth',
      'dpt_depth': 'depth',
      'dpt_normals': 'normals',
      'knn': 'label',
      'linear': 'label',
      'instance_retrieval': 'tags',
      'retrieval': None,
      'zeroshot': 'label',
    }.get(task.kind, 'mask')
    if name != 'coco_mini':  # its annotations depend on the split
      assert needs is None or needs in reader.annotations
  if protocol.mask_classes:
    assert protocol.mask_classes == reader.mask_classes


def test_the_suite_is_the_papers_twenty_data_sets():
  suite = [protocols.get(name) for name in protocols.names('tips')]
  counted = [
    p for p in suite if p.name not in ('nyu_normals', 'context')
  ]  # NYUv2 once, PASCAL Context as two
  zeroshot = ('context60', 'context59', 'voc21', 'ade150')
  variants = [task for p in suite for task in p.tasks if task.variant in zeroshot]
  assert len(counted) + len(variants) == 20
  kinds = {task.kind for p in suite for task in p.tasks}
  assert kinds == {
    'segmentation',
    'depth',
    'dpt_depth',
    'dpt_normals',
    'knn',
    'linear',
    'instance_retrieval',
    'retrieval',
    'zeroshot',
    'zeroshot_segmentation',
  }
  assert len(protocols.names('uned')) == 8


def test_names_of_suites_and_data_sets():
  assert protocols.names('voc,packs,voc') == ('voc', *benchmarks.PACKS)
  with pytest.raises(InputError, match="did you mean 'flickr30k'"):
    protocols.names('flick30k')
  with pytest.raises(InputError, match='knn'):
    protocols.get('imagenet').task('kn')


@pytest.mark.parametrize('variant, classes', [('voc20', 20), ('voc21', 21)])
def test_masks_without_background(variant, classes):
  task = protocols.get('voc').task(f'zeroshot_segmentation_{variant}')
  mask = np.array([[0, 1, 20, 255]], np.uint8)
  expected = [[255, 0, 19, 255]] if variant == 'voc20' else mask
  got = task.mask_ids(mask)
  np.testing.assert_array_equal(got, expected)
  assert got.dtype == np.uint8 and len(task.classes) == classes
  assert task.classes[task.mask_ids(np.array([16], np.uint8))[0]] == 'potted plant'


def test_context59_has_59_classes_beside_60():
  protocol = protocols.get('context')
  whole, part = (
    protocol.task('zeroshot_segmentation_context60'),
    protocol.task('zeroshot_segmentation_context59'),
  )
  assert (
    len(whole.classes) == 60
    and whole.classes[1:] == part.classes
    and 'background' not in part.classes
  )
  ids = np.arange(60, dtype=np.uint8)
  np.testing.assert_array_equal(part.mask_ids(ids)[1:], ids[:-1])


# --- what was published -------------------------------------------------------------------------


def test_published_figures_belong_to_a_task():
  for key, figures in published.PUBLISHED.items():
    name, task, metric = key.split('/')
    members = [p for p in protocols.PROTOCOLS.values() if name in (p.name, p.group)]
    assert members, key
    for protocol in members:
      assert metric in protocol.task(task).metrics
      assert protocol.published(task, metric) == figures
    unit = table.metric(f'{task}/{metric}').unit
    for figure in figures:
      low, high = {'%': (1, 100), 'm': (0.01, 1), 'deg': (10, 40)}[unit]
      assert low < figure.value < high and figure.trust in ('V', 'T', 'T2')


def test_every_task_of_the_suite_but_voc20_was_published():
  for name in protocols.names('tips'):
    for task in protocols.get(name).tasks:
      found = protocols.get(name).published(task.name, task.metrics[0])
      assert bool(found) == (task.variant != 'voc20'), task.name


def test_some_published_figures():
  def of(name, task, metric):
    return {
      figure.model: (figure.value, figure.trust)
      for figure in protocols.get(name).published(task, metric)
    }

  assert of('voc', 'segmentation', 'miou')['TIPS S/14 HR (released)'] == (80.6, 'V')
  assert of('nyu', 'depth', 'rmse')['TIPS g/14 HR (released)'] == (0.363, 'V')
  assert of('nyu', 'depth', 'rmse')['TIPS S/14 HR (released)'] == (0.425, 'V')
  assert of('uned_met', 'instance_retrieval', 'r1')['TIPS B/14 HR (released)'] == (62.7, 'V')
  assert of('flickr30k', 'retrieval', 't2i_r1')['TIPSv2 L/14'] == (83.3, 'V')
  assert of('ade20k', 'zeroshot_segmentation_ade150', 'miou')['TIPSv2 So400m/14'] == (23.3, 'V')
  assert of('navi', 'dpt_normals', 'angular_rmse')['TIPSv2 g/14'] == (24.1, 'T2')
  assert of('camvid', 'segmentation', 'miou') == {}


# --- the checker --------------------------------------------------------------------------------


@pytest.mark.parametrize('name', fake.WRITE)
def test_a_whole_data_set_passes(tmp_path, small, name):
  fake.WRITE[name](tmp_path)
  report = on_disk.check(name, tmp_path)
  assert report.problems == [] and report.ok and not report.missing
  for row in report.splits:
    assert row.found == row.opened == fake.COUNTS[name][row.split]


def broken(path, tmp_path, name, change):
  """The problems after `change` of the file that matches `path`."""
  fake.WRITE[name](tmp_path)
  change(sorted(tmp_path.glob(path))[-1])
  report = on_disk.check(name, tmp_path)
  assert not report.ok
  return ' | '.join(report.problems)


VOC_MASK = 'VOCdevkit/VOC2012/SegmentationClass/*val*.png'


@pytest.mark.parametrize(
  'name, path, change, told',
  [
    (
      'voc',
      VOC_MASK,
      lambda p: p.unlink(),
      r"split 'test': missing files: 1, such as .*SegmentationClass",
    ),
    (
      'voc',
      VOC_MASK,
      lambda p: p.write_bytes(fake.palette(fake.ids([0, 1], size=(41, 30)))),
      'masks of another size than images: 1 of 3 opened .*41x30, image 40x30',
    ),
    (
      'voc',
      VOC_MASK,
      lambda p: p.write_bytes(fake.palette(fake.ids([0, 21, 200]))),
      r'class ids out of range: .*\[21, 200\]; expected 0..20 or 255',
    ),
    (
      'voc',
      VOC_MASK,
      lambda p: p.write_bytes(fake.encoded(fake.pixels())),
      'unreadable: .*expected class ids',
    ),
    (
      'voc',
      VOC_MASK,
      lambda p: p.write_bytes(fake.encoded(fake.ids([255]))),
      'masks that are all void',
    ),
    (
      'voc',
      'VOCdevkit/VOC2012/JPEGImages/*val*.jpg',
      lambda p: p.write_bytes(b'none'),
      'unreadable images: 1 of 3',
    ),
    (
      'voc',
      'VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt',
      lambda p: p.unlink(),
      "missing split 'train'",
    ),
    (
      'ade20k',
      'ADEChallengeData2016/annotations/validation/*',
      lambda p: p.write_bytes(fake.encoded(fake.ids([151]))),
      r'class ids out of range: .*\[150\]; expected 0..149',
    ),
    (
      'ade20k',
      'ADEChallengeData2016/images/validation/*',
      lambda p: p.unlink(),
      '2 images; expected 3 .validation',
    ),
    (
      'nyu',
      'nyu/bathroom/*.png',
      lambda p: p.write_bytes(fake.encoded(fake.ids([1, 2]))),
      'depth of the wrong kind',
    ),
    (
      'nyu',
      'nyu/bathroom/*.png',
      lambda p: p.write_bytes(fake.encoded(np.full((fake.H, fake.W), 3, np.uint16))),
      'depth not in millimeters: .*median 3',
    ),
    (
      'nyu',
      'nyu/bathroom/*.png',
      lambda p: p.write_bytes(fake.depth_png(size=(30, 40))),
      'depth maps of another size than images',
    ),
    (
      'flickr30k',
      'flickr30k/flickr30k-images/*',
      lambda p: p.unlink(),
      'captions without images: 1, such as .*4.jpg',
    ),
    ('docci', 'docci/images/test*', lambda p: p.unlink(), 'captions without images: 1'),
    (
      'cifar10',
      'cifar10/meta.json',
      lambda p: p.write_text(json.dumps({'classes': ['a', 'b']})),
      'wrong class count: 2; expected 10.* class ids out of range: .*expected 0..1',
    ),
    (
      'imagenet',
      'imagenet/train/*2129604',
      lambda p: [f.unlink() for f in p.iterdir()] and p.rmdir(),
      "wrong class count: 2; expected 3.* split 'test': class ids out of range",
    ),
  ],
)
def test_each_trouble_is_told(tmp_path, small, name, path, change, told):
  import re

  assert re.search(told, broken(path, tmp_path, name, change))


def test_images_without_captions_are_told(tmp_path, small):
  def change(path):
    content = json.loads(path.read_text())
    content['images'][3]['sentences'] = []
    path.write_text(json.dumps(content))

  problems = broken('coco/dataset_coco.json', tmp_path, 'coco', change)
  assert "split 'test': images without captions: 1 of 2" in problems


def test_normals_that_are_none_are_told(tmp_path, small, monkeypatch):
  fake.rgbd(tmp_path)
  reader = benchmarks.READERS['rgbd']
  sample = reader._sample
  flat = fake.encoded(np.full((fake.H, fake.W, 3), 128, np.uint8))
  monkeypatch.setattr(
    reader,
    '_sample',
    lambda self, row: sample(self, row)._replace(extra=sample(self, row).extra | {'normals': flat}),
  )
  assert any(
    'not of unit length' in problem for problem in on_disk.check('rgbd', tmp_path).problems
  )


def test_only_the_splits_of_the_wanted_tasks_are_looked_at(tmp_path, small):
  fake.imagenet(tmp_path)
  report = on_disk.check('imagenet', tmp_path, tasks=('zeroshot',))
  assert [row.split for row in report.splits] == ['test']
  with pytest.raises(InputError, match='task of'):
    on_disk.check('imagenet', tmp_path, tasks=('zero',))


def test_the_sample_is_bounded_and_spread(tmp_path, small, monkeypatch):
  fake.cifar10(tmp_path)
  seen = []
  reader = benchmarks.READERS['cifar10']
  sample = reader._sample
  monkeypatch.setattr(
    reader, '_sample', lambda self, item: seen.append((self.split, item)) or sample(self, item)
  )
  report = on_disk.check('cifar10', tmp_path, sample=4)
  assert sorted(seen) == [('test', i) for i in (0, 2, 5, 8)] + [('train', i) for i in (0, 3, 6, 9)]
  assert [row.opened for row in report.splits] == [4, 4]
  assert [row.opened for row in on_disk.check('cifar10', tmp_path, sample=4, seconds=0).splits] == [
    1,
    1,
  ]


def test_the_table_and_the_first_error(tmp_path, small):
  fake.flickr8k(tmp_path)
  fake.voc(tmp_path)
  (tmp_path / 'VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt').unlink()
  reports = [on_disk.check(name, tmp_path) for name in ('flickr8k', 'voc', 'docci', 'coco')]
  assert [report.ok for report in reports] == [True, False, False, False]
  lines = on_disk.table(reports).splitlines()
  assert lines[1].split() == ['flickr8k', 'test', 'dev', '2', '2', '2', 'ok']
  assert lines[2].split()[0] == 'voc' and lines[2].endswith('1 problem(s)')
  assert any("missing split 'train'" in line for line in lines)
  assert 'not there: docci, coco' in lines[-2] and lines[-1].startswith('1 of 4')
  assert max(map(len, lines[:6])) < 100
  with pytest.raises(InputError, match="voc: missing split 'train'.*and 2 more"):
    on_disk.require(reports)
  on_disk.require(reports[:1])


def test_the_page_tells_of_every_data_set():
  page = (pathlib.Path(__file__).parents[3] / 'docs' / 'datasets.md').read_text()
  for name, protocol in protocols.PROTOCOLS.items():
    assert f'`{name}`' in page
    if name not in benchmarks.PACKS:
      assert any(f'{folder.split("/")[0]}/' in page for folder in benchmarks.READERS[name].folders)
      for split in protocol.splits.values():
        assert split.count is None or f'{split.count:,}' in page, (name, split)

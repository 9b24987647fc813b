"""Each official layout, as a tiny folder: what its reader finds, what it makes of masks, depth,
normals, captions.
"""

import gzip
import io
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from tests.data.benchmarks import fake_benchmarks as fake
from tips_jax.core.errors import InputError
from tips_jax.data import store
from tips_jax.data.benchmarks import class_names
from tips_jax.data.benchmarks import dense as benchmarks_dense
from tips_jax.data.benchmarks import reader as benchmarks_reader
from tips_jax.data.benchmarks import table as benchmarks
from tips_jax.data.ingest import convert


def array(data):
  return np.asarray(Image.open(io.BytesIO(data)))


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
      shape = array(sample.image).shape[:2]
      for kind in {'mask', 'depth', 'normals'} & set(reader.annotations):
        assert array(sample.extra[kind]).shape[:2] == shape
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
    np.testing.assert_array_equal(array(record['mask']), array(sample.extra['mask']))
    with open(tmp_path / 'store' / 'annotations.json') as file:
      assert tuple(json.load(file)['mask_classes']) == readers[first].mask_classes
  if 'label' in readers[first].annotations:
    assert found.label_names()[record['label']] == readers[first].label_names[sample.extra['label']]
  if 'tags' in readers[first].annotations:
    assert [tag.decode() for tag in record['tags']] == sample.extra['tags']


# --- masks --------------------------------------------------------------------------------------


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
  np.testing.assert_array_equal(array(reader[2].extra['mask']), expected)
  assert reader.mask_classes[0] == 'wall' and reader.mask_classes[149] == 'flag'


def test_camvid_holds_out_a_sequence_and_knows_its_void(tmp_path):
  fake.camvid(tmp_path)
  reader = benchmarks.open('camvid', tmp_path, 'test')
  assert {row['sequence'] for row in reader.items} == {'0001TP'}
  assert '0001TP' not in {
    row['sequence'] for row in benchmarks.open('camvid', tmp_path, 'train').items
  }
  official = fake.ids([0, 10, 11], 1)
  np.testing.assert_array_equal(
    array(reader[0].extra['mask']), np.where(official == 11, 255, official)
  )


def test_coco_mini_classes_are_contiguous_and_boxes_are_fractions(tmp_path):
  fake.coco_mini(tmp_path)
  reader = benchmarks.open('coco_mini', tmp_path, 'test')
  official = fake.ids([0, 1, 184, 200])
  expected = np.select([official == 0, official == 1, official == 184], [255, 0, 1], 2)
  np.testing.assert_array_equal(array(reader[0].extra['mask']), expected)
  assert reader.mask_classes == ('person', 'tree-merged', 'rug-merged')
  np.testing.assert_allclose(reader[0].extra['boxes'], [[6 / 30, 10 / 40, 18 / 30, 30 / 40]])
  assert reader[0].extra['tags'] == ['person']
  assert benchmarks.open('coco_mini', tmp_path, 'captions')[0].extra['boxes'].shape == (0, 4)


def test_a_mask_in_colors_is_no_mask(tmp_path):
  fake.voc(tmp_path)
  reader = benchmarks.open('voc', tmp_path, 'test')
  reader.items[0][1].write_bytes(fake.encoded(fake.pixels()))
  assert reader[0].image is None and 'expected class ids' in reader[0].problem


# --- depth and normals --------------------------------------------------------------------------


def plane(normal, shape=(24, 32), focal=30.0):
  """Depth of the plane normal . p = -2 (house axes) seen from the origin: exact, pixel centers at
  half.
  """
  rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
  ray = np.stack(
    [(columns - shape[1] / 2) / focal, -(rows - shape[0] / 2) / focal, -np.ones(shape)], -1
  )
  return -2 / (ray @ np.asarray(normal))


@pytest.mark.parametrize('normal', [(0, 0, 1), (0.6, 0, 0.8), (0, 0.6, 0.8), (-0.48, 0.36, 0.8)])
@pytest.mark.parametrize('step', [1, 3])
def test_normals_of_a_plane_are_exact(normal, step):
  depth = plane(normal)
  normals, valid = benchmarks_reader.normals_from_depth(depth, 30.0, center=(16, 12), step=step)
  assert valid[step:-step, step:-step].all() and valid.sum() == (24 - 2 * step) * (32 - 2 * step)
  np.testing.assert_allclose(
    normals[valid], np.broadcast_to(normal, normals[valid].shape), atol=1e-9
  )


def test_normals_stop_at_holes_and_edges():
  depth = plane((0, 0, 1))
  depth[10, 10] = 0
  depth[:, 20:] *= 2
  _, valid = benchmarks_reader.normals_from_depth(depth, 30.0, center=(16, 12), jump=0.05)
  assert not valid[10, 9:12].any() and not valid[9:12, 10].any() and valid[9, 9]
  assert not valid[:, 19:21].any() and valid[5, 18] and valid[5, 21]
  _, loose = benchmarks_reader.normals_from_depth(depth, 30.0, center=(16, 12), missing=1e6)
  assert not loose[10, 10] and loose[10, 9] and loose[5, 20]


def test_normals_survive_eight_bits():
  normals = fake.unit_normals(0)
  valid = np.ones(normals.shape[:2], bool)
  valid[0] = False
  code = benchmarks_reader.encode_normals(normals, valid)
  assert (code[0] == 0).all()
  np.testing.assert_allclose(code[1:] / 127.5 - 1, normals[1:], atol=0.5 / 127.5 + 1e-6)


def test_depth_in_millimeters_knows_what_is_missing():
  depth = benchmarks_reader.millimeters([[0.5, np.nan, -1, np.inf, 70, 1.2346]])
  assert depth.dtype == np.uint16
  np.testing.assert_array_equal(depth, [[500, 0, 0, 0, 0, 1235]])


def test_rgbd_holds_out_the_last_fifth_and_faces_the_viewer(tmp_path):
  fake.rgbd(tmp_path)
  reader = benchmarks.open('rgbd', tmp_path, 'test')
  assert [row['image'] for row in reader.items] == ['4.jpg']
  normals = array(reader[0].extra['normals'])
  np.testing.assert_array_equal(normals[15, 20], [128, 128, 255])
  assert (normals[0, 0] == 0).all()
  assert array(reader[0].extra['depth'])[15, 20] == 1500


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
  np.testing.assert_allclose(array(sample.image).astype(int), fake.pixels(1).astype(int), atol=1)
  depth = array(sample.extra['depth'])
  assert depth[5, 5] == 2000 and depth[0, 0] == 0
  np.testing.assert_allclose(
    array(sample.extra['normals']) / 127.5 - 1, fake.unit_normals(1), atol=0.005
  )


def test_geonet_leaves_out_two_files_by_number(tmp_path, monkeypatch):
  fake.nyu_geonet(tmp_path)
  monkeypatch.setattr(benchmarks_dense.NyuNormals, 'left_out', (2, 0))
  assert benchmarks.open('nyu_normals', tmp_path, 'train').items == ['kitchen_0001_1.mat']


def test_labeled_nyu_reads_the_test_numbers(tmp_path):
  pytest.importorskip('h5py')
  fake.nyu_labeled(tmp_path)
  reader = benchmarks.open('nyu_normals', tmp_path, 'test')
  assert reader.items == [1, 3]
  np.testing.assert_array_equal(array(reader[1].image), fake.pixels(3))
  np.testing.assert_allclose(
    array(reader[1].extra['normals']) / 127.5 - 1, fake.unit_normals(3), atol=0.005
  )
  assert (array(reader[1].extra['depth']) == 1500).all()


def test_a_pickle_that_is_more_than_arrays_is_refused(tmp_path):
  with gzip.open(tmp_path / 'p', 'wb') as file:
    pickle.dump(os.getcwd, file)
  with (
    gzip.open(tmp_path / 'p') as file,
    pytest.raises(pickle.UnpicklingError, match='NumPy arrays only'),
  ):
    benchmarks_dense._ArraysOnly(file).load()


def test_navi_is_cut_around_the_object(tmp_path):
  fake.navi(tmp_path)
  reader = benchmarks.open('navi', tmp_path, 'train')
  assert [sample.key for sample in reader][:2] == [
    'dog/multiview-00-pixel_5/000.jpg',
    'dog/multiview-00-pixel_5/001.jpg',
  ]  # no cat: it has no wild set
  sample = benchmarks.open('navi', tmp_path, 'test')[0]
  depth, normals = array(sample.extra['depth']), array(sample.extra['normals'])
  assert array(sample.image).shape == (512, 512, 3) and depth.shape == (512, 512)
  # 30 x 20 pixels of object: a square of 30 holds all of its width and two thirds of its height.
  known = depth > 0
  assert known.any(0).all() and abs(known.any(1).mean() - 2 / 3) < 0.05
  assert set(np.unique(depth)) == {0, 500}
  inner = normals[246:266, 246:266].reshape(-1, 3) / 127.5 - 1
  assert (inner[:, 2] > 0.5).all()
  assert (normals[~known] == 0).all()


# --- classes and captions -----------------------------------------------------------------------


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


# --- what is wrong is told ----------------------------------------------------------------------


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


def test_broken_lists_name_the_file(tmp_path):
  fake.docci(tmp_path)
  fake.put(tmp_path / 'docci/docci_descriptions.jsonlines', '{"example_id": ')
  with pytest.raises(InputError, match='docci_descriptions.jsonlines is not JSON'):
    benchmarks.open('docci', tmp_path)
  fake.flickr8k(tmp_path)
  fake.put(tmp_path / 'flickr8k/dev.zip', 'no zip')
  with pytest.raises(InputError, match='dev.zip is not a whole zip'):
    benchmarks.open('flickr8k', tmp_path)


def test_a_missing_file_is_told_by_name_and_leaves_no_image(tmp_path):
  fake.voc(tmp_path)
  reader = benchmarks.open('voc', tmp_path, 'test')
  gone = reader.items[1][1]
  gone.unlink()
  assert reader.missing() == [str(gone)]
  assert reader[1].image is None and str(gone) in reader[1].problem and reader[0].image


def test_class_names():
  assert len(class_names.VOC) == 21 and len(class_names.CONTEXT) == 60
  assert len(set(class_names.ADE20K)) == 150 and len(class_names.IMAGENET) == 1000
  assert class_names.IMAGENET[0] == 'tench' and class_names.IMAGENET[-1] == 'toilet paper'
  prompts = {
    'pottedplant': 'potted plant',
    'wall-brick': 'brick wall',
    'sky-other-merged': 'sky',
    't-shirt': 't-shirt',
  }
  assert {name: class_names.prompt(name) for name in prompts} == prompts

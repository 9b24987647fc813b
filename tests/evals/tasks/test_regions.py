"""Regions and tags: pooling, precision and recalls against plain NumPy and scikit-learn, the three
tasks on scenes, and what is refused.
"""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from tests.evals.stub_encoder import Stub
from tests.evals.test_suite import TEST, jobs_of, path  # noqa: F401
from tests.models.test_heads import region_features
from tips_jax.core import schema, vectors
from tips_jax.core.errors import InputError
from tips_jax.data import store
from tips_jax.evals import suite
from tips_jax.evals.datasets.protocols import Constant
from tips_jax.evals.features import cache as cache_lib
from tips_jax.evals.features import regions as regions_lib
from tips_jax.evals.features import splits
from tips_jax.evals.probes import precision
from tips_jax.evals.tasks import regions, retrieval
from tips_jax.interop.encoder import Encoder
from tips_jax.interop.weights import Weights
from tips_jax.models import towers

rng = np.random.default_rng(0)
KINDS = ('region_classification', 'region_retrieval', 'tagging')


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize('levels', [3, 1000])
def test_average_precision_is_scikit_learns(levels):
  scores = rng.integers(levels, size=(40, 5)) / levels  # of three levels most are equal
  right = rng.random((40, 5)) < 0.3
  expected = average_precision_score(right, scores, average='macro')
  assert precision.mean_average_precision(scores, right) == pytest.approx(expected, abs=1e-12)
  right[:, 2] = False  # a class that does not occur is left out
  each = [average_precision_score(right[:, k], scores[:, k]) for k in (0, 1, 3, 4)]
  assert precision.mean_average_precision(scores, right) == pytest.approx(np.mean(each), abs=1e-12)


def test_constant_scores_are_chance():
  _, truth = regions.truth([('cat',), ('dog', 'cat'), ('cow',)])
  found = regions.scores(np.zeros(3, int), np.ones((3, 3)), truth)
  assert found['map'] == pytest.approx(regions.chance(truth)['map'])


def test_accuracy_of_regions_and_of_classes():
  names, truth = regions.truth([('b',), ('a',), ('a',), ('a', 'b')])
  assert names == ('a', 'b')
  found = regions.scores(np.array([0, 0, 0, 1]), np.zeros((4, 2)), truth)
  assert found['accuracy'] == 3 / 4  # the last has both names
  assert found['class_accuracy'] == (3 / 3 + 1 / 2) / 2
  # One class of two, drawn evenly, is right for half of the first three, and for the last.
  assert regions.chance(truth)['accuracy'] == (3 * 0.5 + 1) / 4


def test_recalls_of_texts_that_several_regions_have():
  region = rng.normal(size=(30, 4))
  text = rng.normal(size=(20, 4))
  belongs = rng.random((30, 20)) < 0.1
  belongs[np.arange(30), np.arange(30) % 20] = True
  found = regions.recalls(region, text, np.argwhere(belongs))
  cosines = vectors.unit(region) @ vectors.unit(text).T
  for k in retrieval.KS:
    best = np.argsort(-cosines, axis=1)[:, :k]
    assert found[f'r2t_r{k}'] == pytest.approx(np.take_along_axis(belongs, best, 1).any(1).mean())
    best = np.argsort(-cosines, axis=0)[:k]
    assert found[f't2r_r{k}'] == pytest.approx(np.take_along_axis(belongs, best, 0).any(0).mean())
  assert max(regions.recalls(np.ones((30, 4)), text, np.argwhere(belongs)).values()) < 1


# --- records --------------------------------------------------------------------------------------


BOXES = np.array([[0, 0, 0.5, 1], [0.2, 0.2, 0.2, 0.9], [0, 0, 1, 1]], np.float32)


def test_texts_of_boxes():
  one_each = {'boxes': BOXES, 'region_tags': [b'cat', b' ', b'dog']}
  assert regions_lib.of_record(one_each, 'region_tags')[1] == [('cat',), (), ('dog',)]
  numbered = {
    'boxes': BOXES,
    'region_tags': [b'cat', b'dog', b'cat'],
    'region_tags_boxes': np.array([2, 2, 2]),
  }
  assert regions_lib.of_record(numbered, 'region_tags')[1] == [(), (), ('cat', 'dog')]
  with pytest.raises(ValueError, match='got region_tags of box 3; expected one below 3'):
    regions_lib.of_record(numbered | {'region_tags_boxes': [0, 1, 3]}, 'region_tags')
  with pytest.raises(ValueError, match='got 2 region_tags of 3 boxes'):
    regions_lib.of_record(one_each | {'region_tags': ['a', 'b']}, 'region_tags')


class Part:
  def __init__(self, records, patches):
    self.records = records
    self.arrays = {'region_patch': patches}

  def __len__(self):
    return len(self.records)

  def record(self, i):
    return self.records[i]


def test_regions_are_pooled_and_the_others_counted():
  records = [
    {'boxes': BOXES, 'region_tags': ['a', 'b', 'c']},
    {'boxes': BOXES[:0], 'region_tags': []},
    {'boxes': np.repeat(BOXES[:1], 11, 0), 'region_tags': ['a'] * 10 + ['']},
  ]
  patches = rng.normal(size=(3, 4, 4, 5)).astype(np.float32)
  part = Part(records, patches)
  found = regions_lib.of_part(part, 'region_tags', 'here')
  assert (len(found), found.without_area, found.without_text) == (12, 1, 1)
  assert found.image.tolist() == [0, 0] + [2] * 10
  pooled = regions_lib.pooled(part, found, samples=3)
  grid = patches.reshape(3, 1, 16, 5)
  for image, box, feature in zip(found.image, found.boxes, pooled):
    expected = region_features(grid[image : image + 1], box[None, None], 3)[0, 0]
    np.testing.assert_allclose(feature, expected, rtol=1e-5, atol=1e-6)
  with pytest.raises(InputError, match='^here: got 1 boxes, 1 of them without an area'):
    bad = Part([{'boxes': BOXES[1:2], 'region_tags': ['a']}], patches[:1])
    regions_lib.of_part(bad, 'region_tags', 'here')


def test_pictures_show_the_box():
  image = np.full((40, 60, 3), 128, np.uint8)
  box = (0.25, 0.5, 0.75, 1.0)
  drawn = regions_lib.outlined(image, box)
  assert (drawn[10, 30:60] == 255).all() and (drawn[20, 40] == 128).all()
  assert (image == 128).all()
  cut = regions_lib.cut(image, box)
  assert cut.shape[0] == cut.shape[1] == 38 and (cut == 255).any()
  assert regions_lib.cut(image, (0, 0, 0.01, 0.01)).shape == (10, 10, 3)


# --- the encoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize('head', [True, False])
def test_region_patches_of_an_encoder(head):
  known = {
    'image': schema.ViT(kind='vit', width=16, depth=2, heads=2, mlp=32, patch=8, grid=4),
    'image_head': schema.ProjectionHead(kind='projection', width=16, output=6),
    'region_head': schema.RegionHead(kind='region_head', width=16, output=6, samples=5),
  }
  if not head:
    del known['region_head']
  params = {name: towers.init(name, tower, seed=1) for name, tower in known.items()}
  encoder = Encoder(Weights(name='model', towers=known, params=params))
  images = rng.integers(256, size=(2, 32, 32, 3), dtype=np.uint8)
  found = encoder.inspect(images, regions=True, values=not head)
  if not head:
    assert encoder.region_samples == 14
    np.testing.assert_array_equal(found['region_patch'], found['value_patch'])
    assert 'value_patch' not in encoder.inspect(images, regions=True)
    return
  assert encoder.region_samples == 5
  boxes = np.array([[[0.1, 0.2, 0.7, 0.9]]] * 2, np.float32)
  patch = found['patch'].reshape(2, 1, 16, 16)
  arrays = {'patch': patch, 'boxes': boxes}
  compute = schema.Compute(dtype='float32')
  trained = towers.apply(params['region_head'], known['region_head'], compute, arrays)['embedding']
  ours = region_features(found['region_patch'].reshape(2, 1, 16, 6), boxes, 5)
  np.testing.assert_allclose(ours, trained, rtol=1e-4, atol=1e-5)


# --- tasks ----------------------------------------------------------------------------------------


def test_tasks_on_scenes(path, tmp_path):  # noqa: F811
  jobs = []
  for job in jobs_of(path, *KINDS):
    constants = job.task.constants | {'templates': Constant('photo', '?')}
    jobs.append(dataclasses.replace(job, task=dataclasses.replace(job.task, constants=constants)))
  encoder = Stub()
  outcomes = suite.run(encoder, jobs, cache=cache_lib.Cache(tmp_path), batch_size=8)
  assert encoder.images == 16  # one pass for all three
  classification, retrieved, tagged = outcomes
  source = store.open_store(path).source('test')
  images = np.stack([splits.decode(source[i]) for i in range(TEST)])
  out = encoder.inspect(images, regions=True)
  patches = out['region_patch'].astype(np.float16).astype(np.float32)
  embedding = []
  tags = []
  captions = []
  for i in range(TEST):
    grid = patches[i].reshape(1, 1, 16, -1)
    embedding += list(region_features(grid, source[i]['boxes'][None], 4)[0])
    tags += [tag.decode() for tag in source[i]['region_tags']]
    captions += [text.decode() for text in source[i]['region_captions']]
  embedding = vectors.unit(np.stack(embedding))
  names = sorted(set(tags))
  classes = vectors.unit(encoder.encode_text([f'a photo of a {name}.' for name in names]))
  nearest = np.array(names)[(embedding @ classes.T).argmax(1)]
  right = nearest == np.array(tags)
  assert classification.metrics['accuracy'] == pytest.approx(right.mean())
  each = [right[np.array(tags) == name].mean() for name in names]
  assert classification.metrics['class_accuracy'] == pytest.approx(np.mean(each))
  hot = np.array(tags)[:, None] == names
  expected = average_precision_score(hot, embedding @ classes.T, average='macro')
  assert classification.metrics['map'] == pytest.approx(expected, abs=1e-6)
  assert classification.chosen['regions'] == len(tags)
  assert classification.options['samples'] == 4
  texts = sorted(set(captions))
  pairs = np.array([[n, texts.index(text)] for n, text in enumerate(captions)])
  expected = regions.recalls(embedding, encoder.encode_text(texts), pairs)
  assert retrieved.metrics == pytest.approx(expected)
  assert tagged.metrics.keys() == {'map', 'accuracy', 'synthetic/map', 'synthetic/accuracy'}
  of_images = [{tag.decode() for tag in source[i]['tags']} for i in range(TEST)]
  hot = np.array([[name in of_image for name in names] for of_image in of_images])
  expected = average_precision_score(hot, vectors.unit(out['web']) @ classes.T, average='macro')
  assert tagged.metrics['map'] == pytest.approx(expected, abs=1e-6)
  for outcome in outcomes:
    assert outcome.chance.keys() == outcome.metrics.keys()
    assert outcome.spec.draw(outcome).startswith(b'\x89PNG')


@pytest.mark.parametrize('lacking', ['boxes', 'region_tags'])
def test_records_without_what_a_region_needs(path, lacking):  # noqa: F811
  [job] = jobs_of(path, 'region_classification')
  job.data.features.discard(lacking)
  with pytest.raises(InputError, match=f'region_classification needs the annotation {lacking!r}'):
    suite.run(Stub(), [job], cache=None)


def test_texts_of_boxes_that_are_not_there(path, monkeypatch):  # noqa: F811
  [job] = jobs_of(path, 'region_classification')
  records = list(job.data.source('test')[i] for i in range(TEST))
  records[0] = records[0] | {'boxes': np.zeros((0, 4), np.float32)}
  monkeypatch.setattr(job.data, 'source', lambda split: records)
  with pytest.raises(InputError, match="split 'test': record 0: got .* region_tags of 0 boxes"):
    suite.run(Stub(), [job], cache=None)
  for i, record in enumerate(records):
    records[i] = record | {'region_tags': [b''] * len(record['boxes'])}
  with pytest.raises(InputError, match='images without region_tags: 12 of 12 opened'):
    suite.run(Stub(), [job], cache=None)

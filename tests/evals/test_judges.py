"""benchmarks/judges.py: scikit-learn finds in what `encode` writes what our tasks find."""

import jax
import pytest

import tips_jax
from benchmarks import judges
from tips_jax.core import schema
from tips_jax.evals import suite
from tips_jax.evals.datasets import evaluations
from tips_jax.evals.features.cache import Cache
from tips_jax.interop.weights import Weights
from tips_jax.interop.write import write
from tips_jax.models import towers

TRAIN, TEST = 120, 60


def test_scikit_learn_on_encoded_images_equals_our_tasks(tmp_path, write_store):
  pytest.importorskip('sklearn')
  write_store(tmp_path / 'store', train=TRAIN, test=TEST)
  tower = schema.ViT(kind='vit', width=32, depth=1, heads=2, mlp=64, patch=8, grid=4)
  params = {'image': jax.device_get(towers.init('image', tower, seed=0))}
  (tmp_path / 'model').mkdir()
  write(
    Weights(name='tiny', towers={'image': tower}, params=params, size=32),
    'safetensors',
    tmp_path / 'model',
  )
  encoder = tips_jax.load(str(tmp_path / 'model'), exact=True)
  jobs = evaluations.of_store(tmp_path / 'store', only=('knn', 'linear'), size=32)
  knn, linear = suite.run(encoder, jobs, cache=Cache(tmp_path / 'cache'))
  rows = judges.records(jobs[0].data, 'train', TRAIN) + judges.records(jobs[0].data, 'test', TEST)
  x, y = judges.encoded(tmp_path / 'model', rows, tmp_path / 'images')
  found = judges.probes(
    (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:]), knn.chosen['k'], linear.chosen['l2']
  )
  assert found['knn'] == pytest.approx(knn.metrics['accuracy'], abs=1e-9)
  # Both stop near one optimum: an image on the border of two classes may fall on either side.
  assert found['linear'] == pytest.approx(linear.metrics['accuracy'], abs=1.5 / TEST)
  assert knn.metrics['accuracy'] > 1.5 * knn.chance['accuracy']

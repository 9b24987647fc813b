"""The pixel baseline on the small store."""

import numpy as np
import pytest

from tips_jax.data.pixels import views
from tips_jax.evals import baselines
from tips_jax.evals.datasets import sources
from tips_jax.evals.features import reading
from tips_jax.evals.tasks import retrieval


def test_patches_are_cut_as_the_grid_says():
  images = np.random.default_rng(0).integers(0, 256, (2, 10, 13, 3), dtype=np.uint8)
  cut = baselines._cut(images, 4)
  assert cut.shape == (2, 2, 3, 48)
  np.testing.assert_allclose(cut[1, 1, 2], images[1, 4:8, 8:12].ravel() / 255, rtol=1e-6)


def test_the_description_ends_with_the_color_histogram():
  images = np.zeros((1, 8, 8, 3), np.uint8)
  images[0, :, :4] = (255, 0, 130)  # levels 3, 0, 2
  histogram = (baselines._describe(images)[0, -64:] / 10) ** 2
  assert histogram[0] == pytest.approx(0.5) and histogram[3 * 16 + 2] == pytest.approx(0.5)


def test_the_regression_finds_images_by_words_of_color(store, tokenizer):
  data = sources.Store(store)
  pixels = baselines.Pixels(patch=8, size=32)
  assert not pixels.has_text
  assert pixels.fit(data, 'train', tokenizer=tokenizer, text_length=8, limit=5000)
  images, texts, owner = [], [], []
  for i, record in enumerate(data.source('test')[i] for i in range(20)):
    images.append(views.evaluation(record['image'], 32))
    words = reading.texts_of(record, 'captions')
    texts += words
    owner += [i] * len(words)
  image = pixels.inspect(np.stack(images))['embedding']
  recalls = retrieval.recalls(image, pixels.encode_text(texts), np.array(owner))
  assert recalls['t2i_r5'] > 1.3 * retrieval.chance(np.array(owner), 20)['t2i_r5']
  assert np.isfinite(image).all()
  bag = pixels._bag(tokenizer.encode_batch(['red blue'], 8))
  padded = pixels._bag(np.pad(tokenizer.encode_batch(['red blue'], 8), ((0, 0), (0, 9))))
  np.testing.assert_array_equal(padded, bag)  # padding is no word


def test_baseline_grid_is_that_of_the_model():
  pixels = baselines.Pixels(patch=8, size=32)
  output = pixels.inspect(np.zeros((1, 32, 32, 3), np.uint8))
  assert output['patch'].shape == (1, 4, 4, 192) and output['pixels'].shape == (1, 768)
  assert 'patch' not in pixels.inspect(np.zeros((1, 32, 32, 3), np.uint8), patches=False)


def test_pixels_and_place_learn_what_is_linear_in_pixels_and_what_depends_on_the_place():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (60, 8, 12, 3), dtype=np.uint8)
  place = rng.normal(size=(2, 3, 1))
  red = images.reshape(60, 2, 4, 3, 4, 3)[..., 0].mean((2, 4))[..., None] / 255
  truth = np.concatenate([place + 2 * red, -red], -1)
  weight = np.ones((2, 3))
  weight[1, 2] = 0  # where nothing is known, whatever it holds
  truth[:, 1, 2] = 99
  model = baselines.PixelsAndPlace((2, 3), 4)
  for image, values in zip(images[:50], truth):
    model.add(image, values, weight)
  model.solve()
  known = weight > 0
  for image, values in zip(images[50:], truth[50:]):
    # The ridge holds the coefficients down a little.
    assert abs(model.predict(image) - values)[known].max() < 0.1
  np.testing.assert_allclose(model.mean()[known], truth[:50].mean(0)[known], atol=1e-5)
  np.testing.assert_allclose(model.mean()[1, 2], truth[:50][:, known].mean((0, 1)), atol=1e-5)


def test_cell_means_are_those_of_the_known_pixels():
  values = np.arange(24, dtype=np.float32).reshape(4, 6, 1)
  known = np.ones((4, 6), bool)
  known[:2, :2] = False
  known[0, 1] = True  # one of the four of its cell, with the value 1
  means, share = baselines.cell_means(values, known, (2, 3))
  np.testing.assert_allclose(share, [[0.25, 1, 1], [1, 1, 1]])
  np.testing.assert_allclose(means[..., 0], [[1, 5.5, 7.5], [15.5, 17.5, 19.5]], rtol=1e-5)

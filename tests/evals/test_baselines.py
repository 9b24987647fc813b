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

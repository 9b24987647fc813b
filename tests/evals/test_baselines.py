"""Pixels and chance on the small store."""

import dataclasses

import numpy as np
import pytest

from tips_jax.evals import baselines
from tips_jax.evals.features import reading as features
from tips_jax.evals.probes import masks as segmentation
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


def test_the_regression_finds_images_by_words_of_color(store, tokenizer, config):
  pixels = baselines.Pixels(config, patch=8)
  assert pixels.text(np.zeros((2, 8), np.int32)) is None
  assert pixels.fit(store, 'train', tokenizer=tokenizer, text_length=8)
  found = features.extract(
    pixels, store, 'test', config=config, names=('embedding',), tokenizer=tokenizer, text_length=8
  )
  recalls = retrieval.recalls(found.image['embedding'], found.text, found.owner)
  assert recalls['t2i_r5'] > 1.3 * retrieval.chance(found.owner, 20)['t2i_r5']
  assert np.isfinite(found.image['embedding']).all()
  padded = pixels.text(np.pad(tokenizer.encode_batch(['red blue'], 8), ((0, 0), (0, 9))))
  np.testing.assert_array_equal(
    padded, pixels.text(tokenizer.encode_batch(['red blue'], 8))
  )  # padding is no word


def test_chance_is_counted_on_the_annotations(store, config):
  found = baselines.chance(store, config)
  train, test = ([store.source(s)[i] for i in range(n)] for s, n in (('train', 40), ('test', 20)))
  common = np.bincount([r['label'] for r in train]).argmax()
  assert found['knn/accuracy'] == pytest.approx(np.mean([r['label'] == common for r in test]))
  masks = [np.stack([segmentation.decode_mask(r['mask']) for r in rows]) for rows in (train, test)]
  common = np.bincount(masks[0][masks[0] != 255]).argmax()
  assert found['segmentation/miou'] == pytest.approx(
    np.mean(masks[1][masks[1] != 255] == common) / 3
  )
  assert found['retrieval/t2i_r5'] == 5 / 20
  assert len(found) == 8
  only = baselines.chance(store, dataclasses.replace(config, tasks=('retrieval',)))
  assert only == {k: v for k, v in found.items() if k.startswith('retrieval/')}


def test_baseline_grid_is_that_of_the_model(config):
  output = baselines.Pixels(config, patch=8).image(np.zeros((1, 32, 32, 3), np.uint8))
  assert output['patch'].shape == (1, 4, 4, 192) and output[config.cls].shape == (1, 768)

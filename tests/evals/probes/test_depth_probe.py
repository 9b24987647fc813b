"""The linear depth probe learns, chooses its learning rate, and reads features from disk."""

import dataclasses
import functools

import cv2
import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.evals.probes import depth, depth_probe

QUICK = depth_probe.DepthRecipe(
  learning_rates=(1e-4, 3e-2), steps=150, batch=8, upsample=1, mean_steps=5
)


def problem(count, seed=0, grid=(4, 5), cell=6):
  """Patches that hold their depth linearly, but for an offset that only the CLS token knows; badly
  scaled.
  """
  rng = np.random.default_rng(seed)
  meters, offset = rng.uniform(1, 4, (count, *grid)), rng.uniform(0, 3, count)
  mix = np.random.default_rng(7).normal(size=(2, 6))
  noise = rng.normal(size=(count, *grid))
  patch = np.stack([meters, noise], -1) @ mix * 50 + 100
  truth = (meters + offset[:, None, None]).repeat(cell, 1).repeat(cell, 2).astype(np.float32)
  truth[:, :2, :3] = 0
  return (
    patch.astype(np.float32),
    np.stack([offset, rng.normal(size=count)], -1).astype(np.float32),
    truth,
  )


def score(probe, patch, cls, truth):
  scorer = depth.DepthScorer()
  for p, t in zip(probe.predict(patch, cls), truth):
    scorer.add(p, t)
  return scorer.result()['rmse_pooled']


@functools.cache
def trained():
  patch, cls, truth = problem(60)
  return depth_probe.fit(patch, cls, truth.__getitem__, recipe=QUICK)


def test_the_probe_beats_the_baselines_and_chooses_its_learning_rate():
  probe, (patch, cls, truth) = trained(), problem(20, seed=1)
  naive = depth.baselines(problem(60)[2].__getitem__, range(60), truth.__getitem__, range(20))
  assert score(probe, patch, cls, truth) < 0.6 * min(m['rmse_pooled'] for m in naive.values())
  assert probe.chosen == {'learning_rate': 3e-2} and set(probe.validation) == {1e-4, 3e-2}
  assert probe.validation[3e-2] < probe.validation[1e-4]
  blind = depth_probe.fit(
    problem(60)[0], None, problem(60)[2].__getitem__, shape=(12, 15), recipe=QUICK
  )
  assert score(blind, patch, None, truth) > 1.2 * score(
    probe, patch, cls, truth
  )  # the CLS token is used
  assert score(blind, patch, None, truth) < naive['constant']['rmse_pooled']


def test_validation_rows_train_nothing():
  """Spoilt features and missing truths of the validation rows change the choice at most, not the
  weights.
  """
  patch, cls, truth = problem(20)
  held = [3, 7]
  recipe = dataclasses.replace(
    QUICK, steps=40, learning_rates=(3e-2, 1e-7), refit=False, standardize=False
  )
  options = dict(validation=held, recipe=recipe)
  patch = (patch - patch.mean((0, 1, 2))) / 100
  spoilt, void = patch.copy(), truth.copy()
  spoilt[held], void[held] = 1e3, 0
  first = depth_probe.fit(patch, cls, truth.__getitem__, **options)
  second = depth_probe.fit(spoilt, cls, void.__getitem__, **options)
  assert first.chosen == second.chosen == {'learning_rate': 3e-2}
  assert first.validation[3e-2] < first.validation[1e-7] and all(
    np.isnan(v) for v in second.validation.values()
  )
  np.testing.assert_array_equal(first.patch, second.patch)
  again = depth_probe.fit(
    patch, cls, truth.__getitem__, validation=held, recipe=dataclasses.replace(recipe, refit=True)
  )
  assert (
    again.validation == first.validation and np.abs(again.patch - first.patch).max() > 1e-4
  )  # all rows now


def test_features_on_disk_and_truths_of_other_sizes(tmp_path):
  patch, cls, truth = problem(60)
  np.save(tmp_path / 'patch.npy', patch)
  lazy = np.load(tmp_path / 'patch.npy', mmap_mode='r')
  odd = lambda i: (
    truth[i].repeat(2, 0).repeat(2, 1) if i % 2 else truth[i]
  )  # the nearest pixel is the same one
  probe = depth_probe.fit(lazy, cls, odd, recipe=QUICK)
  np.testing.assert_array_equal(probe.patch, trained().patch)


def test_upsampling_logits_equals_upsampling_features():
  rng = np.random.default_rng(0)
  patch, cls = (
    rng.normal(size=(2, 3, 4, 6)).astype(np.float32),
    rng.normal(size=(2, 5)).astype(np.float32),
  )
  weights = {
    'patch': rng.normal(size=(6, 32)),
    'cls': rng.normal(size=(5, 32)),
    'bias': rng.normal(size=32),
  }
  probe = depth_probe.DepthProbe(
    **{k: v.astype(np.float32) for k, v in weights.items()},
    min_depth=0.001,
    max_depth=10.0,
    eps=0.1,
    upsample=4,
    chosen={},
    validation={},
  )
  both = np.concatenate([patch, np.broadcast_to(cls[:, None, None], (2, 3, 4, 5))], -1)
  up = np.stack([cv2.resize(x, (16, 12), interpolation=cv2.INTER_LINEAR) for x in both])
  logits = up @ np.concatenate([probe.patch, probe.cls]) + probe.bias
  np.testing.assert_allclose(probe.predict(patch, cls), depth.expectation(logits), rtol=1e-4)


def test_bad_input():
  patch, cls, truth = problem(5)
  with pytest.raises(InputError, match='no training image'):
    depth_probe.fit(patch[:0], cls[:0], truth.__getitem__, recipe=QUICK)
  with pytest.raises(InputError, match='no pixel'):
    depth_probe.fit(patch, cls, (0 * truth).__getitem__, recipe=QUICK)
  probe = depth_probe.fit(
    patch[:1], cls[:1], truth.__getitem__, recipe=dataclasses.replace(QUICK, steps=3)
  )  # one image: nothing is held out
  assert (
    np.isfinite(probe.predict(patch, cls)).all()
    and probe.validation == {}
    and probe.chosen == {'learning_rate': 3e-2}
  )

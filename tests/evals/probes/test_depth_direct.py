"""The linear depth head at the optimum of its loss."""

import dataclasses

import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.evals.probes import depth, depth_direct

QUICK = depth_direct.DirectRecipe(strengths=(10.0, 1e-3), steps=40, bins=32)


def problem(count, seed=0, grid=(4, 5), cell=6):
  """Patches that hold their depth linearly, but for an offset that only the CLS token knows; badly
  scaled, with a feature that is constant and twenty that say nothing.
  """
  rng = np.random.default_rng(seed)
  meters = rng.uniform(1, 4, (count, *grid))
  offset = rng.uniform(0, 3, count)
  noise = rng.normal(size=(count, *grid, 20))
  constant = np.full((count, *grid, 1), 7.0)
  patch = np.concatenate([meters[..., None] * 50 + 100, noise, constant], -1)
  truth = (meters + offset[:, None, None]).repeat(cell, 1).repeat(cell, 2)
  cls = np.stack([offset, rng.normal(size=count)], -1)
  return patch.astype(np.float32), cls.astype(np.float32), truth.astype(np.float32)


def error(probe, patch, cls, truth):
  scorer = depth.DepthScorer()
  for predicted, meters in zip(probe.predict(patch, cls), truth):
    scorer.add(predicted, meters)
  return scorer.result()['rmse_pooled']


def constant_error(train, test):
  return depth.baselines(train.__getitem__, range(len(train)), test.__getitem__, range(len(test)))


def test_finds_the_depth_that_features_hold_and_the_penalty_that_suits():
  patch, cls, truth = problem(60)
  probe = depth_direct.fit(patch, cls, truth.__getitem__, recipe=QUICK)
  assert probe.chosen == {'l2': 1e-3}
  assert set(probe.validation) == {10.0, 1e-3}
  assert probe.validation[1e-3] < probe.validation[10.0]
  test = problem(20, seed=1)
  constant = constant_error(truth, test[2])['constant']['rmse_pooled']
  # The truth is flat in a patch and the answer is interpolated: not zero.
  assert error(probe, *test) < 0.5 * constant


def test_features_that_say_nothing_give_about_the_constant_answer():
  patch, cls, truth = problem(60)
  rng = np.random.default_rng(5)
  blind = depth_direct.fit(
    rng.normal(size=patch.shape), rng.normal(size=cls.shape), truth.__getitem__, recipe=QUICK
  )
  test = problem(20, seed=1)
  constant = constant_error(truth, test[2])['constant']['rmse_pooled']
  found = error(blind, rng.normal(size=test[0].shape), rng.normal(size=test[1].shape), test[2])
  assert blind.chosen == {'l2': 10.0}
  assert 0.95 * constant < found < 1.1 * constant


def test_few_patches_are_whole_images_that_are_evenly_spaced():
  patch, cls, truth = problem(40)
  asked = []

  def reading(i):
    asked.append(i)
    return truth[i]

  recipe = dataclasses.replace(QUICK, patches=5 * 4 * 5, steps=2)
  depth_direct.fit(patch, cls, reading, recipe=recipe)
  assert sorted(set(asked)) == [0, 9, 19, 29, 39]


def test_images_without_depth_are_one_error():
  patch, cls, truth = problem(10)
  with pytest.raises(InputError, match=r'got no pixel with depth in \(0, 10.0\] m in 8 training'):
    depth_direct.fit(patch, cls, (0 * truth).__getitem__, recipe=QUICK)


def test_missing_depth_teaches_nothing():
  patch, cls, truth = problem(30)
  # Fit once more with holes whose features are wild.
  holes = truth.copy()
  holes[:, :6, :6] = 0
  wild = patch.copy()
  wild[:, 0, 0, :20] *= 1.5
  probe = depth_direct.fit(wild, cls, holes.__getitem__, recipe=QUICK)
  test = problem(20, seed=1)
  constant = constant_error(truth, test[2])['constant']['rmse_pooled']
  assert error(probe, *test) < 0.5 * constant

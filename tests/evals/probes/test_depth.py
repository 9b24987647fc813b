"""Depth against NumPy and PyTorch references: decoding, losses, metrics with void; the linear probe
learns.
"""

import dataclasses
import functools
import warnings

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.evals.probes import depth


def random_maps(rng, *shape, missing=0.3):
  truth = rng.uniform(0.5, 12, shape).astype(np.float32)
  truth[rng.random(shape) < missing] = 0
  return truth


def test_decoding():
  pixels = np.array([[0, 1, 2500], [65535, 801, 10000]], np.uint16)
  found = depth.decode(cv2.imencode('.png', pixels)[1].tobytes())
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, [[0, 0.001, 2.5], [65.535, 0.801, 10]], rtol=1e-6)
  np.testing.assert_array_equal(depth.known(found), [[False, True, True], [False, True, True]])
  assert not depth.known(np.float32([np.nan, np.inf, -1])).any()
  for bad in (b'', b'no image', cv2.imencode('.png', pixels.astype(np.uint8))[1].tobytes()):
    with pytest.raises(ValueError, match='depth: got'):
      depth.decode(bad)


def test_expectation_over_the_bins():
  logits = np.random.default_rng(0).normal(size=(2, 3, 4, 256)).astype(np.float32)
  weight = np.maximum(logits, 0).astype(np.float64) + 0.1
  expected = (weight / weight.sum(-1, keepdims=True)) @ np.linspace(0.001, 10, 256)
  np.testing.assert_allclose(depth.expectation(logits), expected, rtol=1e-5)
  one = np.full(256, -1.0)
  one[0] = 1e9
  assert float(depth.expectation(jnp.asarray(one), eps=1e-3)) == pytest.approx(0.001, abs=1e-4)
  assert float(depth.expectation(jnp.full(256, -5.0))) == pytest.approx(
    (0.001 + 10) / 2, rel=1e-5
  )  # all dead


def test_sigloss_by_hand():
  """Two valid pixels: g = log 2 and 0, so mean(g^2) = a^2 / 2, mean(g) = a / 2 with a = log 2 (eps
  apart).
  """
  predicted, truth = np.float32([[[4, 3, 9]]]), np.float32([[[2, 3, 0]]])
  a = np.log(4.001 / 2.001)
  found = depth.sigloss(predicted, truth, truth > 0)
  assert float(found) == pytest.approx(np.sqrt(a * a / 2 - 0.85 * a * a / 4), rel=1e-5)
  found = depth.sigloss(predicted, truth, truth > 0, only_mean=True)
  assert float(found) == pytest.approx(np.sqrt(0.15) * a / 2, rel=1e-5)
  scaled = depth.sigloss(
    2 * truth, truth, truth > 0
  )  # a wrong scale only: sqrt(0.15) of the log of the scale
  assert float(scaled) == pytest.approx(np.sqrt(0.15) * np.log(2), rel=1e-2)


def test_losses_equal_pytorch_and_have_finite_gradients():
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(0)
  truth, predicted = (
    random_maps(rng, 3, 14, 13),
    rng.uniform(0.01, 10, (3, 14, 13)).astype(np.float32),
  )
  valid = depth.known(truth)
  t = torch.tensor(predicted, requires_grad=True)
  mask = torch.tensor(valid)
  g = torch.log(t + 1e-3) - torch.log(torch.tensor(truth) + 1e-3)
  expected = torch.sqrt(torch.var(g[mask], unbiased=False) + 0.15 * g[mask].mean() ** 2)
  for stride in (1, 2, 4, 6):
    e, m = g[:, ::stride, ::stride], mask[:, ::stride, ::stride]
    down, right = (m[:, 2:] & m[:, :-2]), (m[:, :, 2:] & m[:, :, :-2])
    total = (e[:, 2:] - e[:, :-2]).abs()[down].sum() + (e[:, :, 2:] - e[:, :, :-2]).abs()[
      right
    ].sum()
    expected = expected + total / m.sum()
  expected.backward()
  expected = expected.detach()
  loss = lambda p: depth.sigloss(p, truth, valid) + depth.gradient_loss(p, truth, valid)
  value, grad = jax.value_and_grad(loss)(predicted)
  assert float(value) == pytest.approx(float(expected), rel=1e-5)
  np.testing.assert_allclose(grad, t.grad.numpy(), atol=1e-5)
  for p, v in (
    (jnp.asarray(truth), valid),
    (jnp.zeros_like(truth), valid),
    (predicted, np.zeros_like(valid)),
  ):
    value, grad = jax.value_and_grad(
      lambda p: depth.sigloss(p, truth, v) + depth.gradient_loss(p, truth, v)
    )(p)
    assert np.isfinite(value) and np.isfinite(grad).all()
  assert float(value) < 1e-5  # nothing valid


def reference(predicted, truth, max_depth=10.0):
  """(RMSE, abs rel, delta1) of one image."""
  mask = (truth > 0) & (truth <= max_depth)
  p, t = predicted[mask].astype(np.float64), truth[mask].astype(np.float64)
  return (
    np.sqrt(np.mean((p - t) ** 2)),
    np.mean(np.abs(p - t) / t),
    np.mean(np.maximum(p / t, t / p) < 1.25),
  )


def test_scores_equal_numpy():
  rng = np.random.default_rng(0)
  scorer, each, errors = depth.DepthScorer(), [], []
  for i in range(5):
    truth = random_maps(rng, 9 + i, 14)
    predicted = (truth * rng.uniform(0.6, 1.5, truth.shape) + 0.1).astype(np.float32)
    scorer.add(predicted, truth)
    each.append(reference(predicted, truth))
    mask = (truth > 0) & (truth <= 10)
    errors.append(np.float64(predicted[mask]) - truth[mask])
  rmse, rel, delta = np.mean(each, 0)
  pooled = np.sqrt(np.mean(np.concatenate(errors) ** 2))
  assert scorer.result() == pytest.approx(
    {'rmse': rmse, 'rmse_pooled': pooled, 'abs_rel': rel, 'delta1': delta}
  )
  assert abs(rmse - pooled) > 1e-3  # two things


def test_the_prediction_takes_the_size_of_the_truth_as_pytorch_does():
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(0)
  small, truth = rng.uniform(1, 5, (6, 7)).astype(np.float32), random_maps(rng, 21, 30)
  big = torch.nn.functional.interpolate(torch.tensor(small)[None, None], (21, 30), mode='bilinear')[
    0, 0
  ].numpy()
  np.testing.assert_allclose(depth.resize(small[None], (21, 30))[0], big, atol=1e-5)
  down = torch.nn.functional.interpolate(torch.tensor(big)[None, None], (5, 4), mode='bilinear')[
    0, 0
  ].numpy()
  np.testing.assert_allclose(depth.resize(big[None], (5, 4))[0], down, atol=1e-5)
  scorer = depth.DepthScorer()
  scorer.add(small, truth)
  assert scorer.result()['rmse'] == pytest.approx(reference(big, truth)[0], abs=1e-5)


def test_adversarial_images():
  ones = np.ones((4, 4), np.float32)
  scorer = depth.DepthScorer(max_depth=5)
  for void in (0 * ones, 6 * ones, np.nan * ones):
    scorer.add(ones, void)
  assert scorer.rows == [] and all(np.isnan(v) for v in scorer.result().values())
  single = np.zeros((4, 4), np.float32)
  single[2, 1] = 4
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    scorer.add(5 * ones, single)  # 5 / 4 is 1.25 and not below it
    scorer.add(0 * ones, single)
    scorer.add(-ones, single)
  assert [row[3] for row in scorer.rows] == [0, 0, 0]
  assert scorer.result()['rmse'] == pytest.approx((1 + 4 + 5) / 3, rel=1e-6)
  perfect = depth.DepthScorer()
  perfect.add(single, single)
  assert perfect.result() == {'rmse': 0, 'rmse_pooled': 0, 'abs_rel': 0, 'delta1': 1}
  many = depth.DepthScorer()
  many.add(2 * np.ones((100, 100)), np.ones((100, 100)))
  many.add(ones, ones)
  assert many.result()['rmse'] == 0.5 and many.result()['rmse_pooled'] == pytest.approx(
    np.sqrt(10000 / 10016)
  )
  cropped = depth.DepthScorer(crop=(1, 3, 1, 3))
  cropped.add(np.pad(ones[:2, :2], 1), np.ones((4, 4)))
  assert cropped.result()['rmse'] == 0


def test_the_order_of_images_does_not_matter():
  rng = np.random.default_rng(0)
  pairs = [(rng.uniform(1, 9, (6, 5)), random_maps(rng, 6, 5)) for _ in range(11)]
  forward, backward = depth.DepthScorer(), depth.DepthScorer()
  for pair in pairs:
    forward.add(*pair)
  for pair in reversed(pairs):
    backward.add(*pair)
  assert forward.result() == backward.result()


def test_naive_baselines():
  rng = np.random.default_rng(0)
  truths = random_maps(rng, 6, 5, 4)
  truths[:, 0, 0] = 0
  mean, image = depth.naive(truths.__getitem__, range(6))
  masked = np.ma.masked_outside(truths.astype(np.float64), 1e-9, 10)
  assert mean == pytest.approx(masked.mean())
  np.testing.assert_allclose(image, masked.mean(0).filled(masked.mean()), rtol=1e-5)
  found = depth.baselines(truths.__getitem__, range(6), truths.__getitem__, range(6))
  assert found['constant']['rmse_pooled'] == pytest.approx(masked.std(), rel=1e-5)
  assert found['mean_image']['rmse_pooled'] < found['constant']['rmse_pooled']
  with pytest.raises(InputError, match='no pixel'):
    depth.naive(np.zeros((2, 3, 3)).__getitem__, range(2))


# --- the probe ----------------------------------------------------------------------------------

QUICK = depth.DepthRecipe(learning_rates=(1e-4, 3e-2), steps=150, batch=8, upsample=1, mean_steps=5)


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
  return depth.fit(patch, cls, truth.__getitem__, recipe=QUICK)


def test_the_probe_beats_the_baselines_and_chooses_its_learning_rate():
  probe, (patch, cls, truth) = trained(), problem(20, seed=1)
  naive = depth.baselines(problem(60)[2].__getitem__, range(60), truth.__getitem__, range(20))
  assert score(probe, patch, cls, truth) < 0.6 * min(m['rmse_pooled'] for m in naive.values())
  assert probe.learning_rate == 3e-2 and set(probe.validation) == {1e-4, 3e-2}
  assert probe.validation[3e-2] < probe.validation[1e-4]
  blind = depth.fit(problem(60)[0], None, problem(60)[2].__getitem__, shape=(12, 15), recipe=QUICK)
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
  first = depth.fit(patch, cls, truth.__getitem__, **options)
  second = depth.fit(spoilt, cls, void.__getitem__, **options)
  assert first.learning_rate == second.learning_rate == 3e-2
  assert first.validation[3e-2] < first.validation[1e-7] and all(
    np.isnan(v) for v in second.validation.values()
  )
  np.testing.assert_array_equal(first.patch, second.patch)
  again = depth.fit(
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
  probe = depth.fit(lazy, cls, odd, recipe=QUICK)
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
  probe = depth.DepthProbe(
    **{k: v.astype(np.float32) for k, v in weights.items()},
    min_depth=0.001,
    max_depth=10.0,
    eps=0.1,
    upsample=4,
    learning_rate=1.0,
    validation={},
  )
  both = np.concatenate([patch, np.broadcast_to(cls[:, None, None], (2, 3, 4, 5))], -1)
  up = np.stack([cv2.resize(x, (16, 12), interpolation=cv2.INTER_LINEAR) for x in both])
  logits = up @ np.concatenate([probe.patch, probe.cls]) + probe.bias
  np.testing.assert_allclose(probe.predict(patch, cls), depth.expectation(logits), rtol=1e-4)


def test_minibatches_visit_every_row_once_an_epoch():
  values = np.arange(10, dtype=np.float32)
  truth = lambda i: np.full((2, 3), i)
  batches = list(depth.minibatches([values], truth, np.arange(10), batch=4, steps=5, shape=(2, 3)))
  seen = np.concatenate([a for (a,), _ in batches])
  assert len(batches) == 5 and all(t.shape == (4, 2, 3) for _, t in batches)
  assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
  np.testing.assert_array_equal(seen, np.concatenate([t[:, 0, 0] for _, t in batches]))
  again = np.concatenate(
    [
      a
      for (a,), _ in depth.minibatches(
        [values], truth, np.arange(10), batch=4, steps=5, shape=(2, 3)
      )
    ]
  )
  np.testing.assert_array_equal(seen, again)
  assert len(list(depth.minibatches([values], truth, [3], batch=4, steps=2, shape=(1, 1)))) == 2
  assert list(depth.minibatches([values], truth, [3], batch=4, steps=0, shape=(1, 1))) == []


def test_bad_input():
  patch, cls, truth = problem(5)
  with pytest.raises(InputError, match='no training image'):
    depth.fit(patch[:0], cls[:0], truth.__getitem__, recipe=QUICK)
  with pytest.raises(InputError, match='no pixel'):
    depth.fit(patch, cls, (0 * truth).__getitem__, recipe=QUICK)
  probe = depth.fit(
    patch[:1], cls[:1], truth.__getitem__, recipe=dataclasses.replace(QUICK, steps=3)
  )  # one image: nothing is held out
  assert (
    np.isfinite(probe.predict(patch, cls)).all()
    and probe.validation == {}
    and probe.learning_rate == 3e-2
  )

"""Depth against NumPy and PyTorch references: decoding, losses, metrics with void."""

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
  mean, image = depth.constant_answers(truths.__getitem__, range(6))
  masked = np.ma.masked_outside(truths.astype(np.float64), 1e-9, 10)
  assert mean == pytest.approx(masked.mean())
  np.testing.assert_allclose(image, masked.mean(0).filled(masked.mean()), rtol=1e-5)
  found = depth.baselines(truths.__getitem__, range(6), truths.__getitem__, range(6))
  assert found['constant']['rmse_pooled'] == pytest.approx(masked.std(), rel=1e-5)
  assert found['mean_image']['rmse_pooled'] < found['constant']['rmse_pooled']
  with pytest.raises(InputError, match='no pixel'):
    depth.constant_answers(np.zeros((2, 3, 3)).__getitem__, range(2))

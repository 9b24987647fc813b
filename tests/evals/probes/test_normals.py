"""Normals against NumPy and PyTorch references: decoding, losses, angular errors with void."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.evals.probes import normals


def unit_vectors(rng, *shape):
  return normals.unit(rng.normal(size=(*shape, 3))).astype(np.float32)


def reference(predicted, truth):
  """Angular errors in degrees of the valid pixels, by the arccos of the cosine."""
  mask = np.square(truth).sum(-1) > 0.5
  p, t = predicted[mask].astype(np.float64), truth[mask].astype(np.float64)
  cosine = (p * t).sum(-1) / (np.linalg.norm(p, axis=-1) * np.linalg.norm(t, axis=-1))
  return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def test_decoding_gives_unit_vectors_and_zeros():
  rng = np.random.default_rng(0)
  truth = unit_vectors(rng, 7, 9)
  pixels = np.rint(truth * 127.5 + 127.5).astype(np.uint8)
  pixels[2, 3] = 0
  png = cv2.imencode('.png', pixels[..., ::-1])[1].tobytes()
  found = normals.decode(png)
  assert found.dtype == np.float32 and not found[2, 3].any()
  known = normals.known(found)
  assert known.sum() == 62 and not known[2, 3]
  np.testing.assert_allclose(np.linalg.norm(found[known], axis=-1), 1, atol=1e-6)
  assert normals.degrees(found, truth)[known].max() < 0.5  # 8 bits
  for bad in (b'', b'no image', cv2.imencode('.png', pixels[..., 0])[1].tobytes()):
    with pytest.raises(ValueError, match='normals: got'):
      normals.decode(bad)


def test_scores_equal_numpy():
  rng = np.random.default_rng(0)
  scorer, errors = normals.NormalScorer(), []
  for i in range(4):
    truth = unit_vectors(rng, 11 + i, 8)
    truth[rng.random(truth.shape[:2]) < 0.3] = 0
    predicted = (truth + rng.normal(size=truth.shape) * (0.05 + i)).astype(
      np.float32
    ) * 7  # length is ignored
    scorer.add(predicted, truth)
    errors.append(reference(predicted, truth))
  everything = np.concatenate(errors)
  expected = {
    'angular_rmse': np.mean([np.sqrt(np.mean(e**2)) for e in errors]),
    'mean': everything.mean(),
    'rmse_pooled': np.sqrt(np.mean(everything**2)),
  }
  expected |= {
    f'within_{t:g}': np.mean([np.mean(e < t) for e in errors]) for t in (11.25, 22.5, 30)
  }
  found = scorer.result()
  assert found.pop('median') == pytest.approx(np.median(everything), abs=0.011)
  assert found == pytest.approx(expected, abs=1e-4)


def test_adversarial_images():
  up, down = np.tile(np.float32([0, 0, 1]), (4, 4, 1)), np.tile(np.float32([0, 0, -1]), (4, 4, 1))
  scorer = normals.NormalScorer()
  scorer.add(up, np.zeros((4, 4, 3)))  # void everywhere
  assert scorer.rows == [] and all(np.isnan(v) for v in scorer.result().values())
  single = np.zeros((4, 4, 3), np.float32)
  single[1, 2] = 0, 0, 1
  for predicted, angle in ((up, 0), (down, 180), (np.zeros((4, 4, 3)), 90)):
    scorer = normals.NormalScorer()
    scorer.add(predicted, single)
    found = scorer.result()
    assert found['angular_rmse'] == found['rmse_pooled'] == found['mean'] == angle
    assert abs(found['median'] - angle) <= 0.005 + 1e-9
    assert found['within_11.25'] == (angle == 0)
  tiny = np.tile(np.float32([1e-6, 0, 1]), (4, 4, 1))  # lost by an arccos in float32
  assert normals.degrees(tiny, up)[0, 0] == pytest.approx(np.degrees(1e-6), rel=1e-4)
  scorer = normals.NormalScorer()
  scorer.add(np.full((4, 4, 3), np.nan), up)
  assert all(np.isnan(scorer.result()[k]) for k in ('angular_rmse', 'mean', 'median'))
  scorer = normals.NormalScorer()
  scorer.add(up, up, valid=np.zeros((4, 4)))  # all left out by depth
  assert scorer.rows == []


def test_the_order_of_images_does_not_matter():
  rng = np.random.default_rng(0)
  pairs = [(unit_vectors(rng, 6, 5), unit_vectors(rng, 6, 5)) for _ in range(9)]
  forward, backward = normals.NormalScorer(), normals.NormalScorer()
  for pair in pairs:
    forward.add(*pair)
  for pair in reversed(pairs):
    backward.add(*pair)
  assert forward.result() == backward.result()


def test_the_resize_is_pytorchs_bicubic():
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(0)
  small, truth = rng.normal(size=(5, 6, 4)).astype(np.float32), unit_vectors(rng, 20, 13)
  big = torch.nn.functional.interpolate(
    torch.tensor(small).permute(2, 0, 1)[None], (20, 13), mode='bicubic'
  )
  a, b = normals.NormalScorer(), normals.NormalScorer()
  a.add(small, truth)
  b.add(big[0].permute(1, 2, 0).numpy(), truth)
  assert a.result() == pytest.approx(b.result(), abs=1e-3)


def test_losses_equal_pytorch():
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(0)
  truth, valid = unit_vectors(rng, 2, 5, 4), rng.random((2, 5, 4)) < 0.6
  predicted = rng.normal(size=(2, 5, 4, 4)).astype(np.float32)
  t = torch.tensor(predicted, requires_grad=True)
  cosine = torch.cosine_similarity(t[..., :3], torch.tensor(truth), dim=-1).clamp(
    -1 + 1e-4, 1 - 1e-4
  )
  kappa = torch.nn.functional.elu(t[..., 3]) + 1.01
  loss = (
    torch.log(1 + torch.exp(-kappa * torch.pi)) - torch.log(kappa**2 + 1) + kappa * cosine.acos()
  )
  expected = loss[torch.tensor(valid)].mean()
  expected.backward()
  expected, cosine = expected.detach(), cosine.detach()
  value, grad = jax.value_and_grad(normals.uncertain_loss)(predicted, truth, valid)
  assert float(value) == pytest.approx(float(expected), abs=1e-5)
  np.testing.assert_allclose(grad, t.grad.numpy(), atol=1e-5)
  plain = float(cosine.acos()[torch.tensor(valid)].mean())
  assert float(normals.angular_loss(predicted[..., :3], truth, valid)) == pytest.approx(
    plain, abs=1e-5
  )


def test_losses_have_finite_gradients_on_void_and_zeros():
  nothing = jnp.zeros((1, 3, 3), bool)
  for loss, k in ((normals.angular_loss, 3), (normals.uncertain_loss, 4)):
    for predicted in (jnp.zeros((1, 3, 3, k)), jnp.ones((1, 3, 3, k))):
      for truth in (jnp.zeros((1, 3, 3, 3)), jnp.ones((1, 3, 3, 3)), -jnp.ones((1, 3, 3, 3))):
        value, grad = jax.value_and_grad(loss)(predicted, truth, ~nothing)
        assert np.isfinite(value) and np.isfinite(grad).all()
        assert loss(predicted, truth, nothing) == 0


def test_naive_baselines():
  rng = np.random.default_rng(0)
  truths = np.stack([unit_vectors(rng, 6, 5) + [0, 0.2, 1] for _ in range(8)])
  truths = normals.unit(truths)
  truths[:, 0, 0], truths[3] = 0, 0
  mean, image = normals.constant_answers(truths.__getitem__, range(8))
  np.testing.assert_allclose(mean, normals.unit(truths.sum((0, 1, 2))), atol=1e-6)
  np.testing.assert_allclose(image[0, 0], mean, atol=1e-6)
  np.testing.assert_allclose(image[2, 3], normals.unit(truths[:, 2, 3].sum(0)), atol=1e-6)
  found = normals.baselines(truths.__getitem__, range(8), truths.__getitem__, range(8))
  errors = [reference(np.broadcast_to(mean, t.shape), t) for t in truths if t.any()]
  assert found['constant']['mean'] == pytest.approx(np.concatenate(errors).mean(), abs=1e-3)
  assert found['mean_image']['angular_rmse'] < found['constant']['angular_rmse']
  with pytest.raises(InputError, match='no pixel'):
    normals.constant_answers(np.zeros((2, 3, 3, 3)).__getitem__, range(2))

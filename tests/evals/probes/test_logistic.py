"""The probe reaches the optimum that SciPy finds on the plain objective."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from tips_jax.evals.probes import logistic


def problem(seed=0, n=600, d=7, k=4, spread=3.0):
  rng = np.random.default_rng(seed)
  y = rng.choice(k, n, p=np.arange(1, k + 1) / sum(range(1, k + 1)))
  mix = rng.normal(size=(d, d)) * spread ** rng.normal(size=d)  # badly scaled and correlated
  return ((rng.normal(size=(k, d))[y] + rng.normal(size=(n, d))) @ mix + 50).astype(np.float32), y


def objective(x, y, kernel, bias, l2):
  logits = x @ kernel + bias
  return (
    scipy.special.logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]
  ).mean() + l2 / 2 * (kernel**2).sum()


@pytest.mark.parametrize('l2', [1e-1, 1e-3])
def test_reaches_the_optimum_of_the_plain_objective(l2):
  x, y = problem()
  probe = logistic.fit(x, y, classes=4, strengths=(l2,), steps=200)
  mean, scale = np.float64(x).mean(0), np.float64(x).std(0)
  z = (x - mean) / scale

  def plain(flat):
    weights = flat.reshape(8, 4)
    logits = z @ weights[:-1] + weights[-1]
    error = (scipy.special.softmax(logits, axis=1) - np.eye(4)[y]) / len(y)
    gradient = np.concatenate([z.T @ error + l2 * weights[:-1], error.sum(0, keepdims=True)])
    return objective(z, y, weights[:-1], weights[-1], l2), gradient.ravel()

  best = scipy.optimize.minimize(
    plain, np.zeros(32), jac=True, method='L-BFGS-B', options={'ftol': 0, 'gtol': 1e-9}
  )
  kernel = probe.kernel * scale[:, None]
  found = objective(z, y, kernel, mean @ probe.kernel + probe.bias, l2)
  assert best.fun - 1e-9 <= found <= best.fun + 2e-5
  np.testing.assert_allclose(kernel, best.x.reshape(8, 4)[:-1], atol=0.02)
  assert probe.l2 == l2


def test_logits_act_on_raw_features_of_any_shape():
  x, y = problem()
  probe = logistic.fit(x, y, classes=4)
  flat = probe.logits(x)
  assert flat.shape == (600, 4) and flat.dtype == np.float32
  np.testing.assert_allclose(
    probe.logits(x.reshape(2, 30, 10, 7)), flat.reshape(2, 30, 10, 4), rtol=1e-4, atol=1e-4
  )
  assert (flat.argmax(-1) == y).mean() > 0.8


def test_scale_and_offset_of_features_do_not_matter():
  x, y = problem()
  first = logistic.fit(x, y, classes=4, strengths=(1e-2,)).logits(x)
  second = logistic.fit(1e-3 * x - 7, y, classes=4, strengths=(1e-2,)).logits(1e-3 * x - 7)
  assert (first.argmax(-1) == second.argmax(-1)).mean() > 0.99


def test_constant_duplicate_and_useless_features_are_harmless():
  x, y = problem()
  x = np.concatenate([x, x, np.full((600, 1), 3.0), np.zeros((600, 1))], 1).astype(np.float32)
  probe = logistic.fit(x, y, classes=6)  # two classes never occur
  assert np.isfinite(probe.kernel).all() and np.isfinite(probe.bias).all()
  assert (probe.logits(x).argmax(-1) == y).mean() > 0.8
  constant = logistic.fit(np.ones((50, 3)), np.repeat([0, 1], [10, 40]), classes=2)
  assert (constant.logits(np.ones((5, 3))).argmax(-1) == 1).all()


def test_strength_is_chosen_on_whole_held_out_groups():
  rng = np.random.default_rng(0)
  groups = np.repeat(np.arange(30), 10)
  y = rng.integers(0, 2, 30)[groups]
  identity = np.eye(30)[groups] * 3 + 0.01 * rng.normal(
    size=(300, 30)
  )  # tells the group: learns the rows by heart
  weak = rng.normal(size=(300, 1)) + 1.2 * (2 * y[:, None] - 1)
  x = np.concatenate([identity, weak], 1)
  chosen = logistic.fit(x, y, classes=2, groups=groups, strengths=(1e-1, 1e-7))
  assert chosen.l2 == 1e-1
  single = logistic.fit(
    x, y, classes=2, groups=np.zeros(300), strengths=(1e-1, 1e-7)
  )  # nothing can be held out
  assert single.l2 == 1e-1 and np.isfinite(single.kernel).all()

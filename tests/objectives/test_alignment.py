"""Matching of patches and words against SciPy, in value and gradient; on devices as on one."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from tips_jax.objectives import alignment
from tips_jax.planning import collectives, hlo, topologies

B, V, D = 8, 2, 6
VALID = np.array([1, 1, 0, 1, 1, 1, 1, 1], bool)
START = alignment.initial_state({})


def inputs(patches, words, seed=0):
  """Random tokens; texts of 0 to all words, with padding in their middle too."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(B, V, patches, D)).astype(np.float32)
  y = rng.normal(size=(B, words, D)).astype(np.float32)
  ids = rng.integers(1, 9, (B, words)) * (np.arange(words) < np.arange(B)[:, None] * words // 7)
  ids[-1, 1] = 0
  return x, y, ids.astype(np.int32)


def reference(x, y, ids, valid):
  """Image by image and view by view, over real words alone, in float64."""
  unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
  x, y = unit(x.astype(np.float64)), unit(y.astype(np.float64))
  losses = []
  for i in range(len(x)):
    real = ids[i] != 0
    if valid[i] and real.any():
      costs = [1 - x[i, v] @ y[i, real].T for v in range(x.shape[1])]
      pairs = [cost[scipy.optimize.linear_sum_assignment(cost)] for cost in costs]
      assert {len(p) for p in pairs} == {min(x.shape[2], real.sum())}
      losses.append(np.mean([p.mean() for p in pairs]))
  return np.mean(losses)


def loss(x, y, ids, valid=VALID, **args):
  return alignment.tokens(x, y, ids, START, valid, **args).value


@pytest.mark.parametrize('patches, words', [(9, 5), (4, 7), (6, 6)])
def test_equals_scipy(patches, words):
  x, y, ids = inputs(patches, words)
  got = jax.jit(lambda *a: alignment.tokens(*a, START, VALID))(x, y, ids)
  np.testing.assert_allclose(got.value, reference(x, y, ids, VALID), rtol=1e-6)
  np.testing.assert_allclose(got.metrics['similarity'], 1 - got.value, rtol=1e-6)


def test_the_gradient_is_that_of_the_pairs():
  x, y, ids = inputs(9, 5)
  gx, gy = jax.jit(jax.grad(loss, (0, 1)))(x, y, ids)
  for array, grad, index in ((0, gx, (4, 1, 3, 2)), (0, gx, (6, 0, 0, 0)), (1, gy, (5, 1, 4))):
    ends = []
    for shift in (1e-6, -1e-6):
      moved = [x.astype(np.float64), y.astype(np.float64)]
      moved[array][index] += shift
      ends.append(reference(*moved, ids, VALID))
    np.testing.assert_allclose(grad[index], (ends[0] - ends[1]) / 2e-6, rtol=1e-3, atol=1e-6)
  assert np.any(gx[4]) and not np.any(gx[2]) and not np.any(gy[ids == 0])


def test_without_any_pair_it_is_zero():
  x, y, ids = inputs(4, 3)
  for empty in (loss(x, y, 0 * ids), loss(x, y, ids, np.zeros(B, bool))):
    assert empty == 0
  assert not np.any(jax.grad(loss)(x, y, 0 * ids))


def test_it_is_computed_at_every_nth_step():
  x, y, ids = inputs(4, 3)
  state, values = START, []
  step = jax.jit(lambda state: alignment.tokens(x, y, ids, state, VALID, every_n_steps=3))
  for _ in range(5):
    value, _, state = step(state)
    values.append(float(value))
  whole = loss(x, y, ids)
  np.testing.assert_allclose(values, [whole, 0, 0, whole, 0], rtol=1e-6)
  assert state['steps'] == 5


def test_sharded_equals_replicated(mesh):
  arrays = inputs(9, 5)
  both = jax.jit(jax.value_and_grad(loss, (0, 1)))
  want = both(*arrays)
  with mesh(4, 2):
    got = both(*arrays)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='libtpu is not installed')
def test_no_loop_of_a_pod_waits_for_other_chips():
  _, devices = topologies.devices('v5e:2x2')
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 2), ('data', 'fsdp'), axis_types=auto, devices=devices)
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(('data', 'fsdp')))
  arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows) for a in inputs(9, 5)]

  def found(fn):
    """(collectives, those in loops that end with the data) of a function's program."""
    with jax.set_mesh(mesh), topologies.hidden_flags():
      text = jax.jit(fn).lower(*arrays).compile().as_text()
    every = collectives.find(hlo.parse(text), mesh)
    return len(every), sum(c.open_ended for c in every)

  def left_to_the_compiler(x, y, ids):
    return jax.vmap(alignment._distance)(x, y, ids != 0).mean()

  count, open_ended = found(jax.value_and_grad(loss, (0, 1)))
  assert count > 0 and open_ended == 0
  assert found(left_to_the_compiler)[1] > 0


def test_tokens_of_any_length_count_alike():
  x, y, ids = inputs(4, 3)
  longer = loss(3 * x, jnp.float32(0.5) * y, ids)
  np.testing.assert_allclose(longer, loss(x, y, ids), rtol=1e-5)

"""Sums over the batch are the same on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.core import parallel

X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
MESHES = [(1, 1), (2, 1), (1, 4), (2, 4)]


def test_batch_axes_hold_more_than_one_device(mesh):
  assert parallel.batch_axes() == ()
  for shape, axes in (
    ((1, 1), ()),
    ((4, 1), ('data',)),
    ((1, 2), ('fsdp',)),
    ((2, 2), ('data', 'fsdp')),
  ):
    with mesh(*shape):
      assert parallel.batch_axes() == axes


@pytest.mark.parametrize('shape', MESHES)
def test_sum_gather_and_offset(mesh, shape):
  scale = np.float32(2)

  def local(batch, scale, shard):
    x, ids = batch
    whole = shard.gather(x)
    own = shard.offset(len(x)) + jnp.arange(len(x))
    return {
      'sum': scale * x.sum(0),
      'order': jnp.abs(whole[own] - x).sum() + jnp.abs(own - ids).sum(),
      'rows': jnp.float32(len(x)),
      'square': (whole.sum() * x).sum() / shard.sum(jnp.float32(len(x))),
    }

  run = lambda x: parallel.sum_over_batch(local, (x, jnp.arange(16)), scale)
  with mesh(*shape):
    out = jax.jit(run)(X)
    grad = jax.jit(jax.grad(lambda x: run(x)['square']))(X)
  np.testing.assert_allclose(out['sum'], 2 * X.sum(0), rtol=1e-5)
  assert out['order'] == 0 and out['rows'] == 16
  np.testing.assert_allclose(out['square'], X.sum() ** 2 / 16, rtol=1e-4)
  np.testing.assert_allclose(
    grad, np.full_like(X, 2 * X.sum() / 16), rtol=1e-4
  )  # also through the gather


def test_the_gradient_of_what_is_shared_is_summed(mesh):
  loss = lambda w: parallel.sum_over_batch(lambda x, w, shard: jnp.square(x @ w).sum(), X, w)
  w = np.arange(3, dtype=np.float32)
  with mesh(4, 2):
    grad = jax.jit(jax.grad(loss))(w)
  np.testing.assert_allclose(grad, 2 * X.T @ X @ w, rtol=1e-5)


def test_a_loop_over_varying_values(mesh):
  def local(x, _, shard):
    return jax.lax.scan(lambda c, row: (c + row.sum(), None), shard.varying(jnp.float32(0)), x)[0]

  with mesh(2, 2):
    np.testing.assert_allclose(
      jax.jit(lambda x: parallel.sum_over_batch(local, x, ()))(X), X.sum(), rtol=1e-5
    )


def test_rows_that_do_not_divide_are_refused(mesh):
  with (
    mesh(2, 2),
    pytest.raises(ValueError, match=r'batch rows: got \[6\]; expected a multiple of the 4 devices'),
  ):
    parallel.sum_over_batch(lambda x, _, shard: x.sum(), X[:6], ())


def test_constrain_batch_splits_the_leading_axis(mesh):
  assert parallel.constrain_batch(X) is X
  with mesh(2, 4):
    y = jax.jit(parallel.constrain_batch)(X)
  assert {s.data.shape for s in y.addressable_shards} == {(2, 3)}
  np.testing.assert_array_equal(y, X)

"""The batch over the devices: one wrapper for code that must be written per shard.

Losses over the global batch (contrast, prototypes) are summed where the data is. Everything else
is left to the compiler.
"""
import math

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from tips_jax.core.types import BATCH_AXES


def batch_axes():
  """Names of the batch axes of the mesh in use (`jax.set_mesh`) that hold more than one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(a for a in BATCH_AXES if not mesh.empty and mesh.shape.get(a, 1) > 1)


def constrain_batch(x):
  """Keep the leading axis of `x` split over the batch axes; nothing without a mesh."""
  axes = batch_axes()
  return lax.with_sharding_constraint(x, P(axes)) if axes else x


def sum_over_batch(fn, batched, shared):
  """Sum over devices of fn(batched_on_this_device, shared, shard).

  Args:
    fn: returns a tree of sums over its rows. `shard.gather(x)` gives all rows of a batched array,
      `shard.offset(rows)` the global number of this shard's first row, `shard.sum(x)` a sum over shards.
    batched: tree of arrays whose leading axis is the batch.
    shared: tree of arrays that every device holds.
  """
  axes = batch_axes()
  if not axes:
    return fn(batched, shared, _Shard(()))
  count = math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes)
  rows = {x.shape[0] for x in jax.tree.leaves(batched)}
  if any(r % count for r in rows):
    raise ValueError(f'batch rows: got {sorted(rows)}; expected a multiple of the {count} devices of axes {axes}')
  shard = _Shard(axes)
  local = lambda b, s: jax.tree.map(shard.sum, fn(b, s, shard))
  return jax.shard_map(local, in_specs=(P(axes), P()), out_specs=P())(batched, shared)


class _Shard:

  def __init__(self, axes):
    self.axes = axes

  def gather(self, x):
    return lax.all_gather(x, self.axes, axis=0, tiled=True) if self.axes else x

  def offset(self, rows):
    return lax.axis_index(self.axes) * rows if self.axes else 0

  def sum(self, x):
    return lax.psum(x, self.axes) if self.axes else x

  def varying(self, x):
    """Marks a constant as this shard's own, as loop carries need it."""
    return jax.lax.pcast(x, self.axes, to='varying') if self.axes else x

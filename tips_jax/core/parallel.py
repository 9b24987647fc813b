"""The batch over the devices: code that is written for one device's rows and for its part of the
weights.

Towers run on each device's own rows (`map_batch`) and put a weight together where they read it
(`whole`): an all-gather in the activations' dtype, whose transpose is a reduce-scatter. Losses over
the global batch (contrast, prototypes) are summed where the data is (`sum_over_batch`); what a row
needs of no other may run on its device (`map_rows`). Everything else is left to the compiler.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from tips_jax.core.types import BATCH_AXES


def batch_axes() -> tuple[str, ...]:
  """Names of the batch axes of the mesh in use (`jax.set_mesh`) that hold more than one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(a for a in BATCH_AXES if not mesh.empty and mesh.shape.get(a, 1) > 1)


def constrain_batch(x: jax.Array) -> jax.Array:
  """Keep the leading axis of `x` split over the batch axes; nothing without a mesh."""
  axes = batch_axes()
  if not axes:
    return x
  return lax.with_sharding_constraint(x, P(axes))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
  """This device's part of a weight, split over mesh axis `axis` along dimension `dim`, counted from
  the end.
  """

  value: Any
  dim: int = dataclasses.field(metadata=dict(static=True))
  axis: str = dataclasses.field(metadata=dict(static=True))


def whole(weight: jax.Array | Part, dtype: jax.typing.DTypeLike) -> jax.Array:
  """A weight in `dtype`, put together from the devices' parts if it is a Part."""
  if not isinstance(weight, Part):
    return weight.astype(dtype)
  x = weight.value.astype(dtype)
  return lax.all_gather(x, weight.axis, axis=x.ndim + weight.dim, tiled=True)


def map_batch(fn: Callable[..., Any], weights: Any, batched: Any, *, specs: Any) -> Any:
  """fn(weights, rows of `batched`, their global numbers) on every device, whose results are joined
  along axis 0.

  Args:
    fn: rows in, rows out. Its weights are Parts where they are split: `whole` reads one.
    weights: tree of arrays; `specs`: the PartitionSpec of each. Axes other than the batch's stay
    the compiler's.
    batched: tree of arrays whose leading axis is the batch.

  The gradient of a weight is summed over the devices once, after all of its uses, and already
  scattered by then.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = batch_axes()
  if not axes:
    return fn(weights, batched, jnp.arange(_rows(batched)))

  def only_batch_axes(spec):
    return P(*(axis if axis in axes else None for axis in spec))

  def part(x, spec):
    # Varying over all axes, so that the gradient is summed over those that do not split it.
    x = lax.pcast(x, tuple(axis for axis in axes if axis not in spec), to='varying')
    for dim, axis in enumerate(spec):
      if axis:
        return Part(x, dim - x.ndim, axis)  # rules split a weight along one dimension
    return x

  def local(weights, batched):
    parts = jax.tree.map(part, weights, specs)
    count = _rows(batched)
    return fn(parts, batched, lax.axis_index(axes) * count + jnp.arange(count))

  specs = jax.tree.map(only_batch_axes, specs, is_leaf=lambda s: isinstance(s, P))

  # An axis of one device is ours too: a kernel may not stand under an axis that the compiler
  # splits, however small.
  manual = {a for a, size in mesh.shape.items() if a in axes or size == 1}
  return jax.shard_map(local, in_specs=(specs, P(axes)), out_specs=P(axes), axis_names=manual)(
    weights, batched
  )


def map_rows(fn: Callable[[Any], Any], batched: Any) -> Any:
  """fn(rows of `batched`) on every device, whose results are joined along axis 0.

  A loop in it that ends with the data runs as often as the device's own rows need: left to the
  compiler, every turn would ask all devices whether they are done.
  """
  axes = batch_axes()
  if not axes:
    return fn(batched)
  # Unchecked: what a library's loop begins with is not marked as this device's own.
  return jax.shard_map(fn, in_specs=P(axes), out_specs=P(axes), check_vma=False)(batched)


def _rows(batched):
  return jax.tree.leaves(batched)[0].shape[0]


def sum_over_batch(fn: Callable[..., Any], batched: Any, shared: Any) -> Any:
  """Sum over devices of fn(batched_on_this_device, shared, shard).

  Args:
    fn: returns a tree of sums over its rows. `shard.gather(x)` gives all rows of a batched array,
      `shard.offset(rows)` the global number of this shard's first row, `shard.sum(x)` a sum over
      shards.
    batched: tree of arrays whose leading axis is the batch.
    shared: tree of arrays that every device holds.
  """
  axes = batch_axes()
  if not axes:
    return fn(batched, shared, _Shard(()))
  count = math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes)
  rows = {x.shape[0] for x in jax.tree.leaves(batched)}
  if any(r % count for r in rows):
    raise ValueError(
      f'batch rows: got {sorted(rows)}; expected a multiple of the {count} devices of axes {axes}'
    )
  shard = _Shard(axes)

  def local(batched, shared):
    return jax.tree.map(shard.sum, fn(batched, shared, shard))

  return jax.shard_map(local, in_specs=(P(axes), P()), out_specs=P())(batched, shared)


class _Shard:
  """One device's place on the batch axes; without any it holds the whole batch."""

  def __init__(self, axes):
    self.axes = axes

  def gather(self, x):
    # One axis after the other: over both at once XLA makes an all-reduce of zeros.
    for axis in reversed(self.axes):
      x = lax.all_gather(x, axis, axis=0, tiled=True)
    return x

  def offset(self, rows):
    if not self.axes:
      return 0
    return lax.axis_index(self.axes) * rows

  def sum(self, x):
    if not self.axes:
      return x
    return lax.psum(x, self.axes)

  def varying(self, x):
    """Marks a constant as this shard's own, as loop carries need it."""
    if not self.axes:
      return x
    return lax.pcast(x, self.axes, to='varying')

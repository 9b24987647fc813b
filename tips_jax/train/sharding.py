"""Devices and where arrays live on them: one mesh, rules from parameter names to mesh axes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tips_jax.core import schema, tree
from tips_jax.core.errors import InputError
from tips_jax.core.types import BATCH_AXES

AXES = ('data', 'fsdp', 'tensor')
# Devices that weights are spread over at most, where a config leaves it open (docs/plans.md).
_PARTS = 32


def shape(config: schema.Mesh, devices: int, slices: int = 1) -> tuple[int, int, int]:
  """Sizes of the axes for a number of devices; -1 takes what the others leave.

  Where data and fsdp are both -1, fsdp is the most up to _PARTS that divides a slice: more parts
  move more bytes and save little memory.
  """
  sizes = [config.data, config.fsdp, config.tensor]
  if sizes[:2] == [-1, -1] and sizes[2] > 0 and devices % (slices * sizes[2]) == 0:
    rest = devices // (slices * sizes[2])
    sizes[1] = max(n for n in range(1, _PARTS + 1) if rest % n == 0)
  given = [size for size in sizes if size != -1]
  fixed = math.prod(given)
  sound = len(given) >= len(sizes) - 1 and min(given) >= 1
  if not sound or devices % fixed or (-1 not in sizes and fixed != devices):
    raise InputError(
      f'mesh: got {dict(zip(AXES, sizes))} for {devices} devices; expected sizes whose product is '
      'that, at most one of them -1, or data and fsdp both'
    )
  if -1 in sizes:
    sizes[sizes.index(-1)] = devices // fixed
  return tuple(sizes)


def make_mesh(
  config: schema.Mesh,
  batch_size: int,
  devices: Sequence[jax.Device] | None = None,
  slices: int = 1,
) -> jax.sharding.Mesh:
  """The mesh over all devices; InputError when the batch does not divide over it.

  slices: into which the devices divide in their order, where they do not say it themselves: GPUs
  that are compiled for and not there.
  """
  if devices is None:
    devices = jax.devices()
  # A TPU slice, or a host with GPUs: the network between them is slow, and of all axes only `data`
  # crosses it.
  found = len({getattr(d, 'slice_index', 0) for d in devices})
  slices = max(slices, found)
  sizes = shape(config, len(devices), slices)
  rows = sizes[0] * sizes[1]
  if batch_size % rows:
    raise InputError(
      f'schedule.batch_size: got {batch_size}; expected a multiple of the {rows} devices of the '
      f'axes {BATCH_AXES}'
    )
  if sizes[0] % slices:
    raise InputError(
      f'mesh.data: got {sizes[0]}; expected a multiple of the {slices} slices (of GPUs: hosts)'
    )
  within = (sizes[0] // slices, *sizes[1:])
  if found == 1:
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  else:
    grid = mesh_utils.create_hybrid_device_mesh(
      within, (slices, 1, 1), devices, allow_split_physical_axes=True
    )
  return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def alone() -> jax.sharding.Mesh:
  """A mesh of one device of this process: what is computed on it concerns no other."""
  return jax.sharding.Mesh(jax.local_devices()[:1], ('data',), axis_types=(AxisType.Auto,))


def spec(rules: tuple, sizes: Mapping[str, int], name: str, leaf: Any) -> P:
  """PartitionSpec of one array: the rule's axes go to the trailing dimensions, where they divide
  them.
  """
  axes = [None] * leaf.ndim
  # Rules speak of a layer's own weight: stacked layers and moments have more dimensions before.
  trailing = list(tree.match(rules, name, 'mesh.rules'))[::-1]
  for i, axis in enumerate(trailing[: leaf.ndim], start=1):
    if axis is not None and sizes.get(axis, 1) > 1 and leaf.shape[-i] % sizes[axis] == 0:
      axes[-i] = axis
  return P(*axes)


def specs(rules: tuple, tree_: Any) -> Any:
  """The PartitionSpec of every leaf on the mesh in use (`jax.set_mesh`)."""
  mesh = jax.sharding.get_abstract_mesh()
  sizes = {}
  if not mesh.empty:
    sizes = mesh.shape
  return tree.map_named(lambda n, x: spec(rules, sizes, n, x), tree_)


def shardings(rules: tuple, mesh: jax.sharding.Mesh, abstract: Any) -> Any:
  """A NamedSharding for every leaf of a state (or of any part of it, with names that end the
  same).
  """
  return tree.map_named(lambda n, x: NamedSharding(mesh, spec(rules, mesh.shape, n, x)), abstract)


def batch(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Sharding of everything whose leading axis is the batch."""
  return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())

"""Devices and where arrays live on them: one mesh, rules from parameter names to mesh axes."""
import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tips_jax.core import config as schema
from tips_jax.core import tree
from tips_jax.core.config import InputError
from tips_jax.core.types import BATCH_AXES

AXES = ('data', 'fsdp', 'tensor')


def shape(config: schema.Mesh, devices):
  """Sizes of the axes for a number of devices; -1 takes what the others leave."""
  sizes = [getattr(config, axis) for axis in AXES]
  fixed = 1
  for size in sizes:
    fixed *= size if size != -1 else 1
  sound = sizes.count(-1) <= 1 and all(s >= 1 or s == -1 for s in sizes)
  if not sound or devices % fixed or (-1 not in sizes and fixed != devices):
    raise InputError(f'mesh: got {dict(zip(AXES, sizes))} for {devices} devices; expected sizes whose product is that, '
                     'at most one of them -1')
  return tuple(devices // fixed if s == -1 else s for s in sizes)


def make_mesh(config: schema.Mesh, batch_size, devices=None):
  """The mesh over all devices; InputError when the batch does not divide over it."""
  devices = jax.devices() if devices is None else devices
  sizes = shape(config, len(devices))
  if batch_size % (sizes[0] * sizes[1]):
    raise InputError(f'schedule.batch_size: got {batch_size}; expected a multiple of the {sizes[0] * sizes[1]} devices '
                     f'of the axes {BATCH_AXES}')
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec(rules, sizes, name, leaf):
  """PartitionSpec of one array: the rule's axes go to the trailing dimensions, where they divide them."""
  axes = tree.match(rules, name, 'mesh.rules')[-leaf.ndim:] if leaf.ndim else ()
  axes = (None,) * (leaf.ndim - len(axes)) + tuple(axes)
  fits = lambda axis, n: axis is not None and sizes.get(axis, 1) > 1 and n % sizes[axis] == 0
  return P(*(axis if fits(axis, n) else None for axis, n in zip(axes, leaf.shape)))


def shardings(rules, mesh, abstract):
  """A NamedSharding for every leaf of a state (or of any part of it, with names that end the same)."""
  return tree.map_named(lambda n, x: NamedSharding(mesh, spec(rules, mesh.shape, n, x)), abstract)


def batch(mesh):
  """Sharding of everything whose leading axis is the batch."""
  return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh):
  return NamedSharding(mesh, P())

"""Meshes over several slices, of stand-in devices."""

import dataclasses

import pytest

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.train import sharding

AUTO = dict(data=-1, fsdp=-1)


@dataclasses.dataclass(frozen=True)
class Device:
  """What a mesh asks of a device. A GPU's slice is its host."""

  id: int
  process_index: int
  slice_index: int
  coords: tuple[int, ...] = ()
  core_on_chip: int = 0
  platform: str = 'gpu'
  device_kind: str = 'NVIDIA H100 80GB HBM3'
  client: None = None


def gpus(hosts, of_each=8):
  """One process a GPU, as SLURM starts them."""
  return [Device(i, i, i // of_each) for i in range(hosts * of_each)]


def tpus(slices, side):
  """Slices of side x side chips of v5e, four to a host."""
  devices = []
  for piece in range(slices):
    for chip in range(side * side):
      number = len(devices)
      place = (chip % side, chip // side, 0)
      devices.append(Device(number, number // 4, piece, place, 0, 'tpu', 'TPU v5 lite'))
  return devices


@pytest.mark.parametrize(
  ('devices', 'sizes'),
  [
    (gpus(hosts=1), (1, 8, 1)),
    (gpus(hosts=4), (4, 8, 1)),
    (gpus(hosts=3, of_each=6), (3, 6, 1)),
    (tpus(slices=2, side=2), (2, 4, 1)),
    (tpus(slices=2, side=4), (2, 16, 1)),
    (tpus(slices=2, side=8), (4, 32, 1)),
  ],
)
def test_the_automatic_fsdp_divides_one_slice(devices, sizes):
  mesh = sharding.make_mesh(schema.Mesh(**AUTO), batch_size=len(devices), devices=devices)
  assert tuple(mesh.shape.values()) == sizes
  for row in mesh.devices:
    assert len({device.slice_index for device in row.flat}) == 1  # only `data` crosses


def test_tensor_parts_are_taken_from_the_slice_first():
  config = schema.Mesh(**AUTO, tensor=2)
  mesh = sharding.make_mesh(config, batch_size=32, devices=gpus(hosts=4))
  assert tuple(mesh.shape.values()) == (4, 4, 2)


def test_an_fsdp_across_hosts_is_refused_in_one_line():
  config = schema.Mesh(data=1, fsdp=32)
  with pytest.raises(InputError, match='mesh.data: got 1; expected a multiple of the 4 slices'):
    sharding.make_mesh(config, batch_size=32, devices=gpus(hosts=4))


def test_gpus_that_are_compiled_for_divide_into_nodes_in_their_order():
  # They do not say which node they are of.
  devices = [dataclasses.replace(gpu, slice_index=0) for gpu in gpus(hosts=2)]
  mesh = sharding.make_mesh(schema.Mesh(**AUTO), 16, devices, slices=2)
  assert tuple(mesh.shape.values()) == (2, 8, 1)
  assert [[gpu.id // 8 for gpu in row.flat] for row in mesh.devices] == [[0] * 8, [1] * 8]
  with pytest.raises(InputError, match='mesh.data: got 1; expected a multiple of the 2 slices'):
    sharding.make_mesh(schema.Mesh(data=1, fsdp=16), 16, devices, slices=2)

"""TPU slices and GPU nodes to plan for, without the devices."""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tips_jax.core.chips import CHIPS, GPUS, TPUS, Chip, of_kind
from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown

if TYPE_CHECKING:
  import jax

_SIDES = {2: (1, 2, 4, 8, 16), 3: (1, 2, *range(4, 33, 4))}


def shape_for(chip: str, count: int) -> str:
  """'v5e:4x8' or 'gpu:h100x8' for a chip and a number: the squarest torus, with the longer sides
  last.

  2 dimensions: powers of two up to 16x16. 3 dimensions: sides of 1, 2 or multiples of 4.
  """
  if chip not in (*TPUS, *GPUS):
    raise unknown('--chip', chip, [*TPUS, *GPUS])
  dims = CHIPS[chip].dims
  most = CHIPS[chip].most
  if chip in GPUS:
    if count > most:
      raise InputError(
        f'--chips: got {count} of a node; expected at most {most}, and --slices for several nodes'
      )
    return f'gpu:{chip}x{count}'
  sides = _SIDES[dims]
  shapes = list(_shapes(count, sides, dims))
  if not shapes or count > most:
    possible = [n for n in range(1, most + 1) if any(_shapes(n, sides, dims))]
    hint = min(possible, key=lambda n: abs(n - count))
    raise InputError(
      f'--chips: got {count}; expected a number that {chip} slices have; did you mean {hint}?'
    )
  shape = list(min(shapes, key=sum))
  if dims == 3 and shape[0] == 1 < shape[1]:
    shape = [*shape[1:], 1]  # 2x2x1, as the vendor calls the four chips of a host
  return f'{chip}:' + 'x'.join(map(str, shape))


def _shapes(
  count: int, sides: Sequence[int], dims: int, least: int = 1
) -> Iterator[tuple[int, ...]]:
  """All shapes with that many chips, sides in increasing order."""
  if dims == 1:
    if count in sides and count >= least:
      yield (count,)
    return
  for side in sides:
    if side >= least and count % side == 0:
      for rest in _shapes(count // side, sides, dims - 1, side):
        yield (side, *rest)


def devices(topology: str, slices: int = 1) -> tuple[Chip, Sequence['jax.Device']]:
  """(Chip, devices) of 'v5p:8x8x8' or 'gpu:h100x8' ahead of time, or of the attached devices
  ('gpu', 'cpu').

  slices: TPU slices, or nodes of GPUs. InputError without the compiler of those devices, and for a
  chip or a shape that it does not know.
  """
  import jax

  if topology in ('gpu', 'cpu'):
    try:
      attached = jax.devices({'gpu': 'cuda', 'cpu': 'cpu'}[topology])
    except RuntimeError as error:
      raise InputError(
        f'--topology: got {topology!r}; expected an attached device ({error})'
      ) from None
    return of_kind(attached[0].device_kind), attached
  name, _, shape = topology.partition(':')
  if name == 'gpu':
    return _gpus(topology, shape, slices)
  if name not in TPUS:
    examples = [*map(_example, TPUS), *map('gpu:{}x8'.format, GPUS)]
    raise unknown('--topology', topology, ['auto', 'gpu', 'cpu', *examples])
  chip = CHIPS[name]
  sides = [int(n) for n in re.findall(r'\d+', shape)]
  valid = re.fullmatch(r'\d+(x\d+)*', shape) and math.prod(sides)
  # libtpu takes 4x4x1 for a chip of two dimensions, too.
  if not valid or len(sides) not in (chip.dims, 3):
    count = math.prod(sides) if sides else 8
    raise InputError(
      f'--topology: got {topology!r}; expected {name}:{"x".join("N" * chip.dims)}; did you mean '
      f'{_nearest(name, count)!r}?'
    )
  return chip, _topology(topology, sides, chip, slices)


def _gpus(topology: str, node: str, nodes: int) -> tuple[Chip, Sequence['jax.Device']]:
  """(Chip, devices) of 'gpu:h100x8', a node of eight.

  JAX_PLATFORMS must be 'cpu' before jax is imported (plan.py sets it): else the compiler looks for
  a GPU when it is loaded, and is dropped where there is none.
  """
  from jax.experimental import topologies

  name, _, count = node.rpartition('x')
  if name not in GPUS or not count.isdecimal() or not 0 < int(count) <= CHIPS[name].most:
    raise unknown('--topology', topology, [f'gpu:{gpu}x{CHIPS[gpu].most}' for gpu in GPUS])
  try:
    found = topologies.get_topology_desc(
      node, 'cuda', target_config=_target(CHIPS[name]), topology=f'1x{nodes}x{count}'
    )
  except NotImplementedError as error:  # what jax says where the plugin is not installed
    raise InputError(
      f"--topology: got {topology!r}; expected XLA's compiler for GPUs, `pip install "
      f"-e '.[plan-gpu]'` ({str(error).splitlines()[0]})"
    ) from None
  return CHIPS[name], found.devices


def options(topology: str) -> dict[str, str]:
  """Options of the compiler for a topology, where it has others than a run."""
  if not topology.startswith('gpu:'):
    return {}
  # No tile can be tried out where there is no GPU, and the one that Triton's products start from
  # does not fit all shapes. cuBLAS is what a run takes for large products.
  return {'xla_gpu_enable_triton_gemm': 'False'}


# Of a core, by compute capability: FP32 units, threads, bytes of shared memory and of those what a
# block may ask for (CUDA's programming guide, table of technical specifications).
_CORES = {
  '8.0': (64, 2048, 167936, 166912),
  '8.9': (128, 1536, 102400, 101376),
  '9.0': (128, 2048, 233472, 232448),
  '10.0': (128, 2048, 233472, 232448),
}


def _target(chip: Chip) -> str:
  """A GpuTargetConfigProto (openxla/xla, xla/stream_executor/device_description.proto) as text."""
  gpu = chip.gpu
  major, minor = gpu.capability.split('.')
  units, threads, shared, optin = _CORES[gpu.capability]
  return f"""
    gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      core_count: {gpu.cores}  fpus_per_core: {units}  clock_rate_ghz: {gpu.clock}
      memory_bandwidth: {chip.bandwidth:.0f}  device_memory_size: {gpu.memory}
      l2_cache_size: {gpu.l2}
      shared_memory_per_core: {shared}
      shared_memory_per_block: 49152  shared_memory_per_block_optin: {optin}
      threads_per_core_limit: {threads}  threads_per_block_limit: 1024  threads_per_warp: 32
      registers_per_core_limit: 65536  registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
    }}
    runtime_version {{ major: 12 minor: 9 }}
    dnn_version_info {{ major: 9 minor: 10 }}
    platform_name: "CUDA"
    device_description_str: "{chip.kind}"
  """


def _topology(
  topology: str, sides: Sequence[int], chip: Chip, slices: int
) -> Sequence['jax.Device']:
  from jax.experimental import topologies

  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  # libtpu locks the TPU for one process, but nothing runs on a TPU here.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  # A host has up to 2 x 2 chips.
  bounds = list(map(min, (*sides, 1), (2, 2, 1)))
  more = {}
  if chip.config:
    more['chip_config_name'] = chip.config
  try:
    with hidden_flags():
      return topologies.get_topology_desc(
        platform='tpu',
        topology_name=topology,
        num_slices=slices,
        chips_per_host_bounds=bounds,
        **more,
      ).devices
  except Exception as error:  # the plugin's own type
    text = ' '.join(str(error).split())
    if 'libtpu' in text and ('not' in text.lower() or 'unable' in text.lower()):
      raise InputError(
        "--topology: libtpu, the TPU compiler, is missing; expected `pip install -e '.[tpu]'`"
      ) from None
    raise InputError(
      f'--topology: got {topology!r}; libtpu does not know it ({text[:200]}); did you mean '
      f'{_nearest(chip.name, math.prod(sides))!r}?'
    ) from None


@contextlib.contextmanager
def hidden_flags() -> Iterator[None]:
  """Hides XLA_FLAGS from libtpu, which exits the process at an unknown flag, such as one for CPUs.

  Flags for libtpu are in LIBTPU_INIT_ARGS.
  """
  import jax

  jax.devices('cpu')  # so that the CPU's compiler has read the flags
  kept = os.environ.pop('XLA_FLAGS', None)
  try:
    yield
  finally:
    if kept is not None:
      os.environ['XLA_FLAGS'] = kept


def _example(name: str) -> str:
  return f'{name}:{"x".join("4" * CHIPS[name].dims)}'


def _nearest(name: str, count: int) -> str:
  """The topology with the power of two of chips that is nearest to a number."""
  counts = [2**k for k in range(14) if 2**k <= CHIPS[name].most]
  return shape_for(name, min(counts, key=lambda n: abs(math.log(n / max(count, 1)))))

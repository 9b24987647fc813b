"""Published figures of each chip: peak FLOP/s, memory, bandwidths."""

import dataclasses
import re

from tips_jax.core.strict import unknown

GIB = 2**30
# Of a GPU's memory, what jax takes at the start of a run (main.py tells it so) and what a plan may
# use. The rest is for CUDA's context, NCCL's buffers and cuDNN.
GPU_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What XLA asks about a GPU that it compiles for (planning/topologies.py)."""

  capability: str  # '9.0'
  cores: int  # streaming multiprocessors
  clock: float  # GHz
  l2: int  # bytes
  memory: int  # bytes, all of it


@dataclasses.dataclass(frozen=True)
class Chip:
  """The figures are of a device as jax counts them: of a tpu7x, half a chip."""

  name: str
  kind: str  # start of the device kind that jax reports
  flops: float  # dense bfloat16 peak, FLOP/s
  hbm: float  # bytes that a program may use; 0: unknown
  bandwidth: float  # HBM, bytes/s
  ici: float  # all links between devices of a slice or a node together, one way, bytes/s
  dcn: float = 0.0  # share of the network between slices or nodes, one way, bytes/s
  most: int = 1  # chips of the largest slice, or GPUs that `ici` joins
  clock: float = 0.0  # Hz; with it the compiler's cycles become seconds
  dims: int = 0  # of a TPU's torus; 0: it has none
  # libtpu's name for using both TensorCores as one, where that is not its default.
  config: str = ''
  devices: int = 1  # of a chip
  nominal: bool = False  # placeholder figures, against which no utilization is reported
  gpu: Gpu | None = None


# Peaks and bandwidths of HBM and links (half of what is called bidirectional), and of the data
# center network: Google's pages of each TPU (cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}) and
# its table of generations beside tpu7x, which gives v6e 800 GB/s of links, both ways (3,584 Gbit/s
# before), and the network of a chip: v5p 50, v6e and tpu7x 100 Gbit/s; v5e 2 x 100 a host of 8; v4
# as v5p. Usable HBM: the limit that libtpu names when a program is too big (0.0.52). Clocks follow
# from the peaks: v4, v5e and v5p multiply 8, 4 and 8 times 128 x 128 numbers a cycle, v6e and a
# TensorCore of tpu7x 4 times 256 x 256.
_TPUS = (
  # Only its peak is used, for the utilization of a run: nothing can be planned for it.
  Chip('v3', 'TPU v3', 61.5e12, hbm=0, bandwidth=0, ici=0),
  Chip('v4', 'TPU v4', 275e12, 30.75 * GIB, 1.228e12, 0.3e12, 6.25e9, 4096, 1.05e9, 3, 'megacore'),
  Chip('v5e', 'TPU v5 lite', 197e12, 15.75 * GIB, 0.819e12, 0.2e12, 3.125e9, 256, 1.5e9, 2),
  Chip('v5p', 'TPU v5', 459e12, 95.74 * GIB, 2.765e12, 0.6e12, 6.25e9, 8960, 1.75e9, 3),
  Chip('v6e', 'TPU v6 lite', 918e12, 31.25 * GIB, 1.64e12, 0.4e12, 12.5e9, 256, 1.75e9, 2),
  Chip(
    'tpu7x', 'TPU7x', 1153.5e12, 94.74 * GIB, 3.69e12, 0.3e12, 6.25e9, 9216, 2.2e9, 3, devices=2
  ),
)

# Peaks without sparsity, and links, one way: NVIDIA's data sheets. Bandwidths of memory, and what
# XLA asks: openxla/xla, xla/backends/gpu/target_config/specs; of L40S and H100 NVL, which are not
# there, the data sheets and nvidia-smi. NVLink joins H100 NVL in pairs only, and neither L40S nor a
# node of A100 PCIe: they have PCIe. The network is a NIC a GPU, as in NVIDIA's servers. Columns:
# TFLOP/s; GB/s of memory, of links and of the network; GPUs that the links join; compute
# capability, streaming multiprocessors, MHz, MiB of L2 cache, GB of memory.
_GPU_TABLE = """
a100            NVIDIA A100            312   2039  300  25  8   8.0   108  1410  40      85.10
a100-40gb       NVIDIA A100-SXM4-40GB  312   1555  300  25  8   8.0   108  1410  40      42.33
a100-pcie       NVIDIA A100 80GB PCIe  312   1935  32   25  8   8.0   108  1410  40      85.10
a100-pcie-40gb  NVIDIA A100-PCIE-40GB  312   1555  32   25  8   8.0   108  1410  40      42.33
l40s            NVIDIA L40S            362   864   32   25  8   8.9   142  2520  96      48.31
h100            NVIDIA H100            989   3352  450  50  8   9.0   132  1980  50      84.94
h100-pcie       NVIDIA H100 PCIe       756   2039  64   50  8   9.0   114  1755  50      84.94
h100-nvl        NVIDIA H100 NVL        835   3938  64   50  8   9.0   132  1785  60      100.49
h200            NVIDIA H200            989   4800  450  50  8   9.0   132  1980  50      151.40
b200            NVIDIA B200            2250  7672  900  50  8   10.0  148  1965  126.5   191.51
gb200           NVIDIA GB200           2500  7928  900  50  72  10.0  152  2062  129.25  197.90
"""


def _gpu(row):
  name, kind, *numbers = re.split(r'\s{2,}', row)
  capability = numbers.pop(5)
  flops, bandwidth, ici, dcn, most, cores, clock, l2, memory = map(float, numbers)
  gpu = Gpu(capability, int(cores), clock / 1e3, int(l2 * 2**20), int(memory * 1e9))
  return Chip(
    name,
    kind,
    flops * 1e12,
    GPU_SHARE * gpu.memory,
    bandwidth * 1e9,
    ici * 1e9,
    dcn * 1e9,
    int(most),
    gpu=gpu,
  )


_GPUS = tuple(map(_gpu, _GPU_TABLE.strip().splitlines()))
_CHIPS = (
  *_TPUS,
  *_GPUS,
  # Nominal, so that everything can be tried anywhere.
  Chip('cpu', 'cpu', 1e11, 0, 2e10, 1e10, 1e9, nominal=True),
)
CHIPS = {chip.name: chip for chip in _CHIPS}
TPUS = tuple(chip.name for chip in _TPUS if chip.dims)
GPUS = tuple(chip.name for chip in _GPUS)


def _of_kind(kind: str) -> Chip | None:
  # 'TPU v5 lite' starts with 'TPU v5' too: the longest name is the right one.
  matches = [chip for chip in _CHIPS if kind.startswith(chip.kind)]
  return max(matches, key=lambda chip: len(chip.kind), default=None)


def of_kind(kind: str) -> Chip:
  """The Chip of a device kind as jax names it."""
  chip = _of_kind(kind)
  if chip is None:
    raise unknown('--topology: device', kind, [chip.kind for chip in _CHIPS])
  return chip


def name(kind: str) -> str:
  """The name of the Chip of a device kind; '' where there is none."""
  chip = _of_kind(kind)
  if chip is None:
    return ''
  return chip.name


def peak(kind: str) -> float | None:
  """Peak FLOP/s of a device kind; None where unknown or only nominal."""
  chip = _of_kind(kind)
  if chip is None or chip.nominal:
    return None
  return chip.flops

"""Published figures of each chip: peak FLOP/s, memory, bandwidths."""

import dataclasses

from tips_jax.core.strict import unknown

GIB = 2**30
DCN = 25e9  # bytes/s of a host between slices: 200 Gbit/s


@dataclasses.dataclass(frozen=True)
class Chip:
  name: str
  kind: str  # start of the device kind that jax reports
  flops: float  # dense bfloat16 peak, FLOP/s
  hbm: float  # bytes that a program may use; 0: unknown
  bandwidth: float  # HBM, bytes/s
  ici: float  # all links between chips together, one way, bytes/s
  clock: float = 0.0  # Hz; with it the compiler's cycles become seconds
  dims: int = 0  # of the torus; 0: no topology that can be planned for
  host: int = 4  # chips of one host, which share `DCN`
  config: str = ''  # libtpu's name for using both TensorCores as one, where that is not its default
  nominal: bool = False  # placeholder figures, against which no utilization is reported


# Peaks, bandwidths and links: the vendors' data sheets. Usable HBM: the limit that libtpu names
# when a program is too big (jax 0.10.2). Clocks follow from the peaks: v4, v5e and v5p multiply 8,
# 4 and 8 times 128 x 128 numbers a cycle, v6e 4 times 256 x 256.
_CHIPS = (
  # Only its peak is used, for the utilization of a run: nothing can be planned for it.
  Chip('v3', 'TPU v3', 61.5e12, hbm=0, bandwidth=0, ici=0),
  Chip('v4', 'TPU v4', 275e12, 30.75 * GIB, 1.228e12, 0.300e12, 1.05e9, 3, config='megacore'),
  Chip('v5e', 'TPU v5 lite', 197e12, 15.75 * GIB, 0.819e12, 0.200e12, 1.5e9, 2),
  Chip('v5p', 'TPU v5', 459e12, 95.74 * GIB, 2.765e12, 0.600e12, 1.75e9, 3),
  Chip('v6e', 'TPU v6 lite', 918e12, 31.25 * GIB, 1.640e12, 0.448e12, 1.75e9, 2),
  Chip('a100', 'NVIDIA A100', 312e12, 79e9, 2.039e12, 0.300e12, host=8),
  Chip('h100', 'NVIDIA H100', 989e12, 79e9, 3.350e12, 0.450e12, host=8),
  Chip('h200', 'NVIDIA H200', 989e12, 139e9, 4.800e12, 0.450e12, host=8),
  # Nominal, so that everything can be tried anywhere.
  Chip('cpu', 'cpu', 1e11, 0, 2e10, 1e10, nominal=True),
)
CHIPS = {chip.name: chip for chip in _CHIPS}


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


def peak(kind: str) -> float | None:
  """Peak FLOP/s of a device kind; None where unknown or only nominal."""
  chip = _of_kind(kind)
  if chip is None or chip.nominal:
    return None
  return chip.flops

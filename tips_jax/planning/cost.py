"""Cost of an instruction: FLOPs, HBM bytes, and seconds by the compiler's cycles or a roofline."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from tips_jax.core.chips import Chip
from tips_jax.planning.hlo import Array, Instruction, Module, Run

Computation = dict[str, Instruction]
# Opcodes that neither compute nor move anything themselves.
FREE = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'while',
  'call',
  'conditional',
  'after-all',
  'partition-id',
  'replica-id',
  'async-done',
  'async-update',
  'copy-done',
  'optimization-barrier',
  'domain',
}
COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
  'ragged-all-to-all',
)
# Custom calls that are only annotations.
_NO_WORK = (
  'AllocateBuffer',
  'AssumeGatherIndicesInBound',
  'Sharding',
  'SPMDFullToShardShape',
  'SPMDShardToFullShape',
)
_SLICES = ('dynamic-slice', 'gather', 'slice')
KERNELS = ('tpu_custom_call', '__gpu$xla.gpu.triton', 'triton_kernel_call', 'mosaic_gpu')


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of all runs of an instruction in a step."""

  flops: float = 0.0
  bytes: float = 0.0  # to and from HBM
  seconds: float = 0.0
  source: str = ''  # 'compiler', 'schedule' (of a kernel) or 'roofline'


def collective(opcode: str) -> str:
  """'all-gather' for 'all-gather-start' and the like; '' for anything else and for -done."""
  kind = opcode.removesuffix('-start')
  return kind if kind in COLLECTIVES else ''


def flops(instruction: Instruction, computation: Computation) -> int:
  """FLOPs of one run of a dot, a convolution or a custom call; 0 for everything else."""
  if instruction.opcode == 'dot':
    return _dot(instruction, computation, instruction.attribute('lhs_contracting_dims'))
  if instruction.opcode == 'convolution':
    return _convolution(instruction, computation)
  if instruction.opcode != 'custom-call':
    return 0
  estimate = instruction.search(r'"cost_estimate":\{[^}]*"flops":"(\d+)"')
  if estimate:
    return int(estimate)
  if re.search('gemm|matmul', instruction.target):
    dims = instruction.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
    return _dot(instruction, computation, dims or str(len(_dims(instruction, computation, 0)) - 1))
  if 'fmha' in instruction.target:
    # Products of [T, d] with [T, d], as in the fused TPU kernel: scores and values; backward again
    # the scores, and the gradients of query, key, value and scores.
    products = 5 if 'Backward' in instruction.target else 2
    scores = instruction.search(
      r'"intermediate_tensor_shape":\s*\{"element_type":\s*"\w+",\s*"dimensions":\s*\[([^\]]*)\]'
    )
    if scores:
      width = _dims(instruction, computation, 0)[-1]
      return products * 2 * math.prod(_numbers(scores)) * width
  return 0


def _numbers(text: str) -> list[int]:
  return list(map(int, re.findall(r'\d+', text)))


def _dims(instruction: Instruction, computation: Computation, k: int) -> tuple[int, ...]:
  """Shape of an operand."""
  return computation[instruction.operands[k]].arrays[0].dims


def _dot(instruction: Instruction, computation: Computation, contracted: str) -> int:
  products = 2 * instruction.arrays[0].size
  lhs = _dims(instruction, computation, 0)
  for d in _numbers(contracted):
    products *= lhs[d]
  return products


def _convolution(instruction: Instruction, computation: Computation) -> int:
  """Without products with padding and with the holes of a dilated input.

  The compiler writes attention and matrix products as convolutions with such windows, where the
  size of the window would count far too much.
  """
  lhs = _dims(instruction, computation, 0)
  rhs = _dims(instruction, computation, 1)
  out = instruction.arrays[0].dims
  labels = re.match(r'(\w+)_(\w+)->(\w+)', instruction.attribute('dim_labels'))
  left, right, result = labels.groups()
  window = dict(re.findall(r'(\w+)=([\w\-]+)', instruction.search(r'window=\{([^}]*)\}')))
  spatial = sorted(c for c in left if c.isdigit())

  def field(key: str, default: str) -> list[str]:
    if key in window:
      return window[key].split('x')
    return [default] * len(spatial)

  strides = field('stride', '1')
  pads = field('pad', '0_0')
  input_dilations = field('lhs_dilate', '1')
  kernel_dilations = field('rhs_dilate', '1')
  valid = 1
  for k, c in enumerate(spatial):
    valid *= _valid(
      lhs[left.index(c)],
      rhs[right.index(c)],
      out[result.index(c)],
      int(strides[k]),
      int(pads[k].split('_')[0]),
      int(input_dilations[k]),
      int(kernel_dilations[k]),
    )
  feature_groups = int(instruction.attribute('feature_group_count') or 1)
  batch_groups = int(instruction.attribute('batch_group_count') or 1)
  features = lhs[left.index('f')] // feature_groups * rhs[right.index('o')]
  return 2 * features * (lhs[left.index('b')] // batch_groups) * valid


@functools.lru_cache(None)
def _valid(
  size: int, kernel: int, out: int, stride: int, pad: int, dilate_in: int, dilate_kernel: int
) -> int:
  """Pairs of (output, kernel) positions that meet an element of the input, no padding or hole."""
  at = np.arange(out)[:, None] * stride - pad + np.arange(kernel)[None] * dilate_kernel
  return int(((at >= 0) & (at <= (size - 1) * dilate_in) & (at % dilate_in == 0)).sum())


def traffic(module: Module, instruction: Instruction, computation: Computation) -> int:
  """HBM bytes of one run: operands and results, each once; of slices what is read or written."""
  if instruction.opcode in FREE or instruction.opcode.endswith('-done'):
    return 0
  reads = list(map(computation.get, instruction.operands))
  if instruction.opcode in _SLICES:
    return 2 * _hbm(instruction.arrays)
  if instruction.opcode == 'dynamic-update-slice':
    return 2 * _hbm(reads[1].arrays)
  if instruction.opcode in ('fusion', 'fusion-start') and instruction.called:
    return _fusion(module, instruction, reads)
  written = _results(instruction)
  if instruction.opcode.endswith('-start'):
    written = written[:1]  # the others are the operands again, and a context
  return _hbm(written) + sum(_hbm(r.arrays) for r in reads if r is not None)


def _results(instruction: Instruction) -> tuple[Array, ...]:
  """The arrays that it writes, without the scratch memory that calls of cuBLAS and cuDNN return."""
  arrays = instruction.arrays
  if instruction.opcode == 'fusion-start':  # around them its operands, and a context
    return arrays[len(instruction.operands) : -1]
  if len(arrays) > 1 and arrays[-1].dtype in ('s8', 'u8') and len(arrays[-1].dims) == 1:
    return arrays[:-1]
  return arrays


def _hbm(arrays: Sequence[Array]) -> int:
  return sum(a.nbytes for a in arrays if not a.on_chip)


def _fusion(module: Module, instruction: Instruction, reads: Sequence[Instruction | None]) -> int:
  """HBM bytes of a fusion, of which only the operands and results are in HBM."""
  inner = module.computations[instruction.called[0]]
  total = 0
  updated = set()  # arrays that are written in place, a slice at a time
  for i in inner.values():
    if i.opcode != 'parameter' or int(i.literal) >= len(reads) or reads[int(i.literal)] is None:
      continue
    arrays = reads[int(i.literal)].arrays
    if arrays and arrays[0].on_chip:
      continue
    touched = _touched(module, inner, i.name)
    if touched is None:
      total += _hbm(arrays)
      continue
    for part, scope in touched:
      if part.opcode == 'dynamic-update-slice':
        updated |= {(a.dtype, a.dims) for a in part.arrays}
        total += scope[part.operands[1]].arrays[0].nbytes
      else:
        total += sum(a.nbytes for a in part.arrays)
  written = [a for a in _results(instruction) if (a.dtype, a.dims) not in updated]
  return total + _hbm(written)


def _touched(
  module: Module, computation: Computation, value: str
) -> list[tuple[Instruction, Computation]] | None:
  """The slices that a computation reads of a value, or writes into it, also in what it calls and
  behind other names of the same value; None where it reads all of it, or nothing does.
  """
  found = []
  for i in computation.values():
    for k, operand in enumerate(i.operands):
      if operand != value:
        continue
      inside = None
      if k == 0 and i.opcode in (*_SLICES, 'dynamic-update-slice'):
        inside = [(i, computation)]
      elif i.opcode == 'bitcast':
        inside = _touched(module, computation, i.name)
      elif i.opcode in ('fusion', 'call') and i.called:
        called = module.computations[i.called[0]]
        parameters = {x.literal: x.name for x in called.values() if x.opcode == 'parameter'}
        inside = _touched(module, called, parameters.get(str(k), ''))
      if inside is None:
        return None
      found += inside
  return found or None


def costs(
  module: Module, chip: Chip, schedules: Mapping[str, int] | None = None
) -> list[tuple[Run, Cost]]:
  """The cost of every run; instructions inside of a fusion carry only FLOPs.

  Seconds are the compiler's estimated cycles over the clock. Where it gives none: a kernel takes
  what its schedule (`schedules`: instruction name -> cycles) or its memory traffic takes, whichever
  is more; anything else takes max(FLOPs / peak, bytes / bandwidth). Collectives are not counted
  here, and neither are copies in the background.
  """
  work = []
  inner = {}  # name of a fusion -> FLOPs inside of it
  for run in module.runs:
    n = 0
    if run.instruction.opcode in ('dot', 'convolution', 'custom-call'):
      n = flops(run.instruction, run.computation)
      if run.inside is not None:
        inner[run.inside.name] = inner.get(run.inside.name, 0) + n
    work.append(n)
  result = []
  for run, n in zip(module.runs, work):
    inside = inner.get(run.instruction.name, 0)
    result.append((run, _cost(module, run, n, inside, chip, schedules or {})))
  return result


def _cost(
  module: Module, run: Run, work: int, inside: int, chip: Chip, schedules: Mapping[str, int]
) -> Cost:
  """work: FLOPs of the instruction; inside: of what it calls."""
  i = run.instruction
  if run.inside is not None or i.opcode in FREE or collective(i.opcode) or i.target in _NO_WORK:
    return Cost(flops=work * run.times)
  moved = traffic(module, i, run.computation)
  estimate = i.search(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')
  if estimate:
    moved = int(estimate)
  roofline = max((work + inside) / chip.flops, moved / chip.bandwidth)
  seconds = roofline
  source = 'roofline'
  if i.opcode in ('copy-start', 'async-start') or 'collective' in i.name and i.opcode == 'fusion':
    # Runs in the background, and the network is counted elsewhere: only the cycles to start it.
    seconds = (i.cycles or 0) / (chip.clock or 1)
    source = 'compiler'
  elif i.cycles and chip.clock:
    seconds = i.cycles / chip.clock
    source = 'compiler'
  elif i.name in schedules:
    seconds = max(schedules[i.name] / chip.clock, roofline)
    source = 'schedule'
  elif chip.clock and i.opcode in ('custom-call', 'fusion') and not work + inside and not i.op_name:
    seconds = 0.0  # bookkeeping
    source = 'compiler'
  return Cost(work * run.times, moved * run.times, seconds * run.times, source)


_BUNDLE = re.compile(r'^\s*(?:0x)?[0-9a-f]+\s+([A-Z]{2})?: >* ')
_EXIT = re.compile(r'(%p\w+) = scmp\.\w+\.\w+\.totalorder [^;]*?, (\w+) /\* loop exit test \*/')
_BACK = re.compile(r'sbr\.rel \(!(%p\w+)\)')


def schedule(text: str) -> int:
  """Cycles of a kernel by its final schedule ('final_bundles'): bundles times trip counts.

  A loop extends from its header to the branch that its exit test decides. Stalls (waiting for
  memory) are not counted, and a loop whose end is not a constant counts once.
  """
  grid = 1  # steps of the pipeline
  for bounds in re.findall(r'iteration_bounds: \(([^)]*)\)', text):
    grid = max(grid, math.prod(_numbers(bounds)))
  ends = {}  # predicate of an exit test -> trip count
  total = [0.0]  # cycles outside of loops, then inside of each open loop, outermost first
  for line in text.splitlines():
    bundle = _BUNDLE.match(line)
    if not bundle:
      continue
    if bundle[1] == 'LB':
      total.append(0.0)
    total[-1] += 1
    for predicate, end in _EXIT.findall(line):
      ends[predicate] = int(end) if end.isdigit() else 1
    back = next((p for p in _BACK.findall(line) if p in ends), None)
    if back and len(total) > 1:
      turns = ends[back]
      inside = total.pop()
      if len(total) == 1 and 1 < grid < turns:
        turns = grid  # the pipeline over the grid has one or two more iterations, without work
      total[-1] += inside * max(turns, 1)
  return round(sum(total))

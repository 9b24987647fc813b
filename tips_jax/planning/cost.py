"""What an instruction costs: FLOPs, HBM bytes, and seconds by the compiler's cycles or by a
roofline.
"""

import dataclasses
import functools
import math
import re

import numpy as np

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
_NOTHING = (
  'AllocateBuffer',
  'AssumeGatherIndicesInBound',
  'Sharding',
  'SPMDFullToShardShape',
  'SPMDShardToFullShape',
)
KERNELS = ('tpu_custom_call', '__gpu$xla.gpu.triton', 'triton_kernel_call', 'mosaic_gpu')


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one instruction over the whole step."""

  flops: float = 0.0
  bytes: float = 0.0  # to and from HBM
  seconds: float = 0.0
  source: str = ''  # 'compiler', 'schedule' (of a kernel) or 'roofline'


def collective(opcode):
  """'all-gather' for 'all-gather-start' and the like; '' for anything else and for -done."""
  kind = opcode.removesuffix('-start')
  return kind if kind in COLLECTIVES else ''


def flops(instruction, computation):
  """Multiplications and additions of one run of a dot, a convolution or a custom call; 0 for
  everything else.
  """
  shape = lambda k: computation[instruction.operands[k]].arrays[0].dims
  if instruction.opcode == 'dot':
    contracted = [int(d) for d in re.findall(r'\d+', instruction.attribute('lhs_contracting_dims'))]
    return 2 * instruction.arrays[0].size * math.prod(shape(0)[d] for d in contracted)
  if instruction.opcode == 'convolution':
    return _convolution(instruction, shape(0), shape(1), instruction.arrays[0].dims)
  if instruction.opcode == 'custom-call':
    told = re.search(r'"cost_estimate":\{[^}]*"flops":"(\d+)"', instruction.rest)
    if told:
      return int(told[1])
    if re.search('gemm|matmul', instruction.target):
      contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
      dims = (
        [int(d) for d in re.findall(r'\d+', contracted[1])] if contracted else [len(shape(0)) - 1]
      )
      return 2 * instruction.arrays[0].size * math.prod(shape(0)[d] for d in dims)
    if 'fmha' in instruction.target:
      products = (
        5 if 'Backward' in instruction.target else 2
      )  # of [T, d] with [T, d], as in the fused TPU kernel
      scores = re.search(
        r'"intermediate_tensor_shape":\{"element_type":"\w+","dimensions":\[([^\]]*)\]',
        instruction.rest,
      )
      if scores:
        width = min(d for d in shape(0)[-1:])
        return products * 2 * math.prod(int(d) for d in re.findall(r'\d+', scores[1])) * width
  return 0


def _convolution(instruction, lhs, rhs, out):
  left, right, result = re.match(
    r'(\w+)_(\w+)->(\w+)', instruction.attribute('dim_labels')
  ).groups()
  window = dict(
    re.findall(
      r'(\w+)=([\w\-]+)', re.search(r'window=\{([^}]*)\}', instruction.rest + 'window={}')[1]
    )
  )
  spatial = sorted(c for c in left if c.isdigit())
  field = lambda key, default: window[key].split('x') if key in window else [default] * len(spatial)
  valid = 1
  for c, stride, pad, dilate, kernel in zip(
    spatial,
    field('stride', '1'),
    field('pad', '0_0'),
    field('lhs_dilate', '1'),
    field('rhs_dilate', '1'),
  ):
    valid *= _valid(
      lhs[left.index(c)],
      rhs[right.index(c)],
      out[result.index(c)],
      int(stride),
      int(pad.split('_')[0]),
      int(dilate),
      int(kernel),
    )
  groups = int(instruction.attribute('feature_group_count') or 1)
  parts = int(instruction.attribute('batch_group_count') or 1)
  features = lhs[left.index('f')] // groups * rhs[right.index('o')]
  return 2 * features * (lhs[left.index('b')] // parts) * valid


@functools.lru_cache(None)
def _valid(size, kernel, out, stride, pad, dilate_in, dilate_kernel):
  """Pairs of (output, kernel) positions that meet an element of the input: neither padding nor a
  hole.
  """
  at = np.arange(out)[:, None] * stride - pad + np.arange(kernel)[None] * dilate_kernel
  return int(((at >= 0) & (at <= (size - 1) * dilate_in) & (at % dilate_in == 0)).sum())


def traffic(module, instruction, computation):
  """HBM bytes of one run: operands and results, each once; slices count as what is read or written
  of them.
  """
  if instruction.opcode in FREE or instruction.opcode.endswith('-done'):
    return 0
  reads = [computation.get(o) for o in instruction.operands]
  if instruction.opcode in ('dynamic-slice', 'gather', 'slice'):
    return 2 * _hbm(instruction.arrays)
  if instruction.opcode == 'dynamic-update-slice':
    return 2 * _hbm(reads[1].arrays)
  if instruction.opcode == 'fusion' and instruction.called:
    return _fusion(module.computations[instruction.called[0]], instruction, reads)
  written = instruction.arrays[:1] if instruction.opcode.endswith('-start') else instruction.arrays
  return _hbm(written) + sum(_hbm(r.arrays) for r in reads if r is not None)


def _hbm(arrays):
  return sum(a.nbytes for a in arrays if not a.on_chip)


def _fusion(inner, instruction, reads):
  total, used = 0, {}
  for i in inner.values():
    for k, o in enumerate(i.operands):
      used.setdefault(o, []).append((i, k))
  updated = set()
  for i in inner.values():
    if (
      i.opcode == 'parameter' and int(i.literal) < len(reads) and reads[int(i.literal)] is not None
    ):
      arrays, users = reads[int(i.literal)].arrays, used.get(i.name, [])
      if arrays and arrays[0].on_chip:
        continue
      if users and all(
        u.opcode in ('dynamic-slice', 'gather', 'slice') and k == 0 for u, k in users
      ):
        total += sum(a.nbytes for u, _ in users for a in u.arrays)
      elif users and all(u.opcode == 'dynamic-update-slice' and k == 0 for u, k in users):
        updated |= {u.arrays for u, _ in users}
        total += sum(inner[u.operands[1]].arrays[0].nbytes for u, _ in users)
      else:
        total += _hbm(arrays)
  whole = {(a.dtype, a.dims) for arrays in updated for a in arrays}
  return total + sum(
    a.nbytes for a in instruction.arrays if not a.on_chip and (a.dtype, a.dims) not in whole
  )


def costs(module, chip, schedules=None):
  """[(Run, Cost)] of the step; only instructions that stand for themselves carry seconds and bytes.

  Seconds are the compiler's estimated cycles over the clock. Where it gives none: a kernel takes
  what its schedule (`schedules`: instruction name -> cycles) or its memory traffic takes, whichever
  is more; anything else takes max(FLOPs / peak, bytes / bandwidth). Collectives are not counted
  here, and neither are copies in the background.
  """
  result, inner = [], {}
  for run in module.runs:
    i, work = run.instruction, 0
    if i.opcode in ('dot', 'convolution', 'custom-call'):
      work = flops(i, run.computation)
      if run.inside is not None:
        inner[run.inside.name] = inner.get(run.inside.name, 0) + work
    result.append((run, work))
  return [
    (run, _cost(module, run, work, inner.get(run.instruction.name, 0), chip, schedules or {}))
    for run, work in result
  ]


def _cost(module, run, work, inside, chip, schedules):
  i = run.instruction
  if run.inside is not None or i.opcode in FREE or collective(i.opcode) or i.target in _NOTHING:
    return Cost(flops=work * run.times)
  moved = traffic(module, i, run.computation)
  told = re.search(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"', i.rest)
  moved = int(told[1]) if told else moved
  roofline = max((work + inside) / chip.flops, moved / chip.bandwidth)
  if i.opcode in ('copy-start', 'async-start') or 'collective' in i.name and i.opcode == 'fusion':
    seconds, source = (
      (i.cycles or 0) / (chip.clock or 1),
      'compiler',
    )  # in the background; network counted apart
  elif i.cycles and chip.clock:
    seconds, source = i.cycles / chip.clock, 'compiler'
  elif i.name in schedules:
    seconds, source = max(schedules[i.name] / chip.clock, roofline), 'schedule'
  elif chip.clock and i.opcode in ('custom-call', 'fusion') and not work + inside and not i.op_name:
    seconds, source = 0.0, 'compiler'  # bookkeeping
  else:
    seconds, source = roofline, 'roofline'
  return Cost(work * run.times, moved * run.times, seconds * run.times, source)


_BUNDLE = re.compile(r'^\s*(?:0x)?[0-9a-f]+\s+([A-Z]{2})?: >* ')
_EXIT = re.compile(r'(%p\w+) = scmp\.\w+\.\w+\.totalorder [^;]*?, (\w+) /\* loop exit test \*/')
_BACK = re.compile(r'sbr\.rel \(!(%p\w+)\)')


def schedule(text):
  """Cycles of a kernel from its final schedule ('final_bundles' of libtpu's dump): bundles times
  turns of their loops.

  A loop reaches from its header to the branch that its exit test decides. Stalls (waiting for
  memory) are not in it, and a loop whose end is not a constant counts once.
  """
  grid = max(
    (
      math.prod(int(n) for n in re.findall(r'\d+', b))
      for b in re.findall(r'iteration_bounds: \(([^)]*)\)', text)
    ),
    default=1,
  )
  tests, open_, total = {}, [], [0.0]  # total: cycles inside of each open loop, outermost first
  for line in text.splitlines():
    at = _BUNDLE.match(line)
    if not at:
      continue
    if at[1] == 'LB':
      open_.append(len(total))
      total.append(0.0)
    total[-1] += 1
    tests |= {name: int(end) if end.isdigit() else 1 for name, end in _EXIT.findall(line)}
    back = next((p for p in _BACK.findall(line) if p in tests), None)
    if back and open_:
      turns, inside = tests[back], total.pop()
      open_.pop()
      if not open_ and 1 < grid < turns:
        turns = grid  # the pipeline over the grid turns once or twice more, with nothing in it
      total[-1] += inside * max(turns, 1)
  return round(sum(total))

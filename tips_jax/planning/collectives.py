"""Communication of a step: what the compiled program moves over which axis, and the minimum.

Bytes are those that one chip sends, by the algorithm that sends the fewest (a ring), of n chips:
all-gather (n-1)/n of its result, reduce-scatter (n-1)/n of its input, all-reduce 2 (n-1)/n,
all-to-all (n-1)/n, a permutation all of it.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import jax
import numpy as np

from tips_jax.core import tree
from tips_jax.planning import cost
from tips_jax.planning.hlo import Instruction, Module, Run
from tips_jax.train import sharding, state, summary
from tips_jax.train.method import Method

# The minimum, with F = size of fsdp, D = size of data, G = bytes of a tower's weights that fsdp
# shards, in the dtype of the activations:
#   gather     (F-1)/F G, twice for each student call of a tower (forward, and again in the backward
#              pass, which does not keep gathered weights), once for a teacher call; passes that
#              share a call (train/method.py) share its gather
#   scatter    (F-1)/F G, once for each student call
#   reduce     2 (D-1)/D times the float32 gradient of one chip's shards, once per trained tower;
#              over both axes for weights that fsdp does not shard
#   contrast   per contrastive loss, embeddings of the other modality are gathered, and their
#              gradients scattered
#   prototypes weights that losses read: gathered once, and the student's gradient scattered once
# With `accumulate` in n parts the calls run n times, and forward once more each. Sums of scalars,
# masks and optimizer statistics are not counted.
FORMULA = (
  'minimum: (F-1)/F of the weights, gathered 2 x and scattered 1 x per student call of a tower, '
  'gathered 1 x per teacher call; 2 (D-1)/D of the float32 gradient parts; contrasted embeddings'
)
_COMPUTE = ('fusion', 'convolution', 'dot', 'custom-call', 'while', 'call')


@dataclasses.dataclass(frozen=True)
class Collective:
  kind: str
  axes: tuple[str, ...]  # mesh axes that its groups span; ('?',) if they span none exactly
  dtype: str
  count: int  # in a step
  bytes: float  # that one chip sends in a step
  overlapped: bool  # with computation
  op_name: str
  open_ended: bool  # inside of a loop whose trip count depends on data
  crosses: bool = False  # between slices


def find(module: Module, mesh: jax.sharding.Mesh, slices: int = 1) -> list[Collective]:
  """Collectives of a parsed program.

  The TPU compiler may spread one over several fusions, a chain, which counts as one.
  """
  grid = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
  result = []
  chains = {}  # chain -> its index in the result
  lengths = collections.Counter()
  for run in module.runs:
    if not cost.collective(run.instruction.opcode):
      continue
    chain = run.instruction.search(r'chain_id="(\d+)"')
    if chain:
      lengths[chain] += 1
      if chain in chains:
        continue
      chains[chain] = len(result)
    result.append(_collective(module, run, grid, mesh.axis_names, slices))
  for chain, k in chains.items():
    # More than a start and an end: computation carries pieces between them.
    if lengths[chain] > 2:
      result[k] = dataclasses.replace(result[k], overlapped=True)
  return [c for c in result if c.bytes]


def _collective(
  module: Module, run: Run, grid: np.ndarray, names: Sequence[str], slices: int
) -> Collective:
  i = run.instruction
  around = run.inside
  kind = cost.collective(i.opcode)
  members = groups(i.rest, grid.size)
  # The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice.
  fused = kind == 'all-reduce' and around is not None and 'scatter' in around.name
  if fused:
    kind = 'reduce-scatter'
  n = 2 if kind == 'collective-permute' else len(members[0])
  slices_of_group = {member * slices // grid.size for member in members[0]}
  return Collective(
    kind=kind,
    axes=axes_of(members, grid, names),
    dtype=i.arrays[-1].dtype if i.arrays else '?',
    count=run.times,
    bytes=_bytes(kind, i, run.computation, n, fused) * run.times,
    overlapped=_overlapped(module, run),
    op_name=run.op_name,
    open_ended=run.open_ended,
    crosses=slices > 1 and len(slices_of_group) > 1,
  )


def _overlapped(module: Module, run: Run) -> bool:
  """Whether computation runs between the start and the end of a collective."""
  i = run.instruction
  scope = run.computation
  if run.inside is not None and run.inside.opcode == 'async-start':
    i = run.inside
    scope = module.scope(i.name)
  elif not i.opcode.endswith('-start'):
    # Synchronous, unless it is fused with a matrix product.
    opcodes = {x.opcode for x in run.computation.values()}
    return run.inside is not None and not opcodes.isdisjoint(('convolution', 'dot'))
  started = False
  computing = False
  for x in scope.values():
    if x.opcode.endswith('-done') and i.name in x.operands:
      return computing
    if started and x.opcode in _COMPUTE:
      computing = True
    if x.name == i.name:
      started = True
  return False


def _bytes(kind: str, i: Instruction, computation: cost.Computation, n: int, fused: bool) -> float:
  """Bytes that one chip of a group of n sends; fused: a reduce-scatter written as an all-reduce."""
  if n < 2:
    return 0
  arrays = i.arrays
  if i.opcode.endswith('-start') and len(arrays) > 1:
    # The result of a start also has its operands, and of a permutation a context. A GPU's
    # all-gather may be of several arrays.
    if kind == 'all-gather':
      arrays = arrays[len(arrays) // 2 :]
    elif kind == 'collective-permute':
      arrays = arrays[:1]
  total = sum(a.nbytes for a in arrays)
  if kind == 'reduce-scatter':
    # Of its input, which is n times its result.
    given = 0
    for operand in i.operands:
      if operand in computation and computation[operand].arrays:
        given += computation[operand].arrays[0].nbytes
    if given:
      total = given
    elif not fused:
      total *= n
  share = {'all-reduce': 2 * (n - 1) / n, 'collective-permute': 1, 'collective-broadcast': 1}
  return total * share.get(kind, (n - 1) / n)


def groups(text: str, devices: int) -> list[list[int]]:
  """[[numbers of the devices] of each group], in any of HLO's notations."""
  pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', text)
  if pairs:
    return list(map(_ints, re.findall(r'\{(\d+,\d+)', pairs[1])))
  listed = re.search(r'replica_groups=\{(\{.*?\})\}', text)
  if listed:
    return list(map(_ints, re.findall(r'\{([\d,]+)\}', listed[1])))
  iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if iota:
    # [groups, size]<=[dims]T(permutation): the devices in order, reshaped and transposed.
    dims = _ints(iota[2])
    order = np.arange(math.prod(dims)).reshape(dims)
    if iota[3]:
      order = order.transpose(_ints(iota[3]))
    return order.reshape(_ints(iota[1])).tolist()
  named = re.search(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}', text)
  if named:
    return _named(text, named)
  return [list(range(devices))]


def _ints(text: str) -> list[int]:
  return list(map(int, text.split(',')))


def _named(text: str, named: re.Match) -> list[list[int]]:
  """Groups by axes of a mesh: mesh['a'=2,'b'=4] {'b'}, with parts of axes as 'b':(1)2."""
  sizes = {axis: int(size) for axis, size in re.findall(r"'?(\w+)'?=(\d+)", named[1])}
  order = re.search(r'device_ids=\(?\[([\d,]*)\]', text)
  parts = {}
  for axis, before, size in re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", named[2]):
    parts.setdefault(axis, []).append((int(before or 1), int(size or sizes[axis])))
  # Each axis becomes dimensions, of which those inside of a group alternate with those across.
  dims = []
  inside = []
  across = []
  for axis, size in sizes.items():
    at = 1
    for before, length in sorted(parts.get(axis, [])):
      across.append(len(dims))
      dims.append(before // at)
      inside.append(len(dims))
      dims.append(length)
      at = before * length
    across.append(len(dims))
    dims.append(size // at)
  ids = np.arange(math.prod(sizes.values()))
  if order and order[1].count(',') + 1 == ids.size:
    ids = np.array(_ints(order[1]))
  group_size = math.prod(dims[k] for k in inside)
  return ids.reshape(dims).transpose(across + inside).reshape(-1, group_size).tolist()


def axes_of(
  members: Sequence[Sequence[int]], grid: np.ndarray, names: Sequence[str]
) -> tuple[str, ...]:
  """Names of the mesh axes that groups run along; ('?',) for groups that are no block of axes."""
  group = members[0]
  if not np.isin(group, grid).all():
    return ('?',)
  axes = []
  full = 1
  # `grid` numbers the devices in order: a number is its flat index.
  for name, size, coordinate in zip(names, grid.shape, np.unravel_index(group, grid.shape)):
    if len(set(coordinate)) > 1:
      axes.append(name)
      full *= size
  # A permutation has groups of two, whatever the size of its axis.
  if axes and len(group) in (full, 2):
    return tuple(axes)
  return ('?',)


@dataclasses.dataclass
class _Elements:
  """Elements of a tower's weights, over the size of `tensor` where it shards them."""

  sharded: float = 0.0  # by fsdp
  read: float = 0.0  # of these, what losses read
  rest: float = 0.0


def _elements(
  method: Method, by: str, tower: str, params: object, sizes: dict[str, int]
) -> _Elements:
  """by: 'student' or a teacher's name."""
  read = set()
  for inputs in method.losses.values():
    for parameter in inputs.parameters.values():
      if (parameter.by, parameter.tower) == (by, tower):
        read.add(parameter.name)
  result = _Elements()
  for name, x in tree.named_leaves(params):
    axes = sharding.spec(method.config.mesh.rules, sizes, f'{tower}/{name}', x)
    n = x.size / (sizes['tensor'] if 'tensor' in axes else 1)
    if 'fsdp' not in axes:
      result.rest += n
      continue
    result.sharded += n
    if name in read:
      result.read += n
  return result


def minimum(
  method: Method, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> dict[str, float]:
  """Bytes that a chip must send in a step, by the formula above.

  Keys: gather, scatter, reduce, contrast, prototypes.
  """
  c = method.config
  sizes = dict(mesh.shape)
  f = sizes.get('fsdp', 1)
  d = sizes.get('data', 1)
  itemsize = 2 if c.compute.dtype == 'bfloat16' else 4
  parts = c.schedule.accumulate
  abstract = jax.eval_shape(lambda: state.init(method))
  elements = {}
  for by, towers in (('student', abstract.params), *abstract.teachers.items()):
    for tower, params in towers.items():
      elements[by, tower] = _elements(method, by, tower, params, sizes)
  result = dict(gather=0.0, scatter=0.0, reduce=0.0, contrast=0.0, prototypes=0.0)
  for group in method.order:  # passes of a group share one call of their tower
    p = c.passes[group[0]]
    # A teacher without weights of its own for this tower uses the student's.
    tower = elements.get((p.by, p.tower)) or elements['student', p.tower]
    moved = (f - 1) / f * itemsize * (tower.sharded - tower.read) * parts
    result['gather'] += moved
    if p.by == 'student':
      result['gather'] += moved  # in the backward pass
      result['scatter'] += moved
      if parts > 1:
        result['gather'] += moved  # each part's forward pass runs once more
  for (by, _), tower in elements.items():
    moved = (f - 1) / f * itemsize * tower.read
    result['prototypes'] += moved
    if by == 'student':
      result['prototypes'] += moved  # its gradient
  trained = {p.tower for p in c.passes.values() if p.by == 'student'}
  for name in abstract.params:
    if name not in trained:
      continue
    tower = elements['student', name]
    result['reduce'] += 2 * (d - 1) / d * 4 * tower.sharded / f
    result['reduce'] += 2 * (d * f - 1) / (d * f) * 4 * tower.rest
  shapes = summary.shapes(method)
  for name, loss in c.losses.items():
    if 'contrastive' in loss.kind:
      *_, width = shapes[method.losses[name].features['texts']]
      embeddings = c.schedule.batch_size * width
      result['contrast'] += 2 * (d * f - 1) / (d * f) * embeddings * 4
  return result

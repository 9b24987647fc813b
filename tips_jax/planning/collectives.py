"""Communication of a step: what the compiled program moves over which mesh axis, and the least it
could.

Bytes are those that one chip sends, by the algorithm that sends the fewest (a ring), of n chips:
all-gather (n-1)/n of its result, reduce-scatter (n-1)/n of its input, all-reduce 2 (n-1)/n,
all-to-all (n-1)/n, a permutation all of it.
"""

import collections
import dataclasses
import math
import re

import numpy as np

from tips_jax.core import tree
from tips_jax.planning import cost
from tips_jax.train import sharding

# The minimum, with F = size of fsdp, D = of data, G a tower's bytes in the activations' dtype of
# what fsdp splits:
#   gathers    (F-1)/F G, for each call of a tower by the student twice (forward, and once more in
#   the
#              backward pass, which does not keep whole weights), once for a teacher's; passes that
#              share a call (train/method.py) share its gather
#   scatters   (F-1)/F G, for each call by the student once
#   reductions 2 (D-1)/D times the float32 gradient of one chip's part, once per trained tower; of
#   what fsdp does not
#              split, over both axes
#   contrast   embeddings of the other modality gathered, and their gradients scattered, once per
#   contrastive term prototypes what losses read of the weights: gathered once, and the student's
#   gradient scattered once
# With `accumulate` in n parts the calls run n times, and forward once more each. Sums of scalars,
# masks and optimizer statistics are not in it.
FORMULA = (
  'minimum: (F-1)/F of the weights, gathered 2 x and scattered 1 x per student call of a tower, gathered 1 x '
  'per teacher call; 2 (D-1)/D of the float32 gradient parts; contrasted embeddings'
)


@dataclasses.dataclass(frozen=True)
class Collective:
  kind: str
  axes: tuple[str, ...]  # mesh axes that its groups span; ('?',) if they are none
  dtype: str
  count: int  # in a step
  bytes: float  # that one chip sends in a step
  overlapped: bool
  op_name: str
  open_ended: bool  # inside of a loop whose length only the data tell
  crosses: bool = False  # between slices


def find(module, mesh, slices=1):
  """[Collective] of a parsed program; pieces of one that the compiler spread over several fusions
  count as one.
  """
  grid = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
  found, chains, tails = [], {}, collections.Counter()
  for run in module.runs:
    i = run.instruction
    kind = cost.collective(i.opcode)
    if not kind:
      continue
    around = run.inside
    chain = re.search(r'chain_id="(\d+)"', i.rest)
    busy = _hidden(module, run)
    members = groups(i.rest, grid.size)
    axes = axes_of(members, grid, mesh.axis_names)
    scatter = kind == 'all-reduce' and around is not None and 'scatter' in around.name
    kind = 'reduce-scatter' if scatter else kind
    size = len(members[0]) if kind != 'collective-permute' else 2
    moved = _bytes(kind, i, run.computation, size, scatter) * run.times
    arrays = i.arrays or (None,)
    one = Collective(
      kind,
      axes,
      arrays[-1].dtype if arrays[-1] else '?',
      run.times,
      moved,
      busy,
      run.op_name or (around.op_name if around is not None else ''),
      run.open_ended,
      slices > 1
      and bool(
        {m * slices // grid.size for m in members[0]} - {members[0][0] * slices // grid.size}
      ),
    )
    if chain:
      key = chain[1]
      tails[key] += 1
      if key in chains:
        continue
      chains[key] = len(found)
    found.append(one)
  for (
    key,
    at,
  ) in chains.items():  # a start, an end, and computation that carries pieces between them
    found[at] = dataclasses.replace(found[at], overlapped=tails[key] > 2 or found[at].overlapped)
  return [c for c in found if c.bytes]


def _hidden(module, run):
  """Whether computation runs between the start and the end of a collective."""
  i, names = run.instruction, list(run.computation)
  if run.inside is not None and run.inside.opcode == 'async-start':
    i, names = (
      run.inside,
      next((list(c) for c in module.computations.values() if run.inside.name in c), []),
    )
    scope = next((c for c in module.computations.values() if i.name in c), {})
  elif i.opcode.endswith('-start'):
    scope = run.computation
  else:
    return run.inside is not None and any(
      x.opcode in ('convolution', 'dot') for x in run.computation.values()
    )
  end = next(
    (n for n in names if scope[n].opcode.endswith('-done') and i.name in scope[n].operands), None
  )
  between = names[names.index(i.name) + 1 : names.index(end)] if end else []
  return any(
    scope[n].opcode in ('fusion', 'convolution', 'dot', 'custom-call', 'while', 'call')
    for n in between
  )


def _bytes(kind, i, computation, n, scatter):
  if n < 2:
    return 0
  result = i.arrays
  if (
    i.opcode.endswith('-start') and kind in ('all-gather', 'collective-permute') and len(result) > 1
  ):
    result = result[len(result) // 2 :][:1] if kind == 'all-gather' else result[:1]
  whole = sum(a.nbytes for a in result)
  if kind == 'reduce-scatter':
    given = [computation[o] for o in i.operands if o in computation]
    whole = sum(a.nbytes for g in given for a in g.arrays[:1]) or whole * (1 if scatter else n)
  share = {'all-reduce': 2 * (n - 1) / n, 'collective-permute': 1, 'collective-broadcast': 1}
  return whole * share.get(kind, (n - 1) / n)


def groups(text, devices):
  """[[numbers of the devices] of each group], from any of the ways in which HLO writes them."""
  pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', text)
  if pairs:
    return [[int(a), int(b)] for a, b in re.findall(r'\{(\d+),(\d+)', pairs[1] + '}')]
  listed = re.search(r'replica_groups=\{(\{.*?\})\}', text)
  if listed:
    return [[int(n) for n in g.split(',')] for g in re.findall(r'\{([\d,]+)\}', listed[1])]
  iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if iota:
    ints = lambda s: [int(n) for n in s.split(',')]
    order = np.arange(math.prod(ints(iota[2]))).reshape(ints(iota[2]))
    return (
      order.transpose(ints(iota[3]) if iota[3] else range(order.ndim))
      .reshape(ints(iota[1]))
      .tolist()
    )
  named = re.search(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}', text)
  if named:
    return _named(text, named)
  return [list(range(devices))]


def _named(text, named):
  """Groups written with the axes of a mesh: mesh['a'=2,'b'=4] {'b'}, with parts of axes as
  'b':(1)2.
  """
  sizes = {k: int(v) for k, v in re.findall(r"'?(\w+)'?=(\d+)", named[1])}
  order = re.search(r'device_ids=\(?\[([\d,]*)\]', text)
  parts = {}
  for axis, before, size in re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", named[2]):
    parts.setdefault(axis, []).append((int(before or 1), int(size or sizes[axis])))
  dims, inside = [], []
  for axis, size in sizes.items():
    at = 1
    for before, length in sorted(parts.get(axis, [])):
      dims, inside = dims + [before // at, length], inside + [False, True]
      at = before * length
    dims, inside = dims + [size // at], inside + [False]
  ids = np.arange(math.prod(sizes.values()))
  if order and order[1].count(',') + 1 == ids.size:
    ids = np.array([int(n) for n in order[1].split(',')])
  ids = ids.reshape(dims)
  keep = [k for k, x in enumerate(inside) if not x] + [k for k, x in enumerate(inside) if x]
  return ids.transpose(keep).reshape(-1, math.prod(d for d, x in zip(dims, inside) if x)).tolist()


def axes_of(members, grid, names):
  """Names of the mesh axes that groups run along; ('?',) where a group is not a whole block of
  axes.
  """
  where = {int(n): np.unravel_index(k, grid.shape) for k, n in enumerate(grid.reshape(-1))}
  group = members[0]
  if any(m not in where for m in group):
    return ('?',)
  coordinates = np.array([where[m] for m in group])
  varies = [k for k in range(len(names)) if len(set(coordinates[:, k])) > 1]
  full = math.prod(grid.shape[k] for k in varies)
  return tuple(names[k] for k in varies) if len(group) in (full, 2) and varies else ('?',)


def minimum(method, mesh):
  """Bytes that a chip must send in a step, by the formula above: gather, scatter, reduce, contrast,
  prototypes.
  """
  import jax

  from tips_jax.train import state

  c = method.config
  sizes = dict(mesh.shape)
  f, d, batch = sizes.get('fsdp', 1), sizes.get('data', 1), c.schedule.batch_size
  width = 2 if c.compute.dtype == 'bfloat16' else 4
  abstract = jax.eval_shape(lambda: state.init(method))
  parts = c.schedule.accumulate
  split, rest, shared = {}, {}, {}
  reads = {path for term in c.losses.values() for path in term.inputs.values()}
  for by, towers in (('student', abstract.params), *abstract.teachers.items()):
    for tower, params in towers.items():
      leaves = [
        (x, sharding.spec(c.mesh.rules, sizes, f'{tower}/{n}', x))
        for n, x in tree.named_leaves(params)
      ]
      over = lambda spec: math.prod(sizes[a] for a in spec if a == 'tensor')
      read = {path.split('.')[2] for path in reads if path.startswith(f'{by}.{tower}.')}
      split[by, tower] = sum(x.size / over(s) for x, s in leaves if 'fsdp' in s)
      shared[by, tower] = sum(
        x.size / over(s)
        for (n, _), (x, s) in zip(tree.named_leaves(params), leaves)
        if 'fsdp' in s and n in read
      )
      rest[by, tower] = sum(x.size / over(s) for x, s in leaves if 'fsdp' not in s)
  gather = scatter = reduce = contrast = 0.0
  for group in method.order:  # passes of a group share one call of their tower
    p = c.passes[group[0]]
    by = p.by if (p.by, p.tower) in split else 'student'
    one = (f - 1) / f * width * (split[by, p.tower] - shared[by, p.tower]) * parts
    trained = p.by == 'student'
    gather += one * (1 + trained + (parts > 1) * trained)
    scatter += one * trained
  prototypes = (
    (f - 1) / f * width * sum(n * (1 + (by == 'student')) for (by, _), n in shared.items())
  )
  for tower in abstract.params:
    if any(p.tower == tower and p.by == 'student' for p in c.passes.values()):
      reduce += 2 * (d - 1) / d * 4 * split['student', tower] / f
      reduce += 2 * (d * f - 1) / (d * f) * 4 * rest['student', tower]
  for term in c.losses.values():
    if 'contrastive' in term.kind:
      contrast += 2 * (d * f - 1) / (d * f) * batch * _embedding(c, term) * 4
  return dict(
    gather=gather, scatter=scatter, reduce=reduce, contrast=contrast, prototypes=prototypes
  )


def _embedding(c, term):
  """Width of the embedding that a contrastive term reads."""
  for path in term.inputs.values():
    name = path.split('.')[0]
    if name in c.passes:
      tower = c.towers[c.passes[name].tower]
      return getattr(tower, 'output', getattr(tower, 'width', 0))
  return 0

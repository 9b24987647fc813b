"""The plan of one config on one mesh: memory, FLOPs, communication and time, as a dict."""

import collections
import importlib.metadata
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from tips_jax.core import tree
from tips_jax.core.chips import Chip
from tips_jax.core.errors import InputError
from tips_jax.planning import collectives, compiler, cost, parts, report, topologies
from tips_jax.train import lowering, sharding, summary
from tips_jax.train import state as state_lib
from tips_jax.train.method import Method

# Fields of the training state, and what a plan calls them.
GROUPS = dict(
  params='parameters',
  teachers='teachers',
  optimizer='optimizer',
  loss_state='state of the losses',
)


def plan(
  method: Method,
  mesh: jax.sharding.Mesh,
  chip: Chip,
  *,
  topology: str,
  slices: int = 1,
  dump: Any = '',
  say: Callable[[str], None] = compiler.progress,
  price: float = 0.0,
) -> dict[str, Any]:
  """Compiles the step for the mesh and says what it takes; plain data, as `--json` prints it.

  A program that does not fit gives the same with `fits` False, how much it is over, and neither
  FLOPs nor time. InputError for a program that was not understood.
  """
  result = {}
  result['header'] = header(method, mesh, chip, topology, slices)
  result['memory'] = memory(method, mesh, chip)
  say(f'lowering {method.config.name} for {topology}, mesh {report.mesh(mesh.shape)}')
  platform = mesh.devices.flat[0].platform
  try:
    lowered = lowering.lower(method, mesh)
    compiled = compiler.compile_step(
      lowered,
      platform=platform,
      dump=dump,
      say=say,
      options=topologies.options(topology),
    )
  except compiler.TooBig as error:
    # A refusal says the sum alone, and not by kind.
    over = error.used - error.limit
    result['memory'] |= dict(fits=False, total=error.used, limit=error.limit, over=over)
    result['header']['compile_seconds'] = error.seconds
    return result
  result['header']['compile_seconds'] = compiled.seconds
  _temporaries(result['memory'], compiled, method, mesh)
  costs = cost.costs(compiled.module, chip, compiled.schedules)
  moved = collectives.find(compiled.module, mesh, slices)
  result['flops'] = flops(method, mesh, costs)
  check_read(result['flops'], costs)
  result['collectives'] = network(method, mesh, moved)
  result['time'] = time(method, mesh, chip, costs, moved, price)
  result['parts'], result['instructions'] = consumers(method, costs)
  return result


def header(
  method: Method, mesh: jax.sharding.Mesh, chip: Chip, topology: str, slices: int
) -> dict[str, Any]:
  c = method.config
  count = mesh.devices.size / chip.devices
  return dict(
    config=c.name,
    chip=chip.name,
    topology=topology,
    slices=slices,
    chips=count,
    devices_per_chip=chip.devices,
    mesh=dict(mesh.shape),
    batch=c.schedule.batch_size,
    images_per_chip=c.schedule.batch_size / count,
    accumulate=c.schedule.accumulate,
    remat=c.compute.remat,
    attention=c.compute.attention,
    dtype=c.compute.dtype,
    steps=c.schedule.total_steps,
  )


def memory(method: Method, mesh: jax.sharding.Mesh, chip: Chip) -> dict[str, Any]:
  """Bytes of one chip: the state by group and the batch, exactly, from shapes and shardings."""
  abstract = jax.eval_shape(lambda: state_lib.init(method))
  groups = {}
  for field, name in GROUPS.items():
    # Rules match the ends of names: a part of the state is sharded as it is within the whole.
    shards = _shards(method, mesh, {field: getattr(abstract, field)})
    groups[name] = sum(math.prod(shape) * x.dtype.itemsize for x, shape in shards)
  # Each example is on one chip of these axes; `tensor` repeats it.
  devices = mesh.shape.get('data', 1) * mesh.shape.get('fsdp', 1)
  groups['batch'] = tree.nbytes(lowering.abstract_batch(method)) / devices
  return dict(groups=groups, limit=chip.hbm)


def _shards(
  method: Method, mesh: jax.sharding.Mesh, values: Any
) -> list[tuple[jax.ShapeDtypeStruct, tuple[int, ...]]]:
  """[(array, shape of its shard on one chip)] of a tree of abstract arrays."""
  places = jax.tree.leaves(sharding.shardings(method.config.mesh.rules, mesh, values))
  return [(x, place.shard_shape(x.shape)) for x, place in zip(jax.tree.leaves(values), places)]


def _temporaries(
  usage: dict[str, Any], compiled: compiler.Compiled, method: Method, mesh: jax.sharding.Mesh
) -> None:
  """Adds what the compiler allocates beside the state: by kind at the peak, and in total."""
  s = compiled.stats
  # Donated arguments become outputs in place: they are counted once.
  state = s['argument'] + s['output'] - s['alias']
  total = state + s['temp'] + s['generated_code']
  weights = set()
  for _, shape in _shards(method, mesh, jax.eval_shape(lambda: state_lib.init(method)).params):
    weights.add(shape)
    if len(shape) > 1:
      weights.add(shape[1:])  # a scan over layers takes one of a stack
  kinds = collections.Counter()
  for size, op_name, opcode, array in compiled.peak:
    kinds[parts.buffer(op_name, opcode, array, weights)] += size
  kinds = dict(kinds.most_common())
  if kinds:
    kinds['gaps between them'] = max(0, s['temp'] - sum(kinds.values()))
  usage |= dict(
    padding=state - sum(usage['groups'].values()),
    code=s['generated_code'],
    temporaries=s['temp'],
    temporaries_by_kind=kinds,
    total=total,
    fits=True,
    over=0,
  )
  if usage['limit']:  # else the device does not say how much memory it has
    usage |= dict(fits=total <= usage['limit'], over=total - usage['limit'])


def flops(method: Method, mesh: jax.sharding.Mesh, costs: Sequence) -> dict[str, Any]:
  """FLOPs of one chip and step: compiled, by part and direction, against the closed form of
  train/summary.py.
  """
  images = method.config.schedule.batch_size / mesh.devices.size
  least = summary.flops(method)
  table = collections.defaultdict(collections.Counter)
  scopes = parts.scopes(method)
  for run, c in costs:
    if c.flops:
      where = parts.part(run.op_name, *scopes)
      table[where.name][where.direction] += c.flops
  total = sum(row.total() for row in table.values())
  recomputed = sum(row['recompute'] for row in table.values())
  minimum = images * sum(least.values())
  rows = {}
  for name, row in table.items():
    # Passes that share a call are one part, 'clean+masked'.
    least_of_part = sum(least.get(n, 0) for n in name.split('+'))
    rows[name] = dict(row, minimum=images * least_of_part)
  return dict(
    total=total,
    minimum=minimum,
    ratio=_ratio(total, minimum),
    embedding_share=_ratio(images * sum(summary.embedding_flops(method).values()), minimum),
    recomputed=recomputed,
    recomputed_share=_ratio(recomputed, total),
    parts=rows,
  )


# Of a program that was read right, FLOPs over the closed form: losses and what remat and
# accumulation repeat come on top. Embeddings of patches may be left out (train/summary.py), which
# is nothing in a real tower and a third of a tiny one.
_READ = (0.9, 2.0)


def check_read(work: dict[str, Any], costs: Sequence) -> None:
  """InputError where a compiled program was not understood: every figure would be wrong."""
  found = ''
  least, most = _READ
  if not least * (1 - work['embedding_share']) <= work['ratio'] <= most:
    found = f"{work['ratio']:.3f} of the method's FLOPs; expected {least:g} to {most:g}"
  for run, c in costs:
    if c.flops and run.open_ended:
      found = f'a loop of unknown length around {run.op_name or run.instruction.name!r}'
  if found:
    version = importlib.metadata.version('jaxlib')
    raise InputError(
      f'plan: in what the compiler wrote (jaxlib {version}) are {found}. It was not understood, '
      'and no plan is printed; use a version of jax that setup.cfg names'
    )


def _ratio(value: float, reference: float) -> float:
  if not reference:  # one chip communicates nothing, for example
    return 0.0
  return value / reference


def network(method: Method, mesh: jax.sharding.Mesh, moved: Sequence) -> dict[str, Any]:
  """Collectives by kind, axes, dtype, overlap and part; their bytes against the minimum of
  collectives.py.
  """
  scopes = parts.scopes(method)
  table = {}
  for c in moved:
    where = parts.part(c.op_name, *scopes)
    key = dict(
      kind=c.kind,
      axis='+'.join(c.axes),
      dtype=c.dtype,
      overlapped=c.overlapped,
      part=where.name,
      direction=where.direction,
    )
    row = table.setdefault(tuple(key.values()), key | dict(count=0, bytes=0.0))
    row['count'] += c.count
    row['bytes'] += c.bytes
  least = collectives.minimum(method, mesh)
  minimum = sum(least.values())
  total = sum(c.bytes for c in moved)
  return dict(
    rows=_largest_first(table.values(), 'bytes'),
    total=total,
    minimum=minimum,
    minimum_by_kind=least,
    formula=collectives.FORMULA,
    ratio=_ratio(total, minimum),
    overlapped=sum(c.bytes for c in moved if c.overlapped),
    in_open_loops=sum(c.open_ended for c in moved),
  )


def _largest_first(rows: Iterable[dict[str, Any]], key: str) -> list[dict[str, Any]]:
  return sorted(rows, key=operator.itemgetter(key), reverse=True)


def seconds(chip: Chip, costs: Sequence, moved: Sequence) -> dict[str, Any]:
  """Estimated seconds of a compiled step: of computation, also by what said so, of memory, of the
  network, of that what no computation hides, and of the step.
  """
  by_source = collections.Counter()
  for _, x in costs:
    by_source[x.source] += x.seconds
  compute = by_source.total()
  hbm = sum(x.bytes for _, x in costs) / chip.bandwidth
  network = 0.0
  exposed = 0.0
  for x in moved:
    sent = x.bytes / (chip.dcn if x.crosses else chip.ici)
    network += sent
    if not x.overlapped:
      exposed += sent
  return dict(
    compute=compute,
    compute_by_source={k: v for k, v in by_source.items() if v},
    memory=hbm,
    network=network,
    network_exposed=exposed,
    # HBM and hidden communication run beside computation, which waits for what is exposed.
    step=max(compute + exposed, hbm, network),
  )


def time(
  method: Method,
  mesh: jax.sharding.Mesh,
  chip: Chip,
  costs: Sequence,
  moved: Sequence,
  price: float,
) -> dict[str, Any]:
  """Estimated seconds of a step, what bounds it, and what the whole schedule takes.

  kernels: what a GPU launches, and short_kernels those of less than 3 us, about a launch's time.
  """
  c = method.config.schedule
  kernels = 0
  short = 0
  for run, x in costs:
    # A TPU runs one program.
    if chip.gpu and x.seconds:
      kernels += run.times
      if x.seconds < 3e-6 * run.times:
        short += run.times
  of_step = seconds(chip, costs, moved)
  bounds = {name: of_step[name] for name in ('compute', 'memory', 'network')}
  days = of_step['step'] * c.total_steps / 86400
  chips = mesh.devices.size / chip.devices
  images = c.batch_size / chips
  work = sum(summary.flops(method).values()) * images / chip.devices
  return of_step | dict(
    bound=max(bounds, key=bounds.get),
    overlapped=max(bounds.values()),
    not_overlapped=bounds['compute'] + bounds['network'],
    kernels=kernels,
    short_kernels=short,
    images_per_second_per_chip=images / of_step['step'],
    network_one_axis=bounds['network'] * max(chip.dims, 1),
    peak_share=work / of_step['step'] / chip.flops,
    steps=c.total_steps,
    days=days,
    chip_hours=days * 24 * chips,
    price_per_chip_hour=price,
    cost=days * 24 * chips * price,
  )


def consumers(
  method: Method, costs: Sequence, most: int = 200
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """(seconds by part, direction and layer; the longest single instructions), both longest first."""
  scopes = parts.scopes(method)
  table = {}
  single = []
  for run, c in costs:
    if not c.seconds:
      continue
    w = parts.part(run.op_name, *scopes)
    empty = dict(part=w.name, direction=w.direction, layer=w.layer, seconds=0.0, bytes=0.0)
    row = table.setdefault(w, empty)
    row['seconds'] += c.seconds
    row['bytes'] += c.bytes
    i = run.instruction
    single.append(
      dict(
        seconds=c.seconds,
        count=run.times,
        name=i.name,
        opcode=i.opcode,
        source=c.source,
        bytes=c.bytes,
        shape=' '.join(f'{a.dtype}[{",".join(map(str, a.dims))}]' for a in i.arrays[:1]),
        op_name=run.op_name,
      )
    )
  return _largest_first(table.values(), 'seconds'), _largest_first(single, 'seconds')[:most]

"""The plan of one config on one mesh: memory, FLOPs, communication and time, as a dict."""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from tips_jax.core import tree
from tips_jax.core.chips import DCN, Chip
from tips_jax.planning import collectives, compiler, cost, parts
from tips_jax.train import lowering, sharding, summary
from tips_jax.train import state as state_lib
from tips_jax.train.method import Method

GROUPS = ('params', 'teachers', 'optimizer', 'loss_state')


def plan(
  method: Method,
  mesh: jax.sharding.Mesh,
  chip: str | Chip,
  *,
  topology: str,
  slices: int = 1,
  dump: Any = '',
  say: Callable[[str], None] = compiler.progress,
  options: Any = None,
  price: float = 0.0,
) -> dict[str, Any]:
  """Compiles the step for the mesh and says what it takes; plain data, as `--json` prints it.

  A program that does not fit gives the same with `fits` False, how much it is over, and neither
  FLOPs nor time.
  """
  c = method.config
  result = dict(
    header=header(method, mesh, chip, topology, slices), memory=memory(method, mesh, chip)
  )
  say(
    f'lowering {c.name} for {topology}, mesh '
    + ' x '.join(f'{k} {v}' for k, v in mesh.shape.items() if v > 1)
  )
  platform = mesh.devices.flat[0].platform
  try:
    lowered = lowering.lower(method, mesh)
    compiled = compiler.compile_step(
      lowered,
      platform='gpu' if platform in ('cuda', 'rocm') else platform,
      dump=dump,
      say=say,
      options=options,
    )
  except compiler.TooBig as error:
    result['memory'] |= dict(
      fits=False, total=error.used, limit=error.limit, over=error.used - error.limit
    )
    result['header']['compile_seconds'] = error.seconds
    return result
  result['header']['compile_seconds'] = compiled.seconds
  _temporaries(result['memory'], compiled, method, mesh)
  costs = cost.costs(compiled.module, chip, compiled.schedules)
  moved = collectives.find(compiled.module, mesh, slices)
  result['flops'] = flops(method, mesh, costs)
  result['collectives'] = network(method, mesh, moved)
  result['time'] = time(method, mesh, chip, costs, moved, price)
  result['parts'], result['instructions'] = consumers(method, costs)
  return result


def header(
  method: Method, mesh: jax.sharding.Mesh, chip: str | Chip, topology: str, slices: int
) -> dict[str, Any]:
  c, count = method.config, mesh.devices.size
  return dict(
    config=c.name,
    chip=chip.name,
    topology=topology,
    slices=slices,
    chips=count,
    mesh=dict(mesh.shape),
    batch=c.schedule.batch_size,
    images_per_chip=c.schedule.batch_size / count,
    accumulate=c.schedule.accumulate,
    remat=c.compute.remat,
    attention=c.compute.attention,
    dtype=c.compute.dtype,
    steps=c.schedule.total_steps,
  )


def memory(method: Method, mesh: jax.sharding.Mesh, chip: str | Chip) -> dict[str, Any]:
  """Bytes of one chip: the state by group and the batch, exactly, from shapes and shardings."""
  abstract = jax.eval_shape(lambda: state_lib.init(method))
  bytes_of = lambda tree_: sum(
    math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    for x, s in zip(
      jax.tree.leaves(tree_),
      jax.tree.leaves(sharding.shardings(method.config.mesh.rules, mesh, tree_)),
    )
  )
  groups = {g: bytes_of({g: getattr(abstract, g)}) for g in GROUPS}
  devices = math.prod(mesh.shape.get(a, 1) for a in ('data', 'fsdp'))
  groups['batch'] = tree.nbytes(lowering.abstract_batch(method)) / devices
  names = dict(params='parameters', loss_state='state of the losses')
  return dict(groups={names.get(g, g): n for g, n in groups.items()}, limit=chip.hbm)


def _temporaries(found, compiled, method, mesh):
  """Adds what the compiler allocates beside the state: by kind at the peak, and in total."""
  s = compiled.stats
  total = s['argument'] + s['output'] - s['alias'] + s['temp'] + s['generated_code']
  abstract = jax.eval_shape(lambda: state_lib.init(method)).params
  places = sharding.shardings(method.config.mesh.rules, mesh, abstract)
  weights = {
    p.shard_shape(x.shape) for x, p in zip(jax.tree.leaves(abstract), jax.tree.leaves(places))
  }
  weights |= {w[1:] for w in weights} - {()}
  kinds = collections.Counter()
  for size, op_name, opcode, array in compiled.peak:
    kinds[parts.buffer(op_name, opcode, array, weights)] += size
  kinds = dict(kinds.most_common())
  if kinds:
    kinds['gaps between them'] = max(0, s['temp'] - sum(kinds.values()))
  padding = s['argument'] + s['output'] - s['alias'] - sum(found['groups'].values())
  limit = found['limit'] or math.inf
  found |= dict(
    padding=padding,
    code=s['generated_code'],
    temporaries=s['temp'],
    temporaries_by_kind=kinds,
    total=total,
    fits=total <= limit,
    over=total - limit if found['limit'] else 0,
  )


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
      where = parts.part(run.op_name or (run.inside.op_name if run.inside else ''), *scopes)
      table[where.name][where.direction] += c.flops
  total = sum(sum(row.values()) for row in table.values())
  minimum = images * sum(least.values())
  again = sum(row['recompute'] for row in table.values())
  own = lambda name: images * sum(least.get(n, 0) for n in name.split('+'))
  rows = {name: dict(row, minimum=own(name)) for name, row in table.items()}
  return dict(
    total=total,
    minimum=minimum,
    ratio=total / minimum if minimum else 0.0,
    recomputed=again,
    recomputed_share=again / total if total else 0.0,
    parts=rows,
  )


def network(method: Method, mesh: jax.sharding.Mesh, moved: Sequence) -> dict[str, Any]:
  """Collectives by kind, axes, dtype, overlap and part; their bytes against the minimum of
  collectives.py.
  """
  scopes, table = parts.scopes(method), collections.defaultdict(lambda: [0, 0.0])
  for c in moved:
    where = parts.part(c.op_name, *scopes)
    row = table[c.kind, '+'.join(c.axes), c.dtype, c.overlapped, where.name, where.direction]
    row[0] += c.count
    row[1] += c.bytes
  keys = ('kind', 'axis', 'dtype', 'overlapped', 'part', 'direction', 'count', 'bytes')
  rows = [
    dict(zip(keys, (*key, *row)))
    for key, row in sorted(table.items(), key=lambda item: -item[1][1])
  ]
  least = collectives.minimum(method, mesh)
  total, minimum = sum(c.bytes for c in moved), sum(least.values())
  return dict(
    rows=rows,
    total=total,
    minimum=minimum,
    minimum_by_kind=least,
    formula=collectives.FORMULA,
    ratio=total / minimum if minimum else 0.0,
    overlapped=sum(c.bytes for c in moved if c.overlapped),
    in_open_loops=sum(c.open_ended for c in moved),
  )


def time(
  method: Method,
  mesh: jax.sharding.Mesh,
  chip: str | Chip,
  costs: Sequence,
  moved: Sequence,
  price: float,
) -> dict[str, Any]:
  """Estimated seconds of a step, what bounds it, and what the whole schedule takes."""
  c, count = method.config.schedule, mesh.devices.size
  compute = sum(x.seconds for _, x in costs)
  by_source = collections.Counter()
  for _, x in costs:
    by_source[x.source] += x.seconds
  hbm = sum(x.bytes for _, x in costs) / chip.bandwidth
  pace = lambda x: x.bytes / (DCN / chip.host if x.crosses else chip.ici)
  network, exposed = sum(map(pace, moved)), sum(pace(x) for x in moved if not x.overlapped)
  bounds = dict(compute=compute, memory=hbm, network=network)
  best = max(bounds.values())
  scheduled = max(compute + exposed, hbm, network)
  days, images = scheduled * c.total_steps / 86400, c.batch_size / count
  work = sum(summary.flops(method).values()) * c.batch_size / count
  return dict(
    compute=compute,
    compute_by_source={k: v for k, v in by_source.items() if k},
    memory=hbm,
    network=network,
    network_exposed=exposed,
    bound=max(bounds, key=bounds.get),
    overlapped=best,
    not_overlapped=compute + network,
    step=scheduled,
    images_per_second_per_chip=images / scheduled,
    network_one_axis=network * max(chip.dims, 1),
    peak_share=work / scheduled / chip.flops,
    steps=c.total_steps,
    days=days,
    chip_hours=days * 24 * count,
    price_per_chip_hour=price,
    cost=days * 24 * count * price,
  )


def consumers(method: Method, costs: Sequence, most: int = 200) -> list[dict[str, Any]]:
  """(seconds by part, direction and layer; the longest single instructions), both longest first."""
  scopes, table, single = parts.scopes(method), collections.defaultdict(lambda: [0.0, 0.0]), []
  for run, c in costs:
    if not c.seconds:
      continue
    i, where = run.instruction, parts.part(run.op_name, *scopes)
    row = table[where]
    row[0] += c.seconds
    row[1] += c.bytes
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
  rows = [
    dict(part=w.name, direction=w.direction, layer=w.layer, seconds=s, bytes=b)
    for w, (s, b) in sorted(table.items(), key=lambda item: -item[1][0])
  ]
  return rows, sorted(single, key=lambda x: -x['seconds'])[:most]

"""One plan for given devices, or the fastest of many that fit: a rough model picks what is worth
compiling.
"""

import collections
import dataclasses
import inspect
import math
import time
import typing

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.objectives import distill
from tips_jax.planning import collectives, compiler, estimate, report
from tips_jax.planning import topologies as chips_lib
from tips_jax.train import method as method_lib
from tips_jax.train import sharding, summary

REMATS = typing.get_args(typing.get_type_hints(schema.Compute)['remat'])
_PEAK = 0.5  # share of peak that the rough model takes for granted
_CHUNK = inspect.signature(distill.dino).parameters['chunk'].default  # tokens with logits at once


@dataclasses.dataclass(frozen=True)
class Choice:
  """What a search may change; never what is computed."""

  data: int
  fsdp: int
  tensor: int
  remat: str
  accumulate: int

  def apply(self, method):
    """The method with these choices; InputError where they do not go with it."""
    c = method.config
    mesh = dataclasses.replace(c.mesh, data=self.data, fsdp=self.fsdp, tensor=self.tensor)
    return method_lib.build(
      dataclasses.replace(
        c,
        mesh=mesh,
        compute=dataclasses.replace(c.compute, remat=self.remat),
        schedule=dataclasses.replace(c.schedule, accumulate=self.accumulate),
      )
    )

  def flags(self):
    return [
      f'--config.mesh.data={self.data}',
      f'--config.mesh.fsdp={self.fsdp}',
      f'--config.compute.remat={self.remat}',
      f'--config.schedule.accumulate={self.accumulate}',
    ]


def one(method, *, topology, chips=0, slices=1, suggest=False, **options):
  """The plan of a method as its config says, on a topology; where it does not fit, what would make
  it fit.
  """
  chip, devices = chips_lib.devices(topology, slices)
  if chips > len(devices):
    raise InputError(f'--chips: got {chips}; expected at most the {len(devices)} that there are')
  devices = devices[: chips or len(devices)]
  mesh = sharding.make_mesh(method.config.mesh, method.config.schedule.batch_size, devices=devices)
  result = estimate.plan(method, mesh, chip, topology=topology, slices=slices, **options)
  if not result['memory']['fits']:
    result['suggestions'] = suggestions(
      method, mesh, chip, result, topology, devices, suggest, slices=slices, **options
    )
  return result


def auto(method, *, chip, chips, tries, command, slices=1, say=compiler.progress, **options):
  """The fastest plan that fits `chips` chips; its dict with 'ranking' and 'command' added."""
  if not chip or not chips:
    raise InputError(
      '--topology=auto: expected --chip and --chips beside it, such as --chip=v5e --chips=256'
    )
  if chips % slices:
    raise InputError(f'--slices: got {slices}; expected a divisor of --chips={chips}')
  topology = chips_lib.shape_for(chip, chips // slices)
  kind, devices = chips_lib.devices(topology, slices)
  model = Model(method, kind)
  choices = candidates(method, len(devices), slices)
  say(
    f'{len(choices)} candidates on {topology}; the {min(tries, len(choices))} most promising are compiled'
  )
  rows, plans, begin = [], {}, time.time()
  for turn in range(tries):
    choice = model.best(
      choices, set(plans), max((1 / r['step'] for r in rows if r['fits']), default=0)
    )
    if choice is None:
      break
    ahead = f'; about {(time.time() - begin) / turn * (tries - turn):.0f} s to go' if turn else ''
    say(f'plan {turn + 1} of {tries}{ahead}: {" ".join(choice.flags())}')
    changed = choice.apply(method)
    mesh = sharding.make_mesh(
      changed.config.mesh, changed.config.schedule.batch_size, devices=devices
    )
    plans[choice] = plan = estimate.plan(
      changed, mesh, kind, topology=topology, slices=slices, say=say, **options
    )
    model.learn(choice, plan)
    rows.append(
      dict(
        choice=dataclasses.asdict(choice),
        mesh=dict(mesh.shape),
        remat=choice.remat,
        accumulate=choice.accumulate,
        fits=plan['memory']['fits'],
        total=plan['memory']['total'],
        over=plan['memory']['over'],
        step=plan.get('time', {}).get('step'),
        images_per_second_per_chip=plan.get('time', {}).get('images_per_second_per_chip'),
      )
    )
  rows.sort(key=lambda r: (not r['fits'], r['step'] or math.inf, r['over']))
  result = plans[Choice(**rows[0]['choice'])]
  winner = Choice(**rows[0]['choice']).flags() if rows[0]['fits'] else []
  batch = [f'--config.schedule.batch_size={method.config.schedule.batch_size}']
  given = {f.split('=')[0] for f in winner + batch}
  keep = [a for a in command if a.startswith('--config') and a.split('=')[0] not in given]
  line = ' '.join(['python -m tips_jax.main', *keep, *winner, *batch]) if winner else ''
  return result | dict(ranking=rows, command=line)


def candidates(method, count, slices=1):
  """Every Choice of mesh, remat and parts that the batch and the number of chips allow; tensor
  stays 1.
  """
  batch, result = method.config.schedule.batch_size, []
  for fsdp in (f for f in range(1, count + 1) if (count // slices) % f == 0 and f & (f - 1) == 0):
    for remat in REMATS:
      for parts in (1, 2, 4, 8, 16):
        if batch % (count * parts) == 0:
          result.append(Choice(count // fsdp, fsdp, 1, remat, parts))
  if not result:
    raise InputError(f'schedule.batch_size: got {batch}; expected a multiple of the {count} chips')
  return result


class Model:
  """A rough estimate of memory and time, corrected by every plan that was compiled."""

  def __init__(self, method, chip):
    self.method, self.chip = method, chip
    self.memory = collections.defaultdict(
      lambda: 1.0
    )  # measured over estimated temporaries, by remat
    self.pace = collections.defaultdict(lambda: 1.0)

  def best(self, choices, done, reached):
    """The fastest choice that is not done and probably fits, if it may beat what is `reached`
    (steps/s); else None.
    """
    open_ = [c for c in choices if c not in done]
    fitting = [c for c in open_ if self.total(c) <= self.chip.hbm * 0.98]
    if not fitting:
      return min(open_, key=self.total, default=None) if not reached else None
    choice = min(fitting, key=self.seconds)
    return choice if self.seconds(choice) * reached < 1.15 else None

  def total(self, choice):
    return self.state(choice) + self.memory[choice.remat] * self.temporaries(choice)

  def state(self, choice):
    return sum(self.groups(choice).values())

  def groups(self, choice):
    if not hasattr(self, '_groups'):
      self._groups = {}
    key = (choice.data, choice.fsdp, choice.tensor)
    if key not in self._groups:
      mesh = _abstract_mesh(key)
      self._groups[key] = estimate.memory(choice.apply(self.method), mesh, self.chip)['groups']
    return self._groups[key]

  def temporaries(self, choice):
    """Bytes beside the state: what is kept for the backward pass, one block at work, gradients,
    logits.
    """
    c, count = self.method.config, choice.data * choice.fsdp * choice.tensor
    images = c.schedule.batch_size / count / choice.accumulate
    kept = working = 0.0
    for p in c.passes.values():
      tower = c.towers[p.tower]
      if tower.kind in ('vit', 'text'):
        tokens, depth = _tokens(c, p, tower), tower.depth
        wide = (2 if getattr(tower, 'ffn', '') == 'swiglu' else 1) * tower.mlp
        each = {
          'none': 14 * tower.width + 3 * wide,
          'products': 6 * tower.width + wide,
          'full': tower.width,
        }
        kept += 2 * tokens * depth * each[choice.remat] * (p.by == 'student')
        working = max(working, 2 * tokens * (16 * tower.width + 4 * wide))
    heads = [t.prototypes for t in c.towers.values() if t.kind == 'dino_head']
    logits = _CHUNK * max(heads, default=0) * 4 * 3
    gradients = self.groups(choice)['parameters'] * 1.5
    return images * (kept + working) + logits + gradients

  def seconds(self, choice):
    changed = choice.apply(self.method)
    count = choice.data * choice.fsdp * choice.tensor
    work = sum(summary.flops(self.method).values()) * self.method.config.schedule.batch_size / count
    again = (
      1
      + (choice.remat == 'full') * 0.25
      + (choice.remat == 'products') * 0.02
      + (choice.accumulate > 1) / 3
    )
    network = sum(
      collectives.minimum(
        changed, _abstract_mesh((choice.data, choice.fsdp, choice.tensor))
      ).values()
    )
    compute = work * again / (_PEAK * self.chip.flops) * self.pace[choice.remat]
    return compute + 0.5 * network / self.chip.ici

  def learn(self, choice, plan):
    measured = plan['memory']['total'] - self.state(choice)
    self.memory[choice.remat] = max(measured, 1) / self.temporaries(choice)
    if len(self.memory) == 1:  # the first measurement tells something of all
      for remat in REMATS:
        self.memory.setdefault(remat, self.memory[choice.remat])
    if 'time' in plan:
      self.pace[choice.remat] *= plan['time']['step'] / self.seconds(choice)


def _tokens(c, p, tower):
  if tower.kind == 'text':
    return c.data.text_length
  view = c.data.views[p.inputs['images'].removeprefix('batch.')]
  patches = math.ceil(view.size / tower.patch) ** 2
  if 'visible' in p.inputs:
    patches -= round(c.masks[p.inputs['visible'].split('.')[1]].ratio * patches)
  return view.count * (patches + len(tower.cls))


def _abstract_mesh(sizes):
  import jax

  return jax.sharding.AbstractMesh(sizes, sharding.AXES)


def suggestions(method, mesh, chip, result, topology, devices, compile_, **options):
  """Lines: what would make the program fit, cheapest first; by the rough model, or compiled."""
  model = Model(method, chip)
  c = method.config
  now = Choice(
    mesh.shape['data'],
    mesh.shape['fsdp'],
    mesh.shape['tensor'],
    c.compute.remat,
    c.schedule.accumulate,
  )
  model.learn(now, result)
  choices = [x for x in candidates(method, len(devices), options.get('slices', 1)) if x != now]
  changes = lambda x: sum(a != b for a, b in zip(dataclasses.astuple(x), dataclasses.astuple(now)))
  fitting, alike = [], set()
  for x in sorted(choices, key=lambda x: (float(f'{model.seconds(x):.2g}'), changes(x))):
    if model.total(x) <= chip.hbm * 0.97 and (x.remat, x.accumulate) not in alike:
      fitting.append(x)
      alike.add((x.remat, x.accumulate))
  lines = []
  if not fitting:
    least = min(choices or [now], key=model.total)
    more = math.ceil(math.log2(max(2, model.total(least) / chip.hbm)))
    return [
      f'nothing on {len(devices)} chips, by estimate: about {report.size(model.total(least))} at the least; try '
      f'{len(devices) * 2**more} chips or a smaller batch'
    ]
  for x in fitting[:3]:
    flags, about = ' '.join(x.flags()), report.size(model.total(x))
    if not compile_:
      lines.append(f'{flags}   (about {about}, by estimate)')
      continue
    changed = x.apply(method)
    mesh = sharding.make_mesh(
      changed.config.mesh, changed.config.schedule.batch_size, devices=devices
    )
    plan = estimate.plan(changed, mesh, chip, topology=topology, **options)
    m = plan['memory']
    lines.append(
      f'{flags}   ({report.size(m["total"])}, compiled: {"fits" if m["fits"] else "does not fit"}'
      + (f', {report.seconds(plan["time"]["step"])})' if 'time' in plan else ')')
    )
    if m['fits']:
      break
  return lines

"""The plan for given devices, or the fastest of many; a rough model picks what to compile."""

import collections
import dataclasses
import functools
import inspect
import math
import time
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from tips_jax.core import schema
from tips_jax.core.chips import Chip
from tips_jax.core.errors import InputError
from tips_jax.objectives import distill
from tips_jax.planning import collectives, compiler, estimate, report, topologies
from tips_jax.train import method as method_lib
from tips_jax.train import sharding, summary

REMATS = typing.get_args(typing.get_type_hints(schema.Compute)['remat'])
_PEAK = 0.5  # share of peak that the rough model assumes
_CHUNK = inspect.signature(distill.dino).parameters['chunk'].default  # tokens with logits at once


@dataclasses.dataclass(frozen=True)
class Choice:
  """What a search may change; never what is computed."""

  data: int  # sizes of the mesh
  fsdp: int
  tensor: int
  remat: str
  accumulate: int

  @property
  def mesh(self) -> tuple[int, int, int]:
    return self.data, self.fsdp, self.tensor

  def apply(self, method: method_lib.Method) -> method_lib.Method:
    """The method with these choices; InputError where it does not allow them."""
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

  def flags(self) -> list[str]:
    return [
      f'--config.mesh.data={self.data}',
      f'--config.mesh.fsdp={self.fsdp}',
      f'--config.compute.remat={self.remat}',
      f'--config.schedule.accumulate={self.accumulate}',
    ]


def one(
  method: method_lib.Method,
  *,
  topology: str,
  chips: int = 0,
  slices: int = 1,
  suggest: bool = False,
  **options: Any,
) -> dict[str, Any]:
  """The plan of a method with its config on a topology; suggestions where it does not fit.

  chips: how many of the topology; 0: all. suggest: compiles the suggestions. options: of
  `estimate.plan`.
  """
  chip, devices = topologies.devices(topology, slices)
  most = len(devices) // chip.devices
  if chips > most:
    raise InputError(f'--chips: got {chips}; expected at most the {most} that there are')
  devices = devices[: (chips or most) * chip.devices]
  options |= dict(topology=topology, slices=slices)
  result = _plan(method, devices, chip, **options)
  if not result['memory']['fits']:
    result['suggestions'] = suggestions(method, devices, chip, result, suggest, **options)
  return result


def _plan(
  method: method_lib.Method, devices: Sequence[jax.Device], chip: Chip, **options: Any
) -> dict[str, Any]:
  """`estimate.plan` on the mesh that the config makes of the devices."""
  c = method.config
  mesh = sharding.make_mesh(c.mesh, c.schedule.batch_size, devices, options.get('slices', 1))
  return estimate.plan(method, mesh, chip, **options)


def auto(
  method: method_lib.Method,
  *,
  chip: str,
  chips: int,
  tries: int,
  command: Sequence[str],
  slices: int = 1,
  say: Callable[[str], None] = compiler.progress,
  **options: Any,
) -> dict[str, Any]:
  """The fastest plan that fits `chips` chips; its dict with 'ranking' and 'command' added.

  tries: how many plans are compiled. command: arguments of this program, whose config flags the
  command of the winner keeps.
  """
  if not chip or not chips:
    raise InputError(
      '--topology=auto: expected --chip and --chips beside it, such as --chip=v5e --chips=256'
    )
  if chips % slices:
    raise InputError(f'--slices: got {slices}; expected a divisor of --chips={chips}')
  topology = topologies.shape_for(chip, chips // slices)
  kind, devices = topologies.devices(topology, slices)
  model = Model(method, kind)
  choices = candidates(method, len(devices), slices)
  compiled = min(tries, len(choices))
  say(f'{len(choices)} candidates on {topology}; the {compiled} most promising are compiled')
  rows = []
  plans = {}
  begin = time.time()
  for turn in range(tries):
    reached = max((1 / row['step'] for row in rows if row['fits']), default=0)
    choice = model.best(choices, plans, reached)
    if choice is None:
      break
    remaining = ''
    if turn:
      per_plan = (time.time() - begin) / turn
      remaining = f'; about {per_plan * (tries - turn):.0f} s to go'
    say(f'plan {turn + 1} of {tries}{remaining}: {" ".join(choice.flags())}')
    plan = _plan(
      choice.apply(method), devices, kind, topology=topology, slices=slices, say=say, **options
    )
    plans[choice] = plan
    model.learn(choice, plan)
    rows.append(
      dict(
        choice=dataclasses.asdict(choice),
        mesh=plan['header']['mesh'],
        remat=choice.remat,
        accumulate=choice.accumulate,
        fits=plan['memory']['fits'],
        total=plan['memory']['total'],
        over=plan['memory']['over'],
        step=plan.get('time', {}).get('step'),
        images_per_second_per_chip=plan.get('time', {}).get('images_per_second_per_chip'),
      )
    )
  rows.sort(key=lambda row: (not row['fits'], row['step'] or math.inf, row['over']))
  winner = Choice(**rows[0]['choice'])
  line = ''
  if rows[0]['fits']:
    line = _command(command, winner, method.config.schedule.batch_size)
  return plans[winner] | dict(ranking=rows, command=line)


def _command(arguments: Sequence[str], choice: Choice, batch: int) -> str:
  """The command that trains with a choice: its flags replace those that were given."""
  flags = [*choice.flags(), f'--config.schedule.batch_size={batch}']
  replaced = {flag.split('=')[0] for flag in flags}
  words = ['python -m tips_jax.main']
  for argument in arguments:
    if argument.startswith('--config') and argument.split('=')[0] not in replaced:
      words.append(argument)
  return ' '.join(words + flags)


def candidates(method: method_lib.Method, count: int, slices: int = 1) -> list[Choice]:
  """Every Choice of mesh, remat and accumulation for a number of chips and the batch.

  fsdp is a power of two inside of a slice; tensor stays 1.
  """
  batch = method.config.schedule.batch_size
  result = []
  for fsdp in range(1, count + 1):
    if (count // slices) % fsdp or fsdp & (fsdp - 1):
      continue
    for remat in REMATS:
      for parts in (1, 2, 4, 8, 16):
        if batch % (count * parts) == 0:
          result.append(Choice(count // fsdp, fsdp, 1, remat, parts))
  if not result:
    raise InputError(f'schedule.batch_size: got {batch}; expected a multiple of the {count} chips')
  return result


class Model:
  """A rough estimate of memory and time, corrected by every plan that was compiled."""

  def __init__(self, method: method_lib.Method, chip: Chip):
    self.method = method
    self.chip = chip
    # Compiled over estimated temporaries and times, by remat: what it errs in is the same for every
    # mesh.
    self.memory = collections.defaultdict(lambda: 1.0)
    self.pace = collections.defaultdict(lambda: 1.0)
    self._groups = {}  # by mesh

  def best(
    self, choices: Sequence[Choice], done: Iterable[Choice], reached: float
  ) -> Choice | None:
    """The fastest remaining choice that probably fits, if it may be faster than `reached` steps/s.

    If none fits, and none has, the choice that takes the least memory.
    """
    remaining = [choice for choice in choices if choice not in done]
    fitting = [choice for choice in remaining if self.total(choice) <= self.chip.hbm * 0.98]
    if fitting:
      choice = min(fitting, key=self.seconds)
      # The estimate may be 15 % too slow.
      if self.seconds(choice) * reached < 1.15:
        return choice
    elif not reached:
      return min(remaining, key=self.total, default=None)
    return None

  def total(self, choice: Choice) -> float:
    """Bytes of one chip."""
    return self.state(choice) + self.memory[choice.remat] * self.temporaries(choice)

  def state(self, choice: Choice) -> float:
    return sum(self.groups(choice).values())

  def groups(self, choice: Choice) -> dict[str, float]:
    # Evaluating the shapes of the state is slow, and only the mesh changes the result.
    if choice.mesh not in self._groups:
      mesh = _abstract_mesh(choice)
      memory = estimate.memory(choice.apply(self.method), mesh, self.chip)
      self._groups[choice.mesh] = memory['groups']
    return self._groups[choice.mesh]

  def temporaries(self, choice: Choice) -> float:
    """Bytes beside the state: kept for the backward pass, one block's, gradients, logits."""
    c = self.method.config
    images = c.schedule.batch_size / math.prod(choice.mesh) / choice.accumulate
    kept = 0.0
    working = 0.0
    shapes = summary.shapes(self.method)
    for name, p in c.passes.items():
      tower = c.towers[p.tower]
      if tower.kind == 'text':
        [tokens] = shapes[p.inputs['ids']]
      elif tower.kind == 'vit':
        views, patches, _ = shapes[f'{name}.patch']
        tokens = views * (patches + len(tower.cls))
      else:  # heads and decoders are small beside the towers
        continue
      hidden = tower.mlp
      if getattr(tower, 'ffn', '') == 'swiglu':
        hidden *= 2
      # Numbers a token and layer that each policy keeps, in bfloat16.
      kept_numbers = {
        'none': 14 * tower.width + 3 * hidden,
        'products': 6 * tower.width + hidden,
        'full': tower.width,
      }
      if p.by == 'student':  # nothing of a teacher is differentiated
        kept += 2 * tokens * tower.depth * kept_numbers[choice.remat]
      working = max(working, 2 * tokens * (16 * tower.width + 4 * hidden))
    prototypes = max(getattr(tower, 'prototypes', 0) for tower in c.towers.values())
    # Student, teacher and gradient, in float32, a chunk of tokens at a time.
    logits = _CHUNK * prototypes * 4 * 3
    gradients = self.groups(choice)['parameters'] * 1.5
    return images * (kept + working) + logits + gradients

  @functools.cached_property
  def _work(self) -> float:
    """FLOPs of a step, without any that remat repeats."""
    flops = sum(summary.flops(self.method).values())
    return flops * self.method.config.schedule.batch_size

  def seconds(self, choice: Choice) -> float:
    """Of a step."""
    # Assumed share that is computed again: full remat repeats most of the forward pass,
    # accumulation all of it, which is a third of the work.
    repeated = {'none': 0, 'products': 0.02, 'full': 0.25}[choice.remat]
    if choice.accumulate > 1:
      repeated += 1 / 3
    work = self._work / math.prod(choice.mesh)
    network = collectives.minimum(choice.apply(self.method), _abstract_mesh(choice))
    compute = work * (1 + repeated) / (_PEAK * self.chip.flops) * self.pace[choice.remat]
    # Half of the communication is assumed to be hidden behind computation.
    return compute + 0.5 * sum(network.values()) / self.chip.ici

  def learn(self, choice: Choice, plan: dict[str, Any]) -> None:
    """Corrects the estimates by a compiled plan."""
    measured = plan['memory']['total'] - self.state(choice)
    self.memory[choice.remat] = max(measured, 1) / self.temporaries(choice)
    if len(self.memory) == 1:  # the first measurement is the best guess for every policy
      for remat in REMATS:
        self.memory.setdefault(remat, self.memory[choice.remat])
    if 'time' in plan:
      self.pace[choice.remat] *= plan['time']['step'] / self.seconds(choice)


def _abstract_mesh(choice: Choice) -> jax.sharding.AbstractMesh:
  return jax.sharding.AbstractMesh(choice.mesh, sharding.AXES)


def suggestions(
  method: method_lib.Method,
  devices: Sequence[jax.Device],
  chip: Chip,
  result: dict[str, Any],
  compile_: bool,
  **options: Any,
) -> list[str]:
  """Lines: flags that would make the program fit, fastest first; by the rough model, or compiled.

  result: the plan that does not fit. options: of `estimate.plan`.
  """
  model = Model(method, chip)
  c = method.config
  now = Choice(**result['header']['mesh'], remat=c.compute.remat, accumulate=c.schedule.accumulate)
  model.learn(now, result)
  choices = candidates(method, len(devices), options.get('slices', 1))
  choices = [choice for choice in choices if choice != now]

  def order(choice: Choice) -> tuple[float, int]:
    # Of choices that are about as fast, the one that changes the least.
    fields = zip(dataclasses.astuple(choice), dataclasses.astuple(now))
    return float(f'{model.seconds(choice):.2g}'), sum(a != b for a, b in fields)

  fitting = {}  # the fastest mesh of each remat and accumulation
  for choice in sorted(choices, key=order):
    if model.total(choice) <= chip.hbm * 0.97:
      fitting.setdefault((choice.remat, choice.accumulate), choice)
  if not fitting:
    least = model.total(min(choices or [now], key=model.total))
    doublings = math.ceil(math.log2(max(2, least / chip.hbm)))
    return [
      f'nothing on {len(devices)} chips, by estimate: about {report.size(least)} at the least; try '
      f'{len(devices) * 2**doublings} chips or a smaller batch'
    ]
  lines = []
  for choice in list(fitting.values())[:3]:
    flags = ' '.join(choice.flags())
    if not compile_:
      lines.append(f'{flags}   (about {report.size(model.total(choice))}, by estimate)')
      continue
    plan = _plan(choice.apply(method), devices, chip, **options)
    total = report.size(plan['memory']['total'])
    verdict = 'fits' if plan['memory']['fits'] else 'does not fit'
    if 'time' in plan:
      verdict += f', {report.seconds(plan["time"]["step"])}'
    lines.append(f'{flags}   ({total}, compiled: {verdict})')
    if plan['memory']['fits']:
      break
  return lines

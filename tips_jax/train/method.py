"""A pretraining method as data: passes, losses and teachers of a config, checked against each
other.

Adding an objective takes a function in objectives/, a line in LOSSES and a config.
"""

import dataclasses
import graphlib
import inspect
import typing
from collections.abc import Callable, Collection

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown, value
from tips_jax.data.reading.batch import check, layout, valid
from tips_jax.models import attention, towers
from tips_jax.models.stages import STATISTICS
from tips_jax.objectives import (
  alignment,
  contrastive,
  distill,
  koleo,
  masked,
  masks,
  monitor,
  regions,
  words,
)


@dataclasses.dataclass(frozen=True)
class Objective:
  fn: Callable  # (**inputs, state?, **args) -> Loss
  state: Callable = lambda shapes: {}
  contrasts: bool = False  # compares the images of a batch: of a single one it is constant
  parameters: tuple[str, ...] = ()  # the inputs that have to be parameters of towers


LOSSES = {
  'softmax_contrastive': Objective(contrastive.softmax, contrasts=True),
  'sigmoid_contrastive': Objective(contrastive.sigmoid, contrasts=True),
  'token_alignment': Objective(alignment.tokens, alignment.initial_state),
  'region_contrastive': Objective(regions.contrastive, contrasts=True),
  'tags': Objective(regions.tags, contrasts=True),
  'dino': Objective(
    distill.dino,
    distill.initial_state,
    parameters=('student_prototypes', 'teacher_prototypes'),
  ),
  'masked_words': Objective(words.prediction, parameters=('kernel', 'bias')),
  'pixels': Objective(masked.pixels),
  'koleo': Objective(koleo.koleo),
  'spread': Objective(monitor.spread),
}


@dataclasses.dataclass(frozen=True)
class Parameter:
  """A parameter that a loss reads, 'student.head.prototypes' in a config."""

  by: str  # 'student' or a teacher
  tower: str
  name: str  # within the tower


@dataclasses.dataclass(frozen=True)
class LossInputs:
  """Where the arguments of a loss come from."""

  features: dict[str, str]  # argument -> path of a feature
  parameters: dict[str, Parameter]  # argument -> parameter


@dataclasses.dataclass(frozen=True)
class Method:
  """What a step needs to know; made by `build`, which raises InputError for anything that does not
  fit. All references of the config are resolved here.
  """

  config: schema.Config
  # Passes, each after those that it reads; those of a group share one call of their tower.
  order: tuple[tuple[str, ...], ...]
  losses: dict[str, LossInputs]
  # Of each mask what it is made of: pixels of a patch, or words of the vocabulary.
  mask_unit: dict[str, int]
  # Feature paths that losses read, and what the step keeps of towers with statistics.
  reads: tuple[str, ...]
  # Towers that are trained.
  student: tuple[str, ...]


def build(config: schema.Config) -> Method:
  """Checks every reference of a config and orders its passes."""
  c = config
  check(c.data)
  for name, t in c.teachers.items():
    if name in c.passes or name in ('student', 'batch', 'masks'):
      raise InputError(f'teachers: got the name {name!r}; expected one that no pass or feature has')
    for tower in t.towers:
      _known(f'teachers.{name}.towers', tower, c.towers)
  by = {'student', *c.teachers}
  mask_unit = {name: _mask_unit(c, name) for name in c.masks}
  known = _paths(c, by)
  for name, p in c.passes.items():
    for arg, path in p.inputs.items():
      _known(f'passes.{name}.inputs.{arg}', path, known)
  losses = {name: _loss_inputs(name, loss, c, known, by) for name, loss in c.losses.items()}
  graph = {}  # pass -> passes that it reads
  for name, p in c.passes.items():
    roots = {path.split('.')[0] for path in p.inputs.values()}
    graph[name] = roots & set(c.passes)
  try:
    order = _groups(c, graphlib.TopologicalSorter(graph))
  except graphlib.CycleError as e:
    raise InputError(f'passes: got a circle {" -> ".join(e.args[1])}; expected an order') from None
  reads = set()
  users = list(c.passes.values())
  for inputs in losses.values():
    reads |= set(inputs.features.values())
    users += inputs.parameters.values()  # read without a pass: a temperature
  for name, p in c.passes.items():
    if p.by == 'student' and towers.has_statistics(c.towers[p.tower]):
      reads.add(f'{name}.{STATISTICS}')
  trained = {user.tower for user in users if user.by == 'student'}
  for teacher in c.teachers.values():
    if teacher.kind == 'ema':  # it averages the student's
      trained |= set(teacher.towers)
  for user in users:
    if user.by != 'student':  # whose towers, beside the teacher's own, are the student's
      own = c.teachers[user.by].towers
      _known(f'teachers.{user.by}.towers: a tower that is read', user.tower, {*own, *trained})
  _check_rest(c)
  student = tuple(tower for tower in c.towers if tower in trained)
  return Method(c, order, losses, mask_unit, tuple(sorted(reads)), student)


def awake(method: Method, step: int) -> tuple[str, ...]:
  """The losses that weigh something after `step` updates: all but those whose ramp has not left
  zero yet, or is at zero for good.
  """
  progress = step / method.config.schedule.total_steps
  names = []
  for name in method.losses:
    weight = method.config.losses[name].weight
    if not isinstance(weight, schema.Ramp):  # a weight of 0 is that of a monitor
      names.append(name)
      continue
    before = weight.start == 0 and progress < weight.begin
    after = weight.end == 0 and progress >= weight.until
    if not before and not after:
      names.append(name)
  return tuple(names)


def only(method: Method, losses: Collection[str]) -> Method:
  """The method with these losses, and without the passes that only the others need. The state of
  the others waits.
  """
  kept = {name: inputs for name, inputs in method.losses.items() if name in losses}
  wanted = {path for path in method.reads if path.endswith(f'.{STATISTICS}')}
  for inputs in kept.values():
    wanted |= set(inputs.features.values())
  reads = tuple(path for path in method.reads if path in wanted)
  order = []
  for group in reversed(method.order):  # whoever reads a pass comes after it
    needed = {path.split('.')[0] for path in wanted}
    group = tuple(name for name in group if name in needed)
    for name in group:
      wanted |= set(method.config.passes[name].inputs.values())
    if group:
      order.insert(0, group)
  return dataclasses.replace(method, losses=kept, reads=reads, order=tuple(order))


def contrasted(config: schema.Config) -> list[str]:
  """The texts of images and of regions, and the tags, without those that only losses of weight 0
  read.
  """
  data = config.data
  names = []
  for name in (*data.texts, *data.tags, *data.regions.texts):
    path = f'batch.{valid(name)}'
    weights = [loss.weight for loss in config.losses.values() if path in loss.inputs.values()]
    if any(weights) or not weights:
      names.append(name)
  return names


def _paths(c, by):
  """Every path of a feature: of the batch, the masks and the passes."""
  known = {f'batch.{name}' for name in layout(c.data)}
  for name, mask in c.masks.items():
    known |= {f'masks.{name}.{output}' for output in masks.outputs(mask)}
  for name, p in c.passes.items():
    _known(f'passes.{name}.by', p.by, by)
    _known(f'passes.{name}.tower', p.tower, c.towers)
    tower = c.towers[p.tower]
    if 'visible' in p.inputs and isinstance(tower, schema.ViT) and tower.adapters.width:
      raise InputError(
        f'passes.{name}.inputs.visible: got it with towers.{p.tower}.adapters.width='
        f'{tower.adapters.width}; expected one of them: adapters convolve the whole grid of patches'
      )
    known |= {f'{name}.{output}' for output in towers.outputs(tower)}
    takes = set(towers.inputs(tower))
    _signature(f'passes.{name}.inputs', p.inputs, takes, takes - towers.module(tower).OPTIONAL)
  return known


def _groups(c, sorter):
  """Passes in an order that their inputs allow; those of one tower that can run side by side are a
  group.
  """
  groups = []
  sorter.prepare()
  while sorter.is_active():
    # In the config's order: the same program, and the same keys, in every process.
    ready = sorted(sorter.get_ready(), key=list(c.passes).index)
    alike = {}
    for name in ready:
      alike.setdefault((c.passes[name].by, c.passes[name].tower), []).append(name)
    groups += map(tuple, alike.values())
    sorter.done(*ready)
  return tuple(groups)


def _mask_unit(c, name):
  """Patch size, in pixels, of the towers that read a mask; of words the vocabulary."""
  mask = c.masks[name]
  unit = 'patch'
  if isinstance(mask, schema.WordMask):
    unit = 'vocab'
    _known(f'masks.{name}.text', mask.text, c.data.texts)
  else:
    _known(f'masks.{name}.view', mask.view, c.data.views)
  sizes = set()
  for p in c.passes.values():
    reads = any(path.startswith(f'masks.{name}.') for path in p.inputs.values())
    if reads and p.tower in c.towers and hasattr(c.towers[p.tower], unit):
      sizes.add(getattr(c.towers[p.tower], unit))
  if len(sizes) != 1:
    raise InputError(
      f'masks.{name}: got towers of {unit} sizes {sorted(sizes)} that read it; expected one size'
    )
  return sizes.pop()


def _loss_inputs(name, loss, c, known, by):
  """Checks the kind, inputs and args of a loss against its function; LossInputs."""
  _known(f'losses.{name}.kind', loss.kind, LOSSES)
  if LOSSES[loss.kind].contrasts and c.schedule.batch_size < 2:
    raise InputError(
      f'schedule.batch_size: got {c.schedule.batch_size}; expected at least 2, as losses.{name} '
      'compares the images of a batch'
    )
  # An objective takes arrays by position and numbers by keyword: its signature is the only list.
  parameters = inspect.signature(LOSSES[loss.kind].fn).parameters
  by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
  _signature(f'losses.{name}.inputs', loss.inputs, *_names(parameters, by_position))
  by_keyword = inspect.Parameter.KEYWORD_ONLY
  _signature(f'losses.{name}.args', loss.args, *_names(parameters, by_keyword))
  hints = typing.get_type_hints(LOSSES[loss.kind].fn, include_extras=True)
  for arg, number in loss.args.items():
    # A ramp is as its ends: the step gives what it is by then.
    ends = [number]
    if isinstance(number, schema.Ramp):
      ends = [number.start, number.end]
    for end in ends:
      value(hints[arg], end, f'losses.{name}.args.{arg}')
  result = LossInputs({}, {})
  for arg, path in loss.inputs.items():
    root, *rest = path.split('.', 2)
    if root not in by:
      if arg in LOSSES[loss.kind].parameters:
        raise InputError(
          f'losses.{name}.inputs.{arg}: got {path!r}; expected a parameter, such as '
          f"'student.head.prototypes'"
        )
      _known(f'losses.{name}.inputs.{arg}', path, known)
      result.features[arg] = path
      continue
    tower = ''.join(rest[:1])
    _known(f'losses.{name}.inputs.{arg}', tower, c.towers)
    result.parameters[arg] = Parameter(root, tower, '.'.join(rest[1:]))
  return result


def _names(parameters, kind):
  """(all names of a kind of parameters, those without a default)."""
  names = set()
  required = set()
  for name, parameter in parameters.items():
    if parameter.kind is kind and name != 'state':  # the step gives the state
      names.add(name)
      if parameter.default is parameter.empty:
        required.add(name)
  return names, required


def _check_rest(c):
  schedule = c.schedule
  for loss in c.losses.values():
    if loss.kind == 'koleo':
      koleo.group_size(loss.args.get('group', 0), schedule.batch_size)
  if schedule.batch_size % schedule.accumulate:
    raise InputError(
      f'schedule.accumulate: got {schedule.accumulate}; expected a divisor of the batch size '
      f'{schedule.batch_size}'
    )
  _check_attention(c)
  if c.evals.encoder != 'student':
    _known('evals.encoder', c.evals.encoder, {'student', *c.teachers})
  if c.evals.tasks or c.evals.suite:
    image_towers = set()
    for name, tower in c.towers.items():
      if isinstance(tower, schema.ImageTower):
        image_towers.add(name)
    _known('evals.image_tower', c.evals.image_tower, image_towers)
  for field in ('image_head', 'text_head'):
    if getattr(c.evals, field):
      _known(f'evals.{field}', getattr(c.evals, field), c.towers)
  if c.evals.region_head:
    heads = [name for name, tower in c.towers.items() if tower.kind == 'region_head']
    _known('evals.region_head', c.evals.region_head, heads)


def _check_attention(c):
  if c.compute.attention != 'cudnn':
    return
  if c.mesh.tensor != 1:
    raise InputError(
      f"compute.attention: got 'cudnn' with mesh.tensor={c.mesh.tensor}; expected 'auto', or 1"
    )
  for name, tower in c.towers.items():
    if hasattr(tower, 'heads'):
      width = getattr(tower, 'decoder_width', tower.width)
      refused = attention.refusal(c.compute.dtype, width // tower.heads)
      if refused:
        raise InputError(
          f"compute.attention: got 'cudnn' with towers.{name} of {refused}; expected 'auto'"
        )


def _known(what, name, known):
  if name not in known:
    raise unknown(what, name, known)


def _signature(what, given, allowed, required):
  for name in given:
    _known(what, name, allowed)
  for name in required:
    if name not in given:
      raise InputError(f'{what}.{name}: missing; expected inputs {sorted(allowed)}')

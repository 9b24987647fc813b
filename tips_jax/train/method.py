"""A pretraining method as data: passes, losses and teachers of a config, checked against each
other.

Adding an objective takes a function in objectives/, a line in LOSSES and a config.
"""

import dataclasses
import graphlib
import inspect
from collections.abc import Callable

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.models import towers
from tips_jax.objectives import contrastive, distill, masked, monitor


@dataclasses.dataclass(frozen=True)
class Objective:
  fn: Callable  # (**inputs, state?, **args) -> Loss
  state: Callable = lambda shapes: {}


LOSSES = {
  'softmax_contrastive': Objective(contrastive.softmax),
  'sigmoid_contrastive': Objective(contrastive.sigmoid),
  'dino': Objective(distill.dino, distill.initial_state),
  'pixels': Objective(masked.pixels),
  'spread': Objective(monitor.spread),
}
MASK_OUTPUTS = ('mask', 'masked_indices', 'visible')


@dataclasses.dataclass(frozen=True)
class Method:
  """What a step needs to know; made by `build`, which raises InputError for anything that does not
  fit.
  """

  config: schema.Config
  order: tuple[
    tuple[str, ...], ...
  ]  # passes, each after those that it reads; those of a group share one tower call
  reads: tuple[str, ...]  # feature paths that losses read
  student: tuple[str, ...]  # towers that are trained


def build(config: schema.Config) -> Method:
  """Checks every reference of a config and orders its passes."""
  c = config
  for name, t in c.teachers.items():
    if name in c.passes or name in ('student', 'batch', 'masks'):
      raise InputError(f'teachers: got the name {name!r}; expected one that no pass or feature has')
    for tower in t.towers:
      _known(f'teachers.{name}.towers', tower, c.towers)
  by = {'student': set(c.towers), **{n: set(t.towers) for n, t in c.teachers.items()}}
  batch = {*c.data.views, *c.data.texts, *(f'{n}_valid' for n in c.data.texts)}
  for name, m in c.masks.items():
    _known(f'masks.{name}.view', m.view, c.data.views)
    if not 0 <= m.ratio < 1:
      raise InputError(f'masks.{name}.ratio: got {m.ratio}; expected a number from 0 to below 1')
    mask_patch(c, name)
  known = {f'batch.{b}' for b in batch} | {f'masks.{m}.{o}' for m in c.masks for o in MASK_OUTPUTS}
  for name, p in c.passes.items():
    _known(f'passes.{name}.by', p.by, by)
    _known(f'passes.{name}.tower', p.tower, c.towers)
    tower = c.towers[p.tower]
    known |= {f'{name}.{o}' for o in towers.outputs(tower)}
    takes = set(towers.inputs(tower))
    _signature(f'passes.{name}.inputs', p.inputs, takes, takes - towers.module(tower).OPTIONAL)
  for name, p in c.passes.items():
    for arg, path in p.inputs.items():
      _known(f'passes.{name}.inputs.{arg}', path, known)
  for name, t in c.losses.items():
    _check_term(name, t, c, known, by)
  graph = {
    n: {path.split('.')[0] for path in p.inputs.values()} & set(c.passes)
    for n, p in c.passes.items()
  }
  try:
    order = _groups(c, graphlib.TopologicalSorter(graph))
  except graphlib.CycleError as e:
    raise InputError(f'passes: got a circle {" -> ".join(e.args[1])}; expected an order') from None
  reads = {path for t in c.losses.values() for path in t.inputs.values()}
  trained = {p.tower for p in c.passes.values() if p.by == 'student'}
  trained |= {path.split('.')[1] for path in reads if path.startswith('student.')}
  trained |= {t for teacher in c.teachers.values() if teacher.kind == 'ema' for t in teacher.towers}
  _check_numbers(c)
  features = tuple(sorted(p for p in reads if p.split('.')[0] not in by))
  return Method(c, order, features, tuple(t for t in c.towers if t in trained))


def _groups(c, sorter):
  """Passes in an order that their inputs allow; those of one tower that can run side by side are a
  group.
  """
  groups = []
  sorter.prepare()
  while sorter.is_active():
    ready, alike = sorted(sorter.get_ready(), key=list(c.passes).index), {}
    for name in ready:
      alike.setdefault((c.passes[name].by, c.passes[name].tower), []).append(name)
    groups += map(tuple, alike.values())
    sorter.done(*ready)
  return tuple(groups)


def mask_patch(c: schema.Config, name: str) -> int:
  """Patch size, in pixels, of the towers that read a mask."""
  reads = lambda p: any(path.startswith(f'masks.{name}.') for path in p.inputs.values())
  sizes = {
    c.towers[p.tower].patch
    for p in c.passes.values()
    if reads(p) and hasattr(c.towers[p.tower], 'patch')
  }
  if len(sizes) != 1:
    raise InputError(
      f'masks.{name}: got towers of patch sizes {sorted(sizes)} that read it; expected one size'
    )
  return sizes.pop()


def _check_term(name, term, c, known, by):
  _known(f'losses.{name}.kind', term.kind, LOSSES)
  parameters = inspect.signature(LOSSES[term.kind].fn).parameters
  inputs = {n: p for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
  required = {n for n, p in inputs.items() if p.default is p.empty}
  args = {n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n != 'state'}
  needed = {n for n in args if parameters[n].default is inspect.Parameter.empty}
  _signature(f'losses.{name}.inputs', term.inputs, set(inputs), required)
  _signature(f'losses.{name}.args', term.args, args, needed)
  for arg, path in term.inputs.items():
    root, _, rest = path.partition('.')
    if root in by:
      _known(f'losses.{name}.inputs.{arg}', rest.split('.')[0], c.towers)
    else:
      _known(f'losses.{name}.inputs.{arg}', path, known)


def _check_numbers(c):
  s, part = c.schedule, c.schedule.batch_size
  counts = {
    'schedule': ('total_steps', 'batch_size', 'accumulate'),
    'checkpoint': ('every_steps', 'keep_last'),
    'log': ('every_steps',),
    'evals': ('batch_size', 'size', 'limit'),
  }
  for group, fields in counts.items():
    for field in fields:
      if getattr(getattr(c, group), field) < 1:
        raise InputError(
          f'{group}.{field}: got {getattr(getattr(c, group), field)}; expected at least 1'
        )
  for name, t in c.towers.items():
    width = getattr(t, 'decoder_width', getattr(t, 'width', 0))
    if hasattr(t, 'heads') and width % t.heads:
      raise InputError(
        f'towers.{name}.heads: got {t.heads}; expected a divisor of the width {width}'
      )
  if part % s.accumulate:
    raise InputError(
      f'schedule.accumulate: got {s.accumulate}; expected a divisor of the batch size {part}'
    )
  if c.evals.encoder != 'student':
    _known('evals.encoder', c.evals.encoder, {'student', *c.teachers})
  if c.evals.tasks or c.evals.suite:
    _known(
      'evals.image_tower', c.evals.image_tower, {n for n, t in c.towers.items() if t.kind == 'vit'}
    )
  for field in ('image_head', 'text_head'):
    if getattr(c.evals, field):
      _known(f'evals.{field}', getattr(c.evals, field), c.towers)


def _known(what, name, known):
  if name not in known:
    raise unknown(what, name, known)


def _signature(what, given, allowed, required):
  for name in given:
    _known(what, name, allowed)
  for name in required:
    if name not in given:
      raise InputError(f'{what}.{name}: missing; expected inputs {sorted(allowed)}')

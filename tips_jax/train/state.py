"""Everything that a step changes, and how it starts."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from tips_jax.core.strict import unknown
from tips_jax.models import towers
from tips_jax.train import optim
from tips_jax.train.method import LOSSES, Method


@flax.struct.dataclass
class State:
  params: Any  # {tower: tree}, float32: the student
  teachers: Any  # {teacher: {tower: tree}}
  loss_state: Any  # {term: arrays}: DINO's centers
  optimizer: Any
  step: Any  # int32: updates tried
  bad_steps: Any  # int32: non-finite updates in a row
  skipped: Any  # int32: non-finite updates in all


def parameters(method: Method) -> tuple[dict[str, Any], dict[str, Any]]:
  """(student, teachers) as they start: EMA teachers equal the student, frozen ones wait for their
  weights.
  """
  c = method.config

  def initial(tower):
    return towers.init(tower, c.towers[tower], seed=c.seed)

  student = {tower: initial(tower) for tower in method.student}
  teachers = {}
  for name, teacher in c.teachers.items():
    if teacher.kind == 'ema':
      # Copies: the step gives its state away, and no buffer can be given twice.
      teachers[name] = {tower: jax.tree.map(jnp.copy, student[tower]) for tower in teacher.towers}
    else:
      teachers[name] = {tower: initial(tower) for tower in teacher.towers}
  return student, teachers


def init(method: Method) -> State:
  """The first State. Jit it with the shardings of `sharding.state`, or eval_shape it: it allocates
  nothing itself.
  """
  student, teachers = parameters(method)

  def zero():  # each counter has its own buffer
    return jnp.zeros((), jnp.int32)

  return State(
    params=student,
    teachers=teachers,
    loss_state=loss_state(method, student, teachers),
    optimizer=optim.transform(method.config.optimizer).init(optim.split(method.config, student)[0]),
    step=zero(),
    bad_steps=zero(),
    skipped=zero(),
  )


def loss_state(method: Method, student: dict[str, Any], teachers: dict[str, Any]) -> dict[str, Any]:
  """The initial state of every loss that has one; sizes come from the parameters that it reads."""
  result = {}
  for name, loss in method.config.losses.items():
    shapes = {}
    for arg, parameter in method.losses[name].parameters.items():
      towers_of = {**student, **teachers.get(parameter.by, {})}
      shapes[arg] = leaf(towers_of[parameter.tower], parameter.name)
    value = LOSSES[loss.kind].state(shapes)
    if value:
      result[name] = value
  return result


def leaf(params: dict[str, Any], path: str) -> Any:
  """params['a']['b'] for 'a.b'; InputError where there is no such parameter."""
  for key in path.split('.'):
    if not isinstance(params, dict):
      params = {}  # a path may be longer than the tree is deep
    if key not in params:
      raise unknown(f'parameter {path}', key, params)
    params = params[key]
  return params

"""The training step: any method of the schema, one jitted function.

masks    drawn from (seed, step)
passes   towers on views, in order; teachers without gradient
losses   weighted, over what the passes produced, summed
update   gradient -> optimizer -> running statistics -> teachers -> state of the losses; skipped as
a whole when loss, gradient or a new parameter is not finite
"""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient

from tips_jax.core import parallel, schema, tree
from tips_jax.models import towers
from tips_jax.models.stages import STATISTICS
from tips_jax.objectives import masks as mask_lib
from tips_jax.train import optim, sharding
from tips_jax.train.method import LOSSES, Method
from tips_jax.train.state import State, leaf

# Before the name of a loss in a program: a pass may have the same one (planning/parts.py).
LOSS_SCOPE = 'loss_'

Arrays = Mapping[str, jax.Array]
Step = Callable[[State, Arrays], tuple[State, dict[str, jax.Array]]]


def make(method: Method) -> Step:
  """(state, batch) -> (state, metrics). Batch: arrays of the data pipeline, split over the batch
  axes.
  """
  config = method.config

  def step(state, batch):
    # A key of the step alone: a resumed run draws what an uninterrupted one would.
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step)

    trained, frozen = optim.split(config, state.params)

    def loss_of(trained):
      return loss(method, optim.join(trained, frozen), state, batch, rng)

    (value, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
    loss_state, metrics, statistics = aux

    norm = optax.tree.norm(grads)
    transform = optim.transform(config.optimizer)
    direction, optimizer = transform.update(grads, state.optimizer, trained)
    params = optim.apply(state.params, direction, config=config, step=state.step)
    params = bound_scales(config, params)
    params = with_statistics(config, params, statistics, state.step)
    teachers = update_teachers(config, state.teachers, params, state.step)

    # One NaN in a moment, a teacher or a center would stay for good: all move, or none does. The
    # gradient may be finite and the update not: Adam with eps 0 divides zero by zero.
    ok = jnp.isfinite(value) & jnp.isfinite(norm) & finite(params)

    def keep(new, old):
      return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)

    state = state.replace(
      params=keep(params, state.params),
      teachers=keep(teachers, state.teachers),
      loss_state=keep(loss_state, state.loss_state),
      optimizer=keep(optimizer, state.optimizer),
      step=state.step + 1,
      bad_steps=jnp.where(ok, 0, state.bad_steps + 1),
      skipped=state.skipped + ~ok,
    )
    metrics |= {
      'loss': value,
      'gradient_norm': norm,
      'bad_steps': state.bad_steps,
      'skipped_steps': state.skipped,
      'learning_rate': optim.learning_rate(config)(state.step - 1),
    }
    return state, metrics

  return step


def loss(
  method: Method, params: Mapping[str, Any], state: State, batch: Arrays, rng: jax.Array
) -> tuple[jax.Array, tuple[dict, dict, dict]]:
  """(sum of weight * loss, (new state of the losses, metrics, {pass: statistics})) of the global
  batch.
  """
  config = method.config
  progress = state.step / config.schedule.total_steps
  # Towers that a teacher does not cover are the student's, as they are now.
  weights = {'student': params}
  for name, towers_of_teacher in state.teachers.items():
    weights[name] = stop_gradient({**params, **towers_of_teacher})
  batch = jax.tree.map(parallel.constrain_batch, batch)
  masks = {name: draw_mask(method, name, batch, rng) for name in config.masks}
  feats = features(method, weights, {'batch': batch, 'masks': masks}, rng)

  total = jnp.float32(0)
  loss_state = dict(state.loss_state)
  metrics = {}
  for name, reads in method.losses.items():
    spec = config.losses[name]
    inputs = pick(feats, reads.features)
    for arg, parameter in reads.parameters.items():
      inputs[arg] = leaf(weights[parameter.by][parameter.tower], parameter.name)
    if name in state.loss_state:
      inputs['state'] = state.loss_state[name]
    # Numbers that change with progress are traced: no value compiles the step anew.
    args = {arg: optim.ramp(value, progress) for arg, value in spec.args.items()}
    with jax.named_scope(LOSS_SCOPE + name):
      result = LOSSES[spec.kind].fn(**inputs, **args)
    total += optim.ramp(spec.weight, progress) * result.value
    metrics[name] = result.value
    for metric, value in result.metrics.items():
      metrics[f'{name}/{metric}'] = value
    if name in state.loss_state:
      loss_state[name] = stop_gradient(result.state)
  statistics = {}
  for path in method.reads:
    name, output = path.split('.', 1)
    if output == STATISTICS:
      # A row for each device and part of the batch.
      statistics[name] = jax.tree.map(lambda x: stop_gradient(x).mean(0), feats[path])
  return total, (loss_state, metrics, statistics)


def features(
  method: Method, weights: Mapping[str, Any], roots: Mapping[str, Any], rng: jax.Array
) -> dict[str, jax.Array]:
  """{path: array} of what losses read; every device runs the passes on its own rows.

  With `accumulate` in parts, each computed again in the backward pass. Losses see the features of
  the whole batch, so parts change memory and time and never the loss (as GradCache, arXiv
  2101.06983).
  """
  parts = method.config.schedule.accumulate

  def local(weights, roots, rows):
    def run(part):
      return run_passes(method, weights, *part, rng)

    if parts == 1:
      return run((roots, rows))
    # Without the checkpoint all parts' activations would be kept for the backward pass.
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (roots, rows))
    feats = jax.lax.map(jax.checkpoint(run), split)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), feats)

  specs = sharding.specs(method.config.mesh.rules, weights)
  return parallel.map_batch(local, weights, roots, specs=specs)


def run_passes(
  method: Method,
  weights: Mapping[str, Any],
  roots: Mapping[str, Any],
  rows: jax.Array,
  rng: jax.Array,
) -> dict[str, jax.Array]:
  """Every pass once, in order. A teacher's inputs and weights carry no gradient."""
  config = method.config
  feats = {f'batch.{name}': x for name, x in roots['batch'].items()}
  for mask, arrays in roots['masks'].items():
    for name, x in arrays.items():
      feats[f'masks.{mask}.{name}'] = x
  for names in method.order:
    # The passes of a group share by and tower: one call, which gathers split weights once.
    passes = [config.passes[name] for name in names]
    by = passes[0].by
    tower = passes[0].tower
    inputs = [pick(feats, p.inputs) for p in passes]
    key = None
    if by == 'student':
      key = named_key(rng, names[0])
    else:  # neither into the views' features nor, through them, into the student
      inputs = stop_gradient(inputs)
    with jax.named_scope('+'.join(names)):
      outputs = towers.apply_all(
        weights[by][tower], config.towers[tower], config.compute, inputs, rng=key, rows=rows
      )
    for name, arrays in zip(names, outputs):
      for output, x in arrays.items():
        feats[f'{name}.{output}'] = x
  # Of all features only these are joined over the devices.
  return {path: feats[path] for path in method.reads}


def pick(feats: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
  """{argument: feature} of {argument: path}."""
  return {arg: feats[path] for arg, path in paths.items()}


def draw_mask(method: Method, name: str, batch: Arrays, rng: jax.Array) -> dict[str, jax.Array]:
  """Masks of one view or text of the whole batch, from the step's key alone: the same on any number
  of devices.
  """
  mask = method.config.masks[name]
  key = named_key(rng, f'masks.{name}')
  if isinstance(mask, schema.WordMask):
    drawn = mask_lib.draw_words(mask, key, batch[mask.text], method.mask_unit[name])
    return jax.tree.map(parallel.constrain_batch, drawn)
  images, views, height, width, _ = batch[mask.view].shape
  patch = method.mask_unit[name]
  grid = (math.ceil(height / patch), math.ceil(width / patch))
  drawn = mask_lib.draw(mask, key, (images, views), grid)
  return jax.tree.map(parallel.constrain_batch, drawn)


def named_key(rng: jax.Array, name: str) -> jax.Array:
  """A key of its own for a name: what is random in one place does not depend on what else there
  is. The checksum is the same in every process; Python's hash is not.
  """
  return jax.random.fold_in(rng, zlib.crc32(name.encode()))


def bound_scales(config: schema.Config, params: Mapping[str, Any]) -> dict[str, Any]:
  """1 / temperature at most `max_scale` of its tower, as CLIP clips its parameter after each update
  (open_clip_train/train.py). In the loss a bound would have no gradient, and hold for good.
  """
  params = dict(params)
  for name, tower in config.towers.items():
    if name in params and isinstance(tower, schema.Logit) and tower.max_scale:
      least = -math.log(tower.max_scale)
      temperature = jnp.maximum(params[name]['log_temperature'], least)
      params[name] = params[name] | {'log_temperature': temperature}
  return params


def with_statistics(
  config: schema.Config,
  params: Mapping[str, Any],
  statistics: Mapping[str, Any],
  step: jax.Array,
) -> dict[str, Any]:
  """The parameters with the running averages that the passes of a step gave: of several passes of
  a tower the mean. What is frozen keeps its own.
  """
  seen = {}
  for name, arrays in statistics.items():
    for path, x in tree.named_leaves({config.passes[name].tower: arrays}):
      seen.setdefault(path, []).append(x)

  def latest(name, p):
    if name not in seen:
      return p
    moves = optim.moves(config, name, step)
    return p + moves * (sum(seen[name]) / len(seen[name]) - p)

  return tree.map_named(latest, params)


def finite(arrays: Any) -> jax.Array:
  """Whether no number of a tree is NaN or infinite. Not by a norm, whose squares may overflow."""
  return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(arrays)]).all()


def update_teachers(
  config: schema.Config, teachers: Mapping[str, Any], params: Mapping[str, Any], step: jax.Array
) -> dict[str, Any]:
  """EMA teachers move toward the new student; frozen ones stay."""
  progress = step / config.schedule.total_steps
  result = {}
  for name, old in teachers.items():
    teacher = config.teachers[name]
    result[name] = old
    if teacher.kind == 'ema':
      student = {tower: params[tower] for tower in old}
      result[name] = optim.ema(old, student, optim.ramp(teacher.momentum, progress))
  return result

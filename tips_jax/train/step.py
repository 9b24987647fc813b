"""The training step: any method of the schema, one jitted function.

masks    drawn from (seed, step)
passes   towers on views, in order; teachers without gradient
losses   weighted, over what the passes produced, summed
update   gradient -> optimizer -> teachers -> state of the losses; skipped as a whole when anything
is not finite
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient

from tips_jax.core import parallel, schema
from tips_jax.models import towers
from tips_jax.objectives import masked
from tips_jax.train import optim, sharding
from tips_jax.train.method import LOSSES, Method, mask_patch
from tips_jax.train.state import State, leaf


def make(
  method: Method,
) -> Callable[[State, Mapping[str, jax.Array]], tuple[State, dict[str, jax.Array]]]:
  """(state, batch) -> (state, metrics). Batch: arrays of the data pipeline, split over the batch
  axes.
  """
  config = method.config

  def step(state, batch):
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
    loss_fn = lambda params: loss(method, params, state, batch, rng)
    (value, (loss_state, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)

    norm = optax.tree.norm(grads)
    ok = jnp.isfinite(value) & jnp.isfinite(norm)
    direction, optimizer = optim.transform(config.optimizer).update(
      grads, state.optimizer, state.params
    )
    params = optim.apply(state.params, direction, config=config, step=state.step)
    teachers = update_teachers(config, state.teachers, params, state.step)

    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
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
  method: Method,
  params: Mapping[str, Any],
  state: State,
  batch: Mapping[str, jax.Array],
  rng: jax.Array,
) -> tuple[jax.Array, tuple[dict, dict]]:
  """(sum of weight * term, (new loss state, metrics)) of the global batch."""
  config, progress = method.config, state.step / method.config.schedule.total_steps
  weights = {name: stop_gradient({**params, **teacher}) for name, teacher in state.teachers.items()}
  weights['student'] = params
  batch = jax.tree.map(parallel.constrain_batch, batch)
  masks = {name: draw_mask(config, name, batch, rng) for name in config.masks}
  feats = features(method, weights, {'batch': batch, 'masks': masks}, rng)

  total, loss_state, metrics = jnp.float32(0), {}, {}
  for name, term in config.losses.items():
    inputs = {
      a: feats[p] if p in feats else leaf(weights[p.split('.')[0]], p.partition('.')[2])
      for a, p in term.inputs.items()
    }
    if name in state.loss_state:
      inputs['state'] = state.loss_state[name]
    args = {a: optim.ramp(x, progress) for a, x in term.args.items()}
    with jax.named_scope(name):
      result = LOSSES[term.kind].fn(**inputs, **args)
    total += optim.ramp(term.weight, progress) * result.value
    metrics |= {name: result.value} | {f'{name}/{k}': v for k, v in result.metrics.items()}
    if name in state.loss_state:
      loss_state[name] = stop_gradient(result.state)
  return total, (loss_state, metrics)


def features(
  method: Method, weights: Mapping[str, Any], roots: Mapping[str, Any], rng: jax.Array
) -> dict[str, jax.Array]:
  """{path: array} of what losses read; every device runs the passes on its own rows.

  With `accumulate` in parts, each computed again in the backward pass. Terms see the features of
  the whole batch, so parts change memory and time and never the loss (as GradCache, arXiv
  2101.06983).
  """
  n = method.config.schedule.accumulate
  split = lambda x: x.reshape(n, -1, *x.shape[1:])
  join = lambda x: x.reshape(-1, *x.shape[2:])

  def local(weights, roots, rows):
    part = lambda args: run_passes(method, weights, *args, rng)
    if n == 1:
      return part((roots, rows))
    return jax.tree.map(join, jax.lax.map(jax.checkpoint(part), jax.tree.map(split, (roots, rows))))

  return parallel.map_batch(
    local, weights, roots, specs=sharding.specs(method.config.mesh.rules, weights)
  )


def run_passes(
  method: Method,
  weights: Mapping[str, Any],
  roots: Mapping[str, Any],
  rows: jax.Array,
  rng: jax.Array,
) -> dict[str, jax.Array]:
  """Every pass once, in order. A teacher's inputs and weights carry no gradient."""
  config, feats = method.config, {f'batch.{k}': v for k, v in roots['batch'].items()}
  feats |= {f'masks.{m}.{k}': v for m, mask in roots['masks'].items() for k, v in mask.items()}
  for names in method.order:
    by, tower = config.passes[names[0]].by, config.passes[names[0]].tower
    inputs = [{arg: feats[path] for arg, path in config.passes[n].inputs.items()} for n in names]
    key = jax.random.fold_in(rng, zlib.crc32(names[0].encode())) if by == 'student' else None
    if by != 'student':
      inputs = stop_gradient(inputs)
    with jax.named_scope('+'.join(names)):
      outs = towers.apply_all(
        weights[by][tower], config.towers[tower], config.compute, inputs, rng=key, rows=rows
      )
    feats |= {f'{name}.{k}': v for name, out in zip(names, outs) for k, v in out.items()}
  return {path: feats[path] for path in method.reads}


def draw_mask(
  config: schema.Config, name: str, batch: Mapping[str, jax.Array], rng: jax.Array
) -> dict[str, jax.Array]:
  """Masks of one view of the whole batch, from the step's key alone: the same on any number of
  devices.
  """
  spec, (b, v, h, w, _) = config.masks[name], batch[config.masks[name].view].shape
  patch = mask_patch(config, name)
  key = jax.random.fold_in(rng, zlib.crc32(f'masks.{name}'.encode()))
  patches = -(-h // patch) * -(-w // patch)
  return jax.tree.map(
    parallel.constrain_batch, masked.random_mask(key, (b, v, patches), spec.ratio)
  )


def update_teachers(
  config: schema.Config, teachers: Mapping[str, Any], params: Mapping[str, Any], step: jax.Array
) -> dict[str, Any]:
  """EMA teachers move toward the new student; frozen ones stay."""
  progress = step / config.schedule.total_steps
  move = lambda t, old: optim.ema(
    old, {k: params[k] for k in old}, optim.ramp(t.momentum, progress)
  )
  return {
    name: move(config.teachers[name], old) if config.teachers[name].kind == 'ema' else old
    for name, old in teachers.items()
  }

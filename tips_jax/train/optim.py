"""Optimizers and schedules, from optax; rates, decay and freezing by parameter name."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from tips_jax.core import schema, tree

# Second moments are factored over dimensions of at least this size: above any depth, so that the
# stacked layers stay apart, and below any head width.
_FACTORED = 48
# Root mean square of an update of Adam, to which Muon's are scaled: one rate suits both (arXiv
# 2502.16982, section 2.2).
_ADAM_RMS = 0.2


def ramp(value: Any, progress: jax.Array | float) -> Any:
  """The value of a Ramp at `progress` (fraction of the run, 0 to 1); anything else as it is."""
  if not isinstance(value, schema.Ramp):
    return value
  length = value.until - value.begin
  if length > 0:
    x = jnp.clip((progress - value.begin) / length, 0.0, 1.0)
  else:  # a ramp of no length is a step
    x = jnp.where(progress >= value.begin, 1.0, 0.0)
  if value.shape == 'cosine':
    x = 0.5 * (1 - jnp.cos(jnp.pi * x))
  return value.start + (value.end - value.start) * x


def learning_rate(config: schema.Config) -> Callable[[jax.Array | int], jax.Array]:
  """step -> rate: linear warm-up, then linear or cosine to the final rate, or constant."""
  schedule = config.schedule
  peak = config.optimizer.learning_rate
  final = config.optimizer.final_rate
  rest = max(schedule.total_steps - schedule.warmup_steps, 1)
  match schedule.decay:
    case 'linear':
      after = optax.linear_schedule(peak, final, rest)
    case 'cosine':
      cosine = optax.cosine_decay_schedule(peak - final, rest)

      def after(step):
        return final + cosine(step)

    case 'constant':
      after = optax.constant_schedule(peak)
  if not schedule.warmup_steps:
    return after

  def warmup(step):
    # Counts from one: at a rate of zero the first step would compute a gradient for nothing.
    return peak * (step + 1) / schedule.warmup_steps

  return optax.join_schedules([warmup, after], [schedule.warmup_steps])


def transform(config: schema.Optimizer) -> optax.GradientTransformation:
  """Gradients -> direction, before decay and rate (see `apply`)."""
  steps = []
  if config.clip_norm:
    steps.append(_clip(config))
  match config:
    case schema.Muon():
      steps.append(_muon(config))
    case schema.AdamW():
      steps.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    case schema.Adafactor():
      steps += _adafactor(config)
  return optax.chain(*steps)


def _clip(config: schema.Optimizer) -> optax.GradientTransformation:
  """To a norm, of all towers at once or of each."""
  clip = optax.clip_by_global_norm(config.clip_norm)
  if config.clip_by == 'all':
    return clip

  def each(gradients, _):
    return {tower: clip.update(part, clip.init(part))[0] for tower, part in gradients.items()}

  return optax.stateless(each)


def _adafactor(config: schema.Adafactor) -> list[optax.GradientTransformation]:
  """big_vision's Adafactor: decay capped, first moment in bfloat16, no clipping of its own."""

  def decay(step, rate):
    return jnp.minimum(1 - (step + 1.0) ** -rate, config.b2_cap)

  second = optax.scale_by_factored_rms(
    decay_rate=0.8, min_dim_size_to_factor=_FACTORED, decay_rate_fn=decay
  )
  first = optax.ema(config.b1, debias=False, accumulator_dtype=jnp.bfloat16)
  return [second, first]


def _muon(config: schema.Muon) -> optax.GradientTransformation:
  """Muon for the kernels of stacked blocks, Adam for the rest."""

  def kind(name, _):
    return 'muon' if '/blocks/' in name and name.endswith('/kernel') else 'adam'

  def last_two(updates):  # of [layers, inputs, outputs]
    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map(lambda _: dimensions, updates)

  def resize(updates, _):
    return jax.tree.map(lambda x: _ADAM_RMS * math.sqrt(max(x.shape[-2:])) * x, updates)

  muon = optax.chain(
    optax.contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=last_two),
    optax.stateless(resize),
  )
  adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
  return optax.partition({'muon': muon, 'adam': adam}, lambda params: tree.map_named(kind, params))


def apply(params: Any, direction: Any, *, config: schema.Config, step: jax.Array | int) -> Any:
  """New parameters: p - rate * (direction + decay * p), each with its own multipliers; p where the
  direction is None.

  Decay is decoupled: it is added after the moments, so that it does not pass through them. Where
  it goes with the schedule alone, p - rate * direction - (rate / peak) * decay * p.
  """
  optimizer = config.optimizer
  rate = learning_rate(config)(step)
  progress = step / config.schedule.total_steps
  weight_decay = ramp(optimizer.weight_decay, progress)

  def update(name, p, d):
    if d is None:
      return p
    scale = rate * tree.match(optimizer.lr_rules, name, 'optimizer.lr_rules')
    scale = scale * layer_decay(optimizer, name, p, params)
    decay = weight_decay * tree.match(optimizer.decay_rules, name, 'optimizer.decay_rules')
    shrink = scale
    if optimizer.decay_times == 'schedule':  # not by the multipliers of the rate either
      shrink = rate / max(optimizer.learning_rate, 1e-30)  # a rate of 0 moves nothing
    if isinstance(optimizer, schema.Lamb):  # its decay is part of the direction
      d = d + decay * p
      scale = scale * trust_ratio(name, p, d, optimizer.trust)
      decay = 0.0
    return p - moves(config, name, step) * (scale * d + shrink * decay * p)

  return tree.map_named(update, params, direction)


def trust_ratio(
  name: str, p: jax.Array, direction: jax.Array, bounds: tuple[float, float]
) -> jax.Array:
  """|p| / |direction| within bounds, of each layer of stacked blocks; 1 where one of them is zero
  (LAMB, arXiv 1904.00962, algorithm 2).
  """
  axes = tuple(range(p.ndim))
  if '/blocks/' in name:
    axes = axes[1:]
  size = jnp.sqrt(jnp.sum(p * p, axes, keepdims=True))
  step = jnp.sqrt(jnp.sum(direction * direction, axes, keepdims=True))
  ratio = (size / jnp.where(step > 0, step, 1.0)).clip(*bounds)
  return jnp.where((size > 0) & (step > 0), ratio, 1.0)


def split(config: schema.Config, params: Any) -> tuple[Any, Any]:
  """(those that are trained, those that `freeze_rules` hold for good), each with None in place of
  the others: these need no gradient and no memory of the optimizer.
  """

  def pick(frozen):
    return tree.map_named(lambda name, p: p if _frozen(config, name) == frozen else None, params)

  return pick(False), pick(True)


def join(trained: Any, frozen: Any) -> Any:
  """What `split` parted."""
  return jax.tree.map(
    lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda x: x is None
  )


def _frozen(config, name):
  return tree.match(config.optimizer.freeze_rules, name, 'optimizer.freeze_rules') >= 1


def moves(config: schema.Config, name: str, step: jax.Array | int) -> Any:
  """1 where a parameter is updated at a step, 0 where `freeze_rules` hold it."""
  frozen_until = tree.match(config.optimizer.freeze_rules, name, 'optimizer.freeze_rules')
  if frozen_until >= 1:  # for good: progress itself reaches 1
    return 0.0
  if frozen_until:
    return jnp.float32(step / config.schedule.total_steps >= frozen_until)
  return 1.0


def layer_decay(optimizer: schema.Optimizer, name: str, leaf: Any, params: Any) -> Any:
  """Multiplier of a parameter's rate: the base of its rule to the power of the layers above it.

  As DINOv2 (dinov2/utils/param_groups.py:14) and BEiT count: none above the last norm and all that
  is not in a tower with an encoder, depth - i above block i, depth + 1 above the embeddings. For
  stacked blocks [L, 1, ...].
  """
  base = tree.match(optimizer.layer_decay_rules, name, 'optimizer.layer_decay_rules')
  tower, *path = name.split('/')
  if base == 1 or 'encoder' not in params[tower]:
    return 1.0
  depth = jax.tree.leaves(params[tower]['encoder'])[0].shape[0]
  match path[0]:
    case 'encoder':
      above = depth - jnp.arange(depth)
      return base ** above.reshape(-1, *(1,) * (leaf.ndim - 1))
    case 'norm':
      return 1.0
    case _:  # embedding, posembed, cls, mask_token
      return base ** (depth + 1)


def ema(teacher: Any, student: Any, momentum: jax.Array | float) -> Any:
  """teacher <- momentum * teacher + (1 - momentum) * student, in float32."""
  # As a step towards the student: near momentum 1 the product would round its difference away.
  return jax.tree.map(lambda t, s: t + (1 - momentum) * (s - t), teacher, student)

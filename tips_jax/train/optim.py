"""Optimizers and schedules, from optax; rates, decay and freezing by parameter name."""

import jax
import jax.numpy as jnp
import optax

from tips_jax.core import schema, tree

# Second moments are factored over dimensions of at least this size: above any depth, so that the
# stacked layers stay apart, and below any head width.
_FACTORED = 48


def ramp(value, progress):
  """A number, or a Ramp at `progress` (fraction of the run, 0 to 1)."""
  if not isinstance(value, schema.Ramp):
    return value
  x = jnp.clip((progress - value.begin) / max(value.until - value.begin, 1e-9), 0.0, 1.0)
  if value.shape == 'cosine':
    x = 0.5 * (1 - jnp.cos(jnp.pi * x))
  return value.start + (value.end - value.start) * x


def learning_rate(config: schema.Config):
  """step -> rate: linear warm-up, then linear or cosine to zero, or constant."""
  s, peak = config.schedule, config.optimizer.learning_rate
  rest = max(s.total_steps - s.warmup_steps, 1)
  after = {
    'linear': lambda: optax.linear_schedule(peak, 0.0, rest),
    'cosine': lambda: optax.cosine_decay_schedule(peak, rest),
    'constant': lambda: optax.constant_schedule(peak),
  }[s.decay]()
  if not s.warmup_steps:
    return after
  # The first step has a rate above zero: warm-up counts from one.
  warmup = lambda step: peak * (step + 1) / s.warmup_steps
  return optax.join_schedules([warmup, after], [s.warmup_steps])


def transform(config: schema.Optimizer):
  """Gradients -> direction, before decay and rate (see `apply`)."""
  clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  if config.kind == 'adamw':
    return optax.chain(*clip, optax.scale_by_adam(config.b1, config.b2, config.eps))
  # big_vision's Adafactor: decay capped, first moment in bfloat16, no clipping of its own.
  decay = lambda step, rate: jnp.minimum(1 - (step + 1.0) ** -rate, config.b2)
  factored = optax.scale_by_factored_rms(
    decay_rate=0.8, min_dim_size_to_factor=_FACTORED, decay_rate_fn=decay
  )
  return optax.chain(
    *clip, factored, optax.ema(config.b1, debias=False, accumulator_dtype=jnp.bfloat16)
  )


def apply(params, direction, *, config: schema.Config, step):
  """New parameters: p - rate * (direction + decay * p), each with its own multipliers; decay is
  decoupled.
  """
  o, rate = config.optimizer, learning_rate(config)(step)
  progress = step / config.schedule.total_steps

  def one(name, p, d):
    frozen = tree.match(o.freeze_rules, name, 'optimizer.freeze_rules')
    scale = rate * tree.match(o.lr_rules, name, 'optimizer.lr_rules')
    if frozen:
      scale = scale * (progress >= frozen) if frozen < 1 else 0.0 * scale
    decay = o.weight_decay * tree.match(o.decay_rules, name, 'optimizer.decay_rules')
    return p - scale * (d + decay * p)

  return tree.map_named(one, params, direction)


def ema(teacher, student, momentum):
  """teacher <- momentum * teacher + (1 - momentum) * student, in float32."""
  return jax.tree.map(lambda t, s: t + (1 - momentum) * (s - t), teacher, student)

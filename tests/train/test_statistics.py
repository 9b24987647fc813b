"""Running statistics of batch norms as part of the step: over the global batch, kept, skipped."""

import functools

import jax
import numpy as np
import pytest

from tips_jax.core import schema, tree
from tips_jax.models import stages
from tips_jax.train import lowering, sharding, state, step
from tips_jax.train import method as method_lib

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 1, 32, 32, 3), np.uint8)


def method_of(accumulate=1, frozen=()):
  """The least method with batch norms: one tower whose images keep their distance, and an average
  of it.
  """
  tower = schema.MobileNetV2(
    kind='mobilenetv2', stem=4, widths=(4,) * 7, depths=(1,) * 7, expansion=1, last=4
  )
  rules = (*((pattern, 1.0) for pattern in frozen), ('.*', 0.0))
  return method_lib.build(
    schema.Config(
      name='least',
      data=schema.Data(views={'global': schema.View(size=32)}),
      towers={'image': tower},
      compute=schema.Compute(dtype='float32'),
      passes={'seen': schema.Pass(tower='image', inputs={'images': 'batch.global'})},
      losses={'apart': schema.WeightedLoss(kind='koleo', inputs={'features': 'seen.pooled'})},
      teachers={'ema': schema.Teacher(towers=('image',), momentum=0.75)},
      optimizer=schema.AdamW(freeze_rules=rules),
      schedule=schema.Schedule(total_steps=2, batch_size=8, accumulate=accumulate),
    )
  )


@functools.cache
def start():
  return jax.tree.map(np.asarray, jax.jit(lambda: state.init(method_of()))())


@functools.cache
def stepped(accumulate=1, data=1, fsdp=1, frozen=()):
  """(state after a step from the same start, the compiled step)."""
  method = method_of(accumulate, frozen)
  mesh = sharding.make_mesh(
    schema.Mesh(data=data, fsdp=fsdp), 8, devices=jax.devices()[: data * fsdp]
  )
  places = lowering.abstract_state(method, mesh)[1]
  run = jax.jit(step.make(method))
  with jax.set_mesh(mesh):
    batch = {'global': jax.device_put(IMAGES, sharding.batch(mesh))}
    after, metrics = run(jax.device_put(start(), places), batch)
  assert metrics['skipped_steps'] == 0
  return jax.tree.map(np.asarray, after), run


def statistics(params):
  named = dict(tree.named_leaves(params))
  return {n: np.asarray(x) for n, x in named.items() if n.endswith(('norm/mean', 'norm/var'))}


def stem():
  """What the first batch norm sees."""
  kernel = start().params['image']['stem']['conv']
  x = IMAGES[:, 0].astype(np.float32) / 255
  return np.asarray(stages.Convolution(kernel['kernel'].shape, 2).apply({'params': kernel}, x))


def test_they_move_toward_the_moments_of_the_batch_and_a_teacher_follows():
  after, _ = stepped()
  x = stem()
  norm = after.params['image']['stem']['norm']
  np.testing.assert_allclose(norm['mean'], 0.1 * x.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(norm['var'], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-4)
  before = statistics(start().params)
  teacher = statistics(after.teachers['ema'])
  for name, value in statistics(after.params).items():
    assert np.any(value != before[name]), name
    np.testing.assert_allclose(teacher[name], 0.75 * before[name] + 0.25 * value, rtol=1e-5)


@pytest.mark.once
def test_they_are_those_of_the_global_batch_on_many_devices():
  many, _ = stepped(data=2, fsdp=4)
  one, _ = stepped()
  for name, value in statistics(one.params).items():
    np.testing.assert_allclose(
      statistics(many.params)[name], value, rtol=1e-5, atol=1e-6, err_msg=name
    )


@pytest.mark.once
def test_parts_of_a_batch_count_alike():
  x = stem()
  norm = stepped(accumulate=2)[0].params['image']['stem']['norm']
  np.testing.assert_allclose(norm['mean'], 0.1 * x.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
  parts = np.mean([part.var((0, 1, 2), ddof=1) for part in np.split(x, 2)], axis=0)
  np.testing.assert_allclose(norm['var'], 0.9 + 0.1 * parts, rtol=1e-4)


@pytest.mark.once
def test_a_skipped_update_keeps_them():
  after, run = stepped()
  poison = lambda n, x: np.full_like(x, np.nan) if n == 'image/head/norm/scale' else x
  bad = after.replace(params=tree.map_named(poison, after.params))
  kept, metrics = run(bad, {'global': IMAGES})
  assert metrics['skipped_steps'] == 1
  for name, value in statistics(kept.params).items():
    np.testing.assert_array_equal(value, statistics(after.params)[name])


def test_what_is_frozen_keeps_them():
  method = method_of(frozen=('image/stem/.*',))
  params = start().params
  new = {'seen': {part: params['image'][part] for part in ('stem', 'block0')}}
  new = jax.tree.map(lambda x: np.full_like(x, 3), new)
  moved = statistics(step.with_statistics(method.config, params, new, np.int32(0)))
  for name, value in statistics(params).items():
    if name.startswith('image/block0/'):
      np.testing.assert_array_equal(moved[name], 3)
    else:
      np.testing.assert_array_equal(moved[name], value)

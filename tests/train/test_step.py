import functools
import json
import os
import pathlib

import jax
import numpy as np
import pytest

from tips_jax.core import schema, tree
from tips_jax.models import towers
from tips_jax.train import method as method_lib
from tips_jax.train import optim
from tips_jax.train import step as step_lib

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'steps.json'
ADVICE = f"""
The numbers of two training steps have changed. That is right only where the mathematics of the method, its defaults or
its initial weights were meant to change: then say so in the commit, and write the new numbers with
  UPDATE_GOLDEN=1 python -m pytest {pathlib.Path(__file__).name} -k golden
A refactoring, a new option that is off, or a faster way to compute the same must leave them as they are."""
NAMES = (
  'tips_v1',
  'tips_v2',
  'tips_distill',
  'clip',
  'siglip',
  'silc',
  'dino_ibot',
  'mae',
  'umg_clip',
  'umg_clip_adapt',
)
EMA = ('tips_v1', 'tips_v2', 'silc', 'dino_ibot')


@pytest.fixture(scope='module')
def stepper(small):
  """name -> (compiled step, the three states of two steps, their metrics, the first gradient), on
  one device.
  """

  @functools.cache
  def make(name):
    method = small.method(name)

    @jax.jit
    def step(state, batch):
      seen, transform = [], optim.transform
      with (
        pytest.MonkeyPatch.context() as patch
      ):  # the step's own gradient, on its way to the optimizer
        patch.setattr(optim, 'transform', lambda config: Spy(transform(config), seen))
        out = step_lib.make(method)(state, batch)
      return out, seen[0]

    states, metrics, gradients = [small.host_state(name)], [], []
    for seed in range(2):
      (state, m), gradient = step(states[-1], small.batch(method, seed=seed))
      states.append(jax.tree.map(np.asarray, state))
      metrics.append({k: float(v) for k, v in m.items()})
      gradients.append(jax.tree.map(np.asarray, gradient))
    return (lambda *args: step(*args)[0]), states, metrics, gradients[0]

  return make


class Spy:
  """An optimizer that shows what it is given."""

  def __init__(self, transform, seen):
    self._transform, self._seen = transform, seen

  def update(self, grads, *args):
    self._seen.append(grads)
    return self._transform.update(grads, *args)


@pytest.fixture(scope='module')
def gradients(small):
  """name, mesh axes, parts -> (loss, memory, gradient of the student, of the teachers) in the first
  step.
  """

  @functools.cache
  def make(name, *, accumulate=1, **axes):
    method = small.method(name, schedule=dict(accumulate=accumulate), mesh=axes)
    mesh = small.mesh(8 if axes else 1, **axes)
    state = small.place(method, mesh, small.host_state(name))

    @jax.jit
    def both(state, batch):
      rng = jax.random.fold_in(jax.random.key(method.config.seed), state.step)
      loss = lambda params, teachers: step_lib.loss(
        method, params, state.replace(teachers=teachers), batch, rng
      )
      return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state.params, state.teachers)

    with jax.set_mesh(mesh):
      (value, (memory, *_)), (student, teachers) = both(state, small.batch(method, mesh=mesh))
    student = optim.split(method.config, student)[0]  # of the others the step forms none
    return jax.tree.map(np.asarray, (value, memory, student, teachers))

  return make


def norm(grads):
  return np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))


def assert_same(got, stepped, relative=1e-5):
  """Loss, memory and gradient; the latter relative to the gradient's norm (parameters after Adam
  amplify noise).
  """
  (loss, memory, grads, _), (_, states, metrics, want) = got, stepped
  np.testing.assert_allclose(loss, metrics[0]['loss'], rtol=relative)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), memory, states[1].loss_state
  )
  assert norm(jax.tree.map(lambda a, b: a - b, grads, want)) < relative * norm(want)


def equal(a, b):
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=True), a, b)))


# Left out on the newest Python: their parts are those of other methods, which run there; of lightclip
# the step is traced and compiled there (test_lightclip.py, test_plan.py), its numbers are not tested.
ALIKE = ('tips_distill', 'silc', 'umg_clip', 'lightclip')


def once_if_alike(*names):
  """Parameters for pytest, those that are ALIKE marked."""
  return [pytest.param(name, marks=[pytest.mark.once] if name in ALIKE else []) for name in names]


# --- golden -------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', once_if_alike(*NAMES, 'lightclip'))
def test_golden(name, stepper, request):
  _, states, metrics, _ = stepper(name)
  numbers = {f'step {i + 1}': m for i, m in enumerate(metrics)}
  numbers['norms'] = {t: float(norm(p)) for t, p in states[2].params.items()}
  numbers['moved'] = {
    t: float(norm(jax.tree.map(lambda a, b: a - b, p, states[0].params[t])))
    for t, p in states[2].params.items()
  }
  known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
  if 'UPDATE_GOLDEN' in os.environ:
    GOLDEN.write_text(json.dumps({**known, name: numbers}, indent=1, sort_keys=True) + '\n')
    return
  want = known[name]
  off = [
    f'{group}.{key}: {numbers[group].get(key)}, was {value}'
    for group, values in want.items()
    for key, value in values.items()
    if not np.isclose(numbers[group].get(key, np.nan), value, rtol=1e-3, atol=1e-6)
  ]
  off += [
    f'{group}.{key}: new'
    for group, values in numbers.items()
    for key in values
    if key not in want[group]
  ]
  assert not off, '\n'.join(off) + ADVICE


# --- the same on many devices, and in parts ------------------------------------------------------


@pytest.mark.parametrize('name', once_if_alike(*NAMES))
def test_sharded_equals_replicated(name, gradients, stepper):
  assert_same(gradients(name, data=4, fsdp=2), stepper(name))


@pytest.mark.once
def test_lightclip_over_data(gradients, stepper):
  """Not with fsdp: XLA's CPU devices mix up its scattered sums (docs/lab.md)."""
  assert_same(gradients('lightclip', data=8), stepper('lightclip'))


@pytest.mark.parametrize('name', [pytest.param('tips_v1', marks=pytest.mark.once), 'tips_v2'])
def test_tensor_axis_and_parts_on_devices(name, gradients, stepper):
  assert_same(gradients(name, data=2, fsdp=2, tensor=2, accumulate=2), stepper(name))


@pytest.mark.parametrize(
  'name, parts', [('tips_v1', 4), ('mae', 2), pytest.param('silc', 4, marks=pytest.mark.once)]
)
def test_accumulated_equals_whole(name, parts, gradients, stepper):
  assert_same(gradients(name, accumulate=parts), stepper(name))


@pytest.mark.parametrize('name, mask', [('tips_v1', 'random'), ('dino_ibot', 'blocks')])
def test_masks_are_those_of_one_device(name, mask, small):
  method, masks = small.method(name), []
  for count, axes in ((1, {}), (8, dict(data=4, fsdp=2))):
    mesh = small.mesh(count, **axes)
    with jax.set_mesh(mesh):
      draw = jax.jit(lambda batch, key: step_lib.draw_mask(method, mask, batch, key))
      masks.append(
        jax.tree.map(np.asarray, draw(small.batch(method, mesh=mesh), jax.random.key(5)))
      )
  assert equal(*masks)
  slots = {'random': 12, 'blocks': 8}[mask]  # of 16 patches: three quarters, half at most
  assert masks[0]['masked_indices'].shape[-1] == slots
  np.testing.assert_array_equal(masks[0]['mask'].sum(-1), masks[0]['masked_valid'].sum(-1))


# --- teachers -----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', once_if_alike(*EMA, 'tips_distill'))
def test_no_gradient_reaches_a_teacher(name, gradients):
  _, _, student, teachers = gradients(name, data=4, fsdp=2)
  assert jax.tree.leaves(teachers) and norm(teachers) == 0 and norm(student) > 0


@pytest.mark.parametrize('name', once_if_alike(*EMA))
def test_ema_formula(name, stepper, small):
  _, states, *_ = stepper(name)
  momentum, total = (
    next(iter(small.config(name).teachers.values())).momentum,
    small.config(name).schedule.total_steps,
  )
  for i in range(2):
    m = momentum
    if isinstance(m, schema.Ramp):
      m = m.start + (m.end - m.start) * (1 - np.cos(np.pi * i / total)) / 2
    for tower, old in states[i].teachers['ema'].items():
      want = jax.tree.map(lambda t, s: m * t + (1 - m) * s, old, states[i + 1].params[tower])
      got = states[i + 1].teachers['ema'][tower]
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)
  assert not equal(states[2].teachers, states[0].teachers)


@pytest.mark.once
def test_frozen_teacher_stays(stepper):
  _, states, *_ = stepper('tips_distill')
  assert equal(states[2].teachers, states[0].teachers)
  assert 'large_image' not in states[0].params


def test_head_only_ema_needs_no_second_forward(small, monkeypatch):
  def passes(name):
    method, calls, apply = small.method(name), [], towers.apply_all

    def counting(params, tower, compute, inputs, **kwargs):
      calls.extend([tower.kind] * len(inputs))
      return apply(params, tower, compute, inputs, **kwargs)

    monkeypatch.setattr(towers, 'apply_all', counting)
    state = small.abstract(method, small.mesh())
    jax.eval_shape(
      lambda s, b: step_lib.loss(method, s.params, s, b, jax.random.key(0)),
      state,
      small.batch(method),
    )
    monkeypatch.setattr(towers, 'apply_all', apply)
    return calls.count('vit')

  assert passes('tips_v1') == 4  # clean, masked, local, teacher
  assert passes('tips_v2') == 3  # the clean pass is the teacher's too


# --- numerics -----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['tips_v1', 'mae'])
def test_non_finite_update_is_skipped(name, stepper, small):
  step, (state, *_), *_ = stepper(name)
  batch = small.batch(small.method(name))
  poison = lambda n, x: np.full_like(x, np.nan) if n == 'image/norm/scale' else x
  bad = state.replace(params=tree.map_named(poison, state.params))
  for count in (1, 2):
    after, metrics = step(bad, batch)
    assert not np.isfinite(metrics['loss'])
    for part in ('params', 'teachers', 'loss_state', 'optimizer'):
      assert equal(getattr(after, part), getattr(bad, part))
    assert (int(after.step), int(after.bad_steps), int(after.skipped)) == (count, count, count)
    bad = after
  healed, metrics = step(bad.replace(params=state.params), batch)
  assert np.isfinite(metrics['loss']) and (int(healed.bad_steps), int(healed.skipped)) == (0, 2)
  assert not equal(healed.params, state.params)


@pytest.mark.parametrize('broken', [dict(eps=0.0), dict(learning_rate=float('nan'))])
def test_an_update_that_is_not_finite_is_skipped_though_loss_and_gradient_are(broken, small):
  method = small.method('clip', unchecked=broken)
  before = small.host_state('clip')
  after, metrics = jax.jit(step_lib.make(method))(before, small.batch(method))
  assert np.isfinite(metrics['loss']) and np.isfinite(metrics['gradient_norm'])
  for part in ('params', 'teachers', 'loss_state', 'optimizer'):
    assert equal(getattr(after, part), getattr(before, part))
  assert (int(after.step), int(after.bad_steps), int(after.skipped)) == (1, 1, 1)


def with_log_temperature(state, value):
  logit = state.params['logit'] | {'log_temperature': np.float32(value)}
  return state.replace(params=state.params | {'logit': logit})


def test_the_temperature_is_clamped_after_the_update_and_leaves_its_bound(stepper, small):
  method = small.method('clip')
  batch = small.batch(method)
  step, *_ = stepper('clip')
  bound = np.float32(-np.log(100))
  beyond, _ = step(with_log_temperature(small.host_state('clip'), bound - 1), batch)
  assert beyond.params['logit']['log_temperature'] == bound
  # The pairs are random: a loss at the largest scale asks for a smaller one, and gets it.
  state = with_log_temperature(small.host_state('clip'), bound)
  gradient = jax.grad(
    lambda params: step_lib.loss(method, params, state, batch, jax.random.key(0))[0]
  )(state.params)
  assert abs(gradient['logit']['log_temperature']) > 0.1
  after, _ = step(state, batch)
  assert after.params['logit']['log_temperature'] > bound


def test_prototypes_wait_and_the_rest_moves(stepper):
  _, states, *_ = stepper('tips_v1')  # total_steps 8, frozen for 1 % of them: the first step only
  prototypes = [s.params['head']['prototypes'] for s in states]
  assert equal(prototypes[0], prototypes[1]) and not equal(prototypes[1], prototypes[2])
  assert not equal(states[0].params['head']['layer0'], states[1].params['head']['layer0'])


def test_a_step_without_the_losses_that_sleep_makes_the_same_update(small):
  late = dict(weight=dict(start=0.0, end=1.0, begin=0.5, until=1.0))
  method = small.method('tips_v1', losses=dict(distill=late, masked=late))
  names = method_lib.awake(method, 0)
  assert set(method.losses) - set(names) == {'distill', 'masked'}
  state = small.host_state('tips_v1')
  batch = small.batch(method)
  whole, expected = jax.jit(step_lib.make(method))(state, batch)
  part, metrics = jax.jit(step_lib.make(method_lib.only(method, names)))(state, batch)
  for group in ('params', 'teachers', 'optimizer'):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6),
      getattr(part, group),
      getattr(whole, group),
    )
  assert equal(part.loss_state, state.loss_state)
  absent = {name for name in expected if name.split('/')[0] in ('distill', 'masked')}
  assert len(absent) > 2 and set(metrics) == set(expected) - absent
  for name, value in metrics.items():
    np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)

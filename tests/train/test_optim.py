"""Rates, rules and updates against NumPy, on a tiny tree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tips_jax.core import schema, tree
from tips_jax.core.errors import InputError
from tips_jax.train import optim

rng = np.random.default_rng(0)


def config(*, optimizer=None, **schedule):
  return schema.Config(
    name='x',
    data=schema.Data(views={}),
    towers={},
    passes={},
    losses={},
    optimizer=optimizer or schema.Adafactor(),
    schedule=schema.Schedule(**dict(total_steps=100, batch_size=4) | schedule),
  )


@pytest.mark.parametrize(
  'shape, middle', [('linear', 3.5), ('cosine', 5 - 3 * (1 - np.cos(np.pi / 4)))]
)
def test_ramps(shape, middle):
  at = functools.partial(
    optim.ramp, schema.Ramp(start=5.0, end=-1.0, begin=0.2, until=0.6, shape=shape)
  )
  for progress, value in ((0.0, 5), (0.2, 5), (0.3, middle), (0.4, 2), (0.6, -1), (1.0, -1)):
    np.testing.assert_allclose(at(progress), value, rtol=1e-5)
  assert optim.ramp(0.7, 0.3) == 0.7 and optim.ramp('all', 0.3) == 'all'


def test_a_ramp_of_no_length_is_a_step():
  at = functools.partial(optim.ramp, schema.Ramp(start=0.0, end=1.0, begin=0.5, until=0.5))
  assert (at(0.49), at(0.5), at(0.51)) == (0, 1, 1)


@pytest.mark.parametrize('decay', ['linear', 'cosine', 'constant'])
def test_learning_rates(decay):
  o = schema.Adafactor(learning_rate=2.0)
  rates = np.array(
    [optim.learning_rate(config(optimizer=o, warmup_steps=10, decay=decay))(s) for s in range(101)]
  )
  np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
  x = np.arange(91) / 90
  after = {'linear': 2 * (1 - x), 'cosine': 1 + np.cos(np.pi * x), 'constant': 2 + 0 * x}[decay]
  np.testing.assert_allclose(rates[10:], after, rtol=1e-5, atol=1e-6)
  start = optim.learning_rate(config(optimizer=o, decay=decay))(0)
  np.testing.assert_allclose(start, 2.0)


@pytest.mark.parametrize('decay', ['linear', 'cosine'])
def test_the_rate_ends_where_it_is_told(decay):
  o = schema.Adafactor(learning_rate=2.0, final_rate=0.5)
  rate = optim.learning_rate(config(optimizer=o, warmup_steps=10, decay=decay))
  got = [rate(s) for s in (0, 10, 55, 100, 200)]
  np.testing.assert_allclose(got, [0.2, 2.0, 1.25, 0.5, 0.5], rtol=1e-6)


PARAMS = {
  'image': {'kernel': np.full((2, 3), 2.0, np.float32), 'bias': np.full(3, 2.0, np.float32)},
  'head': {'prototypes': np.full((2, 2), 2.0, np.float32)},
}
ONES = jax.tree.map(np.ones_like, PARAMS)


def moved(step, **fields):
  o = schema.Adafactor(learning_rate=0.1, weight_decay=0.5, **fields)
  new = optim.apply(PARAMS, ONES, config=config(optimizer=o, decay='constant'), step=step)
  return {
    'kernel': float(2 - new['image']['kernel'][0, 0]),
    'bias': float(2 - new['image']['bias'][0]),
    'prototypes': float(2 - new['head']['prototypes'][0, 0]),
  }


def approx(**moves):
  return pytest.approx(moves, abs=1e-6)


def test_decay_is_decoupled_and_by_name():
  assert moved(0) == approx(kernel=0.1 * (1 + 0.5 * 2), bias=0.1, prototypes=0.1)
  assert moved(0, decay_rules=(('head/.*', 0.5), ('.*', 0.0))) == approx(
    kernel=0.1, bias=0.1, prototypes=0.15
  )


def test_rates_by_name_scale_the_decay_too():
  rules = (('image/.*', 0.5), ('.*', 2.0))
  assert moved(0, lr_rules=rules) == approx(kernel=0.1, bias=0.05, prototypes=0.2)


def test_decay_may_move_with_progress():
  o = dict(learning_rate=0.1, decay_rules=(('.*', 1.0),))
  ramp = schema.Ramp(start=0.04, end=0.2, shape='cosine')
  for step, decay in ((0, 0.04), (50, 0.12), (100, 0.2)):
    c = config(optimizer=schema.Adafactor(weight_decay=ramp, **o), decay='constant')
    new = optim.apply(PARAMS, ONES, config=c, step=step)
    np.testing.assert_allclose(new['image']['bias'], 2 - 0.1 * (1 + decay * 2), rtol=1e-6)


def test_decay_may_go_with_the_schedule_alone():
  """big_vision: p - s (rate * direction + decay * p), s from 0 to 1."""
  fields = dict(decay_times='schedule', lr_rules=(('.*', 0.5),))
  o = schema.Adafactor(learning_rate=0.1, weight_decay=0.01, **fields)
  for step, share in ((4, 0.5), (10, 1.0), (55, 0.5)):
    c = config(optimizer=o, warmup_steps=10, decay='linear')
    new = optim.apply(PARAMS, ONES, config=c, step=step)
    move = share * (0.1 * 0.5 * 1 + 0.01 * 2)
    np.testing.assert_allclose(new['image']['kernel'], 2 - move, rtol=1e-6)
    np.testing.assert_allclose(new['image']['bias'], 2 - share * 0.05, rtol=1e-6)
  frozen = schema.Adafactor(weight_decay=0.01, freeze_rules=(('.*', 1.0),), **fields)
  new = optim.apply(PARAMS, ONES, config=config(optimizer=frozen), step=3)
  np.testing.assert_array_equal(new['image']['kernel'], PARAMS['image']['kernel'])


@pytest.mark.parametrize(
  'kind', [schema.Adafactor, schema.AdamW, schema.Muon, schema.Lamb], ids=lambda kind: kind.kind
)
def test_what_is_frozen_for_good_has_no_memory_and_does_not_count(kind):
  """As if it were not there: neither in the moments nor in the norm that the gradient is cut to."""
  rules = (('image/kernel', 1.0), ('text/.*', 1.0), ('.*', 0.0))
  c = config(optimizer=kind(freeze_rules=rules, clip_norm=0.5, clip_by='tower'), decay='constant')
  params = {
    'image': {'kernel': np.full((3, 3), 2, np.float32), 'bias': np.ones(3, np.float32)},
    'text': {'kernel': np.ones((2, 2), np.float32)},
  }
  trained, frozen = optim.split(c, params)
  assert [name for name, _ in tree.named_leaves(trained)] == ['image/bias']
  assert optim.join(trained, frozen).keys() == params.keys()
  jax.tree.map(np.testing.assert_array_equal, optim.join(trained, frozen), params)
  transform = optim.transform(c.optimizer)
  state = transform.init(trained)
  assert max(x.size for x in jax.tree.leaves(state)) == 3
  gradient = jax.tree.map(lambda p: 10 * p, trained)
  direction, _ = transform.update(gradient, state, trained)
  new = optim.apply(params, direction, config=c, step=1)
  assert new['image']['kernel'] is params['image']['kernel']
  assert new['text']['kernel'] is params['text']['kernel']
  alone = {'image': {'bias': params['image']['bias']}}
  state = transform.init(alone)
  direction, _ = transform.update({'image': {'bias': gradient['image']['bias']}}, state, alone)
  want = optim.apply(alone, direction, config=c, step=1)
  np.testing.assert_array_equal(new['image']['bias'], want['image']['bias'])
  assert not np.array_equal(new['image']['bias'], params['image']['bias'])


def test_rates_fall_with_the_layers_above():
  """DINOv2's layerwise_decay: 0.5^4 for the embeddings of three blocks, 0.5^3, 0.5^2, 0.5, 1."""
  block = {'up': {'kernel': np.zeros((3, 2, 2), np.float32), 'bias': np.zeros((3, 2), np.float32)}}
  tower = {
    'embedding': {'kernel': np.zeros((2, 2), np.float32)},
    'posembed': np.zeros((1, 2), np.float32),
    'encoder': {'blocks': block},
    'norm': {'scale': np.zeros(2, np.float32)},
  }
  params = {'image': tower, 'text': tower, 'head': {'layer0': np.zeros(2, np.float32)}}
  ones = jax.tree.map(np.ones_like, params)
  rules = (('(image|head)/.*', 0.5), ('.*', 1.0))
  o = schema.Adafactor(learning_rate=1.0, weight_decay=0.0, layer_decay_rules=rules)
  new = optim.apply(params, ones, config=config(optimizer=o, decay='constant'), step=0)
  first = lambda x: np.asarray(-x).reshape(len(x), -1)[:, 0]
  blocks = new['image']['encoder']['blocks']['up']
  np.testing.assert_allclose(first(blocks['kernel']), [0.125, 0.25, 0.5])
  np.testing.assert_allclose(first(blocks['bias']), [0.125, 0.25, 0.5])
  assert -new['image']['embedding']['kernel'][0, 0] == -new['image']['posembed'][0, 0] == 0.0625
  assert -new['image']['norm']['scale'][0] == -new['head']['layer0'][0] == 1
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, -1), new['text'])


def test_freezing_for_a_part_of_the_run_and_for_good():
  rules = (('head/.*', 0.3), ('.*/bias', 1.0), ('.*', 0.0))
  assert moved(29, freeze_rules=rules) == approx(kernel=0.2, bias=0, prototypes=0)
  assert moved(30, freeze_rules=rules) == approx(kernel=0.2, bias=0, prototypes=0.1)
  assert moved(100, freeze_rules=rules) == approx(kernel=0.2, bias=0, prototypes=0.1)


def test_a_leaf_without_a_rule_is_named():
  with pytest.raises(InputError, match="optimizer.lr_rules: got no rule for 'head/prototypes'"):
    moved(0, lr_rules=(('image/.*', 1.0),))


def test_ema():
  old, new = ({'a': rng.normal(size=3).astype(np.float32)} for _ in range(2))
  np.testing.assert_allclose(
    optim.ema(old, new, 0.9)['a'], 0.9 * old['a'] + 0.1 * new['a'], rtol=1e-5, atol=1e-6
  )
  np.testing.assert_array_equal(optim.ema(old, new, 1.0)['a'], old['a'])
  slow = optim.ema({'a': jnp.float32(1.0)}, {'a': jnp.float32(2.0)}, 0.9999)
  assert slow['a'] > 1 and slow['a'].dtype == jnp.float32


def directions(optimizer, gradients):
  """What `transform` makes of a sequence of gradients, and its last state."""
  transform = optim.transform(optimizer)
  state, results = transform.init(gradients[0]), []
  for g in gradients:
    d, state = transform.update(g, state, g)
    results.append(d)
  return results, state


def test_clipping_is_of_the_global_norm():
  o = lambda clip: schema.AdamW(eps=1.0, clip_norm=clip)  # first step: g / (|g| + 1)
  big, small = ({'a': np.float32([3 * s]), 'b': np.float32([4 * s])} for s in (1, 0.1))
  first = lambda clip, g: [float(x[0]) for x in jax.tree.leaves(directions(o(clip), [g])[0][0])]
  assert first(1.0, big) == pytest.approx([0.6 / 1.6, 0.8 / 1.8], rel=1e-4)
  assert first(0.0, big) == pytest.approx([3 / 4, 4 / 5], rel=1e-4)
  assert first(1.0, small) == pytest.approx([0.3 / 1.3, 0.4 / 1.4], rel=1e-4)


def test_clipping_may_be_of_each_tower():
  o = schema.AdamW(eps=1.0, clip_norm=1.0, clip_by='tower')
  g = {'image': {'a': np.float32([3]), 'b': np.float32([4])}, 'head': {'a': np.float32([0.5])}}
  got = directions(o, [g])[0][0]
  assert float(got['image']['a'][0]) == pytest.approx(0.6 / 1.6, rel=1e-4)
  assert float(got['image']['b'][0]) == pytest.approx(0.8 / 1.8, rel=1e-4)
  assert float(got['head']['a'][0]) == pytest.approx(0.5 / 1.5, rel=1e-4)


GRADIENTS = [
  {'matrix': rng.normal(size=(2, 64, 96)), 'bias': rng.normal(size=(40, 64))} for _ in range(3)
]
GRADIENTS = jax.tree.map(lambda x: (x * 0.01).astype(np.float32), GRADIENTS)


def test_adamw_is_adam():
  o = schema.AdamW(b1=0.8, b2=0.9, eps=1e-6, clip_norm=0)
  m = v = 0
  for t, (d, g) in enumerate(zip(directions(o, GRADIENTS)[0], GRADIENTS), start=1):
    m, v = 0.8 * m + 0.2 * g['bias'], 0.9 * v + 0.1 * g['bias'] ** 2
    np.testing.assert_allclose(
      d['bias'], m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6), rtol=1e-4
    )


def test_muon_turns_each_layers_matrix_orthogonal_and_leaves_the_rest_to_adam():
  """All singular values are near one times 0.2 sqrt(the longer side): the size of Adam's."""
  kernel = rng.normal(size=(2, 64, 96)).astype(np.float32) * np.float32([[[0.01]], [[10.0]]])
  gradients = {'image': {'blocks': {'kernel': kernel, 'bias': kernel[:, 0]}, 'kernel': kernel[0]}}
  got, state = directions(schema.Muon(clip_norm=0), [gradients])
  direction = got[0]['image']
  for layer in direction['blocks']['kernel']:
    values = np.linalg.svd(layer, compute_uv=False) / (0.2 * np.sqrt(96))
    assert 0.6 < values.min() and values.max() < 1.3  # after five iterations of Newton and Schulz
    assert np.sqrt(np.mean(np.square(layer))) == pytest.approx(0.2, rel=0.2)
  # The orthogonal factor keeps the singular vectors.
  u, _, v = np.linalg.svd(kernel[0], full_matrices=False)
  spectrum = np.diag(u.T @ np.asarray(direction['blocks']['kernel'][0]) @ v.T)
  assert (spectrum > 0.6 * 0.2 * np.sqrt(96)).all()
  for name, part in (('bias', direction['blocks']), ('kernel', direction)):
    adam, _ = directions(schema.AdamW(clip_norm=0), [gradients])
    expected = adam[0]['image'] if part is direction else adam[0]['image']['blocks']
    np.testing.assert_array_equal(part[name], expected[name])


def test_adafactor_factors_matrices_and_not_stacked_biases():
  _, state = directions(schema.Adafactor(), GRADIENTS[:1])
  factored = next(s for s in state if hasattr(s, 'v_row'))
  assert {factored.v_row['matrix'].shape, factored.v_col['matrix'].shape} == {(2, 64), (2, 96)}
  assert factored.v['matrix'].size == 1 and factored.v['bias'].shape == (40, 64)
  first = next(s for s in state if hasattr(s, 'ema'))
  assert {x.dtype for x in jax.tree.leaves(first.ema)} == {jnp.dtype('bfloat16')}


@pytest.mark.parametrize('cap', [0.999, 0.3])
def test_adafactor_formula(cap):
  """Shazeer and Stern, arXiv 1804.04235, algorithm 4: decay 1 - t^-0.8, capped; then a first
  moment.
  """
  results, _ = directions(schema.Adafactor(b1=0.9, b2_cap=cap, clip_norm=0), GRADIENTS)
  row = column = v = 0
  m = {'matrix': 0, 'bias': 0}
  for t, (d, g) in enumerate(zip(results, GRADIENTS), start=1):
    decay = min(1 - t**-0.8, cap)
    mix = lambda old, new: decay * old + (1 - decay) * new
    g2 = g['matrix'].astype(np.float64) ** 2
    row, column, v = (
      mix(row, g2.mean(2)),
      mix(column, g2.mean(1)),
      mix(v, g['bias'].astype(np.float64) ** 2),
    )
    second = row[:, :, None] * column[:, None, :] / row.mean(1)[:, None, None]
    for name, u in (('matrix', g['matrix'] / np.sqrt(second)), ('bias', g['bias'] / np.sqrt(v))):
      m[name] = 0.9 * m[name] + 0.1 * u
      # The moment is kept in bfloat16.
      np.testing.assert_allclose(d[name], m[name], atol=2e-2 * np.abs(m[name]).max())
      assert d[name].dtype == jnp.float32


def lamb_step(params, gradient, **changes):
  o = schema.Lamb(learning_rate=0.1, weight_decay=0.3, decay_rules=(('.*', 1.0),), **changes)
  transform = optim.transform(o)
  direction, _ = transform.update(gradient, transform.init(params), params)
  return optim.apply(params, direction, config=config(optimizer=o, decay='constant'), step=1)


def test_lamb_is_optax_lamb_where_nothing_is_bounded():
  params = {'image': {'kernel': rng.normal(size=(4, 5)), 'bias': np.zeros(5)}}
  params = jax.tree.map(jnp.float32, params)
  gradient = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params)
  found = lamb_step(params, gradient, clip_norm=0.0, trust=(0.0, 1e9))
  peer = optax.lamb(0.1, weight_decay=0.3, eps=1e-8)
  updates, _ = peer.update(gradient, peer.init(params), params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5),
    found,
    optax.apply_updates(params, updates),
  )


def test_lambs_ratio_is_bounded_and_of_each_layer():
  name = 'image/encoder/blocks/kernel'
  p = jnp.stack(
    [jnp.full((2, 3), 1e-4), jnp.ones((2, 3)), jnp.full((2, 3), 1e4), jnp.zeros((2, 3))]
  )
  d = jnp.full((4, 2, 3), 2.0)
  found = optim.trust_ratio(name, p, d, (0.01, 10.0))
  np.testing.assert_allclose(found.reshape(-1), [0.01, 0.5, 10, 1], rtol=1e-6)
  assert optim.trust_ratio('image/cls', p, d, (0.01, 10.0)).size == 1
  assert optim.trust_ratio(name, p, d * 0, (0.01, 10.0)).reshape(-1).tolist() == [1, 1, 1, 1]

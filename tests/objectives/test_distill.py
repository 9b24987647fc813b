"""Chunked, sharded self-distillation against plain NumPy and dense JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.objectives import distill
from tips_jax.objectives.chunks import Chunks

B, V, P, D, K = 8, 2, 7, 5, 12
rng = np.random.default_rng(0)


def unit(*shape):
  x = rng.normal(size=shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


STUDENT, TEACHER = unit(B, V, P, D), unit(B, V, P, D)
WS, WT = (2 * rng.normal(size=(D, K)).astype(np.float32) for _ in range(2))
CENTER = 0.3 * rng.normal(size=K).astype(np.float32)
STATE = {'center': CENTER}


def normalized(w):
  return w / (w * w).sum(0, keepdims=True) ** 0.5


def sinkhorn_reference(scores, tau, iterations=3):
  """SwAV's and DINOv2's procedure on [samples, K] scores, in float64."""
  q = np.exp(np.asarray(scores, np.float64) / tau).T
  q /= q.sum()
  k, n = q.shape
  for _ in range(iterations):
    q = q / q.sum(1, keepdims=True) / k
    q = q / q.sum(0, keepdims=True) / n
  return (q * n).T


def targets(centering, tau, iterations=3):
  scores = TEACHER @ normalized(WT)
  if centering == 'sinkhorn':
    return (
      sinkhorn_reference(scores.reshape(-1, K), tau, iterations)
      .reshape(scores.shape)
      .astype(np.float32)
    )
  q = np.exp((scores - (CENTER if centering == 'ema' else 0)) / tau)
  return q / q.sum(-1, keepdims=True)


def paired(q, pairing):
  """Targets of each student view, by loops over views."""
  if pairing == 'same':
    return q
  others = lambda v: [u for u in range(V) if pairing == 'all' or u != v]
  return np.stack([np.mean([q[:, u] for u in others(v)], axis=0) for v in range(V)], axis=1)


def dense(
  student,
  ws,
  *,
  pairing='same',
  tau_s=0.1,
  tau_t=0.07,
  centering='ema',
  reduction='mean',
  weight=1.0,
):
  q = paired(targets(centering, tau_t), pairing)
  logits = jnp.einsum('bvpd,dk->bvpk', student, normalized(ws), precision='highest') / tau_s
  loss = weight * -(q * jax.nn.log_softmax(logits)).sum(-1)
  return loss.mean() if reduction == 'mean' else loss.sum((1, 2)).mean()


def run(student=STUDENT, teacher=TEACHER, ws=WS, wt=WT, state=STATE, **args):
  return distill.dino(student, teacher, ws, wt, state=state, **args)


def close(a, b, rtol=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max() + 1e-9),
    a,
    b,
  )


@functools.cache
def expected(**args):
  return jax.jit(jax.value_and_grad(functools.partial(dense, **args), (0, 1)))(STUDENT, WS)


CASES = [  # mesh, pairing, centering, reduction, chunk
  ((1, 1), 'same', 'ema', 'mean', 64),
  ((1, 1), 'all', 'none', 'sum', 3),
  ((1, 1), 'other', 'sinkhorn', 'mean', 1),
  ((2, 1), 'same', 'sinkhorn', 'mean', 3),
  ((2, 2), 'other', 'ema', 'sum', 7),
  ((2, 4), 'all', 'sinkhorn', 'mean', 64),
]


@pytest.mark.parametrize('shape, pairing, centering, reduction, chunk', CASES)
def test_equals_the_plain_formula(mesh, shape, pairing, centering, reduction, chunk):
  args = dict(pairing=pairing, centering=centering, reduction=reduction)
  fn = lambda s, ws: run(s, ws=ws, chunk=chunk, **args).value
  with mesh(*shape):
    result = jax.jit(jax.value_and_grad(fn, (0, 1)))(STUDENT, WS)
  close(result, expected(**args))


@pytest.mark.parametrize('shape', [(1, 1), (2, 4)])
def test_temperatures_may_be_traced(mesh, shape):
  fn = lambda s, ws, ts, tt: run(s, ws=ws, student_temperature=ts, teacher_temperature=tt).value
  with mesh(*shape):
    result = jax.jit(jax.value_and_grad(fn, (0, 1)))(STUDENT, WS, np.float32(0.3), np.float32(0.2))
  close(result, expected(tau_s=0.3, tau_t=0.2))


def test_the_teacher_gets_no_gradient():
  for centering in ('ema', 'sinkhorn'):
    fn = lambda s, t, wt: run(s, t, wt=wt, centering=centering).value
    grads = jax.jit(jax.grad(fn, (0, 1, 2)))(STUDENT, TEACHER, WT)
    assert np.any(grads[0]) and not np.any(grads[1]) and not np.any(grads[2])


@pytest.mark.parametrize('tau', [0.02, 0.07])
@pytest.mark.parametrize('iterations', [1, 3, 8])
def test_sinkhorn_is_that_of_swav(tau, iterations):
  scores = jnp.asarray(TEACHER @ normalized(WT))
  shard = distill.parallel._Shard(())
  offset = distill._sinkhorn(
    lambda t: t @ normalized(WT) / tau,
    TEACHER[None],
    jnp.ones((1, B, V, P, 1)),
    1 / tau,
    iterations,
    Chunks(B, P),
    shard,
  )
  q = jax.nn.softmax(scores / tau - offset)
  reference = sinkhorn_reference(scores.reshape(-1, K), tau, iterations).reshape(q.shape)
  np.testing.assert_allclose(q, reference, rtol=2e-4, atol=1e-6)


def test_sinkhorn_spreads_over_prototypes():
  skewed = (
    np.abs(TEACHER) * np.sign(WT[:, :1].T) * 0.5 + 0.5 * TEACHER
  )  # most tokens like the same prototypes
  use = lambda centering: run(teacher=skewed, centering=centering, sinkhorn_iterations=50).metrics[
    'prototype_use'
  ]
  assert use('sinkhorn') > 0.99 and use('none') < 0.8


@pytest.mark.parametrize('tokens', [6, 13])
def test_chunks_change_nothing(tokens):
  s, t = unit(4, 2, tokens, D), unit(4, 2, tokens, D)
  fn = lambda chunk: jax.jit(lambda s, t: run(s, t, chunk=chunk))(s, t)
  whole = fn(64)
  for chunk in (1, 4):
    close(fn(chunk), whole)


def counted(valid, reduction, centering):
  """The loss of the tokens that count, view by view, targets of these tokens alone."""

  def loss(student, ws):
    q = np.zeros((B, V, P, K), np.float32)
    if centering == 'sinkhorn':
      q[valid] = sinkhorn_reference((TEACHER @ normalized(WT))[valid], 0.07)
    else:
      q[valid] = targets(centering, 0.07)[valid]
    logits = jnp.einsum('bvpd,dk->bvpk', student, normalized(ws), precision='highest') / 0.1
    cost = -(q * jax.nn.log_softmax(logits)).sum(-1)
    if reduction == 'sum':
      return cost.sum((1, 2)).mean()
    return (cost.sum(-1) / np.maximum(valid.sum(-1), 1)).mean()

  return jax.jit(jax.value_and_grad(loss, (0, 1)))(STUDENT, WS)


@pytest.mark.parametrize('shape', [(1, 1), (2, 4)])
@pytest.mark.parametrize(
  'centering, reduction, more',
  [
    ('ema', 'sum', {}),
    ('sinkhorn', 'mean', {}),
    ('ema', 'mean', dict(packed=1)),
    ('sinkhorn', 'mean', dict(packed=1)),
    ('sinkhorn', 'sum', dict(packed=1, sinkhorn_memory=0)),
  ],
)
def test_tokens_that_do_not_count_change_nothing(mesh, shape, centering, reduction, more):
  luck = np.random.default_rng(1)
  valid = luck.random((B, V, P)) < 0.4
  valid[1] = False  # an image without any
  args = dict(centering=centering, reduction=reduction, chunk=16) | more
  fn = lambda s, ws: run(s, ws=ws, valid=valid, **args).value
  with mesh(*shape):
    result = jax.jit(jax.value_and_grad(fn, (0, 1)))(STUDENT, WS)
  close(result, counted(valid, reduction, centering))
  # Metrics and the center are of the tokens that count: whatever the others are.
  other = np.where(valid[..., None], TEACHER, STUDENT)
  with mesh(*shape):
    first, second = (
      jax.jit(lambda t: run(teacher=t, valid=valid, **args))(t) for t in (TEACHER, other)
    )
  close(second, first)
  center = 0.9 * CENTER + 0.1 * (TEACHER[valid].mean(0) @ normalized(WT))
  close(first.state['center'], center)


def test_all_valid_is_none_and_none_valid_costs_nothing():
  close(run(valid=np.ones((B, V, P), bool)), run())
  nothing = run(valid=np.zeros((B, V, P), bool))
  assert nothing.value == 0 and all(np.isfinite(x) for x in nothing.metrics.values())


def traced(pairing, **args):
  """The program of the loss and its gradient, as text."""
  z = unit(B, V, 12, D)
  fn = lambda s, ws: run(s, z, ws, pairing=pairing, **args).value
  return str(jax.make_jaxpr(jax.value_and_grad(fn, (0, 1)))(z, WS))


def products(program):
  """How many products with the prototypes; sums that are products on a CPU ask for precision."""
  return program.count('dot_general[') - program.count('precision=(Precision.HIGHEST')


def test_no_more_than_chunk_tokens_are_held():
  # View by view, views are tokens of their image.
  for pairing, views, tokens in (('same', 1, V * 12), ('other', V, 12)):
    text = functools.partial(traced, pairing)
    held = lambda images, n: f'f32[{images},{views},{n},{K}]'
    assert held(B, tokens) in text(chunk=12 * B * V)
    few = text(chunk=5 * 12 * V)  # whole images
    assert held(B, tokens) not in few and held(4, tokens) in few
    part = text(chunk=5 * V)  # tokens in parts too
    assert held(1, tokens) not in part and held(1, 4 * tokens // 12) in part


@pytest.mark.parametrize('centering', ['ema', 'sinkhorn'])
def test_a_chunk_takes_four_products_with_the_prototypes(centering):
  """Logits of both, and the gradients of tokens and of prototypes: none is formed twice."""
  program = traced('same', centering=centering, chunk=B * V * 12)
  assert products(program) == 4 + 1  # and the center's


def test_packed_tokens_skip_the_chunks_without_any():
  """A teacher that would make everything NaN is not read where nothing counts."""
  valid = np.zeros((B, V, P), bool)
  valid[0] = True  # as many as a chunk has
  broken = np.where(valid[..., None], TEACHER, np.float32(np.inf))
  fn = lambda s, t: run(s, t, valid=valid, packed=1, centering='none').value
  value, slope = jax.jit(jax.value_and_grad(fn))(STUDENT, broken)
  expected, of_all = jax.jit(jax.value_and_grad(fn))(STUDENT, TEACHER)
  close((value, slope), (expected, of_all))


@pytest.mark.parametrize('memory, expected', [(1.0, 4), (0, 5)])
def test_sinkhorn_keeps_logits_where_memory_allows(memory, expected):
  """In chunks too; without memory the teacher's are formed in its loop as well, twice in the text:
  before anything is normalized, and after.
  """
  program = traced('same', centering='sinkhorn', chunk=B * V, sinkhorn_memory=memory)
  assert products(program) == expected + 1 + (expected == 5)


@pytest.mark.parametrize('centering', ['ema', 'sinkhorn'])
def test_logits_of_16_bits_differ_by_rounding(centering):
  """By 11 bits of a cosine, over the temperature; gradients of small weights are not lost."""
  luck = np.random.default_rng(2)
  s, t = unit(64, 1, 40, 32), unit(64, 1, 40, 32)
  ws, wt = (luck.normal(size=(32, 512)).astype(np.float32) for _ in range(2))
  state = {'center': np.zeros(512, np.float32)}

  def loss(s, ws, logits):
    return run(s, t, ws, wt, state, centering=centering, logits=logits).value

  slope = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
  (value, exact), (near_value, near) = (slope(s, ws, x) for x in ('float32', 'float16'))
  np.testing.assert_allclose(near_value, value, rtol=1e-4)
  for a, b in zip(near, exact):
    assert np.linalg.norm(a - b) < 4e-3 * np.linalg.norm(b)


def test_no_token_axis_is_one_token():
  close(run(STUDENT[:, :, 0], TEACHER[:, :, 0]), run(STUDENT[:, :, :1], TEACHER[:, :, :1]))


def test_all_pairs_local_with_global_views():
  local = unit(B, 5, D)
  q = targets('ema', 0.07)[:, :, 0].mean(1)
  logits = local @ normalized(WS) / 0.1
  loss = np.mean([-(q * jax.nn.log_softmax(logits[:, v])).sum(-1) for v in range(5)])
  np.testing.assert_allclose(run(local, TEACHER[:, :, 0], pairing='all').value, loss, rtol=1e-5)


def test_the_order_of_the_batch_does_not_matter():
  order = np.random.default_rng(1).permutation(B)
  for centering in ('ema', 'sinkhorn'):
    close(
      run(STUDENT[order], TEACHER[order], centering=centering), run(centering=centering), rtol=1e-4
    )


def test_flat_prototypes_cost_log_k():
  zero = np.zeros((B, V, P, D), np.float32)
  loss = run(zero, TEACHER, state={'center': np.zeros(K, np.float32)})
  np.testing.assert_allclose(loss.value, np.log(K), rtol=1e-5)
  loss = run(zero, zero, state={'center': np.full(K, 3.0, np.float32)})
  np.testing.assert_allclose(loss.metrics['teacher_entropy'], np.log(K), rtol=1e-5)
  np.testing.assert_allclose(loss.metrics['prototype_use'], 1, rtol=1e-5)


def test_agreement_with_the_mean_of_several_views():
  q = paired(targets('none', 0.07), 'other')
  with_mean = (q.argmax(-1) == (STUDENT @ normalized(WS)).argmax(-1)).mean()
  result = run(pairing='other', centering='none', chunk=5)
  np.testing.assert_allclose(result.metrics['agreement'], with_mean, rtol=1e-6)
  assert 0 < with_mean < 1


@pytest.mark.parametrize('shape', [(1, 1), (2, 4)])
def test_memory_and_metrics(mesh, shape):
  with mesh(*shape):
    loss = jax.jit(lambda s, t: run(s, t, chunk=3, center_momentum=0.8))(STUDENT, TEACHER)
  scores = TEACHER @ normalized(WT)
  center = 0.8 * CENTER + 0.2 * scores.mean((0, 1, 2))
  np.testing.assert_allclose(loss.state['center'], center, rtol=1e-4, atol=1e-6)
  q, s = targets('ema', 0.07), STUDENT @ normalized(WS)
  use = q.mean((0, 1, 2))
  reference = {
    'teacher_entropy': -(q * np.log(q)).sum(-1).mean(),
    'prototype_use': np.exp(-(use * np.log(use)).sum()) / K,
    'agreement': (q.argmax(-1) == s.argmax(-1)).mean(),
    'center_norm': np.linalg.norm(center),
  }
  assert set(loss.metrics) == set(reference)
  for name, value in reference.items():
    np.testing.assert_allclose(loss.metrics[name], value, rtol=1e-4, err_msg=name)


def test_memory_starts_at_zero():
  start = distill.initial_state({'teacher_prototypes': WT})
  assert start['center'].shape == (K,) and not np.any(start['center'])


def test_all_patches_are_the_masked_loss_with_a_weight_of_one():
  masked_indices = np.tile(np.arange(P), (B, V, 1))
  at = lambda z: np.take_along_axis(z, masked_indices[..., None], axis=2)
  masked = run(at(STUDENT), at(TEACHER)).value  # iBOT with every patch masked
  every = run().value  # iBOT++
  np.testing.assert_allclose(masked, every, rtol=1e-6)
  np.testing.assert_allclose(every, dense(STUDENT, WS, weight=np.ones((B, V, P))), rtol=1e-5)


@pytest.mark.parametrize(
  'args, message',
  [
    (dict(pairing='others'), "dino.pairing: got 'others'; .* did you mean 'other'"),
    (
      dict(centering='sinkhron'),
      "dino.centering: got 'sinkhron'; .* did you mean 'sinkhorn'",
    ),
    (dict(reduction='average'), "dino.reduction: got 'average'"),
    (dict(teacher=TEACHER[:, :1]), 'got 2 views of the student and 1 of the teacher'),
    (
      dict(student=STUDENT[:, :1], teacher=TEACHER[:, :1], pairing='other'),
      'expected the same number, at least two',
    ),
    (dict(student=STUDENT[:, :, :3]), 'got 3 tokens of the student and 7 of the teacher'),
    (dict(student=STUDENT[:, :, :0], teacher=TEACHER[:, :, :0]), 'at least one'),
  ],
)
def test_what_does_not_fit_is_refused(args, message):
  with pytest.raises(InputError, match=message):
    run(**args)

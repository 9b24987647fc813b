"""Self-distillation through prototypes: DINO on CLS tokens, iBOT and iBOT++ on patches.

Logits are formed a chunk of tokens at a time from the heads' bottlenecks, where the data is.
Targets are softmax(logits / temperature - offset); the offset of each prototype comes from an EMA
center or from Sinkhorn.
"""

from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import lax

from tips_jax.core import parallel, schema
from tips_jax.core.errors import InputError
from tips_jax.core.strict import Range, unknown
from tips_jax.core.types import Loss
from tips_jax.core.vectors import traced_unit

_Temperature = Annotated[float | jax.Array, Range(1e-4, 1e4)]


def initial_state(shapes: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """The center: running mean of the teacher's logits, one float32 per prototype."""
  return {'center': jnp.zeros(shapes['teacher_prototypes'].shape[-1:])}


def dino(
  student: jax.Array,
  teacher: jax.Array,
  student_prototypes: jax.Array,
  teacher_prototypes: jax.Array,
  valid: jax.Array | None = None,
  *,
  state: Mapping[str, jax.Array],
  pairing: str = 'same',
  student_temperature: _Temperature = 0.1,
  teacher_temperature: _Temperature = 0.07,
  centering: str = 'ema',
  center_momentum: Annotated[float | jax.Array, Range(0, 1)] = 0.9,
  sinkhorn_iterations: schema.Count = 3,
  reduction: str = 'mean',
  chunk: schema.Count = 2048,
) -> Loss:
  """Cross-entropy of the teacher's prototype distribution under the student's.

  L = - sum_k softmax((t - c) / tau_t)_k log softmax(s / tau_s)_k (TIPS, eq. 1; DINO, arXiv
  2104.14294, eq. 1).

  Args:
    student, teacher: bottlenecks [B, V, D] or [B, V, P, D], unit vectors; no gradient reaches the
    teacher.
    student_prototypes, teacher_prototypes: [D, K]; columns are normalized here.
    valid: bool [B, V, P], the tokens that count, with pairing 'same'; None: all.
    state: {'center': [K]}; `center_momentum` of the old one is kept.
    pairing: 'same' view by view; 'all' every student view against the mean target of the teacher's
    views; 'other' against the mean target of the teacher's other views.
    centering: 'ema', 'sinkhorn' (SwAV, arXiv 2006.09882, eq. 3, over all tokens of the global
    batch) or 'none'.
    reduction: 'mean' over the tokens of a view, then over views (a view without any costs nothing),
    or 'sum' over both; the batch is always averaged.
    chunk: tokens, of all images and views of a device, whose logits are held at once.
  Metrics: teacher entropy, share of the prototypes in use (perplexity of the mean target / K),
  agreement of the most likely prototypes, norm of the center.
  """
  _known('pairing', pairing, ('same', 'all', 'other'))
  _known('reduction', reduction, ('mean', 'sum'))
  _known('centering', centering, ('ema', 'sinkhorn', 'none'))
  s = _tokens(student)
  t = _tokens(lax.stop_gradient(teacher))
  _check(s, t, pairing, valid)
  counted_s = _counted(valid, s)
  counted_t = _counted(valid, t)
  weights = counted_s
  if reduction == 'mean':
    of_view = jnp.maximum(counted_s.sum(-1, keepdims=True), 1.0)
    weights = counted_s / (of_view * s.shape[1])
  ws = traced_unit(student_prototypes, axis=0)
  wt = traced_unit(lax.stop_gradient(teacher_prototypes), axis=0)
  tau_s = jnp.float32(student_temperature)
  tau_t = jnp.float32(teacher_temperature)

  def local(batch, shared, shard):
    s, t, weights, counted_s, counted_t = batch
    ws, wt, center = shared
    size = _chunk(s.shape[0], max(s.shape[1], t.shape[1]), s.shape[2], chunk)
    match centering:
      case 'sinkhorn':
        offset = _sinkhorn(t, counted_t, wt, tau_t, size, sinkhorn_iterations, shard)
      case 'ema':
        offset = center / tau_t
      case 'none':
        offset = 0.0

    # Checkpointed: [tokens, K] logits of all chunks would not fit, K being 32,768.
    @jax.checkpoint
    def part(s, t, weights, counted_s, counted_t):
      """Sums over the tokens of a chunk: loss, agreement, entropy and use of prototypes."""
      target = lax.stop_gradient(jax.nn.softmax(_logits(t, wt) / tau_t - offset))
      information = (target * jnp.log(target + 1e-30)).sum(-1, keepdims=True)
      entropy = -(counted_t * information).sum()
      use = (counted_t * target).sum((0, 1, 2))
      target = _pair(target, s.shape[1], pairing)
      logits = _logits(s, ws) / tau_s
      cost = -(target * jax.nn.log_softmax(logits)).sum(-1, keepdims=True)
      same = target.argmax(-1, keepdims=True) == logits.argmax(-1, keepdims=True)
      return (weights * cost).sum(), (counted_s * same).sum(), entropy, use

    def step(total, chunks):
      return jax.tree.map(jnp.add, total, part(*chunks)), None

    zero = jnp.float32(0)
    zeros = jax.tree.map(shard.varying, (zero, zero, zero, jnp.zeros(wt.shape[1])))
    chunks = [_chunks(x, size) for x in (s, t, weights, counted_s, counted_t)]
    return lax.scan(step, zeros, chunks)[0]

  batch = [s, t] + [x[..., None] for x in (weights, counted_s, counted_t)]
  loss, same, entropy, use = parallel.sum_over_batch(local, batch, (ws, wt, state['center']))
  of_teacher = jnp.maximum(counted_t.sum(), 1.0)
  use = use / of_teacher
  # Logits are linear in the tokens: the mean token gives the mean logits, without forming any.
  batch_center = (t * counted_t[..., None]).sum((0, 1, 2)) / of_teacher @ wt
  center = center_momentum * state['center'] + (1 - center_momentum) * batch_center
  perplexity = jnp.exp(-(use * jnp.log(use + 1e-30)).sum())
  metrics = {
    'teacher_entropy': entropy / of_teacher,
    'prototype_use': perplexity / wt.shape[1],
    'agreement': same / jnp.maximum(counted_s.sum(), 1.0),
    'center_norm': jnp.linalg.norm(center),
  }
  return Loss(loss / s.shape[0], metrics, {'center': center})


def _known(field, name, known):
  if name not in known:
    raise unknown(f'dino.{field}', name, known)


def _counted(valid, z):
  """1 for each token that counts, 0 for the others: float32 [B, V, P]."""
  if valid is None:
    return jnp.ones(z.shape[:3])
  return valid.astype(jnp.float32)


def _check(s, t, pairing, valid):
  if valid is not None and pairing != 'same':
    raise InputError(f"dino: got `valid` with pairing {pairing!r}; expected it with 'same'")
  _, views, tokens = s.shape[:3]
  _, teacher_views, teacher_tokens = t.shape[:3]
  if tokens != teacher_tokens or not tokens:
    raise InputError(
      f'dino: got {tokens} tokens of the student and {teacher_tokens} of the teacher; '
      'expected the same number, at least one'
    )
  expected = {'same': 'the same number', 'other': 'the same number, at least two'}
  # 'all' takes the mean over the teacher's views: any number fits.
  if pairing != 'all' and views != teacher_views or pairing == 'other' and views < 2:
    raise InputError(
      f'dino: got {views} views of the student and {teacher_views} of the teacher; '
      f'pairing {pairing!r} expected {expected[pairing]}'
    )


def _tokens(z):
  """[B, V, P, D] float32; a CLS token is the one token of its view."""
  z = z.astype(jnp.float32)
  if z.ndim == 3:
    return z[:, :, None]
  return z


def _logits(z, w):
  return jnp.einsum('...d,dk->...k', z, w, preferred_element_type=jnp.float32)


def _chunk(b, v, p, most):
  """(images, tokens of each view) of a chunk: equal parts, of at most `most` tokens in all where
  that is possible.
  """
  tokens = max(i for i in _divisors(p) if i == 1 or b * v * i <= most)
  images = max(i for i in _divisors(b) if i == 1 or i * v * tokens <= most)
  return images, tokens


def _divisors(n):
  return [i for i in range(1, n + 1) if n % i == 0]


def _chunks(z_BVPD, size):
  """[chunks, images, V, tokens, D]."""
  b, v, p, d = z_BVPD.shape
  images, tokens = size
  parts = z_BVPD.reshape(b // images, images, v, p // tokens, tokens, d)
  return jnp.moveaxis(parts, 3, 1).reshape(-1, images, v, tokens, d)


def _pair(q_BVPK, views, pairing):
  """Targets for each of the student's views."""
  if pairing == 'same':
    return q_BVPK
  mean = q_BVPK.mean(1, keepdims=True)
  if pairing == 'all':
    return jnp.broadcast_to(mean, (q_BVPK.shape[0], views, *q_BVPK.shape[2:]))
  n = q_BVPK.shape[1]
  # The mean over the others, from the mean over all.
  return (n * mean - q_BVPK) / (n - 1)


def _sinkhorn(t, counted, wt, tau, size, iterations, shard):
  """Log mass of each prototype, so that softmax(logits / tau - it) spreads the tokens evenly over
  prototypes.

  As in SwAV, prototypes are normalized first and tokens last. Only [K] numbers are kept, the logits
  are formed anew in each iteration. |logits / tau| is at most 1 / tau: the constant that the first
  sums need subtracted.
  """
  chunks = (_chunks(t, size), _chunks(counted, size))

  def iteration(i, offset):
    def step(total, chunk):
      t, counted = chunk
      x = _logits(t, wt) / tau
      # In the first iteration nothing is normalized: a constant stands in for the rows' sums.
      log_row = jnp.where(i == 0, 1 / tau, jax.nn.logsumexp(x - offset, axis=-1, keepdims=True))
      return total + (counted * jnp.exp(x - log_row)).sum((0, 1, 2)), None

    total, _ = lax.scan(step, shard.varying(jnp.zeros(wt.shape[1])), chunks)
    offset = jnp.log(jnp.maximum(shard.sum(total), 1e-30))
    # Else it grows by log(tokens / prototypes) in each iteration.
    return offset - offset.max()

  first = jnp.zeros(wt.shape[1])
  return lax.stop_gradient(lax.fori_loop(0, iterations, iteration, first))

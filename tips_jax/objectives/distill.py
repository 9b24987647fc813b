"""Self-distillation through prototypes: DINO on CLS tokens, iBOT and iBOT++ on patches.

Logits are formed a chunk of tokens at a time from the heads' bottlenecks, where the data is.
Targets are softmax(logits / temperature - offset); the offset of each prototype comes from an EMA
center or from Sinkhorn.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from tips_jax.core import parallel
from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.core.types import Loss


def initial_state(shapes: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """The center: running mean of the teacher's logits, one float32 per prototype."""
  return {'center': jnp.zeros(shapes['teacher_prototypes'].shape[-1:])}


def dino(
  student: jax.Array,
  teacher: jax.Array,
  student_prototypes: jax.Array,
  teacher_prototypes: jax.Array,
  *,
  state: Mapping[str, jax.Array],
  pairing: str = 'same',
  student_temperature: float | jax.Array = 0.1,
  teacher_temperature: float | jax.Array = 0.07,
  centering: str = 'ema',
  center_momentum: float | jax.Array = 0.9,
  sinkhorn_iterations: int = 3,
  reduction: str = 'mean',
  chunk: int = 2048,
) -> Loss:
  """Cross-entropy of the teacher's prototype distribution under the student's.

  L = - sum_k softmax((t - c) / tau_t)_k log softmax(s / tau_s)_k (TIPS, eq. 1; DINO, arXiv
  2104.14294, eq. 1).

  Args:
    student, teacher: bottlenecks [B, V, D] or [B, V, P, D], unit vectors; no gradient reaches the
    teacher.
    student_prototypes, teacher_prototypes: [D, K]; columns are normalized here.
    state: {'center': [K]}; `center_momentum` of the old one is kept.
    pairing: 'same' view by view; 'all' every student view against the mean target of the teacher's
    views;
      'other' against the mean target of the teacher's other views.
    centering: 'ema', 'sinkhorn' (SwAV, arXiv 2006.09882, eq. 3, over all tokens of the global
    batch) or 'none'.
    reduction: 'mean' over views and tokens, or 'sum' over them; the batch is always averaged.
    chunk: tokens, of all images and views of a device, whose logits are held at once.
  Metrics: teacher entropy, share of the prototypes in use (perplexity of the mean target / K),
  agreement of the most likely prototypes, norm of the center.
  """
  for what, name, known in (
    ('pairing', pairing, ('same', 'all', 'other')),
    ('reduction', reduction, ('mean', 'sum')),
    ('centering', centering, ('ema', 'sinkhorn', 'none')),
  ):
    if name not in known:
      raise unknown(f'dino.{what}', name, known)
  s, t = _tokens(student), _tokens(lax.stop_gradient(teacher))
  _check(s, t, pairing)
  ws, wt = _unit_columns(student_prototypes), _unit_columns(lax.stop_gradient(teacher_prototypes))
  tau_s, tau_t = jnp.float32(student_temperature), jnp.float32(teacher_temperature)

  def local(batch, shared, shard):
    s, t = batch
    ws, wt, center = shared
    rows = shard.sum(jnp.float32(s.shape[0]))
    size = _chunk(s.shape[0], max(s.shape[1], t.shape[1]), s.shape[2], chunk)
    if centering == 'sinkhorn':
      offset = _sinkhorn(t, wt, tau_t, size, sinkhorn_iterations, shard)
    else:
      offset = center / tau_t if centering == 'ema' else 0.0

    @jax.checkpoint
    def part(s, t):
      q = lax.stop_gradient(jax.nn.softmax(_logits(t, wt) / tau_t - offset))
      entropy, use = -(q * jnp.log(q + 1e-30)).sum(-1).mean((1, 2)).sum(), q.mean((1, 2)).sum(0)
      q = _pair(q, s.shape[1], pairing)
      logits = _logits(s, ws) / tau_s
      loss = -(q * jax.nn.log_softmax(logits)).sum(-1)
      same = (q.argmax(-1) == logits.argmax(-1)).astype(jnp.float32)
      return loss.sum(), same.mean((1, 2)).sum(), entropy, use

    def step(total, chunks):
      return jax.tree.map(jnp.add, total, part(*chunks)), None

    zero = jax.tree.map(
      shard.varying, (jnp.float32(0), jnp.float32(0), jnp.float32(0), jnp.zeros(wt.shape[1]))
    )
    total, _ = lax.scan(step, zero, (_chunks(s, size), _chunks(t, size)))
    loss, *means = jax.tree.map(lambda x: x / rows, total)
    return loss, *(
      x * size[1] / s.shape[2] for x in means
    )  # means over a chunk's tokens -> over all

  loss, same, entropy, use = parallel.sum_over_batch(local, (s, t), (ws, wt, state['center']))
  if reduction == 'mean':
    loss = loss / (s.shape[1] * s.shape[2])
  batch_center = t.mean((0, 1, 2)) @ wt
  center = center_momentum * state['center'] + (1 - center_momentum) * batch_center
  perplexity = jnp.exp(-(use * jnp.log(use + 1e-30)).sum())
  metrics = {
    'teacher_entropy': entropy,
    'prototype_use': perplexity / wt.shape[1],
    'agreement': same,
    'center_norm': jnp.linalg.norm(center),
  }
  return Loss(loss, metrics, {'center': center})


def _check(s, t, pairing):
  (_, views, tokens), (_, teacher_views, teacher_tokens) = s.shape[:3], t.shape[:3]
  if tokens != teacher_tokens or not tokens:
    raise InputError(
      f'dino: got {tokens} tokens of the student and {teacher_tokens} of the teacher; '
      'expected the same number, at least one'
    )
  if pairing != 'all' and views != teacher_views or pairing == 'other' and views < 2:
    raise InputError(
      f'dino: got {views} views of the student and {teacher_views} of the teacher; '
      f'pairing {pairing!r} expected the same '
      f'number{", at least two" if pairing == "other" else ""}'
    )


def _tokens(z):
  z = z.astype(jnp.float32)
  return z[:, :, None] if z.ndim == 3 else z


def _unit_columns(w):
  w = w.astype(jnp.float32)
  return w * lax.rsqrt(jnp.maximum(jnp.sum(w * w, axis=0, keepdims=True), 1e-12))


def _logits(z, w):
  return jnp.einsum('...d,dk->...k', z, w, preferred_element_type=jnp.float32)


def _chunk(b, v, p, most):
  """(images, tokens of each view) of a chunk: equal parts, of at most `most` tokens in all where
  that is possible.
  """
  divisors = lambda n: [i for i in range(1, n + 1) if n % i == 0]
  tokens = max(i for i in divisors(p) if i == 1 or b * v * i <= most)
  return max(i for i in divisors(b) if i == 1 or i * v * tokens <= most), tokens


def _chunks(z_BVPD, size):
  (b, v, p, d), (images, tokens) = z_BVPD.shape, size
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
  return (n * mean - q_BVPK) / (n - 1)


def _sinkhorn(t, wt, tau, size, iterations, shard):
  """Log mass of each prototype, so that softmax(logits / tau - it) spreads the tokens evenly over
  prototypes.

  As in SwAV, prototypes are normalized first and tokens last. Only [K] numbers are kept, the logits
  are formed anew in each iteration. |logits / tau| is at most 1 / tau: the constant that the first
  sums need subtracted.
  """
  chunks = _chunks(t, size)

  def iteration(i, offset):
    def step(total, t):
      x = _logits(t, wt) / tau
      log_row = jnp.where(i == 0, 1 / tau, jax.nn.logsumexp(x - offset, axis=-1, keepdims=True))
      return total + jnp.exp(x - log_row).sum((0, 1, 2)), None

    total, _ = lax.scan(step, shard.varying(jnp.zeros(wt.shape[1])), chunks)
    offset = jnp.log(jnp.maximum(shard.sum(total), 1e-30))
    return offset - offset.max()  # else it grows by log(tokens / prototypes) in each iteration

  first = jnp.zeros(wt.shape[1])
  return lax.stop_gradient(lax.fori_loop(0, iterations, iteration, first))

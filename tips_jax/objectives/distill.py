"""Self-distillation through prototypes: DINO on CLS tokens, iBOT and iBOT++ on patches.

Logits are formed a chunk of tokens at a time from the heads' bottlenecks, where the data is, and
once: the gradient of a cross-entropy, softmax(s) - target, needs no more than what the loss needs,
so both are computed together.
Targets are softmax(logits / temperature - offset); the offset of each prototype comes from an EMA
center or from Sinkhorn.
"""

import math
from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tips_jax.core import parallel, schema
from tips_jax.core.errors import InputError
from tips_jax.core.strict import Range, unknown
from tips_jax.core.types import Loss
from tips_jax.core.vectors import traced_unit

# Differences of probabilities are small: times this, float16 holds them.
_SCALE = 1024.0
_PARTS = 8  # of packed tokens: chunks that may be skipped
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
  logits: str = 'float32',
  packed: Annotated[int, Range(0, 1)] = 0,
  sinkhorn_memory: Annotated[float, Range(0, 1e6)] = 1.0,
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
    logits: dtype of what products with the prototypes read and write; softmax and sums stay in
    float32. Most of the loss's time goes into reading and writing logits. 'float16' halves them:
    cosines keep 11 bits, as many as a GPU's products of float32 read (TF32). DINOv2 trains so.
    packed: 1 puts the tokens that count first on each device and skips chunks without any: where
    `valid` is false for many.
    sinkhorn_memory: GiB of the teacher's logits that a device keeps from one iteration to the next;
    more than that are formed in each again.
  Metrics: teacher entropy, share of the prototypes in use (perplexity of the mean target / K),
  agreement of the most likely prototypes, norm of the center.
  """
  _known('pairing', pairing, ('same', 'all', 'other'))
  _known('reduction', reduction, ('mean', 'sum'))
  _known('centering', centering, ('ema', 'sinkhorn', 'none'))
  _known('logits', logits, ('float32', 'float16'))
  s = _tokens(student)
  t = _tokens(lax.stop_gradient(teacher))
  _check(s, t, pairing, valid)
  counted_s = _counted(valid, s)
  counted_t = _counted(valid, t)
  weights = counted_s
  if reduction == 'mean':
    of_view = jnp.maximum(counted_s.sum(-1, keepdims=True), 1.0)
    weights = counted_s / (of_view * s.shape[1])
  # The largest is one where logits are formed, so that float16 holds them too.
  largest = jnp.maximum(weights.max(), 1e-30)
  weights = weights / largest
  batch = [s, t] + [x[..., None] for x in (weights, counted_s, counted_t)]
  if pairing == 'same':  # then a view is as good as more tokens
    batch = [x.reshape(x.shape[0], 1, -1, x.shape[-1]) for x in batch]
  share = _share(pairing, batch[0].shape[1], batch[1].shape[1])
  ws = traced_unit(student_prototypes, axis=0)
  wt = traced_unit(lax.stop_gradient(teacher_prototypes), axis=0)
  tau_s = jnp.float32(student_temperature)
  tau_t = jnp.float32(teacher_temperature)

  def local(batch, shared, shard):
    ws, wt, center = shared
    ws = shard.varying(ws)  # its gradient is summed over the devices
    order = None
    most = chunk
    s = batch[0]
    if packed and valid is not None:
      order = jnp.argsort(-batch[3].reshape(-1))  # those that count first
      batch = [jnp.take(x.reshape(-1, x.shape[-1]), order, 0)[None, None] for x in batch]
      most = min(chunk, max(1, order.size // _PARTS))
    size = _chunk(batch[0].shape[0], max(x.shape[1] for x in batch), batch[0].shape[2], most)
    chunks = [_chunks(x, size) for x in lax.stop_gradient(batch)]

    def where_any_counts(compute, otherwise, *chunk):
      """compute(*chunk), of which the last array says what counts; otherwise(*chunk) if none."""
      if order is None:
        return compute(*chunk)
      return lax.cond(chunk[-1].any(), compute, otherwise, *chunk)

    def zeros(*shape, dtype=jnp.float32):
      return shard.varying(jnp.zeros(shape, dtype))

    cosines = lambda t: _cosines(t, wt, logits)
    scores = lambda cosines: cosines.astype(jnp.float32) / tau_t
    kept = math.prod(chunks[1].shape[:-1]) * wt.shape[1] * jnp.dtype(logits).itemsize
    if len(chunks[1]) == 1 or centering == 'sinkhorn' and kept <= sinkhorn_memory * 2**30:

      def once(chunk):
        return where_any_counts(
          lambda t, _: _cosines(t, wt, logits),
          lambda t, _: zeros(*t.shape[:-1], wt.shape[1], dtype=logits),
          *chunk,
        )

      # Formed once, for all iterations and the loss.
      chunks[1] = lax.map(once, (chunks[1], chunks[4]))
      cosines = lambda cosines: cosines
    match centering:
      case 'sinkhorn':
        offset = _sinkhorn(
          lambda t: scores(cosines(t)),
          chunks[1],
          chunks[4],
          1 / tau_t,
          sinkhorn_iterations,
          shard,
          where_any_counts,
        )
      case 'ema':
        offset = center / tau_t
      case 'none':
        offset = 0.0

    def computed(total, s, t, weights, counted_s, counted_t):
      teacher = cosines(t)
      sums, gradient = _part(
        scores(teacher) - offset,
        scores(lax.optimization_barrier(teacher)) - offset,
        s,
        lax.stop_gradient(ws),
        weights,
        counted_s,
        counted_t,
        tau_s,
        share,
        logits,
      )
      return jax.tree.map(jnp.add, total, sums), gradient

    def skipped(total, s, *_):
      return total, zeros(*s.shape)

    def part(total, chunk):
      return where_any_counts(computed, skipped, total, *chunk)

    totals = (*(zeros() for _ in range(3)), zeros(wt.shape[1]), zeros(*ws.shape))
    sums, of_tokens = lax.scan(part, totals, chunks)
    loss, same, entropy, use, of_prototypes = sums
    of_tokens = _joined(of_tokens, batch[0].shape).reshape(-1, s.shape[-1])
    if order is not None:
      of_tokens = jnp.take(of_tokens, jnp.argsort(order), 0)
    gradients = of_tokens.reshape(s.shape) / (_SCALE * tau_s), of_prototypes / (_SCALE * tau_s)
    return _with_gradient(loss, (s, ws), gradients), same, entropy, use

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
  return Loss(loss * largest / s.shape[0], metrics, {'center': center})


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


def _cosines(z, w, dtype):
  """Of unit vectors [..., D] and [D, K], the logits before any temperature, in `dtype`."""
  return jnp.einsum('...d,dk->...k', z.astype(dtype), w.astype(dtype), preferred_element_type=dtype)


def _chunk(b, v, p, most):
  """(images, tokens of each view) of a chunk: equal parts, of at most `most` tokens in all where
  that is possible. Whole images, as they lie in memory, before parts of their tokens.
  """

  def largest(n, of_each):
    return max(i for i in _divisors(n) if i == 1 or i * of_each <= most)

  images = largest(b, v * p)
  return images, largest(p, images * v)


def _divisors(n):
  return [i for i in range(1, n + 1) if n % i == 0]


def _chunks(z_BVPD, size):
  """[chunks, images, V, tokens, D]."""
  b, v, p, d = z_BVPD.shape
  images, tokens = size
  parts = z_BVPD.reshape(b // images, images, v, p // tokens, tokens, d)
  return jnp.moveaxis(parts, 3, 1).reshape(-1, images, v, tokens, d)


def _joined(chunks, shape):
  """[B, V, P, D] of its `_chunks`."""
  b, v, p, d = shape
  _, images, _, tokens, _ = chunks.shape
  parts = chunks.reshape(b // images, p // tokens, images, v, tokens, d)
  return jnp.moveaxis(parts, 1, 3).reshape(shape)


def _share(pairing, views, teacher_views):
  """[V, U, 1, 1]: how much of a student's view's target comes from each of the teacher's views."""
  share = np.ones((views, teacher_views), np.float32)
  if pairing == 'other':
    share -= np.eye(views, dtype=np.float32)
  return (share / share.sum(1, keepdims=True))[:, :, None, None]


def _part(x, again, s, ws, weights, counted_s, counted_t, tau, share, dtype):
  """Of a chunk's tokens: (sums of loss, agreement, entropy and use of prototypes, and the gradient
  of the student's prototypes), gradient of the student's tokens; both gradients times `_SCALE` and
  the temperature `tau`.

  x: [B, U, P, K], the teacher's logits, ready for the softmax; s: [B, V, P, D]. `again` is x too,
  for another reading: XLA would write what two reductions along different axes share.

  Sums over prototypes are taken before anything is normalized, each of [tokens, K] that is in
  memory: these reads and writes are what the loss costs.
  """
  y = _cosines(s, ws, dtype).astype(jnp.float32) / tau
  x_max = x.max(-1, keepdims=True)
  x -= x_max
  y -= y.max(-1, keepdims=True)
  p = jnp.exp(x)
  q = jnp.exp(y)
  p_sum = p.sum(-1, keepdims=True)
  q_sum = q.sum(-1, keepdims=True)
  information = (p * x).sum(-1, keepdims=True) / p_sum - jnp.log(p_sum)
  overlap = (p[:, None] * y[:, :, None]).sum(-1, keepdims=True) / p_sum[:, None]
  cost = jnp.log(q_sum) - (share * overlap).sum(2)
  p /= p_sum
  target = (share * p[:, None]).sum(2)
  if x.shape[1] > 1:  # the most likely one is that of the mean
    x = jnp.log(target / target.max(-1, keepdims=True))
  # No index of the largest: its reduction would be one more reading. Up to rounding.
  same = jnp.minimum(x, y).max(-1, keepdims=True) > -1e-4
  slope = (_SCALE * (q / q_sum - target)).astype(dtype)

  def product(subscripts, x):
    return jnp.einsum(subscripts, x.astype(dtype), slope, preferred_element_type=jnp.float32)

  sums = (
    (weights * cost).sum(),
    (counted_s * same).sum(),
    -(counted_t * information).sum(),
    (counted_t / p_sum * jnp.exp(again - x_max)).sum((0, 1, 2)),
    product('...d,...k->dk', weights * s),
  )
  return sums, weights * product('dk,...k->...d', ws)


@jax.custom_vjp
def _with_gradient(value, inputs, gradient):
  """`value`, a scalar whose gradient with respect to the `inputs` is known."""
  return value


def _known_forward(value, inputs, gradient):
  return value, gradient


def _known_backward(gradient, slope):
  return jnp.zeros_like(slope), jax.tree.map(lambda g: slope * g, gradient), None


_with_gradient.defvjp(_known_forward, _known_backward)


def _sinkhorn(scores, t, counted, bound, iterations, shard, where_any_counts):
  """Log mass of each prototype, so that softmax(scores - it) spreads the tokens evenly over
  prototypes.

  As in SwAV, prototypes are normalized first and tokens last. Only [K] numbers are kept from one
  iteration to the next. No score is above `bound`: the constant that the first sums need
  subtracted.
  """

  def offset_of(log_row):
    """log_row: scores -> log of the sum of a token's row."""

    def plus(total, t, counted):
      x = scores(t)
      return total + (counted * jnp.exp(x - log_row(x))).sum((0, 1, 2))

    def step(total, chunk):
      return where_any_counts(plus, lambda total, *_: total, total, *chunk), None

    total = shard.varying(jnp.zeros(jax.eval_shape(scores, t[0]).shape[-1]))
    total, _ = lax.scan(step, total, (t, counted))
    offset = jnp.log(jnp.maximum(shard.sum(total), 1e-30))
    # Else it grows by log(tokens / prototypes) in each iteration.
    return offset - offset.max()

  def iteration(_, offset):
    return offset_of(lambda x: jax.nn.logsumexp(x - offset, axis=-1, keepdims=True))

  # Nothing is normalized at first: a constant stands in for the rows' sums.
  offset = offset_of(lambda x: bound)
  return lax.fori_loop(1, iterations, iteration, offset)

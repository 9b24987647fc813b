"""Self-distillation through prototypes: DINO on CLS tokens, iBOT and iBOT++ on patches.

Logits are formed a chunk of tokens at a time from the heads' bottlenecks, where the data is, and
once: the gradient of a cross-entropy, softmax(s) - target, needs no more than what the loss needs,
so both are computed together.
Targets are softmax(logits / temperature - offset); the offset of each prototype comes from an EMA
center or from Sinkhorn.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tips_jax.core import parallel, schema
from tips_jax.core.errors import InputError
from tips_jax.core.strict import Range, unknown
from tips_jax.core.types import Loss
from tips_jax.core.vectors import traced_unit
from tips_jax.objectives.chunks import Chunks

# Differences of probabilities are small: times this, float16 holds them.
_SCALE = 1024.0
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
  s = _by_view(student)
  t = _by_view(lax.stop_gradient(teacher))
  _check(s, t, pairing, valid)
  tokens, largest = _tokens(s, t, valid, reduction)
  ws = traced_unit(student_prototypes, axis=0)
  wt = traced_unit(lax.stop_gradient(teacher_prototypes), axis=0)
  tau_s = jnp.float32(student_temperature)
  tau_t = jnp.float32(teacher_temperature)
  method = _Method(
    pairing=pairing,
    centering=centering,
    iterations=sinkhorn_iterations,
    memory=sinkhorn_memory,
    chunk=chunk,
    packed=bool(packed) and valid is not None,
    dtype=logits,
  )
  sums = parallel.sum_over_batch(
    functools.partial(_on_device, method, tau_s, tau_t),
    tokens.merged() if pairing == 'same' else tokens,
    (ws, wt, state['center']),
  )
  of_teacher = jnp.maximum(tokens.teacher_counts.sum(), 1.0)
  use = sums.use / of_teacher
  # Logits are linear in the tokens: the mean token gives the mean logits, without forming any.
  batch_center = (t * tokens.teacher_counts).sum((0, 1, 2)) / of_teacher @ wt
  center = center_momentum * state['center'] + (1 - center_momentum) * batch_center
  perplexity = jnp.exp(-(use * jnp.log(use + 1e-30)).sum())
  metrics = {
    'teacher_entropy': sums.entropy / of_teacher,
    'prototype_use': perplexity / wt.shape[1],
    'agreement': sums.agreement / jnp.maximum(tokens.counts.sum(), 1.0),
    'center_norm': jnp.linalg.norm(center),
  }
  return Loss(sums.loss * largest / s.shape[0], metrics, {'center': center})


class _Tokens(NamedTuple):
  """What the loss reads of tokens, of a batch or of chunks: [..., images, views, tokens, *]."""

  student: jax.Array  # bottlenecks, * = D
  teacher: jax.Array  # bottlenecks, or where they are kept cosines with the prototypes, * = K
  weights: jax.Array  # of the student's tokens in the loss, * = 1
  counts: jax.Array  # 1 for each of the student's tokens that counts, 0 for the others, * = 1
  teacher_counts: jax.Array

  def merged(self):
    """As of one view: a view is as good as more tokens where views are not paired."""
    return _Tokens(*(x.reshape(x.shape[0], 1, -1, x.shape[-1]) for x in self))


class _Sums(NamedTuple):
  """Sums over tokens: scalars, and `use` [K], of the teacher's probabilities of each prototype."""

  loss: jax.Array
  agreement: jax.Array
  entropy: jax.Array
  use: jax.Array


@dataclasses.dataclass(frozen=True)
class _Method:
  """Arguments of `dino` that are known before any data."""

  pairing: str
  centering: str
  iterations: int
  memory: float
  chunk: int
  packed: bool
  dtype: str

  def chunks(self, tokens):
    if self.packed:
      return Chunks.packed(tokens.counts, self.chunk)
    images, views, count, _ = tokens.student.shape
    return Chunks.of(images, max(views, tokens.teacher.shape[1]), count, self.chunk)

  def keeps_cosines(self, teacher, prototypes):
    """Whether the teacher's [chunks, ...] are formed once, for all iterations and the loss."""
    size = math.prod(teacher.shape[:-1]) * prototypes * jnp.dtype(self.dtype).itemsize
    fits = size <= self.memory * 2**30
    return len(teacher) == 1 or self.centering == 'sinkhorn' and fits


def _known(field, name, known):
  if name not in known:
    raise unknown(f'dino.{field}', name, known)


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


def _by_view(z):
  """[B, V, P, D] float32; a CLS token is the one token of its view."""
  z = z.astype(jnp.float32)
  if z.ndim == 3:
    return z[:, :, None]
  return z


def _tokens(s, t, valid, reduction):
  """(_Tokens, the largest weight, by which theirs are divided: where logits are formed it is one,
  so that float16 holds them too).
  """

  def counts(z):
    if valid is None:
      return jnp.ones(z.shape[:3])
    return valid.astype(jnp.float32)

  counts_s, counts_t = counts(s), counts(t)
  weights = counts_s
  if reduction == 'mean':
    of_view = jnp.maximum(counts_s.sum(-1, keepdims=True), 1.0)
    weights = counts_s / (of_view * s.shape[1])
  largest = jnp.maximum(weights.max(), 1e-30)
  return _Tokens(s, t, *(x[..., None] for x in (weights / largest, counts_s, counts_t))), largest


def _cosines(z, w, dtype):
  """Of unit vectors [..., D] and [D, K], the logits before any temperature, in `dtype`."""
  return jnp.einsum('...d,dk->...k', z.astype(dtype), w.astype(dtype), preferred_element_type=dtype)


def _scores(cosines, temperature):
  """What the softmax is taken of, but for an offset."""
  return cosines.astype(jnp.float32) / temperature


def _share(pairing, views, teacher_views):
  """[V, U, 1, 1]: how much of a student's view's target comes from each of the teacher's views."""
  share = np.ones((views, teacher_views), np.float32)
  if pairing == 'other':
    share -= np.eye(views, dtype=np.float32)
  return (share / share.sum(1, keepdims=True))[:, :, None, None]


def _on_device(method, tau_s, tau_t, tokens, shared, shard):
  """_Sums over a device's tokens, whose loss knows its gradient."""
  ws, wt, center = shared
  ws = shard.varying(ws)  # its gradient is summed over the devices
  chunks = method.chunks(tokens)
  parts = _Tokens(*map(chunks.split, lax.stop_gradient(tokens)))
  parts, cosines = _teacher_cosines(method, parts, wt, chunks, shard)
  offset = _offset(method, parts, cosines, center, tau_t, chunks, shard)

  def add(total, part):
    w = lax.stop_gradient(ws)  # here, where jax then takes what no chunk changes out of the loop
    teacher = cosines(part.teacher)
    # For two readings: XLA would write what two reductions along different axes share.
    x, again = (_scores(t, tau_t) - offset for t in (teacher, lax.optimization_barrier(teacher)))
    y = _scores(_cosines(part.student, w, method.dtype), tau_s)
    sums, slope = _part(part, x, again, y, method)
    of_prototypes, of_tokens = _products(part, slope, w, method.dtype)
    return jax.tree.map(jnp.add, total, (sums, of_prototypes)), of_tokens

  def skip(total):
    return total, zeros(*parts.student.shape[1:])

  def zeros(*shape):
    return shard.varying(jnp.zeros(shape))

  nothing = _Sums(zeros(), zeros(), zeros(), zeros(wt.shape[1])), zeros(*ws.shape)
  (sums, of_prototypes), of_tokens = chunks.scan(add, skip, nothing, parts, parts.teacher_counts)
  of_tokens = chunks.join(of_tokens, tokens.student.shape)
  gradient = of_tokens / (_SCALE * tau_s), of_prototypes / (_SCALE * tau_s)
  return sums._replace(loss=_with_gradient(sums.loss, (tokens.student, ws), gradient))


def _teacher_cosines(method, parts, wt, chunks, shard):
  """(_Tokens, function): the cosines of a chunk's teacher, formed by the function, or before."""

  def form(teacher):
    return _cosines(teacher, wt, method.dtype)

  if not method.keeps_cosines(parts.teacher, wt.shape[1]):
    return parts, form

  def skip(_):
    shape = *parts.teacher.shape[1:-1], wt.shape[1]
    return None, shard.varying(jnp.zeros(shape, method.dtype))

  _, kept = chunks.scan(
    lambda _, teacher: (None, form(teacher)), skip, None, parts.teacher, parts.teacher_counts
  )
  return parts._replace(teacher=kept), lambda kept: kept


def _offset(method, parts, cosines, center, tau_t, chunks, shard):
  """What is subtracted from the teacher's scores: a number for each prototype."""

  def scores(teacher):
    return _scores(cosines(teacher), tau_t)

  match method.centering:
    case 'sinkhorn':
      teacher = parts.teacher, parts.teacher_counts
      return _sinkhorn(scores, *teacher, 1 / tau_t, method.iterations, chunks, shard)
    case 'ema':
      return center / tau_t
    case 'none':
      return 0.0


def _part(part, x, again, y, method):
  """(_Sums of a chunk's tokens, slope of each token's loss by the scores of its student
  [B, V, P, K], times `_SCALE`).

  x: [B, U, P, K], the teacher's scores, ready for the softmax; `again` is x too; y: [B, V, P, K],
  the student's. Sums over prototypes are taken before anything is normalized, each of [tokens, K]
  that is in memory: these reads and writes are what the loss costs.
  """
  share = _share(method.pairing, y.shape[1], x.shape[1])
  x_max = x.max(-1, keepdims=True)
  x -= x_max
  y -= y.max(-1, keepdims=True)
  p = jnp.exp(x)
  q = jnp.exp(y)
  p_sum = p.sum(-1, keepdims=True)
  q_sum = q.sum(-1, keepdims=True)
  information = _over_prototypes(p, x) / p_sum - jnp.log(p_sum)
  overlap = _over_prototypes(p[:, None], y[:, :, None]) / p_sum[:, None]
  cost = jnp.log(q_sum) - (share * overlap).sum(2)
  p /= p_sum
  target = (share * p[:, None]).sum(2)
  if x.shape[1] > 1:  # the most likely one is that of the mean
    x = jnp.log(target / target.max(-1, keepdims=True))
  # No index of the largest: its reduction would be one more reading. Up to rounding.
  same = jnp.minimum(x, y).max(-1, keepdims=True) > -1e-4
  slope = (_SCALE * (q / q_sum - target)).astype(method.dtype)
  sums = _Sums(
    loss=(part.weights * cost).sum(),
    agreement=(part.counts * same).sum(),
    entropy=-(part.teacher_counts * information).sum(),
    use=_over_tokens(part.teacher_counts / p_sum, jnp.exp(again - x_max)),
  )
  return sums, slope


# On a CPU XLA takes five times as long to multiply and add numbers as for the same sums written as
# products of matrices (docs/lab.md).


def _over_prototypes(x, y):
  """Sums of products over the last axis, which stays."""
  return lax.platform_dependent(
    x,
    y,
    cpu=lambda x, y: jnp.einsum('...k,...k->...', x, y, precision='highest')[..., None],
    default=lambda x, y: (x * y).sum(-1, keepdims=True),
  )


def _over_tokens(weights, x):
  """[K]: sum over images, views and tokens of x [B, V, P, K] times weights [B, V, P, 1]."""
  return lax.platform_dependent(
    weights,
    x,
    cpu=lambda weights, x: jnp.einsum('bvpo,bvpk->k', weights, x, precision='highest'),
    default=lambda weights, x: (weights * x).sum((0, 1, 2)),
  )


def _products(part, slope, ws, dtype):
  """Gradients of the loss, times `_SCALE` and the temperature: of the prototypes, of the tokens."""

  def product(subscripts, x):
    return jnp.einsum(subscripts, x.astype(dtype), slope, preferred_element_type=jnp.float32)

  of_prototypes = product('...d,...k->dk', part.weights * part.student)
  return of_prototypes, part.weights * product('dk,...k->...d', ws)


@jax.custom_vjp
def _with_gradient(value, inputs, gradient):
  """`value`, a scalar whose gradient with respect to the `inputs` is known."""
  return value


def _known_forward(value, inputs, gradient):
  return value, gradient


def _known_backward(gradient, slope):
  return jnp.zeros_like(slope), jax.tree.map(lambda g: slope * g, gradient), None


_with_gradient.defvjp(_known_forward, _known_backward)


def _sinkhorn(scores, t, counts, bound, iterations, chunks, shard):
  """Log mass of each prototype, so that softmax(scores - it) spreads the tokens evenly over
  prototypes.

  As in SwAV, prototypes are normalized first and tokens last. Only [K] numbers are kept from one
  iteration to the next. No score is above `bound`: the constant that the first sums need
  subtracted.
  """

  def offset_of(log_row):
    """log_row: scores -> log of the sum of a token's row."""

    def add(total, part):
      t, counts = part
      x = scores(t)
      return total + _over_tokens(counts, jnp.exp(x - log_row(x))), None

    total = shard.varying(jnp.zeros(jax.eval_shape(scores, t[0]).shape[-1]))
    total, _ = chunks.scan(add, lambda total: (total, None), total, (t, counts), counts)
    offset = jnp.log(jnp.maximum(shard.sum(total), 1e-30))
    # Else it grows by log(tokens / prototypes) in each iteration.
    return offset - offset.max()

  def iteration(_, offset):
    return offset_of(lambda x: jax.nn.logsumexp(x - offset, axis=-1, keepdims=True))

  # Nothing is normalized at first: a constant stands in for the rows' sums.
  offset = offset_of(lambda x: bound)
  return lax.fori_loop(1, iterations, iteration, offset)

"""Exact attention for short sequences on TPU: one Pallas program holds whole sequences on chip,
forward and backward.

A ViT's sequences (51 to 1,026 tokens) fit into VMEM, so no logits reach memory and no running
softmax is needed. Heads stay side by side in the last axis, as the projections write them: nothing
is transposed in memory, and no head is padded to 128 lanes. A head's logits are taken over the
aligned lanes around it with the others' set to zero. They lie with keys along sublanes, and the
operands that this asks to be turned are turned on chip. The backward pass computes
the softmax again: only q, k and v are kept.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_NEVER = -1e30  # logit of a key that may not be read; finite, so that no difference is NaN
_BLOCK = 1 << 21  # bytes of one operand's block
_QUERIES = 512  # queries whose logits are held at once
_VMEM = 100 * 2**20  # bytes that a program may ask for; the compiler lowers it to what the chip has


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  key_mask: jax.Array | None = None,
  *,
  heads: int,
  interpret: bool = False,
) -> jax.Array:
  """softmax(q k^T / sqrt(d)) v for each head; softmax in float32, products in the inputs' dtype.

  Args:
    q, k, v: [B, T, heads * d], a head's d entries side by side.
    key_mask: [B, T] bool, True where a key may be read; at least one of each row.
    interpret: run the kernel's body without a TPU.
  """
  if key_mask is None:
    bias = None
  else:
    bias = jnp.where(key_mask, 0.0, _NEVER)[..., None].astype(jnp.float32)
  return _attention(heads, interpret, q, k, v, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(heads, interpret, q, k, v, bias):
  return _call(_forward, heads, interpret, (q, k, v), bias, outputs=1)[0]


def _attention_fwd(heads, interpret, q, k, v, bias):
  return _attention(heads, interpret, q, k, v, bias), (q, k, v, bias)


def _attention_bwd(heads, interpret, kept, dy):
  q, k, v, bias = kept
  return *_call(_backward, heads, interpret, (q, k, v, dy), bias, outputs=3), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _call(kernel, heads, interpret, arrays, bias, *, outputs):
  b, t, d = arrays[0].shape
  size = t * d * arrays[0].dtype.itemsize
  block = max(n for n in range(1, b + 1) if b % n == 0 and n * size <= max(_BLOCK, size))
  whole = pl.BlockSpec((block, t, d), lambda i: (i, 0, 0))
  column = pl.BlockSpec((block, t, 1), lambda i: (i, 0, 0))
  products = {1: 2, 3: 5}[outputs]
  cost = pl.CostEstimate(
    flops=products * 2 * b * t * t * d,
    transcendentals=b * heads * t * t,
    bytes_accessed=(len(arrays) + outputs) * b * size,
  )
  like = jax.eval_shape(lambda x: x, arrays[0])  # with the mesh axes that it varies over
  return pl.pallas_call(
    functools.partial(kernel, heads=heads, masked=bias is not None),
    name=kernel.__name__.strip('_') + '_attention',
    grid=(b // block,),
    in_specs=[whole] * len(arrays) + [column] * (bias is not None),
    out_specs=[whole] * outputs,
    out_shape=[like] * outputs,
    scratch_shapes=[pltpu.VMEM((d, t), arrays[0].dtype)] * 2,
    cost_estimate=cost,
    interpret=pltpu.InterpretParams() if interpret else False,
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',), vmem_limit_bytes=_VMEM),
  )(*arrays, *([bias] if bias is not None else []))


def _windows(heads, width):
  """(aligned lanes, heads whose lanes lie in exactly these) from left to right."""
  size, found = width // heads, {}
  for h in range(heads):
    begin, end = h * size // _LANES * _LANES, -(-(h + 1) * size // _LANES) * _LANES
    found.setdefault((begin, min(end, width)), []).append(h)
  return [(slice(*lanes), own) for lanes, own in found.items()]


def _lanes_of(first, last, size, lanes):
  """[1, lanes] bool: those of heads first to last."""
  lane = lax.broadcasted_iota(jnp.int32, (1, lanes.stop - lanes.start), 1) + lanes.start
  return (lane >= first * size) & (lane < (last + 1) * size)


def _dot(a, b, contract):
  """a x b over one axis of each, summed in float32."""
  return lax.dot_general(
    a, b, ((contract[:1], contract[1:]), ((), ())), preferred_element_type=jnp.float32
  )


def _weights(k, q, bias, scale):
  """(exp(logits - max), 1 / sum) with keys along sublanes, so that sums over keys need no shuffling
  of lanes.
  """
  logits = _dot(k, q, (1, 1))
  if bias is not None:
    logits = logits + bias
  p = jnp.exp2((logits - logits.max(axis=0, keepdims=True)) * (scale * math.log2(math.e)))
  return p, 1 / p.sum(axis=0, keepdims=True)


def _store(ref, i, lanes, own, size, value):
  """Writes the lanes of some heads; what others wrote beside them stays."""
  value = value.astype(ref.dtype)
  if len(own) * size < lanes.stop - lanes.start:
    value = jnp.where(_lanes_of(own[0], own[-1], size, lanes), value, ref[i, :, lanes])
  ref[i, :, lanes] = value


def _forward(q_ref, k_ref, v_ref, *refs, heads, masked):
  bias_ref, y_ref, v_turned, y_turned = refs if masked else (None, *refs)
  block, t, d = q_ref.shape
  size = d // heads

  def one(i, _):
    bias = bias_ref[i] if masked else None
    v_turned[...] = v_ref[i].T
    for lanes, own in _windows(heads, d):
      for h in own:
        k = jnp.where(_lanes_of(h, h, size, lanes), k_ref[i, :, lanes], 0)
        rows = slice(h * size, (h + 1) * size)
        for some in _some(t):
          p, inverse = _weights(k, q_ref[i, some, lanes], bias, size**-0.5)
          y_turned[rows, some] = (_dot(v_turned[rows], p.astype(k.dtype), (1, 0)) * inverse).astype(
            k.dtype
          )
    y_ref[i] = y_turned[...].T
    return _

  lax.fori_loop(0, block, one, 0)


def _backward(q_ref, k_ref, v_ref, dy_ref, *refs, heads, masked):
  bias_ref, dq_ref, dk_ref, dv_ref, k_turned, dq_turned = refs if masked else (None, *refs)
  block, t, d = q_ref.shape
  size = d // heads
  scale = size**-0.5

  def one(i, _):
    bias = bias_ref[i] if masked else None
    k_turned[...] = k_ref[i].T
    for lanes, own in _windows(heads, d):
      dk = dv = 0.0
      for h in own:
        mine = lambda x, h=h, lanes=lanes: jnp.where(_lanes_of(h, h, size, lanes), x, 0)
        k, v = mine(k_ref[i, :, lanes]), mine(v_ref[i, :, lanes])
        rows = slice(h * size, (h + 1) * size)
        for some in _some(t):
          q, dy = q_ref[i, some, lanes], dy_ref[i, some, lanes]
          p, inverse = _weights(k, q, bias, scale)
          p = p * inverse
          dp = _dot(v, dy, (1, 1))
          ds = (p * ((dp - (p * dp).sum(axis=0, keepdims=True)) * scale)).astype(q.dtype)
          dq_turned[rows, some] = _dot(k_turned[rows], ds, (1, 0)).astype(q.dtype)
          dk += _dot(ds, mine(q), (1, 0))
          dv += _dot(p.astype(q.dtype), mine(dy), (1, 0))
      _store(dk_ref, i, lanes, own, size, dk)
      _store(dv_ref, i, lanes, own, size, dv)
    dq_ref[i] = dq_turned[...].T
    return _

  lax.fori_loop(0, block, one, 0)


def _some(t):
  """Slices of the queries whose logits are held at once."""
  return [slice(first, min(first + _QUERIES, t)) for first in range(0, t, _QUERIES)]

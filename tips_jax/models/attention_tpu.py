"""Exact attention for short sequences on TPU: one Pallas program holds whole sequences on chip,
forward and backward.

A ViT's sequences (51 to 1,026 tokens) fit into VMEM, so no logits reach memory and no running
softmax is needed. Heads stay side by side in the last axis, as the projections write them: nothing
is transposed in memory, and no head is padded to 128 lanes. A head's logits are taken over the
aligned lanes around it with the others' set to zero. They lie with keys along sublanes, and the
operands that this asks to be turned are turned on chip. The backward pass computes
the softmax again: only q, k and v are kept.

A local crop of 51 tokens does not fill the chip's tiles of 8 rows: XLA lays such arrays out with
the batch inside, and would copy them for a kernel. So the crops of an image may lie behind each
other, as one sequence of several parts.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_SUBLANES = 8
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
  parts: int = 1,
  interpret: bool = False,
) -> jax.Array:
  """softmax(q k^T / sqrt(d)) v for each head; softmax in float32, products in the inputs' dtype.

  Args:
    q, k, v: [B, T, heads * d], a head's d entries side by side.
    key_mask: [B, T] bool, True where a key may be read; at least one of each part.
    parts: equal parts of the T tokens, each of which reads itself alone.
    interpret: run the kernel's body without a TPU.
  """
  bias = None
  if key_mask is not None:
    bias = jnp.where(key_mask, 0.0, _NEVER)[..., None].astype(jnp.float32)
  return _attention(_Options(heads, parts, interpret), q, k, v, bias)


def together(sequences: int, tokens: int, width: int, dtype: jax.typing.DTypeLike) -> int:
  """How many of an image's sequences should be parts of one: all that make a block of the kernel,
  and 1 where each fills its tiles.
  """
  if tokens % _SUBLANES == 0:
    return 1
  return _most(sequences, tokens * width * jnp.dtype(dtype).itemsize)


def _most(count, size):
  """The largest divisor of a count whose arrays of so many bytes make a block; at least 1."""
  return max(n for n in range(1, count + 1) if count % n == 0 and n * size <= max(_BLOCK, size))


class _Options(NamedTuple):
  """What a kernel is compiled for."""

  heads: int
  parts: int
  interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, q, k, v, bias):
  return _call(_forward, options, (q, k, v), bias, outputs=1)[0]


def _attention_fwd(options, q, k, v, bias):
  return _attention(options, q, k, v, bias), (q, k, v, bias)


def _attention_bwd(options, kept, dy):
  q, k, v, bias = kept
  return *_call(_backward, options, (q, k, v, dy), bias, outputs=3), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _call(kernel, options, arrays, bias, *, outputs):
  """Runs a kernel over the batch, as many sequences at once as make a block."""
  b, t, d = arrays[0].shape
  heads, parts, interpret = options
  length = t // parts
  size = t * d * arrays[0].dtype.itemsize
  block = _most(b, size)
  whole = pl.BlockSpec((block, t, d), lambda i: (i, 0, 0))
  in_specs = [whole] * len(arrays)
  operands = list(arrays)
  if bias is not None:
    in_specs.append(pl.BlockSpec((block, t, 1), lambda i: (i, 0, 0)))
    operands.append(bias)
  products = {1: 2, 3: 5}[outputs]
  # XLA cannot see into a kernel: it plans what to overlap with it by these numbers.
  cost = pl.CostEstimate(
    flops=products * 2 * b * t * length * d,
    transcendentals=b * heads * t * length,
    bytes_accessed=(len(arrays) + outputs) * b * size,
  )
  like = jax.eval_shape(lambda x: x, arrays[0])  # with the mesh axes that it varies over
  return pl.pallas_call(
    functools.partial(kernel, heads=heads, parts=parts, masked=bias is not None),
    name=kernel.__name__.strip('_') + '_attention',
    grid=(b // block,),
    in_specs=in_specs,
    out_specs=[whole] * outputs,
    out_shape=[like] * outputs,
    scratch_shapes=[pltpu.VMEM((d, length), arrays[0].dtype)] * 2,
    cost_estimate=cost,
    interpret=interpret and pltpu.InterpretParams(),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',), vmem_limit_bytes=_VMEM),
  )(*operands)


def _forward(q_ref, k_ref, v_ref, *refs, heads, parts, masked):
  bias_ref, y_ref, v_turned, y_turned = _with_bias(refs, masked)
  block, t, d = q_ref.shape
  size = d // heads

  def sequence(i, carry):
    for part in _equal(t, parts):
      bias = _bias(bias_ref, i, part)
      v_turned[...] = v_ref[i, part].T
      for lanes, group in _windows(heads, d):
        for h in group:
          # Zeros in the lanes of other heads leave them out of the sum, and nothing is moved.
          k = jnp.where(_lanes_of(h, h, size, lanes), k_ref[i, part, lanes], 0)
          rows = slice(h * size, (h + 1) * size)
          for queries, columns in _queries(part):
            p, inverse = _weights(k, q_ref[i, queries, lanes], bias, size**-0.5)
            # Divided after the product: it has fewer rows than there are keys.
            y = _dot(v_turned[rows], p.astype(k.dtype), (1, 0)) * inverse
            y_turned[rows, columns] = y.astype(k.dtype)
      y_ref[i, part] = y_turned[...].T
    return carry

  lax.fori_loop(0, block, sequence, 0)


def _backward(q_ref, k_ref, v_ref, dy_ref, *refs, heads, parts, masked):
  bias_ref, dq_ref, dk_ref, dv_ref, k_turned, dq_turned = _with_bias(refs, masked)
  block, t, d = q_ref.shape
  size = d // heads
  scale = size**-0.5

  def sequence(i, carry):
    for part in _equal(t, parts):
      bias = _bias(bias_ref, i, part)
      k_turned[...] = k_ref[i, part].T
      for lanes, group in _windows(heads, d):
        dk = dv = 0.0
        for h in group:
          mine = _lanes_of(h, h, size, lanes)
          k = jnp.where(mine, k_ref[i, part, lanes], 0)
          v = jnp.where(mine, v_ref[i, part, lanes], 0)
          rows = slice(h * size, (h + 1) * size)
          for queries, columns in _queries(part):
            q = q_ref[i, queries, lanes]
            dy = dy_ref[i, queries, lanes]
            p, inverse = _weights(k, q, bias, scale)
            p = p * inverse
            dp = _dot(v, dy, (1, 1))
            # Of softmax: ds = p (dp - sum p dp).
            ds = (p * ((dp - (p * dp).sum(axis=0, keepdims=True)) * scale)).astype(q.dtype)
            dq_turned[rows, columns] = _dot(k_turned[rows], ds, (1, 0)).astype(q.dtype)
            # In float32 until all queries of all heads of the window are in.
            dk += _dot(ds, jnp.where(mine, q, 0), (1, 0))
            dv += _dot(p.astype(q.dtype), jnp.where(mine, dy, 0), (1, 0))
        _store(dk_ref, i, part, lanes, group, size, dk)
        _store(dv_ref, i, part, lanes, group, size, dv)
      dq_ref[i, part] = dq_turned[...].T
    return carry

  lax.fori_loop(0, block, sequence, 0)


def _with_bias(refs, masked):
  """The references of a kernel, None in the place of a bias that there is not."""
  if masked:
    return refs
  return None, *refs


def _bias(ref, i, part):
  if ref is None:
    return None
  return ref[i, part]


def _equal(t, parts):
  """Slices of the parts of a sequence."""
  length = t // parts
  return [slice(first, first + length) for first in range(0, t, length)]


def _windows(heads, width):
  """(aligned lanes, heads whose lanes lie in exactly these) from left to right."""
  size = width // heads
  windows = {}
  for h in range(heads):
    begin = h * size // _LANES * _LANES
    end = min(pl.cdiv((h + 1) * size, _LANES) * _LANES, width)
    windows.setdefault((begin, end), []).append(h)
  return [(slice(*lanes), group) for lanes, group in windows.items()]


def _queries(part):
  """(queries whose logits are held at once, their places in the part)."""
  slices = []
  for first in range(part.start, part.stop, _QUERIES):
    last = min(first + _QUERIES, part.stop)
    slices.append((slice(first, last), slice(first - part.start, last - part.start)))
  return slices


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
  """(exp(logits - max), 1 / sum), keys along sublanes: sums over keys need no shuffling of
  lanes.
  """
  logits = _dot(k, q, (1, 1))
  if bias is not None:
    logits = logits + bias
  # The chip computes powers of two: the change of base and the scale are one product.
  p = jnp.exp2((logits - logits.max(axis=0, keepdims=True)) * (scale * math.log2(math.e)))
  return p, 1 / p.sum(axis=0, keepdims=True)


def _store(ref, i, part, lanes, group, size, value):
  """Writes the lanes of some heads; what others wrote beside them stays."""
  value = value.astype(ref.dtype)
  if len(group) * size < lanes.stop - lanes.start:
    value = jnp.where(_lanes_of(group[0], group[-1], size, lanes), value, ref[i, part, lanes])
  ref[i, part, lanes] = value

"""Which attention runs: the fastest exact kernel of the platform, or the one that a config asks
for.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tips_jax.models import attention_tpu


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  key_mask: jax.Array | None = None,
  *,
  heads: int,
  kernel: str = 'auto',
) -> jax.Array:
  """Multi-head attention of [B, T, heads * d] arrays, softmax in float32: [B, T, heads * d].

  key_mask: [B, T] bool, True where a key may be read; at least one in each row.
  kernel: 'plain' (XLA), 'fused' (Pallas, whole sequences on chip; interpreted where there is no
  TPU), 'cudnn' (NVIDIA; bfloat16), or 'auto': fused on TPU, plain elsewhere. All are the same
  function up to rounding.
  """
  platform = _platform()
  if kernel == 'auto':
    kernel = {'tpu': 'fused'}.get(platform, 'plain')
  if kernel == 'fused':
    fused = functools.partial(attention_tpu.attention, interpret=platform != 'tpu')
    return _per_head(fused, q, k, v, key_mask, heads)
  if kernel == 'plain' and platform == 'cpu':
    return _plain(q, k, v, key_mask, heads)
  y = jax.nn.dot_product_attention(
    _split(q, heads),
    _split(k, heads),
    _split(v, heads),
    mask=_over_logits(key_mask),
    implementation={'plain': 'xla', 'cudnn': 'cudnn'}[kernel],
  )
  return y.reshape(q.shape)


def _split(x, heads):
  """[B, T, heads, d] of [B, T, heads * d]."""
  return x.reshape(*x.shape[:2], heads, -1)


def _over_logits(key_mask):
  """A mask of keys [B, T] as one of logits [B, heads, T, T]."""
  if key_mask is None:
    return None
  return key_mask[:, None, None, :]


def _plain(q, k, v, key_mask, heads):
  """Attention as CPUs want it."""

  # Heads first: then each head is one matrix product, of adjacent numbers.
  def by_head(x):
    return _split(x, heads).swapaxes(1, 2)

  # The scale goes to q, of T x d numbers, and not to the T x T logits.
  scale = (q.shape[2] // heads) ** -0.5
  logits = jnp.einsum(
    'bhtd,bhsd->bhts', by_head(q * scale), by_head(k), preferred_element_type=jnp.float32
  )
  if key_mask is not None:
    # Not -inf: the difference to the maximum must not be NaN.
    logits = jnp.where(_over_logits(key_mask), logits, -1e30)
  # Any shift gives the same softmax, so no gradient has to pass through the maximum.
  p = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
  y = jnp.einsum(
    'bhts,bhsd->bhtd', p.astype(v.dtype), by_head(v), preferred_element_type=jnp.float32
  )
  # The sum too is divided out after the product, of d numbers a row and not of T.
  y = (y / p.sum(-1, keepdims=True)).astype(q.dtype)
  return y.swapaxes(1, 2).reshape(q.shape)


def _platform():
  """Platform of the mesh in use, which may be one that is compiled for and not there."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    return jax.default_backend()
  return device.platform


def _per_head(kernel, q, k, v, key_mask, heads):
  """Calls a kernel; over the tensor axis each device on its heads."""
  # The compiler cannot split a kernel: without this, every device would compute all heads.
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1
  if not mesh.empty:
    parts = mesh.shape.get('tensor', 1)
  if parts == 1 or heads % parts:
    return kernel(q, k, v, key_mask, heads=heads)
  split = P(None, None, 'tensor')
  local = jax.shard_map(
    functools.partial(kernel, heads=heads // parts),
    in_specs=(split, split, split, P()),
    out_specs=split,
    axis_names={'tensor'},
  )
  return local(q, k, v, key_mask)

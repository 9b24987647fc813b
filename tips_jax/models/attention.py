"""Which attention runs: the fastest exact kernel of the platform, or the one that a config asks
for.
"""

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
  tpu = _platform() == 'tpu'
  if kernel == 'auto':
    kernel = 'fused' if tpu else 'plain'
  if kernel == 'fused':
    return _per_head(
      lambda q, k, v, m, h: attention_tpu.attention(q, k, v, m, heads=h, interpret=not tpu),
      q,
      k,
      v,
      key_mask,
      heads,
    )
  if kernel == 'plain' and _platform() == 'cpu':
    return _plain(q, k, v, key_mask, heads)
  split = lambda x: x.reshape(*x.shape[:2], heads, -1)
  mask = None if key_mask is None else key_mask[:, None, None, :]
  implementation = 'cudnn' if kernel == 'cudnn' else 'xla'
  return jax.nn.dot_product_attention(
    split(q), split(k), split(v), mask=mask, implementation=implementation
  ).reshape(q.shape)


def _plain(q, k, v, key_mask, heads):
  """Heads first, as CPU products want them, and the sum divided out where there are d values of it,
  not T.
  """
  split = lambda x: x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
  scale = (q.shape[2] // heads) ** -0.5
  logits = jnp.einsum(
    'bhtd,bhsd->bhts', split(q * scale), split(k), preferred_element_type=jnp.float32
  )
  if key_mask is not None:
    logits = jnp.where(key_mask[:, None, None, :], logits, -1e30)
  p = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
  y = jnp.einsum('bhts,bhsd->bhtd', p.astype(v.dtype), split(v), preferred_element_type=jnp.float32)
  return (y / p.sum(-1, keepdims=True)).astype(q.dtype).swapaxes(1, 2).reshape(q.shape)


def _platform():
  """Platform of the mesh in use, which may be one that is compiled for and not there."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def _per_head(fn, q, k, v, mask, heads):
  """A kernel is no operation that the compiler can split: over the tensor axis each device calls it
  on its heads.
  """
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh.shape.get('tensor', 1)
  if parts == 1 or heads % parts:
    return fn(q, k, v, mask, heads)
  local = lambda q, k, v, mask: fn(q, k, v, mask, heads // parts)
  cut = P(None, None, 'tensor')
  return jax.shard_map(local, in_specs=(cut, cut, cut, P()), out_specs=cut, axis_names={'tensor'})(
    q, k, v, mask
  )

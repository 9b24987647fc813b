"""Which attention runs: the fastest exact kernel of the platform, or the one that a config asks
for.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tips_jax.models import attention_tpu

_CUDNN = 'cudnn'  # jax's name of it; tests take another, which CPUs have


def chosen(kernel: str, dtype: jax.typing.DTypeLike, size: int) -> str:
  """The kernel that 'auto' means on the platform in use, for heads of `size`: the fastest."""
  if kernel != 'auto':
    return kernel
  used = device()
  if used.platform == 'tpu':
    return 'fused'
  # jax cannot split cuDNN's kernel over heads inside of `parallel.map_batch`.
  if used.device_kind.startswith('NVIDIA') and not refusal(dtype, size) and _tensor() == 1:
    return 'cudnn'
  return 'plain'


def refusal(dtype: jax.typing.DTypeLike, size: int) -> str:
  """What cuDNN's kernel does not take, of all generations since A100; '' where it takes all."""
  if jnp.dtype(dtype) != jnp.bfloat16:
    return f'{dtype}; it takes bfloat16'
  if size % 8 or size > 128:
    return f'heads of {size}; it takes multiples of 8 up to 128'
  return ''


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  key_mask: jax.Array | None = None,
  *,
  heads: int,
  kernel: str = 'auto',
  parts: int = 1,
) -> jax.Array:
  """Multi-head attention of [B, T, heads * d] arrays, softmax in float32: [B, T, heads * d].

  key_mask: [B, T] bool, True where a key may be read; at least one in each part.
  parts: equal parts of the T tokens, each of which reads itself alone.
  kernel: 'plain' (XLA), 'fused' (Pallas, whole sequences on chip; interpreted where there is no
  TPU), 'cudnn' (NVIDIA; what `refusal` does not name, and tokens as `pack` puts them), or
  'auto', as `chosen` says. All are the same function up to rounding.
  """
  platform = device().platform
  kernel = chosen(kernel, q.dtype, q.shape[2] // heads)
  if kernel == 'fused':
    fused = functools.partial(attention_tpu.attention, parts=parts, interpret=platform != 'tpu')
    return _per_head(fused, q, k, v, key_mask, heads)
  if parts > 1:
    apart = [x.reshape(len(x) * parts, -1, x.shape[2]) for x in (q, k, v)]
    if key_mask is not None:
      key_mask = key_mask.reshape(len(apart[0]), -1)
    return attention(*apart, key_mask, heads=heads, kernel=kernel).reshape(q.shape)
  if kernel == 'cudnn':
    return _cudnn(q, k, v, key_mask, heads)
  if platform == 'cpu':
    return _plain(q, k, v, key_mask, heads)
  y = jax.nn.dot_product_attention(
    _split(q, heads),
    _split(k, heads),
    _split(v, heads),
    mask=_over_logits(key_mask),
    implementation='xla',
  )
  return y.reshape(q.shape)


def _cudnn(q, k, v, key_mask, heads):
  """Attention in one kernel, without logits in memory; the keys that may be read come first."""
  lengths = None
  if key_mask is not None:
    lengths = key_mask.sum(axis=1, dtype=jnp.int32)
  y = jax.nn.dot_product_attention(
    _split(q, heads),
    _split(k, heads),
    _split(v, heads),
    key_value_seq_lengths=lengths,
    implementation=_CUDNN,
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


def device():
  """A device of the mesh in use, which may be one that is compiled for and not there."""
  return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def _tensor():
  """Devices that share the heads."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 1
  return mesh.shape.get('tensor', 1)


def _per_head(kernel, q, k, v, key_mask, heads):
  """Calls a kernel; over the tensor axis each device on its heads."""
  # The compiler cannot split a kernel: without this, every device would compute all heads.
  parts = _tensor()
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


def pack(
  x_BTD: jax.Array, key_mask_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
  """Tokens as cuDNN's attention trains them: an even number, those that may be read first.

  Returns (tokens, key_mask, order); order [B, T] is None where tokens keep their places.
  """
  order = None
  if key_mask_BT is not None:
    order = jnp.argsort(~key_mask_BT, axis=1, stable=True)
    x_BTD = jnp.take_along_axis(x_BTD, order[..., None], axis=1)
    key_mask_BT = jnp.take_along_axis(key_mask_BT, order, axis=1)
  if x_BTD.shape[1] % 2:
    if key_mask_BT is None:
      key_mask_BT = jnp.ones(x_BTD.shape[:2], bool)
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, 1), (0, 0)))
    key_mask_BT = jnp.pad(key_mask_BT, ((0, 0), (0, 1)))
  return x_BTD, key_mask_BT, order


def unpack(x_BTD: jax.Array, order_BT: jax.Array | None, length: int) -> jax.Array:
  """Tokens in their places again; length: how many there were."""
  x_BTD = x_BTD[:, :length]
  if order_BT is None:
    return x_BTD
  places_BT = jnp.argsort(order_BT, axis=1)
  return jnp.take_along_axis(x_BTD, places_BT[..., None], axis=1)

"""Transformer parts. Parameters are float32; activations have the dtype of what comes in."""
import flax.linen as nn
import jax
import jax.numpy as jnp

xavier = nn.initializers.xavier_uniform()
_to_heads = nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform', in_axis=0, out_axis=(1, 2))
_from_heads = nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform', in_axis=(0, 1), out_axis=2)
_tiny = nn.initializers.normal(1e-6)


class Einsum(nn.Module):
  """y = einsum(spec, x, kernel) + bias; the bias has the kernel's output axes."""
  spec: str
  shape: tuple[int, ...]
  bias_axes: int
  kernel_init: nn.initializers.Initializer = xavier
  bias_init: nn.initializers.Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', self.kernel_init, self.shape)
    bias = self.param('bias', self.bias_init, self.shape[-self.bias_axes:])
    return jnp.einsum(self.spec, x, kernel.astype(x.dtype)) + bias.astype(x.dtype)


def dense(features_in, features_out, *, name, kernel_init=xavier, bias_init=nn.initializers.zeros):
  return Einsum('...d,df->...f', (features_in, features_out), 1, kernel_init, bias_init, name=name)


def norm(name, dtype):
  """LayerNorm with float32 statistics, eps 1e-6 as in the official JAX model."""
  return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)


class Attention(nn.Module):
  """Multi-head self-attention, softmax in float32. key_mask: [B, T] bool, True where a key may be read."""
  heads: int

  @nn.compact
  def __call__(self, x_BTD, key_mask=None):
    d = x_BTD.shape[-1]
    inner = (self.heads, d // self.heads)
    q, k, v = (Einsum('btd,dhk->bthk', (d, *inner), 2, _to_heads, name=n)(x_BTD) for n in ('query', 'key', 'value'))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    y = jax.nn.dot_product_attention(q, k, v, mask=mask)
    return Einsum('bthk,hkd->btd', (*inner, d), 1, _from_heads, name='out')(y)


class Mlp(nn.Module):
  """Feed-forward layer: `gelu` (tanh form), `relu`, or `swiglu`: swish(x W_gate) * x W_up."""
  hidden: int
  kind: str

  @nn.compact
  def __call__(self, x):
    d = x.shape[-1]
    up = dense(d, self.hidden, name='up', bias_init=_tiny)(x)
    if self.kind == 'swiglu':
      h = nn.swish(dense(d, self.hidden, name='gate', bias_init=_tiny)(x)) * up
    else:
      h = {'gelu': nn.gelu, 'relu': nn.relu}[self.kind](up)
    return dense(self.hidden, d, name='down', bias_init=_tiny)(h)


class Block(nn.Module):
  """Pre-norm transformer block. Masked positions are neither read as keys nor changed by the MLP."""
  heads: int
  mlp: int
  ffn: str
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x_BTD, key_mask=None, deterministic=True):
    drop = nn.Dropout(self.dropout, deterministic=deterministic)
    y = norm('norm1', x_BTD.dtype)(x_BTD)
    x = x_BTD + drop(Attention(self.heads, name='attention')(y, key_mask))
    y = Mlp(self.mlp, self.ffn, name='mlp')(norm('norm2', x.dtype)(x))
    if key_mask is not None:
      y = y * key_mask[..., None].astype(y.dtype)
    return x + drop(y)


_POLICIES = {'full': None, 'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Blocks(nn.Module):
  """`depth` blocks with stacked parameters [L, ...]; looped (`scan`) or unrolled, the same either way."""
  depth: int
  heads: int
  mlp: int
  ffn: str
  dropout: float
  scan: bool
  remat: str

  @nn.compact
  def __call__(self, x_BTD, key_mask=None, deterministic=True):
    block = Block
    if self.remat != 'none':
      block = nn.remat(Block, prevent_cse=not self.scan, policy=_POLICIES[self.remat], static_argnums=(3,))
    body = lambda m, x, _: (m(x, key_mask, deterministic), None)
    loop = nn.scan(body, variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True},
                   length=self.depth, unroll=1 if self.scan else self.depth)
    return loop(block(self.heads, self.mlp, self.ffn, self.dropout, name='blocks'), x_BTD, None)[0]


def gather_tokens(x_BPD, index_BM):
  """Rows `index_BM` of each image's tokens: [B, M, D]."""
  return jnp.take_along_axis(x_BPD, index_BM[..., None], axis=1)


def merge_views(x):
  """[B, V, ...] -> [B*V, ...]."""
  return x.reshape(-1, *x.shape[2:])


def sincos_positions(length, width):
  """[length, width] fixed positions, sines then cosines, timescales 1 to 1e4 (as the official text tower)."""
  scales = width // 2
  rate = jnp.exp(-jnp.arange(scales) * (jnp.log(1e4) / max(scales - 1, 1)))
  angle = jnp.arange(length)[:, None] * rate[None]
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)

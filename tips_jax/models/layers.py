"""Transformer parts. Parameters are float32; activations have the dtype of what comes in."""
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tips_jax.core import config as schema
from tips_jax.core import parallel
from tips_jax.models import attention

xavier = nn.initializers.xavier_uniform()
_tiny = nn.initializers.normal(1e-6)


def weight(module, name, init, shape, dtype):
  """A parameter of a module, in `dtype`; put together here if the devices hold parts of it."""
  if module.is_initializing():
    return module.param(name, init, shape).astype(dtype)
  value = parallel.whole(module.get_variable('params', name), dtype)
  if value.shape != tuple(shape):
    raise ValueError(f'parameter {"/".join((*module.path, name))}: got shape {value.shape}; expected {tuple(shape)}')
  return value


def keep(x):
  """Marks what the backward pass reads and only a matrix product could bring back (`compute.remat = 'products'`)."""
  return checkpoint_name(x, 'kept')


@jax.custom_vjp
def stored(x):
  """x, written to memory: else XLA on TPU computes it again for every tile of the product that reads it."""
  return jax.lax.optimization_barrier(x)


stored.defvjp(lambda x: (stored(x), None), lambda _, dy: (dy,))


class Dense(nn.Module):
  """y = x kernel + bias, over the last axis."""
  features: int
  kernel_init: nn.initializers.Initializer = xavier
  bias_init: nn.initializers.Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(self, x):
    kernel = weight(self, 'kernel', self.kernel_init, (x.shape[-1], self.features), x.dtype)
    bias = weight(self, 'bias', self.bias_init, (self.features,), x.dtype)
    return x @ kernel + bias


class Norm(nn.Module):
  """LayerNorm with float32 statistics, eps 1e-6 as in the official JAX model."""

  @nn.compact
  def __call__(self, x):
    scale = weight(self, 'scale', nn.initializers.ones, x.shape[-1:], jnp.float32)
    bias = weight(self, 'bias', nn.initializers.zeros, x.shape[-1:], jnp.float32)
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    variance = jnp.maximum(0.0, (y * y).mean(-1, keepdims=True) - mean * mean)
    return ((y - mean) * (jax.lax.rsqrt(variance + 1e-6) * scale) + bias).astype(x.dtype)


class Dropout(nn.Module):
  """Dropout drawn from the global number of each row, so that devices and their number do not change it."""
  rate: float

  @nn.compact
  def __call__(self, x, rows_B=None):
    if rows_B is None or not self.rate:
      return x
    key = self.make_rng('dropout')
    draw = lambda row: jax.random.bernoulli(jax.random.fold_in(key, row), 1 - self.rate, x.shape[1:])
    return jnp.where(jax.vmap(draw)(rows_B), x / (1 - self.rate), 0).astype(x.dtype)


class Attention(nn.Module):
  """Multi-head self-attention, softmax in float32. key_mask: [B, T] bool, True where a key may be read."""
  heads: int
  kernel: str = 'auto'

  @nn.compact
  def __call__(self, x_BTD, key_mask=None):
    d = x_BTD.shape[-1]
    q, k, v = (keep(Dense(d, name=n)(x_BTD)) for n in ('query', 'key', 'value'))
    y = attention.attention(q, k, v, key_mask, heads=self.heads, kernel=self.kernel)
    return Dense(d, name='out')(keep(y))


class Mlp(nn.Module):
  """Feed-forward layer: `gelu` (tanh form), `relu`, or `swiglu`: swish(x W_gate) * x W_up."""
  hidden: int
  kind: str

  @nn.compact
  def __call__(self, x):
    up = stored(keep(Dense(self.hidden, name='up', bias_init=_tiny)(x)))
    if self.kind == 'swiglu':
      h = nn.swish(keep(Dense(self.hidden, name='gate', bias_init=_tiny)(x))) * up
    else:
      h = {'gelu': nn.gelu, 'relu': nn.relu}[self.kind](up)
    return Dense(x.shape[-1], name='down', bias_init=_tiny)(stored(h))


class Block(nn.Module):
  """Pre-norm transformer block. Masked positions are neither read as keys nor changed by the MLP.

  rows_B: global numbers of the rows, for dropout; None: no dropout.
  """
  heads: int
  mlp: int
  ffn: str
  dropout: float
  kernel: str

  @nn.compact
  def __call__(self, x_BTD, key_mask=None, rows_B=None):
    drop = Dropout(self.dropout)
    y = Norm(name='norm1')(x_BTD)
    x = keep(x_BTD + drop(Attention(self.heads, self.kernel, name='attention')(y, key_mask), rows_B))
    y = Mlp(self.mlp, self.ffn, name='mlp')(Norm(name='norm2')(x))
    if key_mask is not None:
      y = y * key_mask[..., None].astype(y.dtype)
    return x + drop(y, rows_B)


class Blocks(nn.Module):
  """`depth` blocks with stacked parameters [L, ...]; looped (`scan`) or unrolled, the same either way."""
  depth: int
  heads: int
  mlp: int
  ffn: str
  dropout: float
  compute: schema.Compute

  @nn.compact
  def __call__(self, x_BTD, key_mask=None, rows_B=None):
    c, block = self.compute, Block
    if c.remat != 'none':
      policy = {'products': jax.checkpoint_policies.save_only_these_names('kept'), 'full': None}[c.remat]
      block = nn.remat(Block, prevent_cse=not c.scan, policy=policy)
    body = lambda m, x, _: (m(x, key_mask, rows_B), None)
    loop = nn.scan(body, variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True},
                   length=self.depth, unroll=1 if c.scan else self.depth)
    return loop(block(self.heads, self.mlp, self.ffn, self.dropout, c.attention, name='blocks'), x_BTD, None)[0]


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

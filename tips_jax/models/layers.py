"""Transformer parts. Parameters are float32; products and activations have the dtype of
`compute`.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tips_jax.core import parallel, schema
from tips_jax.models import attention, attention_tpu, quantized

Grid = tuple[int, int, int]  # tokens before the patches, and rows and columns of these

xavier = nn.initializers.xavier_uniform()
_tiny = nn.initializers.normal(1e-6)


def weight(
  module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.Array:
  """A parameter of a module, in `dtype`; put together here if the devices hold parts of it."""
  if module.is_initializing():
    return module.param(name, init, shape).astype(dtype)
  # Not by module.param: it would compare the shape with that of a part.
  value = parallel.whole(module.get_variable('params', name), dtype)
  if value.shape != tuple(shape):
    raise ValueError(
      f'parameter {"/".join((*module.path, name))}: got shape {value.shape}; expected '
      f'{tuple(shape)}'
    )
  return value


def keep(x: jax.Array) -> jax.Array:
  """Marks what the backward pass reads and only a matrix product could bring back (`compute.remat =
  'products'`).
  """
  return checkpoint_name(x, 'kept')


@jax.custom_vjp
def plus(x: jax.Array, bias_D: jax.Array) -> jax.Array:
  """x + bias, whose gradient is a matrix product, summed in float32: on TPU a fraction of the
  reduction's time.
  """
  return x + bias_D


plus.defvjp(lambda x, bias_D: (x + bias_D, None), lambda _, dy: (dy, _sum_rows(dy)))


def _sum_rows(x):
  # Behind a barrier: a compiler that sees the ones makes a reduction of the product again.
  ones = jax.lax.optimization_barrier(jnp.ones(x.shape[:-1], x.dtype))
  rows = tuple(range(x.ndim - 1))
  total = jax.lax.dot_general(ones, x, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
  return total.astype(x.dtype)


@jax.custom_vjp
def stored(x: jax.Array) -> jax.Array:
  """x, written to memory: else XLA on TPU computes it again for every tile of the product that
  reads it.
  """
  return jax.lax.optimization_barrier(x)


stored.defvjp(lambda x: (stored(x), None), lambda _, dy: (dy,))


@jax.custom_vjp
def stored_gradient(x: jax.Array) -> jax.Array:
  """x, whose gradient is written to memory: two products read it, of the inputs and of the
  weights.
  """
  return x


stored_gradient.defvjp(lambda x: (x, None), lambda _, dy: (jax.lax.optimization_barrier(dy),))


_RATE = 2 * (2 / jnp.pi) ** 0.5
_CUBE = 0.044715


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """GELU in its tanh form, x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), in float32 and rounded
  once.

  Only x is kept, and the gradient is one function of it: XLA would write the tanh to memory.
  """
  y = x.astype(jnp.float32)
  return (y * _gate(y)).astype(x.dtype)


def _gate(x):
  return jax.nn.sigmoid(_RATE * (x + _CUBE * x**3))


def _gelu_backward(x, dy):
  y = x.astype(jnp.float32)
  gate = _gate(y)
  slope = gate + y * gate * (1 - gate) * _RATE * (1 + 3 * _CUBE * y * y)
  return ((slope * dy.astype(jnp.float32)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class Dense(nn.Module):
  """y = x kernel + bias, over the last axis."""

  shape: tuple[int, int]
  dtype: jnp.dtype
  kernel_init: nn.initializers.Initializer = xavier
  bias_init: nn.initializers.Initializer = nn.initializers.zeros
  matmul: str = 'dtype'

  def setup(self) -> None:
    self.kernel = weight(self, 'kernel', self.kernel_init, self.shape, self.dtype)
    self.bias = weight(self, 'bias', self.bias_init, self.shape[1:], self.dtype)

  def __call__(self, x):
    return stored_gradient(self.product(x)) + self.bias

  def product(self, x: jax.Array) -> jax.Array:
    if self.matmul == 'int8':
      return quantized.product(x, self.kernel)
    return x @ self.kernel


class Projection(Dense):
  """Dense whose output's gradient comes from a kernel: no fusion sums it for the bias on the
  way.
  """

  def __call__(self, x):
    return plus(self.product(x), self.bias)


class Norm(nn.Module):
  """LayerNorm with float32 statistics, eps 1e-6 as in the official JAX model."""

  width: int

  def setup(self) -> None:
    self.scale = weight(self, 'scale', nn.initializers.ones, (self.width,), jnp.float32)
    self.bias = weight(self, 'bias', nn.initializers.zeros, (self.width,), jnp.float32)

  def __call__(self, x):
    y = x.astype(jnp.float32)
    mean = y.mean(-1)
    # Both moments in one reading of x; the difference may round below zero.
    variance = jnp.maximum(0.0, (y * y).mean(-1) - mean * mean)
    mean, rate = checkpoint_name((mean, jax.lax.rsqrt(variance + 1e-6)), 'statistics')
    y = y - mean[..., None]
    y = y * (rate[..., None] * self.scale) + self.bias
    return y.astype(x.dtype)


class Dropout(nn.Module):
  """Dropout drawn from the global number of each row, so that devices and their number do not
  change it.

  whole: a row is kept or dropped as one (stochastic depth, arXiv 1603.09382).
  """

  rate: float
  whole: bool = False

  def __call__(self, x, rows_B=None):
    if rows_B is None or not self.rate:
      return x
    key = self.make_rng('dropout')
    # Rows may lie behind each other, as parts of one.
    rows = x.reshape(len(rows_B), -1, x.shape[-1])
    shape = rows.shape[1:]
    if self.whole:
      shape = (1, 1)

    def kept(row):
      return jax.random.bernoulli(jax.random.fold_in(key, row), 1 - self.rate, shape)

    dropped = jnp.where(jax.vmap(kept)(rows_B), rows / (1 - self.rate), 0)
    return dropped.astype(x.dtype).reshape(x.shape)


class LayerScale(nn.Module):
  """x times a learned gain for each channel (CaiT, arXiv 2103.17239, section 2.2)."""

  width: int
  initial: float
  dtype: jnp.dtype

  def setup(self) -> None:
    init = nn.initializers.constant(self.initial)
    self.gamma = weight(self, 'gamma', init, (self.width,), self.dtype)

  def __call__(self, x):
    return x * self.gamma


class Attention(nn.Module):
  """Multi-head self-attention, softmax in float32. key_mask: [B, T] bool, True where a key may be
  read; parts: equal parts of the tokens, each of which reads itself alone.
  """

  width: int
  heads: int
  dtype: jnp.dtype
  kernel: str = 'auto'
  matmul: str = 'dtype'

  def setup(self) -> None:
    shape = (self.width, self.width)
    self.query = Projection(shape, self.dtype, matmul=self.matmul)
    self.key = Projection(shape, self.dtype, matmul=self.matmul)
    self.value = Projection(shape, self.dtype, matmul=self.matmul)
    self.out = Dense(shape, self.dtype, matmul=self.matmul)

  def __call__(self, x_BTD, key_mask=None, parts=1):
    q = keep(self.query(x_BTD))
    k = keep(self.key(x_BTD))
    v = keep(self.value(x_BTD))
    y = attention.attention(q, k, v, key_mask, heads=self.heads, kernel=self.kernel, parts=parts)
    if attention.chosen(self.kernel, self.dtype, self.width // self.heads) != 'cudnn':
      y = keep(y)  # else it is kept as the kernel gives it
    return self.out(y)

  def values(self, x_BTD: jax.Array) -> jax.Array:
    """The attention of tokens that read nothing but themselves."""
    return self.out(self.value(x_BTD))


class Mlp(nn.Module):
  """Feed-forward layer: `gelu` (tanh form), `relu`, or `swiglu`: swish(x W_gate) * x W_up."""

  width: int
  hidden: int
  kind: str
  dtype: jnp.dtype
  matmul: str = 'dtype'

  def setup(self) -> None:
    dense = functools.partial(Dense, dtype=self.dtype, bias_init=_tiny, matmul=self.matmul)
    self.up = dense((self.width, self.hidden))
    self.down = dense((self.hidden, self.width))
    if self.kind == 'swiglu':
      self.gate = dense((self.width, self.hidden))

  def __call__(self, x):
    up = keep(self.up(x))
    match self.kind:
      case 'gelu':
        h = gelu(up)
      case 'relu':
        h = nn.relu(up)
      case 'swiglu':
        h = nn.swish(keep(self.gate(x))) * up
    return self.down(stored(h))


class Block(nn.Module):
  """Pre-norm transformer block, of several batches with the weights read once.

  xs, key_masks, rows: one of each for every batch. Masked positions are neither read as keys nor
  changed by the MLP. Rows are the global numbers of the rows, for dropout; None: no dropout.
  layer_scale: the gains of the residual branches at the start; 0: there are none.
  adapter: makes a module (tokens, grid, rows) -> tokens, of which one adds to the attention's and
  one to the MLP's (models/adapters.py); grids: of each batch, for them.
  parts: of each batch, in how many equal parts its tokens lie that do not see each other.
  """

  width: int
  heads: int
  hidden: int
  ffn: str
  dropout: float
  compute: schema.Compute
  layer_scale: float = 0.0
  drop_path: float = 0.0
  adapter: Callable[[], nn.Module] | None = None
  grids: tuple[Grid, ...] | None = None
  parts: tuple[int, ...] | None = None

  def setup(self) -> None:
    c = self.compute
    dtype = jnp.dtype(c.dtype)
    self.norm1 = Norm(self.width)
    self.norm2 = Norm(self.width)
    self.attention = Attention(self.width, self.heads, dtype, c.attention, c.matmul)
    self.mlp = Mlp(self.width, self.hidden, self.ffn, dtype, c.matmul)
    self.drop = Dropout(self.dropout)
    self.drop_row = Dropout(self.drop_path, whole=True)
    if self.layer_scale:
      self.scale1 = LayerScale(self.width, self.layer_scale, dtype)
      self.scale2 = LayerScale(self.width, self.layer_scale, dtype)
    if self.adapter:
      self.adapter1 = self.adapter()
      self.adapter2 = self.adapter()

  def __call__(self, xs, key_masks, rows):
    grids = self.grids or (None,) * len(xs)
    parts = self.parts or (1,) * len(xs)
    return tuple(self.one(*each) for each in zip(xs, key_masks, rows, grids, parts))

  def one(
    self,
    x_BTD: jax.Array,
    key_mask: jax.Array | None,
    rows_B: jax.Array | None,
    grid: Grid | None = None,
    parts: int = 1,
  ) -> jax.Array:
    normed = self.normed1(x_BTD)
    y = self.drop(self.attention(normed, key_mask, parts), rows_B)
    x = x_BTD + self.drop_row(self.scaled1(y), rows_B)
    if self.adapter:
      x = x + self.drop_row(self.adapter1(normed, grid, rows_B), rows_B)
    x = keep(x)
    normed = self.normed2(x)
    y = self.mlp(normed)
    # As the official text tower: padding goes through the layers without their MLPs.
    if key_mask is not None:
      y = y * key_mask[..., None].astype(y.dtype)
    if self.adapter:
      x = x + self.drop_row(self.adapter2(normed, grid, rows_B), rows_B)
    return x + self.drop_row(self.scaled2(self.drop(y, rows_B)), rows_B)

  def values(self, x_BTD: jax.Array) -> jax.Array:
    """The block where every token's attention is its own value; adapters do what they do."""
    added = self.scaled1(self.attention.values(self.normed1(x_BTD)))
    if self.adapter:
      added += self.adapter1(self.normed1(x_BTD), self.grids[0])
    x = x_BTD + added
    added = self.scaled2(self.mlp(self.normed2(x)))
    if self.adapter:
      added += self.adapter2(self.normed2(x), self.grids[0])
    return x + added

  # Products read the dtype of `compute`, also where the residual stream is float32.

  def normed1(self, x: jax.Array) -> jax.Array:
    return self.norm1(x).astype(self.compute.dtype)

  def normed2(self, x: jax.Array) -> jax.Array:
    return self.norm2(x).astype(self.compute.dtype)

  def scaled1(self, y: jax.Array) -> jax.Array:
    return self.scale1(y) if self.layer_scale else y

  def scaled2(self, y: jax.Array) -> jax.Array:
    return self.scale2(y) if self.layer_scale else y


class Blocks(nn.Module):
  """`depth` blocks with stacked parameters [L, ...]; looped (`scan`) or unrolled, the same either
  way.

  Several batches of any shapes walk through the layers side by side: a layer's weights are gathered
  once for all. added: for each batch {number of blocks: tokens that are added after so many}, or
  None. crops: of each batch, how many rows after each other are of one image.
  """

  width: int
  depth: int
  heads: int
  mlp: int
  ffn: str
  dropout: float
  compute: schema.Compute
  layer_scale: float = 0.0
  drop_path: float = 0.0
  adapter: Callable[[], nn.Module] | None = None

  @nn.compact
  def __call__(self, xs, key_masks=None, rows=None, added=None, grids=None, crops=None):
    none = (None,) * len(xs)
    shapes = [x.shape for x in xs]
    kernel = attention.chosen(self.compute.attention, self.compute.dtype, self.width // self.heads)
    parts = None
    if kernel == 'fused' and crops and not self.adapter:  # once for all layers
      together = functools.partial(
        attention_tpu.together, width=self.width, dtype=self.compute.dtype
      )
      parts = tuple(together(n, x.shape[1]) for n, x in zip(crops, xs))
      xs = [x.reshape(len(x) // n, -1, self.width) for x, n in zip(xs, parts)]
    block = rematerialized(Block, self.compute, looped=self.compute.scan)(
      self.width,
      self.heads,
      self.mlp,
      self.ffn,
      self.dropout,
      self.compute,
      self.layer_scale,
      self.drop_path,
      self.adapter,
      grids,
      parts,
      name='blocks',
    )
    if self.compute.float32_residual:
      xs = [x.astype(jnp.float32) for x in xs]
    if kernel == 'cudnn':  # once for all layers
      if added:
        pairs = zip(added, key_masks or none)
        added = [
          {n: attention.pack(y, mask)[0] for n, y in (more or {}).items()} for more, mask in pairs
        ]
      xs, key_masks, orders = zip(*map(attention.pack, xs, key_masks or none))

    def layer(block, xs, number):
      xs = block(xs, key_masks or none, rows or none)
      if added:
        xs = tuple(_plus_those_of(number, x, more) for x, more in zip(xs, added))
      return xs, None

    unroll = self.depth
    if self.compute.scan:  # one compiled block: compile time does not grow with the depth
      unroll = 1
    loop = nn.scan(
      layer,
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      length=self.depth,
      unroll=unroll,
    )
    numbers = None
    if added:
      numbers = jnp.arange(self.depth)
    xs = loop(block, tuple(xs), numbers)[0]
    if kernel == 'cudnn':
      xs = map(attention.unpack, xs, orders, [tokens for _, tokens, _ in shapes])
    return tuple(x.reshape(shape) for x, shape in zip(xs, shapes))


def _plus_those_of(number, x_BTD, added):
  """x and the tokens that are added after the block of a number, counted from 0."""
  for after, y in (added or {}).items():
    x_BTD = x_BTD + jnp.where(number + 1 == after, y.astype(x_BTD.dtype), 0)
  return x_BTD


def rematerialized(
  block: type[nn.Module], compute: schema.Compute, *, looped: bool
) -> type[nn.Module]:
  """A kind of block, which keeps for the backward pass what `compute.remat` says."""
  # Merged with the forward pass again, nothing would be saved; in a loop it cannot be.
  remat = functools.partial(nn.remat, block, prevent_cse=not looped)
  match compute.remat:
    case 'none':
      return block
    case 'products':
      policies = jax.checkpoint_policies
      # The statistics of norms are small, and would need a reading of x again.
      named = policies.save_only_these_names('kept', 'statistics')
      return remat(policy=policies.save_from_both_policies(named, _is_kernel_of_cudnn))
    case 'full':
      return remat()


def _is_kernel_of_cudnn(primitive, *_, **__):
  """What cuDNN's attention gives forward: its backward pass reads both the result and the sums of
  the softmax, for which it would run again.
  """
  return primitive.name.startswith('dot_product_attention_fwd')


def gather_tokens(x_BPD: jax.Array, index_BM: jax.Array) -> jax.Array:
  """Rows `index_BM` of each image's tokens: [B, M, D]."""
  return jnp.take_along_axis(x_BPD, index_BM[..., None], axis=1)


def merge_views(x: jax.Array) -> jax.Array:
  """[B, V, ...] -> [B*V, ...]."""
  return x.reshape(-1, *x.shape[2:])


def stack_flops(width: int, depth: int, mlp: int, ffn: str, tokens: int) -> float:
  """Forward FLOPs of a stack of blocks on one sequence: 2 per weight and token, attention 4 N^2 D;
  normalization and softmax are left out.
  """
  matrices = {'gelu': 2, 'relu': 2, 'swiglu': 3}[ffn]  # SwiGLU: gate, up and down
  weights = 4 * width**2 + matrices * width * mlp
  return depth * (2 * weights * tokens + 4 * tokens**2 * width)

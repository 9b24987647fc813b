"""Transformer parts against NumPy, and the ways to compute a stack of blocks against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.core import schema
from tips_jax.models import attention, layers, sines

rng = np.random.default_rng(0)
X = rng.normal(size=(2, 5, 16)).astype(np.float32)
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)


def blocks(
  scan=True,
  remat='none',
  dropout=0.0,
  ffn='gelu',
  depth=2,
  dtype='float32',
  float32=False,
  kernel='auto',
  **more,
):
  compute = schema.Compute(
    dtype=dtype, scan=scan, remat=remat, float32_residual=float32, attention=kernel
  )
  return layers.Blocks(16, depth, 2, 24, ffn, dropout, compute, **more)


def parameters(module):
  """No leaf is at its initial zero or one, so that each counts."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(module.init, jax.random.key(0), [X])
  return jax.tree.map(lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), shapes)


def apply(module, params, x, mask=None, rows=None, **more):
  return module.apply(params, [x], [mask], [rows], **more)[0]


PARAMS = parameters(blocks())


@functools.cache
def values_and_grads(scan, remat):
  module, rngs = blocks(scan, remat, dropout=0.3), {'dropout': jax.random.key(1)}

  def fn(p, x):
    y = apply(module, p, x, MASK, np.arange(len(x)), rngs=rngs)
    return jnp.sin(y).sum(), y

  return jax.jit(jax.value_and_grad(fn, (0, 1), has_aux=True))(PARAMS, X)


@pytest.mark.parametrize(
  'scan, remat', [(False, 'none'), (True, 'full'), (False, 'full'), (True, 'products')]
)
def test_loop_and_rematerialisation_change_nothing(scan, remat):
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(same, values_and_grads(scan, remat), values_and_grads(True, 'none'))


def test_the_unrolled_loop_has_no_loop():
  text = lambda scan: jax.jit(blocks(scan).apply).lower(PARAMS, [X]).compile().as_text()
  assert 'while(' in text(True) and 'while(' not in text(False)


def test_dropout_differs_between_layers_and_keys_and_is_off_by_default():
  module = blocks(dropout=0.5)
  run = jax.jit(
    lambda k: apply(module, PARAMS, X, None, np.arange(len(X)), rngs={'dropout': jax.random.key(k)})
  )
  assert np.abs(run(0) - run(1)).max() > 0.1
  np.testing.assert_array_equal(run(0), run(0))
  np.testing.assert_array_equal(apply(module, PARAMS, X), apply(blocks(), PARAMS, X))


# --- what cuDNN's attention asks ----------------------------------------------------------------


def both_ways(kernel, x, mask, dropout=0.0, remat='none'):
  """Output of a stack, and its gradients to parameters and x."""
  module = blocks(kernel=kernel, dropout=dropout, remat=remat)

  def fn(p, x):
    y = apply(module, p, x, mask, np.arange(len(x)), rngs={'dropout': jax.random.key(1)})
    return jnp.sin(y).sum(), y

  return jax.jit(jax.value_and_grad(fn, (0, 1), has_aux=True))(PARAMS, x)


def gelu_reference(x):
  """The tanh form in float64, and its derivative."""
  inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
  tanh = np.tanh(inner)
  slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
  return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * slope


@pytest.mark.parametrize('dtype, rounding', [('float32', 1e-6), ('bfloat16', 2**-8)])
def test_gelu_and_its_gradient_are_rounded_once(dtype, rounding):
  x = jnp.linspace(-12, 12, 4001).astype(dtype)
  y, slope = gelu_reference(np.asarray(x, np.float64))
  value, back = jax.vjp(layers.gelu, x)
  close = functools.partial(np.testing.assert_allclose, rtol=rounding, atol=1e-6)
  close(np.asarray(value, np.float64), y)
  close(np.asarray(back(jnp.ones_like(x))[0], np.float64), slope)
  assert value.dtype == x.dtype and back(value)[0].dtype == x.dtype


SCATTERED = np.array([[0, 1, 0, 1, 1], [1, 0, 0, 0, 1]], bool)


@pytest.mark.parametrize('length', [4, 5])
@pytest.mark.parametrize('mask', [None, MASK, SCATTERED], ids=['none', 'prefix', 'scattered'])
def test_packed_tokens_give_what_plain_attention_gives(length, mask, monkeypatch):
  # XLA's attention with the lengths that cuDNN's gets.
  monkeypatch.setattr(attention, '_CUDNN', 'xla')
  x = X[:, :length]
  if mask is not None:
    mask = mask[:, :length]
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)
  jax.tree.map(same, both_ways('cudnn', x, mask), both_ways('plain', x, mask))


def test_packed_tokens_draw_the_same_dropout(monkeypatch):
  monkeypatch.setattr(attention, '_CUDNN', 'xla')
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)
  packed = both_ways('cudnn', X, MASK, dropout=0.3, remat='products')
  jax.tree.map(same, packed, both_ways('plain', X, MASK, dropout=0.3))


def test_packed_tokens_are_even_and_those_that_may_be_read_come_first():
  x, mask, order = attention.pack(jnp.asarray(X), jnp.asarray(SCATTERED))
  assert x.shape == (2, 6, 16)
  np.testing.assert_array_equal(mask, [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
  np.testing.assert_array_equal(order, [[1, 3, 4, 0, 2], [0, 4, 1, 2, 3]])
  np.testing.assert_array_equal(x[0, :3], X[0, [1, 3, 4]])
  np.testing.assert_array_equal(attention.unpack(x, order, 5), X)


def test_an_even_number_of_tokens_without_a_mask_is_left_as_it_is():
  x = jnp.asarray(X[:, :4])
  same, mask, order = attention.pack(x, None)
  assert same is x and mask is None and order is None


# --- options of the residual branches -----------------------------------------------------------


def test_layer_scale_multiplies_both_branches():
  module = blocks(layer_scale=1e-5)
  fresh = module.init(jax.random.key(0), [X])['params']['blocks']
  assert fresh['scale1']['gamma'].shape == fresh['scale2']['gamma'].shape == (2, 16)
  np.testing.assert_allclose(fresh['scale1']['gamma'], 1e-5)
  params = parameters(module)['params']['blocks']
  scaled = apply(module, {'params': {'blocks': params}}, X, MASK)
  folded = {name: p for name, p in params.items() if not name.startswith('scale')}
  for name, layer, part in (('scale1', 'attention', 'out'), ('scale2', 'mlp', 'down')):
    gamma = params[name]['gamma']
    old = folded[layer][part]
    new = {'kernel': old['kernel'] * gamma[:, None], 'bias': old['bias'] * gamma}
    folded[layer] = folded[layer] | {part: new}
  plain = apply(blocks(), {'params': {'blocks': folded}}, X, MASK)
  np.testing.assert_allclose(scaled, plain, rtol=1e-5, atol=1e-6)


def test_drop_path_keeps_or_drops_a_branch_of_a_whole_row():
  module = blocks(depth=1, drop_path=0.25)
  params = parameters(module)
  x = np.tile(X[:1], (4000, 1, 1))
  rows = np.arange(len(x))
  out = apply(module, params, x, None, rows, rngs={'dropout': jax.random.key(0)})
  # Two branches: a row is one of four, its branches 4/3 as strong where they are kept.
  kinds, counts = np.unique(np.round(out[:, 0, 0], 3), return_counts=True)
  assert len(kinds) == 4
  assert np.abs(np.sort(counts) / 4000 - np.array([1, 3, 3, 9]) / 16).max() < 0.03
  assert np.abs(out - x).max((1, 2)).min() == 0  # both dropped
  # A row's luck is its number's, whatever rows are beside it.
  part = apply(module, params, x[7:9], None, rows[7:9], rngs={'dropout': jax.random.key(0)})
  np.testing.assert_allclose(part, out[7:9], rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(apply(module, params, X), apply(blocks(depth=1), params, X))


def test_drop_path_keeps_the_mean_of_a_branch():
  module = blocks(depth=1, drop_path=0.4)
  # Without an MLP the mean over rows is that of the attention alone.
  params = parameters(module)
  still = jax.tree.map(np.zeros_like, params['params']['blocks']['mlp'])
  params = {'params': {'blocks': params['params']['blocks'] | {'mlp': still}}}
  x = np.tile(X[:1], (8000, 1, 1))
  rngs = {'dropout': jax.random.key(1)}
  mean = apply(module, params, x, None, np.arange(len(x)), rngs=rngs).mean(0) - X[0]
  whole = apply(module, params, X[:1])[0] - X[0]
  np.testing.assert_allclose(mean, whole, rtol=0.05, atol=0.05 * np.abs(whole).max())


def test_a_float32_residual_rounds_no_sum():
  module = blocks(depth=12)
  params = parameters(module)
  params = jax.tree.map(lambda p: 0.1 * p, params)
  exact = apply(module, params, X)
  low = apply(blocks(depth=12, dtype='bfloat16'), params, X.astype(jnp.bfloat16))
  high = apply(blocks(depth=12, dtype='bfloat16', float32=True), params, X)
  assert low.dtype == jnp.bfloat16 and high.dtype == jnp.float32
  wrong = lambda y: np.abs(np.asarray(y, np.float32) - exact).mean()
  assert wrong(high) < 0.3 * wrong(low)


def mae_positions(side, width):
  """Position by position, in float64 (facebookresearch/mae, util/pos_embed.py)."""
  table = np.zeros((side, side, width))
  quarter = width // 4
  for row in range(side):
    for column in range(side):
      for i in range(quarter):
        rate = 1 / 10000 ** (i / quarter)
        angles = (column * rate, row * rate)
        for half, angle in enumerate(angles):
          table[row, column, half * 2 * quarter + i] = np.sin(angle)
          table[row, column, half * 2 * quarter + quarter + i] = np.cos(angle)
  return table


def test_the_grid_of_positions_is_that_of_mae():
  got = sines.grid(5, 24)
  assert got.shape == (1, 5, 5, 24)
  np.testing.assert_allclose(got[0], mae_positions(5, 24), atol=1e-6)


def layer_norm(x, p):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p[
    'scale'
  ] + p['bias']


def reference(p, x, mask, ffn):
  """One block in NumPy."""
  y, a = layer_norm(x, p['norm1']), p['attention']
  heads = lambda z: z.reshape(*z.shape[:2], 2, -1)
  q, k, v = (heads(y @ a[n]['kernel'] + a[n]['bias']) for n in ('query', 'key', 'value'))
  logits = np.einsum('bqhk,bshk->bhqs', q, k) / np.sqrt(q.shape[-1])
  weights = np.exp(logits) * mask[:, None, None]
  weights /= weights.sum(-1, keepdims=True)
  out = np.einsum('bhqs,bshk->bqhk', weights, v).reshape(x.shape)
  x = x + out @ a['out']['kernel'] + a['out']['bias']
  y, m = layer_norm(x, p['norm2']), p['mlp']
  up = y @ m['up']['kernel'] + m['up']['bias']
  if ffn == 'swiglu':
    gate = y @ m['gate']['kernel'] + m['gate']['bias']
    up = gate / (1 + np.exp(-gate)) * up
  elif ffn == 'relu':
    up = np.maximum(up, 0)
  else:
    up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
  return x + (up @ m['down']['kernel'] + m['down']['bias']) * mask[..., None]


@pytest.mark.parametrize('ffn', ['gelu', 'relu', 'swiglu'])
def test_a_stack_is_its_blocks_in_order(ffn):
  module = blocks(ffn=ffn)
  params = parameters(module)
  y = X.astype(np.float64)
  for i in range(2):
    y = reference(
      jax.tree.map(lambda p, i=i: np.asarray(p[i], np.float64), params['params']['blocks']),
      y,
      MASK,
      ffn,
    )
  np.testing.assert_allclose(apply(module, params, X, MASK), y, rtol=1e-4, atol=1e-5)


def test_layers_start_different():
  kernel = jax.jit(blocks().init)(jax.random.key(0), [X])['params']['blocks']['mlp']['up']['kernel']
  assert kernel.shape == (2, 16, 24) and np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_attention_kernels_are_xavier_of_the_flat_matrix():
  params = layers.Attention(64, 4, np.float32).init(
    jax.random.key(0), np.zeros((1, 2, 64), np.float32)
  )['params']
  for name in ('query', 'key', 'value', 'out'):
    kernel = np.asarray(params[name]['kernel'])
    bound = np.sqrt(6 / (64 + 64))
    assert np.abs(kernel).max() <= bound and abs(kernel.std() - bound / np.sqrt(3)) < 0.02 * bound
    assert not np.any(params[name]['bias'])


def test_masked_keys_are_not_read():
  other = X + 5 * ~MASK[..., None]
  a, b = (apply(blocks(), PARAMS, x, MASK) for x in (X, other))
  np.testing.assert_allclose(a[MASK], b[MASK], rtol=1e-5, atol=1e-6)


def test_sincos_positions_formula():
  table = np.asarray(sines.line(64, 10))
  rate = 1e4 ** (-np.arange(5) / 4)
  angle = np.arange(64)[:, None] * rate
  np.testing.assert_allclose(table, np.concatenate([np.sin(angle), np.cos(angle)], 1), atol=1e-5)


def test_gather_and_merge():
  index = np.array([[4, 0], [1, 1]])
  np.testing.assert_array_equal(
    layers.gather_tokens(X, index), np.stack([X[i, index[i]] for i in range(2)])
  )
  assert layers.merge_views(np.zeros((2, 3, 4, 5))).shape == (6, 4, 5)


def test_activations_keep_their_type():
  y = apply(blocks(dtype='bfloat16'), PARAMS, X.astype(jnp.bfloat16), MASK)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(np.float32), apply(blocks(), PARAMS, X, MASK), atol=0.15)


def test_batches_side_by_side_equal_each_alone():
  other = np.concatenate([X, X[:, ::-1]], axis=1)
  a, b = blocks().apply(PARAMS, [X, other], [MASK, None], [None, None])
  np.testing.assert_allclose(a, apply(blocks(), PARAMS, X, MASK), rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(b, apply(blocks(), PARAMS, other), rtol=1e-6, atol=1e-6)

"""The text tower: padding must not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.core import schema
from tips_jax.models import layers, sines, towers

TINY = schema.TextTower(kind='text', width=16, depth=2, heads=2, mlp=24, vocab=50, dropout=0.4)
F32 = schema.Compute(dtype='float32')
TEXTS = [[7, 3, 9], [5], [4, 4, 8, 2, 1, 6], []]

SHAPES = jax.eval_shape(functools.partial(towers.init, 'text', TINY, seed=0))
PARAMS = jax.tree.map(
  lambda s: (0.3 * np.random.default_rng(s.size).normal(size=s.shape)).astype(np.float32), SHAPES
)
apply = jax.jit(towers.apply, static_argnums=(1, 2))


def ids(texts, length):
  return np.array([t + [0] * (length - len(t)) for t in texts], np.int32)


def run(ids, params=PARAMS, rng=None):
  return apply(params, TINY, F32, {'ids': ids}, rng=rng, rows=np.arange(len(ids)))['text']


def test_the_amount_of_padding_does_not_matter():
  short, long = run(ids(TEXTS, 8)), run(ids(TEXTS, 64))
  assert short.shape == (4, 16) and short.dtype == jnp.float32
  np.testing.assert_allclose(short, long, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(short[1], run(ids([TEXTS[1]], 1))[0], rtol=1e-5, atol=1e-6)
  assert len({tuple(np.round(row, 3)) for row in np.asarray(short)}) == 4


def test_padding_in_front_is_not_read_either():
  a, b = run(np.array([[0, 0, 5, 6]], np.int32)), run(np.array([[0, 9, 5, 6]], np.int32))
  c = run(np.array([[5, 6, 0, 0]], np.int32))
  assert np.abs(a - b).max() > 1e-2 and np.abs(a - c).max() > 1e-3


def test_a_row_of_padding_gives_zeros_and_finite_gradients():
  assert not np.any(run(ids(TEXTS, 8))[3])
  unit = lambda x: x / jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))
  loss = lambda p, i: unit(towers.apply(p, TINY, F32, {'ids': i})['text'])[:, 0].sum()
  grads = jax.jit(jax.grad(loss))(PARAMS, ids(TEXTS, 8))
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  without = jax.jit(jax.grad(loss))(PARAMS, ids(TEXTS[:3], 8))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, without)


def test_the_order_of_words_matters():
  assert np.abs(run(ids([[7, 3]], 8)) - run(ids([[3, 7]], 8))).max() > 1e-2


def test_without_blocks_it_is_the_mean_of_normalized_tokens():
  params = PARAMS | {'encoder': jax.tree.map(np.zeros_like, PARAMS['encoder'])}
  rate = 1e4 ** (-np.arange(8) / 7)
  for text, row in zip(TEXTS[:3], run(ids(TEXTS, 8), params)):
    angle = np.arange(len(text))[:, None] * rate
    x = PARAMS['embedding'][np.array(text)] * 4 + np.concatenate([np.sin(angle), np.cos(angle)], 1)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    expected = (x * PARAMS['norm']['scale'] + PARAMS['norm']['bias']).mean(0)
    np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    sines.line(3, 16)[1], np.concatenate([np.sin(rate), np.cos(rate)]), rtol=1e-5
  )


def test_dropout_needs_a_key():
  x = ids(TEXTS, 8)
  np.testing.assert_array_equal(run(x), run(x))
  a, b = run(x, rng=jax.random.key(0)), run(x, rng=jax.random.key(1))
  assert np.abs(a - b).max() > 1e-2 and np.abs(a - run(x)).max() > 1e-2
  assert not np.any(a[3])


def test_captions_differ_at_the_start():
  """Words as large as their positions are heard: four blocks of the sizes of ViT-S."""
  tower = schema.TextTower(kind='text', width=384, depth=4, heads=6, mlp=1536, vocab=4000)
  generator = np.random.default_rng(0)
  captions = np.zeros((24, 16), np.int32)
  for row in captions:
    length = generator.integers(5, 13)
    row[:length] = generator.integers(2, 4000, length)
  params = towers.init('text', tower, seed=0)

  def cosine(params):
    x = apply(params, tower, F32, {'ids': captions})['text']
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return (x @ x.T)[~np.eye(24, dtype=bool)].mean()

  quiet = params['embedding'] * (384 / 32_000) ** 0.5  # the vocabulary of TIPS taken as fan-in
  assert cosine(params) < 0.78
  assert cosine(params | {'embedding': quiet}) > 0.95


def test_several_texts_of_an_image_are_read_as_if_alone():
  several = np.stack([ids(TEXTS, 8), ids(TEXTS[::-1], 8)], 1)  # [4, 2, 8]
  found = run(several)
  assert found.shape == (4, 2, 16)
  np.testing.assert_allclose(found[:, 1], run(ids(TEXTS[::-1], 8)), rtol=1e-5, atol=1e-6)


def test_several_texts_of_an_image_drop_other_units():
  several = np.broadcast_to(ids([[7, 3, 9]], 4), (2, 3, 4))
  found = np.asarray(run(several, rng=jax.random.key(0))).reshape(6, -1)
  assert len({tuple(np.round(row, 5)) for row in found}) == 6


def test_what_is_fused_goes_in_between_the_blocks():
  x = ids(TEXTS[:3], 6)
  images = [np.random.default_rng(i).normal(size=(3, 6, 16)).astype(np.float32) for i in range(2)]
  fused = {'fused2': images[0], 'fused3': images[1]}
  out = apply(PARAMS, TINY, F32, {'ids': x} | fused)
  # Two blocks in four stages: after half of them the first is done, after three quarters both.
  tower = towers.module(TINY)(TINY, F32)
  tokens = tower.apply({'params': PARAMS}, x, method='tokens')
  block = layers.Block(16, 2, 24, 'relu', 0.0, F32)
  for i in range(2):
    part = jax.tree.map(lambda p: p[i], PARAMS['encoder']['blocks'])
    tokens = block.apply({'params': part}, tokens, x != 0, None, method='one') + images[i]
  words = layers.Norm(16).apply({'params': PARAMS['norm']}, tokens)
  np.testing.assert_allclose(out['words'], words, rtol=1e-4, atol=1e-5)
  # Beside a text without an image, and without one itself, it is as alone.
  both = towers.apply_all(PARAMS, TINY, F32, [{'ids': x}, {'ids': x} | fused])
  np.testing.assert_allclose(both[0]['text'], run(x), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(both[1]['words'], out['words'], rtol=1e-5, atol=1e-6)

"""Masked words: which are hidden and by what, and the loss against NumPy."""

import jax
import numpy as np
import pytest

from tips_jax.core import schema
from tips_jax.objectives import masks, words

VOCAB = 50
MASK = schema.WordMask(kind='words', text='text')
B, T = 64, 20
rng = np.random.default_rng(0)
LENGTHS = np.arange(B) % (T + 1)
IDS = (rng.integers(2, VOCAB, (B, T)) * (np.arange(T) < LENGTHS[:, None])).astype(np.int32)
IDS[5, 1] = 1  # unknown


def drawn(mask=MASK, ids=IDS, seed=0):
  draw = jax.jit(lambda key, ids: masks.draw_words(mask, key, ids, VOCAB))
  return jax.tree.map(np.asarray, draw(jax.random.key(seed), ids))


def test_a_share_of_the_words_of_each_text_and_at_least_one():
  found = drawn()
  number = (IDS > 1).sum(1)
  want = np.minimum(np.maximum(np.round(0.15 * number), 1), number)
  np.testing.assert_array_equal(found['masked_valid'].sum(1), want)
  sizes = {name: x.shape[1] for name, x in found.items()}
  assert sizes == masks.outputs(MASK, T) and sizes['targets'] == 3
  valid = found['masked_valid']
  np.testing.assert_array_equal(
    found['targets'], np.take_along_axis(IDS, found['masked_indices'], axis=1)
  )
  assert found['targets'][valid].min() > 1  # neither padding nor unknown
  untouched = np.ones((B, T), bool)
  np.put_along_axis(untouched, found['masked_indices'], ~valid, axis=1)
  np.testing.assert_array_equal(found['ids'][untouched], IDS[untouched])


def test_eight_in_ten_are_hidden_one_is_swapped_one_stays():
  found = drawn(ids=np.full((4000, T), 7, np.int32))
  new = np.take_along_axis(found['ids'], found['masked_indices'], axis=1)[found['masked_valid']]
  count = len(new)
  assert count == 4000 * 3
  # Of the swapped ones one in 48 is by chance the word that was there.
  for share, hit in ((0.8, new == 1), (0.1, (new > 1) & (new != 7)), (0.1, new == 7)):
    assert abs(hit.mean() - share) < 0.015
  swapped = new[(new > 1) & (new != 7)]
  assert swapped.min() == 2 and swapped.max() == VOCAB - 1


def test_another_step_hides_other_words_and_every_word_has_its_turn():
  assert np.any(drawn(seed=1)['masked_indices'] != drawn()['masked_indices'])
  places = drawn(ids=np.full((4000, T), 7, np.int32))['masked_indices']
  assert np.abs(np.bincount(places.ravel(), minlength=T) / 4000 - 3 / T).max() < 0.03


M, D = 3, 6
TOKENS = rng.normal(size=(8, M, D)).astype(np.float32)
KERNEL = rng.normal(size=(D, VOCAB)).astype(np.float32)
BIAS = rng.normal(size=VOCAB).astype(np.float32)
TARGETS = rng.integers(2, VOCAB, (8, M))
VALID = rng.random((8, M)) < 0.7


def reference(tokens, kernel, bias):
  logits = tokens.astype(np.float64) @ kernel + bias
  log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return -np.take_along_axis(log_softmax, TARGETS[..., None], axis=-1)[..., 0][VALID].mean()


@pytest.mark.parametrize('shape', [(1, 1), (2, 4)])
def test_the_loss_equals_numpy_in_value_and_gradient(mesh, shape):
  def fn(tokens, kernel, bias):
    return words.prediction(tokens, TARGETS, VALID, kernel, bias, block=4).value

  with mesh(*shape):
    value, grads = jax.jit(jax.value_and_grad(fn, (0, 1, 2)))(TOKENS, KERNEL, BIAS)
  np.testing.assert_allclose(value, reference(TOKENS, KERNEL, BIAS), rtol=1e-5)
  for i, index in ((0, (3, 1, 2)), (1, (2, 9)), (2, (4,))):
    ends = []
    for shift in (1e-5, -1e-5):
      moved = [x.astype(np.float64) for x in (TOKENS, KERNEL, BIAS)]
      moved[i][index] += shift
      ends.append(reference(*moved))
    np.testing.assert_allclose(grads[i][index], (ends[0] - ends[1]) / 2e-5, rtol=1e-3, atol=1e-6)
  assert not np.any(grads[0][~VALID])


def test_without_a_masked_word_it_is_zero():
  loss = words.prediction(TOKENS, TARGETS, np.zeros((8, M), bool), KERNEL, BIAS)
  assert loss.value == 0 and loss.metrics['accuracy'] == 0

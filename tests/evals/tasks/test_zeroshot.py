"""Class embeddings, nearest classes and top-k against plain loops and scikit-learn; lists of names
and templates.
"""

import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.evals.tasks import prompts, zeroshot


def encode(texts):
  """A vector for each text that depends on the text alone."""
  seeds = [sum(ord(c) * 31**i for i, c in enumerate(text)) % 2**32 for text in texts]
  return np.stack([np.random.default_rng(seed).normal(size=8) for seed in seeds]).astype(np.float32)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_a_class_is_the_mean_of_its_texts(monkeypatch):
  monkeypatch.setattr(zeroshot, '_TEXTS', 3)
  calls = []
  spy = lambda texts: calls.append(list(texts)) or 5 * encode(texts)  # lengths do not count
  names, templates = ['cat', ('sea lion', 'seal'), ('cat',)], ('a photo of a {}.', '{}s', 'the {}')
  found = zeroshot.class_embeddings(spy, names, templates)
  for vector, own in zip(found, (['cat'], ['sea lion', 'seal'], ['cat'])):
    texts = [t.format(n) for n in own for t in templates]
    np.testing.assert_allclose(
      vector, unit(unit(encode(texts).astype(np.float64)).mean(0)), rtol=1e-6, atol=1e-7
    )
  said = [text for call in calls for text in call]
  assert len(said) == len(set(said)) == 9 and max(map(len, calls)) == 3
  np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize('names, templates', [([], ('{}',)), ([()], ('{}',)), (['cat'], ())])
def test_classes_without_texts_are_refused(names, templates):
  with pytest.raises(InputError, match='zero-shot: got'):
    zeroshot.class_embeddings(encode, names, templates)
  with pytest.raises(InputError, match='without a text tower'):
    zeroshot.class_embeddings(lambda texts: None, ['cat'], ('{}',))


def ranked(image, classes):
  """All classes of each image by cosine, the lowest of equals first, in a loop."""
  scores = unit(image.astype(np.float64)) @ unit(classes.astype(np.float64)).T
  return np.array(
    [sorted(range(len(classes)), key=lambda c, row=row: (-row[c], c)) for row in scores]
  )


def test_nearest_equals_the_loop(monkeypatch):
  monkeypatch.setattr(zeroshot, '_BLOCK', 7)
  rng = np.random.default_rng(0)
  image, classes = (
    rng.normal(size=(30, 8)).astype(np.float32),
    rng.normal(size=(12, 8)).astype(np.float32),
  )
  np.testing.assert_array_equal(zeroshot.nearest(image, classes), ranked(image, classes)[:, :5])
  assert zeroshot.nearest(image, classes[:3]).shape == (30, 3)
  assert zeroshot.nearest(image[:0], classes).shape == (0, 5)
  with pytest.raises(InputError, match=r'expected \[N, E\] and \[K, E\]'):
    zeroshot.nearest(image, classes[:, :4])


def test_equal_classes_and_broken_images_go_to_the_lowest_class():
  rng = np.random.default_rng(0)
  few = rng.normal(size=(4, 8)).astype(np.float32)
  classes = few[[2, 0, 1, 2, 0, 3, 1, 0]]
  found = zeroshot.nearest(
    np.concatenate([few, np.zeros((1, 8)), np.full((1, 8), np.nan)]), classes, k=8
  )
  assert found[:, 0].tolist() == [1, 2, 0, 5, 0, 0]
  assert found[0, :3].tolist() == [1, 4, 7] and found[4].tolist() == list(range(8))


def test_scorer_equals_scikit_learn():
  metrics = pytest.importorskip('sklearn.metrics')
  rng = np.random.default_rng(0)
  classes, labels = rng.normal(size=(10, 8)).astype(np.float32), rng.integers(-1, 10, 200)
  image = (classes[labels] + rng.normal(size=(200, 8))).astype(np.float32)
  scorer = zeroshot.ZeroshotScorer(classes, ks=(1, 3, 10))
  for i in range(0, 200, 64):
    scorer(image[i : i + 64], labels[i : i + 64])
  asked = labels >= 0
  scores, labels = unit(image[asked]) @ unit(classes).T, labels[asked]
  expected = {
    name: metrics.top_k_accuracy_score(labels, scores, k=k, labels=range(10))
    for name, k in {'accuracy': 1, 'top3': 3}.items()
  }
  assert scorer.result() == pytest.approx(expected, abs=1e-12)
  np.testing.assert_array_equal(
    scorer.counts, metrics.confusion_matrix(labels, scores.argmax(1), labels=range(10))
  )


def scores(image, labels, classes):
  scorer = zeroshot.ZeroshotScorer(classes)
  scorer(image, labels)
  return scorer.result()


def test_the_class_of_the_image_is_right_and_another_one_is_not():
  rng = np.random.default_rng(0)
  classes, labels = np.eye(6, dtype=np.float32), rng.integers(0, 6, 40)
  assert scores(classes[labels], labels, classes) == {'accuracy': 1.0, 'top5': 1.0}
  assert scores(classes[(labels + 1) % 6], labels, classes)['accuracy'] == 0.0
  with pytest.raises(InputError, match='labels up to 6; expected .* 6'):
    scores(classes[labels], labels + 1, classes)
  assert np.isnan(zeroshot.ZeroshotScorer(classes).result()['accuracy'])


def test_chance_leaves_out_what_is_always_right():
  assert zeroshot.chance(1000) == {'accuracy': 0.001, 'top5': 0.005}
  assert set(zeroshot.chance(5)) == {'accuracy'}


def test_lists_of_templates():
  counts = {'clip80': 80, 'clip7': 7, 'cifar18': 18, 'tcl9': 9, 'photo': 1}
  assert {name: len(prompts.templates(name)) for name in prompts.TEMPLATES} == counts
  for templates in prompts.TEMPLATES.values():
    assert prompts.templates(templates) == templates and len(set(templates)) == len(templates)
  assert set(prompts.TEMPLATES['clip7']) <= set(prompts.TEMPLATES['clip80'])
  assert set(prompts.TEMPLATES['tcl9']) - set(prompts.TEMPLATES['clip80']) == {'a photo of {}s.'}
  with pytest.raises(InputError, match="did you mean 'tcl9'"):
    prompts.templates('tcl')
  with pytest.raises(InputError, match='expected one place'):
    prompts.templates(('a photo of a cat',))

"""The weighted neighbours against a plain loop, ties included."""
import numpy as np
import pytest

from tips_jax.evals import knn


def reference(train, labels, test, k, temperature):
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  train, test = unit(np.float64(train)), unit(np.float64(test))
  result = []
  for row in test:
    cosine = np.round(train @ row, 6)
    near = sorted(range(len(train)), key=lambda i: (-cosine[i], i))[:k]    # ties: the first
    votes = np.zeros(max(labels) + 1)
    for i in near:
      votes[labels[i]] += np.exp(cosine[i] / temperature)
    result.append(int(np.argmax(votes)))
  return result


@pytest.mark.parametrize('k, temperature', [(1, 0.07), (5, 0.07), (20, 0.07), (20, 10.0), (500, 0.5)])
def test_equals_the_loop(k, temperature):
  rng = np.random.default_rng(k)
  labels = rng.integers(0, 6, 150)
  centres = rng.normal(size=(6, 10))
  train = centres[labels] + rng.normal(size=(150, 10))
  test = centres[rng.integers(0, 6, 70)] + rng.normal(size=(70, 10))
  assert knn.predict(train, labels, test, k=k, temperature=temperature).tolist() == reference(
      train, labels, test, k, temperature)


@pytest.mark.parametrize('seed', range(5))
def test_equal_neighbours_at_the_border_are_taken_in_order(seed):
  rng = np.random.default_rng(seed)
  train = np.eye(3)[rng.integers(0, 3, 60)]    # twenty copies of each of three points
  labels = rng.integers(0, 4, 60)
  test = np.eye(3)
  assert knn.predict(train, labels, test, k=7).tolist() == reference(train, labels, test, 7, 0.07)


def test_constant_features_answer_with_the_first_neighbours():
  labels = np.array([2, 2, 1, 0, 0, 0, 0])
  assert knn.predict(np.ones((7, 3)), labels, np.ones((2, 3)), k=3).tolist() == [2, 2]


def test_blocks_change_nothing(monkeypatch):
  rng = np.random.default_rng(0)
  train, test, labels = rng.normal(size=(80, 4)), rng.normal(size=(33, 4)), rng.integers(0, 3, 80)
  whole = knn.predict(train, labels, test)
  monkeypatch.setattr(knn, '_BLOCK', 5)
  assert (knn.predict(train, labels, test) == whole).all()


def test_rows_without_label_take_no_part():
  train, labels = np.array([[1.0, 0], [0, 1.0], [0, 1.0]]), np.array([0, 1, -1])
  test, truth = np.array([[1.0, 0.1], [0.1, 1.0], [1.0, 0.0]]), np.array([0, 0, -1])
  assert knn.accuracy(train, labels, test, truth, k=1) == 0.5


def test_labels_that_train_lacks_are_wrong():
  assert knn.accuracy(np.eye(2), [0, 1], np.eye(2), [0, 7]) == 0.5


def test_majority_is_the_commonest_class_of_train():
  assert knn.majority([2, 2, 1, -1, -1, -1], [2, 1, 1, 1, -1]) == 0.25

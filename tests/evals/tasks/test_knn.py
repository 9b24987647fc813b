"""The weighted neighbors against a plain loop, ties included."""

import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.evals.probes import search
from tips_jax.evals.tasks import common, knn


def reference(train, labels, test, k, temperature):
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  train, test = unit(np.float64(train)), unit(np.float64(test))
  result = []
  for row in test:
    cosine = np.round(train @ row, 6)
    near = sorted(range(len(train)), key=lambda i: (-cosine[i], i))[:k]  # ties: the first
    votes = np.zeros(max(labels) + 1)
    for i in near:
      votes[labels[i]] += np.exp(cosine[i] / temperature)
    result.append(int(np.argmax(votes)))
  return result


@pytest.mark.parametrize(
  'k, temperature', [(1, 0.07), (5, 0.07), (20, 0.07), (20, 10.0), (500, 0.5)]
)
def test_equals_the_loop(k, temperature):
  rng = np.random.default_rng(k)
  labels = rng.integers(0, 6, 150)
  centers = rng.normal(size=(6, 10))
  train = centers[labels] + rng.normal(size=(150, 10))
  test = centers[rng.integers(0, 6, 70)] + rng.normal(size=(70, 10))
  assert knn.predict(train, labels, test, k=k, temperature=temperature).tolist() == reference(
    train, labels, test, k, temperature
  )


@pytest.mark.parametrize('seed', range(5))
def test_equal_neighbors_at_the_border_are_taken_in_order(seed):
  rng = np.random.default_rng(seed)
  train = np.eye(3)[rng.integers(0, 3, 60)]  # twenty copies of each of three points
  labels = rng.integers(0, 4, 60)
  test = np.eye(3)
  assert knn.predict(train, labels, test, k=7).tolist() == reference(train, labels, test, 7, 0.07)


def test_constant_features_answer_with_the_first_neighbors():
  labels = np.array([2, 2, 1, 0, 0, 0, 0])
  assert knn.predict(np.ones((7, 3)), labels, np.ones((2, 3)), k=3).tolist() == [2, 2]


@pytest.mark.parametrize('rows', [16, 32_768])
def test_copies_tie_wherever_they_stand(monkeypatch, rows):
  monkeypatch.setattr(search, '_ROWS', rows)
  rng = np.random.default_rng(0)
  few = rng.normal(size=(5, 37)).astype(np.float32)
  train, labels, test = (
    few[rng.integers(0, 5, 90)],
    rng.integers(0, 4, 90),
    rng.normal(size=(40, 37)),
  )
  assert knn.predict(train, labels, test, k=9).tolist() == reference(train, labels, test, 9, 0.07)


def test_fewer_neighbors_than_k():
  assert knn.predict(np.eye(3)[:1], [4], np.eye(3), k=20).tolist() == [4, 4, 4]
  assert knn.predict(np.eye(3), [2, 1, -1], np.eye(3), k=20).tolist() == [
    2,
    1,
    1,
  ]  # a tie: the lowest class


def test_broken_rows_count_as_zero():
  rng = np.random.default_rng(0)
  train, test, labels = rng.normal(size=(60, 3)), rng.normal(size=(30, 3)), rng.integers(0, 3, 60)
  zeros = train.copy()
  train[::7], zeros[::7] = np.nan, 0
  train[3], zeros[3] = np.inf, 0
  assert knn.predict(train, labels, test, k=40).tolist() == reference(zeros, labels, test, 40, 0.07)
  assert (
    knn.predict(zeros, labels, np.full((1, 3), np.nan), k=3)[0] == np.bincount(labels[:3]).argmax()
  )


def test_several_k_at_once():
  rng = np.random.default_rng(0)
  train, labels = rng.normal(size=(80, 4)), rng.integers(-1, 3, 80)
  test = rng.normal(size=(33, 4))
  several = knn.predictions(train, labels, test, ks=(5, 1, 200))
  assert list(several) == [5, 1, 200]
  for k, predicted in several.items():
    np.testing.assert_array_equal(predicted, knn.predict(train, labels, test, k=k))


def test_k_is_chosen_without_the_row_and_its_group():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 2, 40).repeat(3)
  x = (
    2 * labels[:, None]
    - 1
    + 3 * rng.normal(size=(40, 8)).repeat(3, 0)
    + 1e-3 * rng.normal(size=(120, 8))
  )
  best, found = knn.choose_k(x, labels, ks=(1, 15))
  assert best == 1 and found[1] == 1  # triplets vouch for each other
  best, found = knn.choose_k(x, labels, ks=(1, 15), temperature=1, groups=np.arange(120) // 3)
  assert best == 15 and found[1] < found[15] <= 1
  unlabeled = np.where(np.arange(120) % 2, labels, -1)
  assert knn.choose_k(x, unlabeled, ks=(3,))[1] == {
    3: knn.choose_k(x[1::2], labels[1::2], ks=(3,))[1][3]
  }
  assert (
    knn.choose_k(np.ones((9, 2)), np.zeros(9, int), ks=(20, 10))[0] == 10
  )  # equally good: the smallest


def test_bad_input():
  with pytest.raises(InputError, match='none with a label'):
    knn.predict(np.eye(2), [-1, -1], np.eye(2))
  with pytest.raises(InputError, match=r'\(2, 3\)'):
    knn.predict(np.eye(2), [0, 1], np.ones((2, 3)))
  with pytest.raises(InputError, match='one for each of 2 rows'):
    knn.predict(np.eye(2), [0, 1, 1], np.eye(2))
  assert np.isnan(common.accuracy(np.array([0, 1]), np.array([-1, -1])))


def test_rows_without_label_take_no_part():
  train, labels = np.array([[1.0, 0], [0, 1.0], [0, 1.0]]), np.array([0, 1, -1])
  test, truth = np.array([[1.0, 0.1], [0.1, 1.0], [1.0, 0.0]]), np.array([0, 0, -1])
  assert common.accuracy(knn.predict(train, labels, test, k=1), truth) == 0.5


def test_labels_that_train_lacks_are_wrong():
  assert common.accuracy(knn.predict(np.eye(2), [0, 1], np.eye(2)), np.array([0, 7])) == 0.5


def test_majority_is_the_commonest_class_of_train():
  assert common.majority([2, 2, 1, -1, -1, -1], [2, 1, 1, 1, -1]) == 0.25

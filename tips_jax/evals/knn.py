"""Weighted nearest-neighbour classification on frozen features, as in DINO (arXiv 2104.14294, appendix F)."""
import numpy as np

from tips_jax.evals.features import normalise

_BLOCK = 256    # queries whose similarities are held at once


def predict(train, train_labels, test, *, k: int = 20, temperature: float = 0.07) -> np.ndarray:
  """Class ids [M] of test [M, D] by the k nearest of train [N, D] with labels [N], by cosine.

  Each neighbour votes for its class with exp(cosine / temperature). Equal neighbours: the first in `train` counts;
  equal votes: the lowest class.
  """
  train, test, labels = normalise(train), normalise(test), np.asarray(train_labels)
  k, classes = min(k, len(train)), labels.max() + 1
  found = np.empty(len(test), np.int64)
  for i in range(0, len(test), _BLOCK):
    similarity = test[i:i + _BLOCK] @ train.T
    near = _nearest(similarity, k)
    votes = np.exp((np.take_along_axis(similarity, near, 1).astype(np.float64) - 1) / temperature)
    cells = np.arange(len(near))[:, None] * classes + labels[near]
    ballot = np.bincount(cells.ravel(), votes.ravel(), minlength=len(near) * classes)
    found[i:i + _BLOCK] = ballot.reshape(len(near), classes).argmax(1)
  return found


def accuracy(train, train_labels, test, test_labels, *, k: int = 20, temperature: float = 0.07) -> float:
  """Share of right predictions; rows with label -1 take no part."""
  train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
  seen, asked = train_labels >= 0, test_labels >= 0
  found = predict(train[seen], train_labels[seen], test[asked], k=k, temperature=temperature)
  return float((found == test_labels[asked]).mean())


def majority(train_labels, test_labels) -> float:
  """The accuracy of always answering the most frequent class of train: the chance level."""
  train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
  common = np.bincount(train_labels[train_labels >= 0]).argmax()
  return float((test_labels[test_labels >= 0] == common).mean())


def _nearest(similarity, k):
  """Columns [B, k] of the k largest of each row; among equals at the border, the lowest columns."""
  border = -np.partition(-similarity, k - 1, axis=1)[:, k - 1:k]
  above, level = similarity > border, similarity == border
  room = k - above.sum(1, keepdims=True)
  chosen = above | (level & (np.cumsum(level, 1) <= room))
  return np.nonzero(chosen)[1].reshape(len(similarity), k)

"""k-NN classification of frozen features: DINO's weighted vote among the nearest neighbors.

Caron et al. 2021 (arXiv 2104.14294, appendix F); DINOv2 reports the best of `KS`.
"""

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.evals.probes import search

KS = (10, 20, 100, 200)
_VOTES = 1024  # queries whose votes are counted at once
_CHOOSING = 12_000  # rows that choose k


def predict(train, train_labels, test, *, k: int = 20, temperature: float = 0.07) -> np.ndarray:
  """Class ids [M] of test [M, D] by the k nearest of train [N, D] with labels [N], by cosine.

  Each neighbor votes for its class with exp(cosine / temperature). Equal neighbors: the first in
  `train` counts;
  equal votes: the lowest class. Rows of train with label -1 take no part; rows that are not finite
  count as zero.
  """
  return predictions(train, train_labels, test, ks=(k,), temperature=temperature)[k]


def predictions(
  train, train_labels, test, *, ks=KS, temperature: float = 0.07, groups=None, test_groups=None
) -> dict[int, np.ndarray]:
  """As `predict`, for several k at the price of the largest. groups [N], test_groups [M]: see
  `search.nearest`.
  """
  labels = np.asarray(train_labels)
  if not (labels >= 0).any():
    raise InputError(f'kNN: got {len(labels)} training rows, none with a label; expected some')
  groups = np.zeros(len(labels), np.int64) if groups is None else np.asarray(groups)
  similarity, rows = search.nearest(
    train, test, k=max(ks), groups=np.where(labels >= 0, groups, -1), query_groups=test_groups
  )
  near = np.where(rows >= 0, labels[rows], 0)  # where there are fewer than k: a vote of weight 0
  return {k: _vote(similarity[:, :k], near[:, :k], labels.max() + 1, temperature) for k in ks}


def choose_k(
  train, train_labels, *, ks=KS, temperature: float = 0.07, groups=None, rows=None
) -> tuple[int, dict[int, float]]:
  """(the k of the best accuracy on train itself, the accuracy by k); of equally good ones the
  smallest.

  Each row is classified by all rows but those of its own group (`groups` [N], not negative;
  default: but itself), so that the images of one video or object do not vouch for each other.
  `rows`: those that are asked, for instance a validation split (of one group); default: at most
  12,000 with a label, evenly spaced.
  """
  labels = np.asarray(train_labels)
  groups = (
    np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1].ravel()
  )
  if rows is None:
    rows = np.flatnonzero(labels >= 0)
    rows = rows[
      np.arange(min(_CHOOSING, len(rows))) * len(rows) // max(min(_CHOOSING, len(rows)), 1)
    ]
  found = predictions(
    train,
    labels,
    train[rows],
    ks=ks,
    temperature=temperature,
    groups=groups,
    test_groups=groups[rows],
  )
  scores = {k: accuracy(ids, labels[rows]) for k, ids in found.items()}
  return min(scores, key=lambda k: (-np.nan_to_num(scores[k], nan=-1), k)), scores


def majority(train_labels, test_labels) -> float:
  """The accuracy of always answering the most frequent class of train: the chance level."""
  train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
  common = np.bincount(train_labels[train_labels >= 0]).argmax()
  return float((test_labels[test_labels >= 0] == common).mean())


def accuracy(found, truth):
  asked = truth >= 0
  return float((found == truth)[asked].mean()) if asked.any() else float('nan')


def _vote(similarity, labels, classes, temperature):
  """Class ids [M] of the similarities and labels [M, k] of neighbors."""
  result = np.empty(len(labels), np.int64)
  for i in range(0, len(labels), _VOTES):
    votes = np.exp((similarity[i : i + _VOTES].astype(np.float64) - 1) / temperature)
    cells = np.arange(len(votes))[:, None] * classes + labels[i : i + _VOTES]
    ballot = np.bincount(cells.ravel(), votes.ravel(), minlength=len(votes) * classes)
    result[i : i + _VOTES] = ballot.reshape(len(votes), classes).argmax(1)
  return result

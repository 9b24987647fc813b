"""k-NN classification of frozen features: DINO's weighted vote among the nearest neighbors.

Caron et al. 2021 (arXiv 2104.14294, appendix F); DINOv2 reports the best of `KS`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.evals.datasets import protocols
from tips_jax.evals.features.splits import TaskInputs
from tips_jax.evals.probes import search
from tips_jax.evals.tasks import drawing
from tips_jax.evals.tasks.common import ACCURACY, accuracy, classified, majority, tokens
from tips_jax.evals.tasks.spec import TaskSpec

KS = (10, 20, 100, 200)
# Queries whose votes are counted at once.
_VOTES = 1024
# Rows that choose k: enough for a difference of a tenth of a percent.
_CHOOSING = 12_000


def predict(
  train: np.ndarray,
  train_labels: Sequence[int],
  test: np.ndarray,
  *,
  k: int = 20,
  temperature: float = 0.07,
) -> np.ndarray:
  """Class ids [M] of test [M, D] by the k nearest of train [N, D] with labels [N], by cosine.

  Each neighbor votes for its class with exp(cosine / temperature). Equal neighbors: the first in
  `train` counts; equal votes: the lowest class. Rows of train with label -1 take no part; rows that
  are not finite count as zero.
  """
  return predictions(train, train_labels, test, ks=(k,), temperature=temperature)[k]


def predictions(
  train: np.ndarray,
  train_labels: Sequence[int],
  test: np.ndarray,
  *,
  ks: Sequence[int] = KS,
  temperature: float = 0.07,
  groups: np.ndarray | None = None,
  test_groups: np.ndarray | None = None,
) -> dict[int, np.ndarray]:
  """As `predict`, for several k at the price of the largest.

  groups [N], test_groups [M]: see `search.sweep`.
  """
  labels = np.asarray(train_labels)
  if not (labels >= 0).any():
    raise InputError(f'kNN: got {len(labels)} training rows, none with a label; expected some')
  if groups is None:
    groups = np.zeros(len(labels), np.int64)
  # A negative group is no candidate of any query.
  groups = np.where(labels >= 0, groups, -1)
  similarity, rows = search.nearest(train, test, k=max(ks), groups=groups, query_groups=test_groups)
  # Where there are fewer than k neighbors, similarity -inf gives a vote of weight 0.
  near = np.where(rows >= 0, labels[rows], 0)
  return {k: _vote(similarity[:, :k], near[:, :k], labels.max() + 1, temperature) for k in ks}


def choose_k(
  train: np.ndarray,
  train_labels: Sequence[int],
  *,
  ks: Sequence[int] = KS,
  temperature: float = 0.07,
  groups: np.ndarray | None = None,
  rows: np.ndarray | None = None,
) -> tuple[int, dict[int, float]]:
  """(the k of the best accuracy on train itself, the accuracy by k); ties: the smallest k.

  Each row is classified by all rows but those of its group (`groups` [N], not negative; default:
  but itself), so that the images of one video or object do not vouch for each other. `rows`: those
  that are classified, for instance a validation split (of one group); default: at most 12,000 with
  a label, evenly spaced.
  """
  labels = np.asarray(train_labels)
  if groups is None:
    groups = np.arange(len(labels))
  else:
    groups = np.unique(groups, return_inverse=True)[1].ravel()
  if rows is None:
    rows = np.flatnonzero(labels >= 0)
    count = min(_CHOOSING, len(rows))
    rows = rows[np.arange(count) * len(rows) // max(count, 1)]
  predicted = predictions(
    train,
    labels,
    train[rows],
    ks=ks,
    temperature=temperature,
    groups=groups,
    test_groups=groups[rows],
  )
  scores = {k: accuracy(ids, labels[rows]) for k, ids in predicted.items()}
  return min(scores, key=lambda k: (-np.nan_to_num(scores[k], nan=-1), k)), scores


def _vote(similarity, labels, classes, temperature):
  """Class ids [M] of the similarities and labels [M, k] of neighbors."""
  result = np.empty(len(labels), np.int64)
  for i in range(0, len(labels), _VOTES):
    votes = np.exp((similarity[i : i + _VOTES].astype(np.float64) - 1) / temperature)
    # One histogram over (query, class) for all queries of the block.
    cells = np.arange(len(votes))[:, None] * classes + labels[i : i + _VOTES]
    ballot = np.bincount(cells.ravel(), votes.ravel(), minlength=len(votes) * classes)
    result[i : i + _VOTES] = ballot.reshape(len(votes), classes).argmax(1)
  return result


def measure(inputs: TaskInputs) -> dict[str, Any]:
  """k nearest neighbors, k chosen on the training split itself, each row left out in turn.

  DINOv2 chooses k on the split that is measured.
  """
  train = inputs.part('train')
  test = inputs.part('test')
  options = inputs.evaluation.options
  temperature = options['temperature']
  metrics, chosen, predicted = {}, {}, {}
  for name, prefix in tokens(inputs.encoder.cls_names):
    features = train.arrays[name]
    k, _ = choose_k(features, train.label, ks=options['k'], temperature=temperature)
    predicted[name] = predict(
      features, train.label, test.arrays[name], k=k, temperature=temperature
    )
    metrics[f'{prefix}accuracy'] = accuracy(predicted[name], test.label)
    chosen[f'{prefix}k'] = k
  chance = {'accuracy': majority(train.label, test.label)}
  first = predicted[inputs.encoder.cls_names[0]]
  return classified(inputs, test, metrics, chance, first) | {'chosen': chosen}


SPEC = TaskSpec(
  name='knn',
  title='k-NN classification',
  caption=(
    'Test images and the class that their nearest training images vote for, green where it is '
    'right: good features err, if at all, toward a class that looks much the same.'
  ),
  measure=measure,
  metrics=ACCURACY,
  draw=drawing.classified,
  annotation='label',
  constants=protocols.KNN,
  charted=True,
)

"""Average precision of scores, as scikit-learn counts it."""

import numpy as np


def average_precision(scores_N: np.ndarray, right_N: np.ndarray) -> float:
  """The sum over thresholds of precision times the recall that is added there; nan where nothing
  is right.

  Equal scores pass a threshold together, so that their order does not matter, and constant scores
  have the share of what is right.
  """
  scores = np.asarray(scores_N, np.float64)
  right = np.asarray(right_N, bool)
  total = int(right.sum())
  if not total:
    return float('nan')
  order = np.argsort(-scores, kind='stable')
  found = np.cumsum(right[order])
  # The last of each group of equal scores.
  ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
  added = np.diff(found[ends], prepend=0)
  return float((found[ends] / (ends + 1) * added).sum() / total)


def mean_average_precision(scores_NK: np.ndarray, right_NK: np.ndarray) -> float:
  """The mean over the classes K that occur; nan without any."""
  each = [average_precision(*column) for column in zip(scores_NK.T, right_NK.T)]
  known = [value for value in each if not np.isnan(value)]
  if not known:
    return float('nan')
  return float(np.mean(known))

"""Frozen features of a split of a store: what every evaluator starts from."""

from collections.abc import Mapping, Sized
from typing import Any

import numpy as np


def records(source: Sized, limit: int) -> np.ndarray:
  """The numbers of at most `limit` records, evenly spaced."""
  # A sorted split must not be cut to its first classes.
  total = len(source)
  count = min(limit, total)
  return np.arange(count) * total // max(count, 1)


def texts_of(record: Mapping[str, Any], field: str) -> list[str]:
  """The non-empty texts of a record: its alt text or all its captions."""
  values = record[field]
  if field == 'alt_text':
    values = [values]
  texts = []
  for value in values:
    if isinstance(value, bytes):
      # One broken byte must not end an evaluation.
      value = value.decode('utf-8', 'replace')
    if str(value).strip():
      texts.append(str(value))
  return texts


def finite(features: np.ndarray) -> np.ndarray:
  """float32 with every row [..., D] that holds a nan or an infinity set to zero."""
  features = np.asarray(features, np.float32)
  return np.where(np.isfinite(features).all(-1, keepdims=True), features, np.float32(0))

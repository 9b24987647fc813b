"""Exact search in blocks: files, blocks and devices change nothing."""

import jax
import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.evals.probes import search


def test_blocks_files_and_devices_change_nothing(monkeypatch, tmp_path):
  rng = np.random.default_rng(0)
  train, test = (
    rng.normal(size=(80, 4)).astype(np.float32),
    rng.normal(size=(133, 4)).astype(np.float32),
  )
  whole = search.nearest(train, test, k=7)
  np.save(tmp_path / 'train.npy', train)
  lazy, local = np.load(tmp_path / 'train.npy', mmap_mode='r'), jax.local_devices()
  monkeypatch.setattr(search, '_BLOCK', 16)
  for size in (16, 32_768):
    monkeypatch.setattr(search, '_ROWS', size)
    for devices in (1, 3, 8):
      monkeypatch.setattr(jax, 'local_devices', lambda n=devices: local[:n])
      similarity, rows = search.nearest(lazy, [test[:50], test[50:]], k=7)
      np.testing.assert_array_equal(rows, whole[1])
      np.testing.assert_allclose(similarity, whole[0], atol=1e-6)
      if devices == 1:
        one = similarity
      np.testing.assert_array_equal(similarity, one)  # of equal blocks: to the last bit


def test_fewer_candidates_than_k():
  similarity, rows = search.nearest(
    np.eye(3), np.eye(3)[:2], k=5, groups=[0, 1, -1], query_groups=[0, 2]
  )
  assert rows.tolist() == [[1, -1, -1, -1, -1], [1, 0, -1, -1, -1]]
  np.testing.assert_array_equal(similarity[:, 2:], -np.inf)
  assert search.nearest(np.eye(3), np.zeros((0, 3)), k=2)[1].shape == (0, 2)


def test_zero_rows_tie_with_orthogonal_ones_in_order():
  assert search.nearest(np.array([[-1], [1], [0], [-1]]), np.zeros((1, 1)), k=4)[1].tolist() == [
    [0, 1, 2, 3]
  ]  # no -0


def test_bad_input():
  with pytest.raises(InputError, match=r'\(2, 3\)'):
    search.nearest(np.eye(2), np.ones((2, 3)), k=1)
  with pytest.raises(InputError, match='one for each of 2 rows'):
    search.nearest(np.eye(2), np.eye(2), k=1, groups=[0, 1, 1])

"""Recalls against a plain loop, on ties, duplicates and several captions; chance against the
hypergeometric law.
"""

import numpy as np
import pytest
import scipy.stats

from tips_jax.evals.tasks import retrieval


def reference(image, text, owner):
  """Counts wrong candidates that score at least as high as the best right one, one query at a
  time.
  """
  unit = lambda v: v / max(np.linalg.norm(v), 1e-12)
  scores = np.array([[np.float32(np.dot(unit(t), unit(i))) for i in image] for t in text])
  t2i, i2t = [], []
  for t, right in enumerate(owner):
    t2i.append(sum(not scores[t, j] < scores[t, right] for j in range(len(image)) if j != right))
  for i in sorted(set(owner)):
    best = max(scores[t, i] for t in range(len(text)) if owner[t] == i)
    i2t.append(sum(not scores[t, i] < best for t in range(len(text)) if owner[t] != i))
  return {
    f'{way}_r{k}': np.mean([rank < k for rank in ranks])
    for way, ranks in (('t2i', t2i), ('i2t', i2t))
    for k in (1, 5, 10)
  }


@pytest.mark.parametrize('seed', range(6))
def test_equals_the_loop(seed):
  rng = np.random.default_rng(seed)
  image = rng.normal(size=(23, 5)).astype(np.float32)
  owner = rng.integers(0, 23, 31)  # some images without text, some with several, unsorted
  text = image[owner] + rng.normal(size=(31, 5)).astype(np.float32)
  assert retrieval.recalls(image, text, owner) == pytest.approx(reference(image, text, owner))


@pytest.mark.parametrize('seed', range(4))
def test_ties_and_duplicates_count_against(seed):
  rng = np.random.default_rng(seed)
  image = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 20)]  # exact ties everywhere
  owner = rng.permutation(np.repeat(np.arange(20), 2))
  text = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 40)]
  found = retrieval.recalls(image, text, owner)
  assert found == pytest.approx(reference(image, text, owner))
  assert found['t2i_r1'] < 0.2


def test_blocks_change_nothing(monkeypatch):
  rng = np.random.default_rng(0)
  image, owner = rng.normal(size=(50, 8)), rng.integers(0, 50, 120)
  text = image[owner] + rng.normal(size=(120, 8))
  whole = retrieval.recalls(image, text, owner)
  monkeypatch.setattr(retrieval, '_BLOCK', 7)
  assert retrieval.recalls(image, text, owner) == whole
  assert 0.1 < whole['t2i_r1'] < 0.9


@pytest.mark.parametrize('value', [0.0, 1.0, np.nan])
def test_collapsed_or_broken_features_score_nothing(value):
  image = np.full((30, 4), value, np.float32)
  assert set(retrieval.recalls(image, image, np.arange(30)).values()) == {0.0}


def test_perfect_features_score_one_whatever_their_length():
  image = np.diag(np.arange(1.0, 13.0))
  owner = np.repeat(np.arange(12), 3)
  assert set(retrieval.recalls(image, 5 * image[owner], owner).values()) == {1.0}


def test_chance_is_the_hypergeometric_law():
  owner = np.array([0, 0, 0, 2, 3, 3, 5])
  found = retrieval.chance(owner, images=8)
  for k in (1, 5, 10):
    drawn = min(k, 7)
    expected = np.mean([1 - scipy.stats.hypergeom(7, own, drawn).pmf(0) for own in (3, 1, 2, 1)])
    assert found[f'i2t_r{k}'] == pytest.approx(expected, abs=1e-12)
    assert found[f't2i_r{k}'] == min(k / 8, 1)


def test_random_features_score_chance():
  rng = np.random.default_rng(0)
  owner = rng.integers(0, 400, 1600)
  found = retrieval.recalls(rng.normal(size=(400, 16)), rng.normal(size=(1600, 16)), owner)
  expected = retrieval.chance(owner, 400)
  for name in ('t2i_r10', 'i2t_r10'):
    deviation = 5 * np.sqrt(expected[name] / (1600 if name[0] == 't' else 400))
    assert abs(found[name] - expected[name]) < deviation

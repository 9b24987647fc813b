"""R@1 over one index and over several against plain loops: ties, duplicates, several classes,
files, devices.
"""

import jax
import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.evals.probes import search
from tips_jax.evals.tasks import instance_retrieval as instance
from tips_jax.evals.tasks.instance_retrieval import Domain


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(search, '_BLOCK', 16)
  monkeypatch.setattr(search, '_ROWS', 32)


def classes(tags):
  tags = [tags] if isinstance(tags, (str, int, np.integer)) else tags
  return {t for t in tags if isinstance(t, str) or t >= 0}


def reference(query, tags, index=None, index_tags=None):
  """R@1 one query at a time; a wrong image that is as near as the nearest right one comes before
  it.
  """
  unit = lambda x: (
    np.nan_to_num(x) / max(np.linalg.norm(np.nan_to_num(x)), 1e-12) * np.isfinite(x).all()
  )
  alone = index is None
  index, index_tags = (query, tags) if alone else (index, index_tags)
  hits = []
  for q, (x, own) in enumerate(zip(query, tags)):
    cosine = {True: [-2.0], False: [-2.0]}
    for i, (y, other) in enumerate(zip(index, index_tags)):
      if not alone or i != q:
        cosine[bool(classes(own) & classes(other))].append(round(float(unit(x) @ unit(y)), 6))
    if len(cosine[True]) > 1:
      hits.append(max(cosine[True]) > max(cosine[False]))
  return np.mean(hits)


def problem(seed=0, n=70, d=6, k=20, noise=0.7):
  rng = np.random.default_rng(seed)
  tags = rng.integers(0, k, n)
  return (rng.normal(size=(k, d))[tags] + noise * rng.normal(size=(n, d))).astype(np.float32), tags


@pytest.mark.parametrize('seed', range(4))
def test_leave_one_out_equals_the_loop(seed):
  x, tags = problem(seed)
  found = instance.evaluate({'cars': Domain(query=x, tags=tags)})
  assert found == pytest.approx({'r1': reference(x, tags), 'r1/cars': reference(x, tags)})
  assert 0.3 < found['r1'] < 0.9


@pytest.mark.parametrize('n, m', [(1, 1), (1, 40), (40, 1), (33, 17)])
def test_an_index_of_its_own_equals_the_loop(n, m):
  x, tags = problem(n=n + m, k=5)
  tags[0] = tags[n]
  domain = Domain(query=x[n:], tags=tags[n:], index=x[:n], index_tags=tags[:n])
  assert instance.evaluate({'met': domain})['r1'] == reference(x[n:], tags[n:], x[:n], tags[:n])


def test_several_classes_and_none():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(60, 5)).astype(np.float32)
  tags = [[f'c{t}' for t in rng.choice(12, rng.integers(0, 4), replace=False)] for _ in x]
  assert instance.evaluate({'a': Domain(query=x, tags=tags)})['r1'] == pytest.approx(
    reference(x, tags)
  )
  coded = [tuple(t.encode() for t in row) for row in tags]  # as TFDS gives texts
  assert instance.evaluate({'a': Domain(query=x, tags=coded)}) == instance.evaluate(
    {'a': Domain(query=x, tags=tags)}
  )
  numbers = np.where(rng.random(60) < 0.3, -1, rng.integers(0, 9, 60))
  found = instance.search({'a': Domain(query=x, tags=numbers)})['a']
  assert found.right[found.answerable].mean() == pytest.approx(reference(x, numbers))


def test_an_image_without_a_class_is_no_question_but_may_stand_in_the_way():
  x = np.array([[1, 0], [1, 0.1], [1, 0.3]], np.float32)
  found = instance.search({'a': Domain(query=x, tags=np.array([0, -1, 0]))})['a']
  assert found.answerable.tolist() == [True, False, True] and not found.right.any()
  found = instance.search({'a': Domain(query=x[::2], tags=np.array([0, 0]))})['a']
  assert found.right.all()


@pytest.mark.parametrize('seed', range(3))
def test_ties_duplicates_and_broken_rows(seed):
  rng = np.random.default_rng(seed)
  few = rng.normal(size=(6, 7)).astype(np.float32)
  x = few[rng.integers(0, 6, 90)]  # fifteen copies of each, at all places of a block
  x[rng.integers(0, 90, 5)] = np.nan
  x[rng.integers(0, 90, 3)] = 0
  tags = rng.integers(0, 3, 90)
  assert instance.evaluate({'a': Domain(query=x, tags=tags)})['r1'] == pytest.approx(
    reference(x, tags)
  )
  apart = np.repeat(np.arange(6), 15)
  twins = few[apart] * rng.uniform(0.5, 2, (90, 1)).astype(np.float32)  # the length does not count
  assert instance.evaluate({'a': Domain(query=twins, tags=apart)})['r1'] == 1


@pytest.mark.parametrize('value', [0.0, 1.0, np.nan])
def test_collapsed_features_score_nothing(value):
  assert (
    instance.evaluate({'a': Domain(query=np.full((40, 4), value), tags=np.arange(40) % 4)})['r1']
    == 0
  )


def domains():
  (a, ta), (b, tb), (c, tc) = problem(1, 50), problem(2, 61), problem(3, 45)
  indexed = Domain(query=b[:20], tags=tb[:20], index=b[20:], index_tags=tb[20:])
  return {'sop': Domain(query=a, tags=ta), 'gldv2': indexed, 'cars': Domain(query=c, tags=tc)}


def test_each_domain_alone_and_their_mean():
  parts = domains()
  found = instance.evaluate(parts)
  expected = {
    f'r1/{name}': reference(d.query, d.tags, d.index, d.index_tags) for name, d in parts.items()
  }
  assert found == pytest.approx({'r1': np.mean(list(expected.values())), **expected})


def test_one_merged_index():
  parts = domains()
  rows = [
    (x, f'{name}/{t}')
    for name, d in parts.items()
    for x, t in zip(*((d.query, d.tags) if d.index is None else (d.index, d.index_tags)))
  ]
  index, tags = np.stack([x for x, _ in rows]), [t for _, t in rows]
  found, searched = instance.evaluate(parts, merged=True), instance.search(parts, merged=True)
  assert found['r1'] < instance.evaluate(parts)['r1']
  first = dict(sop=0, gldv2=50, cars=91)
  for name, d in parts.items():
    own = [f'{name}/{t}' for t in d.tags]
    hits = {}
    for q, x in enumerate(d.query):
      cosine = index @ x / np.linalg.norm(index, axis=1) / np.linalg.norm(x)
      if d.index is None:
        cosine[first[name] + q] = -2
      if any(t == own[q] and c > -2 for t, c in zip(tags, cosine)):
        hits[q] = tags[cosine.argmax()] == own[q]
    assert np.flatnonzero(searched[name].answerable).tolist() == list(hits)
    assert searched[name].right[list(hits)].tolist() == list(hits.values())
    assert found[f'r1/{name}'] == pytest.approx(np.mean(list(hits.values())))


def test_a_query_is_right_where_its_class_is_nearest():
  x = np.array([[1, 0], [1, 0.1], [1, 0.2], [0, 1], [0, 1]], np.float32)
  found = instance.search({'a': Domain(query=x, tags=['a', 'b', 'a', 'c', 'd'])})['a']
  assert found.answerable.tolist() == [True, False, True, False, False]
  assert found.right[found.answerable].tolist() == [False, False]
  found = instance.search({'a': Domain(query=x, tags=['a', 'a', 'b', 'c', 'b'])})['a']
  assert found.answerable.tolist() == [True, True, True, False, True]
  assert found.right.tolist() == [True, False, False, False, False]


def test_chance_is_what_random_features_score():
  rng = np.random.default_rng(0)
  many = lambda n: (rng.normal(size=(n, 8)).astype(np.float32), rng.integers(0, 4, n))
  (a, ta), (b, tb) = many(600), many(900)
  parts = {
    'a': Domain(query=a, tags=ta),
    'b': Domain(query=b[:500], tags=tb[:500], index=b[500:], index_tags=tb[500:]),
  }
  for merged in (False, True):
    found, expected = instance.evaluate(parts, merged=merged), instance.chance(parts, merged=merged)
    for name, value in expected.items():
      assert abs(found[name] - value) < 4 * np.sqrt(value / 500)
  two = {'a': Domain(query=a[:5], tags=['x', 'x', ('x', 'y'), 'y', 'z'])}
  assert instance.chance(two)['r1'] == pytest.approx(np.mean([2, 2, 3, 1]) / 4)


def test_features_on_disk_blocks_and_devices_change_nothing(tmp_path, monkeypatch):
  x, tags = problem(n=300, d=33, k=60)
  np.save(tmp_path / 'x.npy', x)
  lazy = Domain(query=np.load(tmp_path / 'x.npy', mmap_mode='r'), tags=tags)
  whole = instance.search({'a': lazy})['a']
  local = jax.local_devices()
  assert len(local) == 8
  monkeypatch.setattr(jax, 'local_devices', lambda: local[:1])
  one = instance.search({'a': Domain(query=x, tags=tags)})['a']
  monkeypatch.setattr(search, '_ROWS', 1024)
  monkeypatch.setattr(search, '_BLOCK', 512)
  block = instance.search({'a': Domain(query=x, tags=tags)})['a']
  for field in ('answerable', 'right'):
    np.testing.assert_array_equal(getattr(one, field), getattr(whole, field))
    np.testing.assert_array_equal(getattr(one, field), getattr(block, field))


def test_bad_input():
  x, tags = problem(n=20)
  for domain, message in [
    (Domain(query=x, tags=tags[:19]), '20 queries with 19 tags'),
    (Domain(query=x, tags=tags, index=x), 'index of 20 with no tags'),
    (Domain(query=x, tags=np.arange(20)), "'a': got 20 queries, none of which shares a class"),
    (Domain(query=x, tags=['n'] * 20, index=x, index_tags=['m'] * 20), 'none of which'),
    (
      Domain(query=x, tags=tags, index=x[:, :3], index_tags=tags),
      r'expected \[N, D\] and \[M, D\]',
    ),
  ]:
    with pytest.raises(InputError, match=message):
      instance.evaluate({'a': domain})
  with pytest.raises(InputError, match='no domain'):
    instance.evaluate({})

"""Instance and fine-grained retrieval: R@1 as in UnED (Ypsilantis et al. 2023, arXiv 2309.01858).

The nearest image by cosine must share a class with the query. A domain has an index of its own, or
its queries are searched among each other, each without itself. UnED searches the eight domains in
one merged index; the number that is reported is the mean over the domains.
"""

import collections
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.evals.features.splits import TaskInputs
from tips_jax.evals.probes.search import nearest, sweep
from tips_jax.evals.tasks.common import (
  for_all_tokens,
  tokens,
)
from tips_jax.evals.tasks.spec import Metric, Result, TaskSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
  """query [M, D] and index [N, D] features, which may lie on disk; without an index the queries are
  it.

  tags, index_tags: the class of each row, a text or a number, or several; a row without (none, or a
  label below 0) is not right for any query. Classes of two domains are different ones, even of the
  same name.
  """

  query: Any
  tags: Any
  index: Any = None
  index_tags: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """Of the M queries of a domain. `asked` [M] bool: some image of the index is right; only those
  count.

  `right` [M] bool: such an image is nearer than all others. `hit`, `miss` [M] int: rows of the
  nearest right and wrong image, -1 where there is none, in the index of domain number `hit_domain`,
  `miss_domain` [M].
  """

  asked: np.ndarray
  right: np.ndarray
  hit: np.ndarray
  miss: np.ndarray
  hit_domain: np.ndarray
  miss_domain: np.ndarray


def evaluate(domains: dict[str, Domain], *, merged: bool = False) -> dict[str, float]:
  """'r1', the mean over the domains, and 'r1/NAME' of each; see `search`."""
  return _mean(
    {
      name: float(found.right[found.asked].mean())
      for name, found in search(domains, merged=merged).items()
    }
  )


def search(domains: dict[str, Domain], *, merged: bool = False) -> dict[str, Found]:
  """Searches every domain in its own index or, `merged`, in those of all domains together.

  A wrong image with the same cosine as the right one counts as nearer, so that constant features
  score 0, as in evals/tasks/retrieval.py. Rows that are not finite count as zero. InputError where
  a domain has no query that can be right.
  """
  _check(domains)
  together = [list(domains.items())] if merged else [[item] for item in domains.items()]
  return {name: found for group in together for name, found in _search(dict(group)).items()}


def chance(domains: dict[str, Domain], *, merged: bool = False) -> dict[str, float]:
  """What a random order of the index scores, under the names of `evaluate`."""
  _check(domains)
  sizes = {name: len(_index(domain)[1]) for name, domain in domains.items()}
  result = {}
  for name, domain in domains.items():
    size = sum(sizes.values()) if merged else sizes[name]
    right = _right_images(domain)
    result[name] = float(right[right > 0].mean() / (size - (domain.index is None)))
  return _mean(result)


def _mean(values):
  return {
    'r1': float(np.mean(list(values.values()))),
    **{f'r1/{name}': value for name, value in values.items()},
  }


def _search(domains):
  """All queries of the domains in all of their indexes."""
  numbers, groups, query_groups, first = {}, [], [], 0
  tags, index_tags = [], []
  for name, domain in domains.items():
    rows = first + np.arange(len(_index(domain)[1]))
    groups.append(rows)
    query_groups.append(
      rows if domain.index is None else np.full(len(domain.query), -1)
    )  # never itself
    number = lambda tag, name=name: numbers.setdefault((name, tag), len(numbers))
    tags += [[number(tag) for tag in row] for row in map(several, domain.tags)]
    index_tags += [[number(tag) for tag in row] for row in map(several, _index(domain)[1])]
    first += len(rows)
  start = {side: (np.float32(-np.inf), np.int32(-1)) for side in ('right', 'wrong')}
  found = sweep(
    _nearest_of_both,
    start,
    [_index(d)[0] for d in domains.values()],
    [d.query for d in domains.values()],
    groups=np.concatenate(groups),
    query_groups=np.concatenate(query_groups),
    columns=_rectangle(index_tags, -2),
    query_columns=_rectangle(tags, -1),
  )
  (hit_score, hit), (miss_score, miss) = found['right'], found['wrong']
  starts, begin, result = np.array([rows[0] for rows in groups]), 0, {}
  for name, domain in domains.items():
    own = slice(begin, begin + len(domain.query))
    fields = {'asked': hit[own] >= 0, 'right': hit_score[own] > miss_score[own]}
    for side, rows in (('hit', hit[own]), ('miss', miss[own])):
      place = np.searchsorted(starts, np.maximum(rows, 0), side='right') - 1
      fields |= {side: np.where(rows >= 0, rows - starts[place], -1), f'{side}_domain': place}
    result[name] = Found(**fields)
    begin = own.stop
  return result


def _nearest_of_both(found, scores, rows, tags_nT, query_tags_mT):
  """The nearest image with a class of the query and the nearest without; the first of equals."""
  same = (query_tags_mT[:, None, :, None] == tags_nT[None, :, None, :]).any((2, 3))
  result = {}
  for side, mask in (('right', same), ('wrong', ~same)):
    own = jnp.where(mask, scores, -jnp.inf)
    best, before = own.max(1), found[side]
    nearer = best > before[0]
    result[side] = (
      jnp.where(nearer, best, before[0]),
      jnp.where(nearer, rows[own.argmax(1)], before[1]),
    )
  return result


def several(tags: Any) -> list:
  """The classes of one row as a list: of a text or a number, or of several; a number below 0 is
  none.
  """
  one = isinstance(tags, (str, bytes)) or np.ndim(tags) == 0
  tags = [tags] if one else list(tags)
  tags = [
    tag.decode() if isinstance(tag, bytes) else tag.item() if hasattr(tag, 'item') else tag
    for tag in tags
  ]
  return [tag for tag in tags if isinstance(tag, str) or tag >= 0]


def _rectangle(rows, missing):
  """int32 [N, T] of lists of numbers, at least one wide."""
  result = np.full((len(rows), max(map(len, rows), default=0) or 1), missing, np.int32)
  for line, row in zip(result, rows):
    line[: len(row)] = row
  return result


def _index(domain):
  return (domain.query, domain.tags) if domain.index is None else (domain.index, domain.index_tags)


def _right_images(domain):
  """How many images of the index are right for each query [M]."""
  rows_of, known = collections.defaultdict(set), {}
  for row, tags in enumerate(map(several, _index(domain)[1])):
    for tag in tags:
      rows_of[tag].add(row)
  for tags in map(several, domain.tags):
    if tuple(tags) not in known:
      known[tuple(tags)] = len(set().union(*(rows_of.get(tag, ()) for tag in tags)))
  own = domain.index is None
  return np.array(
    [known[tuple(tags)] - (own and bool(tags)) for tags in map(several, domain.tags)], np.int64
  )


def _check(domains):
  for name, domain in domains.items():
    index, index_tags = _index(domain)
    if index_tags is None or len(index) != len(index_tags) or len(domain.query) != len(domain.tags):
      raise InputError(
        f'instance retrieval, {name!r}: got {len(domain.query)} queries with {len(domain.tags)} '
        'tags, '
        f'and an index of {len(index)} with {len(index_tags) if index_tags is not None else "no"} '
        'tags; '
        'expected a class, or several, for each'
      )
    if not _right_images(domain).any():
      raise InputError(
        f'instance retrieval, {name!r}: got {len(domain.query)} queries, none of which shares a '
        'class '
        f'with another image among the {len(index)} of the index; expected some'
      )
  if not domains:
    raise InputError('instance retrieval: got no domain; expected at least one')


_TOP = 6  # images of an example
_INSTANCES = (Metric('r1', 'R@1', shown=True), Metric('r1_own', 'R@1, own index'))


class Pool:
  """Data sets of one benchmark: their index sets can be searched as one. What they share is
  computed once.
  """

  def __init__(self):
    self.works, self._domains, self._found = [], {}, {}

  def whole(self, size: int) -> bool:
    """Whether all `size` data sets of the benchmark are there."""
    return len(self.works) == size > 1

  def domains(self, name: str, works: list[TaskInputs] | None = None) -> dict:
    """data set -> Domain of the features `name`."""
    return {work.evaluation.dataset: self._domain(name, work) for work in works or self.works}

  def search(self, name: str) -> dict:
    """data set -> Found, every query in the index of all data sets."""
    if name not in self._found:
      self._found[name] = search(self.domains(name), merged=True)
    return self._found[name]

  def _domain(self, name, work):
    key = name, work.evaluation.dataset
    if key not in self._domains:
      test, index = places(work)[0], places(work)[-1]
      own = (
        {}
        if index is test
        else dict(index=index.arrays[name], index_tags=_tags(work.evaluation, 'index', index))
      )
      self._domains[key] = Domain(
        query=test.arrays[name], tags=_tags(work.evaluation, 'test', test), **own
      )
    return self._domains[key]


def places(work: TaskInputs) -> list:
  """The DatasetFeatures of the queries and, where the data set has one, of the index."""
  return [work.part(role) for role in ('test', 'index') if role in work.evaluation.splits]


def measure(work: TaskInputs) -> dict[str, Any]:
  """R@1 of the nearest image, in the index of all data sets of the benchmark and in the data set's
  own.

  UnED's protocol is one index merged of all eight domains ('r1'); its code also measures each
  domain in its own index ('r1_own'). Which of them TIPS averaged is not published. Where not all
  domains are measured, 'r1' is of the own one.
  """
  pool, wanted = work.pool or Pool(), work.evaluation.options.get('merged', 1)
  merged = pool.whole(wanted)
  metrics, even, examples = {}, {}, []
  for name, prefix in tokens(work.encoder.cls_names):
    domain = pool.domains(name, [work])
    metrics[f'{prefix}r1'] = own = evaluate(domain)['r1']
    if merged:
      found = pool.search(name)[work.evaluation.dataset]
      metrics |= {f'{prefix}r1': float(found.right[found.asked].mean()), f'{prefix}r1_own': own}
    if not examples:
      even['r1'] = even['r1_own'] = chance(domain)['r1']
      if merged:
        even['r1'] = chance(pool.domains(name), merged=True)[f'r1/{work.evaluation.dataset}']
      examples = _found_instances(
        work, pool.works if merged else [work], name, pool.domains(name, [work])
      )
  return {
    'metrics': metrics,
    'chance': for_all_tokens(even, metrics),
    'examples': examples,
    'options': {'merged': wanted if merged else 1},
  }


def _tags(job, role, part):
  """The class, or classes, of each row."""
  found = job.data.instances(job.splits[role])
  return part.label if found is None else [found[i] for i in part.rows]


def _found_instances(work, near, name, own):
  """Queries and what is nearest to each in the indexes of the works `near`; `own`: the Domain of
  the data set.
  """
  test, [domain], found = work.part('test'), own.values(), []
  tags = domain.tags if domain.index is None else domain.index_tags
  shown = np.array(test.shown())
  queries = np.asarray(test.arrays[name][shown])
  for other in near:
    part = places(other)[-1]
    alone = other is work and part is test  # an image is not found by itself
    groups = dict(groups=np.arange(len(part)), query_groups=shown) if alone else {}
    scores, rows = nearest(part.arrays[name], queries, k=min(_TOP, len(part) - alone), **groups)
    found += [(scores[:, k], rows[:, k], part, other is work) for k in range(rows.shape[1])]
  examples = []
  for q, i in enumerate(shown.tolist()):
    wanted = set(several(domain.tags[i]))
    best = sorted(found, key=lambda one: -one[0][q])[:_TOP]
    right = [
      place
      for place, (_, rows, _, here) in enumerate(best)
      if here and wanted & set(several(tags[rows[q]]))
    ]
    examples.append(
      {
        'image': test.image(i),
        'images': [part.image(rows[q]) for _, rows, part, _ in best],
        'right': right,
      }
    )
  return examples


def _draw(result: Result) -> bytes | None:
  from tips_jax.evals.report import plotting  # matplotlib is slow to import

  return plotting.retrieved(result)


SPEC = TaskSpec(
  name='instance_retrieval',
  title='Instance retrieval',
  caption=(
    'A query image and the images nearest to it, those of the same instance framed: in a good '
    'result the frames are at the left.'
  ),
  measure=measure,
  metrics=_INSTANCES,
  draw=_draw,
  roles=('test',),
  annotation='label',
  charted=True,
)

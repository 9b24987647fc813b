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
from tips_jax.evals.tasks import drawing
from tips_jax.evals.tasks.common import for_all_tokens, tokens
from tips_jax.evals.tasks.spec import Metric, TaskSpec

# Images of an example.
_TOP = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
  """The queries of a data set, and the index that they are searched in.

  The class of a row is a text or a number, or several; a row without (none, or a label below 0) is
  not right for any query. Classes of two domains are different ones, even of the same name.
  """

  # Features [M, D], which may be memory maps, and the class of each.
  query: Any
  tags: Any
  # Features [N, D] and their classes; without, the queries are searched among each other.
  index: Any = None
  index_tags: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hits:
  """What became of the M queries of a domain."""

  # bool [M]: some image of the index is right; UnED counts only those.
  answerable: np.ndarray
  # bool [M]: such an image is nearer than all others.
  right: np.ndarray

  @property
  def r1(self) -> float:
    return float(self.right[self.answerable].mean())


def evaluate(domains: dict[str, Domain], *, merged: bool = False) -> dict[str, float]:
  """'r1', the mean over the domains, and 'r1/NAME' of each; see `search`."""
  return _mean({name: hits.r1 for name, hits in search(domains, merged=merged).items()})


def search(domains: dict[str, Domain], *, merged: bool = False) -> dict[str, Hits]:
  """Searches every domain in its own index or, `merged`, in those of all domains together.

  A wrong image with the same cosine as the right one counts as nearer, so that constant features
  score 0, as in evals/tasks/retrieval.py. Rows that are not finite count as zero. InputError where
  a domain has no query that can be right.
  """
  _check(domains)
  if merged:
    return _search(domains)
  hits = {}
  for name, domain in domains.items():
    hits |= _search({name: domain})
  return hits


def chance(domains: dict[str, Domain], *, merged: bool = False) -> dict[str, float]:
  """What a random order of the index scores, under the names of `evaluate`."""
  _check(domains)
  sizes = {name: len(_index(domain)[1]) for name, domain in domains.items()}
  result = {}
  for name, domain in domains.items():
    size = sizes[name]
    if merged:
      size = sum(sizes.values())
    if domain.index is None:
      size -= 1  # the query itself is no candidate
    right = _right_images(domain)
    result[name] = float(right[right > 0].mean() / size)
  return _mean(result)


def _mean(values):
  result = {'r1': float(np.mean(list(values.values())))}
  for name, value in values.items():
    result[f'r1/{name}'] = value
  return result


def _search(domains):
  """All queries of the domains in all of their indexes."""
  groups, query_groups, tags, index_tags = [], [], [], []
  numbers = {}  # (domain, class) -> number: equal names in two domains are two classes
  first = 0
  for name, domain in domains.items():
    rows = first + np.arange(len(_index(domain)[1]))
    first += len(rows)
    groups.append(rows)
    if domain.index is None:
      query_groups.append(rows)  # each row is its own group, so that no query finds itself
    else:
      query_groups.append(np.full(len(domain.query), -1))
    tags += _numbered(name, domain.tags, numbers)
    index_tags += _numbered(name, _index(domain)[1], numbers)
  right, wrong = sweep(
    _nearest_of_both,
    (np.float32(-np.inf), np.float32(-np.inf)),
    [_index(domain)[0] for domain in domains.values()],
    [domain.query for domain in domains.values()],
    groups=np.concatenate(groups),
    query_groups=np.concatenate(query_groups),
    # Two fillers, so that rows without a class do not match.
    columns=_rectangle(index_tags, -2),
    query_columns=_rectangle(tags, -1),
  )
  hits = {}
  begin = 0
  for name, domain in domains.items():
    queries = slice(begin, begin + len(domain.query))
    begin = queries.stop
    # Not >=: an equally near wrong image comes first.
    nearer = right[queries] > wrong[queries]
    hits[name] = Hits(answerable=np.isfinite(right[queries]), right=nearer)
  return hits


def _nearest_of_both(state, scores, rows, tags_nT, query_tags_mT):
  """The best cosine of an image with a class of the query, and of an image without."""
  del rows
  right, wrong = state
  same = (query_tags_mT[:, None, :, None] == tags_nT[None, :, None, :]).any((2, 3))
  right = jnp.maximum(right, jnp.where(same, scores, -jnp.inf).max(1))
  wrong = jnp.maximum(wrong, jnp.where(same, -jnp.inf, scores).max(1))
  return right, wrong


def several(tags: Any) -> list:
  """The classes of one row as a list: of a text or a number, or of several; a number below 0 is
  none.
  """
  if isinstance(tags, (str, bytes)) or np.ndim(tags) == 0:
    tags = [tags]
  result = []
  for tag in tags:
    if isinstance(tag, bytes):  # as TFDS gives texts
      tag = tag.decode()
    elif hasattr(tag, 'item'):
      tag = tag.item()
    if isinstance(tag, str) or tag >= 0:
      result.append(tag)
  return result


def _numbered(domain, tags, numbers):
  """The classes of each row as numbers, which `numbers` gets where they are new."""
  rows = []
  for row in map(several, tags):
    rows.append([numbers.setdefault((domain, tag), len(numbers)) for tag in row])
  return rows


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
  rows_of = collections.defaultdict(set)
  for row, tags in enumerate(_index(domain)[1]):
    for tag in several(tags):
      rows_of[tag].add(row)
  counts = []
  known = {}  # many queries have the same classes
  for tags in map(several, domain.tags):
    key = tuple(tags)
    if key not in known:
      # A union: an image that shares two classes counts once.
      known[key] = len(set().union(*(rows_of.get(tag, ()) for tag in tags)))
      if domain.index is None and tags:
        known[key] -= 1  # the query itself
    counts.append(known[key])
  return np.array(counts, np.int64)


def _check(domains):
  if not domains:
    raise InputError('instance retrieval: got no domain; expected at least one')
  for name, domain in domains.items():
    where = f'instance retrieval, {name!r}: got {len(domain.query)} queries'
    index, index_tags = _index(domain)
    tags = 'no'
    if index_tags is not None:
      tags = len(index_tags)
    if len(index) != tags or len(domain.query) != len(domain.tags):
      raise InputError(
        f'{where} with {len(domain.tags)} tags, and an index of {len(index)} with {tags} tags; '
        'expected a class, or several, for each'
      )
    if not _right_images(domain).any():
      raise InputError(
        f'{where}, none of which shares a class with another image among the {len(index)} of the '
        'index; expected some'
      )


class Pool:
  """Data sets of one benchmark: their index sets can be searched as one. What they share is
  computed once.
  """

  def __init__(self):
    self.members: list[TaskInputs] = []
    self._domains = {}
    self._hits = {}

  def complete(self, size: int) -> bool:
    """Whether all `size` data sets of the benchmark are there."""
    return len(self.members) == size > 1

  def domain(self, token: str, inputs: TaskInputs) -> Domain:
    """The Domain of a data set, of the features of a CLS token."""
    key = token, inputs.evaluation.dataset
    if key not in self._domains:
      queries, index = _searched(inputs)
      indexed = {}
      if index is not queries:
        indexed = {'index': index.arrays[token], 'index_tags': _tags(inputs, 'index', index)}
      tags = _tags(inputs, 'test', queries)
      self._domains[key] = Domain(query=queries.arrays[token], tags=tags, **indexed)
    return self._domains[key]

  def domains(self, token: str) -> dict[str, Domain]:
    """data set -> Domain."""
    return {inputs.evaluation.dataset: self.domain(token, inputs) for inputs in self.members}

  def search(self, token: str) -> dict[str, Hits]:
    """data set -> Hits, every query in the index of all data sets."""
    if token not in self._hits:
      self._hits[token] = search(self.domains(token), merged=True)
    return self._hits[token]


def measure(inputs: TaskInputs) -> dict[str, Any]:
  """R@1 of the nearest image, in the index of all data sets of the benchmark and in the data set's
  own.

  UnED's protocol is one index merged of all eight domains ('r1'); its code also measures each
  domain in its own index ('r1_own'). Which of them TIPS averaged is not published. Where not all
  domains are measured, 'r1' is of the own one.
  """
  dataset = inputs.evaluation.dataset
  pool = inputs.pool or Pool()
  size = inputs.evaluation.options.get('merged', 1)
  merged = pool.complete(size)
  metrics = {}
  for token, prefix in tokens(inputs.encoder.cls_names):
    r1_own = evaluate({dataset: pool.domain(token, inputs)})['r1']
    metrics[f'{prefix}r1'] = r1_own
    if merged:
      metrics[f'{prefix}r1'] = pool.search(token)[dataset].r1
      metrics[f'{prefix}r1_own'] = r1_own
  first = inputs.encoder.cls_names[0]
  domain = pool.domain(first, inputs)
  r1_own = chance({dataset: domain})['r1']
  chances = {'r1': r1_own, 'r1_own': r1_own}
  searched = [inputs]
  if merged:
    chances['r1'] = chance(pool.domains(first), merged=True)[f'r1/{dataset}']
    searched = pool.members
  else:
    size = 1
  return {
    'metrics': metrics,
    'chance': for_all_tokens(chances, metrics),
    'examples': _examples(inputs, searched, first, domain),
    'options': {'merged': size},
  }


def _searched(inputs):
  """SplitFeatures of the queries and of the index; the same ones, where there is no index."""
  queries = inputs.part('test')
  if 'index' in inputs.evaluation.splits:
    return queries, inputs.part('index')
  return queries, queries


def _tags(inputs, role, part):
  """The class, or classes, of each row."""
  instances = inputs.evaluation.data.instances(inputs.evaluation.splits[role])
  if instances is None:
    return part.label
  # Images that cannot be read have no row.
  return [instances[i] for i in part.rows]


def _examples(inputs, searched, token, domain):
  """Queries of the Domain of `inputs`, and what is nearest to each in the indexes of `searched`."""
  test = inputs.part('test')
  tags = _index(domain)[1]
  drawn = np.array(test.shown())
  queries = np.asarray(test.arrays[token][drawn])
  candidates = []  # (cosines to all queries, rows, SplitFeatures) of each rank in each index
  for other in searched:
    _, index = _searched(other)
    groups = {}
    count = len(index)
    if index is test:  # an image is not found by itself
      groups = {'groups': np.arange(count), 'query_groups': drawn}
      count -= 1
    cosines, rows = nearest(index.arrays[token], queries, k=min(_TOP, count), **groups)
    for rank in range(rows.shape[1]):
      candidates.append((cosines[:, rank], rows[:, rank], index))
  own_index = _searched(inputs)[1]
  examples = []
  for q, query in enumerate(drawn.tolist()):
    classes = set(several(domain.tags[query]))
    best = sorted(candidates, key=lambda candidate: -candidate[0][q])[:_TOP]
    right = []
    for place, (_, rows, index) in enumerate(best):
      # Classes of another data set are others, even of the same name.
      if index is own_index and classes & set(several(tags[rows[q]])):
        right.append(place)
    examples.append(
      {
        'image': test.image(query),
        'images': [index.image(rows[q]) for _, rows, index in best],
        'right': right,
      }
    )
  return examples


SPEC = TaskSpec(
  name='instance_retrieval',
  title='Instance retrieval',
  caption=(
    'A query image and the images nearest to it, those of the same instance framed: in a good '
    'result the frames are at the left.'
  ),
  measure=measure,
  metrics=(Metric('r1', 'R@1', shown=True), Metric('r1_own', 'R@1, own index')),
  draw=drawing.retrieved,
  roles=('test',),
  annotation='label',
  charted=True,
)

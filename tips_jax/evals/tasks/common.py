"""The tasks of whole images: classes, instances, texts. Each takes a TaskInputs and gives the
fields of an Result.

Every CLS token is measured. Metrics of the first one have plain names, the others' are
'TOKEN/NAME'; tasks with texts use the tokens that lie in the space of the texts: all of them, or,
behind a projection, the projected one.
"""

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.evals.features import reading as features
from tips_jax.evals.probes import logistic as linear
from tips_jax.evals.probes import masks, search
from tips_jax.evals.tasks import instance_retrieval as instance
from tips_jax.evals.tasks import knn, prompts, retrieval, zeroshot

_TOP = 6  # images of an example of retrieval
_STEPS = 500  # at most, of L-BFGS: it stops where the loss does


def neighbors(work):
  """k nearest neighbors, k chosen on the training split itself, each row left out in turn."""
  train, test = work.part('train'), work.part('test')
  o, metrics, chosen, first = work.job.options, {}, {}, None
  for name, prefix in _tokens(work.encoder.cls_names):
    x = train.arrays[name]
    k, _ = knn.choose_k(x, train.label, ks=o['k'], temperature=o['temperature'])
    found = knn.predict(x, train.label, test.arrays[name], k=k, temperature=o['temperature'])
    first = found if first is None else first
    metrics[f'{prefix}accuracy'], chosen[f'{prefix}k'] = _share(found, test.label), k
  return _classified(
    work, test, metrics, {'accuracy': knn.majority(train.label, test.label)}, first
  ) | {'chosen': chosen}


def logistic(work):
  """Logistic regression, its L2 strength chosen on held-out training images, brought to its optimum
  on all of them.
  """
  train, test = work.part('train'), work.part('test')
  metrics, chosen, first = {}, {}, None
  seen = np.flatnonzero(train.label >= 0)
  for name, prefix in _tokens(work.encoder.cls_names):
    probe = linear.fit(
      train.arrays[name][seen],
      train.label[seen],
      classes=int(train.label.max()) + 1,
      steps=work.job.options.get('steps', _STEPS),
    )
    found = np.concatenate(
      [probe.logits(test.arrays[name][i : i + 4096]).argmax(-1) for i in range(0, len(test), 4096)]
    )
    first = found if first is None else first
    metrics[f'{prefix}accuracy'], chosen[f'{prefix}l2'] = _share(found, test.label), probe.l2
  return _classified(
    work, test, metrics, {'accuracy': knn.majority(train.label, test.label)}, first
  ) | {'chosen': chosen}


def named_classes(work):
  """Zero-shot classification: the class whose texts lie nearest."""
  test, o = work.part('test'), work.job.options
  names = class_names(work.job)
  classes = zeroshot.class_embeddings(work.texts, names, prompts.templates(o['templates']))
  metrics, first = {}, None
  for name, prefix in _tokens(tokens := joint(test, work.encoder.cls_names)):
    scores = zeroshot.evaluate(tokens, test.label, classes, cls=name)
    metrics |= {prefix + _ACCURACY.get(k, k): v for k, v in scores.items()}
    first = zeroshot.nearest(tokens[name], classes, k=1)[:, 0] if first is None else first
  chance = {_ACCURACY.get(k, k): v for k, v in zeroshot.chance(len(names)).items()}
  return _classified(work, test, metrics, chance, first)


class Pool:
  """Data sets of one benchmark: their index sets can be searched as one. What they share is
  computed once.
  """

  def __init__(self):
    self.works, self._domains, self._found = [], {}, {}

  def whole(self, size) -> bool:
    """Whether all `size` data sets of the benchmark are there."""
    return len(self.works) == size > 1

  def domains(self, name, works=None) -> dict:
    """data set -> Domain of the features `name`."""
    return {work.job.dataset: self._domain(name, work) for work in works or self.works}

  def search(self, name) -> dict:
    """data set -> Found, every query in the index of all data sets."""
    if name not in self._found:
      self._found[name] = instance.search(self.domains(name), merged=True)
    return self._found[name]

  def _domain(self, name, work):
    key = name, work.job.dataset
    if key not in self._domains:
      test, index = places(work)[0], places(work)[-1]
      own = (
        {}
        if index is test
        else dict(index=index.arrays[name], index_tags=_tags(work.job, 'index', index))
      )
      self._domains[key] = instance.Domain(
        query=test.arrays[name], tags=_tags(work.job, 'test', test), **own
      )
    return self._domains[key]


def places(work) -> list:
  """The DatasetFeatures of the queries and, where the data set has one, of the index."""
  return [work.part(role) for role in ('test', 'index') if role in work.job.splits]


def instances(work):
  """R@1 of the nearest image, in the index of all data sets of the benchmark and in the data set's
  own.

  UnED's protocol is one index merged of all eight domains ('r1'); its code also measures each
  domain in its own index ('r1_own'). Which of them TIPS averaged is not published. Where not all
  domains are measured, 'r1' is of the own one.
  """
  pool, wanted = work.pool or Pool(), work.job.options.get('merged', 1)
  merged = pool.whole(wanted)
  metrics, chance, examples = {}, {}, []
  for name, prefix in _tokens(work.encoder.cls_names):
    domain = pool.domains(name, [work])
    metrics[f'{prefix}r1'] = own = instance.evaluate(domain)['r1']
    if merged:
      found = pool.search(name)[work.job.dataset]
      metrics |= {f'{prefix}r1': float(found.right[found.asked].mean()), f'{prefix}r1_own': own}
    if not examples:
      chance['r1'] = chance['r1_own'] = instance.chance(domain)['r1']
      if merged:
        chance['r1'] = instance.chance(pool.domains(name), merged=True)[f'r1/{work.job.dataset}']
      examples = _found_instances(
        work, pool.works if merged else [work], name, pool.domains(name, [work])
      )
  return {
    'metrics': metrics,
    'chance': _for_all(chance, metrics),
    'examples': examples,
    'options': {'merged': wanted if merged else 1},
  }


def texts_and_images(work):
  """Recalls of images by texts and of texts by images, of all texts of an image."""
  test = work.part('test')
  texts, owner = [], []
  for i in range(len(test)):
    found = features.texts_of(test.record(i), work.job.data.text_field)
    texts += found
    owner += [i] * len(found)
  if not texts:
    raise InputError(
      f'{work.job.dataset}: images without captions: {len(test):,} of {len(test):,}; expected some'
    )
  text, owner = work.texts(texts), np.array(owner)
  metrics, examples = {}, []
  for name, prefix in _tokens(tokens := joint(test, work.encoder.cls_names)):
    metrics |= {prefix + k: v for k, v in retrieval.recalls(tokens[name], text, owner).items()}
    examples = examples or _found_images(test, tokens[name], text, texts, owner)
  return {
    'metrics': metrics,
    'chance': _for_all(retrieval.chance(owner, len(test)), metrics),
    'examples': examples,
  }


def joint(part, cls_names) -> dict:
  """The image embeddings [R, E] in the space of the texts, by CLS token.

  A token that is the embedding itself, unprojected, makes all of them candidates; else there is the
  embedding alone.
  """
  same = any(
    np.array_equal(part.arrays[name][:8], part.arrays['embedding'][:8]) for name in cls_names
  )
  return (
    {name: part.arrays[name] for name in cls_names}
    if same
    else {'embedding': part.arrays['embedding']}
  )


def class_names(job) -> tuple:
  """Names of the classes of an annotation for zero-shot tasks: the protocol's, or the data set's
  own.
  """
  if job.task.classes:
    return job.task.classes
  split = job.splits['test']
  return tuple(job.data.mask_classes if job.spec.needs == 'mask' else job.data.label_names(split))


_ACCURACY = {'top1': 'accuracy'}


def _tokens(names):
  """(name, prefix of its metrics) of each CLS token."""
  return [(name, f'{name}/' if i else '') for i, name in enumerate(names)]


def _share(found, truth):
  asked = truth >= 0
  return float((found == truth)[asked].mean()) if asked.any() else float('nan')


def _for_all(chance, metrics):
  """The chance numbers under the names of all tokens."""
  return {
    name: chance[name.rsplit('/', 1)[-1]] for name in metrics if name.rsplit('/', 1)[-1] in chance
  }


def _classified(work, test, metrics, chance, found):
  """Fields of an Result of a classifier whose answers for the first token are `found` [R]."""
  asked = test.label >= 0
  size = int(max(test.label.max(initial=0), found.max(initial=0))) + 1
  names = class_names(work.job)
  names = tuple(one if isinstance(one, str) else one[0] for one in names)
  return {
    'metrics': metrics,
    'chance': _for_all(chance, metrics),
    'classes': names,
    'confusion': masks.confusion(test.label[asked], found[asked], size=max(size, len(names))),
    'examples': [
      {'image': test.image(i), 'truth': int(test.label[i]), 'predicted': int(found[i])}
      for i in test.shown()
      if test.label[i] >= 0
    ],
  }


def _tags(job, role, part):
  """The class, or classes, of each row."""
  found = job.data.instances(job.splits[role])
  return part.label if found is None else [found[i] for i in part.rows]


def _found_instances(work, near, name, own):
  """Queries and what lies nearest to each in the indexes of the works `near`; `own`: the Domain of
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
    scores, rows = search.nearest(
      part.arrays[name], queries, k=min(_TOP, len(part) - alone), **groups
    )
    found += [(scores[:, k], rows[:, k], part, other is work) for k in range(rows.shape[1])]
  examples = []
  for q, i in enumerate(shown.tolist()):
    wanted = set(instance.several(domain.tags[i]))
    best = sorted(found, key=lambda one: -one[0][q])[:_TOP]
    right = [
      place
      for place, (_, rows, _, here) in enumerate(best)
      if here and wanted & set(instance.several(tags[rows[q]]))
    ]
    examples.append(
      {
        'image': test.image(i),
        'images': [part.image(rows[q]) for _, rows, part, _ in best],
        'right': right,
      }
    )
  return examples


def _found_images(test, image, text, texts, owner):
  """Texts and the images nearest to each."""
  image, examples = features.normalize(image), []
  for t in features.records(texts, len(test.shown())).tolist():
    scores = image @ features.normalize(text[t])
    order = np.argsort(-scores, kind='stable')
    place = int(np.flatnonzero(order == owner[t])[0])
    examples.append(
      {
        'text': texts[t],
        'images': [test.image(i) for i in order[:_TOP]],
        'rank': place + 1,
        'right': place if place < _TOP else None,
      }
    )
  return examples

"""The tasks of whole images: classes, instances, texts. Each takes a Work and gives the fields of an Outcome.

Every CLS token is measured. Metrics of the first one have plain names, the others' are 'TOKEN/NAME'; tasks with texts
use the tokens that lie in the space of the texts: all of them, or, behind a projection, the projected one.
"""
import numpy as np

from tips_jax.core.config import InputError
from tips_jax.evals import features, instance, knn, linear, prompts, retrieval, zeroshot

_TOP = 6          # images of an example of retrieval
_STEPS = 500      # at most, of L-BFGS: it stops where the loss does


def neighbours(work):
  """k nearest neighbours, k chosen on the training split itself, each row left out in turn."""
  train, test = work.part('train'), work.part('test')
  o, metrics, chosen, first = work.job.options, {}, {}, None
  for name, prefix in _tokens(work.encoder.cls_names):
    x = train.arrays[name]
    k, _ = knn.choose_k(x, train.label, ks=o['k'], temperature=o['temperature'])
    found = knn.predict(x, train.label, test.arrays[name], k=k, temperature=o['temperature'])
    first = found if first is None else first
    metrics[f'{prefix}accuracy'], chosen[f'{prefix}k'] = _share(found, test.label), k
  return _classified(work, test, metrics, {'accuracy': knn.majority(train.label, test.label)}, first) | {
      'options': chosen}


def logistic(work):
  """Logistic regression, its L2 strength chosen on held-out training images, brought to its optimum on all of them."""
  train, test = work.part('train'), work.part('test')
  metrics, chosen, first = {}, {}, None
  seen = np.flatnonzero(train.label >= 0)
  for name, prefix in _tokens(work.encoder.cls_names):
    probe = linear.fit(train.arrays[name][seen], train.label[seen], classes=int(train.label.max()) + 1,
                       steps=work.job.options.get('steps', _STEPS))
    found = np.concatenate([probe.logits(test.arrays[name][i:i + 4096]).argmax(-1) for i in range(0, len(test), 4096)])
    first = found if first is None else first
    metrics[f'{prefix}accuracy'], chosen[f'{prefix}l2'] = _share(found, test.label), probe.l2
  return _classified(work, test, metrics, {'accuracy': knn.majority(train.label, test.label)}, first) | {
      'options': chosen}


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
  naive = {_ACCURACY.get(k, k): v for k, v in zeroshot.chance(len(names)).items()}
  return _classified(work, test, metrics, naive, first)


def instances(work):
  """R@1 of the nearest image: of `index` where the protocol has one, else of the other queries."""
  test = work.part('test')
  index = work.part('index') if 'index' in work.job.splits else None
  tags, index_tags = _tags(work.job, test), index and _tags(work.job, index)
  metrics, naive, examples = {}, {}, []
  for name, prefix in _tokens(work.encoder.cls_names):
    domain = {work.job.dataset: instance.Domain(query=test.arrays[name], tags=tags, index_tags=index_tags,
                                                index=index and index.arrays[name])}
    metrics[f'{prefix}r1'] = instance.evaluate(domain)['r1']
    if not examples:
      naive['r1'] = instance.chance(domain)['r1']
      examples = _found_instances(test, index or test, name, tags, index_tags or tags, leave_out=index is None)
  return {'metrics': metrics, 'naive': _for_all(naive, metrics), 'examples': examples}


def texts_and_images(work):
  """Recalls of images by texts and of texts by images, of all texts of an image."""
  test = work.part('test')
  texts, owner = [], []
  for i in range(len(test)):
    found = features.texts_of(test.record(i), work.job.data.text_field)
    texts += found
    owner += [i] * len(found)
  if not texts:
    raise InputError(f'{work.job.dataset}: images without captions: {len(test):,} of {len(test):,}; expected some')
  text, owner = work.texts(texts), np.array(owner)
  metrics, examples = {}, []
  for name, prefix in _tokens(tokens := joint(test, work.encoder.cls_names)):
    metrics |= {prefix + k: v for k, v in retrieval.recalls(tokens[name], text, owner).items()}
    examples = examples or _found_images(test, tokens[name], text, texts, owner)
  return {'metrics': metrics, 'naive': _for_all(retrieval.chance(owner, len(test)), metrics), 'examples': examples}


def joint(part, cls_names) -> dict:
  """The image embeddings [R, E] in the space of the texts, by CLS token.

  A token that is the embedding itself, unprojected, makes all of them candidates; else there is the embedding alone.
  """
  same = any(np.array_equal(part.arrays[name][:8], part.arrays['embedding'][:8]) for name in cls_names)
  return {name: part.arrays[name] for name in cls_names} if same else {'embedding': part.arrays['embedding']}


def class_names(job) -> tuple:
  """Names of the classes of an annotation for zero-shot tasks: the protocol's, or the data set's own."""
  if job.task.classes:
    return job.task.classes
  split = job.splits['test']
  return tuple(job.data.mask_classes if job.about.needs == 'mask' else job.data.label_names(split))


_ACCURACY = {'top1': 'accuracy'}


def _tokens(names):
  """(name, prefix of its metrics) of each CLS token."""
  return [(name, f'{name}/' if i else '') for i, name in enumerate(names)]


def _share(found, truth):
  asked = truth >= 0
  return float((found == truth)[asked].mean()) if asked.any() else float('nan')


def _for_all(naive, metrics):
  """The naive numbers under the names of all tokens."""
  return {name: naive[name.rsplit('/', 1)[-1]] for name in metrics if name.rsplit('/', 1)[-1] in naive}


def _classified(work, test, metrics, naive, found):
  """Fields of an Outcome of a classifier whose answers for the first token are `found` [R]."""
  asked = test.label >= 0
  size = int(max(test.label.max(initial=0), found.max(initial=0))) + 1
  names = class_names(work.job)
  names = tuple(one if isinstance(one, str) else one[0] for one in names)
  return {'metrics': metrics, 'naive': _for_all(naive, metrics), 'classes': names,
          'confusion': linear.confusion(test.label[asked], found[asked], size=max(size, len(names))),
          'examples': [{'image': test.image(i), 'truth': int(test.label[i]), 'predicted': int(found[i])}
                       for i in test.shown() if test.label[i] >= 0]}


def _tags(job, part):
  """The class, or classes, of each row."""
  field = job.data.instance_field
  return part.label if field == 'label' else [part.record(i)[field] for i in range(len(part))]


def _found_instances(test, index, name, tags, index_tags, *, leave_out):
  """Queries and what lies nearest to each."""
  shown = test.shown()
  queries = np.asarray(test.arrays[name][np.array(shown)])
  groups = dict(groups=np.arange(len(index)), query_groups=np.array(shown)) if leave_out else {}
  _, rows = knn.nearest(index.arrays[name], queries, k=min(_TOP, len(index) - leave_out), **groups)
  examples = []
  for i, near in zip(shown, rows):
    own = set(instance.several(tags[i]))
    right = [place for place, row in enumerate(near) if own & set(instance.several(index_tags[row]))]
    examples.append({'image': test.image(i), 'images': [index.image(row) for row in near], 'right': right})
  return examples


def _found_images(test, image, text, texts, owner):
  """Texts and the images nearest to each."""
  image, examples = features.normalise(image), []
  for t in features.records(texts, len(test.shown())).tolist():
    scores = image @ features.normalise(text[t])
    order = np.argsort(-scores, kind='stable')
    place = int(np.flatnonzero(order == owner[t])[0])
    examples.append({'text': texts[t], 'images': [test.image(i) for i in order[:_TOP]], 'rank': place + 1,
                     'right': place if place < _TOP else None})
  return examples

"""Image-text retrieval: recall at k in both directions, several captions per image."""

from typing import Any

import numpy as np

from tips_jax.core import vectors
from tips_jax.core.errors import InputError
from tips_jax.evals.datasets import protocols
from tips_jax.evals.features import reading
from tips_jax.evals.features.splits import TaskInputs
from tips_jax.evals.tasks import drawing
from tips_jax.evals.tasks.common import for_all_tokens, joint, tokens
from tips_jax.evals.tasks.spec import Metric, TaskSpec

KS = (1, 5, 10)
# Queries whose scores are held at once.
_BLOCK = 256
# Images of an example.
_TOP = 6
_RECALLS = (
  # Tables have R@1, as TIPS prints it; the page has all.
  Metric('t2i_r1', 'text to image R@1', shown=True),
  Metric('t2i_r5', 'text to image R@5'),
  Metric('t2i_r10', 'text to image R@10'),
  Metric('i2t_r1', 'image to text R@1', shown=True),
  Metric('i2t_r5', 'image to text R@5'),
  Metric('i2t_r10', 'image to text R@10'),
)


def recalls(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> dict[str, float]:
  """R@k of image [N, E] against text [T, E], where text t belongs to image owner[t], by cosine.

  't2i_r1': share of the texts whose image ranks first among all images. 'i2t_r1': share of the
  images with text for which one of their texts ranks first among all texts. A wrong candidate with
  the same score as the right one ranks before it, so that constant features score 0.
  """
  image = vectors.unit(image)
  text = vectors.unit(text)
  owner = np.asarray(owner)
  t2i = []
  # In blocks: the scores of all pairs would not fit.
  for i in range(0, len(text), _BLOCK):
    scores = text[i : i + _BLOCK] @ image.T
    t2i.append(_ranks_of_images(scores, owner[i : i + _BLOCK]))
  i2t = []
  # Images without a text are candidates, but nothing is asked about them.
  queries = np.unique(owner)
  for i in range(0, len(queries), _BLOCK):
    rows = queries[i : i + _BLOCK]
    i2t.append(ranks(image[rows] @ text.T, rows[:, None] == owner[None]))
  result = {}
  for way, ranks_of_all in {'t2i': np.concatenate(t2i), 'i2t': np.concatenate(i2t)}.items():
    for k in KS:
      result[f'{way}_r{k}'] = float((ranks_of_all < k).mean())
  return result


def chance(owner: np.ndarray, images: int) -> dict[str, float]:
  """The expected recalls of a random ranking among `images` images and len(owner) texts,
  exactly.
  """
  texts = len(owner)
  counts = np.bincount(owner)
  counts = counts[counts > 0]
  result = {f't2i_r{k}': min(k / images, 1.0) for k in KS}
  for k in KS:
    result[f'i2t_r{k}'] = drawn_right(counts, texts, k)
  return result


def drawn_right(counts: np.ndarray, candidates: int, k: int) -> float:
  """The expected R@k of a random ranking of `candidates`, of which a query has counts [Q]."""
  # 1 - C(T - c, k) / C(T, k): none of a query's c is among k of T.
  drawn = np.arange(min(k, candidates))
  left = np.maximum(candidates - counts[:, None] - drawn, 0)
  missed = np.prod(left / (candidates - drawn), axis=1)
  return float((1 - missed).mean())


def _ranks_of_images(scores_BN, right_B):
  right = np.take_along_axis(scores_BN, right_B[:, None], 1)
  # Not below, so that ties (and nan) count; less the right one itself.
  return (~(scores_BN < right)).sum(1) - 1


def ranks(scores_BT: np.ndarray, right_BT: np.ndarray) -> np.ndarray:
  """[B]: how many wrong candidates score no less than the best right one of each query."""
  best = np.where(right_BT, scores_BT, -np.inf).max(1, keepdims=True)
  return (~(scores_BT < best) & ~right_BT).sum(1)


def measure(inputs: TaskInputs) -> dict[str, Any]:
  """Recalls of images by texts and of texts by images, of all texts of an image."""
  test = inputs.part('test')
  data = inputs.evaluation.data
  texts = []
  owner = []
  for i in range(len(test)):
    texts_of_image = reading.texts_of(test.record(i), data.text_field)
    texts += texts_of_image
    owner += [i] * len(texts_of_image)
  if not texts:
    raise InputError(
      f'{inputs.evaluation.dataset}: images without captions: {len(test):,} of {len(test):,}; '
      'expected some'
    )
  text = inputs.texts(texts)
  owner = np.array(owner)
  metrics = {}
  embeddings = joint(test, inputs.encoder.cls_names)
  for name, prefix in tokens(embeddings):
    for metric, value in recalls(embeddings[name], text, owner).items():
      metrics[prefix + metric] = value
  return {
    'metrics': metrics,
    'chance': for_all_tokens(chance(owner, len(test)), metrics),
    'examples': _examples(test, next(iter(embeddings.values())), text, texts, owner),
  }


def _examples(test, image, text, texts, owner):
  """Texts and the images nearest to each."""
  image = vectors.unit(image)
  examples = []
  for t in reading.records(texts, len(test.shown())).tolist():
    order = np.argsort(-(image @ vectors.unit(text[t])), kind='stable')
    rank = int(np.flatnonzero(order == owner[t])[0])
    right = None
    if rank < _TOP:
      right = rank
    examples.append(
      {
        'text': texts[t],
        'images': [test.image(i) for i in order[:_TOP]],
        'rank': rank + 1,
        'right': right,
      }
    )
  return examples


SPEC = TaskSpec(
  name='retrieval',
  title='Retrieval between images and texts',
  caption=(
    'Evenly spaced test texts, not chosen ones, and the images nearest to each, the right one '
    'framed: in a good result the frame comes first, and the others fit the words in part.'
  ),
  measure=measure,
  metrics=_RECALLS,
  draw=drawing.retrieved,
  roles=('test',),
  annotation='captions',
  needs_text=True,
  constants=protocols.RETRIEVAL,
)

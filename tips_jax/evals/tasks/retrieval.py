"""Image-text retrieval: recall at k in both directions, several captions per image."""

from typing import Any

import numpy as np

from tips_jax.core import vectors
from tips_jax.core.errors import InputError
from tips_jax.evals.datasets import protocols
from tips_jax.evals.features import reading
from tips_jax.evals.features.splits import TaskInputs
from tips_jax.evals.tasks.common import (
  for_all_tokens,
  joint,
  tokens,
)
from tips_jax.evals.tasks.spec import Metric, Result, TaskSpec

KS = (1, 5, 10)
_BLOCK = 256  # queries whose scores are held at once


def recalls(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> dict[str, float]:
  """R@k of image [N, E] against text [T, E], where text t belongs to image owner[t], by cosine.

  't2i_r1': share of the texts whose image ranks first among all images. 'i2t_r1': share of the
  images with text for which one of their texts ranks first among all texts. A wrong candidate with
  the same score as the right one ranks before it, so that constant features score 0.
  """
  image, text, owner = vectors.unit(image), vectors.unit(text), np.asarray(owner)
  t2i = np.concatenate(
    [
      _ranks_of_images(text[i : i + _BLOCK] @ image.T, owner[i : i + _BLOCK])
      for i in range(0, len(text), _BLOCK)
    ]
  )
  i2t = []
  queries = np.unique(owner)
  for i in range(0, len(queries), _BLOCK):
    rows = queries[i : i + _BLOCK]
    i2t.append(_ranks_of_texts(image[rows] @ text.T, rows[:, None] == owner[None]))
  return {
    **{f't2i_r{k}': float((t2i < k).mean()) for k in KS},
    **{f'i2t_r{k}': float((np.concatenate(i2t) < k).mean()) for k in KS},
  }


def chance(owner: np.ndarray, images: int) -> dict[str, float]:
  """The expected recalls of a random ranking among `images` images and len(owner) texts,
  exactly.
  """
  texts, own = len(owner), np.bincount(owner)
  own = own[own > 0]
  result = {f't2i_r{k}': min(k / images, 1.0) for k in KS}
  for k in KS:  # 1 - C(T - c, k) / C(T, k): none of an image's c texts is among k of T
    drawn = np.arange(min(k, texts))
    missed = np.prod(np.maximum(texts - own[:, None] - drawn, 0) / (texts - drawn), axis=1)
    result[f'i2t_r{k}'] = float((1 - missed).mean())
  return result


def _ranks_of_images(scores_BN, right_B):
  right = np.take_along_axis(scores_BN, right_B[:, None], 1)
  return (~(scores_BN < right)).sum(1) - 1  # not below, so that ties (and nan) count; less itself


def _ranks_of_texts(scores_BT, right_BT):
  best = np.where(right_BT, scores_BT, -np.inf).max(1, keepdims=True)
  return (~(scores_BT < best) & ~right_BT).sum(1)


_TOP = 6  # images of an example
_RECALLS = tuple(
  Metric(f'{way}_r{k}', f'{label} R@{k}', shown=k == 1)
  for way, label in (('t2i', 'text to image'), ('i2t', 'image to text'))
  for k in (1, 5, 10)
)


def measure(work: TaskInputs) -> dict[str, Any]:
  """Recalls of images by texts and of texts by images, of all texts of an image."""
  test = work.part('test')
  texts, owner = [], []
  for i in range(len(test)):
    found = reading.texts_of(test.record(i), work.evaluation.data.text_field)
    texts += found
    owner += [i] * len(found)
  if not texts:
    raise InputError(
      f'{work.evaluation.dataset}: images without captions: {len(test):,} of {len(test):,}; '
      'expected some'
    )
  text, owner = work.texts(texts), np.array(owner)
  metrics, examples = {}, []
  embeddings = joint(test, work.encoder.cls_names)
  for name, prefix in tokens(embeddings):
    metrics |= {prefix + k: v for k, v in recalls(embeddings[name], text, owner).items()}
    examples = examples or _found_images(test, embeddings[name], text, texts, owner)
  return {
    'metrics': metrics,
    'chance': for_all_tokens(chance(owner, len(test)), metrics),
    'examples': examples,
  }


def _found_images(test, image, text, texts, owner):
  """Texts and the images nearest to each."""
  image, examples = vectors.unit(image), []
  for t in reading.records(texts, len(test.shown())).tolist():
    scores = image @ vectors.unit(text[t])
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


def _draw(result: Result) -> bytes | None:
  from tips_jax.evals.report import plotting  # matplotlib is slow to import

  return plotting.retrieved(result)


SPEC = TaskSpec(
  name='retrieval',
  title='Retrieval between images and texts',
  caption=(
    'Evenly spaced test texts, not chosen ones, and the images nearest to each, the right one '
    'framed: in a good result the frame comes first, and the others fit the words in part.'
  ),
  measure=measure,
  metrics=_RECALLS,
  draw=_draw,
  roles=('test',),
  annotation='captions',
  needs_text=True,
  constants=protocols.RETRIEVAL,
)

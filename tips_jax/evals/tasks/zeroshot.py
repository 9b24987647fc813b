"""Zero-shot classification as in CLIP (arXiv 2103.00020, section 3.1): the class whose texts lie
nearest to the image.

A class is the mean of the texts of all its names in all templates, each of length one, brought to
length one again.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.core import vectors
from tips_jax.core.errors import InputError
from tips_jax.evals.datasets import protocols
from tips_jax.evals.features import reading
from tips_jax.evals.features.splits import TaskInputs
from tips_jax.evals.probes import masks, search
from tips_jax.evals.tasks import drawing, prompts
from tips_jax.evals.tasks.common import (
  ACCURACY,
  class_names,
  classified,
  joint,
  synonyms,
  tokens,
)
from tips_jax.evals.tasks.spec import Metric, TaskSpec

KS = (1, 5)
# Encoded at once.
_TEXTS = 1024
# Images whose scores are held at once.
_BLOCK = 1024


def class_embeddings(
  encode: Callable[[list[str]], np.ndarray], names: Sequence, templates: Sequence[str]
) -> np.ndarray:
  """float32 [K, E], of length one: an embedding of each class.

  encode: texts -> [T, E], any T. names: for each class its name, or a tuple of names, whose texts
  all count the same.
  templates: texts with a place {}. Equal texts are encoded once, so that classes of one name are
  equal exactly. Raises InputError where there are no classes, names or templates, or no text tower
  (`encode` gives None).
  """
  names = list(map(synonyms, names))
  if not names or not all(names) or not templates:
    raise InputError(
      f'zero-shot: got {len(names)} classes, {sum(map(bool, names))} of them with a name, and '
      f'{len(templates)} templates; expected one of each at least'
    )
  # text -> its row among the vectors
  rows = {}
  rows_of_classes = []
  for of_class in names:
    texts = [template.replace('{}', name) for name in of_class for template in templates]
    rows_of_classes.append([rows.setdefault(text, len(rows)) for text in texts])
  texts = list(rows)
  blocks = []
  for i in range(0, len(texts), _TEXTS):
    block = encode(texts[i : i + _TEXTS])
    if block is None:
      raise InputError(
        'zero-shot: got a checkpoint without a text tower; expected one with images and texts'
      )
    blocks.append(vectors.unit(reading.finite(block)))
  embeddings = np.concatenate(blocks)
  # In float64, so that the order of the templates does not show in the last digits.
  means = [embeddings[rows].mean(0, dtype=np.float64) for rows in rows_of_classes]
  return vectors.unit(np.stack(means))


def nearest(image: np.ndarray, classes: np.ndarray, *, k: int = 5) -> np.ndarray:
  """The k nearest classes [N, k] of image [N, E] by cosine to classes [K, E], the nearest first.

  Equal scores: the lowest class first. Images that are zero or not finite are equally far from all.
  """
  image, classes = np.asarray(image), vectors.unit(reading.finite(classes))
  if image.ndim != 2 or image.shape[1] != classes.shape[1]:
    raise InputError(
      f'zero-shot: got images {image.shape} and classes {classes.shape}; expected [N, E] and [K, E]'
    )
  # A matrix product may give equal classes scores that differ in the last digit: each is scored
  # once.
  distinct, row = np.unique(classes, axis=0, return_inverse=True)
  k = min(k, len(classes))
  if not len(image):
    return np.zeros((0, k), np.int32)
  blocks = []
  for i in range(0, len(image), _BLOCK):
    block = reading.finite(image[i : i + _BLOCK])
    count = len(block)
    # One shape, one compilation.
    block = np.pad(block, [(0, min(_BLOCK, len(image)) - count), (0, 0)])
    blocks.append(np.asarray(_top(block, distinct, row.ravel(), k=k))[:count])
  return np.concatenate(blocks)


class ZeroshotScorer:
  """Counts over batches of images. `counts` [K, K] int64: (truth, nearest class) pairs; labels
  below 0 take no part.

  ks: how many of the nearest classes may hold the right one; those that are not below the number of
  classes K are left out, as they are always right.
  """

  def __init__(self, classes, *, ks=KS):
    self.classes = np.asarray(classes, np.float32)
    size = len(self.classes)
    self.ks = _informative(ks, size)
    self.counts = np.zeros((size, size), np.int64)
    self.hits = np.zeros(len(self.ks), np.int64)

  def __call__(self, image, labels):
    """image [B, E], labels [B]."""
    image = np.asarray(image)
    labels = np.asarray(labels)
    size = len(self.classes)
    if len(image) != len(labels) or labels.max(initial=-1) >= size:
      raise InputError(
        f'zero-shot: got {len(image)} images and {len(labels)} labels up to '
        f'{labels.max(initial=-1)}; expected a label for each, below the number of classes, {size}'
      )
    labeled = labels >= 0
    labels = labels[labeled]
    near = nearest(image[labeled], self.classes, k=max(self.ks))
    right = near == labels[:, None]
    for i, k in enumerate(self.ks):
      self.hits[i] += right[:, :k].sum()
    self.counts += masks.confusion(labels, near[:, 0], size=size)

  def result(self) -> dict[str, float]:
    """'accuracy', 'top5': shares of the images whose class is the nearest, among the 5 nearest; nan
    without images.
    """
    total = int(self.counts.sum())
    if not total:
      return {_metric(k): float('nan') for k in self.ks}
    return {_metric(k): int(hits) / total for k, hits in zip(self.ks, self.hits)}


def chance(classes: int, *, ks: Sequence[int] = KS) -> dict[str, float]:
  """What a random order of the classes scores."""
  return {_metric(k): k / classes for k in _informative(ks, classes)}


def _informative(ks, classes):
  return tuple(k for k in ks if k < max(classes, 2))


def _metric(k):
  # Top-1 goes by the name that it has in other classifiers, beside which it is drawn.
  if k == 1:
    return 'accuracy'
  return f'top{k}'


@functools.partial(jax.jit, static_argnames='k')
def _top(image, classes, row, *, k):
  scores = jnp.dot(search.unit(image), classes.T, precision='highest')
  # Of equal scores it takes the lower index.
  return jax.lax.top_k(scores[:, row], k)[1]


def measure(inputs: TaskInputs) -> dict[str, Any]:
  """Zero-shot classification: the class whose texts lie nearest."""
  test = inputs.part('test')
  names = class_names(inputs.evaluation)
  templates = prompts.templates(inputs.evaluation.options['templates'])
  classes = class_embeddings(inputs.texts, names, templates)
  metrics = {}
  embeddings = joint(test, inputs.encoder.cls_names)
  for name, prefix in tokens(embeddings):
    scorer = ZeroshotScorer(classes)
    scorer(embeddings[name], test.label)
    for metric, value in scorer.result().items():
      metrics[prefix + metric] = value
  first = next(iter(embeddings.values()))
  predicted = nearest(first, classes, k=1)[:, 0]
  return classified(inputs, test, metrics, chance(len(names)), predicted)


SPEC = TaskSpec(
  name='zeroshot',
  title='Zero-shot classification',
  caption=(
    'Test images and the class whose texts lie nearest, without any training on this data, '
    'green where it is right: a good model errs, if at all, toward a related class.'
  ),
  measure=measure,
  metrics=(*ACCURACY, Metric('top5', 'top-5 accuracy')),
  draw=drawing.classified,
  roles=('test',),
  annotation='label',
  needs_text=True,
  constants=protocols.ZEROSHOT,
  short_constants={'templates': 'photo'},
  charted=True,
)

"""Zero-shot classification as in CLIP (arXiv 2103.00020, section 3.1): the class whose texts lie
nearest to the image.

A class is the mean of the texts of all its names in all templates, each of length one, brought to
length one again.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.core import strict, vectors
from tips_jax.core.errors import InputError
from tips_jax.evals.datasets import protocols
from tips_jax.evals.features import reading
from tips_jax.evals.features.splits import TaskInputs
from tips_jax.evals.probes import masks, search
from tips_jax.evals.tasks import prompts
from tips_jax.evals.tasks.common import ACCURACY, class_names, classified, joint, tokens
from tips_jax.evals.tasks.spec import Metric, Result, TaskSpec

KS = (1, 5)
_TEXTS = 1024  # encoded at once
_BLOCK = 1024  # images whose scores are held at once


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
  names = [(one,) if isinstance(one, str) else tuple(one) for one in names]
  if not names or not all(names) or not templates:
    raise InputError(
      f'zero-shot: got {len(names)} classes, {sum(map(bool, names))} of them with a name, and '
      f'{len(templates)} templates; expected one of each at least'
    )
  said = [[template.replace('{}', name) for name in one for template in templates] for one in names]
  number = {
    text: i for i, text in enumerate(dict.fromkeys(text for texts in said for text in texts))
  }
  texts, parts = list(number), []
  for i in range(0, len(texts), _TEXTS):
    part = encode(texts[i : i + _TEXTS])
    if part is None:
      raise InputError(
        'zero-shot: got a checkpoint without a text tower; expected one with images and texts'
      )
    parts.append(vectors.unit(reading.finite(part)))
  embeddings = np.concatenate(parts)
  means = [embeddings[[number[text] for text in texts]].mean(0, dtype=np.float64) for texts in said]
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
  distinct, row = np.unique(classes, axis=0, return_inverse=True)  # equal classes tie exactly
  k, found = min(k, len(classes)), []
  for i in range(0, len(image), _BLOCK):
    part = reading.finite(image[i : i + _BLOCK])
    rows = len(part)
    part = np.pad(part, [(0, min(_BLOCK, len(image)) - rows), (0, 0)])  # one shape, one compilation
    found.append(np.asarray(_top(part, distinct, row.ravel(), k=k))[:rows])
  return np.concatenate(found) if found else np.zeros((0, k), np.int32)


class ZeroshotScorer:
  """Counts over batches of images. `counts` [K, K] int64: (truth, nearest class) pairs; labels
  below 0 take no part.

  ks: how many of the nearest classes may hold the right one; those that are not below the number of
  classes K are left out, as they are always right.
  """

  def __init__(self, classes, *, ks=KS):
    self.classes = np.asarray(classes, np.float32)
    size = len(self.classes)
    self.ks = tuple(k for k in ks if k < max(size, 2))
    self.counts, self.hits = np.zeros((size, size), np.int64), np.zeros(len(self.ks), np.int64)

  def __call__(self, image, labels):
    """image [B, E], labels [B]."""
    image, labels = np.asarray(image), np.asarray(labels)
    size = len(self.classes)
    if len(image) != len(labels) or labels.max(initial=-1) >= size:
      raise InputError(
        f'zero-shot: got {len(image)} images and {len(labels)} labels up to '
        f'{labels.max(initial=-1)}; '
        f'expected a label for each, below the number of classes, {size}'
      )
    asked = labels >= 0
    labels = labels[asked]
    near = nearest(image[asked], self.classes, k=max(self.ks))
    right = near == labels[:, None]
    self.hits += np.array([right[:, :k].sum() for k in self.ks], np.int64)
    self.counts += masks.confusion(labels, near[:, 0], size=size)

  def result(self) -> dict[str, float]:
    """'top1', 'top5': shares of the images whose class is the nearest, among the 5 nearest; nan
    without images.
    """
    total = int(self.counts.sum())
    return {
      f'top{k}': int(n) / total if total else float('nan') for k, n in zip(self.ks, self.hits)
    }


def evaluate(
  images: Mapping[str, np.ndarray],
  labels: np.ndarray,
  classes: np.ndarray,
  *,
  cls: str,
  ks: Sequence[int] = KS,
) -> dict[str, float]:
  """Top-k accuracies of `images[cls]` [N, E], one of the CLS tokens by name, against labels [N] and
  classes [K, E].
  """
  if cls not in images:
    raise strict.unknown('zero-shot: the CLS token', cls, images)
  scorer = ZeroshotScorer(classes, ks=ks)
  scorer(images[cls], labels)
  return scorer.result()


def chance(classes: int, *, ks: Sequence[int] = KS) -> dict[str, float]:
  """What a random order of the classes scores."""
  return {f'top{k}': k / classes for k in ks if k < max(classes, 2)}


@functools.partial(jax.jit, static_argnames='k')
def _top(image, classes, row, *, k):
  scores = jnp.dot(search.unit(image), classes.T, precision='highest')
  return jax.lax.top_k(scores[:, row], k)[1]  # of equal scores it takes the lower index


_ACCURACY = {'top1': 'accuracy'}  # metrics are named as those of other classifiers


def measure(work: TaskInputs) -> dict[str, Any]:
  """Zero-shot classification: the class whose texts lie nearest."""
  test, o = work.part('test'), work.evaluation.options
  names = class_names(work.evaluation)
  classes = class_embeddings(work.texts, names, prompts.templates(o['templates']))
  metrics, first = {}, None
  embeddings = joint(test, work.encoder.cls_names)
  for name, prefix in tokens(embeddings):
    scores = evaluate(embeddings, test.label, classes, cls=name)
    metrics |= {prefix + _ACCURACY.get(k, k): v for k, v in scores.items()}
    first = nearest(embeddings[name], classes, k=1)[:, 0] if first is None else first
  even = {_ACCURACY.get(k, k): v for k, v in chance(len(names)).items()}
  return classified(work, test, metrics, even, first)


def _draw(result: Result) -> bytes | None:
  from tips_jax.evals.report import plotting  # matplotlib is slow to import

  return plotting.classified(result)


SPEC = TaskSpec(
  name='zeroshot',
  title='Zero-shot classification',
  caption=(
    'Test images and the class whose texts lie nearest, without any training on this data, '
    'green where it is right: a good model errs, if at all, toward a related class.'
  ),
  measure=measure,
  metrics=(*ACCURACY, Metric('top5', 'top-5 accuracy')),
  draw=_draw,
  roles=('test',),
  annotation='label',
  needs_text=True,
  constants=protocols.ZEROSHOT,
  short_constants={'templates': 'photo'},
  charted=True,
)

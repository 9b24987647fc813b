"""Zero-shot recognition of regions: RoIAlign of true boxes against texts, for UMG-CLIP (arXiv
2401.06397) and any other model with texts.

A region is the mean of the patches in its box, in the joint space (interop.Encoder, `regions`):
through the projection that was trained for regions, or, of a model without one, those that
zero-shot segmentation reads, the values of the last block through the projection of the images.
"""

from typing import Any

import numpy as np

from tips_jax.core import vectors
from tips_jax.evals.datasets import protocols
from tips_jax.evals.features import reading
from tips_jax.evals.features import regions as regions_lib
from tips_jax.evals.features.splits import EXAMPLES, TaskInputs
from tips_jax.evals.probes import masks, precision
from tips_jax.evals.tasks import drawing, prompts, retrieval, zeroshot
from tips_jax.evals.tasks.spec import Metric, TaskSpec

# Images of an example.
_TOP = 6
# Queries whose scores are held at once.
_BLOCK = 256


def _regions(inputs):
  """(regions, embeddings [N, E], what a Result says of them) of the measured split."""
  evaluation = inputs.evaluation
  test = inputs.part('test')
  regions = regions_lib.of_part(test, evaluation.spec.annotation, evaluation.dataset)
  samples = inputs.encoder.region_samples
  embeddings = reading.finite(regions_lib.pooled(test, regions, samples=samples))
  counted = {
    'regions': len(regions),
    'boxes_without_text': regions.without_text,
    'boxes_without_area': regions.without_area,
  }
  return regions, embeddings, {'options': {'samples': samples}, 'chosen': counted}


# --- classification -----------------------------------------------------------------------------


def truth(texts: list[tuple[str, ...]]) -> tuple[tuple[str, ...], np.ndarray]:
  """(the K different names, bool [N, K]: which of them each has)."""
  names = tuple(sorted({name for of_one in texts for name in of_one}))
  number = {name: k for k, name in enumerate(names)}
  result = np.zeros((len(texts), len(names)), bool)
  for row, of_one in zip(result, texts):
    row[[number[name] for name in of_one]] = True
  return names, result


def scores(predicted_N: np.ndarray, cosines_NK: np.ndarray, truth_NK: np.ndarray) -> dict:
  """'accuracy': share of the regions whose nearest class is one of theirs; 'class_accuracy': that
  share for each class that occurs, on average; 'map': mean average precision of the classes.
  """
  right = truth_NK[np.arange(len(truth_NK)), predicted_N]
  return {
    'accuracy': float(right.mean()),
    'class_accuracy': _of_classes(right, truth_NK),
    'map': precision.mean_average_precision(cosines_NK, truth_NK),
  }


def chance(truth_NK: np.ndarray) -> dict[str, float]:
  """As `scores`, of a class drawn evenly, and of equal cosines."""
  share = truth_NK.mean(1)  # of the classes, that are right for a region
  return {
    'accuracy': float(share.mean()),
    'class_accuracy': _of_classes(share, truth_NK),
    'map': float(truth_NK.mean(0).mean()),
  }


def _of_classes(right_N, truth_NK):
  """Mean over classes of the mean over the regions of each; every class has some."""
  # As numbers: the product of truth values is one of them, not a count.
  return float((right_N.astype(float) @ truth_NK.astype(float) / truth_NK.sum(0)).mean())


def classify(inputs: TaskInputs) -> dict[str, Any]:
  """Zero-shot classification of regions: the class whose texts lie nearest."""
  regions, embeddings, about = _regions(inputs)
  names, right = truth(regions.texts)
  templates = prompts.templates(inputs.evaluation.options['templates'])
  classes = zeroshot.class_embeddings(inputs.texts, names, templates)
  predicted = zeroshot.nearest(embeddings, classes, k=1)[:, 0]
  # Of a region with several names the first one is shown.
  first = np.array([names.index(of_one[0]) for of_one in regions.texts])
  shown = np.where(right[np.arange(len(right)), predicted], predicted, first)
  test = inputs.part('test')
  examples = []
  for n in reading.records(regions, EXAMPLES).tolist():
    image = regions_lib.outlined(test.image(regions.image[n]), regions.boxes[n])
    examples.append({'image': image, 'truth': int(shown[n]), 'predicted': int(predicted[n])})
  return about | {
    'metrics': scores(predicted, vectors.unit(embeddings) @ classes.T, right),
    'chance': chance(right),
    'classes': names,
    'confusion': masks.confusion(shown, predicted, size=len(names)),
    'examples': examples,
  }


# --- retrieval ----------------------------------------------------------------------------------


def recalls(region_NE: np.ndarray, text_TE: np.ndarray, pairs_P2: np.ndarray) -> dict[str, float]:
  """R@k of regions and texts by cosine, where `pairs` are the (region, text) that belong together.

  't2r_r1': share of the texts for which one of their regions ranks first among all regions;
  'r2t_r1': the same of regions among the texts. Ties count against a query, as in
  `retrieval.recalls`.
  """
  region = vectors.unit(region_NE)
  text = vectors.unit(text_TE)
  result = {}
  ways = {
    't2r': (text, region, pairs_P2[:, ::-1]),
    'r2t': (region, text, pairs_P2),
  }
  for way, (queries, candidates, pairs) in ways.items():
    ranks = []
    for i in range(0, len(queries), _BLOCK):
      cosines = queries[i : i + _BLOCK] @ candidates.T
      right = np.zeros(cosines.shape, bool)
      inside = pairs[(pairs[:, 0] >= i) & (pairs[:, 0] < i + len(right))]
      right[inside[:, 0] - i, inside[:, 1]] = True
      ranks.append(retrieval.ranks(cosines, right))
    for k in retrieval.KS:
      result[f'{way}_r{k}'] = float((np.concatenate(ranks) < k).mean())
  return result


def retrieve(inputs: TaskInputs) -> dict[str, Any]:
  """Recalls of regions by their captions, and of captions by regions. Equal texts are one."""
  regions, embeddings, about = _regions(inputs)
  texts, belongs = truth(regions.texts)
  pairs = np.argwhere(belongs)
  encoded = inputs.texts(texts)
  expected = {}
  for way, counts, candidates in (
    ('t2r', belongs.sum(0), len(regions)),
    ('r2t', belongs.sum(1), len(texts)),
  ):
    for k in retrieval.KS:
      expected[f'{way}_r{k}'] = retrieval.drawn_right(counts, candidates, k)
  about['chosen']['texts'] = len(texts)
  return about | {
    'metrics': recalls(embeddings, encoded, pairs),
    'chance': expected,
    'examples': _examples(inputs.part('test'), regions, embeddings, texts, encoded, belongs),
  }


def _examples(test, regions, embeddings, texts, encoded, belongs_NT):
  """Texts and the regions nearest to each."""
  units = vectors.unit(embeddings)
  examples = []
  for t in reading.records(texts, EXAMPLES).tolist():
    order = np.argsort(-(units @ vectors.unit(encoded[t])), kind='stable')
    right = np.flatnonzero(belongs_NT[order, t]).tolist()
    nearest = []
    for n in order[:_TOP].tolist():
      nearest.append(regions_lib.cut(test.image(regions.image[n]), regions.boxes[n]))
    examples.append(
      {
        'text': texts[t],
        'images': nearest,
        'rank': right[0] + 1,
        'right': [place for place in right if place < _TOP],
      }
    )
  return examples


CLASSIFICATION = TaskSpec(
  name='region_classification',
  title='Zero-shot classification of regions',
  caption=(
    'True boxes and the class whose texts lie nearest to the patches inside, green where it is '
    'right: a good model names the outlined thing, not the largest one of the image.'
  ),
  measure=classify,
  metrics=(
    Metric('accuracy', 'accuracy', shown=True),
    Metric('class_accuracy', 'mean accuracy of classes', shown=True),
    Metric('map', 'mAP'),
  ),
  draw=drawing.classified,
  roles=('test',),
  outputs=('region_patch',),
  annotation='region_tags',
  needs_text=True,
  constants=protocols.REGION_CLASSIFICATION,
  short_constants={'templates': 'photo'},
)
RETRIEVAL = TaskSpec(
  name='region_retrieval',
  title='Retrieval between regions and texts',
  caption=(
    'Evenly spaced texts of regions, not chosen ones, and the regions nearest to each, outlined '
    'and cut out of their images, the right ones framed: in a good result a frame comes first.'
  ),
  measure=retrieve,
  metrics=(
    Metric('t2r_r1', 'text to region R@1', shown=True),
    Metric('t2r_r5', 'text to region R@5'),
    Metric('t2r_r10', 'text to region R@10'),
    Metric('r2t_r1', 'region to text R@1', shown=True),
    Metric('r2t_r5', 'region to text R@5'),
    Metric('r2t_r10', 'region to text R@10'),
  ),
  draw=drawing.retrieved,
  roles=('test',),
  outputs=('region_patch',),
  annotation='region_captions',
  needs_text=True,
  constants=protocols.REGION_RETRIEVAL,
)

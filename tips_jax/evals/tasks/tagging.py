"""Zero-shot tagging: which of all tags an image has, by the cosines of its embedding to the names
of the tags, as mean average precision.
"""

from typing import Any

import numpy as np

from tips_jax.core import vectors
from tips_jax.core.errors import InputError
from tips_jax.evals.datasets import protocols
from tips_jax.evals.features import reading
from tips_jax.evals.features.splits import EXAMPLES, TaskInputs
from tips_jax.evals.probes import precision
from tips_jax.evals.tasks import drawing, prompts, regions, zeroshot
from tips_jax.evals.tasks.common import for_all_tokens, joint, tokens
from tips_jax.evals.tasks.spec import Metric, TaskSpec

# Images of an example.
_TOP = 6


def measure(inputs: TaskInputs) -> dict[str, Any]:
  """Mean average precision of the tags of a split; images without any take no part."""
  test = inputs.part('test')
  texts = []
  for i in range(len(test)):
    of_image = [text.strip() for text in reading.texts_of(test.record(i), 'tags')]
    texts.append(tuple(dict.fromkeys(of_image)))
  tagged = np.flatnonzero([bool(of_image) for of_image in texts])
  if not len(tagged):
    raise InputError(
      f'{inputs.evaluation.dataset}: images without tags: {len(test):,} of {len(test):,}; expected '
      'some'
    )
  names, right = regions.truth([texts[i] for i in tagged])
  templates = prompts.templates(inputs.evaluation.options['templates'])
  classes = zeroshot.class_embeddings(inputs.texts, names, templates)
  embeddings = joint(test, inputs.encoder.cls_names)
  metrics = {}
  examples = []
  for name, prefix in tokens(embeddings):
    cosines = vectors.unit(reading.finite(embeddings[name][tagged])) @ classes.T
    metrics[f'{prefix}map'] = precision.mean_average_precision(cosines, right)
    nearest = right[np.arange(len(right)), cosines.argmax(1)]
    metrics[f'{prefix}accuracy'] = float(nearest.mean())
    if not examples:  # of the first token
      examples = _examples(test, tagged, names, cosines, right)
  # Of equal cosines, and of a tag drawn evenly.
  chance = {'map': float(right.mean(0).mean()), 'accuracy': float(right.mean())}
  return {
    'metrics': metrics,
    'chance': for_all_tokens(chance, metrics),
    'examples': examples,
    'chosen': {'tags': len(names), 'images_without_tags': len(test) - len(tagged)},
  }


def _examples(test, tagged, names, cosines_NK, right_NK):
  """Tags and the images nearest to each."""
  examples = []
  for k in reading.records(names, EXAMPLES).tolist():
    order = np.argsort(-cosines_NK[:, k], kind='stable')
    right = np.flatnonzero(right_NK[order, k]).tolist()
    examples.append(
      {
        'text': names[k],
        'images': [test.image(tagged[n]) for n in order[:_TOP]],
        'rank': right[0] + 1,
        'right': [place for place in right if place < _TOP],
      }
    )
  return examples


SPEC = TaskSpec(
  name='tagging',
  title='Zero-shot tagging',
  caption=(
    'Evenly spaced tags, not chosen ones, and the images nearest to each, those that have it '
    'framed: in a good result the frames come first.'
  ),
  measure=measure,
  metrics=(
    Metric('map', 'mAP', shown=True),
    Metric('accuracy', 'nearest tag is right'),
  ),
  draw=drawing.retrieved,
  roles=('test',),
  annotation='tags',
  needs_text=True,
  constants=protocols.TAGGING,
  short_constants={'templates': 'photo'},
)

"""Linear classification: logistic regression on a CLS token."""

from typing import Any

import numpy as np

from tips_jax.evals.datasets import protocols
from tips_jax.evals.features.splits import TaskInputs
from tips_jax.evals.probes import logistic
from tips_jax.evals.tasks import drawing
from tips_jax.evals.tasks.common import ACCURACY, accuracy, classified, majority, tokens
from tips_jax.evals.tasks.spec import TaskSpec

# At most, of L-BFGS: it stops where the loss does.
_STEPS = 500
# Images whose logits are held at once.
_BLOCK = 4096


def measure(inputs: TaskInputs) -> dict[str, Any]:
  """Logistic regression, its L2 strength chosen on held-out training images, brought to its optimum
  on all of them.
  """
  train = inputs.part('train')
  test = inputs.part('test')
  labeled = np.flatnonzero(train.label >= 0)
  metrics, chosen, predicted = {}, {}, {}
  for name, prefix in tokens(inputs.encoder.cls_names):
    probe = logistic.fit(
      train.arrays[name][labeled],
      train.label[labeled],
      classes=int(train.label.max()) + 1,
      steps=inputs.evaluation.options.get('steps', _STEPS),
    )
    # In blocks: the logits of all images and a thousand classes would be large.
    answers = []
    for i in range(0, len(test), _BLOCK):
      answers.append(probe.logits(test.arrays[name][i : i + _BLOCK]).argmax(-1))
    predicted[name] = np.concatenate(answers)
    metrics[f'{prefix}accuracy'] = accuracy(predicted[name], test.label)
    chosen[f'{prefix}l2'] = probe.l2
  chance = {'accuracy': majority(train.label, test.label)}
  first = predicted[inputs.encoder.cls_names[0]]
  return classified(inputs, test, metrics, chance, first) | {'chosen': chosen}


SPEC = TaskSpec(
  name='linear',
  title='Linear classification',
  caption=(
    'Test images and the class that a linear probe gives them, green where it is right: good '
    'features err, if at all, toward a class that looks much the same.'
  ),
  measure=measure,
  metrics=ACCURACY,
  draw=drawing.classified,
  annotation='label',
  constants=protocols.LINEAR,
  charted=True,
)

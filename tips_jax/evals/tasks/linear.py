"""Linear classification: logistic regression on a CLS token."""

from typing import Any

import numpy as np

from tips_jax.evals.datasets import protocols
from tips_jax.evals.features.splits import TaskInputs
from tips_jax.evals.probes import logistic
from tips_jax.evals.tasks.common import ACCURACY, accuracy, classified, majority, tokens
from tips_jax.evals.tasks.spec import Result, TaskSpec

_STEPS = 500  # at most, of L-BFGS: it stops where the loss does


def measure(work: TaskInputs) -> dict[str, Any]:
  """Logistic regression, its L2 strength chosen on held-out training images, brought to its optimum
  on all of them.
  """
  train, test = work.part('train'), work.part('test')
  metrics, chosen, first = {}, {}, None
  seen = np.flatnonzero(train.label >= 0)
  for name, prefix in tokens(work.encoder.cls_names):
    probe = logistic.fit(
      train.arrays[name][seen],
      train.label[seen],
      classes=int(train.label.max()) + 1,
      steps=work.evaluation.options.get('steps', _STEPS),
    )
    found = np.concatenate(
      [probe.logits(test.arrays[name][i : i + 4096]).argmax(-1) for i in range(0, len(test), 4096)]
    )
    first = found if first is None else first
    metrics[f'{prefix}accuracy'], chosen[f'{prefix}l2'] = accuracy(found, test.label), probe.l2
  return classified(work, test, metrics, {'accuracy': majority(train.label, test.label)}, first) | {
    'chosen': chosen
  }


def _draw(result: Result) -> bytes | None:
  from tips_jax.evals.report import plotting  # matplotlib is slow to import

  return plotting.classified(result)


SPEC = TaskSpec(
  name='linear',
  title='Linear classification',
  caption=(
    'Test images and the class that a linear probe gives them, green where it is right: good '
    'features err, if at all, toward a class that looks much the same.'
  ),
  measure=measure,
  metrics=ACCURACY,
  draw=_draw,
  annotation='label',
  constants=protocols.LINEAR,
  charted=True,
)

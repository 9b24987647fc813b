"""Linear depth: bins of depth, by a linear probe on patches and CLS token."""

from typing import Any

from tips_jax.evals.datasets import protocols
from tips_jax.evals.features.splits import TaskInputs
from tips_jax.evals.probes import depth, depth_probe
from tips_jax.evals.tasks.common import (
  DEPTH_METRICS,
  baseline_images,
  batches,
  floats,
  scored_depth,
)
from tips_jax.evals.tasks.spec import Result, TaskSpec

_DEPTH = ('bins', 'min_depth', 'max_depth', 'steps', 'batch', 'learning_rates', 'upsample')


def measure(work: TaskInputs) -> dict[str, Any]:
  """A linear layer to bins of depth; its learning rate is chosen on the last fifth of the training
  images.
  """
  train, test, o = work.part('train'), work.part('test'), work.evaluation.options
  cls, most = work.encoder.cls_names[0], o['max_depth']
  patch, cells = (
    train.arrays['patch'],
    o.get('cells'),
  )  # a patch is so many pixels of truth in training; None: all
  probe = depth_probe.fit(
    patch,
    train.arrays[cls],
    train.depth,
    shape=cells and [cells * n for n in patch.shape[1:3]],
    recipe=depth_probe.DepthRecipe(**{name: o[name] for name in _DEPTH if name in o}),
  )
  scorer, examples, shown = (
    depth.DepthScorer(max_depth=most, crop=o.get('crop')),
    [],
    set(test.shown()),
  )
  for rows in batches(test):
    patches = floats(test.arrays['patch'][rows])
    for i, own, found in zip(rows, patches, probe.predict(patches, test.arrays[cls][rows])):
      truth = test.depth(i)
      scorer.add(found, truth)
      if i in shown:
        examples.append(
          {
            'image': test.image(i),
            'truth': scored_depth(truth, most),
            'predicted': found,
            'patch': own,
          }
        )
  baselines = depth.baselines(
    train.depth,
    baseline_images(train),
    test.depth,
    range(len(test)),
    max_depth=most,
    crop=o.get('crop'),
  )
  return {
    'metrics': scorer.result(),
    'chance': baselines['constant'],
    'examples': examples,
    'chosen': {'learning_rate': probe.learning_rate, 'mean_image': baselines['mean_image']},
  }


def _draw(result: Result) -> bytes | None:
  from tips_jax.evals.report import plotting  # matplotlib is slow to import

  return plotting.depths(result)


SPEC = TaskSpec(
  name='depth',
  title='Linear depth',
  caption=(
    'Depth from a linear probe beside the truth, on one logarithmic scale of colors, and the '
    'error: good depth has the layout and the objects in the right order, and an error row '
    'that stays dark.'
  ),
  measure=measure,
  metrics=DEPTH_METRICS,
  draw=_draw,
  outputs=('patch',),
  annotation='depth',
  shape='native',
  constants=protocols.LINEAR_DEPTH | {'crop': protocols.Constant(None, '?')},
  short_constants={
    'steps': 2000,
    'batch': 16,
    'learning_rates': (3e-3, 1e-2, 3e-2),
    'upsample': 1,
    'bins': 64,
    'cells': 4,
  },
)

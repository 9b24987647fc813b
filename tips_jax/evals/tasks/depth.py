"""Linear depth: bins of depth, by a linear probe on patches and CLS token."""

import functools
from typing import Any

from tips_jax.evals.datasets import protocols
from tips_jax.evals.features.splits import TaskInputs
from tips_jax.evals.probes import depth, depth_direct, depth_probe
from tips_jax.evals.tasks import drawing
from tips_jax.evals.tasks.common import (
  DEPTH_METRICS,
  answers_to_maps,
  baseline_images,
  batches,
  floats,
  recipe_options,
  scored_depth,
)
from tips_jax.evals.tasks.spec import TaskSpec


def measure(inputs: TaskInputs) -> dict[str, Any]:
  """A linear layer to bins of depth; its learning rate, or in the short recipe its L2 penalty, is
  chosen on the last fifth of the training images.
  """
  train = inputs.part('train')
  test = inputs.part('test')
  options = inputs.evaluation.options
  most = options['max_depth']
  crop = options.get('crop')
  # As TIPS does: every patch token beside the global embedding, which is the first CLS token.
  cls = inputs.encoder.cls_names[0]
  patch = train.arrays['patch']
  probes = depth_probe.fit, depth_probe.DepthRecipe
  if options.get('direct'):
    probes = depth_direct.fit, depth_direct.DirectRecipe
  fit, recipe = probes
  probe = fit(
    patch, train.arrays[cls], train.depth, recipe=recipe(**recipe_options(recipe, options))
  )
  scorer = depth.DepthScorer(max_depth=most, crop=crop)
  examples = []
  drawn = set(test.shown())
  # A few at a time: predictions are as large as the images.
  for rows in batches(test):
    patches = floats(test.arrays['patch'][rows])
    predictions = probe.predict(patches, test.arrays[cls][rows])
    for i, image_patches, predicted in zip(rows, patches, predictions):
      truth = test.depth(i)
      scorer.add(predicted, truth)
      if i in drawn:
        examples.append(
          {
            'image': test.image(i),
            'truth': scored_depth(truth, most),
            'predicted': predicted,
            'patch': image_patches,
          }
        )
  rows = baseline_images(train)
  baselines = depth.baselines(
    train.depth, rows, test.depth, range(len(test)), max_depth=most, crop=crop
  )
  answers = answers_to_maps(
    train,
    rows,
    test,
    grid=patch.shape[1:3],
    patch=inputs.encoder.patch,
    annotation='depth',
    known=functools.partial(depth.known, max_depth=most),
    scorer=functools.partial(depth.DepthScorer, max_depth=most, crop=crop),
  )
  return {
    'metrics': scorer.result(),
    'chance': baselines['constant'],
    'baselines': {**answers, 'position': baselines['mean_image']},
    'examples': examples,
    'chosen': probe.chosen,
  }


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
  draw=drawing.depths,
  outputs=('patch',),
  annotation='depth',
  # The cameras of a data set have one shape, which a square would distort.
  shape='native',
  # The Eigen crop is NYU's: no other camera has its borders.
  constants=protocols.LINEAR_DEPTH | {'crop': protocols.Constant(None, '?')},
  short_constants={'direct': True, 'bins': 64, 'steps': 60},
)

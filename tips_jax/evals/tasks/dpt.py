"""Depth and surface normals by a trained DPT decoder (TIPSv2)."""

import functools
import json
import pathlib
from typing import Any

from tips_jax.evals.datasets import protocols
from tips_jax.evals.features.splits import SplitFeatures, TaskInputs
from tips_jax.evals.probes import depth, dpt, dpt_train, normals
from tips_jax.evals.probes.normals import WITHIN
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
from tips_jax.evals.tasks.spec import Metric, TaskSpec

_NORMALS = (
  # The mean over images of each image's RMSE, as Probe3D prints it; pooled: over all pixels.
  Metric('angular_rmse', 'RMSE', 'deg', 'lower', shown=True),
  Metric('rmse_pooled', 'RMSE, pooled', 'deg', 'lower'),
  Metric('mean', 'mean angle', 'deg', 'lower'),
  Metric('median', 'median angle', 'deg', 'lower'),
  *(Metric(f'within_{degrees:g}', f'within {degrees:g}°') for degrees in WITHIN),
)
# A decoder that is trained in minutes.
_SMALL_DPT = {'channels': 16, 'widths': (8, 16, 16, 16), 'epochs': 8, 'learning_rate': 2e-3}


def measure_depth(inputs: TaskInputs) -> dict[str, Any]:
  """A DPT decoder of depth on four layers. Nothing is chosen. It is kept beside the results."""
  most = inputs.evaluation.options['max_depth']
  return _measure(
    inputs,
    functools.partial(depth.DepthScorer, max_depth=most),
    functools.partial(depth.baselines, max_depth=most),
    functools.partial(depth.known, max_depth=most),
  )


def measure_normals(inputs: TaskInputs) -> dict[str, Any]:
  """As `measure_depth`, of surface normals."""
  return _measure(inputs, normals.NormalScorer, normals.baselines, normals.known)


def _measure(inputs, make_scorer, baselines, known):
  scorer = make_scorer()
  train = inputs.part('train')
  test = inputs.part('test')
  annotation = inputs.evaluation.spec.annotation
  # SplitFeatures.depth or .normals: number of an image -> its truth.
  train_truth = getattr(train, annotation)
  test_truth = getattr(test, annotation)
  decoder = _decoder(inputs, train)
  examples = []
  drawn = set(test.shown())
  for rows in batches(test):
    layers = [(patch[rows], cls[rows]) for patch, cls in test.intermediate_layers]
    for i, predicted in zip(rows, decoder.predict(layers)):
      truth = test_truth(i)
      if annotation == 'normals':
        # The fourth output is the uncertainty, which only the loss needs.
        predicted = predicted[..., :3]
      scorer.add(predicted, truth)
      if i in drawn:
        if annotation == 'depth':
          truth = scored_depth(truth, inputs.evaluation.options['max_depth'])
        examples.append(
          {
            'image': test.image(i),
            'truth': truth,
            'predicted': predicted,
            'patch': floats(test.intermediate_layers[-1][0][i]),
          }
        )
  rows = baseline_images(train)
  answers = baselines(train_truth, rows, test_truth, range(len(test)))
  others = answers_to_maps(
    train,
    rows,
    test,
    grid=train.intermediate_layers[0][0].shape[1:3],
    patch=inputs.encoder.patch,
    annotation=annotation,
    known=known,
    scorer=make_scorer,
  )
  return {
    'metrics': scorer.result(),
    'chance': answers['constant'],
    'baselines': {**others, 'position': answers['mean_image']},
    'examples': examples,
    'chosen': {'intermediate_layers': dpt.intermediate_layers_of(inputs.encoder.depth)},
  }


def _decoder(inputs: TaskInputs, train: SplitFeatures) -> dpt_train.Decoder:
  """The decoder of an evaluation: out of the cache, or trained; a copy goes to the output, in the
  official layout too.
  """
  evaluation = inputs.evaluation
  task = evaluation.spec.annotation
  options = recipe_options(dpt_train.DPTRecipe, evaluation.options)
  # Through JSON, so that a tuple of the protocol and a list of a file are one key.
  key = [train.key, task, json.loads(json.dumps(options))]
  # In the cache, as training takes hours: an evaluation that was stopped goes on behind it.
  path = inputs.cache.path('decoders', key, '.npz')
  if path.is_file():
    decoder = dpt_train.load(path)
  else:
    recipe = dpt_train.DPTRecipe(task=task, **options)
    decoder = dpt_train.fit(train.intermediate_layers, getattr(train, task), recipe)
    decoder.save(path)
  if inputs.output:
    folder = pathlib.Path(inputs.output) / 'decoders'
    folder.mkdir(parents=True, exist_ok=True)
    name = f'{evaluation.dataset}_{evaluation.task.kind}'
    decoder.save(folder / f'{name}.npz')
    dpt.write_official(decoder.params, folder / f'{name}_official.npz', task=task)
  return decoder


DEPTH = TaskSpec(
  name='dpt_depth',
  title='Depth with a DPT decoder',
  caption=(
    'Depth from a trained decoder beside the truth, on one logarithmic scale of colors, and '
    'the error: good depth has sharp outlines, and an error row that stays dark.'
  ),
  measure=measure_depth,
  metrics=DEPTH_METRICS,
  draw=drawing.depths,
  outputs=('intermediate_layers',),
  annotation='depth',
  # Probe3D's: a central square, as the decoder has one shape.
  shape='cut',
  constants=protocols.DPT_DEPTH,
  short_constants=_SMALL_DPT | {'bins': 32},
  size_constant='size',
)

NORMALS = TaskSpec(
  name='dpt_normals',
  title='Surface normals with a DPT decoder',
  caption=(
    'The direction that each surface faces, as a color (the ball is the key), and the angle '
    'between prediction and truth: good normals have flat walls of one color and bend only '
    'where surfaces do.'
  ),
  measure=measure_normals,
  metrics=_NORMALS,
  draw=drawing.normals,
  outputs=('intermediate_layers',),
  annotation='normals',
  shape='cut',
  constants=protocols.NORMALS,
  short_constants=_SMALL_DPT,
  size_constant='size',
)

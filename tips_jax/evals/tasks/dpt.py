"""Depth and surface normals by a trained DPT decoder (TIPSv2)."""

import functools
import json
import pathlib
from typing import Any

from tips_jax.evals.datasets import protocols
from tips_jax.evals.features.splits import TaskInputs
from tips_jax.evals.probes import (
  depth,
  dpt,
  dpt_train,
  normals,
)
from tips_jax.evals.probes.normals import WITHIN
from tips_jax.evals.tasks.common import (
  DEPTH_METRICS,
  baseline_images,
  batches,
  floats,
  scored_depth,
)
from tips_jax.evals.tasks.spec import Metric, Result, TaskSpec

_DPT = {'hidden': 'channels', 'sigloss': 'sig_weight', 'gradient': 'gradient_weight'} | {
  name: name
  for name in (
    'learning_rate',
    'epochs',
    'warmup_epochs',
    'batch',
    'bins',
    'min_depth',
    'max_depth',
    'widths',
  )
}
_NORMALS = (
  Metric('angular_rmse', 'RMSE', 'deg', 'lower', shown=True),
  Metric('rmse_pooled', 'RMSE, pooled', 'deg', 'lower'),
  Metric('mean', 'mean angle', 'deg', 'lower'),
  Metric('median', 'median angle', 'deg', 'lower'),
  *(Metric(f'within_{degrees:g}', f'within {degrees:g}°') for degrees in WITHIN),
)
# A decoder that is trained in minutes.
_SMALL_DPT = {'hidden': 16, 'widths': (8, 16, 16, 16), 'epochs': 8, 'learning_rate': 2e-3}


def measure(work: TaskInputs) -> dict[str, Any]:
  """A DPT decoder of depth or normals on four layers. Nothing is chosen. It is kept beside the
  results.
  """
  train, test, o = work.part('train'), work.part('test'), work.evaluation.options
  task = work.evaluation.spec.annotation
  truth = getattr(train, task)
  trained = _trained(work, train, truth, task)
  scorer = (
    depth.DepthScorer(max_depth=o['max_depth']) if task == 'depth' else normals.NormalScorer()
  )
  examples, shown = [], set(test.shown())
  for rows in batches(test):
    found = trained.predict([(patch[rows], cls[rows]) for patch, cls in test.intermediate_layers])
    for i, one in zip(rows, found):
      one = one if task == 'depth' else one[..., :3]
      own = getattr(test, task)(i)
      scorer.add(one, own)
      if i in shown:
        own = scored_depth(own, o['max_depth']) if task == 'depth' else own
        examples.append(
          {
            'image': test.image(i),
            'truth': own,
            'predicted': one,
            'patch': floats(test.intermediate_layers[-1][0][i]),
          }
        )
  baselines_of = (
    functools.partial(depth.baselines, max_depth=o['max_depth'])
    if task == 'depth'
    else normals.baselines
  )
  baselines = baselines_of(truth, baseline_images(train), getattr(test, task), range(len(test)))
  rename = {'rmse': 'angular_rmse'} if task == 'normals' else {}
  named = lambda values: {rename.get(name, name): value for name, value in values.items()}
  return {
    'metrics': named(scorer.result()),
    'chance': named(baselines['constant']),
    'examples': examples,
    'chosen': {
      'intermediate_layers': dpt.intermediate_layers_of(work.encoder.depth),
      'mean_image': named(baselines['mean_image']),
    },
  }


def _trained(work, train, truth, task):
  """The decoder of a job: out of the cache, or trained; a copy goes to the output, in the official
  layout too.
  """
  o = work.evaluation.options
  options = {ours: o[name] for name, ours in _DPT.items() if name in o}
  kept = work.cache.path('decoders', [train.key, task, json.loads(json.dumps(options))], '.npz')
  if kept.is_file():
    found = dpt_train.load(kept)
  else:
    recipe = dpt_train.DPTRecipe(task=task, **options)
    found = dpt_train.fit(train.intermediate_layers, truth, recipe)
    found.save(kept)
  if work.output:
    folder = pathlib.Path(work.output) / 'decoders'
    folder.mkdir(parents=True, exist_ok=True)
    found.save(folder / f'{work.evaluation.dataset}_{work.evaluation.task.kind}.npz')
    dpt.write_official(
      found.params,
      folder / f'{work.evaluation.dataset}_{work.evaluation.task.kind}_official.npz',
      task=task,
    )
  return found


def _draw_depth(result: Result) -> bytes | None:
  from tips_jax.evals.report import plotting  # matplotlib is slow to import

  return plotting.depths(result)


def _draw_normals(result: Result) -> bytes | None:
  from tips_jax.evals.report import plotting  # matplotlib is slow to import

  return plotting.normals(result)


DEPTH = TaskSpec(
  name='dpt_depth',
  title='Depth with a DPT decoder',
  caption=(
    'Depth from a trained decoder beside the truth, on one logarithmic scale of colors, and '
    'the error: good depth has sharp outlines, and an error row that stays dark.'
  ),
  measure=measure,
  metrics=DEPTH_METRICS,
  draw=_draw_depth,
  outputs=('intermediate_layers',),
  annotation='depth',
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
  measure=measure,
  metrics=_NORMALS,
  draw=_draw_normals,
  outputs=('intermediate_layers',),
  annotation='normals',
  shape='cut',
  constants=protocols.NORMALS,
  short_constants=_SMALL_DPT,
  size_constant='size',
)

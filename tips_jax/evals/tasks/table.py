"""All tasks that can be measured."""

from tips_jax.core.strict import unknown
from tips_jax.evals.datasets import protocols
from tips_jax.evals.probes.normals import WITHIN
from tips_jax.evals.tasks import common, dense
from tips_jax.evals.tasks.spec import Metric, Result, TaskSpec

_SEGMENTATION = (Metric('miou', 'mIoU', shown=True), Metric('pixel_accuracy', 'pixel accuracy'))
_DEPTH = (
  Metric('rmse', 'RMSE', 'm', 'lower', shown=True),
  Metric('rmse_pooled', 'RMSE, pooled', 'm', 'lower'),
  Metric('abs_rel', 'relative error', better='lower'),
  Metric('delta1', 'within 25 %'),
)
_NORMALS = (
  Metric('angular_rmse', 'RMSE', 'deg', 'lower', shown=True),
  Metric('rmse_pooled', 'RMSE, pooled', 'deg', 'lower'),
  Metric('mean', 'mean angle', 'deg', 'lower'),
  Metric('median', 'median angle', 'deg', 'lower'),
  *(Metric(f'within_{degrees:g}', f'within {degrees:g}°') for degrees in WITHIN),
)
_ACCURACY = (Metric('accuracy', 'accuracy', shown=True),)
_INSTANCES = (Metric('r1', 'R@1', shown=True), Metric('r1_own', 'R@1, own index'))
_RECALLS = tuple(
  Metric(f'{way}_r{k}', f'{label} R@{k}', shown=k == 1)
  for way, label in (('t2i', 'text to image'), ('i2t', 'image to text'))
  for k in (1, 5, 10)
)
# A decoder that is trained in minutes.
_SMALL_DPT = {'hidden': 16, 'widths': (8, 16, 16, 16), 'epochs': 8, 'learning_rate': 2e-3}


# Drawing imports matplotlib, which is slow: only where something is drawn.


def _segmented(result: Result) -> bytes | None:
  from tips_jax.evals.report import plotting

  return plotting.segmented(result)


def _overlaid(result: Result) -> bytes | None:
  from tips_jax.evals.report import plotting

  return plotting.segmented(result, overlay=True)


def _depths(result: Result) -> bytes | None:
  from tips_jax.evals.report import plotting

  return plotting.depths(result)


def _normals(result: Result) -> bytes | None:
  from tips_jax.evals.report import plotting

  return plotting.normals(result)


def _classified(result: Result) -> bytes | None:
  from tips_jax.evals.report import plotting

  return plotting.classified(result)


def _retrieved(result: Result) -> bytes | None:
  from tips_jax.evals.report import plotting

  return plotting.retrieved(result)


_SPECS = (
  TaskSpec(
    name='segmentation',
    title='Linear segmentation',
    caption=(
      'Test images, their true classes, those that a linear probe reads off the patches, and in '
      'red the pixels it gets wrong: good masks follow the outlines, and red remains only along '
      'borders.'
    ),
    measure=dense.segments,
    metrics=_SEGMENTATION,
    draw=_segmented,
    outputs=('patch',),
    needs='mask',
    shape='own',
    cells=dense.window_cells,
    constants=protocols.SEGMENTATION,
    short_constants={'mode': 'square', 'patches': 30_000},
    size_constant='crop',
  ),
  TaskSpec(
    name='depth',
    title='Linear depth',
    caption=(
      'Depth from a linear probe beside the truth, on one logarithmic scale of colors, and the '
      'error: good depth has the layout and the objects in the right order, and an error row '
      'that stays dark.'
    ),
    measure=dense.linear_depth,
    metrics=_DEPTH,
    draw=_depths,
    outputs=('patch',),
    needs='depth',
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
  ),
  TaskSpec(
    name='dpt_depth',
    title='Depth with a DPT decoder',
    caption=(
      'Depth from a trained decoder beside the truth, on one logarithmic scale of colors, and '
      'the error: good depth has sharp outlines, and an error row that stays dark.'
    ),
    measure=dense.decoder,
    metrics=_DEPTH,
    draw=_depths,
    outputs=('intermediate_layers',),
    needs='depth',
    shape='cut',
    constants=protocols.DPT_DEPTH,
    short_constants=_SMALL_DPT | {'bins': 32},
    size_constant='size',
  ),
  TaskSpec(
    name='dpt_normals',
    title='Surface normals with a DPT decoder',
    caption=(
      'The direction that each surface faces, as a color (the ball is the key), and the angle '
      'between prediction and truth: good normals have flat walls of one color and bend only '
      'where surfaces do.'
    ),
    measure=dense.decoder,
    metrics=_NORMALS,
    draw=_normals,
    outputs=('intermediate_layers',),
    needs='normals',
    shape='cut',
    constants=protocols.NORMALS,
    short_constants=_SMALL_DPT,
    size_constant='size',
  ),
  TaskSpec(
    name='knn',
    title='k-NN classification',
    caption=(
      'Test images and the class that their nearest training images vote for, green where it is '
      'right: good features err, if at all, toward a class that looks much the same.'
    ),
    measure=common.neighbors,
    metrics=_ACCURACY,
    draw=_classified,
    needs='label',
    constants=protocols.KNN,
    charted=True,
  ),
  TaskSpec(
    name='linear',
    title='Linear classification',
    caption=(
      'Test images and the class that a linear probe gives them, green where it is right: good '
      'features err, if at all, toward a class that looks much the same.'
    ),
    measure=common.logistic,
    metrics=_ACCURACY,
    draw=_classified,
    needs='label',
    constants=protocols.LINEAR,
    charted=True,
  ),
  TaskSpec(
    name='instance_retrieval',
    title='Instance retrieval',
    caption=(
      'A query image and the images nearest to it, those of the same instance framed: in a good '
      'sheet the frames stand at the left.'
    ),
    measure=common.instances,
    metrics=_INSTANCES,
    draw=_retrieved,
    roles=('test',),
    needs='label',
    charted=True,
  ),
  TaskSpec(
    name='retrieval',
    title='Retrieval between images and texts',
    caption=(
      'Evenly spaced test texts, not chosen ones, and the images nearest to each, the right one '
      'framed: in a good sheet the frame stands first, and the others fit the words in part.'
    ),
    measure=common.texts_and_images,
    metrics=_RECALLS,
    draw=_retrieved,
    roles=('test',),
    needs='captions',
    text=True,
    constants=protocols.RETRIEVAL,
  ),
  TaskSpec(
    name='zeroshot',
    title='Zero-shot classification',
    caption=(
      'Test images and the class whose texts lie nearest, without any training on this data, '
      'green where it is right: a good model errs, if at all, toward a related class.'
    ),
    measure=common.named_classes,
    metrics=(*_ACCURACY, Metric('top5', 'top-5 accuracy')),
    draw=_classified,
    roles=('test',),
    needs='label',
    text=True,
    constants=protocols.ZEROSHOT,
    short_constants={'templates': 'photo'},
    charted=True,
  ),
  TaskSpec(
    name='zeroshot_segmentation',
    title='Zero-shot segmentation',
    caption=(
      'Each patch takes the class whose texts lie nearest, drawn over the image beside the '
      'truth: good overlays cover whole objects and stop at their outlines.'
    ),
    measure=dense.named_segments,
    metrics=_SEGMENTATION,
    draw=_overlaid,
    roles=('test',),
    outputs=('value_patch',),
    needs='mask',
    text=True,
    shape='own',
    cells=dense.view_cells,
    constants=protocols.ZEROSHOT_SEGMENTATION,
    size_constant='size',
  ),
)
TASKS = {spec.name: spec for spec in _SPECS}


def spec(name: str) -> TaskSpec:
  """The task of a name."""
  if name not in TASKS:
    raise unknown('task', name, TASKS)
  return TASKS[name]


def metric(full_name: str) -> Metric:
  """The metric of a name as runs log it.

  'knn/accuracy', 'retrieval/synthetic/t2i_r1' (of another CLS token), or of a benchmark
  'voc/zeroshot_segmentation_voc21/miou' (of a variant of the task).
  """
  *path, name = full_name.split('/')
  for part in path:
    # 'zeroshot_segmentation_voc21' also starts with 'zeroshot_': the longest name is meant.
    for task in sorted(TASKS.values(), key=lambda task: -len(task.name)):
      if part == task.name or part.startswith(f'{task.name}_'):
        metrics = {metric.name: metric for metric in task.metrics}
        if name not in metrics:
          raise unknown(f'metric of {task.name}', name, metrics)
        return metrics[name]
  raise unknown('task of a metric', full_name, TASKS)

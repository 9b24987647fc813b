"""All tasks that can be measured: a task is a file beside this one, and a line here."""

from tips_jax.core.strict import unknown
from tips_jax.evals.tasks import (
  depth,
  dpt,
  instance_retrieval,
  knn,
  linear,
  regions,
  retrieval,
  segmentation,
  tagging,
  zeroshot,
  zeroshot_segmentation,
)
from tips_jax.evals.tasks.spec import Metric, TaskSpec

_SPECS = (
  segmentation.SPEC,
  depth.SPEC,
  dpt.DEPTH,
  dpt.NORMALS,
  knn.SPEC,
  linear.SPEC,
  instance_retrieval.SPEC,
  retrieval.SPEC,
  zeroshot.SPEC,
  zeroshot_segmentation.SPEC,
  regions.CLASSIFICATION,
  regions.RETRIEVAL,
  tagging.SPEC,
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

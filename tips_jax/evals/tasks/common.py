"""What several tasks share.

Every CLS token is measured. Metrics of the first one have plain names, the others' are
'TOKEN/NAME'; tasks with texts use the tokens that lie in the space of the texts: all of them, or,
behind a projection, the projected one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tips_jax.evals.features import reading
from tips_jax.evals.features.splits import SplitFeatures, TaskInputs
from tips_jax.evals.probes import depth, masks
from tips_jax.evals.tasks.spec import Evaluation, Metric

MASK_IDS = 256  # a mask is uint8
_BATCH = 32  # images whose predictions are held at once
_BASELINE_IMAGES = 2000  # training images that the baselines without features learn from

ACCURACY = (Metric('accuracy', 'accuracy', shown=True),)
SEGMENTATION_METRICS = (
  Metric('miou', 'mIoU', shown=True),
  Metric('pixel_accuracy', 'pixel accuracy'),
)
DEPTH_METRICS = (
  Metric('rmse', 'RMSE', 'm', 'lower', shown=True),
  Metric('rmse_pooled', 'RMSE, pooled', 'm', 'lower'),
  Metric('abs_rel', 'relative error', better='lower'),
  Metric('delta1', 'within 25 %'),
)


def joint(part: SplitFeatures, cls_names: Sequence[str]) -> dict:
  """The image embeddings [R, E] in the space of the texts, by CLS token.

  A token that is the embedding itself, unprojected, makes all of them candidates; else there is the
  embedding alone.
  """
  same = any(
    np.array_equal(part.arrays[name][:8], part.arrays['embedding'][:8]) for name in cls_names
  )
  return (
    {name: part.arrays[name] for name in cls_names}
    if same
    else {'embedding': part.arrays['embedding']}
  )


def class_names(job: Evaluation) -> tuple:
  """Names of the classes of an annotation for zero-shot tasks: the protocol's, or the data set's
  own.
  """
  if job.task.classes:
    return job.task.classes
  split = job.splits['test']
  return tuple(
    job.data.mask_classes if job.spec.annotation == 'mask' else job.data.label_names(split)
  )


def tokens(names: Sequence[str]) -> list[tuple[str, str]]:
  """(name, prefix of its metrics) of each CLS token."""
  return [(name, f'{name}/' if i else '') for i, name in enumerate(names)]


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
  """Share of right predictions; rows with label -1 take no part; nan without any."""
  labeled = labels >= 0
  if not labeled.any():
    return float('nan')
  return float((predicted == labels)[labeled].mean())


def majority(train_labels: Sequence[int], test_labels: Sequence[int]) -> float:
  """The accuracy of always answering the most frequent class of train: the chance level."""
  train_labels = np.asarray(train_labels)
  test_labels = np.asarray(test_labels)
  common = np.bincount(train_labels[train_labels >= 0]).argmax()
  return float((test_labels[test_labels >= 0] == common).mean())


def for_all_tokens(chance: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
  """The chance numbers under the names of all tokens."""
  return {
    name: chance[name.rsplit('/', 1)[-1]] for name in metrics if name.rsplit('/', 1)[-1] in chance
  }


def classified(
  work: TaskInputs,
  test: SplitFeatures,
  metrics: Mapping[str, float],
  chance: Mapping[str, float],
  found: np.ndarray,
) -> dict[str, Any]:
  """Fields of an Result of a classifier whose answers for the first token are `found` [R]."""
  asked = test.label >= 0
  size = int(max(test.label.max(initial=0), found.max(initial=0))) + 1
  names = class_names(work.evaluation)
  names = tuple(one if isinstance(one, str) else one[0] for one in names)
  return {
    'metrics': metrics,
    'chance': for_all_tokens(chance, metrics),
    'classes': names,
    'confusion': masks.confusion(test.label[asked], found[asked], size=max(size, len(names))),
    'examples': [
      {'image': test.image(i), 'truth': int(test.label[i]), 'predicted': int(found[i])}
      for i in test.shown()
      if test.label[i] >= 0
    ],
  }


def batches(part: SplitFeatures) -> list[np.ndarray]:
  """Numbers of the images of a part, a few at a time."""
  return [np.arange(i, min(i + _BATCH, len(part))) for i in range(0, len(part), _BATCH)]


def floats(array: np.ndarray) -> np.ndarray:
  return np.asarray(array, np.float32)


def baseline_images(part: SplitFeatures) -> np.ndarray:
  """Numbers of the images that the baselines learn from."""
  return reading.records(part, _BASELINE_IMAGES)


def share_right(counts: np.ndarray) -> float:
  return int(np.trace(counts)) / max(int(counts.sum()), 1)


def scored_depth(truth: np.ndarray, most: float) -> np.ndarray:
  """Depth as it is scored: what is beyond `most` meters is missing."""
  return np.where(depth.known(truth, max_depth=most), truth, 0)


def whole_patches(pixels: int, encoder: Any) -> int:
  """Pixels of whole patches, at least as many."""
  return -(-pixels // encoder.patch) * encoder.patch

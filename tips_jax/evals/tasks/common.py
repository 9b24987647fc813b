"""What several tasks share.

Every CLS token is measured. Metrics of the first one have plain names, the others' are
'TOKEN/NAME'; tasks with texts use the tokens that are in the space of the texts: all of them, or,
behind a projection, the projected one.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.evals.baselines import PixelsAndPlace, cell_means
from tips_jax.evals.features import reading, splits
from tips_jax.evals.features.splits import SplitFeatures, TaskInputs
from tips_jax.evals.probes import depth, masks
from tips_jax.evals.tasks.spec import Evaluation, Metric

# A mask is uint8.
MASK_IDS = 256
# Images whose predictions are held at once.
_BATCH = 32
# Training images that the baselines without features learn from; of pixels fewer, as this takes
# longer.
_BASELINE_IMAGES = 2000
_PIXEL_IMAGES = 500

ACCURACY = (Metric('accuracy', 'accuracy', shown=True),)
SEGMENTATION_METRICS = (
  Metric('miou', 'mIoU', shown=True),
  Metric('pixel_accuracy', 'pixel accuracy'),
)
DEPTH_METRICS = (
  # The mean over images of each image's RMSE, as papers print it; pooled: over all pixels.
  Metric('rmse', 'RMSE', 'm', 'lower', shown=True),
  Metric('rmse_pooled', 'RMSE, pooled', 'm', 'lower'),
  Metric('abs_rel', 'relative error', better='lower'),
  Metric('delta1', 'within 25 %'),
)


# --- CLS tokens ---------------------------------------------------------------------------------


def tokens(names: Iterable[str]) -> list[tuple[str, str]]:
  """(name, prefix of its metrics) of each CLS token."""
  first, *others = names
  return [(first, ''), *((name, f'{name}/') for name in others)]


def for_all_tokens(chance: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
  """The chance numbers under the names of all tokens."""
  result = {}
  for name in metrics:
    # Chance knows no image, so it is the same for every token.
    plain = name.rsplit('/', 1)[-1]
    if plain in chance:
      result[name] = chance[plain]
  return result


def joint(part: SplitFeatures, cls_names: Sequence[str]) -> dict:
  """The image embeddings [R, E] in the space of the texts, by CLS token.

  A token that is the embedding itself, unprojected, makes all of them candidates; else there is the
  embedding alone.
  """
  embedding = part.arrays['embedding']
  for name in cls_names:
    # Some rows are enough: a projection changes all of them.
    if np.array_equal(part.arrays[name][:8], embedding[:8]):
      return {name: part.arrays[name] for name in cls_names}
  return {'embedding': embedding}


# --- classifiers --------------------------------------------------------------------------------


def class_names(evaluation: Evaluation) -> tuple:
  """Names of the classes of an annotation for zero-shot tasks: the protocol's, or the data set's
  own.
  """
  if evaluation.task.classes:
    return evaluation.task.classes
  if evaluation.spec.annotation == 'mask':
    return tuple(evaluation.data.mask_classes)
  return tuple(evaluation.data.label_names(evaluation.splits['test']))


def synonyms(name: str | Sequence[str]) -> tuple[str, ...]:
  """All names of a class, which may have several; the first one is shown."""
  if isinstance(name, str):
    return (name,)
  return tuple(name)


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


def classified(
  inputs: TaskInputs,
  test: SplitFeatures,
  metrics: Mapping[str, float],
  chance: Mapping[str, float],
  predicted: np.ndarray,
) -> dict[str, Any]:
  """Fields of a Result of a classifier whose answers for the first token are `predicted` [R]."""
  labeled = test.label >= 0
  names = tuple(synonyms(name)[0] for name in class_names(inputs.evaluation))
  # A store may have labels without names, so the larger of both counts.
  size = max(int(test.label.max(initial=0)) + 1, int(predicted.max(initial=0)) + 1, len(names))
  examples = []
  for i in test.shown():
    if labeled[i]:
      examples.append(
        {'image': test.image(i), 'truth': int(test.label[i]), 'predicted': int(predicted[i])}
      )
  return {
    'metrics': metrics,
    'chance': for_all_tokens(chance, metrics),
    'classes': names,
    'confusion': masks.confusion(test.label[labeled], predicted[labeled], size=size),
    'examples': examples,
  }


# --- dense tasks --------------------------------------------------------------------------------


def batches(part: SplitFeatures) -> list[np.ndarray]:
  """Numbers of the images of a part, a few at a time."""
  return [np.arange(i, min(i + _BATCH, len(part))) for i in range(0, len(part), _BATCH)]


def floats(array: np.ndarray) -> np.ndarray:
  """float32: the cache keeps patches as float16, whose sums lose their digits."""
  return np.asarray(array, np.float32)


def baseline_images(part: SplitFeatures) -> np.ndarray:
  """Numbers of the images that the baselines learn from."""
  return reading.records(part, _BASELINE_IMAGES)


def answers_without_features(
  train: SplitFeatures,
  rows: Sequence[int],
  test: SplitFeatures,
  test_rows: Sequence[int],
  *,
  grid: tuple[int, int],
  patch: int,
  cells: Callable[[SplitFeatures, int], tuple[np.ndarray, np.ndarray]],
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """(number, {'position', 'pixels_position', 'oracle': values [h, w, K] of the patches}) of each
  test image.

  The first two learn from some of the images `rows` of train; the last is the truth, averaged over
  each patch. cells(part, i) -> values [h, w, K] and weight [h, w] of the patches of image i.
  """
  pixels = PixelsAndPlace(grid, patch)
  for k in reading.records(rows, _PIXEL_IMAGES):
    i = int(rows[k])
    pixels.add(train.image(i), *cells(train, i))
  pixels.solve()
  position = pixels.mean()
  for i in test_rows:
    values, weight = cells(test, i)
    # Where nothing is known nothing is scored; but values are blended with those beside them.
    oracle = np.where(weight[..., None] > 0, values, position)
    answers = {'position': position, 'pixels_position': pixels.predict(test.image(i))}
    yield i, answers | {'oracle': oracle}


def answers_to_maps(
  train: SplitFeatures,
  rows: Sequence[int],
  test: SplitFeatures,
  *,
  grid: tuple[int, int],
  patch: int,
  annotation: str,
  known: Callable[[np.ndarray], np.ndarray],
  scorer: Callable[[], Any],
) -> dict[str, dict[str, float]]:
  """Metrics of 'pixels_position' and 'oracle' where an annotation is 'depth' or 'normals'."""

  def cells(part, i):
    truth = getattr(part, annotation)(i)
    return cell_means(truth.reshape(*truth.shape[:2], -1), known(truth), grid)

  scorers = {'pixels_position': scorer(), 'oracle': scorer()}
  answers = answers_without_features(
    train, rows, test, range(len(test)), grid=grid, patch=patch, cells=cells
  )
  for i, values in answers:
    truth = getattr(test, annotation)(i)
    for name, scored in scorers.items():
      scored.add(values[name].reshape(*grid, *truth.shape[2:]), truth)
  return {name: scored.result() for name, scored in scorers.items()}


def check_labeled(pixels: int | np.ndarray, evaluation: Evaluation, role: str) -> None:
  """Raises InputError where the masks of a split have no pixel of any class."""
  if not np.any(pixels):
    split = {'train': 'training'}.get(role, role)
    raise InputError(
      f'{evaluation.dataset}: every pixel of the {split} masks is void; expected classes'
    )


def share_right(counts: np.ndarray) -> float:
  return int(np.trace(counts)) / max(int(counts.sum()), 1)


def scored_depth(truth: np.ndarray, most: float) -> np.ndarray:
  """Depth as it is scored: what is beyond `most` meters is missing."""
  return np.where(depth.known(truth, max_depth=most), truth, 0)


def whole_patches(pixels: int, encoder: Any) -> int:
  """Pixels of whole patches, at least as many."""
  return -(-pixels // encoder.patch) * encoder.patch


def readable(source: Any, numbers: np.ndarray) -> Iterator[tuple[int, tuple[int, int]]]:
  """(number, (height, width)) of the records with an image; a warning for each without one."""
  for number in numbers.tolist():
    try:
      yield number, splits.header(source[number])
    except ValueError as error:
      logging.warning('evaluation leaves out record %d, which cannot be read: %s', number, error)


def recipe_options(recipe: type, options: Mapping[str, Any]) -> dict[str, Any]:
  """The options that are fields of a recipe: a protocol has others too, such as the size."""
  fields = {field.name for field in dataclasses.fields(recipe)}
  return {name: value for name, value in options.items() if name in fields}

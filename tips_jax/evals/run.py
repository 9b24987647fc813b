"""All the tasks of a config on one encoder: metric name -> number."""
import dataclasses

from tips_jax.core.config import Evals, InputError
from tips_jax.evals import baselines as baselines_lib
from tips_jax.evals import features, knn, retrieval, segmentation

TRAIN = 'train'    # the split that kNN and the segmentation probe learn from
_NEEDS = {'knn': 'label', 'segmentation': 'mask'}


def check(store, config: Evals, *, tokenizer=None) -> None:
  """Raises InputError where the store lacks what a task needs: call it before the run starts."""
  for task in config.tasks:
    needed = _NEEDS.get(task, config.retrieval_text)
    if needed not in store.features:
      raise InputError(f'evals.tasks: {task!r} needs the feature {needed!r}, and store {store.path!r} has only '
                       f'{sorted(store.features)}; leave the task out or prepare the store with it')
    for split in (config.split, TRAIN) if task in _NEEDS else (config.split,):
      if len(store.source(split)) == 0:
        raise InputError(f'evals.split: {split!r} of store {store.path!r} is empty; expected images for {task!r}')
  if 'retrieval' in config.tasks and tokenizer is None:
    raise InputError("evals.tasks: 'retrieval' needs a tokenizer; expected data.tokenizer, or a store prepared with "
                     '--tokenizer')


def evaluate(encoder: features.Encoder, store, *, tokenizer=None, config: Evals, text_length: int = 64,
             keep: dict | None = None) -> dict[str, float]:
  """Metrics of an encoder: 'retrieval/t2i_r1' ... 'i2t_r10', 'knn/accuracy', 'segmentation/miou', all in [0, 1].

  kNN and the linear segmentation probe learn on the training split; everything is measured on `config.split`. `keep`
  takes what the report draws: 'probe'. Raises InputError as `check` does.
  """
  check(store, config, tokenizer=tokenizer)
  tasks, result, train, scorer = config.tasks, {}, None, None
  names = (config.cls,) if 'knn' in tasks else ()
  options = dict(config=config, text_length=text_length)
  if 'knn' in tasks or 'segmentation' in tasks:
    patches = None
    if 'segmentation' in tasks:
      patches = segmentation.TrainingPatches(min(config.limit, len(store.source(TRAIN))))
    train = features.extract(encoder, store, TRAIN, names=names, visit=patches, **options)
    if patches:
      scorer = segmentation.Scorer(patches.fit())
  if not tasks:
    return result
  joint = ('embedding',) if 'retrieval' in tasks else ()
  test = features.extract(encoder, store, config.split, names=names + joint, visit=scorer,
                          tokenizer=tokenizer if joint else None, **options)
  if joint:
    if test.text is None:
      raise InputError(f"evals.tasks: 'retrieval' needs a text tower, and {config.retrieval_text!r} in split "
                       f'{config.split!r}; found {len(test.captions)} texts')
    recalls = retrieval.recalls(test.image['embedding'], test.text, test.owner)
    result.update({f'retrieval/{name}': value for name, value in recalls.items()})
  if 'knn' in tasks:
    result['knn/accuracy'] = knn.accuracy(train.image[config.cls], train.label, test.image[config.cls], test.label)
  if scorer:
    result['segmentation/miou'] = scorer.mean_iou()
    if keep is not None:
      keep['probe'] = scorer.probe
  return result


def baselines(store, config: Evals, *, patch: int, tokenizer=None, text_length: int = 64):
  """(chance, baseline): what a random answer and what raw pixels score on the same tasks, under the same names.

  `patch`: pixels of the patches of the model that is compared; what the baselines are: see evals/baselines.py. Without
  texts in the training split there is no pixel baseline of retrieval.
  """
  check(store, config, tokenizer=tokenizer)
  chance = baselines_lib.chance(store, config)
  pixels = baselines_lib.Pixels(config, patch=patch)
  if 'retrieval' in config.tasks:
    fitted = TRAIN in store.splits and pixels.fit(store, TRAIN, tokenizer=tokenizer, text_length=text_length)
    if not fitted:    # nothing to learn the baseline from
      config = dataclasses.replace(config, tasks=tuple(t for t in config.tasks if t != 'retrieval'))
  return chance, evaluate(pixels, store, tokenizer=tokenizer, config=config, text_length=text_length)

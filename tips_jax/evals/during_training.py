"""All the tasks of a config on one encoder: metric name -> number.

Retrieval, kNN and segmentation of the store are measured here, in one pass over each split that
keeps no patches. The other tasks, and public benchmarks, are the suite's
(evals/during_training_suite.py).
"""

import dataclasses

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Evals
from tips_jax.evals import baselines as baselines_lib
from tips_jax.evals import during_training_suite as run_suite
from tips_jax.evals.features import reading as features
from tips_jax.evals.probes import masks as segmentation
from tips_jax.evals.tasks import knn, retrieval, table

TRAIN = 'train'  # the split that tasks learn from
_HERE = ('retrieval', 'knn', 'segmentation')


def check(store, config: Evals, *, tokenizer=None, has_text: bool = True) -> dict:
  """The suite's jobs, for `evaluate`; InputError where a task lacks what it needs: call it before
  the run starts.

  has_text: whether there is a text tower; without it the tasks of benchmarks that need one are left
  out.
  """
  text = dict(has_text=has_text, tokenizer=tokenizer)
  for task in config.tasks:
    kind = table.TASKS[task]
    needed = config.retrieval_text if kind.needs == 'captions' else kind.needs
    if needed not in store.features:
      raise InputError(
        f'evals.tasks: {task!r} needs the feature {needed!r}, and store {store.path!r} has only '
        f'{sorted(store.features)}; leave the task out or prepare the store with it'
      )
    for split in (config.split, TRAIN) if TRAIN in kind.roles else (config.split,):
      if len(store.source(split)) == 0:
        raise InputError(
          f'evals.split: {split!r} of store {store.path!r} is empty; expected images for {task!r}'
        )
    if kind.text:
      run_suite.need_text(f'evals.tasks: {task!r}', **text)
  jobs = run_suite.jobs(
    store, config, [task for task in config.tasks if task not in _HERE], has_text=has_text
  )
  for name, group in jobs.items():
    if name and any(job.spec.text for job in group):
      run_suite.need_text(f'evals.suite: {name!r}', **text)
  return jobs


def evaluate(
  encoder: features.Encoder,
  store,
  *,
  tokenizer=None,
  config: Evals,
  text_length: int = 64,
  keep: dict | None = None,
  jobs: dict | None = None,
) -> dict[str, float]:
  """Metrics of an encoder: 'knn/accuracy', 'retrieval/t2i_r1', 'depth/rmse', of benchmarks
  'voc/segmentation/miou', ...

  All are shares in [0, 1] but meters and degrees (protocols.unit). Tasks that learn do so on the
  training split; everything of the store is measured on `config.split`. `keep` takes what the
  report draws: 'probe', and 'chance', the suite's metrics of an answer that knows no image. jobs:
  what `check` gave. Raises InputError as `check` does.
  """
  if jobs is None:
    jobs = check(store, config, tokenizer=tokenizer)
  keep = {} if keep is None else keep
  result = _measured_here(
    encoder, store, tokenizer=tokenizer, config=config, text_length=text_length, keep=keep
  )
  others, keep['chance'] = run_suite.measure(encoder, jobs, config=config)
  return result | others


def _measured_here(encoder, store, *, tokenizer, config, text_length, keep):
  tasks, result, train, scorer = set(config.tasks) & set(_HERE), {}, None, None
  if not tasks:
    return result
  names = (config.cls,) if 'knn' in tasks else ()
  options = dict(config=config, text_length=text_length)
  if 'knn' in tasks or 'segmentation' in tasks:
    patches = None
    if 'segmentation' in tasks:
      patches = segmentation.TrainingPatches(min(config.limit, len(store.source(TRAIN))))
    train = features.extract(encoder, store, TRAIN, names=names, visit=patches, **options)
    if patches:
      scorer = segmentation.Scorer(patches.fit())
  joint = ('embedding',) if 'retrieval' in tasks else ()
  test = features.extract(
    encoder,
    store,
    config.split,
    names=names + joint,
    visit=scorer,
    tokenizer=tokenizer if joint else None,
    **options,
  )
  if joint:
    if test.text is None:
      raise InputError(
        f"evals.tasks: 'retrieval' needs a text tower, and {config.retrieval_text!r} in split "
        f'{config.split!r}; found {len(test.captions)} texts'
      )
    recalls = retrieval.recalls(test.image['embedding'], test.text, test.owner)
    result.update({f'retrieval/{name}': value for name, value in recalls.items()})
  if 'knn' in tasks:
    predicted = knn.predict(train.image[config.cls], train.label, test.image[config.cls])
    result['knn/accuracy'] = knn.accuracy(predicted, test.label)
  if scorer:
    result['segmentation/miou'], keep['probe'] = scorer.mean_iou(), scorer.probe
  return result


def baselines(
  store,
  config: Evals,
  *,
  patch: int,
  tokenizer=None,
  text_length: int = 64,
  keep: dict | None = None,
):
  """(chance, baseline): what a random answer and what raw pixels score on the same tasks, under the
  same names.

  `patch`: pixels of the patches of the model that is compared; what the baselines are: see
  evals/baselines.py. Without texts in the training split there is no pixel baseline of retrieval.
  Of the suite's tasks there is none; their chance is what `evaluate` left in `keep`.
  """
  suite_chance = (keep or {}).get('chance', {})
  config = dataclasses.replace(config, tasks=tuple(t for t in config.tasks if t in _HERE), suite='')
  if not config.tasks:
    return suite_chance, {}
  check(store, config, tokenizer=tokenizer)
  chance = baselines_lib.chance(store, config) | suite_chance
  pixels = baselines_lib.Pixels(config, patch=patch)
  if 'retrieval' in config.tasks:
    fitted = TRAIN in store.splits and pixels.fit(
      store, TRAIN, tokenizer=tokenizer, text_length=text_length
    )
    if not fitted:  # nothing to learn the baseline from
      config = dataclasses.replace(config, tasks=tuple(t for t in config.tasks if t != 'retrieval'))
  return chance, evaluate(
    pixels, store, tokenizer=tokenizer, config=config, text_length=text_length
  )

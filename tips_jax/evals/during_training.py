"""What a training run measures on the way: the tasks of its config, by the same code as `evaluate`.

Tasks of the run's own store are measured with the short recipes (`evaluate --recipe=short`), public
benchmarks with their own. The numbers of the last step are those of
`python -m tips_jax.evaluate --store=STORE --recipe=short` on its checkpoint, with the same size and
limit.
"""

import dataclasses
import gc
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from tips_jax.core import log, schema
from tips_jax.core.errors import InputError, PassingError
from tips_jax.core.strict import unknown
from tips_jax.data import store
from tips_jax.data.reading.in_place import Opened, open_data
from tips_jax.data.tokenizer import Tokenizer
from tips_jax.evals import baselines, suite
from tips_jax.evals.datasets import evaluations, on_disk, protocols, records
from tips_jax.evals.features import cache
from tips_jax.evals.report import results as report
from tips_jax.evals.tasks import table
from tips_jax.evals.tasks.spec import Evaluation, Result
from tips_jax.interop.encoder import Encoder

# Tasks that raw pixels can be measured on: without texts of class names, and without layers.
_OF_PIXELS = ('segmentation', 'depth', 'knn', 'linear', 'instance_retrieval', 'retrieval')


def check(config: schema.Config) -> None:
  """InputError for a task, a suite or a best metric that does not exist. Opens no data."""
  for i, task in enumerate(config.evals.tasks):
    if task not in table.TASKS:
      raise unknown(f'evals.tasks[{i}]', task, table.TASKS)
  _suite(config.evals)
  best = config.checkpoint.best_metric
  # 'TASK/METRIC' of the store, 'DATASET/TASK/METRIC' of a public benchmark.
  if best and not set(best.split('/')[:-1]) & {*config.evals.tasks, *_task_names(config.evals)}:
    raise unknown('checkpoint.best_metric: task', best, config.evals.tasks)


class DuringTraining:
  """The evaluation of a run; call it with an Encoder. Raises InputError where data are missing or
  do not hold what a task needs. check_shards: as in store.open_store.
  """

  def __init__(self, config: schema.Config, *, check_shards: bool = True):
    check(config)
    self._config = config
    self._results: list[Result] = []
    best = config.checkpoint.best_metric
    self.lower_is_better = bool(best) and table.metric(best).better == 'lower'
    opened = open_data(config.data.store, config.data, check_shards=check_shards)
    if config.evals.tasks and not isinstance(opened, store.Store):
      raise InputError(
        f'evals.tasks: got {config.evals.tasks} with data.store={config.data.store!r}, which is '
        f'read as it lies; expected a store for them (python -m tips_jax.prepare), or evals.suite, '
        f'or none: --config.evals.tasks=()'
      )
    has_text = config.evals.text_tower in config.towers
    path = config.data.tokenizer or opened.tokenizer_path
    self._tokenizer = Tokenizer(path) if path and config.data.texts else None
    # Data sets whose indexes are searched together are measured together.
    self._own = _of_store(opened, config.evals)
    groups = {}
    for name in _suite(config.evals):
      group = protocols.get(name).group or name
      groups.setdefault(group, []).extend(_of_benchmark(name, config.evals, has_text))
    self._groups = list(groups.values())
    if self._own:
      self._groups.insert(0, self._own)
    for group in self._groups:
      for evaluation in group:
        where = f'evals.suite: {evaluation.dataset!r}'
        if group is self._own:
          where = f'evals.tasks: {evaluation.task.name!r}'
        self._check_texts(evaluation, where, has_text)
      records.check_data(group)

  def __call__(self, encoder: Encoder) -> dict[str, float]:
    """{'knn/accuracy': ..., 'retrieval/synthetic/t2i_r1': ..., 'voc/segmentation/miou': ...}:
    shares in [0, 1], meters, degrees.
    """
    self._results = self._measure(encoder, self._groups)
    return _metrics(self._results)

  def report(self, workdir: pathlib.Path, encoder: Encoder) -> str:
    """Writes results.json, report.json, index.html and pictures; returns the table of results."""
    config = self._config
    if not self._results:  # a run that was resumed at its end
      self(encoder)
    lines = log.read(workdir / log.FILE)
    # A term of weight zero is a monitor, not a part of the loss.
    losses = [name for name, term in config.losses.items() if term.weight]
    facts = {}
    for line in lines:
      if 'goodput' in line:
        facts['time'] = log.spent(line)
    return report.write(
      workdir,
      self._results,
      title=config.name,
      facts=facts,
      checkpoint=config.name,
      sha256=encoder.sha256,
      before=_before_training(lines),
      pixel_baseline=self._pixels(encoder),
      metrics_path=workdir / log.FILE,
      losses=[*losses, 'loss'],
    )

  def _measure(self, encoder, groups) -> list[Result]:
    """Features are kept in a temporary folder, those of one data set at a time."""
    config = self._config.evals
    results = []
    for group in groups:
      try:
        with tempfile.TemporaryDirectory(prefix='tips_jax-evaluation-') as folder:
          results += suite.run(
            encoder,
            group,
            cache=cache.Cache(folder),
            batch_size=config.batch_size,
            limit=config.limit,
          )
      except cache.DiskFull as error:  # a run has no --cache: its features are temporary files
        raise InputError(
          f'evals: {error}; in training TMPDIR says where the cache is, and evals.limit how many '
          'images'
        ) from None
      except PassingError:
        raise
      except InputError as error:
        raise InputError(f'evals: {error}') from None
      finally:
        # Features refer to themselves, and a removed file takes room as long as one has it open.
        gc.collect()
    return results

  def _pixels(self, encoder) -> dict[str, float]:
    """What raw pixels reach on the tasks of the store, where they can be measured on them."""
    config = self._config
    group = [evaluation for evaluation in self._own if evaluation.task.kind in _OF_PIXELS]
    if not group:
      return {}
    pixels = baselines.Pixels(patch=encoder.patch, size=config.evals.size)
    kinds = {evaluation.task.kind for evaluation in group}
    if 'retrieval' in kinds:
      # Pixels and words have no joint space: a regression on the training split makes one.
      fitted = pixels.fit(
        group[0].data,
        'train',
        tokenizer=self._tokenizer,
        text_length=config.data.text_length,
        limit=config.evals.limit,
      )
      if not fitted:  # no texts to learn from
        group = [evaluation for evaluation in group if evaluation.task.kind != 'retrieval']
    if not group:
      return {}
    return _metrics(self._measure(pixels, [group]))

  def _check_texts(self, evaluation: Evaluation, where: str, has_text: bool) -> None:
    if not evaluation.spec.needs_text:
      return
    if not has_text:
      raise InputError(
        f'{where} needs a text tower; expected one that evals.text_tower names, or tasks of images '
        'alone'
      )
    if self._tokenizer is None:
      raise InputError(
        f'{where} needs a tokenizer; expected data.tokenizer, or a store prepared with --tokenizer'
      )


def _before_training(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """The metrics of the evaluation at step 0; {} where there was none."""
  metrics = {}
  for line in lines:
    if line['step'] != 0:
      continue
    for name, value in line.items():
      if name.startswith('eval/') and name != 'eval/seconds':
        metrics[name.removeprefix('eval/')] = value
    if metrics:  # a restart repeats the step
      break
  return metrics


def _metrics(results: list[Result]) -> dict[str, float]:
  """{'knn/accuracy': ...}"""
  metrics = {}
  for result in results:
    for name, value in result.metrics.items():
      metrics[f'{result.prefix}/{name}'] = float(value)
  return metrics


def _task_names(config: schema.Evals) -> set[str]:
  """Names of the tasks of the public benchmarks."""
  names = set()
  for dataset in _suite(config):
    names |= {task.name for task in protocols.get(dataset).tasks}
  return names


def _of_store(opened: Opened, config: schema.Evals) -> list[Evaluation]:
  """Evaluations of the run's own store, with the short recipes, on `evals.split`."""
  if not config.tasks:
    return []
  for task in config.tasks:
    _check_store(opened, task, config.split)
  selected = []
  for evaluation in evaluations.of_store(
    opened.path, only=config.tasks, size=config.size, check_shards=opened.check_shards
  ):
    # The split may be a slice, 'train[90%:]', which the store does not list.
    evaluation.data.counts[config.split] = len(opened.source(config.split))
    splits = evaluation.splits | {'test': config.split}
    selected.append(dataclasses.replace(evaluations.short(evaluation), splits=splits))
  return selected


def _check_store(opened: store.Store, task: str, split: str) -> None:
  spec = table.TASKS[task]
  fields = {spec.annotation}
  if spec.annotation == 'captions':
    fields = {'captions', 'alt_text'}
  if not fields & set(opened.features):
    raise InputError(
      f'evals.tasks: {task!r} needs the feature {spec.annotation!r}, and store {opened.path!r} has '
      f'only {sorted(opened.features)}; leave the task out or prepare the store with it'
    )
  splits = [split]
  if 'train' in spec.roles:
    splits.append('train')
  for name in splits:
    if len(opened.source(name)) == 0:
      raise InputError(
        f'evals.split: {name!r} of store {opened.path!r} is empty; expected images for {task!r}'
      )


def _suite(config: schema.Evals) -> tuple[str, ...]:
  """Names of the public benchmarks; InputError where one or their folder does not exist."""
  if not config.suite:
    return ()
  try:
    names = protocols.names(config.suite)
  except InputError as error:
    raise InputError(f'evals.suite: {error}') from None
  on_disk.require_folder('evals.data', config.data, names)
  return names


def _of_benchmark(name: str, config: schema.Evals, has_text: bool) -> list[Evaluation]:
  tasks = []
  for task in protocols.get(name).tasks:
    if has_text or not table.TASKS[task.kind].needs_text:
      tasks.append(task)
  if not tasks:
    raise InputError(
      f'evals.suite: {name!r} needs a text tower; expected one that evals.text_tower names, or '
      'tasks of images alone'
    )
  names = [task.name for task in tasks]
  on_disk.require([on_disk.check(name, config.data, tasks=names)])
  return evaluations.of_benchmark(name, config.data, only={task.kind for task in tasks})

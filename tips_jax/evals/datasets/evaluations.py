"""The evaluations of a public benchmark, of a user's store, and of `scenes`.

`scenes` is drawn when it is missing.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.data import store
from tips_jax.data.reading import in_place
from tips_jax.data.scenes import dataset as scenes
from tips_jax.evals.datasets import protocols, records
from tips_jax.evals.datasets.protocols import Constant, Task
from tips_jax.evals.datasets.sources import Benchmark, Store
from tips_jax.evals.tasks.spec import Evaluation, TaskSpec
from tips_jax.evals.tasks.table import TASKS

QUICK = 'quick'
_SCENES = dict(train=1024, test=256, size=96, objects=1, typical=0.8)
# The captions of scenes know no other words around a class.
_SCENES_TEMPLATES = {'templates': ('a {}.',)}
_OF_CAPTION_WORDS = ('zeroshot_segmentation', 'region_classification', 'tagging')
# What the split to measure on may be called.
_TEST = ('test', 'validation', 'val', 'dev')


def dataset_names(suite: str) -> tuple[str, ...]:
  """'quick' and data sets of a list of suites and data sets, each once; InputError with the nearest
  name.
  """
  known = [QUICK, *protocols.SUITES, *protocols.PROTOCOLS]
  names = []
  for part in suite.split(','):
    part = part.strip()
    if part not in known:
      raise unknown('--suite', part, known)
    if part == QUICK:
      names.append(QUICK)
    else:
      names += protocols.names(part)
  return tuple(dict.fromkeys(names))


def task_names(text: str) -> tuple[str, ...]:
  """Tasks of a list 'NAME,NAME' each once; InputError with the nearest name."""
  names = [part.strip() for part in text.split(',') if part.strip()]
  for name in names:
    if name not in TASKS:
      raise unknown('--task', name, TASKS)
  return tuple(dict.fromkeys(names))


def benchmark_tasks(datasets: Iterable[str], only: Iterable[str] = ()) -> dict[str, list[str]]:
  """The public benchmarks among `datasets` that have a task of `only` (any, where empty): name ->
  its tasks.
  """
  tasks = {}
  for name in datasets:
    if name != QUICK:
      selected = _select(protocols.get(name), only)
      if selected:
        tasks[name] = [task.name for task in selected]
  return tasks


def of_benchmark(
  name: str, data_dir: str | os.PathLike, *, only: Iterable[str] = (), size: int = 0
) -> list[Evaluation]:
  """Evaluations on one public benchmark. only: tasks; size: pixels instead of the protocol's."""
  protocol = protocols.get(name)
  tasks = _select(protocol, only)
  splits = {}
  for task in tasks:
    splits |= {split: split for split in task.splits}
  # One source for all tasks, so that they share features.
  data = Benchmark(name, data_dir, splits)
  evaluations = []
  for task in tasks:
    spec = TASKS[task.kind]
    evaluations.append(
      Evaluation(
        dataset=name,
        spec=spec,
        task=task,
        data=data,
        splits={split: split for split in task.splits},
        size=size or task.options().get(spec.size_constant, 0),
        pool=protocol.group,
        published={metric: protocol.published(task.name, metric) for metric in task.metrics},
        prefix=f'{name}/{task.name}',
      )
    )
  return evaluations


def of_store(
  path: str | os.PathLike,
  *,
  only: Iterable[str] = (),
  size: int = 0,
  texts: bool = True,
  name: str = '',
  check_shards: bool = True,
) -> list[Evaluation]:
  """Evaluations on a store or a TFDS folder: of the tasks `only`, or of all that it serves.

  size: pixels of the short side. texts: whether tasks that need them are among all. check_shards:
  as in store.open_store.
  """
  if in_place.lies(path):
    raise InputError(
      f'--store: got {os.fspath(path)!r}, tars or parquet as they lie; evaluations read a store; '
      f'expected one, which may be made of a part: python -m tips_jax.prepare --input={path} '
      f'--split=test --input_split=train --limit=2000 --output=STORE'
    )
  data = Store(store.open_store(path, check_shards=check_shards))
  splits = _roles(data.counts)
  evaluations = []
  for task in only or TASKS:
    spec = TASKS[task]
    roles = set(spec.roles)
    if task == 'instance_retrieval':
      roles.add('index')  # optional: without it the queries are searched among each other
    # A task that was asked for by name is refused later, with what it lacks (records.py).
    if only or serves(data, spec, texts):
      evaluations.append(
        Evaluation(
          dataset=name or pathlib.Path(path).name,
          spec=spec,
          task=Task(kind=task, splits=spec.roles, constants=dict(spec.constants)),
          data=data,
          splits={role: split for role, split in splits.items() if role in roles},
          size=size,
          prefix=task,
        )
      )
  if not evaluations:
    raise InputError(
      f'--store: got {str(path)!r}, whose records hold only {sorted(data.features)}; expected an '
      'annotation or captions that a task needs'
    )
  return evaluations


def of_scenes(
  folder: str | os.PathLike,
  *,
  only: Iterable[str] = (),
  size: int = 0,
  texts: bool = True,
  progress: Callable[[int, int], None] | None = None,
) -> list[Evaluation]:
  """All tasks on `scenes`, drawn below `folder` where they are not yet there. progress(done,
  total).
  """
  # The name holds the settings: a folder of other ones is not taken for these.
  name = 'scenes-{train}-{test}-{size}-{objects}-{typical}'.format(**_SCENES)
  path = scenes.build(pathlib.Path(folder) / name, **_SCENES, progress=progress)
  evaluations = []
  for evaluation in of_store(
    path, only=only, size=size or _SCENES['size'], texts=texts, name='scenes'
  ):
    evaluation = short(evaluation)
    if evaluation.task.kind in _OF_CAPTION_WORDS:
      evaluation = _with_constants(evaluation, _SCENES_TEMPLATES)
    evaluations.append(evaluation)
  return evaluations


def serves(data: Store, spec: TaskSpec, texts: bool) -> bool:
  """Whether the records hold what a task needs; never, of a task with texts, without `texts`."""
  if spec.needs_text and not texts:
    return False
  if spec.annotation == 'captions':
    return bool({'captions', 'alt_text'} & data.features)
  if not records.required(spec) <= data.features:
    return False
  # Zero-shot tasks need names of the classes, which a store may lack.
  if spec.needs_text and spec.annotation == 'mask':
    return bool(data.mask_classes)
  return spec.annotation != 'label' or not spec.needs_text or bool(data.label_names('test'))


def short(evaluation: Evaluation) -> Evaluation:
  """With a recipe that is done in minutes on two cores: not the protocol's, so published figures
  go.
  """
  constants = evaluation.spec.short_constants
  if not constants:
    return evaluation
  return dataclasses.replace(_with_constants(evaluation, constants), published={})


def _select(protocol, only):
  """The tasks of a protocol that are among `only`; all, where that is empty."""
  return [task for task in protocol.tasks if not only or task.kind in only]


def _roles(splits):
  """{'train', 'test', 'index': name of the split} of those that there are."""
  candidates = {'train': ('train',), 'test': _TEST, 'index': ('index',)}
  roles = {}
  for role, names in candidates.items():
    for name in names:
      if name in splits:
        roles.setdefault(role, name)
  return roles


def _with_constants(evaluation: Evaluation, constants: Mapping[str, Any]) -> Evaluation:
  changed = {name: Constant(value, '?') for name, value in constants.items()}
  task = dataclasses.replace(evaluation.task, constants=evaluation.task.constants | changed)
  return dataclasses.replace(evaluation, task=task)

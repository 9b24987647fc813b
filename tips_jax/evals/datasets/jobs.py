"""What the suite measures on: public benchmarks, a person's own store, and `scenes`, which is drawn
when it is missing.

All data sets look alike: source(split) has len and [i] -> record (as in a store), `counts` {split:
images}, `features`, `text_field`, `mask_classes`, label_names(split), instances(split) (the classes
of each record for retrieval; None: its label), fingerprint(split), which tells contents apart for
the cache, and identity(split), which does so anywhere.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.data import store
from tips_jax.data.benchmarks import table as benchmarks
from tips_jax.data.scenes import dataset as scenes
from tips_jax.evals.datasets import protocols
from tips_jax.evals.datasets.protocols import Constant, Task
from tips_jax.evals.features import reading
from tips_jax.evals.probes import masks
from tips_jax.evals.tasks.spec import Evaluation, TaskSpec
from tips_jax.evals.tasks.table import TASKS

QUICK = 'quick'
_SCENES = dict(train=1024, test=256, size=96, objects=1, typical=0.8)
_TEST = ('test', 'validation', 'val', 'dev')  # what the split to measure on may be called
_LOOKED_AT = 16  # records that may show captions, and files that make a fingerprint


class Store:
  """A store that `prepare` wrote, or a TFDS folder."""

  def __init__(self, opened):
    self._store = opened
    self.counts, self.features = dict(opened.splits), set(opened.features)
    self.mask_classes = masks.class_names(opened)
    self._sources = {}

  def source(self, split: str) -> Any:
    if split not in self._sources:
      self._sources[split] = self._store.source(split)
    return self._sources[split]

  def fingerprint(self, split: str) -> str:
    return self._store.fingerprint

  identity = fingerprint  # of the records

  def instances(self, split: str) -> list | None:
    return None

  def label_names(self, split: str) -> tuple[str, ...]:
    return self._store.label_names()

  def serves(self, about: TaskSpec, texts: bool) -> bool:
    """Whether the records hold what a TaskSpec needs."""
    if about.needs == 'captions':
      return texts and bool({'captions', 'alt_text'} & self.features)
    named = not about.text or (
      self.mask_classes if about.needs == 'mask' else self.label_names('test')
    )
    return about.needs in self.features and bool(named) and (texts or not about.text)

  @functools.cached_property
  def text_field(self) -> str:
    """'captions' where there are any, else the alt texts."""
    for split in self.counts if 'captions' in self.features else ():
      source = self.source(split)
      if any(
        reading.texts_of(source[i], 'captions')
        for i in reading.records(source, _LOOKED_AT).tolist()
      ):
        return 'captions'
    return 'alt_text' if 'alt_text' in self.features else 'captions'


class Benchmark:
  """Splits of a public benchmark in its official layout below a folder."""

  text_field = 'captions'

  def __init__(self, name, data_dir, splits):
    self._readers = {split: benchmarks.open(name, data_dir, split) for split in splits}
    self._fingerprints = {}
    self.counts = {split: len(reader) for split, reader in self._readers.items()}
    first = next(iter(self._readers.values()))
    self.mask_classes = tuple(first.mask_classes)
    self.features = {
      'image',
      *first.annotations,
      *(['captions'] if protocols.get(name).captions else []),
    }

  def source(self, split: str) -> Any:
    return _Records(self._readers[split])

  def label_names(self, split: str) -> tuple[str, ...]:
    return tuple(self._readers[split].label_names)

  def fingerprint(self, split: str) -> str:
    """Of the names of all files, and of size and time of some: a million would take too long."""
    if split not in self._fingerprints:
      about = lambda path, status: f'{path} {status.st_size} {status.st_mtime_ns}'
      self._fingerprints[split] = self._digest(split, str, about)
    return self._fingerprints[split]

  def identity(self, split: str) -> str:
    """Of the names of all samples, and of the sizes of some files: the same wherever the data set
    is.
    """
    about = lambda path, status: f'{os.path.basename(path)} {status.st_size}'
    return self._digest(split, self._readers[split].key_of, about)

  def _digest(self, split, name, about):
    """SHA-256 of name(item) of all items and about(path, status) of the files of some."""
    reader = self._readers[split]
    digest = hashlib.sha256(repr([reader.name, reader.official[split], len(reader)]).encode())
    for item in reader.items:
      digest.update(f'{name(item)}\n'.encode())
    for i in reading.records(reader, _LOOKED_AT).tolist():
      for path in filter(os.path.exists, reader.files_of(reader.items[i])):
        digest.update(f'{about(path, os.stat(path))}\n'.encode())
    return digest.hexdigest()

  def instances(self, split: str) -> list | None:
    reader = self._readers[split]
    return [reader.tags_of(item) for item in reader.items] if 'tags' in self.features else None


class _Records:
  """The samples of a reader as the records of a store."""

  def __init__(self, reader):
    self._reader = reader

  def __len__(self):
    return len(self._reader)

  def __getitem__(self, i):
    sample = self._reader[i]
    return {
      'image': sample.image,
      'captions': sample.captions,
      'problem': sample.problem,
      **sample.extra,
    }


# --- jobs ---------------------------------------------------------------------------------------

_SCENES_WORDS = dict(
  templates=('a {}.',)
)  # the captions of scenes know no other words around a class


def names(suite: str) -> tuple[str, ...]:
  """'quick' and data sets of a list of suites and data sets, each once; InputError with the nearest
  name.
  """
  found = []
  for part in [part.strip() for part in suite.split(',')]:
    if part not in (QUICK, *protocols.SUITES, *protocols.PROTOCOLS):
      raise unknown('--suite', part, [QUICK, *protocols.SUITES, *protocols.PROTOCOLS])
    found += [QUICK] if part == QUICK else protocols.names(part)
  return tuple(dict.fromkeys(found))


def kinds(text: str) -> tuple[str, ...]:
  """Tasks of a list 'NAME,NAME' each once; InputError with the nearest name."""
  found = [part.strip() for part in text.split(',') if part.strip()]
  for part in found:
    if part not in TASKS:
      raise unknown('--task', part, TASKS)
  return tuple(dict.fromkeys(found))


def public(names: Iterable[str], only: Iterable[str] = ()) -> dict[str, list[str]]:
  """Of names those of public benchmarks that have a task of the kinds `only` (all, where empty):
  name -> its tasks.
  """
  found = {
    name: [task.name for task in protocols.get(name).tasks if not only or task.kind in only]
    for name in names
    if name != QUICK
  }
  return {name: tasks for name, tasks in found.items() if tasks}


def benchmark(
  name: str, data_dir: str | os.PathLike, *, only: Iterable[str] = (), size: int = 0
) -> list[Evaluation]:
  """The jobs of one public benchmark. only: kinds; size: pixels instead of the protocol's."""
  protocol = protocols.get(name)
  tasks = [task for task in protocol.tasks if not only or task.kind in only]
  data = Benchmark(name, data_dir, dict.fromkeys(split for task in tasks for split in task.splits))
  return [
    Evaluation(
      dataset=name,
      spec=TASKS[task.kind],
      task=task,
      data=data,
      splits={split: split for split in task.splits},
      size=size or _size(task),
      pool=protocol.group,
      published={metric: protocol.published(task.name, metric) for metric in task.metrics},
      prefix=f'{name}/{task.name}',
    )
    for task in tasks
  ]


def own(
  path: str | os.PathLike,
  *,
  only: Iterable[str] = (),
  size: int = 0,
  texts: bool = True,
  name: str = '',
) -> list[Evaluation]:
  """Jobs on a store or a TFDS folder: those of `only`, or all that its annotations serve.

  size: pixels of the short side. texts: whether tasks that need them are among all.
  """
  data = Store(store.open_store(path))
  test = next((split for split in _TEST if split in data.counts), None)
  splits = {'train': 'train'} if 'train' in data.counts else {}
  splits |= ({'test': test} if test else {}) | (
    {'index': 'index'} if 'index' in data.counts else {}
  )
  found = []
  for kind in only or TASKS:
    about = TASKS[kind]
    wanted = {role: split for role, split in splits.items() if role in about.roles}
    if kind == 'instance_retrieval' and 'index' in splits:
      wanted['index'] = 'index'
    if only or data.serves(about, texts):
      task = Task(kind=kind, splits=about.roles, constants=dict(about.constants))
      found.append(
        Evaluation(
          dataset=name or pathlib.Path(path).name,
          spec=about,
          task=task,
          data=data,
          splits=wanted,
          size=size,
          prefix=kind,
        )
      )
  if not found:
    raise InputError(
      f'--store: got {str(path)!r}, whose records hold only {sorted(data.features)}; expected an '
      'annotation or captions that a task needs'
    )
  return found


def quick(
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
  name = 'scenes-{train}-{test}-{size}-{objects}-{typical}'.format(**_SCENES)
  path = scenes.build(pathlib.Path(folder) / name, **_SCENES, progress=progress)
  found = []
  for job in map(short, own(path, only=only, texts=texts, name='scenes')):
    if job.task.kind == 'zeroshot_segmentation':
      job = _changed(job, _SCENES_WORDS)
    found.append(dataclasses.replace(job, size=size or _SCENES['size']))
  return found


def short(job: Evaluation) -> Evaluation:
  """The job with a recipe that is done in minutes on two cores: not the protocol's, so published
  figures go.
  """
  changed = job.spec.short_constants
  return dataclasses.replace(_changed(job, changed), published={}) if changed else job


def _changed(job, constants):
  changed = {name: Constant(value, '?') for name, value in constants.items()}
  return dataclasses.replace(
    job, task=dataclasses.replace(job.task, constants=job.task.constants | changed)
  )


def _size(task):
  return task.options().get(TASKS[task.kind].size_constant, 0)

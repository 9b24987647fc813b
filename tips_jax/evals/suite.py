"""Several tasks on several data sets for one frozen encoder: features once, then every task from
them.

A `Evaluation` is one measurement; `run` checks all of them before any feature is computed, extracts
what the tasks of a data set share in one pass (evals/features/splits.py, evals/features/cache.py),
and gives an `Result` each. Hyper-parameters are chosen on a part of the training split; nothing is
ever chosen on the split that is measured.
"""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import numpy as np

from tips_jax.evals.datasets import protocols
from tips_jax.evals.datasets import records as suite_checks
from tips_jax.evals.features import disk_space as suite_space
from tips_jax.evals.features.splits import DatasetFeatures, TaskInputs
from tips_jax.evals.tasks import common as suite_global
from tips_jax.evals.tasks import dense as suite_dense


class TaskSpec(NamedTuple):
  """measure(TaskInputs) -> fields of an Result. name: where it is not the protocols'. roles: the
  splits it needs. outputs: of the encoder, beside the CLS tokens. needs: the annotation. text:
  needs a text tower. shape: of the images that the
  encoder sees: 'square', squeezed; 'cut', the central square; 'center', 7/8 of it; 'native', of the
  first image; 'own', each by its own; then cells(TaskInputs, (H, W)) -> patches that are kept of
  such an image."""

  measure: Any
  name: str = ''
  roles: tuple = ('train', 'test')
  outputs: tuple = ()
  needs: str = ''
  text: bool = False
  shape: str = 'square'
  cells: Any = None


KINDS = {  # by their names in protocols.py
  'segmentation': TaskSpec(
    suite_dense.segments,
    outputs=('patch',),
    needs='mask',
    shape='own',
    cells=suite_dense.window_cells,
  ),
  'depth': TaskSpec(suite_dense.linear_depth, outputs=('patch',), needs='depth', shape='native'),
  'dpt_depth': TaskSpec(
    suite_dense.decoder, outputs=('intermediate_layers',), needs='depth', shape='cut'
  ),
  'normals': TaskSpec(
    suite_dense.decoder,
    name='dpt_normals',
    outputs=('intermediate_layers',),
    needs='normals',
    shape='cut',
  ),
  'knn': TaskSpec(suite_global.neighbors, needs='label'),
  'linear': TaskSpec(suite_global.logistic, needs='label'),
  'instance_retrieval': TaskSpec(
    suite_global.instances, name='instance', roles=('test',), needs='label'
  ),
  'retrieval': TaskSpec(
    suite_global.texts_and_images, roles=('test',), needs='captions', text=True
  ),
  'zeroshot': TaskSpec(suite_global.named_classes, roles=('test',), needs='label', text=True),
  'zeroshot_segmentation': TaskSpec(
    suite_dense.named_segments,
    roles=('test',),
    outputs=('value_patch',),
    needs='mask',
    text=True,
    shape='own',
    cells=suite_dense.view_cells,
  ),
}
KIND_OF = {kind.name: name for name, kind in KINDS.items() if kind.name} | {
  name: name for name in KINDS
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """One task on one data set.

  data: has source(split) (len and [i] -> record), fingerprint(split), counts {split: images},
  features (what its records carry), text_field, mask_classes, label_names(split); see
  evals/datasets/jobs.py. splits: role ('train', 'test', 'index') -> split. size: pixels of the
  short side; 0: as the images are (depth), or what the encoder is best at.
  published: metric -> Figures. pool: jobs of one name may search the indexes of all of them
  (suite_global.Pool).
  """

  dataset: str
  task: protocols.Task
  data: Any
  splits: dict
  size: int = 0
  pool: str = ''
  published: dict = dataclasses.field(default_factory=dict)

  @property
  def about(self) -> TaskSpec:
    """Its TaskSpec; a protocol may say that images are seen 'square', 'cut' or by the 'center' of
    them.
    """
    kind, shape = KINDS[self.task.kind], self.options.get('mode', self.options.get('resize'))
    return kind._replace(shape=shape) if shape in ('square', 'cut', 'center') else kind

  @functools.cached_property
  def options(self) -> dict:
    return self.task.options()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """What a job found. Metrics: shares in [0, 1], meters, degrees; 'TOKEN/NAME' is NAME of another
  CLS token.

  naive: the metrics of an answer that knows no image. published: metric -> Figures, in the printed
  unit. examples: at most six of the measured split, evenly spaced; evals/report/figures.py says
  what they hold. seconds: 'encoder' and 'reading' (its share of what it has in common with other
  jobs), 'task'. confusion [K, K]: counts of (truth, prediction). options: the constants of the
  protocol and the size in pixels; data: role -> 'images', 'sha256' of the
  split: where both are equal two outcomes may be compared. chosen: what validation chose, and other
  finds.
  """

  dataset: str
  task: str
  kind: str
  metrics: dict
  naive: dict
  published: dict
  examples: list
  seconds: dict
  classes: tuple = ()
  confusion: np.ndarray | None = None
  options: dict = dataclasses.field(default_factory=dict)
  data: dict = dataclasses.field(default_factory=dict)
  chosen: dict = dataclasses.field(default_factory=dict)


def run(
  encoder, jobs, *, cache, output=None, batch_size=64, limit=0, progress=None, after=None, tell=None
) -> list[Result]:
  """The outcomes of all jobs; those of one data set stand together.

  encoder: `inspect`, `encode_text`, cls_names, patch, width, depth, name, sha256, has_text as of
  interop's Encoder.
  cache: a Cache. output: folder for the decoders that are trained, or None. limit: images of each
  split, evenly spaced;
  0: all. progress(label, total) -> something with update(done) and close(). after(outcome): called
  with each. tell(line): told how much room the features take. Raises InputError where a job cannot
  be measured or the disk has not that room, before any feature is computed.
  """
  suite_checks.check(encoder, jobs)
  groups, pools, works = {}, {}, []
  for job in jobs:
    groups.setdefault(id(job.data), []).append(job)
  for number, group in enumerate(groups.values(), start=1):
    parts = DatasetFeatures(
      encoder,
      group,
      cache=cache,
      batch_size=batch_size,
      limit=limit,
      progress=progress,
      label=f'({number}/{len(groups)})',
    )
    works += [
      TaskInputs(job=job, encoder=encoder, parts=parts, cache=cache, output=output) for job in group
    ]
  for work in works:
    if work.job.pool:
      work.pool = pools.setdefault((work.job.pool, work.job.task.name), suite_global.Pool())
      work.pool.works.append(work)
  suite_space.check(works, tell=tell)
  outcomes = []
  for work in works:
    outcomes.append(_outcome(work, {id(one.parts): one.parts for one in works}.values()))
    if after:
      after(outcomes[-1])
  return outcomes


def _outcome(work, every):
  """Measures one job; `every`: the DatasetFeatures of all, whose time in the encoder is not the
  task's.
  """
  job, total = work.job, lambda: sum(parts.total() for parts in every)
  start, before = time.monotonic(), total()
  found = job.about.measure(work)
  own = time.monotonic() - start - (total() - before)
  options = job.options | {'size': _size(work)} | found.pop('options', {})
  data = {
    role: {'images': len(work.parts.numbers(job, role)), 'sha256': job.data.identity(split)}
    for role, split in job.splits.items()
  }
  return Result(
    dataset=job.dataset,
    task=job.task.name,
    kind=job.about.name or job.task.kind,
    data=data,
    published=job.published,
    seconds={**work.parts.seconds(job), 'task': own},
    options=options,
    **found,
  )


def _size(work):
  """Pixels of the short side that were asked for; 0: of the images as they are."""
  job = work.job
  return job.size or (
    0 if job.about.shape in ('native', 'own') else getattr(work.encoder, 'size', 224)
  )

"""Several tasks on several data sets for one frozen encoder: features once, then every task from
them.

A `Evaluation` is one measurement; `run` checks all of them before any feature is computed, extracts
what the tasks of a data set share in one pass (evals/features/splits.py, evals/features/cache.py),
and gives an `Result` each. Hyper-parameters are chosen on a part of the training split; nothing is
ever chosen on the split that is measured.
"""

import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from tips_jax.evals.datasets import records
from tips_jax.evals.features import disk_space
from tips_jax.evals.features.cache import Cache
from tips_jax.evals.features.splits import DatasetFeatures, TaskInputs
from tips_jax.evals.tasks import instance_retrieval
from tips_jax.evals.tasks.spec import Evaluation, Result


def run(
  encoder: Any,
  jobs: Sequence[Evaluation],
  *,
  cache: Cache,
  output: pathlib.Path | None = None,
  batch_size: int = 64,
  limit: int = 0,
  progress: Callable[[str, int], Any] | None = None,
  after: Callable[[Result], None] | None = None,
  tell: Callable[[str], None] | None = None,
) -> list[Result]:
  """The outcomes of all jobs; those of one data set stand together.

  encoder: `inspect`, `encode_text`, cls_names, patch, width, depth, name, sha256, has_text as of
  interop's Encoder.
  cache: a Cache. output: folder for the decoders that are trained, or None. limit: images of each
  split, evenly spaced;
  0: all. progress(label, total) -> something with update(done) and close(). after(outcome): called
  with each. tell(line): called with how much room the features take. Raises InputError where a job
  cannot be measured or the disk has not that room, before any feature is computed.
  """
  records.check(encoder, jobs)
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
      TaskInputs(evaluation=job, encoder=encoder, parts=parts, cache=cache, output=output)
      for job in group
    ]
  for work in works:
    if work.evaluation.pool:
      work.pool = pools.setdefault(
        (work.evaluation.pool, work.evaluation.task.name), instance_retrieval.Pool()
      )
      work.pool.works.append(work)
  disk_space.check(works, tell=tell)
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
  job, total = work.evaluation, lambda: sum(parts.total() for parts in every)
  start, before = time.monotonic(), total()
  found = job.spec.measure(work)
  own = time.monotonic() - start - (total() - before)
  options = job.options | {'size': _size(work)} | found.pop('options', {})
  data = {
    role: {'images': len(work.parts.numbers(job, role)), 'sha256': job.data.identity(split)}
    for role, split in job.splits.items()
  }
  return Result(
    dataset=job.dataset,
    task=job.task.name,
    spec=job.spec,
    prefix=job.prefix,
    data=data,
    published=job.published,
    seconds={**work.parts.seconds(job), 'task': own},
    options=options,
    **found,
  )


def _size(work):
  """Pixels of the short side that were asked for; 0: of the images as they are."""
  job = work.evaluation
  return job.size or (
    0 if job.shape in ('native', 'aspect') else getattr(work.encoder, 'size', 224)
  )

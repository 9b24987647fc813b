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
  interop's Encoder. output: folder for the decoders that are trained, or None. limit: images of
  each split, evenly spaced; 0: all. progress(label, total) -> something with update(done) and
  close(). after(outcome): called with each. tell(line): called with how much space the features
  take. Raises InputError where a job cannot be measured or the disk has not that space, before any
  feature is computed.
  """
  records.check(encoder, jobs)
  groups = {}  # of jobs on one data set, which share features
  for job in jobs:
    groups.setdefault(id(job.data), []).append(job)
  works = []
  pools = {}
  every = []
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
    every.append(parts)
    for job in group:
      work = TaskInputs(evaluation=job, encoder=encoder, parts=parts, cache=cache, output=output)
      works.append(work)
      if job.pool:
        # All members before any is measured: each searches the indexes of all.
        key = (job.pool, job.task.name)
        work.pool = pools.setdefault(key, instance_retrieval.Pool())
        work.pool.members.append(work)
  # Hours later, a full disk would end the evaluation.
  disk_space.check(works, tell=tell)
  outcomes = []
  for work in works:
    outcomes.append(_outcome(work, every))
    if after:
      after(outcomes[-1])
  return outcomes


def _outcome(work, every):
  """Measures one job; `every`: the DatasetFeatures of all, whose time in the encoder is not the
  task's.
  """
  job = work.evaluation
  encoding = _encoding(every)
  start = time.monotonic()
  fields = job.spec.measure(work)
  # A task encodes what it needs while it is measured, also of the other members of its pool.
  task_seconds = time.monotonic() - start - (_encoding(every) - encoding)
  # What a task says of its options is more precise than the protocol.
  options = job.options | {'size': _size(work)} | fields.pop('options', {})
  data = {}
  for role, split in job.splits.items():
    images = len(work.parts.numbers(job, role))
    data[role] = {'images': images, 'sha256': job.data.identity(split)}
  return Result(
    dataset=job.dataset,
    task=job.task.name,
    spec=job.spec,
    prefix=job.prefix,
    data=data,
    published=job.published,
    seconds={**work.parts.seconds(job), 'task': task_seconds},
    options=options,
    **fields,
  )


def _encoding(every):
  """Seconds so far in the encoder and for reading its images."""
  return sum(parts.total() for parts in every)


def _size(work):
  """Pixels of the short side that were asked for; 0: of the images as they are."""
  job = work.evaluation
  if job.size or job.shape in ('native', 'aspect'):
    return job.size
  return getattr(work.encoder, 'size', 224)

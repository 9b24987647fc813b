"""Several tasks on several data sets for one frozen encoder: features once, then every task from them.

A `Job` is one measurement; `run` checks all of them before any feature is computed, extracts what the tasks of a data
set share in one pass (evals/suite_parts.py, evals/cache.py), and gives an `Outcome` each. Hyper-parameters are chosen
on a part of the training split; nothing is ever chosen on the split that is measured.
"""
import dataclasses
import functools
import time
from typing import Any, NamedTuple

import numpy as np

from tips_jax.evals import protocols, suite_checks, suite_dense, suite_global
from tips_jax.evals.suite_parts import Parts, Work


class Kind(NamedTuple):
  """measure(Work) -> fields of an Outcome. name: where it is not the protocols'. roles: the splits it needs. outputs:
  of the encoder, beside the CLS tokens. needs: the annotation. text: needs a text tower. shape: of the images that the
  encoder sees: 'square', squeezed; 'cut', the central square; 'native', of the first image; 'own', each by its own."""
  measure: Any
  name: str = ''
  roles: tuple = ('train', 'test')
  outputs: tuple = ()
  needs: str = ''
  text: bool = False
  shape: str = 'square'


KINDS = {    # by their names in protocols.py
    'segmentation': Kind(suite_dense.segments, outputs=('patch',), needs='mask'),
    'depth': Kind(suite_dense.linear_depth, outputs=('patch',), needs='depth', shape='native'),
    'dpt_depth': Kind(suite_dense.decoder, outputs=('taps',), needs='depth', shape='cut'),
    'normals': Kind(suite_dense.decoder, name='dpt_normals', outputs=('taps',), needs='normals', shape='cut'),
    'knn': Kind(suite_global.neighbours, needs='label'),
    'linear': Kind(suite_global.logistic, needs='label'),
    'instance_retrieval': Kind(suite_global.instances, name='instance', roles=('test',), needs='label'),
    'retrieval': Kind(suite_global.texts_and_images, roles=('test',), needs='captions', text=True),
    'zeroshot': Kind(suite_global.named_classes, roles=('test',), needs='label', text=True),
    'zeroshot_segmentation': Kind(suite_dense.named_segments, roles=('test',), needs='mask', text=True, shape='own'),
}
KIND_OF = {kind.name: name for name, kind in KINDS.items() if kind.name} | {name: name for name in KINDS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """One task on one data set.

  data: has source(split) (len and [i] -> record), fingerprint(split), counts {split: images}, features (what its
  records carry), text_field, mask_classes, label_names(split); see evals/suite_data.py. splits: role ('train', 'test',
  'index') -> split. size: pixels of the short side; 0: as the images are (depth), or what the encoder is best at.
  published: metric -> Figures.
  """
  dataset: str
  task: protocols.Task
  data: Any
  splits: dict
  size: int = 0
  published: dict = dataclasses.field(default_factory=dict)

  @property
  def about(self) -> Kind:
    return KINDS[self.task.kind]

  @functools.cached_property
  def options(self) -> dict:
    return self.task.options()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What a job found. Metrics: shares in [0, 1], metres, degrees; 'TOKEN/NAME' is NAME of another CLS token.

  naive: the metrics of an answer that knows no image. published: metric -> Figures, in the printed unit. examples: at
  most six of the measured split, evenly spaced; evals/sheet_pictures.py says what they hold. seconds: 'encoder' and
  'reading' (its share of what it has in common with other jobs), 'task'. confusion [K, K]: counts of (truth,
  prediction). options: the constants of the protocol, and what validation chose.
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


def run(encoder, jobs, *, cache, output=None, batch_size=64, limit=0, progress=None, after=None) -> list[Outcome]:
  """The outcomes of all jobs; those of one data set stand together.

  encoder: `inspect`, `encode_text`, cls_names, patch, depth, name, sha256, has_text as of interop.encoder.Encoder.
  cache: a Cache. output: folder for the decoders that are trained, or None. limit: images of each split, evenly spaced;
  0: all. progress(label, total) -> something with update(done) and close(). after(outcome): called with each. Raises
  InputError where a job cannot be measured, before any feature is computed.
  """
  suite_checks.check(encoder, jobs)
  outcomes, groups = [], {}
  for job in jobs:
    groups.setdefault(id(job.data), []).append(job)
  for number, group in enumerate(groups.values(), start=1):
    parts = Parts(encoder, group, cache=cache, batch_size=batch_size, limit=limit, progress=progress,
                  label=f'({number}/{len(groups)})')
    for job in group:
      start, before = time.monotonic(), parts.total()
      found = job.about.measure(Work(job=job, encoder=encoder, parts=parts, cache=cache, output=output))
      own = time.monotonic() - start - (parts.total() - before)
      options = job.options | {'size': job.size} | found.pop('options', {})
      outcomes.append(Outcome(dataset=job.dataset, task=job.task.name, kind=job.about.name or job.task.kind,
                              published=job.published, seconds={**parts.seconds(job), 'task': own}, options=options,
                              **found))
      if after:
        after(outcomes[-1])
  return outcomes

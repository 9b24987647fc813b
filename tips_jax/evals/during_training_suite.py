"""The suite inside a training run: its jobs on the run's store and on public benchmarks, and their
metrics.
"""

import dataclasses
import gc
import pathlib
import tempfile

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Evals
from tips_jax.evals import suite
from tips_jax.evals.datasets import jobs as suite_data
from tips_jax.evals.datasets import on_disk as checker
from tips_jax.evals.datasets import protocols
from tips_jax.evals.datasets import records as suite_checks
from tips_jax.evals.features import cache
from tips_jax.evals.tasks import table


def jobs(store, config: Evals, tasks, *, has_text: bool = True) -> dict:
  """{data set: its jobs}, of the store ('') and of `config.suite`; data sets that belong together
  are one.

  tasks: of the store. has_text: whether there is a text tower; without it the tasks of benchmarks
  that need one are left out. Raises InputError where data are missing or do not hold what a task
  needs.
  """
  groups = {'': _own(store, config, tasks)}
  for name in _names(config):
    groups.setdefault(protocols.get(name).group or name, []).extend(_public(name, config, has_text))
  groups = {name: group for name, group in groups.items() if group}
  for group in groups.values():
    suite_checks.check_data(group)
  return groups


def measure(encoder, groups, *, config: Evals) -> tuple[dict[str, float], dict[str, float]]:
  """(metrics, those of an answer that knows no image) of the jobs by name.

  Features stand in a temporary folder (TMPDIR says where), those of one data set at a time.
  """
  metrics, chance = {}, {}
  for group in groups.values():
    for outcome in _outcomes(encoder, group, config):
      for found, values in ((metrics, outcome.metrics), (chance, outcome.chance)):
        found |= {f'{outcome.prefix}/{metric}': float(value) for metric, value in values.items()}
  return metrics, chance


def _outcomes(encoder, group, config):
  try:
    with tempfile.TemporaryDirectory(prefix='tips_jax-evaluation-') as folder:
      return suite.run(
        encoder, group, cache=cache.Cache(folder), batch_size=config.batch_size, limit=config.limit
      )
  except cache.DiskFull as error:  # a run has no --cache: its features are temporary files
    raise InputError(
      f'evals: {error}; in training TMPDIR says where the cache is, and evals.limit how many images'
    ) from None
  except InputError as error:
    raise InputError(f'evals: {error}') from None
  finally:
    # parts of a split refer to themselves, and a file takes room as long as one has it open
    gc.collect()


def need_text(where, *, has_text, tokenizer):
  """InputError where texts cannot be encoded."""
  if not has_text:
    raise InputError(
      f'{where} needs a text tower; expected one that evals.text_tower names, or tasks of images alone'
    )
  if tokenizer is None:
    raise InputError(
      f'{where} needs a tokenizer; expected data.tokenizer, or a store prepared with --tokenizer'
    )


def _own(store, config, tasks):
  kinds = tuple(dict.fromkeys(tasks))
  found = suite_data.own(store.path, only=kinds, size=config.size) if kinds else []
  for job in found:
    job.data.counts[config.split] = len(
      job.data.source(config.split)
    )  # it may be a slice: 'train[90%:]'
  return [
    dataclasses.replace(suite_data.short(job), splits=job.splits | {'test': config.split})
    for job in found
  ]


def _names(config):
  try:
    names = protocols.names(config.suite) if config.suite else ()
  except InputError as error:
    raise InputError(f'evals.suite: {error}') from None
  if names and not (config.data and pathlib.Path(config.data).expanduser().is_dir()):
    got = f'got {config.data!r}, which is no folder' if config.data else 'missing'
    raise InputError(
      f'evals.data: {got}; expected the folder of {", ".join(names[:3])}{", ..." * (len(names) > 3)}; '
      'docs/datasets.md says how it must look'
    )
  return names


def _public(name, config, has_text):
  tasks = [
    task for task in protocols.get(name).tasks if has_text or not table.TASKS[task.kind].text
  ]
  if not tasks:
    need_text(f'evals.suite: {name!r}', has_text=False, tokenizer=None)
  checker.require([checker.check(name, config.data, tasks=[task.name for task in tasks])])
  return suite_data.benchmark(name, config.data, only={task.kind for task in tasks})

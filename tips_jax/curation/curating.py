"""From a store to the part of it that the steps leave, with a report of what went.

Records are measured, task by task; the steps choose, one after the other; what stays is copied,
task by task. Each of these is kept when it is done, and goes on where it was stopped.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import typing
from collections.abc import Mapping

import numpy as np

from tips_jax.core import files
from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.curation import choosing, judging, report, schema
from tips_jax.curation.copying import Copying, reopen_copying
from tips_jax.curation.funnel import Funnel
from tips_jax.curation.measuring import Measuring, Table, reopen_measuring
from tips_jax.data import store
from tips_jax.data.ingest import doing, tasks, tfds_folder

DROPPED_FILE = 'dropped.jsonl'


@dataclasses.dataclass(frozen=True)
class How:
  """Where the work is done; as for `convert.convert`."""

  workers: int = 1
  run: doing.Run | None = None
  part: tuple[int, int] | None = None
  merge_only: bool = False
  task_bytes: int = 0
  stream: typing.TextIO | None = None


def open_input(path: str, curation: schema.Curation) -> store.Store:
  """The store that is curated; InputError where it, or what a step needs, is not there."""
  opened = store.open_store(path)
  if 'image' not in opened.features:
    raise InputError(f'--store: got {path!r} without the field image; expected one with images')
  for split in curation.splits:
    if split not in opened.splits:
      raise unknown('config.splits', split, opened.splits)
  judging.check(curation, opened.features)
  choosing.check(curation)
  return opened


def curate(
  opened: store.Store, curation: schema.Curation, output: str | pathlib.Path, how: How
) -> dict[str, typing.Any] | None:
  """Writes the store `output`; returns its report, or None after a part of the work.

  The result depends on the store and the curation alone. Stopped or killed, the same call goes on.
  """
  with doing.disk_errors(output), doing.work_folder(output, alone=how.part is None) as folder:
    if not (folder / store.INFO_FILE).exists():  # of one that was killed a moment later
      measuring = Measuring(opened, curation, folder, how.task_bytes)
      measuring.begin()
      _do(measuring, functools.partial(reopen_measuring, opened.path, curation, folder), how)
      if how.part is not None:
        return None
      _finish(opened, measuring, how)
    content = report.read(folder)
    doing.publish(folder, output)
  return content


def _do(work, open_work, how, *, all_of_it=False):
  part = how.part
  merge_only = how.merge_only
  if all_of_it:
    part = None
    merge_only = False
  numbers = doing.chosen(work, part, merge_only)
  open_work = functools.partial(open_work, task_bytes=how.task_bytes)
  doing.do(work, numbers, open_work, workers=how.workers, run=how.run, stream=how.stream)


def _finish(opened, measuring, how):
  """All that comes after the records are measured."""
  folder = measuring.folder
  curation = measuring.curation
  table = Table(measuring, opened)
  funnel = Funnel(table, curation, folder, how.stream)
  counts = funnel.counts()
  for split in curation.splits:
    if not any(funnel.stays(split)):
      raise InputError(f'config.steps: no record of split {split!r} stays; dropped were {counts}')
  stay = _write_stay(funnel, measuring)
  copying = Copying(opened, stay, folder, how.task_bytes)
  copying.begin()
  _do(copying, functools.partial(reopen_copying, opened.path, stay, folder), how, all_of_it=True)
  _write_dropped(funnel, folder / DROPPED_FILE)
  content = report.write(folder, funnel, opened)
  for name in (store.TOKENIZER_FILE, store.ANNOTATIONS_FILE):
    path = pathlib.Path(opened.path, name)
    if path.exists():
      shutil.copyfile(path, folder / name)
  shards = copying.shards()
  features = tfds_folder.open_builder(opened.path).info.features
  store.complete(folder, features, {name: some for name, some in shards.items() if some})
  store.seal(folder, _provenance(opened, measuring, content))


def _provenance(opened, measuring, content) -> Mapping[str, object]:
  """What the info of the new store says of its making, curations of before included."""
  before = opened.info.get('curation', [])
  now = {
    **measuring.settings_of_input(),
    'records': content['records'],
    # Several steps may have one title.
    'dropped': [[step['title'], step['dropped']] for step in content['steps']],
  }
  return {**opened.info, 'made_by': 'curate', 'curation': [*before, now]}


def _write_stay(funnel, measuring):
  """Writes which records of each curated split stay; returns the paths."""
  stay = {}
  for split in measuring.curation.splits:
    path = measuring.folder / tasks.FOLDER / f'stay-{split}'
    files.write(path, functools.partial(np.save, arr=funnel.stays(split)))
    stay[split] = os.fspath(path)
  return stay


def _write_dropped(funnel, path):
  """Lists every record that went: split, id, step and reason; step by step, in their order."""
  table = funnel.table

  def write(file):
    for step, dropped in funnel.dropped():
      line = {
        'split': table.split(dropped.row),
        'id': table.id(dropped.row),
        'step': funnel.names[step],
        'why': dropped.reason,
      }
      if dropped.row_of is not None:
        line['like'] = table.id(dropped.row_of)
      file.write((json.dumps(line, ensure_ascii=False) + '\n').encode())

  files.write(path, write)

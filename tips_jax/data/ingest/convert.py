"""From readers to a store: tasks are done, in one process or in several, and put together.

Images that cannot be used are left out and listed; images with missing texts or copies of another
one are kept and listed. The report goes into the store as report.json.
"""

import functools
import json
import pathlib
import shutil
import typing
from collections.abc import Callable, Mapping

from tips_jax.core.errors import InputError
from tips_jax.data import store, tokenizer
from tips_jax.data.ingest import copies, doing
from tips_jax.data.ingest.reader import Reader
from tips_jax.data.ingest.report import REFUSED, REPORT_FILE, Report
from tips_jax.data.ingest.work import Settings, Work

TRAIN_TOKENIZER = 'train'

Readers = Mapping[str, Reader]


def convert(
  readers: Readers,
  output: str | pathlib.Path,
  *,
  tokenizer_from: str = '',
  vocab_size: int = 32_000,
  min_side: int = 16,
  max_pixels: int = 50_000_000,
  limit: int = 0,
  test_fraction: float = 0.0,
  task_bytes: int = 0,
  workers: int = 1,
  reopen: Callable[[], Readers] | None = None,
  run: doing.Run | None = None,
  part: tuple[int, int] | None = None,
  merge_only: bool = False,
  about: Mapping[str, typing.Any] | None = None,
  stream: typing.TextIO | None = None,
) -> dict[str, typing.Any] | None:
  """Writes the store `output` from `readers` (by split); returns the report, a JSON-able dict.

  `tokenizer_from`: '' (none), 'train' (on the texts of the first split), or a SentencePiece model
  to copy. `limit`: samples read from each input, 0 for all. `test_fraction` of the first split goes
  to 'test', chosen by the hash of the image, so that copies end up on one side. `task_bytes` of the
  input are a task, 0: by its size.

  `workers`: processes; for several, `reopen` gives each the readers once more. `run` does the tasks
  elsewhere; it is given what opens the Work there, and their numbers. `part`, as (17, 1000), does
  the tasks of that part alone, and returns None; `merge_only` does none, and raises InputError
  where one is missing. `about` goes into the info of the store.

  Where tasks are done when it is stopped or killed, or raises InputError, the same call goes on;
  else no file remains.
  """
  # Opened before the work, so that a wrong path is an error at once.
  copied = None
  if tokenizer_from not in ('', TRAIN_TOKENIZER):
    copied = tokenizer.Tokenizer(tokenizer_from)
  settings = Settings(
    min_side=min_side,
    max_pixels=max_pixels,
    limit=limit,
    test_fraction=test_fraction,
    learn=tokenizer_from == TRAIN_TOKENIZER,
    task_bytes=task_bytes,
  )
  with doing.disk_errors(output), doing.work_folder(output, alone=part is None) as folder:
    sealed = (folder / store.INFO_FILE).exists()  # by one that was killed a moment later
    work = Work(readers, folder, settings)
    work.begin()
    if not sealed:
      numbers = doing.chosen(work, part, merge_only)
      _say_what_is_read(work)
      open_work = functools.partial(_open_work, reopen, folder, settings)
      workers = workers if reopen else 1
      doing.do(work, numbers, open_work, workers=workers, run=run, stream=stream)
    if part is not None:
      return None
    if not sealed:
      merge(work, copied, vocab_size if tokenizer_from else 0, about or {'made_by': 'prepare'})
    report = json.loads((folder / REPORT_FILE).read_text())
    doing.publish(folder, output)
  return report


def _open_work(reopen, folder, settings):
  work = Work(reopen(), folder, settings)
  work.begin()
  return work


def _say_what_is_read(work):
  for split, reader in work.readers.items():
    before = len(reader.notes)
    sample = next(iter(reader), None)
    del reader.notes[before:]  # it is read again
    if sample is not None:
      print(f'{split}: {reader.understood(sample)}')


# --- putting together ---------------------------------------------------------------------------


def merge(
  work: Work,
  copied: tokenizer.Tokenizer | None,
  vocab_size: int,
  about: Mapping[str, typing.Any],
) -> None:
  """Makes the folder of the work a complete store. vocab_size: of a new tokenizer; 0: none."""
  report = Report()
  splits = {}
  for split, reader in work.readers.items():
    for note in reader.notes:
      report.note(note.kind, split, note.id, note.detail, note.count)
  for number in range(len(work.tasks)):
    result = work.result(number)
    if report.add(result.splits):
      for kind, rows in work.rows(number).items():
        report.list(kind, rows)
    for split, shards in result.shards.items():
      splits.setdefault(split, []).extend(shards)
  for split in work.readers:
    counts = report.splits[split]
    if not counts['written']:
      shutil.rmtree(work.folder)
      refused = {k: n for k, n in counts.items() if k in REFUSED}
      raise InputError(
        f'--input: no image of split {split!r} can be used; of {counts["read"]} read, refused were '
        f'{refused}'
      )
  _note_copies(work, report)
  content = report.content()
  content['splits'] = {s: content['splits'][s] for s in work.splits if s in content['splits']}
  content['tokenizer'] = _put_tokenizer(work, copied, vocab_size)
  for reader in work.readers.values():
    if 'mask' in work.labels.annotations and reader.annotations_json:
      (work.folder / store.ANNOTATIONS_FILE).write_bytes(reader.annotations_json)
  (work.folder / REPORT_FILE).write_text(json.dumps(content, indent=1))
  store.complete(work.folder, work.labels.features(), splits)
  inputs = {split: reader.kind for split, reader in work.readers.items()}
  store.seal(work.folder, {**about, 'inputs': inputs})


def _note_copies(work, report):
  tasks = [work.hashes(number) for number in range(len(work.tasks))]
  found = copies.find(tasks, len(work.splits))
  for split, count in zip(work.splits, found.counts.tolist()):
    if count:
      report.count('duplicate', split, count)
  ids = functools.lru_cache(maxsize=4)(work.ids)
  rows = []
  for copy in found.first:
    split = work.splits[copy['split']]
    of_split = work.splits[copy['of']['split']]
    original = ids(int(copy['of']['task']), of_split)[copy['of']['index']]
    rows.append(
      {
        'split': split,
        'id': ids(int(copy['task']), split)[copy['index']],
        'detail': f'same bytes as {of_split}: {original}',
      }
    )
  report.list('duplicate', rows)


def _put_tokenizer(work, copied, vocab_size):
  """Puts the tokenizer into the folder of a store; returns its part of the report."""
  path = work.folder / store.TOKENIZER_FILE
  if copied is not None:
    shutil.copyfile(copied.path, path)
  elif vocab_size:
    tokenizer.train(work.texts(), path, vocab_size=vocab_size)
  else:
    return None
  made = tokenizer.Tokenizer(path)
  return {
    'vocab_size': made.vocab_size,
    'wanted': None if copied else vocab_size,
    'sha256': made.sha256,
  }

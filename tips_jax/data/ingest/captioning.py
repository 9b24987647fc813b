"""The samples of a store with new captions. An answer is written into a journal as soon as it is
there, so that no image is asked about twice.
"""

import functools
import itertools
import json
import pathlib
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tips_jax.core.errors import InputError
from tips_jax.data import store
from tips_jax.data.ingest import tasks
from tips_jax.data.ingest.captioners import Answer, Ask, Caption, Captioner, Server, Table
from tips_jax.data.ingest.cells import one_line
from tips_jax.data.ingest.reader import Note, Options, Piece, Reader, Sample
from tips_jax.data.ingest.samples import in_threads
from tips_jax.data.ingest.tfds_reader import TfdsReader

KINDS = ('hf:NAME_OR_FOLDER', 'openai:URL#MODEL', 'table:FILE')
_CIRCLES = 4  # times that the same words follow each other in a caption that turns in circles
_MAX_WORDS = 500  # of a caption, to look for circles in


def open_captioner(
  ask: Ask, *, batch: int, threads: int, tries: int, timeout_s: float
) -> Captioner:
  """The captioner that `ask.captioner` names; InputError where it is none."""
  kind, _, name = ask.captioner.partition(':')
  if kind == 'hf' and name:
    from tips_jax.data.ingest.captioner_hf import Model  # it loads torch

    return Model(name, ask, batch=batch)
  if kind == 'openai' and '#' in name:
    url, _, model = name.rpartition('#')
    return Server(url, model, ask, threads=threads, tries=tries, timeout_s=timeout_s)
  if kind == 'table' and name:
    return Table(name)
  raise InputError(f'--captioner: got {ask.captioner!r}; expected one of {", ".join(KINDS)}')


class StoreReader(TfdsReader):
  """A split of a store, as it is."""

  kind = 'store'

  def _texts(self, rows, columns):
    [row] = rows
    alt_text = row['alt_text'].decode('utf-8', 'replace')
    return alt_text, [text.decode('utf-8', 'replace') for text in row['captions']]


class CaptioningReader(StoreReader):
  """A split of a store whose images get captions. Iterated as a whole, it asks for none."""

  kind = 'captioned store'

  def __init__(
    self,
    path: str,
    split: str,
    ask: Ask,
    open_captioner: Callable[[], Captioner],
    folder: pathlib.Path,
    *,
    replace: bool,
    limit: int,
  ):
    """folder: of the new store, while it is made. replace: the captions that there are. limit:
    images that are asked about; 0: all.
    """
    super().__init__(path, Options(split=split))
    self._open_captioner = open_captioner
    self._folder = folder / tasks.FOLDER
    self._replace = replace
    self._limit = limit
    of = store.open_store(path, check_shards=False).fingerprint
    self.settings = {'ask': vars(ask), 'replace': replace, 'of': of}

  @functools.cached_property
  def _captioner(self):
    return self._open_captioner()

  def __iter__(self) -> Iterator[Sample]:
    for piece in self.pieces(sys.maxsize):
      yield from super().read(piece)

  def read(self, piece: Piece) -> Iterator[Sample]:
    captioner = self._captioner
    captioner.begin()
    samples = itertools.islice(super().read(piece), self._limit or None)
    numbered = enumerate(samples, piece.first)
    batches = iter(lambda: list(itertools.islice(numbered, captioner.batch)), [])
    with Journal(self._folder, f'{self.options.split}-{piece.first}-{piece.stop}') as journal:
      answer = functools.partial(_answers, captioner, journal)
      if captioner.threads > 1:
        answered = in_threads(answer, batches, captioner.threads, captioner.stop)
      else:
        answered = ((batch, answer(batch)) for batch in batches)
      for batch, answers in answered:
        for (_, sample), found in zip(batch, answers):
          yield self._captioned(sample, found)

  def _captioned(self, sample, answer):
    if sample.image is None:
      return sample
    before = [] if self._replace else list(sample.captions)
    captions, notes = usable(answer, [sample.alt_text, *before])
    return sample._replace(captions=before + captions, notes=(*sample.notes, *notes))


def _answers(captioner, journal, batch) -> list[Answer]:
  """Of the samples of a batch, each with its number; it is asked about those that are not known."""
  unknown = {}
  for number, sample in batch:
    if number not in journal and sample.image is not None:
      unknown[number] = sample
  found = {}
  if unknown:
    found = dict(zip(unknown, captioner.answers(list(unknown.values()))))
  for number, answer in found.items():
    # What failed may be mended until the next time.
    if not answer.problem:
      journal.add(number, answer)
  none = Answer([], 'no image')
  return [found.get(number) or journal.get(number, none) for number, _ in batch]


def usable(answer: Answer, others: Sequence[str]) -> tuple[list[str], list[Note]]:
  """(captions, notes of those that are dropped); others: texts that the image has."""
  if answer.problem:
    return [], [Note('caption_failed', '', answer.problem)]
  captions = []
  notes = []
  for text, complete in answer.captions:
    text = one_line(text)
    kind = ''
    if not text:
      kind = 'caption_empty'
    elif not complete or _turns_in_circles(text):
      kind = 'caption_runaway'
    elif text in others or text in captions:
      kind = 'caption_repeated'
    if kind:
      notes.append(Note(kind, '', text[:200]))
    else:
      captions.append(text)
  return captions, notes


def _turns_in_circles(text):
  words = text.lower().split()[:_MAX_WORDS]
  for period in range(1, len(words) // _CIRCLES + 1):
    same = 0  # words in a row that are those of a period before
    for word, before in zip(words[period:], words):
      same = same + 1 if word == before else 0
      if same == (_CIRCLES - 1) * period:
        return True
  return False


class Journal:
  """The answers for the images of a piece, by number; a context manager. Threads may share it.

  Each process writes a file of its own and reads all of the piece. The last line of one that was
  killed may be cut.
  """

  def __init__(self, folder: pathlib.Path, name: str):
    self._answers = {}
    for path in sorted(folder.glob(f'{name}-*.journal')):
      for line in path.read_text(encoding='utf-8').splitlines(keepends=True):
        if line.endswith('\n'):
          number, captions = json.loads(line)
          self._answers[number] = Answer([Caption(*caption) for caption in captions])
    self._path = folder / f'{name}-{uuid.uuid4().hex[:12]}.journal'
    self._lock = threading.Lock()

  def __enter__(self) -> 'Journal':
    self._file = open(self._path, 'w', encoding='utf-8')
    return self

  def __exit__(self, *error: object) -> None:
    self._file.close()

  def __contains__(self, number: int) -> bool:
    return number in self._answers

  def get(self, number: int, default: Answer) -> Answer:
    return self._answers.get(number, default)

  def add(self, number: int, answer: Answer) -> None:
    """Writes an answer down."""
    line = json.dumps([number, answer.captions], ensure_ascii=False) + '\n'
    with self._lock:
      self._file.write(line)
      self._file.flush()  # it outlives this process
      self._answers[number] = answer


def open_readers(
  path: str,
  splits: Sequence[str],
  ask: Ask,
  open_captioner: Callable[[], Captioner],
  folder: pathlib.Path,
  **more: Any,
) -> dict[str, Reader]:
  """CaptioningReaders of the splits of a store, which share a captioner; `more` is theirs."""
  shared = functools.cache(open_captioner)
  readers = {}
  for split in splits:
    readers[split] = CaptioningReader(path, split, ask, shared, folder, **more)
  return readers


def provenance(opened: store.Store, ask: Ask, date: str) -> Mapping[str, object]:
  """What the info of the new store says of its captions, those of before included."""
  before = opened.info.get('captions', [])
  now = {**vars(ask), 'prompts': list(ask.prompts), 'date': date, 'of': opened.fingerprint}
  return {'made_by': 'caption', 'captions': [*before, now]}

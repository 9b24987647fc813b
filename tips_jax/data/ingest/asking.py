"""The samples of a store with what a slow model says of them: a captioner, or annotators.

Each answer is written into a journal as soon as it is there, so that no image is asked about twice.
"""

import functools
import itertools
import json
import pathlib
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.data import store
from tips_jax.data.ingest import tasks
from tips_jax.data.ingest.reader import Options, Piece, Reader, Sample
from tips_jax.data.ingest.samples import in_threads
from tips_jax.data.ingest.tfds_reader import TfdsReader

HISTORY = ('captions', 'annotations', 'curation')  # in the info of a store: lists, the oldest first


class Answer(Protocol):
  """A NamedTuple that JSON can hold."""

  problem: str  # why there is none, or ''; it is asked for again the next time


class Asked(Protocol):
  """What is asked about images; opened in every process."""

  batch: int  # images that are asked about together
  threads: int  # that ask at the same time

  def begin(self) -> None:
    """Called before the first samples, and after `stop`."""

  def stop(self) -> None:
    """Makes what waits in other threads end soon."""

  def answers(self, samples: Sequence[Sample]) -> Sequence[Answer]:
    """One for each sample, whose image is there."""


class StoreReader(TfdsReader):
  """A split of a store, as it is."""

  kind = 'store'

  def _texts(self, rows, columns):
    [row] = rows
    alt_text = row['alt_text'].decode('utf-8', 'replace')
    return alt_text, [text.decode('utf-8', 'replace') for text in row['captions']]


class AskingReader(StoreReader):
  """A split of a store about whose images something is asked. Iterated as a whole, it asks nothing.

  Subclasses say what an answer is (`_answer`), and what it makes of a sample (`_answered`).
  """

  def __init__(
    self,
    path: str,
    split: str,
    open_asked: Callable[[], Asked],
    folder: pathlib.Path,
    settings: Mapping[str, Any],
    *,
    limit: int,
  ):
    """folder: of the new store, while it is made. settings: on which the answers depend. limit:
    images that are asked about; 0: all.
    """
    super().__init__(path, Options(split=split))
    self._open_asked = open_asked
    self._folder = folder / tasks.FOLDER
    self._limit = limit
    of = store.open_store(path, check_shards=False).fingerprint
    self.settings = {**settings, 'of': of}

  @functools.cached_property
  def _asked(self):
    return self._open_asked()

  def __iter__(self) -> Iterator[Sample]:
    for piece in self.pieces(sys.maxsize):
      yield from super().read(piece)

  def read(self, piece: Piece) -> Iterator[Sample]:
    asked = self._asked
    asked.begin()
    samples = itertools.islice(super().read(piece), self._limit or None)
    numbered = enumerate(samples, piece.first)
    batches = iter(lambda: list(itertools.islice(numbered, asked.batch)), [])
    with Journal(self._folder, f'{self.options.split}-{piece.first}-{piece.stop}') as journal:
      answer = functools.partial(self._answers, journal)
      if asked.threads > 1:
        answered = in_threads(answer, batches, asked.threads, asked.stop)
      else:
        answered = ((batch, answer(batch)) for batch in batches)
      for batch, answers in answered:
        for number, sample in batch:
          if number in answers:
            sample = self._answered(sample, answers[number])
          yield sample

  def _answers(self, journal, batch) -> dict[int, Any]:
    """{number: answer} of the samples with an image; it is asked about those that are not known."""
    unknown = {}
    answers = {}
    for number, sample in batch:
      if number in journal:
        answers[number] = self._answer(journal.get(number))
      elif sample.image is not None:
        unknown[number] = sample
    if unknown:
      found = self._asked.answers(list(unknown.values()))
      for number, answer in zip(unknown, found, strict=True):
        answers[number] = answer
        # What failed may be mended until the next time.
        if not answer.problem:
          journal.add(number, answer)
    return answers

  def _answer(self, content) -> Answer:
    """The answer from what JSON makes of it."""
    raise NotImplementedError

  def _answered(self, sample: Sample, answer: Any) -> Sample:
    raise NotImplementedError


class Journal:
  """JSON-able answers for the images of a piece, by number; a context manager. Threads may share
  it.

  Each process writes a file of its own and reads all of the piece. The last line of one that was
  killed may be cut.
  """

  def __init__(self, folder: pathlib.Path, name: str):
    self._answers = {}
    for path in sorted(folder.glob(f'{name}-*.journal')):
      for line in path.read_text(encoding='ascii').split('\n')[:-1]:
        number, answer = json.loads(line)
        self._answers[number] = answer
    self._path = folder / f'{name}-{uuid.uuid4().hex[:12]}.journal'
    self._lock = threading.Lock()

  def __enter__(self) -> 'Journal':
    self._file = open(self._path, 'w', encoding='ascii')
    return self

  def __exit__(self, *error: object) -> None:
    self._file.close()

  def __contains__(self, number: int) -> bool:
    return number in self._answers

  def get(self, number: int) -> Any:
    """What `add` was given, as JSON gives it back: lists for tuples."""
    return self._answers[number]

  def add(self, number: int, answer: Any) -> None:
    """Writes an answer down."""
    # In ASCII nothing but its end looks like the end of a line.
    line = json.dumps([number, answer]) + '\n'
    with self._lock:
      self._file.write(line)
      self._file.flush()  # it outlives this process
      self._answers[number] = json.loads(line)[1]


def open_store(path: str, splits: Sequence[str]) -> store.Store:
  """The store of --store, with what is needed to write it anew; InputError where it is another."""
  opened = store.open_store(path)
  lacking = sorted({'image', 'alt_text', 'captions'} - set(opened.features))
  if lacking:
    raise InputError(
      f'--store: got {path!r} without {lacking}; expected a store of tips_jax.prepare'
    )
  for split in splits:
    if split not in opened.splits:
      raise unknown('--splits', split, opened.splits)
  return opened


def open_readers(
  kind: type[AskingReader],
  path: str,
  splits: Sequence[str],
  open_asked: Callable[[], Asked],
  **more: Any,
) -> dict[str, Reader]:
  """Readers of a kind for the splits of a store, which share what they ask; `more` is theirs."""
  shared = functools.cache(open_asked)
  return {split: kind(path, split, shared, **more) for split in splits}


def provenance(
  opened: store.Store, made_by: str, kind: str, now: Mapping[str, object]
) -> Mapping[str, object]:
  """What the info of a new store says of its making: what that of the one before says, and `now`
  as the last of its kind.
  """
  before = {name: opened.info[name] for name in HISTORY if name in opened.info}
  now = {**now, 'of': opened.fingerprint}
  return {**before, 'made_by': made_by, kind: [*before.get(kind, []), now]}

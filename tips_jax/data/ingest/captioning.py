"""The samples of a store with new captions, and which of them are usable."""

import pathlib
from collections.abc import Callable, Sequence

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.asking import AskingReader
from tips_jax.data.ingest.captioners import Answer, Ask, Caption, Captioner, Server, Table
from tips_jax.data.ingest.cells import one_line
from tips_jax.data.ingest.reader import Note

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


class CaptioningReader(AskingReader):
  """A split of a store whose images get captions."""

  kind = 'captioned store'

  def __init__(
    self,
    path: str,
    split: str,
    open_captioner: Callable[[], Captioner],
    folder: pathlib.Path,
    ask: Ask,
    *,
    replace: bool,
    limit: int,
  ):
    """replace: the captions that there are."""
    settings = {'ask': vars(ask), 'replace': replace}
    super().__init__(path, split, open_captioner, folder, settings, limit=limit)
    self._replace = replace

  def _answer(self, content):
    captions, problem = content
    return Answer([Caption(*caption) for caption in captions], problem)

  def _answered(self, sample, answer):
    before = [] if self._replace else list(sample.captions)
    captions, notes = usable(answer, [sample.alt_text, *before])
    return sample._replace(captions=before + captions, notes=(*sample.notes, *notes))


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

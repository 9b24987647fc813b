"""The samples of a store with new boxes, texts of regions and tags."""

import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.data import store
from tips_jax.data.ingest import captioning, regions
from tips_jax.data.ingest.annotators import Annotation, Annotators, Ask
from tips_jax.data.ingest.asking import AskingReader
from tips_jax.data.ingest.captioners import Answer, Caption
from tips_jax.data.ingest.captioners import Ask as AskCaptions
from tips_jax.data.ingest.reader import Note

_TEXTS = ('region_captions', 'region_tags')


def open_annotators(
  ask: Ask,
  captions: AskCaptions | None,
  *,
  batch: int,
  threads: int,
  tries: int,
  timeout_s: float,
) -> Annotators:
  """The annotators that are asked for; InputError where one cannot be opened.

  captions: what is asked about regions. threads, tries and timeout_s are those of a server.
  """
  captioner = None
  if captions:
    captioner = captioning.open_captioner(
      captions, batch=batch, threads=threads, tries=tries, timeout_s=timeout_s
    )
  return Annotators(ask, captioner, batch=batch)


def annotations_of(
  opened: store.Store, ask: Ask, captions: AskCaptions | None, *, replace: bool
) -> tuple[str, ...]:
  """What the new store has of store.ANNOTATIONS; InputError where what is asked does not fit to
  what the store has.
  """
  if ask.detectors and 'boxes' in opened.features and not replace:
    raise InputError(
      f'--detector: got it for {opened.path!r}, which has boxes; expected --replace, which leaves '
      f'them and their texts out, or no detector'
    )
  if not ask.detectors and 'boxes' not in opened.features:
    for flag, given in (('captioner', captions), ('segmenter', ask.segmenter)):
      if given:
        raise InputError(
          f'--{flag}: got it for {opened.path!r}, which has no boxes; expected a store with boxes, '
          f'or --detector'
        )
  names = [name for name in store.ANNOTATIONS if name in opened.features]
  if ask.detectors:
    names = [name for name in names if name not in regions.ANNOTATIONS]
    names += ['boxes', 'region_tags', 'region_tags_boxes']
  # Of several texts of a box, and none of another, each has its number.
  names += [f'{name}_boxes' for name in _TEXTS if name in names]
  if captions:
    names += ['region_captions', 'region_captions_boxes']
  if ask.tagger:
    names.append('tags')
  return tuple(name for name in store.ANNOTATIONS if name in names)


class AnnotatingReader(AskingReader):
  """A split of a store whose images get annotations."""

  kind = 'annotated store'

  def __init__(
    self,
    path: str,
    split: str,
    open_asked: Callable[[], Annotators],
    folder: pathlib.Path,
    ask: Ask,
    captions: AskCaptions | None,
    *,
    annotations: Sequence[str],
    replace: bool,
    limit: int,
  ):
    """annotations: of the new store. replace: what the store has of what is made anew."""
    settings = {
      'ask': vars(ask),
      'captions': captions and vars(captions),
      'replace': replace,
    }
    super().__init__(path, split, open_asked, folder, settings, limit=limit)
    self.annotations = tuple(annotations)
    self._ask = ask
    self._replace = replace

  def _sample(self, number, record):
    sample = super()._sample(number, record)
    if self._ask.detectors:
      sample.extra.pop('boxes', None)  # new ones take their place
    return sample

  def _answer(self, content):
    annotation = Annotation(*content)
    captions = []
    for of_box, problem in annotation.captions:
      captions.append(Answer([Caption(*caption) for caption in of_box], problem))
    return annotation._replace(captions=captions)

  def _answered(self, sample, answer):
    extra = dict(sample.extra)
    notes = [Note(kind, '', f'{count}', count) for kind, count in answer.dropped.items()]
    if answer.problem:
      notes.append(Note('annotation_failed', '', answer.problem))
    if 'boxes' in self.annotations:
      placed = _placed(sample.key, extra)
      if not answer.problem:
        placed = self._regions(placed, answer, notes)
      extra.update(placed.stored(self.annotations))
    if 'tags' in self.annotations:
      before = [] if self._ask.tagger and self._replace else _strings(extra.get('tags', ()))
      extra['tags'] = list(dict.fromkeys([*before, *answer.tags]))
    return sample._replace(extra=extra, notes=(*sample.notes, *notes))

  def _regions(self, before, answer, notes):
    """The regions of an image: of those before the ones that stay, and the new ones."""
    boxes = [before.boxes[number] for number in answer.kept]
    texts = {name: [of[number] for number in answer.kept] for name, of in before.texts.items()}
    boxes += answer.boxes
    texts['region_tags'] += [[label] for label in answer.labels]
    texts['region_captions'] += [[] for _ in answer.labels]
    for number, of_box in enumerate(answer.captions):
      old = [] if self._replace else texts['region_captions'][number]
      captions, dropped = captioning.usable(of_box, old)
      texts['region_captions'][number] = [*old, *captions]
      notes += dropped
    return Regions(boxes, texts)


class Regions(typing.NamedTuple):
  """The boxes of an image, and by field the texts of each."""

  boxes: list[Sequence[float]]
  texts: dict[str, list[list[str]]]

  def stored(self, annotations: Sequence[str]) -> dict[str, typing.Any]:
    """As a store has them, each text with the number of its box."""
    values = {'boxes': np.array(self.boxes, np.float32).reshape(-1, 4)}
    for name, by_box in self.texts.items():
      values[name] = [text for texts in by_box for text in texts]
      owners = [number for number, texts in enumerate(by_box) for _ in texts]
      values[f'{name}_boxes'] = np.array(owners, np.int64)
    return {name: value for name, value in values.items() if name in annotations}


def _placed(key: str, extra: Mapping[str, typing.Any]) -> Regions:
  """The regions of the record `key`."""
  boxes = extra.get('boxes', np.zeros((0, 4), np.float32))
  texts = {}
  for name in _TEXTS:
    texts[name] = [[] for _ in boxes]
    if 'boxes' not in extra:
      continue
    of_record = _strings(extra.get(name, ()))
    owners = extra.get(f'{name}_boxes', range(len(of_record)))
    if len(owners) != len(of_record) or not set(owners) <= set(range(len(boxes))):
      raise InputError(
        f'record {key!r}: got {len(of_record)} {name} of the boxes {list(owners)[:9]}, and '
        f'{len(boxes)} boxes; expected the number of a box for each'
      )
    for owner, text in zip(owners, of_record):
      texts[name][owner].append(text)
  return Regions(list(boxes), texts)


def _strings(texts):
  return [text.decode('utf-8', 'replace') if isinstance(text, bytes) else text for text in texts]


def read_names(texts: Sequence[str], flag: str) -> tuple[str, ...]:
  """Names that a flag lists, or those in the lines of the one file that it names."""
  names = list(texts)
  path = pathlib.Path(texts[0]).expanduser() if len(texts) == 1 else None
  if path and path.is_file():
    try:
      names = path.read_text(encoding='utf-8').splitlines()
    except (OSError, ValueError) as error:
      raise InputError(f'--{flag}: cannot read {texts[0]!r} ({error}); expected UTF-8') from error
  elif path and (path.suffix or path.parent.name):
    raise InputError(f'--{flag}: got {texts[0]!r}, which is no file; expected names, or a file')
  return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))

"""What the readers of image-text data have in common: the sample they yield and their options."""

import dataclasses
import json
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tips_jax.core.errors import InputError
from tips_jax.data.ingest import regions
from tips_jax.data.ingest.cells import brief
from tips_jax.data.ingest.columns import NONE, Columns, texts_of

# Endings of image files that Pillow reads, without the dot, in order of preference.
IMAGES = tuple(
  """
  jpg jpeg jfif jpe png webp avif bmp gif tif tiff jp2 j2k jpx ppm
  """.split()
)


class Note(typing.NamedTuple):
  """Something that was left out or read otherwise than it is written, for the report."""

  kind: str  # one of report.REFUSED or report.NOTED
  id: str  # a sample, row or file
  detail: str = ''
  count: int = 1


class Sample(typing.NamedTuple):
  """One image with its texts and annotations, undecoded and unchecked."""

  key: str
  image: bytes | None  # the encoded file; None where it could not be read
  alt_text: str
  captions: list[str]
  extra: dict[str, typing.Any]  # annotations by their store name
  problem: str = ''  # why the image, or the metadata, could not be read
  notes: tuple[Note, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How to read an input."""

  columns: Columns = Columns()
  split: str = 'train'  # the one to read where the input has several
  images: str = ''  # folder or zip of the images that a table names
  first_caption_as_alt_text: bool = False
  # Of boxes (regions.py): which four numbers they are, and in which unit.
  box_format: str = 'xywh'
  box_unit: str = 'pixels'


class Piece(typing.NamedTuple):
  """A range of an input: of its samples, or of the bytes or groups of rows of one of its files."""

  file: str  # '' for a range of samples
  first: int
  stop: int
  size: int  # about how many bytes it has


class Reader:
  """An iterable of samples, as a whole or by piece; `open_input` and `benchmarks.open` return one.

  The pieces of an input follow from it and their size alone; together they are the whole.
  """

  kind = ''  # the format, for messages and the store's metadata
  total: int | None = None  # number of samples, where known
  size = 0  # bytes of the input, about
  annotations: tuple[str, ...] = ()  # those of store.ANNOTATIONS that the samples carry
  label_names: tuple[str, ...] = ()  # the classes of 'label'
  settings: Mapping[str, typing.Any] = {}  # on which the samples depend, beside the options
  annotations_json = b''  # content of the store's annotations.json (names of the mask classes)

  def __init__(self, options: Options):
    self.options = options
    self.notes: list[Note] = []  # of what became no sample; reading adds those of its piece
    self._columns: Columns | None = None  # those read, once they are known
    self._names: Sequence[str] = ()  # all columns

  def pieces(self, size: int) -> Sequence[Piece]:
    """The input in order, in pieces of about `size` bytes."""
    raise NotImplementedError

  def read(self, piece: Piece) -> Iterator[Sample]:
    """The samples of a piece."""
    raise NotImplementedError

  def count(self, piece: Piece) -> int:
    """The number of samples in a piece."""
    return piece.stop - piece.first

  def __iter__(self) -> Iterator[Sample]:
    for piece in self.pieces(sys.maxsize):
      yield from self.read(piece)

  @property
  def files(self) -> Sequence[str]:
    """The files that are read, in order."""
    return list(dict.fromkeys(piece.file for piece in self.pieces(sys.maxsize)))

  def settled(self) -> dict[str, typing.Any]:
    """Which columns are read, as JSON can hold it, for `settle_as`."""
    return {'columns': dataclasses.asdict(self._columns), 'names': list(self._names)}

  def settle_as(self, settled: Mapping[str, typing.Any]) -> None:
    """Reads the columns that `settled` returned, without a look at samples."""
    columns = dict(settled['columns'])
    columns['captions'] = tuple(columns['captions'])
    self._columns = Columns(**columns)
    self._names = list(settled['names'])

  def understood(self, sample: Sample) -> str:
    """Which columns are read, and a sample as it came out, for a person to check."""
    shown = {'alt_text': sample.alt_text, 'captions': sample.captions, **sample.extra}
    lines = [self.kind, f'  first sample: {brief(sample.key)}']
    for name, value in shown.items():
      lines.append(f'    {name}: {brief(value)}')
    if self._columns is not None:
      lines.insert(1, f'  columns: {self._roles()}')
    return '\n'.join(lines)

  def _roles(self):
    """Which column is what, and which are not read."""
    roles = []
    unused = dict.fromkeys(self._names)
    for role, names in vars(self._columns).items():
      if isinstance(names, str):
        names = (names,)
      taken = [name for name in names if name not in ('', NONE)]
      if taken:
        roles.append(f'{role} from {", ".join(map(repr, taken))}')
      for name in taken:
        unused.pop(name, None)
    text = '; '.join(roles)
    if unused:
      text += f'; not read: {brief(list(unused))}'
    return text

  def _texts(self, rows, columns):
    return texts_of(rows, columns, first_caption_as_alt_text=self.options.first_caption_as_alt_text)

  def _named_annotations(self):
    columns = self.options.columns
    named = [name for name in ('label', 'mask', 'tags') if getattr(columns, name) not in ('', NONE)]
    if columns.regions not in ('', NONE):
      named += regions.ANNOTATIONS
    return tuple(named)

  def _take_regions(self, rows, extra):
    """Puts the regions and the tags of an image into `extra`; returns notes of what is left out."""
    columns = self._columns
    problems = []
    if 'boxes' in self.annotations:
      extra['regions'], problems = regions.of_rows(rows, columns)
    if 'tags' in self.annotations:
      extra['tags'] = regions.tags_of(rows, columns.tags)
    return tuple(Note(kind, '', detail) for kind, detail in problems)


def ranges(count: int, size: int, total: int) -> list[Piece]:
  """The pieces, each of about `size` bytes, of `count` samples that have about `total` bytes."""
  each = max(total // max(count, 1), 1)
  step = max(size // each, 1)
  pieces = []
  for first in range(0, count, step):
    stop = min(first + step, count)
    pieces.append(Piece('', first, stop, (stop - first) * each))
  return pieces


def check_local(names: Iterable[str], column: str, path: str) -> None:
  """InputError if one of the image files that a column names is a web address."""
  for name in names:
    if name.startswith(('http://', 'https://')):
      raise InputError(
        f'--input: column {column!r} of {path!r} holds web addresses; expected image files; '
        f'download them first, for example with img2dataset'
      )


def parse_json(text: str | bytes, where: object) -> typing.Any:
  """The value of a JSON text; InputError names `where` it is from."""
  try:
    return json.loads(text)
  # Brackets in brackets, thousands deep, end the parser.
  except (ValueError, RecursionError) as error:
    raise InputError(f'{where} is not JSON ({error}); copy it again') from error

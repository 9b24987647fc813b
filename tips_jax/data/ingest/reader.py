"""What the readers of image-text data have in common: the sample they yield and their options."""

import dataclasses
import json
import typing
from collections.abc import Iterable, Iterator

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.columns import NONE, Columns, texts_of


class Sample(typing.NamedTuple):
  """One image with its texts and annotations, undecoded and unchecked."""

  key: str
  image: bytes | None  # the encoded file; None where it could not be read
  alt_text: str
  captions: list[str]
  extra: dict[str, typing.Any]  # annotations by their store name
  problem: str = ''  # why the image, or the metadata, could not be read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How to read an input."""

  columns: Columns = Columns()
  split: str = 'train'  # the one to read where the input has several
  images: str = ''  # folder or zip of the images that a table names
  first_caption_as_alt_text: bool = False


class Reader:
  """An iterable of samples; `open_input` and `benchmarks.open` return one."""

  kind = ''  # the format, for messages and the store's metadata
  total: int | None = None  # number of samples, where known; may be an estimate while reading
  annotations: tuple[str, ...] = ()  # those of store.ANNOTATIONS that the samples carry
  label_names: tuple[str, ...] = ()  # the classes of 'label'
  annotations_json = b''  # content of the store's annotations.json (names of the mask classes)

  def __init__(self, options: Options):
    self.options = options

  def __iter__(self) -> Iterator[Sample]:
    raise NotImplementedError

  def _texts(self, rows, columns):
    return texts_of(rows, columns, first_caption_as_alt_text=self.options.first_caption_as_alt_text)

  def _named_annotations(self):
    columns = self.options.columns
    return tuple(name for name in ('label', 'mask') if getattr(columns, name) not in ('', NONE))


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
  except ValueError as error:
    raise InputError(f'{where} is not JSON ({error}); copy it again') from error

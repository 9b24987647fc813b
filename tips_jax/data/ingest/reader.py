"""What every reader of image-text data has in common: the sample it yields, and the options it is
given.
"""

import dataclasses
import typing

from tips_jax.data.ingest.columns import NONE, Columns, texts_of


class Sample(typing.NamedTuple):
  """One image as it was found: `image` is the encoded file, None where it could not be read
  (`problem` says why).
  """

  key: str
  image: bytes | None
  alt_text: str
  captions: list[str]
  extra: dict  # annotations by their store name
  problem: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How to read an input. `split`: the one to take where the input has several; `images`: folder or
  zip of a table.
  """

  columns: Columns = Columns()
  split: str = 'train'
  images: str = ''
  first_caption_as_alt_text: bool = False


class Reader:
  """What `open_input` returns: iterate it for samples.

  `kind` says what the input is, `total` how many samples it has (None: unknown; may become better
  while reading), `annotations` which store annotations come along, `label_names` the classes of
  'label'.
  """

  kind = ''
  total = None
  annotations = ()
  label_names = ()
  annotations_file = ''  # an annotations.json that belongs to the data

  def __init__(self, options):
    self.options = options

  def _texts(self, rows, columns):
    return texts_of(rows, columns, first_caption_as_alt_text=self.options.first_caption_as_alt_text)

  def _named_annotations(self):
    return tuple(
      name for name in ('label', 'mask') if getattr(self.options.columns, name) not in ('', NONE)
    )

"""The schema of a curation: which steps there are, and their fields.

Fields with the name `encoder` take a checkpoint of ours (whatever tips_jax.load opens),
hf:NAME_OR_FOLDER (a dual encoder of transformers) or python:MODULE:FUNCTION; those with sets of
images take stores, STORE@SPLIT, or folders of image files.
"""

import re
from typing import Annotated, Any, Literal, get_args, get_type_hints

from tips_jax.core.errors import InputError
from tips_jax.core.ranges import Count, Pixels, Share, Whole, ascending, config
from tips_jax.core.strict import Range

Cosine = Annotated[float, Range(-1, 1)]
Field = Literal['alt_text', 'captions']  # of several captions one that stays is enough
Junk = Literal['file_name', 'url', 'email', 'code']


@config
class ImageSize:
  """By the sides of the upright image, in pixels, and by its aspect."""

  kind: Literal['image_size']
  least: Pixels = 1  # of the shorter side
  most: Count = 1_000_000_000  # of the longer side
  aspect: Annotated[float, Range(1, 1e6)] = 1e6  # longer side / shorter side, at most


@config
class TextLength:
  """By the length of the text; a text that is missing has none."""

  kind: Literal['text_length']
  field: Field = 'alt_text'
  words: tuple[Whole, Whole] = (1, 1_000_000_000)  # least and most
  letters: tuple[Whole, Whole] = (1, 1_000_000_000)

  def __post_init__(self):
    ascending('words', self.words)
    ascending('letters', self.letters)


@config
class JunkText:
  """Texts of which file names, web and mail addresses and codes leave less than `words` words."""

  kind: Literal['junk_text']
  field: Field = 'alt_text'
  kinds: tuple[Junk, ...] = get_args(Junk)
  patterns: tuple[str, ...] = ()  # of one's own, as regular expressions; taken out like the others
  words: Count = 1

  def __post_init__(self):
    for pattern in self.patterns:
      try:
        re.compile(pattern)
      except re.error as error:
        raise InputError(
          f'patterns: got {pattern!r}; expected a regular expression ({error})'
        ) from None


@config
class RepeatedText:
  """Boilerplate: texts that more than `most` records share. Case, digits and signs do not count."""

  kind: Literal['repeated_text']
  field: Literal['alt_text'] = 'alt_text'
  most: Count = 10
  keep: Whole = 1  # records of such a text that stay: the first


@config
class Language:
  """By the language of the text. One of few words is judged by its script alone."""

  kind: Literal['language']
  field: Field = 'alt_text'
  languages: tuple[str, ...] = ('en',)  # ISO 639
  scripts: tuple[str, ...] = ('LATIN',)  # first words of Unicode's names of their letters
  sure: Share = 0.5  # least probability of another language
  short: Whole = 3  # words


@config
class Similarity:
  """By the cosine of image and text. Records without text stay."""

  kind: Literal['similarity']
  encoder: str
  field: Field = 'alt_text'  # of several captions the best counts
  least: Cosine | None = None
  best: Share | None = None  # share of the records that stays

  def __post_init__(self):
    if (self.least is None) == (self.best is None):
      raise InputError(
        f'least: got {self.least} with best {self.best}; expected one of them, as least=0.2 or '
        f'best=0.5'
      )


@config
class ExactDuplicates:
  """All but the first of images that are equal byte for byte."""

  kind: Literal['exact_duplicates']


@config
class NearDuplicates:
  """All but one of images that look the same; the one of most pixels stays. Each that goes is like
  one that stays: by pixels, or by the features of an encoder, if one is given.
  """

  kind: Literal['near_duplicates']
  bits: Annotated[int, Range(0, 20)] = 8  # of 64 in which the perceptual hashes differ, at most
  alike: Cosine = 0.95  # least correlation of the pixels of images with like hashes
  color: Share = 0.05  # largest difference of the colors of a 64th of the images
  encoder: str = ''
  cosine: Cosine = 0.95  # least, of features


@config
class Decontaminate:
  """Images that are in evaluation sets, also resized, recompressed or cropped by up to 10 % of each
  side.
  """

  kind: Literal['decontaminate']
  evaluations: tuple[str, ...]  # sets of images
  bits: Annotated[int, Range(0, 20)] = 10
  alike: Cosine = 0.85
  color: Share = 0.12
  encoder: str = ''
  cosine: Cosine = 0.95


@config
class Retrieve:
  """Only images near curated ones stay, by the features of an encoder: those of at least a cosine,
  or the nearest of each query (DINOv2, arXiv 2304.07193, section 3).
  """

  kind: Literal['retrieve']
  encoder: str
  queries: tuple[str, ...]  # sets of images
  least: Cosine | None = None
  nearest: Count | None = None

  def __post_init__(self):
    if (self.least is None) == (self.nearest is None):
      raise InputError(
        f'least: got {self.least} with nearest {self.nearest}; expected one of them, as least=0.5 '
        f'or nearest=4'
      )


@config
class Balance:
  """At most `each` records of each cluster stay, drawn at random: k-means on features."""

  kind: Literal['balance']
  encoder: str
  clusters: Annotated[int, Range(1, 1 << 20)]
  each: Count


@config
class Filter:
  """A judge of one's own, of safety for example: function(records) gives for each a reason to drop
  it, or ''. Records are dicts: id, image (encoded), pixels (uint8 [H, W, 3]), alt_text, captions.
  """

  kind: Literal['filter']
  function: str  # MODULE:FUNCTION
  name: str = ''  # in the report


Step = (
  ImageSize
  | TextLength
  | JunkText
  | RepeatedText
  | Language
  | Similarity
  | ExactDuplicates
  | NearDuplicates
  | Decontaminate
  | Retrieve
  | Balance
  | Filter
)


@config
class Curation:
  """What is curated, and by which steps, in their order."""

  steps: tuple[Step, ...]
  splits: tuple[str, ...] = ('train',)  # the others stay as they are
  seed: Whole = 0  # of what is drawn

  def __post_init__(self):
    if not 1 <= len(self.steps) <= 100:
      raise InputError(f'steps: got {len(self.steps)}; expected 1 to 100')


def kinds() -> dict[str, type]:
  """The steps by their kinds."""
  result = {}
  for group in get_args(Step):
    [kind] = get_args(get_type_hints(group)['kind'])
    result[kind] = group
  return result


def title(step: Any) -> str:
  """What people read of a step: its kind, or the name that they gave it."""
  return getattr(step, 'name', '') or step.kind.replace('_', ' ')

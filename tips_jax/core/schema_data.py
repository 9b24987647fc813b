"""The data part of the schema: stores, views, texts, regions (schema.py has the rest)."""

import dataclasses
from typing import Annotated, Literal

from tips_jax.core.errors import InputError
from tips_jax.core.ranges import Factor, Pixels, Processes, Share, Whole, ascending, config
from tips_jax.core.strict import Range


@config
class View:
  """Random-resized crops of one size, `count` of them per image."""

  size: Pixels  # the crop is square
  count: Annotated[int, Range(1, 64)] = 1
  scale: Annotated[tuple[float, float], Range(1e-4, 1)] = (0.4, 1.0)  # share of the image area
  ratio: Annotated[tuple[float, float], Range(0.01, 100)] = (3 / 4, 4 / 3)  # width / height
  flip: Share = 0.5  # probability of a horizontal flip
  # Color, in this order (pixels/color.py). Blur and solarize: one number, or one for each crop.
  jitter: Share = 0.0  # probability of the four below, in random order
  brightness: Factor = 0.4  # times 1 - it to 1 + it, as contrast and saturation
  contrast: Factor = 0.4
  saturation: Factor = 0.2
  hue: Share = 0.1  # turned by at most this share of the color circle
  gray: Share = 0.0  # probability
  blur: Annotated[float | tuple[float, ...], Range(0, 1)] = 0.0  # probability
  blur_sigma: Annotated[tuple[float, float], Range(1e-3, 100)] = (0.1, 2.0)  # pixels
  # Probability that bytes from 128 are inverted.
  solarize: Annotated[float | tuple[float, ...], Range(0, 1)] = 0.0

  def __post_init__(self):
    for field in ('scale', 'ratio', 'blur_sigma'):
      ascending(field, getattr(self, field))
    for field in ('blur', 'solarize'):
      value = getattr(self, field)
      if isinstance(value, tuple) and len(value) != self.count:
        raise InputError(
          f'{field}: got {value}; expected a probability, or one for each of the {self.count} crops'
        )


@config
class Text:
  """One text per image: a field of the store, and the field that replaces it where it is empty."""

  field: Literal['alt_text', 'captions']
  pick: Literal['first', 'random'] = 'random'  # which of several captions
  weights: tuple[Factor, ...] = ()  # of the captions by place, where it is random; (): equal
  fallback: Literal['', 'alt_text', 'captions'] = ''
  mix: Share = 0.0  # of the images whose text is the fallback although the field has one
  # Words are changed (data/reading/wording.py): the probability, the share of a text's words, and a
  # file of synonyms, 'car, automobile' on a line; without one words swap or are left out.
  augment: Share = 0.0
  change: Share = 0.1
  synonyms: str = ''

  def __post_init__(self):
    if self.mix and not self.fallback:
      raise InputError(f'mix: got {self.mix} without a fallback; expected 0, or a fallback')
    if self.weights and (self.pick == 'first' or not sum(self.weights)):
      raise InputError(
        f"weights: got {self.weights} with pick {self.pick!r}; expected 'random', and one above 0"
      )


@config
class RegionText:
  """Texts of regions: a field of the store with one text for each box, or, where the field
  FIELD_boxes says to which box each belongs, with any number of them.
  """

  field: Literal['region_captions', 'region_tags']
  count: Annotated[int, Range(1, 64)] = 1  # of a region; of more of them so many are drawn
  length: Annotated[int, Range(0, 4096)] = 0  # tokens of each; 0: as text_length


@config
class Regions:
  """Boxes of an image with texts of their own, in a crop of it (UMG-CLIP, arXiv 2401.06397); none
  without texts.
  """

  view: str = 'global'  # in whose first crop they lie
  count: Annotated[int, Range(1, 1024)] = 8  # of an image; of more of them so many are drawn
  least: Share = 0.5  # of its area that the crop has to keep of a region
  texts: dict[str, RegionText] = dataclasses.field(default_factory=dict)


@config
class Tags:
  """Several short texts of an image: a field of the store; of more of them so many are drawn."""

  field: Literal['tags', 'captions'] = 'tags'
  count: Annotated[int, Range(1, 64)] = 8
  length: Annotated[int, Range(0, 4096)] = 0  # tokens of each; 0: as text_length


@config
class Scenes:
  """The embedded data set; `train` > 0 generates it on first use."""

  train: Whole = 0
  test: Whole = 0
  size: Annotated[int, Range(32, 4096)] = 96  # pixels, square
  objects: Annotated[int, Range(1, 5)] = 5  # the most in a scene
  typical: Share = 0.0  # share of objects that look as their kind does; else any color


@config
class Columns:
  """Of tars and parquet that are read without a store: as prepare's flags; '' and () are guessed,
  'none' is no column.
  """

  image: str = ''
  alt_text: str = ''
  captions: tuple[str, ...] = ()
  first_caption_as_alt_text: bool = False  # where there is no alt text
  # Boxes and tags are never guessed.
  regions: str = ''
  region_captions: str = ''
  region_tags: str = ''
  tags: str = ''
  box_format: Literal['xywh', 'xyxy', 'yxyx'] = 'xywh'
  box_unit: Literal['pixels', 'shares'] = 'pixels'


@config
class Data:
  # Folder written by `prepare`, any TFDS folder; or a folder or pattern of tars or parquet files.
  store: str = ''
  split: str = 'train'
  extra_stores: tuple[str, ...] = ()  # mixed in; see mixture
  # Of (store, *extra_stores); empty: by their sizes.
  mixture: Annotated[tuple[float, ...], Range(1e-9, 1e12)] = ()
  # In place of it weights that change: (step, weight of each store), steps ascending. Between two
  # of them weights go in a line; before the first and after the last they stay.
  mixture_schedule: Annotated[tuple[tuple[float, ...], ...], Range(0, 1e12)] = ()
  scenes: Scenes = Scenes()
  tokenizer: str = ''  # SentencePiece model; empty: the store's own
  text_length: Annotated[int, Range(1, 4096)] = 64
  columns: Columns = Columns()
  views: dict[str, View]
  texts: dict[str, Text] = dataclasses.field(default_factory=dict)
  tags: dict[str, Tags] = dataclasses.field(default_factory=dict)
  regions: Regions = Regions()
  threads: Annotated[int, Range(1, 1024)] = 16
  workers: Processes = 0  # processes; 0: threads alone
  prefetch: Annotated[int, Range(1, 1024)] = 4  # batches read ahead
  # Records that are read in one request, and stay together in the shuffle. Far away (a mounted
  # bucket) about 16; on a disk more than 1 gains nothing.
  neighbors: Annotated[int, Range(1, 1024)] = 1
  max_bad_fraction: Share = 0.01  # unreadable images among those seen; above: stop

  def __post_init__(self):
    stores = 1 + len(self.extra_stores)
    if len(self.mixture) not in (0, stores):
      raise InputError(
        f'mixture: got {self.mixture}; expected {stores} numbers, one for each store'
      )
    if self.mixture and self.mixture_schedule:
      raise InputError(
        f'mixture_schedule: got it beside mixture={self.mixture}; expected one of them'
      )
    last = -1.0
    for row in self.mixture_schedule:
      if len(row) != 1 + stores or not row[0].is_integer() or not sum(row[1:]) > 0:
        raise InputError(
          f'mixture_schedule: got {row}; expected a step and {stores} weights, one for each store, '
          f'not all zero'
        )
      if row[0] <= last:
        raise InputError(
          f'mixture_schedule: got step {row[0]:g} after {last:g}; expected ascending steps'
        )
      last = row[0]

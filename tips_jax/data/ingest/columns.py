"""Which columns of a table hold the image and its texts, and how their values become strings.

Web data names the same three things in many ways. Columns given by flag win; the rest is guessed
from the usual names.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.data.ingest.cells import as_texts, brief

NONE = 'none'  # as a column name: the data has no such column
# Candidates in order of preference.
IMAGE_NAMES = tuple(
  """
  image img jpg jpeg png webp image_bytes file_name filename image_path image_file filepath
  file_path path file image_name bytes content
  """.split()
)
ALT_TEXT_NAMES = tuple(
  'alt_text alttext alt txt web_caption caption text title description'.split()
)
CAPTIONS_NAMES = tuple(
  """
  captions caption synthetic_captions synthetic_caption recaption recaptions generated_caption
  long_caption short_caption caption_list sentences texts
  """.split()
)
# Flickr30k's captions; beside other texts it is a remark.
LAST_NAME = 'comment'
_NUMBERED = re.compile(r'(synthetic_|generated_|re)?(captions?|sentences?|texts?)_?\d+')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
  """Column names; 'none' is no column."""

  image: str = ''  # '' is guessed, here and in the next two
  alt_text: str = ''
  captions: tuple[str, ...] = ()
  label: str = ''  # '' is no column: annotations are never guessed
  mask: str = ''
  regions: str = ''  # boxes, which may hold their texts
  region_captions: str = ''
  region_tags: str = ''
  tags: str = ''


def guess(columns: Columns, names: Sequence[str], *, need_image: bool = True) -> Columns:
  """Completes `columns` from the column names of a table; InputError where one is not in it."""
  columns = dataclasses.replace(
    columns,
    image=_resolve('image', columns.image, names),
    alt_text=_resolve('alt_text', columns.alt_text, names),
    captions=tuple(_resolve('captions', name, names) for name in columns.captions),
    label=_resolve('label', columns.label, names),
    mask=_resolve('mask', columns.mask, names),
    regions=_resolve('regions', columns.regions, names),
    region_captions=_resolve('region_captions', columns.region_captions, names),
    region_tags=_resolve('region_tags', columns.region_tags, names),
    tags=_resolve('tags', columns.tags, names),
  )
  by_plain = {}  # names that differ by case or spaces alone are candidates side by side
  for name in names:
    by_plain.setdefault(plain(name), []).append(name)
  # A column has one role, so 'caption' is the alt text or a caption, not both.
  used = {columns.image, columns.alt_text, columns.label, columns.mask, *columns.captions}
  used |= {columns.regions, columns.region_captions, columns.region_tags, columns.tags}

  def take(candidates):
    for candidate in candidates:
      for name in by_plain.get(candidate, ()):
        if name not in used:
          used.add(name)
          return name
    return ''

  image = columns.image
  if need_image:
    image = image or take(IMAGE_NAMES)
  if need_image and not image:
    raise InputError(
      f'image column: got the columns {brief(sorted(names))}; expected one to be named like '
      f'{list(IMAGE_NAMES[:8])}; say which with --image_column'
    )
  alt_text = columns.alt_text or take(ALT_TEXT_NAMES)
  captions = columns.captions
  if not captions:
    candidates = [*CAPTIONS_NAMES, *filter(_NUMBERED.fullmatch, by_plain)]
    captions = tuple(iter(functools.partial(take, candidates), ''))
    if not captions and alt_text in ('', NONE):
      captions = tuple(filter(None, [take([LAST_NAME])]))
    captions = captions or (NONE,)
  others = {columns.regions, columns.tags} - {'', NONE}
  if not alt_text and captions == (NONE,) and not others:
    raise InputError(
      f'text columns: got the columns {brief(sorted(names))}; expected one to be named like '
      f'{[*ALT_TEXT_NAMES[:1], *ALT_TEXT_NAMES[5:7], *CAPTIONS_NAMES[:1]]}; say which with '
      f'--alt_text_column or --captions_column (none: the images have no text)'
    )
  return dataclasses.replace(columns, image=image, alt_text=alt_text or NONE, captions=captions)


def plain(name: str) -> str:
  """A column name without case, spaces and signs: 'Alt-Text' is alt_text."""
  return re.sub(r'[\s.-]+', '_', name.strip().lower())


def _resolve(flag, name, names):
  """The column that a flag names; flags carry no spaces around it, and the table may."""
  if name in names or name in ('', NONE):
    return name
  padded = [other for other in names if other.strip() == name.strip()]
  if len(padded) != 1:
    raise unknown(f'--{flag}_column', name, names)
  return padded[0]


def texts_of(
  rows: Sequence[Mapping], columns: Columns, *, first_caption_as_alt_text: bool = False
) -> tuple[str, list[str]]:
  """(alt_text, captions) of one image from its rows: several where a table repeats an image.

  One distinct alt text stays the alt text. Several (a list, or rows that differ) are equals, so all
  become captions. With `first_caption_as_alt_text`, the first caption moves to an empty alt text.
  Empty strings stay, to be counted.
  """
  alt_texts = []
  captions = []
  for row in rows:
    alt_texts += as_texts(row.get(columns.alt_text))
    for name in columns.captions:
      captions += as_texts(row.get(name))
  alt_texts = list(filter(None, dict.fromkeys(alt_texts)))
  if len(rows) > 1:  # the columns of one row may well repeat a caption
    captions = list(dict.fromkeys(captions))
  if len(alt_texts) > 1:
    captions = alt_texts + captions
    alt_texts = []
  alt_text = ''.join(alt_texts)  # one or none
  if first_caption_as_alt_text and not alt_text and any(captions):
    alt_text = next(text for text in captions if text)
    captions.remove(alt_text)
  return alt_text, captions

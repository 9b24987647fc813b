"""Which columns of a table hold the image and its texts, and how their values become strings.

Web data names the same three things in many ways. Columns given by flag win; the rest is guessed
from the usual names.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown

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
_NUMBERED = re.compile(r'(synthetic_|generated_|re)?(captions?|sentences?|texts?)_?\d+')
# Of a caption that is itself a record.
_TEXT_KEYS = ('text', 'caption', 'raw', 'sentence', 'value')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
  """Column names; 'none' is no column."""

  image: str = ''  # '' is guessed, here and in the next two
  alt_text: str = ''
  captions: tuple[str, ...] = ()
  label: str = ''  # '' is no column: annotations are never guessed
  mask: str = ''


def guess(columns: Columns, names: Sequence[str], *, need_image: bool = True) -> Columns:
  """Completes `columns` from the column names of a table; InputError where one is not in it."""
  # 'Alt-Text' is alt_text.
  by_plain = {re.sub(r'[\s.-]+', '_', name.strip().lower()): name for name in names}
  for flag in ('image', 'alt_text', 'label', 'mask'):
    _check(flag, getattr(columns, flag), names)
  for name in columns.captions:
    _check('captions', name, names)
  # A column has one role, so 'caption' is the alt text or a caption, not both.
  used = {columns.image, columns.alt_text, columns.label, columns.mask, *columns.captions}

  def take(candidates):
    for name in candidates:
      if name in by_plain and by_plain[name] not in used:
        used.add(by_plain[name])
        return by_plain[name]
    return ''

  image = columns.image
  if need_image:
    image = image or take(IMAGE_NAMES)
  if need_image and not image:
    raise InputError(
      f'image column: got the columns {sorted(names)}; expected one of them to be named like '
      f'{list(IMAGE_NAMES[:8])}; say which with --image_column'
    )
  alt_text = columns.alt_text or take(ALT_TEXT_NAMES)
  captions = columns.captions
  if not captions:
    numbered = [plain for plain in by_plain if _NUMBERED.fullmatch(plain)]
    taken = [take([plain]) for plain in (*CAPTIONS_NAMES, *numbered)]
    captions = tuple(name for name in taken if name) or (NONE,)
  if not alt_text and captions == (NONE,):
    raise InputError(
      f'text columns: got the columns {sorted(names)}; expected one of them to be named like '
      f'{[*ALT_TEXT_NAMES[:1], *ALT_TEXT_NAMES[5:7], *CAPTIONS_NAMES[:1]]}; say which with '
      f'--alt_text_column or --captions_column (none: the images have no text)'
    )
  return dataclasses.replace(columns, image=image, alt_text=alt_text or NONE, captions=captions)


def _check(flag, name, names):
  if name and name != NONE and name not in names:
    raise unknown(f'--{flag}_column', name, names)


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
  alt_texts = list(dict.fromkeys(alt_texts))
  if len(rows) > 1:  # the columns of one row may well repeat a caption
    captions = list(dict.fromkeys(captions))
  if len(alt_texts) > 1:
    captions = alt_texts + captions
    alt_texts = []
  alt_text = alt_texts[0] if alt_texts else ''
  if first_caption_as_alt_text and not alt_text and any(captions):
    alt_text = next(text for text in captions if text)
    captions.remove(alt_text)
  return alt_text, captions


def utf8(text: str) -> str:
  """The text with '?' for lone surrogates, which JSON and file names may hold and UTF-8 may not."""
  return text.encode('utf-8', 'replace').decode()


def as_texts(value: object) -> list[str]:
  """The strings in a table cell: a string, a list of strings (also as JSON), a record with a text,
  or a list of those.
  """
  # Missing, or NaN; an array has no single truth value.
  if value is None or value != value and not hasattr(value, '__len__'):
    return []
  if isinstance(value, (bytes, bytearray)):
    value = bytes(value).decode('utf-8', 'replace')
  if isinstance(value, str):
    # On one line: the tokenizer is trained on a file of lines.
    text = utf8(' '.join(value.replace('\0', ' ').split()))
    if text.startswith('[') and text.endswith(']'):
      try:
        return as_texts(json.loads(text))
      except ValueError:
        pass
    return [text]
  if isinstance(value, dict):
    return next((as_texts(value[key]) for key in _TEXT_KEYS if key in value), [])
  if hasattr(value, '__iter__'):
    return [text for item in value for text in as_texts(item)]
  return [str(value)]

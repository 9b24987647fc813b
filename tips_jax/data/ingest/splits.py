"""Which files, folders or rows are those of a split, by the words in their names."""

import re
from collections.abc import Iterable

from tips_jax.core.errors import InputError

_VALIDATION = 'validation'
_WORDS = {
  'train': 'train',
  'training': 'train',
  'val': _VALIDATION,
  'valid': _VALIDATION,
  'validation': _VALIDATION,
  'dev': _VALIDATION,
  'eval': _VALIDATION,
  'evaluation': _VALIDATION,
  'test': 'test',
  'testing': 'test',
}
# 'val2014', 'cc3m-train-0000', 'testset', 'minival', but not 'contest' or 'pretrained'.
_WORD = re.compile(
  rf'(?<![a-z])(?:mini|tiny|sub)?({"|".join(_WORDS)})'
  r'(?:set|data|split|images|captions|annotations)?(?![a-z])'
)


def splits_in(name: str) -> set[str]:
  """The splits that a name speaks of: 'train', 'validation' and 'test'."""
  return {_WORDS[word] for word in _WORD.findall(name.lower())}


def select(names: Iterable[str], split: str, where: str) -> tuple[list[str], list[str]]:
  """(the names of a split, those of other splits): all, if none speaks of a split.

  InputError, which lists names, where it cannot be told or the split is not among them.
  """
  wanted = ''.join(splits_in(split)) or split
  own = re.compile(rf'(?<![a-z0-9]){re.escape(split.lower())}(?![a-z0-9])')
  found = {}
  exact = []
  for name in names:
    found[name] = splits_in(name)
    if own.search(name.lower()):
      exact.append(name)
      found[name].add(wanted)
  if not any(found.values()):
    return list(found), []
  unclear = [name for name, splits in found.items() if len(splits) != 1]
  if unclear:
    raise InputError(
      f'--input: got {where} with {_listed(unclear)}, whose split cannot be told, beside '
      f'{_listed(name for name in found if name not in unclear)}; expected names with one of '
      f'train, validation and test, or a path or pattern of those that are meant'
    )
  # Of 'dev' and 'val' the one that is asked for.
  chosen = exact or [name for name, splits in found.items() if splits == {wanted}]
  if not chosen:
    raise InputError(
      f'--input: got {where} with {_listed(found)}, none of split {split!r}; expected one of them; '
      f'say which split with --input_split, or give its path'
    )
  return chosen, [name for name in found if name not in chosen]


def select_values(values: Iterable[str], split: str, where: str) -> list[str]:
  """The values of a column that mean a split: all, if none speaks of a split; else as `select`."""
  values = list(values)
  named = [value for value in values if splits_in(value) or value == split]
  if not named:
    return values
  chosen, _ = select(named, split, where)
  return chosen


def _listed(names: Iterable[str]) -> str:
  names = list(names)
  if len(names) <= 5:
    return str(names)
  return f'{names[:5]} and {len(names) - 5} more'

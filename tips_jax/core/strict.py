"""The one door from plain data to the schema: types and ranges checked, unknown and missing fields
named.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any

from tips_jax.core.errors import InputError


def did_you_mean(name: object, known: Iterable[object]) -> str:
  """The end of an error message: '; did you mean X?' or ''."""
  near = difflib.get_close_matches(str(name), list(map(str, known)), n=1, cutoff=0.5)
  if not near:
    return ''
  return f'; did you mean {near[0]!r}?'


def unknown(what: str, name: object, known: Iterable[object]) -> InputError:
  """An InputError for a name that is not among the known ones."""
  return InputError(
    f'{what}: got {name!r}; expected one of {sorted(map(str, known))}{did_you_mean(name, known)}'
  )


@dataclasses.dataclass(frozen=True)
class Range:
  """The least and the most that a number may be, in a type hint: Annotated[int, Range(1, 8)].

  It holds for every number of a tuple, a dict or a group that has no range of its own. A NaN is in
  no range.
  """

  least: float = -1e30
  most: float = 1e30

  def check(self, x: Any, where: str) -> None:
    """InputError for a number that is out of range."""
    if dataclasses.is_dataclass(x):
      hints = typing.get_type_hints(type(x), include_extras=True)
      x = {name: getattr(x, name) for name, hint in hints.items() if hint in (int, float)}
    if isinstance(x, dict):
      for name, item in x.items():
        self.check(item, f'{where}.{name}')
    elif isinstance(x, tuple):
      for i, item in enumerate(x):
        self.check(item, f'{where}[{i}]')
    elif isinstance(x, (int, float)) and not self.least <= x <= self.most:
      raise InputError(f'{where}: got {x!r}; expected {self.least:g} to {self.most:g}')


def build(cls: type, data: Any, where: str = 'config') -> Any:
  """An instance of dataclass `cls` from nested dicts; InputError names the first field that does
  not fit.
  """
  fields = {f.name: f for f in dataclasses.fields(cls)}
  data = _as_dict(data, where)
  for key in data:
    if key not in fields:
      raise unknown(f'{where}: unknown field', key, fields)
  hints = typing.get_type_hints(cls, include_extras=True)
  for name, f in fields.items():
    required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    if required and name not in data:
      raise InputError(f'{where}.{name}: missing; expected {_say(hints[name])}')
  values = {k: value(hints[k], v, f'{where}.{k}') for k, v in data.items()}
  try:
    return cls(**values)
  except InputError as error:  # a group knows which of its fields do not fit each other
    raise InputError(f'{where}.{error}') from None


def _as_dict(data, where):
  if hasattr(data, 'to_dict'):
    data = data.to_dict()
  if not isinstance(data, dict):
    raise InputError(f'{where}: got {data!r}; expected a group of fields')
  return data


def value(hint: Any, x: Any, where: str) -> Any:
  """x as a type hint asks for it; InputError where it is something else."""
  if hint is Any:
    return x
  origin = typing.get_origin(hint)
  args = typing.get_args(hint)
  if origin is typing.Annotated:
    x = value(args[0], x, where)
    for allowed in args[1:]:
      allowed.check(x, where)
    return x
  if origin in (typing.Union, types.UnionType):
    return _union(args, x, where)
  if origin is typing.Literal:
    if x in args:
      return x
    raise unknown(where, x, args)
  if origin is tuple and isinstance(x, (tuple, list)):
    items = args
    if args[-1] is Ellipsis:
      items = [args[0]] * len(x)
    if len(items) == len(x):
      return tuple(value(h, v, f'{where}[{i}]') for i, (h, v) in enumerate(zip(items, x)))
  if origin is dict:
    result = {}
    for k, v in _as_dict(x, where).items():
      result[value(args[0], k, f'{where}: name')] = value(args[1], v, f'{where}.{k}')
    return result
  if dataclasses.is_dataclass(hint):
    return build(hint, x, where)
  # A command line or a config may say 1 for 1.0; True is an int to Python, but no number to us.
  if hint is float and isinstance(x, int) and not isinstance(x, bool):
    return float(x)
  if isinstance(hint, type) and origin is None and type(x) is hint:
    return x
  raise InputError(f'{where}: got {x!r} ({type(x).__name__}); expected {_say(hint)}')


def _union(args, x, where):
  """Groups of fields are distinguished by their `kind`, else by being a group at all."""
  groups = [a for a in args if dataclasses.is_dataclass(a)]
  if hasattr(x, 'to_dict') or isinstance(x, dict):
    x = _as_dict(x, where)
    kinds = {}
    for group in groups:
      if 'kind' in group.__annotations__:
        [kind] = typing.get_args(typing.get_type_hints(group)['kind'])
        kinds[kind] = group
    if kinds:
      if not isinstance(x.get('kind'), str) or x['kind'] not in kinds:
        raise unknown(f'{where}.kind', x.get('kind'), kinds)
      _check_fields_of_kind(kinds, x, where)
      return build(kinds[x['kind']], x, where)
    if groups:
      return build(groups[0], x, where)
  plain = [a for a in args if a not in groups]
  if x is None and type(None) in plain:
    return None
  if type(x) in plain:
    return x
  for a in plain:
    try:
      return value(a, x, where)
    except InputError:
      pass
  raise InputError(f'{where}: got {x!r} ({type(x).__name__}); expected {_say(typing.Union[args])}')


def _check_fields_of_kind(kinds, x, where):
  """InputError for a field that another kind has. A command line can change `kind`, but it cannot
  take away the other kind's fields; ignoring them would hide a value that someone set.
  """
  fields = {kind: {f.name for f in dataclasses.fields(group)} for kind, group in kinds.items()}
  kind = x['kind']
  for name in x:
    owners = sorted(other for other in kinds if name in fields[other])
    if owners and kind not in owners:
      raise InputError(
        f'{where}: got {name!r}, a field of kind {" or ".join(map(repr, owners))}, with kind '
        f'{kind!r}; expected fields among {sorted(fields[kind])}. To change the kind, write the '
        f'whole group in a config file: dict(kind={kind!r}, ...)'
      )


def _say(hint):
  origin = typing.get_origin(hint)
  if dataclasses.is_dataclass(hint):
    return f'a {hint.__name__} group'
  if hint is Ellipsis:
    return '...'
  if origin is None:
    return getattr(hint, '__name__', str(hint))
  if origin is typing.Annotated:
    return _say(typing.get_args(hint)[0])
  if origin is typing.Literal:
    return str(hint).replace('typing.', '')
  parts = list(map(_say, typing.get_args(hint)))
  if origin in (typing.Union, types.UnionType):
    return ' or '.join(parts)
  return f'{origin.__name__}[{", ".join(parts)}]'


def plain(config: Any) -> Any:
  """Nested dicts of a schema instance, every field present: the inverse of `build`."""
  if dataclasses.is_dataclass(config):
    return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
  if isinstance(config, dict):
    return {k: plain(v) for k, v in config.items()}
  if isinstance(config, tuple):
    return tuple(map(plain, config))
  return config

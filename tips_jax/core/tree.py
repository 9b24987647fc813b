"""Trees with names: 'tower/blocks/mlp/up/kernel' for every leaf, and rules that match them."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from tips_jax.core.errors import InputError


def name(path: Iterable[Any]) -> str:
  """'a/b/c' for a jax key path."""
  return '/'.join(map(_key, path))


def _key(key):
  # jax has a class for each: keys of a dict, fields of a dataclass, places in a sequence.
  for attribute in ('key', 'name', 'idx'):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
  """[(name, leaf)] in tree order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(name(path), leaf) for path, leaf in leaves]


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dicts of {'a/b': leaf}: the inverse of named_leaves. InputError for a name that is a
  leaf and a group.
  """
  result = {}
  for path, leaf in leaves.items():
    *groups, last = path.split('/')
    place = result
    for group in groups:
      place = place.setdefault(group, {})
      if not isinstance(place, dict):
        raise InputError(f'{path!r}: got an array and a group of the name {group!r}; expected one')
    if last in place:
      raise InputError(f'{path!r}: got an array and a group of that name; expected one of them')
    place[last] = leaf
  return result


def map_named(fn: Callable[..., Any], tree: Any, *rest) -> Any:
  """tree.map with the leaf's name as first argument."""
  return jax.tree_util.tree_map_with_path(lambda path, *xs: fn(name(path), *xs), tree, *rest)


def match(rules: Iterable[tuple[str, Any]], leaf_name: str, what: str) -> Any:
  """The value of the first rule whose pattern matches the whole name; InputError: none does, or one
  is no pattern.
  """
  for pattern, value in rules:
    try:
      if re.fullmatch(pattern, leaf_name):
        return value
    except re.error as error:
      raise InputError(
        f'{what}: got {pattern!r}; expected a regular expression ({error})'
      ) from None
  raise InputError(
    f'{what}: got no rule for {leaf_name!r}; expected one of {[p for p, _ in rules]} to match it'
  )


def size(tree: Any) -> int:
  """Number of elements."""
  return sum(x.size for x in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
  """Bytes of all leaves, over all devices, replicas counted once."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

"""Names of leaves, and the rules that match them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.core import tree
from tips_jax.core.errors import InputError


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
  left: object
  right: object


TREE = {
  'b': Pair(left=np.zeros((2, 3)), right=[np.ones(4, np.int16)]),
  'a': {'kernel': np.zeros((5,), np.float32)},
}


def test_names_follow_the_tree_order():
  assert [n for n, _ in tree.named_leaves(TREE)] == ['a/kernel', 'b/left', 'b/right/0']
  assert [x.shape for _, x in tree.named_leaves(TREE)] == [(5,), (2, 3), (4,)]


def test_map_named_gives_name_and_all_leaves():
  doubled = tree.map_named(
    lambda n, x, y: f'{n}:{x + y}', {'a': 1, 'b': {'c': 2}}, {'a': 10, 'b': {'c': 20}}
  )
  assert doubled == {'a': 'a:11', 'b': {'c': 'b/c:22'}}


def test_the_first_rule_that_matches_the_whole_name_wins():
  rules = (('kernel', 0), ('.*/kernel', 1), ('a/.*', 2), ('.*', 3))
  assert tree.match(rules, 'a/kernel', 'r') == 1
  assert tree.match(rules, 'a/bias', 'r') == 2
  assert tree.match(rules, 'kernel', 'r') == 0
  assert tree.match(rules, 'kernels', 'r') == 3
  matched = tree.map_named(lambda name, _: tree.match(rules, name, 'r'), TREE)
  assert matched == {'a': {'kernel': 1}, 'b': Pair(3, [3])}


def test_errors_name_the_rule_set_and_the_leaf():
  with pytest.raises(InputError, match="lr_rules: got no rule for 'a/bias'; expected one of"):
    tree.match((('.*/kernel', 1),), 'a/bias', 'lr_rules')
  with pytest.raises(InputError, match=r"lr_rules: got '\*a'; expected a regular expression"):
    tree.match((('*a', 1),), 'a', 'lr_rules')


def test_size_and_bytes_also_of_shapes():
  assert tree.size(TREE) == 15
  assert tree.nbytes(TREE) == 6 * 8 + 4 * 2 + 5 * 4
  shapes = jax.eval_shape(lambda: {'x': jnp.zeros((3, 7), jnp.bfloat16)})
  assert (tree.size(shapes), tree.nbytes(shapes)) == (21, 42)

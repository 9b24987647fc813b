"""Random configs end in a method that fits together, or in one line."""

import importlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.damage import FUZZ
from tips_jax.core import schema, strict
from tips_jax.core.errors import InputError
from tips_jax.train import method as method_lib
from tips_jax.train import summary

RECIPES = {
  'tips': ('vits', 'v1,runlocal'),
  'distill': ('vits', 'distill,runlocal'),
  'mae': ('methods.mae', 'runlocal'),
  'clip': ('methods.clip', 'runlocal'),
}
WORDS = ['', 'x', 'image', 'text', 'head', 'student', 'teacher', 'batch.global', 'random', 'vit']
NUMBERS = [
  0,
  1,
  -1,
  2,
  7,
  16,
  10**6,
  10**12,
  0.0,
  0.5,
  1.5,
  -0.1,
  1e-30,
  float('nan'),
  float('inf'),
]
OTHERS = [None, True, (), (1,), [0.5, 0.1], {}, {'start': 1, 'end': 0}]
VALUES = st.sampled_from(WORDS + NUMBERS + OTHERS)


def paths(group, prefix=()):
  """The path of every field and group."""
  result = []
  for name, value in group.items():
    result.append((*prefix, name))
    if isinstance(value, dict):
      result += paths(value, (*prefix, name))
  return result


def change(plain, path, value, remove):
  *groups, name = path
  for group in groups:
    plain = plain.get(group)
    if not isinstance(plain, dict):  # an earlier change replaced the group
      return
  if remove:
    plain.pop(name, None)
  else:
    plain[name] = value


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_random_config_is_described_or_refused_in_one_line(recipe):
  file, argument = RECIPES[recipe]
  get_config = importlib.import_module(f'configs.{file}').get_config
  known = paths(get_config(argument).to_dict())
  changes = st.tuples(st.sampled_from(known), VALUES, st.integers(0, 7))
  ends = {'described': 0, 'refused': 0}

  @settings(FUZZ, max_examples=150)
  @given(st.lists(changes, min_size=1, max_size=3))
  def run(several):
    plain = get_config(argument).to_dict()
    for path, value, chance in several:
      change(plain, path, value, remove=chance == 0)
    try:
      summary.text(method_lib.build(strict.build(schema.Config, plain)))
      ends['described'] += 1
    except InputError as error:
      assert '\n' not in str(error)
      ends['refused'] += 1

  run()
  assert ends['described'] > 2 and ends['refused'] > 50

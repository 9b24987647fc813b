"""Random configs end in a method that fits together, or in one line."""

import collections

import pytest

from benchmarks import fuzz_configs
from tips_jax.core import strict


@pytest.mark.parametrize(
  'name, argument',
  [('vits', 'v1'), ('vits', 'distill'), ('methods.mae', ''), ('methods.clip', '')],
)
def test_a_random_config_is_described_or_refused_in_one_line(name, argument):
  ends = collections.Counter()
  for number in range(60):
    plain = fuzz_configs.random_config(name, argument, f'{name} {argument} {number}')
    kind, detail = fuzz_configs.outcome(plain)
    assert kind in ('described', 'refused'), f'{number}: {detail}'
    ends[kind] += 1
  assert ends['described'] > 5 and ends['refused'] > 30


def test_what_is_no_refusal_is_a_fault(monkeypatch):
  assert fuzz_configs.outcome({}) == ('refused', 'config.name: missing; expected str')
  monkeypatch.setattr(strict, 'build', failing)
  kind, detail = fuzz_configs.outcome({})
  assert kind == 'traceback' and detail.endswith("KeyError: 'x'")


def failing(*_):
  raise KeyError('x')

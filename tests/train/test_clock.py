import types

import jax
import pytest

from tips_jax.core import log
from tips_jax.train import clock as clock_lib


@pytest.fixture
def now(monkeypatch):
  """A time that passes only when told: `now.s`."""
  now = types.SimpleNamespace(s=1000.0)
  fake = types.SimpleNamespace(time=lambda: now.s + 1.7e9, monotonic=lambda: now.s)
  monkeypatch.setattr(clock_lib, 'time', fake)
  return now


def start(now, lines, step):
  """Opens and compiles for 10 s."""
  clock = clock_lib.Clock(jax.make_mesh((1,), ('data',)))
  clock.resume(lines, step)
  now.s += 10
  clock.restart()
  return clock


def train(now, clock, lines, steps, every=2):
  """Steps of one second, and a line after every second of them."""
  for step in steps:
    clock.waiting(lambda: None)
    now.s += 1
    clock.finished(1.0)
    if step % every == 0:
      lines.append({'step': step, **clock.rates(8), **clock.goodput()})


def test_goodput_counts_steps_that_are_kept_over_all_starts(now):
  lines = []
  train(now, start(now, lines, 0), lines, [1, 2, 3, 4])
  assert lines[-1]['goodput'] == pytest.approx(4 / 14)
  # Killed there; the next start is 20 s later, from the checkpoint of step 3.
  now.s += 20
  clock = start(now, lines, 3)
  lines = lines[:1]
  # An evaluation of 5 s is no step.
  train(now, clock, lines, [4, 5])
  now.s += 5
  clock.restart()
  train(now, clock, lines, [6])
  last = lines[-1]
  assert last['step'] == 6 and last['images_per_s'] == pytest.approx(8)
  assert last['run_seconds'] == pytest.approx(10 + 4 + 20 + 10 + 2 + 5 + 1)
  assert last['goodput'] * last['run_seconds'] == pytest.approx(6)


def test_a_start_from_the_beginning_keeps_the_time_that_was_lost(now):
  lines = []
  train(now, start(now, lines, 0), lines, [1, 2])
  clock = start(now, lines, 0)
  train(now, clock, lines, [1, 2])
  assert lines[-1]['run_seconds'] == pytest.approx(24)
  assert lines[-1]['goodput'] == pytest.approx(2 / 24)


def test_lines_of_earlier_versions_have_no_times(now):
  clock = start(now, [{'step': 2, 'images_per_s': 8.0}], 2)
  assert clock.goodput() == {'goodput': 0.0, 'run_seconds': 10.0, 'time': now.s + 1.7e9}


def test_the_sentence():
  assert log.spent({'goodput': 0.925, 'run_seconds': 7200.0}) == (
    'goodput 92 %: 1h51m of the 2h00m since the first start went into steps that count'
  )

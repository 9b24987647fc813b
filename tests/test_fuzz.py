"""benchmarks/fuzz.py: what it calls a fault, and that a campaign ends with its table."""

import os
import pathlib
import random
import subprocess
import sys
import types

import pytest

from benchmarks import fuzz
from tips_jax.core.errors import InputError

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parent.parent


def raising(error):
  def read(folder):
    raise error

  return types.SimpleNamespace(read=read, refuses=InputError)


@pytest.mark.parametrize(
  'error, outcome',
  [(InputError('one line'), 'refused'), (KeyError('a'), 'traceback'), (SystemExit(), 'traceback')],
)
def test_an_error_is_a_refusal_only_where_it_is_meant_as_one(tmp_path, error, outcome):
  assert fuzz.read(raising(error), tmp_path)[0] == outcome


def test_a_refusal_of_several_lines_is_a_fault(tmp_path):
  error = InputError('')
  error.args = ('one\ntwo',)
  assert fuzz.read(raising(error), tmp_path) == ('lines', 'one / two')


def test_writing_outside_and_other_programs_are_seen(tmp_path):
  write = os.O_WRONLY | os.O_CREAT
  assert fuzz.watch(tmp_path, 'open', (tmp_path.parent / 'x', 'w', write))
  assert not fuzz.watch(tmp_path, 'open', (tmp_path / 'x', 'w', write))
  assert not fuzz.watch(tmp_path, 'open', ('/etc/hosts', 'r', os.O_RDONLY))
  assert fuzz.watch(tmp_path, 'os.mkdir', ('/x', 0o777, -1))
  assert fuzz.watch(tmp_path, 'subprocess.Popen', ('gs', [], None, None))


@pytest.mark.parametrize('text', [b'', b'\n', b'[1', b'[' * 100_000, b'null', b'{"a": 1}\n[2]\n'])
def test_damage_never_fails(tmp_path, text):
  path = tmp_path / 'a.jsonl'
  for number in range(200):
    path.write_bytes(text)
    fuzz.damage(random.Random(number), path)
  assert path.exists()


def test_the_same_number_gives_the_same_damage(tmp_path):
  found = set()
  for _ in range(2):
    (tmp_path / 'a.json').write_text('[{"a": 1, "b": [2, 3]}]')
    fuzz.damage(random.Random('0 json 7'), tmp_path / 'a.json')
    found.add((tmp_path / 'a.json').read_bytes())
  assert len(found) == 1 and found != {b'[{"a": 1, "b": [2, 3]}]'}


def test_a_campaign_counts_every_input():
  command = [sys.executable, 'benchmarks/fuzz.py', '--inputs=12', '--reader=bmp']
  out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert out.returncode == 0, out.stderr
  name, inputs, accepted, refused, faults = out.stdout.splitlines()[-1].split()
  assert (name, inputs, faults) == ('all', '12', '0') and int(accepted) + int(refused) == 12

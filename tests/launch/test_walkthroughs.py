"""The runs of launch/README.md fit the machines that they ask for, by the estimate of `plan`."""

import ast
import importlib
import math
import pathlib
import re
import shlex

import pytest

from tips_jax.core import schema, strict
from tips_jax.core.chips import CHIPS
from tips_jax.planning.search import Choice, Model
from tips_jax.train import method as method_lib
from tips_jax.train import sharding

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'


def commands():
  """The words of each command that names a config; {flag: value} of each."""
  text = (LAUNCH / 'README.md').read_text()
  blocks = '\n'.join(re.findall(r'```sh\n(.*?)```', text, re.S)).replace('\\\n', ' ')
  for line in blocks.splitlines():
    words = shlex.split(line, comments=True)
    if any(word.startswith('--config=') for word in words) and 'runlocal' not in line:
      yield words


def flags(words):
  return dict(word[2:].split('=', 1) for word in words if word.startswith('--') and '=' in word)


def machine(words):
  """(chip, how many, slices) that a command asks for."""
  given = flags(words)
  if 'topology' in given:
    name, shape = given['topology'].split(':')
    return CHIPS[name], math.prod(map(int, shape.split('x'))), 1
  if words[0].endswith('gpu_single.sh'):  # eight, as the page says
    return CHIPS['h100'], 8, 1
  nodes = int(given['nodes'])
  return CHIPS[given.get('gpu', 'h100')], nodes * int(given.get('gpus', 8)), nodes


def method_of(given):
  file, _, arg = given['config'].partition(':')
  plain = importlib.import_module(file.removesuffix('.py').replace('/', '.')).get_config(arg)
  for name, value in given.items():
    if name.startswith('config.') and not name.startswith('config.data.'):
      try:
        value = ast.literal_eval(value)
      except ValueError:  # a word
        pass
      plain.update_from_flattened_dict({name.removeprefix('config.'): value})
  return method_lib.build(strict.build(schema.Config, plain))


def share(words):
  """Of the memory of a chip that the step takes."""
  method = method_of(flags(words))
  chip, count, slices = machine(words)
  c = method.config
  sizes = sharding.shape(c.mesh, count, slices)
  choice = Choice(*sizes, c.compute.remat, c.schedule.accumulate)
  return Model(method, chip).total(choice) / chip.hbm


def test_the_page_has_commands_of_every_kind():
  kinds = {words[0].rsplit('/', 1)[-1] for words in commands()}
  assert kinds == {'python', 'tpu_pod.sh', 'run.sh', 'gpu_slurm.sh', 'gpu_single.sh'}


@pytest.mark.parametrize('words', list(commands()), ids=' '.join)
def test_a_run_of_the_page_fits(words):
  assert share(words) < 0.9


def test_the_estimate_refuses_what_the_compiler_refuses():
  """102.1 GB of 16.9, as compiled: the page once said to run it."""
  words = ['plan', '--config=configs/vitb.py:v2', '--topology=v5e:4x4']
  assert share(words) == pytest.approx(102.1e9 / CHIPS['v5e'].hbm, rel=0.1)

"""The chips that scripts of launch/ start runs on are those of core/chips.py, listed once."""

import pathlib
import re

import pytest

from tips_jax.core.chips import CHIPS, GPUS, TPUS
from tips_jax.planning import topologies

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'
RUN = ['run', '--name=n', '--config=c', '--workdir=gs://bucket/run', '--dry_run']
POD = [*RUN, '--zone=z']
GKE = [*RUN, '--image=i']


def table(script, name):
  """The rows of a table of a script."""
  rows = re.search(rf"^{name}='([^']*)'", (LAUNCH / script).read_text(), re.M)[1]
  return [line.split() for line in rows.splitlines()]


ROWS = table('common.sh', 'TPU_NAMES')
GPU_ROWS = table('gke/run.sh', 'GPU_NAMES')


def test_the_tpus_are_those_that_plan_knows_with_their_dimensions():
  assert {row[0]: int(row[1]) for row in ROWS} == {name: CHIPS[name].dims for name in TPUS}
  assert {len(row) for row in ROWS} == {5}


@pytest.mark.parametrize('row', ROWS, ids=[row[0] for row in ROWS])
@pytest.mark.parametrize('count', [4, 8, 16, 32, 64, 128, 256])
def test_slices_that_plan_proposes_are_taken_by_all_scripts_that_have_the_chip(machine, row, count):
  name, _, cloud, image, gke = row
  topology = topologies.shape_for(name, count)
  machine.call('gke/run.sh', *GKE, f'--topology={topology}')
  assert f'cloud.google.com/gke-tpu-accelerator: {gke}\n' in machine.out
  for script, flag in (('tpu_pod.sh', '--version'), ('tpu_queued.sh', '--runtime-version')):
    if cloud == '-':
      machine.call(script, *POD, f'--topology={topology}', code=2)
      assert machine.err.startswith(f"error: --topology: got '{name}'; expected one of: v4 v5e")
    else:
      machine.call(script, *POD, f'--topology={topology}')
      assert f'{flag}={image} ' in machine.out
      assert f'type={cloud} ' in machine.out or f'type={cloud}-{count} ' in machine.out


def test_the_gpus_are_among_those_that_plan_knows():
  """GKE tells apart what is one GPU to a plan."""
  names = {name.removesuffix('-mega') for name, _, _ in GPU_ROWS}
  assert {name.replace('a100-80gb', 'a100') for name in names} <= set(GPUS)


@pytest.mark.parametrize('name, label, each', GPU_ROWS, ids=[row[0] for row in GPU_ROWS])
def test_each_gpu_gets_its_nodes(machine, name, label, each):
  machine.call('gke/run.sh', *GKE, f'--gpu={name}', '--nodes=2')
  assert f'cloud.google.com/gke-accelerator: {label}\n' in machine.out
  assert f'nvidia.com/gpu: {each}\n' in machine.out
  machine.call('gke/run.sh', '--help')
  assert re.search(rf'GPUs: .*\b{name}\b', machine.out)


def test_no_script_lists_them_again():
  names = '|'.join([*TPUS, *(row[0] for row in GPU_ROWS)])
  for path in LAUNCH.rglob('*.sh'):
    code = re.sub(r"^\w+_NAMES='[^']*'", '', path.read_text(), flags=re.M)
    code = re.sub(r'^ *#.*', '', code, flags=re.M)
    code = re.sub(r'such as [\w:]+( or [\w:]+)?', '', code)
    assert not re.search(rf'\b({names})\b', code), path

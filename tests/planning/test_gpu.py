"""Plans for GPUs that are not there, where XLA's compiler for them is installed (`.[plan-gpu]`)."""

import importlib.metadata
import json

import pytest

from tests.planning.test_plan import check, run
from tests.train.conftest import METHODS, Small
from tips_jax.core import chips
from tips_jax.core.errors import InputError
from tips_jax.planning import estimate, topologies
from tips_jax.train import lowering, sharding

INSTALLED = {d.name for d in importlib.metadata.distributions()}
PLUGIN = pytest.mark.skipif(
  'jax-cuda12-plugin' not in INSTALLED, reason='jax-cuda12-plugin is not installed'
)
CUDNN = pytest.mark.skipif(
  'nvidia-cudnn-cu12' not in INSTALLED, reason='nvidia-cudnn-cu12 is not installed'
)
small = Small()


@PLUGIN
@CUDNN
@pytest.mark.parametrize('name', METHODS)
def test_every_method_compiles_for_a_gpu_with_cudnns_attention_both_ways(name):
  topology = 'gpu:h100x4'
  chip, devices = topologies.devices(topology)
  method = small.method(name, mesh=dict(data=2, fsdp=2), compute=dict(dtype='bfloat16'))
  mesh = sharding.make_mesh(method.config.mesh, method.config.schedule.batch_size, devices=devices)
  compiled = lowering.lower(method, mesh).compile(topologies.options(topology))
  text = compiled.as_text()
  assert '"__cudnn$fmhaSoftmax"' in text and '"__cudnn$fmhaSoftmaxBackward"' in text
  found = compiled.memory_analysis()
  state = sum(estimate.memory(method, mesh, chip)['groups'].values())
  assert state <= found.argument_size_in_bytes < chip.hbm and found.temp_size_in_bytes > 0


@PLUGIN
@CUDNN
def test_the_command_for_a_gpu():
  done = run(
    '--config=configs/methods/clip.py:runlocal',
    '--topology=gpu:h100x2',
    '--batch=16',
    '--json',
    '--config.mesh.fsdp=2',
    '--config.mesh.data=1',
    '--config.compute.dtype=bfloat16',
  )
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  check(result)
  assert result['header']['chip'] == 'h100' and result['header']['chips'] == 2
  assert result['memory']['limit'] == chips.CHIPS['h100'].hbm
  assert {'kept activations', 'gradients'} <= set(result['memory']['temporaries_by_kind'])
  assert {row['axis'] for row in result['collectives']['rows']} == {'fsdp'}
  # All of a tiny step are short.
  assert result['time']['kernels'] >= result['time']['short_kernels'] > 100
  # The backward pass reads what attention gave forward (`layers.rematerialized`).
  kernels = {row['direction'] for row in result['parts'] if row['layer'] == 'kernel'}
  assert kernels == {'forward', 'backward'}


@PLUGIN
@pytest.mark.parametrize('name', chips.GPUS)
def test_xla_knows_every_gpu(name):
  chip, devices = topologies.devices(f'gpu:{name}x2', slices=2)
  assert len(devices) == 4 and {d.process_index for d in devices} == {0, 1}
  assert chips.of_kind(devices[0].device_kind) == chip
  assert devices[0].compute_capability == chip.gpu.capability


@pytest.mark.skipif('jax-cuda12-plugin' in INSTALLED, reason='jax-cuda12-plugin is installed')
def test_without_the_compiler_for_gpus_it_says_what_to_install():
  with pytest.raises(
    InputError, match=r"got 'gpu:h100x8'; expected .*-e '\.\[plan-gpu\]'"
  ) as error:
    topologies.devices('gpu:h100x8')
  assert '\n' not in str(error.value)

"""What the lowered step says about devices: constraints and collectives that must not vanish
silently.
"""

import re
import types

import pytest

from tips_jax.train import lowering

VMEM = 'xla_tpu_scoped_vmem_limit_kib'


@pytest.mark.parametrize(
  'kind, expected',
  [
    ('TPU v5', '32768'),
    ('TPU v5p', '32768'),
    ('TPU v5 lite', '32768'),
    ('TPU v6 lite', None),
    ('new', None),
  ],
)
def test_options_of_a_chip(kind, expected, small):
  device = types.SimpleNamespace(platform='tpu', device_kind=kind)
  assert lowering.options(small.method('clip'), device).get(VMEM) == expected
  own = small.method('clip', compute=dict(options=(f'{VMEM}=1',)))
  assert lowering.options(own, device)[VMEM] == '1'


def test_an_option_that_a_chip_must_not_have_is_one_line():
  # libtpu 0.0.52, for v5p
  said = (
    'FAILED_PRECONDITION: Continuation fusion for AllGather is enabled on platform viperfish, but '
    'it is not supported. Please disable it with xla_tpu_enable_async_collective_fusion=false '
  )
  refused = lowering.refused_option(RuntimeError(said + '\nmore'))
  assert str(refused).startswith(f'compute.options: {said}') and 'more' not in str(refused)
  assert lowering.refused_option(RuntimeError('INTERNAL: a fault')) is None


@pytest.fixture(scope='module')
def lowered(small):
  """name -> text of the step on data 2 x fsdp 4, bfloat16, before any compiler pass."""

  def text(name):
    method = small.method(
      name, mesh=dict(data=2, fsdp=4), compute=dict(dtype='bfloat16', remat='full')
    )
    return method, lowering.lower(method, small.mesh(8, data=2, fsdp=4)).as_text()

  return text


@pytest.mark.parametrize('name', ['tips_v1', 'clip'])
def test_constraints_and_collectives_are_in_the_text(name, lowered):
  method, text = lowered(name)
  batch = lowering.abstract_batch(method)
  constraints = re.findall(r'sdy\.sharding_constraint .*"data".*"fsdp"', text)
  assert len(constraints) >= len(batch), text.count('sharding_constraint')
  gathers = re.findall(r'"stablehlo\.all_gather".*', text)
  assert any('bf16' in g for g in gathers) and text.count('"stablehlo.reduce_scatter"') > 0
  assert 'manual_axes={"data", "fsdp"' in text  # towers run per device


def test_a_tower_gathers_once_for_all_of_its_passes(lowered):
  """clean, masked and local crops share the student's gather; the teacher has its own."""
  method, text = lowered('tips_v1')
  images = [names for names in method.order if method.config.passes[names[0]].tower == 'image']
  assert sorted(map(len, images)) == [1, 3]
  width, mlp = method.config.towers['image'].width, method.config.towers['image'].mlp
  up = re.findall(rf'all_gather".*-> tensor<{width}x{mlp}xbf16>', text)
  # The student's images and texts in the forward pass and once more in the backward pass, the
  # teacher's images once.
  assert len(up) == 2 + 2 + 1

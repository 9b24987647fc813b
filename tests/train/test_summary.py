"""The closed-form costs against the paper's arithmetic and against XLA's own count."""

import dataclasses
import importlib

import jax
import pytest

from tips_jax.core import chips, schema, strict
from tips_jax.models import towers
from tips_jax.train import method as method_lib
from tips_jax.train import summary


def build(name, arg=''):
  module = importlib.import_module(f'configs.{name}')
  return method_lib.build(strict.build(schema.Config, module.get_config(arg)))


@pytest.mark.parametrize(
  'name, arg, gigaflops',
  [
    ('vitb', 'v1', 574),
    ('vitg', 'v1', 6589),
    ('vitg', 'v2', 6000),
    ('vitg', 'v1,hr', 22660),
    ('vitg', 'v2,hr', 20110),
  ],
)
def test_costs_are_those_of_the_papers_arithmetic(name, arg, gigaflops):
  assert sum(summary.flops(build(name, arg)).values()) / 1e9 == pytest.approx(gigaflops, rel=2e-3)


def test_v2_saves_the_teachers_image_pass():
  v1, v2 = summary.flops(build('vitg', 'v1')), summary.flops(build('vitg', 'v2'))
  assert 'teacher' in v1 and 'teacher' not in v2
  assert 1 - sum(v2.values()) / sum(v1.values()) == pytest.approx(0.091, abs=2e-3)


@pytest.mark.parametrize(
  'tower, size',
  [
    (schema.ViT(kind='vit', width=256, depth=2, heads=2, mlp=1024), 224),
    (schema.ViT(kind='vit', width=256, depth=2, heads=2, mlp=512, ffn='swiglu'), 98),
  ],
)
def test_closed_form_agrees_with_the_compiler(tower, size):
  compute = schema.Compute(dtype='float32', scan=False)
  params = jax.eval_shape(lambda: towers.init('image', tower, seed=0))
  images = jax.ShapeDtypeStruct((1, 1, size, size, 3), 'uint8')
  forward = jax.jit(lambda p, x: towers.apply(p, tower, compute, {'images': x}))
  counted = forward.lower(params, images).compile().cost_analysis()['flops']
  ours = towers.module(tower).flops(tower, {'images': images.shape[1:]})
  assert counted == pytest.approx(ours, rel=0.03)  # XLA counts norms, softmax and activations too


def test_the_page_names_every_parameter_and_the_memory():
  page = summary.text(build('vitb', 'v1'), devices=8)
  for line in (
    'image/posembed',
    'head/prototypes',
    'logit/log_temperature',
    'GFLOP per image',
    'optimizer',
  ):
    assert line in page


@pytest.mark.parametrize(
  'kind, tera',
  [('TPU v5 lite', 197), ('TPU v5', 459), ('TPU v5p', 459), ('NVIDIA H200', 989), ('cpu', None)],
)
def test_peak_of_the_longest_name(kind, tera):
  assert chips.peak(kind) == (tera and tera * 1e12)


def test_sinkhorn_of_fewer_targets_than_prototypes_is_warned_of_in_one_line():
  line = summary.sinkhorn_warning(build('quickstart', 'v1'))
  # 64 images of one global crop; 48 of the 64 patches of each are masked, which is enough.
  assert line.startswith('warning: ') and '\n' not in line
  assert 'distill has 64 for 128' in line and 'masked' not in line
  assert summary.sinkhorn_warning(build('vitb', 'v1')) == ''  # an EMA center
  enough = build('methods.dino_ibot', 'runlocal')
  towers = enough.config.towers
  few = dataclasses.replace(towers['head'], prototypes=16)
  towers = towers | {'head': few, 'patch_head': few}
  config = dataclasses.replace(enough.config, towers=towers)
  assert summary.sinkhorn_warning(method_lib.build(config)) == ''

"""Every config builds, quickly and without jax, and holds what was published; the command line
names mistakes.
"""

import importlib
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import pytest

from tips_jax.core import schema, strict, tree
from tips_jax.core.errors import InputError
from tips_jax.models import towers
from tips_jax.train import method, summary

ROOT = pathlib.Path(__file__).parents[1]
PARTS = ('__init__', 'methods', 'recipe', 'scales')  # of configs, and no configs themselves
NAMES = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem not in PARTS)
VERSIONED = [n for n in NAMES if re.match('vit|quickstart', n)]
ARGS = {
  n: ('v1', 'v2', 'runlocal', 'v2,runlocal') if n in VERSIONED else ('', 'runlocal') for n in NAMES
}
ARGS['laptop'] = ('', 'v2', 'clip')
CASES = [(n, a) for n in NAMES for a in ARGS[n]]
# tips.md, section 1: millions of parameters of the image tower (v1, v2) and of the text tower. The
# paper gives no v2 of ViT-S: there, the larger position table (32 x 32 - 16 x 16 rows of 384) adds
# 0.29.
PUBLISHED = {
  'vits': (21.62, 21.91, 33.58),
  'vitb': (85.71, 86.30, 109.63),
  'vitl': (303.18, 303.97, 183.92),
  'vitso400m': (412.44, 413.33, 448.33),
  'vitg': (1134.65, 1135.83, 389.13),
}


def get_config(name, arg=''):
  module = importlib.import_module(f'configs.{name}')
  return module.get_config(arg) if arg else module.get_config()


def run(*args):
  return subprocess.run(
    [sys.executable, '-m', 'tips_jax.main', *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    env=os.environ | {'XLA_FLAGS': ''},
  )


@pytest.mark.parametrize('name, arg', CASES)
def test_builds_and_its_method_fits_together(name, arg):
  begin = time.process_time()
  config = strict.build(schema.Config, get_config(name, arg))
  passed = time.process_time() - begin
  built = method.build(config)
  assert sorted(n for group in built.order for n in group) == sorted(config.passes)
  assert 'image' in built.student
  assert passed < 0.5


@pytest.mark.parametrize('name, arg', CASES)
def test_plain_data_survives_the_way_through_the_schema(name, arg):
  config = strict.build(schema.Config, get_config(name, arg))
  assert strict.build(schema.Config, strict.plain(config)) == config


@pytest.mark.parametrize('name', [n for n in NAMES if 'runlocal' in ARGS[n]])
def test_runlocal_is_the_same_method_smaller(name):
  args = [('', 'runlocal')] + ([('v2', 'v2,runlocal')] if name in VERSIONED else [])
  for whole, small in args:
    whole, small = (strict.build(schema.Config, get_config(name, a)) for a in (whole, small))
    for group in ('towers', 'passes', 'losses', 'teachers', 'masks'):
      assert set(getattr(whole, group)) == set(getattr(small, group))
    assert whole.passes == small.passes
    assert whole.losses == small.losses
    assert small.schedule.total_steps <= 60 and small.schedule.batch_size <= 32
    assert small.data.scenes.train and not small.data.store


def test_configs_import_no_jax():
  code = (
    f'import importlib, sys\nfor n in {NAMES}:\n  importlib.import_module("configs." + n).get_config()\n'
    'print(sorted({"jax", "flax", "tensorflow", "torch"} & set(sys.modules)))'
  )
  out = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == '[]'


def millions(config, tower):
  params = jax.eval_shape(lambda: towers.init(tower, config.towers[tower], seed=0))
  if tower == 'image':  # the published towers have no mask token
    params = {k: v for k, v in params.items() if k != 'mask_token'}
  return tree.size(params) / 1e6


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
  v1, v2, text = PUBLISHED[name]
  for arg, image in (('v1', v1), ('v2', v2)):
    config = strict.build(schema.Config, get_config(name, arg))
    assert round(millions(config, 'image'), 2) == image
    assert round(millions(config, 'text'), 2) == text


@pytest.mark.parametrize('name, teacher', [('vits', 1135.83), ('vitl', 1135.83)])
def test_distillation_has_the_large_teacher(name, teacher):
  config = strict.build(schema.Config, get_config(f'{name}_distill'))
  assert config.teachers['large'].kind == 'frozen'
  params = jax.eval_shape(lambda: towers.init('large_image', config.towers['large_image'], seed=0))
  params = {k: v for k, v in params.items() if k != 'mask_token'}
  assert round(tree.size(params) / 1e6, 2) == teacher


@pytest.mark.parametrize('name', ['vits', 'vitb', 'vitl', 'vitso400m', 'vitg'])
def test_high_resolution_keeps_the_model(name):
  for arg in ('v1', 'v2'):
    low, high = (strict.build(schema.Config, get_config(n, arg)) for n in (name, f'{name}_hr'))
    assert high.towers == low.towers  # the position table too
    assert (high.data.views['global'].size, high.data.views['local'].size) == (448, 140)
    assert 'optimizer' in high.init_parts


@pytest.mark.parametrize(
  'name, arg',
  [
    ('clip', ''),
    ('dino_ibot', ''),
    ('mae', ''),
    ('silc', ''),
    ('vitl', 'v2'),
    ('vitg_hr', 'v2'),
    ('vits_distill', 'v2'),
  ],
)
def test_the_summary_lists_every_tower_and_pass(name, arg):
  config = strict.build(schema.Config, get_config(name, arg))
  text = summary.text(method.build(config))
  for word in (*config.towers, *config.passes):
    assert re.search(rf'^{word} ', text, re.M), word
  flops = summary.flops(method.build(config))
  assert all(f > 0 for f in flops.values())


@pytest.mark.parametrize('arg, image', [('vitb.py', '85.71'), ('vitb.py:v2', '86.30')])
def test_dry_run_prints_table_counts_and_memory(arg, image):
  out = run(f'--config=configs/{arg}', '--dry_run')
  assert out.returncode == 0, out.stderr
  assert out.stderr == ''
  assert re.search(rf'^image +{image} M', out.stdout, re.M)
  assert re.search(r'^text +109\.63 M', out.stdout, re.M)
  assert re.search(
    r'^text/encoder/blocks/mlp/up/kernel +12x768x3072 +28,311,552 +float32 ', out.stdout, re.M
  )
  assert re.search(r'^per step of [\d,]+ images: [\d,.]+ TFLOP', out.stdout, re.M)
  assert re.search(r'^optimizer +\d', out.stdout, re.M)
  assert '"total_steps"' in out.stdout


@pytest.mark.parametrize(
  'args, said',
  [
    (
      ('--config=configs/vitb.py', '--config.optimzer.x=1'),
      "unknown field 'optimzer'; did you mean 'optimizer'",
    ),
    (('--config=configs/vitb.py', '--config.schedule.total_stepz=1'), "did you mean 'total_steps'"),
    (
      ('--config=configs/vitb.py', '--config.schedule.total_steps=abc'),
      '--config.schedule.total_steps=abc',
    ),
    (('--config=configs/vitx.py',), 'configs/vitx.py'),
    (('--config=configs/vitb.py:v3',), "got 'v3'; expected one of ['runlocal', 'v1', 'v2']"),
    (('--config=configs/vitb.py', '--confg=1'), 'confg'),
    (('--config=configs/vitb.py', 'stray'), "got 'stray'"),
    (('--config=configs/vitb.py', '--config.schedule.batch_size=0'), 'schedule.batch_size: got 0'),
    (('--config=configs/vitb.py', '--config.optimizer.kind=adam'), "did you mean 'adamw'"),
    ((), '--config: missing'),
  ],
)
def test_a_mistake_is_one_line_and_code_2(args, said):
  out = run('--dry_run', *args)
  assert out.returncode == 2
  assert out.stdout == ''
  assert out.stderr.count('\n') == 1 and out.stderr.startswith('error: ')
  assert said in out.stderr


def test_a_config_argument_that_a_method_lacks_is_an_error():
  with pytest.raises(InputError, match="got 'v2'.*'runlocal'"):
    get_config('clip', 'v2')

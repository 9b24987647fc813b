"""Every config builds, quickly and without jax, as published; the command line names mistakes."""

import dataclasses
import difflib
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import pytest

from configs import ablation
from configs.methods import clip
from configs.parts import recipe
from tips_jax import main
from tips_jax.core import chips, cli, schema, strict, tree
from tips_jax.core.errors import InputError
from tips_jax.models import towers
from tips_jax.train import method, optim, sharding, state, summary

ROOT = pathlib.Path(__file__).parents[1]
SCALES = ('vits', 'vitb', 'vitl', 'vitso400m', 'vitg')
METHODS = sorted(f'methods.{p.stem}' for p in (ROOT / 'configs/methods').glob('[a-z]*.py'))
ARGS = {name: ('v1', 'v2', 'hr', 'v2,hr') for name in SCALES}
ARGS |= {name: (*ARGS[name], 'distill', 'distill,hr') for name in SCALES[:-1]}
ARGS |= dict(quickstart=('v1', 'v2'), laptop=('v1', 'v2', 'clip'), regions=('clip,reduced', 'all'))
ARGS |= dict(ablation=(*ablation.ROWS, 'all,fashion', 'all,flickr8k'), lightclip_ablation=('all',))
ARGS |= {name: ('',) for name in METHODS}
ARGS |= {'methods.umg_clip': ('', 'b16,reduced'), 'methods.umg_clip_adapt': ('', 'e14', 'b16,tips')}
ARGS |= {'methods.clip': ('', *clip.LIGHT), 'methods.lightclip': tuple(clip.LIGHT)}
PUBLIC = [(name, arg) for name, args in ARGS.items() for arg in args]  # every recipe there is
CASES = PUBLIC + [(name, f'{arg},runlocal'.strip(',')) for name, arg in PUBLIC]
GOLDEN = ROOT / 'tests/golden/configs'
# docs/method.md: millions of parameters of the image tower (v1, v2) and of the text tower. Ours:
# v2 of ViT-S, whose position table is larger by 32 x 32 - 16 x 16 rows of 384.
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


@pytest.mark.parametrize('name, arg', PUBLIC)
def test_runlocal_is_the_same_method_smaller(name, arg):
  both = (get_config(name, a) for a in (arg, f'{arg},runlocal'.strip(',')))
  whole, small = (strict.build(schema.Config, config) for config in both)
  for group in ('towers', 'passes', 'losses', 'teachers', 'masks'):
    assert set(getattr(whole, group)) == set(getattr(small, group))
  assert whole.passes == small.passes
  for loss in (*whole.losses.values(), *small.losses.values()):
    loss.args.pop('logits', None)  # a CPU is slow with 16 bits
  assert whole.losses == small.losses
  assert small.schedule.total_steps <= 60 and small.schedule.batch_size <= 32
  assert small.data.scenes.train and not small.data.store


def test_every_file_of_configs_is_tested():
  files = {p.relative_to(ROOT / 'configs') for p in (ROOT / 'configs').rglob('*.py')}
  names = {'.'.join(p.with_suffix('').parts) for p in files if p.stem != '__init__'}
  assert names == {*ARGS, 'curation.web', 'parts.recipe', 'parts.small', 'parts.tips'}


@pytest.mark.parametrize('arg, teacher', [('v1', 'ema'), ('v2', 'ema'), ('distill', 'large')])
def test_the_patch_loss_may_have_a_head_of_its_own(arg, teacher):
  shared, separate = (
    strict.build(schema.Config, get_config('vitb', a)) for a in (arg, f'{arg},separate_heads')
  )
  built = method.build(separate)
  assert set(built.student) - set(method.build(shared).student) == {'patch_head'}
  assert separate.towers['patch_head'] == shared.towers['head']
  own = separate.passes['teacher_patch'].tower
  assert own in separate.teachers[teacher].towers
  assert separate.towers[own] == separate.towers[shared.passes['teacher_patch'].tower]
  inputs = built.losses['masked'].parameters
  assert inputs['student_prototypes'].tower == 'patch_head'
  assert (inputs['teacher_prototypes'].by, inputs['teacher_prototypes'].tower) == (teacher, own)
  assert built.losses['distill'] == method.build(shared).losses['distill']


# What their code says; file and line are in the configs.
NEIGHBORS = {
  'methods.mae': {
    'optimizer.learning_rate': 1.5e-4 * 4096 / 256,
    'optimizer.b2': 0.95,
    'optimizer.weight_decay': 0.05,
    'optimizer.clip_norm': 0.0,
    'schedule.total_steps': 800 * (1_281_167 // 4096),
    'schedule.warmup_steps': 40 * (1_281_167 // 4096),
    'schedule.decay': 'cosine',
    'masks.random.ratio': 0.75,
    'data.views.global.scale': (0.2, 1.0),
    'towers.image.positions': 'sincos',
    'towers.decoder.positions': 'sincos',
    'passes.painted.inputs.cls': 'visible.cls',
    'losses.pixels.args.normalize': 1,
  },
  'methods.clip': {
    'optimizer.learning_rate': 5e-4,
    'optimizer.b2': 0.98,
    'optimizer.eps': 1e-6,
    'optimizer.weight_decay': 0.2,
    'optimizer.clip_norm': 0.0,
    'schedule.decay': 'cosine',
    'data.views.global.scale': (0.9, 1.0),
    'data.views.global.flip': 0.0,
    'towers.logit.temperature': 0.07,
  },
  'methods.siglip': {
    'optimizer.learning_rate': 1e-3,
    'optimizer.b2_cap': 0.95,
    'optimizer.weight_decay': 1e-4,
    'optimizer.decay_times': 'schedule',
    'optimizer.clip_norm': 1.0,
    'schedule.decay': 'cosine',
    'data.text_length': 16,
    'towers.logit.temperature': 0.1,
    'towers.logit.bias': -10.0,
  },
  'methods.dino_ibot': {
    'masks.blocks.ratio': (0.1, 0.5),
    'masks.blocks.probability': 0.5,
    'losses.koleo.weight': 0.1,
    'losses.distill_local.weight': 16 / 18,
    'data.views.global.jitter': 0.8,
    'data.views.global.gray': 0.2,
    'data.views.global.blur': (0.0, 0.9),
    'data.views.global.solarize': (0.0, 0.2),
    'data.views.local.blur': 0.5,
    'data.views.local.solarize': 0.0,
    'optimizer.learning_rate': 2e-4 * (3072 / 1024) ** 0.5,
    'optimizer.final_rate': 1e-6,
    'optimizer.weight_decay': schema.Ramp(start=0.04, end=0.2, shape='cosine'),
    'optimizer.clip_norm': 3.0,
    'optimizer.clip_by': 'tower',
    'towers.image.layer_scale': 1e-5,
    'towers.image.drop_path': 0.4,
    'towers.image.mlp': (int(3072 * 2 / 3) + 7) // 8 * 8,
    'teachers.ema.momentum': schema.Ramp(start=0.994, end=1.0, shape='cosine'),
  },
}


@pytest.mark.parametrize('name', NEIGHBORS)
def test_a_neighbor_has_the_numbers_of_its_code(name):
  config = strict.build(schema.Config, get_config(name))
  for path, published in NEIGHBORS[name].items():
    value = config
    for key in path.split('.'):
      value = value[key] if isinstance(value, dict) else getattr(value, key)
    assert value == published, path


# docs/method.md: what the papers leave open is printed and can be changed.
OPEN = {
  'losses.distill.args.student_temperature': '0.2',
  'losses.distill.args.teacher_temperature.end': '0.04',
  'losses.distill.args.centering': 'sinkhorn',
  'losses.distill.args.center_momentum': '0.8',
  'losses.masked.args.sinkhorn_iterations': '5',
  'losses.masked.args.reduction': 'sum',
  'losses.contrastive_web.args.label_smoothing': '0.1',
  'masks.random.probability': '0.5',
  'teachers.ema.momentum.end': '0.994',
  'data.texts.synthetic.pick': 'random',  # weights are of what is drawn
  'data.texts.synthetic.weights': '(0.7, 0.3)',
  'data.texts.web.mix': '0.5',
  'towers.image.drop_path': '0.1',
  'compute.float32_residual': 'True',
}


@pytest.mark.once
def test_every_open_choice_is_printed_and_can_be_changed():
  plain = run('--config=configs/vitb.py', '--dry_run')
  changed = run(
    '--config=configs/vitb.py', '--dry_run', *(f'--config.{k}={v}' for k, v in OPEN.items())
  )
  assert plain.returncode == changed.returncode == 0, changed.stderr
  for out, same in ((plain.stdout, False), (changed.stdout, True)):
    printed = json.JSONDecoder().raw_decode(out[out.index('{') :])[0]
    for path, value in OPEN.items():
      found = printed
      for key in path.split('.'):
        found = found[key]
      assert (str(found).replace('[', '(').replace(']', ')') == value) == same, path


def test_a_view_is_small_by_its_size_and_not_by_its_name():
  plain = get_config('vits').to_dict()
  views = plain['data']['views']
  plain['data']['views'] = {'wide': views['global'], 'near': views['local']}
  small = recipe.runlocal(plain)['data']['views']
  assert (small['wide']['size'], small['near']['size']) == (56, 28)


def test_a_recipe_leaves_the_pages_constants_alone():
  first = get_config('vits').to_dict()
  changed = importlib.import_module('configs.vits').v1()
  recipe.late(changed, 'distill')
  recipe.runlocal(changed)
  assert get_config('vits').to_dict() == first


def test_configs_import_no_jax():
  code = (
    f'import importlib, sys\nfor n in {list(ARGS)}:\n'
    '  importlib.import_module("configs." + n).get_config()\n'
    'print(sorted({"jax", "flax", "tensorflow", "torch"} & set(sys.modules)))'
  )
  printed = subprocess.check_output([sys.executable, '-c', code], cwd=ROOT, text=True)
  assert printed.strip() == '[]'


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
  config = strict.build(schema.Config, get_config(name, 'distill'))
  assert config.teachers['large'].kind == 'frozen'
  params = jax.eval_shape(lambda: towers.init('large_image', config.towers['large_image'], seed=0))
  params = {k: v for k, v in params.items() if k != 'mask_token'}
  assert round(tree.size(params) / 1e6, 2) == teacher


@pytest.mark.parametrize('name', ['vits', 'vitb', 'vitl', 'vitso400m', 'vitg'])
def test_high_resolution_keeps_the_model(name):
  for arg in ('v1', 'v2'):
    low, high = (strict.build(schema.Config, get_config(name, a)) for a in (arg, f'{arg},hr'))
    assert high.towers == low.towers  # the position table too
    assert (high.data.views['global'].size, high.data.views['local'].size) == (448, 140)
    assert 'optimizer' in high.init_parts
    # Neither starts anew: the state that they belong to is carried over.
    assert low.losses['distill'].args['teacher_temperature'].start == 0.04
    for loss in ('distill', 'masked'):
      assert high.losses[loss].args['teacher_temperature'] == 0.07
    assert high.teachers['ema'].momentum == 1.0


@pytest.mark.parametrize('name', ['vits', 'vitb', 'vitl', 'vitso400m'])
def test_distilled_students_have_a_high_resolution_stage_of_the_same_kind(name):
  low, high = (strict.build(schema.Config, get_config(name, a)) for a in ('distill', 'distill,hr'))
  assert (high.towers, high.passes, high.teachers) == (low.towers, low.passes, low.teachers)
  assert high.losses == low.losses
  # The teacher is trained: from the first step on as sharp as in the end.
  assert low.losses['distill'].args['teacher_temperature'] == 0.07
  assert (high.data.views['global'].size, high.data.views['local'].size) == (448, 140)
  assert high.init_parts == ('params', 'teachers', 'loss_state', 'optimizer')
  assert high.schedule.total_steps == 9_000


@pytest.mark.parametrize('arg', ['distill', 'distill,hr', 'distill,separate_heads'])
def test_a_distilled_student_may_keep_an_average_for_export(arg):
  plain, config = (
    strict.build(schema.Config, get_config('vits', a)) for a in (arg, f'{arg},student_ema')
  )
  average = config.teachers['average']
  assert (average.kind, average.momentum) == ('ema', 0.999)
  assert average.towers == ('image', 'text', 'logit')
  assert (config.passes, config.losses) == (plain.passes, plain.losses)  # nothing reads it
  abstract = jax.eval_shape(lambda: state.init(method.build(config)))
  for tower, params in abstract.teachers['average'].items():
    assert jax.tree.structure(params) == jax.tree.structure(abstract.params[tower])


@pytest.mark.parametrize(
  'name, arg',
  [
    ('methods.clip', ''),
    ('methods.dino_ibot', ''),
    ('methods.mae', ''),
    ('methods.silc', ''),
    ('methods.umg_clip', 'e14'),
    ('vitl', 'v2'),
    ('vitg', 'v2,hr'),
    ('vits', 'distill'),
  ],
)
def test_the_summary_lists_every_tower_and_pass(name, arg):
  config = strict.build(schema.Config, get_config(name, arg))
  text = summary.text(method.build(config))
  for word in (*config.towers, *config.passes):
    assert re.search(rf'^{word} ', text, re.M), word
  flops = summary.flops(method.build(config))
  assert all(f > 0 for f in flops.values())


@pytest.mark.once
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
    (
      ('--config=configs/vitb.py', '--config.schedule.total_stepz=1'),
      "did you mean 'schedule.total_steps'",
    ),
    (
      ('--config=configs/vitb.py', '--config.schedule.total_steps=abc'),
      '--config.schedule.total_steps=abc',
    ),
    (('--config=configs/vitx.py',), 'configs/vitx.py'),
    (
      ('--config=configs/vitb.py:v3',),
      "got 'v3'; expected one of ['distill', 'hr', 'runlocal', 'separate_heads', "
      "'student_ema', 'v1', 'v2']",
    ),
    (('--config=configs/vitb.py', '--confg=1'), 'confg'),
    (('--config=configs/vitb.py', 'stray'), "got 'stray'"),
    (('--config=configs/vitb.py', '--config.schedule.batch_size=0'), 'schedule.batch_size: got 0'),
    (('--config=configs/vitb.py', '--config.optimizer.kind=adam'), "did you mean 'adamw'"),
    (('--config=configs/vitb.py:v1,distill',), "got 'v1,distill'; expected one of ['v1', 'v1,hr'"),
    (
      ('--config=configs/vitb.py', '--config.optimizer.kind=adamw'),
      "got 'b2_cap', a field of kind",
    ),
    (
      ('--config=configs/vitb.py', '--config.teachers.ema=0.99'),
      "ema: got '0.99' for a group; expected its fields, as --config.teachers.ema.FIELD=VALUE",
    ),
    (
      ('--config=configs/vitb.py', '--config.schedule.batch_size=1'),
      'schedule.batch_size: got 1; expected at least 2, as losses.contrastive_',
    ),
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
    get_config('methods.clip', 'v2')


# --- golden -------------------------------------------------------------------------------------


def changed(group):
  """Plain data of a group: the fields that differ from the schema's defaults."""
  result = {}
  for field in dataclasses.fields(group):
    value = getattr(group, field.name)
    if field.default is not dataclasses.MISSING and value == field.default:
      continue
    if field.default_factory is not dataclasses.MISSING and value == field.default_factory():
      continue
    result[field.name] = changed_value(value)
  if getattr(group, 'kind', ''):  # also where it is a default: it says which fields there are
    result['kind'] = group.kind
  return result


def changed_value(value):
  if dataclasses.is_dataclass(value):
    return changed(value)
  if isinstance(value, dict):
    return {key: changed_value(x) for key, x in value.items()}
  return value


def flat(data, prefix=''):
  for key, value in sorted(data.items()):
    if isinstance(value, dict) and value:
      yield from flat(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key} = {value!r}'


def golden(name, arg):
  """Fields that are not defaults, parameters of each tower, and how each parameter is treated."""
  config = strict.build(schema.Config, get_config(name, arg))
  lines = [*flat(changed(config)), '']
  abstract = jax.eval_shape(lambda: state.init(method.build(config)))
  for tower, params in abstract.params.items():
    lines.append(f'{tower}: {tree.size(params):,} parameters')
  for teacher, owned in abstract.teachers.items():
    for tower, params in owned.items():
      lines.append(f'{teacher}.{tower}: {tree.size(params):,} parameters')
  lines.append('')
  # Any sizes above one show where the rules put an axis; 2 divides what 32 devices do.
  sizes = dict(zip(sharding.AXES, (1, 2 if config.mesh.fsdp == -1 else 1, 1)))
  rules = config.optimizer
  for path, leaf in tree.named_leaves(abstract.params):
    axes = [axis or '-' for axis in sharding.spec(config.mesh.rules, sizes, path, leaf)]
    decay = optim.ramp(rules.weight_decay, 0.0) * tree.match(rules.decay_rules, path, 'decay_rules')
    rate = tree.match(rules.lr_rules, path, 'lr_rules')
    frozen = tree.match(rules.freeze_rules, path, 'freeze_rules')
    shape = 'x'.join(map(str, leaf.shape)) or 'scalar'
    lines.append(
      f'{path}  {shape}  {",".join(axes) or "-"}  decay {decay:g} rate {rate:g} frozen {frozen:g}'
    )
  return lines


@pytest.mark.parametrize('name, arg', PUBLIC)
def test_golden(name, arg):
  path = GOLDEN / f'{"-".join(filter(None, [name, arg])).replace(",", "-")}.txt'
  lines = golden(name, arg)
  if 'UPDATE_GOLDEN' in os.environ:
    path.parent.mkdir(exist_ok=True)
    path.write_text('\n'.join(lines) + '\n')
  known = path.read_text().splitlines() if path.exists() else []
  difference = list(difflib.unified_diff(known, lines, 'golden', 'now', lineterm='', n=0))
  assert not difference, '\n'.join(difference) + (
    '\nThe resolved config has changed. Where that is meant, say so in the commit, and run'
    '\n  UPDATE_GOLDEN=1 python -m pytest tests/test_configs.py -k golden'
  )


def test_every_golden_config_is_a_public_one():
  names = {'-'.join(filter(None, case)).replace(',', '-') for case in PUBLIC}
  assert {path.stem for path in GOLDEN.glob('*.txt')} == names


@pytest.mark.parametrize('given, expected', [(None, f'{chips.GPU_SHARE}'), ('0.5', '0.5')])
def test_a_run_takes_the_share_of_a_gpu_that_plans_count_with(given, expected, monkeypatch):
  name = 'XLA_PYTHON_CLIENT_MEM_FRACTION'
  monkeypatch.setenv(name, given or '')
  if given is None:
    monkeypatch.delenv(name)
  monkeypatch.setattr(main, 'describe', lambda config: None)
  cli.parse(main.FLAGS, ['main', '--config=configs/vitb.py', '--dry_run'])
  main.main()
  assert os.environ[name] == expected

"""configs/ablation.py: what each row trains, and that rows differ in nothing else."""

import dataclasses

import pytest

from configs import ablation
from tips_jax.core import schema, strict
from tips_jax.core.errors import InputError

# What each row has: CLS tokens and their texts, views, masks, a teacher.
PARTS = {
  'web': ('web',),
  'synthetic': ('web',),
  'sampled': ('web',),
  'both': ('web', 'synthetic'),
  'distill': ('web', 'synthetic', 'local', 'ema'),
  'masked': ('web', 'synthetic', 'masks', 'ema'),
  'all': ('web', 'synthetic', 'local', 'masks', 'ema'),
  'ibotpp': ('web', 'synthetic', 'local', 'masks', 'ema'),
  'head_ema': ('web', 'synthetic', 'local', 'masks', 'ema'),
  'v2': ('web', 'synthetic', 'local', 'masks', 'ema'),
}


def built(arg):
  return strict.build(schema.Config, ablation.get_config(arg))


def test_every_row_is_listed_here():
  assert set(PARTS) == set(ablation.ROWS)


@pytest.mark.parametrize('row', PARTS)
def test_a_row_computes_what_it_names_and_nothing_else(row):
  config = built(row)
  parts = {*PARTS[row]}
  texts = {'web', 'synthetic'} & parts
  assert set(config.data.texts) == set(config.towers['image'].cls) == texts
  assert set(config.data.views) == {'global'} | ({'local'} & parts)
  assert set(config.masks) == ({'random'} if 'masks' in parts else set())
  assert set(config.teachers) == {'ema'} & parts
  assert ('head' in config.towers) == ('ema' in parts)
  read = {path for p in config.passes.values() for path in p.inputs.values()}
  read |= {path for loss in config.losses.values() for path in loss.inputs.values()}
  for name in config.passes:
    assert any(path.startswith(f'{name}.') for path in read), name


@pytest.mark.parametrize('row', PARTS)
def test_the_weights_are_the_same_in_every_row(row):
  # 0.5 for the prototype terms, not 1 and 2: docs/lab.md.
  weights = {}
  for name, loss in built(row).losses.items():
    if loss.weight:
      weights[name] = getattr(loss.weight, 'end', loss.weight)
  contrast = [weights.pop(name) for name in list(weights) if name.startswith('contrastive')]
  assert sum(contrast) == 1.0
  expected = {}
  if 'local' in PARTS[row]:
    expected['distill'] = 0.5
  if 'masks' in PARTS[row]:
    expected['masked'] = 0.5
  assert weights == expected


@pytest.mark.parametrize('data', ablation.DATA)
@pytest.mark.parametrize('row', PARTS)
def test_rows_have_the_same_towers_images_and_schedule(row, data):
  config = built(f'{row},{data}')
  full = built(f'all,{data}')
  for group in ('optimizer', 'schedule', 'compute', 'evals', 'seed'):
    assert getattr(config, group) == getattr(full, group)
  for tower in ('text', 'logit'):
    assert config.towers[tower] == full.towers[tower]
  image = dataclasses.replace(config.towers['image'], cls=full.towers['image'].cls)
  assert image == full.towers['image']
  for view, crop in config.data.views.items():
    assert crop == full.data.views[view]


def test_one_branch_reads_the_text_that_its_row_names():
  web, synthetic, sampled = (
    built(row).data.texts['web'] for row in ('web', 'synthetic', 'sampled')
  )
  assert (web.field, web.mix) == ('alt_text', 0.0)
  assert (synthetic.field, synthetic.pick, synthetic.fallback) == ('captions', 'first', '')
  assert (sampled.field, sampled.pick, sampled.fallback) == ('alt_text', 'first', 'captions')
  assert sampled.mix == 0.5


def test_the_second_token_reads_the_first_caption_and_in_tipsv2_any():
  picks = {row: built(row).data.texts['synthetic'].pick for row in ('all', 'head_ema', 'v2')}
  assert picks == {'all': 'first', 'head_ema': 'first', 'v2': 'random'}


@pytest.mark.parametrize(
  'row, towers, target, all_patches',
  [
    ('all', ('image', 'head'), 'teacher', False),
    ('ibotpp', ('image', 'head'), 'teacher', True),
    ('head_ema', ('head',), 'clean', True),
    ('v2', ('head',), 'clean', True),
  ],
)
def test_rows_of_tipsv2_change_patches_and_then_the_teacher(row, towers, target, all_patches):
  config = built(row)
  assert config.teachers['ema'].towers == towers
  assert config.passes['teacher_patch'].inputs['tokens'] == f'{target}.patch'
  assert config.passes['teacher_cls'].inputs['tokens'] == f'{target}.web'
  assert ('teacher' in config.passes) == (target == 'teacher')
  assert ('masked_indices' not in config.passes['student_patch'].inputs) == all_patches
  assert ('masked_indices' not in config.passes['teacher_patch'].inputs) == all_patches
  assert ('valid' not in config.losses['masked'].inputs) == all_patches


def test_scenes_are_never_mirrored_and_photos_are():
  flips = {}
  for data in ablation.DATA:
    flips[data] = built(f'all,{data}').data.views['global'].flip
  assert flips == {'scenes': 0.0, 'fashion': 0.5, 'flickr8k': 0.5}


def test_an_unknown_row_is_one_line():
  with pytest.raises(InputError, match="got 'mask'.*did you mean 'masked'"):
    ablation.get_config('mask')

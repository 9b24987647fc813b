"""A method is checked as a whole: what its passes and losses read, the numbers of its losses."""

import pytest

from tips_jax.core.errors import InputError
from tips_jax.train import lowering, summary
from tips_jax.train import method as method_lib

RANDOM = dict(kind='random', view='global')


@pytest.mark.parametrize(
  'name, changes, said',
  [
    # Of a share of the crops the others have no visible patches of the same number.
    (
      'mae',
      dict(masks=dict(random=RANDOM | dict(probability=0.5))),
      "got 'masks.random.visible'; expected one of",
    ),
    (
      'mae',
      dict(towers=dict(image=dict(width=34))),
      "towers.image.positions: got 'sincos' with a width of 34; expected a multiple of",
    ),
    (
      'dino_ibot',
      dict(losses=dict(koleo=dict(args=dict(group=3)))),
      'koleo.group: got 3 with a batch of 8; expected a divisor of the batch',
    ),
    (
      'clip',
      dict(compute=dict(attention='cudnn')),
      "compute.attention: got 'cudnn' with towers.image of float32; it takes bfloat16; ex",
    ),
    (
      'clip',
      dict(compute=dict(attention='cudnn', dtype='bfloat16'), mesh=dict(tensor=2)),
      "compute.attention: got 'cudnn' with mesh.tensor=2; expected 'auto', or 1",
    ),
    (
      'mae',
      dict(
        compute=dict(attention='cudnn', dtype='bfloat16'),
        towers=dict(decoder=dict(decoder_width=36, heads=3)),
      ),
      "'cudnn' with towers.decoder of heads of 12; it takes multiples of 8 up to 128; ex",
    ),
  ],
)
def test_what_cannot_work_is_one_line(small, name, changes, said):
  with pytest.raises(InputError, match=said) as error:
    small.method(name, **changes)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(contrastive_web=dict(args=dict(label_smoothing=1.5))), 'label_smoothing: got 1.5'),
    (dict(distill=dict(args=dict(student_temperature=0.0))), 'student_temperature: got 0.0'),
    (
      dict(distill=dict(args=dict(teacher_temperature=dict(start=0.1, end=-0.1)))),
      'teacher_temperature: got -0.1; expected 0.0001 to 10000',
    ),
    (dict(distill=dict(args=dict(sinkhorn_iterations='all'))), r"got 'all' \(str\); expected int"),
  ],
)
def test_the_numbers_of_a_loss_have_the_ranges_of_its_function(changes, message, small):
  with pytest.raises(InputError, match=f'^losses.*{message}'):
    small.method('tips_v1', losses=changes)


def test_texts_that_only_losses_of_weight_zero_read_need_not_be_there(small):
  config = small.config('tips_v1')
  assert sorted(method_lib.contrasted(config)) == ['synthetic', 'web']
  off = small.config('tips_v1', losses=dict(contrastive_synthetic=dict(weight=0.0)))
  assert method_lib.contrasted(off) == ['web']
  regions = small.config('umg_clip', losses=dict(region_tag=dict(weight=0.0)))
  assert method_lib.contrasted(regions) == ['caption', 'tags', 'region_captions']


def test_a_tower_that_neither_a_teacher_nor_the_student_has_is_named(small):
  teachers = dict(large=dict(towers=('large_image',)))
  with pytest.raises(InputError, match="teachers.large.towers: .* got 'large_head'"):
    small.method('tips_distill', teachers=teachers)


def test_a_mask_that_covers_no_patch_or_all_is_refused(small):
  for ratio in (0.001, 0.99):
    method = small.method('mae', masks=dict(random=dict(ratio=ratio)))
    with pytest.raises(InputError, match=rf'^masks.random.ratio: got {ratio}, \d+ of the 16 patch'):
      summary.shapes(method)


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      dict(passes=dict(painted=dict(inputs=dict(patch='batch.global')))),
      r'^passes.painted.inputs.patch: got the shape \(1, 56, 56, 3\)',
    ),
    (
      dict(losses=dict(pixels=dict(inputs=dict(prediction='visible.patch')))),
      '^config: passes and losses that do not fit each other: ',
    ),
  ],
)
def test_passes_and_losses_that_do_not_fit_each_other_are_one_line(changes, message, small):
  method = small.method('mae', **changes)
  with pytest.raises(InputError, match=message) as error:
    lowering.lower(method, small.mesh(1))
  assert '\n' not in str(error.value)


def test_prototypes_are_parameters_and_no_features(small):
  changes = dict(distill=dict(inputs=dict(teacher_prototypes='clean.cls')))
  with pytest.raises(
    InputError, match=r"^losses.distill.inputs.teacher_prototypes: got 'clean.cls"
  ):
    small.method('tips_v1', losses=changes)


def ramp(begin, until=0.9, start=0.0, end=1.0):
  return dict(weight=dict(start=start, end=end, begin=begin, until=until))


def test_a_loss_sleeps_until_its_weight_leaves_zero_and_when_it_is_back_there(small):
  method = small.method(
    'tips_v1',
    schedule=dict(total_steps=10),
    losses=dict(distill=ramp(0.3), masked=ramp(0.0, until=0.6, start=1.0, end=0.0)),
  )
  awake = [method_lib.awake(method, step) for step in range(10)]
  assert ['distill' in names for names in awake] == [step >= 3 for step in range(10)]
  assert ['masked' in names for names in awake] == [step < 6 for step in range(10)]
  assert all('contrastive_web' in names for names in awake)
  # A ramp of no length is a step: there its weight is the end already.
  method = small.method(
    'tips_v1', schedule=dict(total_steps=10), losses=dict(distill=ramp(0.3, until=0.3))
  )
  assert 'distill' in method_lib.awake(method, 3) and 'distill' not in method_lib.awake(method, 2)


def test_monitors_weigh_nothing_and_never_sleep(small):
  method = small.method('tips_v1')
  monitors = {name for name, loss in method.config.losses.items() if loss.weight == 0}
  assert monitors and monitors <= set(method_lib.awake(method, 0))


def test_only_the_passes_that_are_read_are_left(small):
  method = small.method('tips_v1')
  whole = {name for group in method.order for name in group}
  part = method_lib.only(method, [name for name in method.losses if name != 'masked'])
  assert whole - {name for group in part.order for name in group} == {
    'masked',
    'student_patch',
    'teacher_patch',
  }
  assert method_lib.only(method, method.losses) == method
  assert sum(summary.flops(part).values()) < sum(summary.flops(method).values())

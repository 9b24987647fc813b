"""The door of the schema: every field is checked, and errors name it."""

import dataclasses
import typing

import ml_collections
import pytest

from tips_jax.core import schema, strict
from tips_jax.core.errors import InputError

GROUPS = [g for g in vars(schema).values() if dataclasses.is_dataclass(g)]
EXAMPLES = {str: 'x', int: 4, float: 0.5}


def example(hint):
  """Plain data that fits a required field."""
  if dataclasses.is_dataclass(hint):
    return minimal(hint)
  if typing.get_origin(hint) is typing.Literal:
    return typing.get_args(hint)[0]
  origin = typing.get_origin(hint)
  if origin is typing.Annotated:
    return example(typing.get_args(hint)[0])
  if origin is tuple and Ellipsis not in typing.get_args(hint):
    return tuple(example(item) for item in typing.get_args(hint))
  return origin() if origin in (dict, tuple) else EXAMPLES[hint]


def minimal(group):
  """Plain data with the required fields alone."""
  hints = typing.get_type_hints(group, include_extras=True)
  return {
    f.name: example(hints[f.name])
    for f in dataclasses.fields(group)
    if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
  }


def fields():
  return [
    pytest.param(g, f.name, id=f'{g.__name__}.{f.name}')
    for g in GROUPS
    for f in dataclasses.fields(g)
  ]


def test_the_schema_is_found():
  assert {schema.Config, schema.ViT, schema.Ramp, schema.Mesh} <= set(GROUPS) and len(GROUPS) > 20


@pytest.mark.parametrize('group', GROUPS, ids=lambda g: g.__name__)
def test_plain_is_the_inverse_of_build(group):
  built = strict.build(group, minimal(group))
  assert isinstance(built, group)
  assert strict.build(group, strict.plain(built)) == built


@pytest.mark.parametrize('group, name', fields())
def test_every_field_refuses_another_type(group, name):
  with pytest.raises(InputError) as error:
    strict.build(group, minimal(group) | {name: object()}, 'here')
  assert f'here.{name}:' in str(error.value) and 'expected' in str(error.value)


@pytest.mark.parametrize('group, name', fields())
def test_a_misspelt_field_is_named_with_the_right_spelling(group, name):
  with pytest.raises(InputError) as error:
    strict.build(group, minimal(group) | {name + 'x': 1}, 'here')
  message = str(error.value)
  assert 'here: unknown field' in message and repr(name + 'x') in message
  assert message.endswith(f'; did you mean {name!r}?') and '\n' not in message


@pytest.mark.parametrize('group, name', [(g, n) for g in GROUPS for n in minimal(g)])
def test_a_missing_field_is_named(group, name):
  data = minimal(group)
  del data[name]
  with pytest.raises(InputError, match=f'^here.{name}: missing; expected '):
    strict.build(group, data, 'here')


def test_a_name_like_no_other_gets_no_hint():
  with pytest.raises(InputError) as error:
    strict.build(schema.Log, {'qqqq': 1})
  assert 'did you mean' not in str(error.value) and "'every_steps'" in str(error.value)


def config(**changes):
  return minimal(schema.Config) | changes


def test_fields_deep_inside_are_named():
  towers = {'image': dict(minimal(schema.ViT), width='wide')}
  with pytest.raises(
    InputError, match=r"config.towers.image.width: got 'wide' \(str\); expected int"
  ):
    strict.build(schema.Config, config(towers=towers))


def test_towers_are_told_apart_by_kind():
  towers = {'a': dict(kind='logit'), 'b': dict(kind='text', width=8, depth=1, heads=1, mlp=8)}
  built = strict.build(schema.Config, config(towers=towers)).towers
  assert built['a'] == schema.Logit(kind='logit')
  assert built['b'] == schema.TextTower(kind='text', width=8, depth=1, heads=1, mlp=8)


@pytest.mark.parametrize(
  'tower, message',
  [
    (dict(kind='texts'), r"towers.a.kind: got 'texts'; .* did you mean 'text'\?"),
    (dict(width=8), 'towers.a.kind: got None; expected one of'),
    (dict(kind=[]), r'towers.a.kind: got \[\]; expected one of'),
    (
      dict(kind='logit', bais=1.0),
      r"towers.a: unknown field: got 'bais'; .* did you mean 'bias'\?",
    ),
    ('logit', "towers.a: got 'logit'"),
    (None, 'towers.a: got None'),
  ],
)
def test_bad_towers(tower, message):
  with pytest.raises(InputError, match=message):
    strict.build(schema.Config, config(towers={'a': tower}))


def term(**fields):
  return strict.build(schema.WeightedLoss, dict(kind='k', inputs={}, **fields))


def test_a_weight_is_a_number_or_a_ramp():
  assert term(weight=2).weight == 2.0 and isinstance(term(weight=2).weight, float)
  assert term(weight=dict(start=1, end=0.5)).weight == schema.Ramp(start=1.0, end=0.5)
  with pytest.raises(InputError, match='config.weight.end: missing'):
    term(weight=dict(start=1))
  with pytest.raises(
    InputError, match=r"config.weight: got '2' \(str\); expected float or a Ramp group"
  ):
    term(weight='2')


def test_args_keep_the_type_they_came_with():
  args = term(args=dict(f=1.0, i=3, s='all', r=dict(start=0.0, end=1.0))).args
  assert args == dict(f=1.0, i=3, s='all', r=schema.Ramp(start=0.0, end=1.0))
  assert isinstance(args['i'], int) and isinstance(args['f'], float)
  with pytest.raises(InputError, match='config.args.x'):
    term(args=dict(x=[1]))


def test_true_is_not_a_number():
  for group, data in (
    (schema.Log, dict(every_steps=True)),
    (schema.View, dict(size=8, flip=False)),
  ):
    with pytest.raises(InputError, match=r'\(bool\); expected'):
      strict.build(group, data)


def test_optional_number():
  logit = lambda bias: strict.build(schema.Logit, dict(kind='logit', bias=bias)).bias
  assert logit(None) is None and logit(-10) == -10.0
  with pytest.raises(InputError, match='config.bias'):
    logit('none')


def test_tuples_take_lists_and_check_every_item():
  assert strict.build(schema.View, dict(size=8, scale=[0.1, 1])).scale == (0.1, 1.0)
  for bad in ([0.1], [0.1, 0.5, 1.0], 0.1):
    with pytest.raises(InputError, match='config.scale'):
      strict.build(schema.View, dict(size=8, scale=bad))
  with pytest.raises(InputError, match=r'config.lr_rules\[1\]\[1\]'):
    strict.build(schema.AdamW, dict(lr_rules=[['a', 1.0], ['b', 'fast']]))
  rules = (('.*', ('fsdp', None)),)
  assert strict.build(schema.Mesh, dict(rules=rules)).rules == rules


def test_names_are_strings():
  with pytest.raises(InputError, match='config.views: name: got 1'):
    strict.build(schema.Data, dict(views={1: dict(size=8)}))


def test_config_dicts_are_plain_data():
  data = ml_collections.ConfigDict(dict(size=8, scale=(0.1, 1.0)))
  assert strict.build(schema.View, data) == schema.View(size=8, scale=(0.1, 1.0))
  assert strict.build(schema.Data, dict(views={'a': data})).views == {
    'a': schema.View(size=8, scale=(0.1, 1.0))
  }


def numbers(hint, allowed=None):
  """(number type, its Range or None) of every number that a hint may hold."""
  if hint in (int, float):
    return [(hint, allowed)]
  args = typing.get_args(hint)
  if typing.get_origin(hint) is typing.Annotated:
    return numbers(args[0], args[1])
  inner = list(args)
  if dataclasses.is_dataclass(hint):
    inner = typing.get_type_hints(hint, include_extras=True).values()
  return [pair for one in inner for pair in numbers(one, allowed)]


def test_every_number_of_the_schema_has_a_range():
  found = numbers(schema.Config)
  assert len(found) > 100 and all(isinstance(allowed, strict.Range) for _, allowed in found)


@pytest.mark.parametrize(
  'group, field, bad',
  [
    ('View', 'size', 0),
    ('View', 'size', 1 << 40),
    ('View', 'scale', (0.5, 1.5)),
    ('View', 'scale', (0.0, 1.0)),
    ('View', 'flip', 2.0),
    ('View', 'flip', float('nan')),
    ('View', 'blur', (0.1, 1.1)),
    ('Data', 'threads', 0),
    ('Data', 'workers', -1),
    ('ViT', 'heads', 0),
    ('ViT', 'patch', 0),
    ('ViT', 'width', -8),
    ('ViT', 'grid', 0),
    ('TextTower', 'vocab', 0),
    ('TextTower', 'dropout', 1.0),
    ('Logit', 'temperature', 0.0),
    ('Logit', 'temperature', -1.0),
    ('RandomMask', 'ratio', 1.0),
    ('BlockMask', 'probability', 1.5),
    ('Teacher', 'momentum', 1.5),
    ('Teacher', 'momentum', dict(start=0.9, end=1.5)),
    ('WeightedLoss', 'weight', -1.0),
    ('WeightedLoss', 'args', dict(x=float('inf'))),
    ('AdamW', 'eps', 0.0),
    ('AdamW', 'b2', 1.0),
    ('AdamW', 'clip_norm', -1.0),
    ('AdamW', 'learning_rate', float('nan')),
    ('AdamW', 'lr_rules', (('.*', -1.0),)),
    ('Schedule', 'total_steps', 0),
    ('Schedule', 'accumulate', 0),
    ('Checkpoint', 'keep_last', 0),
    ('Evals', 'limit', 0),
  ],
)
def test_a_number_out_of_range_is_refused_with_its_range(group, field, bad):
  group = getattr(schema, group)
  with pytest.raises(InputError) as error:
    strict.build(group, minimal(group) | {field: bad}, 'here')
  assert str(error.value).startswith(f'here.{field}') and '; expected ' in str(error.value)


def test_the_ends_of_a_range_belong_to_it():
  strict.build(schema.View, dict(size=1, flip=1.0, scale=(1e-4, 1.0)))
  with pytest.raises(InputError, match=r'^config.flip: got 1.01; expected 0 to 1$'):
    strict.build(schema.View, dict(size=1, flip=1.01))


@pytest.mark.parametrize(
  'group, changes, message',
  [
    ('View', dict(scale=(0.9, 0.5)), r'scale: got \(0.9, 0.5\); expected the least first'),
    ('View', dict(ratio=(2.0, 1.0)), 'ratio: got'),
    ('View', dict(count=3, blur=(0.1, 0.2)), 'blur: got .* one for each of the 3 crops'),
    ('ViT', dict(width=8, heads=3), 'heads: got 3; expected a divisor of the width 8'),
    ('ViT', dict(cls=()), r'cls: got \(\)'),
    ('ViT', dict(cls=('a', 'a')), 'cls: got'),
    ('ViT', dict(cls=('patch',)), 'cls: got'),
    ('TextTower', dict(width=9, heads=3), 'width: got 9; expected an even number'),
    ('PixelDecoder', dict(decoder_width=9, heads=2), 'heads: got 2; .* decoder width 9'),
    ('BlockMask', dict(ratio=(0.5, 0.1)), 'ratio: got'),
    ('Text', dict(mix=0.5), 'mix: got 0.5 without a fallback'),
    ('Text', dict(weights=(0.0, 0.0)), 'weights: got'),
    ('Text', dict(weights=(1.0,), pick='first'), "weights: got .* with pick 'first'"),
    ('Data', dict(mixture=(1.0, 2.0)), 'mixture: got .* expected 1 numbers'),
  ],
)
def test_fields_that_do_not_fit_each_other_are_refused(group, changes, message):
  group = getattr(schema, group)
  with pytest.raises(InputError, match=f'^here.{message}'):
    strict.build(group, minimal(group) | changes, 'here')


def test_a_group_must_be_a_group():
  for x in (3, None, [1]):
    with pytest.raises(InputError, match='expected a group of fields'):
      strict.build(schema.Log, x)


def test_the_schema_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    strict.build(schema.Log, {}).every_steps = 1


@pytest.mark.parametrize(
  'data, name, owner',
  [
    (dict(kind='adamw', b2_cap=0.99), 'b2_cap', 'adafactor'),
    (dict(kind='adafactor', eps=1e-6), 'eps', 'adamw'),
    (dict(kind='adafactor', b2=0.95), 'b2', 'adamw'),
  ],
)
def test_a_field_of_another_kind_is_an_error(data, name, owner):
  said = f"got '{name}', a field of kind '{owner}', with kind '{data['kind']}'; expected fields"
  with pytest.raises(InputError, match=f"config.optimizer: {said} among .*'learning_rate'"):
    strict.value(schema.Adafactor | schema.AdamW, data, 'config.optimizer')

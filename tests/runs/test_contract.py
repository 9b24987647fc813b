"""What a run may change when it goes on."""

import pytest

from tips_jax.core.errors import InputError
from tips_jax.runs import checkpoint

CONTRACT = {
  'config': {'seed': 0, 'optimizer': {'learning_rate': 1e-3}},
  'towers': {'image': {'width': 32, 'patch': 14}},
  'text_length': 64,
  'tokenizer_sha256': 'abc',
  'preprocessing': {'mean': 0},
  'data_fingerprint': 'f',
}


@pytest.mark.parametrize(
  'change, named',
  [
    ({'tokenizer_sha256': 'xyz'}, "tokenizer_sha256 was 'abc', is 'xyz'"),
    ({'text_length': 32}, 'text_length was 64, is 32'),
    ({'towers': {'image': {'width': 32, 'patch': 16}}}, 'towers.image.patch was 14, is 16'),
    ({'towers': {**CONTRACT['towers'], 'text': {}}}, 'towers.text'),
    ({'preprocessing': {'mean': 0.5}}, 'preprocessing.mean was 0, is 0.5'),
  ],
)
def test_fixed_fields_are_named(change, named):
  with pytest.raises(InputError) as error:
    checkpoint.check_contract(CONTRACT, {**CONTRACT, **change}, 'runs/a')
  assert named in str(error.value) and 'runs/a' in str(error.value)


def test_other_fields_may_change_and_are_told():
  new = {
    **CONTRACT,
    'config': {'seed': 0, 'optimizer': {'learning_rate': 1e-4}},
    'data_fingerprint': 'g',
  }
  assert checkpoint.check_contract(CONTRACT, new, 'x') == [
    'config.optimizer.learning_rate was 0.001, is 0.0001',
    "data was 'f', is 'g'",
  ]
  assert checkpoint.check_contract(CONTRACT, CONTRACT, 'x') == []


def test_fields_of_a_tower_that_are_new_have_their_defaults():
  old = {'kind': 'vit', 'width': 8, 'depth': 2, 'heads': 2, 'mlp': 8}
  new = old | {'reduce': {'keep': 1.0, 'after': 4, 'neighbors': 5, 'spatial': 0.0}}
  assert (
    checkpoint.check_contract({'towers': {'image': old}}, {'towers': {'image': new}}, 'x') == []
  )
  new['drop_path'] = 0.5
  with pytest.raises(InputError, match='towers.image.drop_path was 0.0, is 0.5'):
    checkpoint.check_contract({'towers': {'image': old}}, {'towers': {'image': new}}, 'x')

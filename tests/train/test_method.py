"""What does not fit together is one line, before anything runs."""

import pytest

from tips_jax.core.errors import InputError

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
  ],
)
def test_what_cannot_work_is_one_line(small, name, changes, said):
  with pytest.raises(InputError, match=said) as error:
    small.method(name, **changes)
  assert '\n' not in str(error.value)

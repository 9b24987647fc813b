"""What a file of digests that is something else is called; checkpoints: test_checkpoint.py."""

import pytest

from tips_jax.runs import digests


@pytest.mark.parametrize(
  'text, kind',
  [
    ('{', 'JSONDecodeError'),
    ('[' * 10**5, 'RecursionError'),
    ('[]', 'TypeError'),
    ('{"files": {}}', 'KeyError'),
    ('{"step": 8, "files": []}', 'AttributeError'),
  ],
)
def test_digests_that_cannot_be_read_are_named(tmp_path, text, kind):
  step = tmp_path / '8'
  step.mkdir()
  (step / digests.FILE).write_text(text)
  assert digests.problem(step) == f'digests.json cannot be read ({kind})'


def test_no_digests_are_no_problem(tmp_path):
  assert digests.problem(tmp_path) == ''

"""The small methods of tests/train serve here too."""

from tests.train.conftest import small  # noqa: F401

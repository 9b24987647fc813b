import pytest

from tips_jax.data.scenes import draw


@pytest.fixture(scope='session')
def drawn():
  return [draw.draw(i) for i in range(250)]

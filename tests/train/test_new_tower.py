"""A tower is its config group, its module and one line: built, run, counted and shown."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.models import towers
from tips_jax.train import method as method_lib
from tips_jax.train import state, step, summary


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanConfig:
  kind: str = 'mean'
  width: int = 5


class Mean(nn.Module):
  """The mean color of an image through a matrix."""

  config: MeanConfig
  compute: schema.Compute

  OPTIONAL = frozenset()
  TOGETHER = False

  @staticmethod
  def inputs(config):
    return {'images': jnp.zeros((1, 1, 2, 2, 3), jnp.uint8)}

  @staticmethod
  def outputs(config, inputs):
    return {'color': (inputs['images'][0], config.width)}

  @staticmethod
  def flops(config, inputs):
    return inputs['images'][0] * 2 * 3 * config.width

  @nn.compact
  def __call__(self, images):
    kernel = self.param('kernel', nn.initializers.normal(0.1), (3, self.config.width))
    return {'color': images.astype(jnp.float32).mean((2, 3)) / 255 @ kernel}


def config(**passes):
  return schema.Config(
    name='mean',
    data=schema.Data(views={'global': schema.View(size=4, count=2)}),
    towers={'colors': MeanConfig()},
    passes={'seen': schema.Pass(tower='colors', inputs={'images': 'batch.global'} | passes)},
    losses={'spread': schema.WeightedLoss(kind='spread', inputs={'features': 'seen.color'})},
    schedule=schema.Schedule(total_steps=2, batch_size=4),
  )


@pytest.fixture(autouse=True)
def one_line(monkeypatch):
  monkeypatch.setitem(towers.MODULES, 'mean', Mean)


def test_it_is_run_counted_and_shown():
  method = method_lib.build(config())
  assert summary.shapes(method)['seen.color'] == (2, 5)
  assert summary.flops(method) == {'seen': 3 * 2 * 2 * 3 * 5}
  assert 'colors/kernel' in summary.text(method)
  images = np.random.default_rng(0).integers(0, 256, (4, 2, 4, 4, 3), np.uint8)
  start = jax.jit(lambda: state.init(method))()
  _, metrics = jax.jit(step.make(method))(start, {'global': images})
  assert metrics['spread/std'] > 0


def test_what_it_does_not_take_is_named():
  with pytest.raises(InputError, match="got 'mask'"):
    method_lib.build(config(mask='batch.global'))


def test_a_kind_without_a_module_is_an_error(monkeypatch):
  method = method_lib.build(config())
  monkeypatch.delitem(towers.MODULES, 'mean')
  with pytest.raises(KeyError, match='mean'):
    summary.flops(method)

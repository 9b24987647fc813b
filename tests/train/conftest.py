"""Small runs for the tests of this folder: public configs, shrunk, on batches made here."""

import dataclasses
import functools
import importlib

import jax
import numpy as np
import pytest

from tips_jax.core import schema, strict
from tips_jax.data.reading import batch as batches
from tips_jax.train import lowering, sharding
from tips_jax.train import method as method_lib
from tips_jax.train import state as state_lib

METHODS = {
  'tips_v1': ('vits', 'v1,runlocal'),
  'tips_v2': ('vits', 'v2,runlocal'),
  'tips_distill': ('vits', 'distill,runlocal'),
  'clip': ('methods.clip', 'runlocal'),
  'siglip': ('methods.siglip', 'runlocal'),
  'silc': ('methods.silc', 'runlocal'),
  'dino_ibot': ('methods.dino_ibot', 'runlocal'),
  'mae': ('methods.mae', 'runlocal'),
  'umg_clip': ('methods.umg_clip', 'b16,runlocal'),
  'umg_clip_adapt': ('methods.umg_clip_adapt', 'b16,runlocal'),
  'lightclip': ('methods.lightclip', 'resnet18,runlocal'),
}


def merge(base, changes):
  """Nested dicts, the changes win."""
  both = lambda k, v: (
    merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
  )
  return {**base, **{k: both(k, v) for k, v in changes.items()}}


class Small:
  """Methods by name, states on any mesh, random batches."""

  names = tuple(METHODS)

  @functools.cache
  def _plain(self, name):
    file, arg = METHODS[name]
    return importlib.import_module(f'configs.{file}').get_config(arg).to_dict()

  def config(self, name, **changes):
    return strict.build(schema.Config, merge(self._plain(name), changes))

  def method(self, name, *, unchecked=None, **changes):
    """unchecked: numbers of the optimizer that the schema refuses, to break a run."""
    config = self.config(name, **changes)
    optimizer = dataclasses.replace(config.optimizer, **(unchecked or {}))
    return method_lib.build(dataclasses.replace(config, optimizer=optimizer))

  def mesh(self, count=1, **axes):
    """A mesh over the first `count` fake devices."""
    return sharding.make_mesh(schema.Mesh(**axes), batch_size=8, devices=jax.devices()[:count])

  def batch(self, method, *, seed=0, mesh=None):
    """Random images and ids of the method's shapes; a few rows lack a text."""
    rng = np.random.default_rng(seed)
    data = method.config.data
    size = method.config.schedule.batch_size
    batch = batches.empty(data, size)
    for name in batches.HOST:
      del batch[name]
    for name in data.views:
      batch[name] = rng.integers(0, 256, batch[name].shape, batch[name].dtype)
    for i, name in enumerate(data.texts):
      batch[name] = rng.integers(2, 1000, batch[name].shape, batch[name].dtype)
      batch[name][:, 5 + i :] = 0
      batch[batches.valid(name)] = np.arange(size) != 2 + i
    for name in (*data.tags, *data.regions.texts):
      # Of few words, so that some are the same; a few are not there.
      ids = rng.integers(2, 5, batch[name].shape, batch[name].dtype)
      there = rng.random(ids.shape[:-1]) < 0.8
      batch[name] = ids * there[..., None] * (np.arange(ids.shape[-1]) < 2)
      batch[batches.valid(name)] = there
    if data.regions.texts:
      starts = rng.random((size, data.regions.count, 2)) * 0.6
      batch[batches.BOXES] = np.concatenate([starts, starts + 0.3], -1).astype(np.float32)
      batch[batches.valid(batches.BOXES)] = np.ones((size, data.regions.count), bool)
    return jax.device_put(batch, sharding.batch(mesh)) if mesh else batch

  def abstract(self, method, mesh):
    return lowering.abstract_state(method, mesh)[0]

  @functools.cache
  def host_state(self, name):
    return jax.tree.map(np.asarray, jax.jit(lambda: state_lib.init(self.method(name)))())

  def place(self, method, mesh, state):
    """A state on the host -> the same on a mesh."""
    return jax.tree.map(
      lambda x, a: jax.device_put(x, a.sharding), state, self.abstract(method, mesh)
    )


@pytest.fixture(scope='session')
def small():
  return Small()


@pytest.fixture(scope='session')
def scenes_store(tmp_path_factory):
  """A store of a few scenes, with alt texts, captions and a tokenizer."""
  from tips_jax.data.scenes import dataset as scenes

  return scenes.build(str(tmp_path_factory.mktemp('data') / 'scenes'), train=40, test=8, size=48)

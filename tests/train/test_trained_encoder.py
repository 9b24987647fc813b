"""The encoder of a run gives what a loaded model gives, and compiles once for all evaluations."""

import pathlib

import jax
import numpy as np
import pytest

from tips_jax.data import store as store_lib
from tips_jax.data.tokenizer import Tokenizer
from tips_jax.interop.encoder import Encoder as Loaded
from tips_jax.interop.weights import Weights, tower_names
from tips_jax.train.encoder import RunEncoder

FLOAT = dict(compute=dict(dtype='float32'))
IMAGES = np.random.default_rng(0).integers(
  0, 256, (5, 28, 42, 3), np.uint8
)  # 5 of 8 devices, 2 x 3 patches
TEXTS = ['a red ball', 'two cubes left of a cone', 'a red ball']


def both(small, name, tokenizer=None, **mesh):
  """(RunEncoder on 8 devices, its encoder, the same weights as a loaded model)."""
  method, mesh = small.method(name, **FLOAT), small.mesh(8, **mesh)
  state = small.host_state(name)
  towers = method.config.towers
  words = tokenizer and pathlib.Path(tokenizer.path).read_bytes()
  run = RunEncoder(method, mesh)
  run.tokenizer = words
  here = tower_names(method.config.evals, towers)
  weights = Weights(
    name=name,
    towers={role: towers[n] for role, n in here.items() if n in state.params},
    params={role: state.params[n] for role, n in here.items() if n in state.params},
    text_length=method.config.data.text_length,
    tokenizer=words,
  )
  return run, run.of(small.place(method, mesh, state)), Loaded(weights, exact=True)


def same(found, wanted):
  """To the last bit: what is split over devices is gathered before it is used."""
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize('name', ['tips_v2', 'clip'])  # two CLS tokens; projections behind one
@pytest.mark.parametrize('mesh', [dict(data=8), dict(data=2, fsdp=4)], ids=['data', 'fsdp'])
def test_it_gives_what_a_loaded_model_gives(small, name, mesh):
  _, encoder, loaded = both(small, name, **mesh)
  options = dict(intermediate_layers=(1, 0), values=True)
  same(encoder.inspect(IMAGES, **options), loaded.inspect(IMAGES, **options))
  same(encoder.inspect(IMAGES, patches=False), loaded.inspect(IMAGES, patches=False))
  for fact in ('cls_names', 'patch', 'width', 'depth', 'has_text'):
    assert getattr(encoder, fact) == getattr(loaded, fact), fact


def test_texts(small, scenes_store):
  words = Tokenizer(store_lib.open_store(scenes_store).tokenizer_path)
  _, encoder, loaded = both(small, 'clip', words, data=8)
  found = encoder.encode_text(TEXTS)
  same(found, loaded.encode_text(TEXTS))
  np.testing.assert_array_equal(found[0], found[2])
  assert len(encoder.encode_text([])) == 0
  _, silent, _ = both(small, 'mae', data=8)
  assert not silent.has_text and silent.text(np.ones((1, 4), np.int32)) is None


def test_other_weights_need_no_other_program(small):
  run, encoder, _ = both(small, 'tips_v2', data=8)
  first = encoder.inspect(IMAGES, intermediate_layers=(0,))
  state = small.host_state('tips_v2')
  method, mesh = small.method('tips_v2', **FLOAT), small.mesh(8, data=8)
  moved = state.replace(params=jax.tree.map(lambda x: x + 0.1, state.params))
  other = run.of(small.place(method, mesh, moved))
  assert np.abs(other.inspect(IMAGES, intermediate_layers=(0,))['web'] - first['web']).max() > 1e-3
  assert encoder._inside._cache_size() == 1 and other._inside is encoder._inside
  assert other.sha256 != encoder.sha256

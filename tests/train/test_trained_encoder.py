"""The encoder of a run gives what a loaded model gives, and compiles once for all evaluations."""

import pathlib

import jax
import numpy as np
import pytest

from tips_jax.data import store as store_lib
from tips_jax.data.tokenizer import Tokenizer
from tips_jax.evals import during_training as run
from tips_jax.evals.datasets import jobs as suite_data
from tips_jax.interop.encoder import Encoder as Loaded
from tips_jax.interop.weights import Weights
from tips_jax.train import sharding
from tips_jax.train.encoder import Encoder

FLOAT = dict(compute=dict(dtype='float32'))
IMAGES = np.random.default_rng(0).integers(
  0, 256, (5, 28, 42, 3), np.uint8
)  # 5 of 8 devices, 2 x 3 patches
TEXTS = ['a red ball', 'two cubes left of a cone', 'a red ball']


def both(small, name, tokenizer=None, **mesh):
  """(encoder of a run on 8 devices, the same weights as a loaded model)."""
  method, mesh = small.method(name, **FLOAT), small.mesh(8, **mesh)
  state = small.host_state(name)
  e, towers, encoder = method.config.evals, method.config.towers, Encoder(method, mesh)
  encoder.tokenizer = tokenizer
  here = {
    'image': e.image_tower,
    'text': e.text_tower,
    'image_head': e.image_head,
    'text_head': e.text_head,
  }
  here = {k: n for k, n in here.items() if n in towers}
  weights = Weights(
    name=name,
    towers={k: towers[n] for k, n in here.items()},
    params={k: state.params[n] for k, n in here.items()},
    text_length=method.config.data.text_length,
    tokenizer=tokenizer and pathlib.Path(tokenizer.path).read_bytes(),
  )
  cls = e.retrieval_cls if e.retrieval_cls in towers[e.image_tower].cls else None
  return encoder.of(small.place(method, mesh, state)), Loaded(weights, cls=cls)


def close(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), found, wanted)


@pytest.mark.parametrize('name', ['tips_v2', 'clip'])  # two CLS tokens; projections behind one
@pytest.mark.parametrize('mesh', [dict(data=8), dict(data=2, fsdp=4)], ids=['data', 'fsdp'])
def test_it_gives_what_a_loaded_model_gives(small, name, mesh):
  encoder, loaded = both(small, name, **mesh)
  options = dict(intermediate_layers=(1, 0), values=True)
  close(encoder.inspect(IMAGES, **options), loaded.inspect(IMAGES, **options))
  close(encoder.inspect(IMAGES, patches=False), loaded.inspect(IMAGES, patches=False))
  close(encoder.inspect(IMAGES), encoder.image(IMAGES))
  for fact in ('cls_names', 'patch', 'width', 'depth', 'has_text'):
    assert getattr(encoder, fact) == getattr(loaded, fact), fact


def test_texts(small, scenes_store):
  encoder, loaded = both(
    small, 'clip', Tokenizer(store_lib.open_store(scenes_store).tokenizer_path), data=8
  )
  found = encoder.encode_text(TEXTS)
  close(found, loaded.encode_text(TEXTS))
  np.testing.assert_array_equal(found[0], found[2])
  assert len(encoder.encode_text([])) == 0
  silent, _ = both(small, 'mae', data=8)
  assert not silent.has_text and silent.text(np.ones((1, 4), np.int32)) is None


def test_other_weights_need_no_other_program(small):
  encoder, _ = both(small, 'tips_v2', data=8)
  first = encoder.inspect(IMAGES, intermediate_layers=(0,))
  params = jax.tree.map(lambda x: x + 0.1, encoder._params)
  other = encoder.of(small.host_state('tips_v2').replace(params=params))
  assert np.abs(other.inspect(IMAGES, intermediate_layers=(0,))['web'] - first['web']).max() > 1e-3
  assert encoder._inside._cache_size() == 1 and other._inside is encoder._inside
  assert other.sha256 != encoder.sha256


def test_the_suite_under_the_mesh_of_a_run(small, scenes_store, monkeypatch):
  """As the loop calls it: on one device, while the encoder works on all."""
  monkeypatch.setattr(
    suite_data,
    '_SHORT',
    {
      'depth': dict(steps=2, batch=4, learning_rates=(1e-3, 1e-2), upsample=1, bins=8),
      'linear': dict(steps=3),
      'normals': dict(hidden=4, widths=(4, 4, 4, 4), epochs=1, batch=40),
      'zeroshot': dict(templates='photo'),
    },
  )
  store = store_lib.open_store(scenes_store)
  words = Tokenizer(store.tokenizer_path)
  tasks = ('linear', 'depth', 'dpt_normals', 'zeroshot', 'zeroshot_segmentation')
  config = small.config('tips_v2', evals=dict(tasks=tasks)).evals
  encoder, _ = both(small, 'tips_v2', words, data=2, fsdp=4)
  options = dict(tokenizer=words, config=config, text_length=16)
  alone = run.evaluate(encoder, store, **options)
  with jax.set_mesh(encoder._mesh), jax.set_mesh(sharding.alone()):
    within = run.evaluate(encoder, store, **options)
  assert {name.split('/')[0] for name in within} == set(tasks)
  assert within == pytest.approx(alone, rel=1e-3, abs=1e-6)

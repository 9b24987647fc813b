"""Small models with parameters of which none is at its initial zero or one."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from tips_jax.core import schema
from tips_jax.data import tokenizer
from tips_jax.interop.weights import Weights
from tips_jax.models import towers

WORDS = (
  'a red square on a blue field',
  'two green circles',
  'the photo shows a dog',
  'yellow stars above water',
)


def parameters(name, tower, seed=0):
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(functools.partial(towers.init, name, tower, seed=0))
  return jax.tree.map(lambda s: (0.1 * rng.normal(size=s.shape)).astype(np.float32), shapes)


def model(*, tokenizer=None, seed=0, vocab=300, text=True, heads=False, **image):
  """Weights of a tiny TIPS; `image` changes fields of its image tower."""
  tower = dict(kind='vit', width=32, depth=2, heads=2, mlp=64, patch=14, grid=4, mask_token=True)
  known = {'image': schema.ViT(**tower | image)}
  width = known['image'].width
  if text:
    known['text'] = schema.TextTower(
      kind='text', width=width, depth=3, heads=2, mlp=48, vocab=vocab
    )
    known['logit'] = schema.Logit(kind='logit')
  if heads:
    known |= {
      n: schema.ProjectionHead(kind='projection', width=width, output=16)
      for n in ('image_head', 'text_head')
    }
  params = {n: parameters(n, t, seed) for n, t in known.items()}
  if text:
    params['logit'] = {'log_temperature': np.float32(np.log(0.0125))}
  return Weights(
    name='tiny', towers=known, params=params, tokenizer=tokenizer, size=known['image'].grid * 14
  )


@pytest.fixture(name='model')
def _model():
  return model


@pytest.fixture(scope='session')
def tokenizer_model(tmp_path_factory):
  """Bytes of a BPE model of 300 pieces."""
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model'
  tokenizer.train(WORDS, path, vocab_size=300)
  return pathlib.Path(path).read_bytes()

"""Dual encoders by name: checkpoints of ours, those of transformers, and functions of users."""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

import tips_jax
from tips_jax.core.errors import InputError
from tips_jax.data.ingest import pretrained

BATCH = 64  # images of a call
_LONGEST = 256  # tokens of a text


class Encoder(Protocol):
  """What the steps ask of an encoder. Numbers of an image do not depend on the others of a call."""

  def prepare(self, image: np.ndarray) -> Any:
    """What is kept of uint8 [H, W, 3] of any size until it is encoded; called in threads. That of a
    user may be without it, and then gets the image itself.
    """

  def images(self, images: Sequence[Any]) -> np.ndarray:
    """float [B, E] of at most BATCH images, as `prepare` gave them."""

  def texts(self, texts: Sequence[str]) -> np.ndarray:
    """float [B, E] in the same space."""


class _Ours:
  def __init__(self, name):
    path, _, cls = name.partition('#')
    # exact: the same numbers in every batch.
    self._encoder = tips_jax.load(path, exact=True, batch_size=BATCH, cls=cls or None)
    self.identity = self._encoder.sha256

  def prepare(self, image):
    return self._encoder.resize(image)

  def images(self, images):
    return self._encoder.features(np.stack(images), patches=False)['embedding']

  def texts(self, texts):
    return self._encoder.encode_text(list(texts))


class _Transformers:
  def __init__(self, name):
    transformers = pretrained.library('encoder')
    what = 'a dual encoder, such as CLIP or SigLIP,'
    self._processor = pretrained.processor('encoder', name, what)
    self._model = pretrained.load('encoder', name, what, 'AutoModel')
    for method in ('get_image_features', 'get_text_features'):
      if not hasattr(self._model, method):
        raise InputError(
          f'encoder: got {name!r}, a {type(self._model).__name__}; expected a dual encoder, '
          f'such as CLIP or SigLIP'
        )
    self.identity = name
    text = self._model.config.text_config
    self._longest = min(getattr(text, 'max_position_embeddings', _LONGEST), _LONGEST)
    self._batch = functools.partial(transformers.BatchFeature, tensor_type='pt')

  def prepare(self, image):
    found = self._processor(images=[Image.fromarray(image)], return_tensors='pt')
    known = inspect.signature(self._model.get_image_features).parameters
    return {name: value.numpy() for name, value in found.items() if name in known}

  def images(self, images):
    inputs = {name: np.concatenate([each[name] for each in images]) for name in images[0]}
    return self._features(self._model.get_image_features, self._batch(inputs))

  def texts(self, texts):
    # Padded to a length that does not depend on the others.
    found = self._processor(
      text=list(texts),
      padding='max_length',
      truncation=True,
      max_length=self._longest,
      return_tensors='pt',
    )
    known = inspect.signature(self._model.get_text_features).parameters
    inputs = {name: value for name, value in found.items() if name in known}
    return self._features(self._model.get_text_features, inputs)

  def _features(self, method, inputs):
    out = method(**{name: value.to(self._model.device) for name, value in inputs.items()})
    out = getattr(out, 'pooler_output', out)
    return out.float().cpu().numpy()


def function(name: str, where: str) -> Callable[..., Any]:
  """The function MODULE:FUNCTION; InputError where there is none."""
  module, _, attribute = name.partition(':')
  try:
    found = importlib.import_module(module)
    for part in attribute.split('.'):
      found = getattr(found, part)
  except (ImportError, AttributeError, ValueError) as error:
    raise InputError(
      f'{where}: got {name!r} ({error}); expected MODULE:FUNCTION of a module that can be imported '
      f'here'
    ) from error
  if not callable(found):
    raise InputError(f'{where}: got {name!r}, which is no function; expected MODULE:FUNCTION')
  return found


@functools.cache
def load(name: str) -> Encoder:
  """The encoder of a name, once in each process; InputError where it is none."""
  if name.startswith('python:'):
    return function(name.removeprefix('python:'), 'encoder')()
  if name.startswith('hf:'):
    return _Transformers(name.removeprefix('hf:'))
  return _Ours(name)


def identity(name: str) -> str:
  """What tells encoders apart that have the same name."""
  return str(getattr(load(name), 'identity', name))


def prepare(name: str, image: np.ndarray) -> Any:
  """`Encoder.prepare` of the encoder of a name."""
  encoder = load(name)
  if not hasattr(encoder, 'prepare'):
    return image
  return encoder.prepare(image)


def image_features(name: str, images: Sequence[Any]) -> np.ndarray:
  """float32 [n, E] of length one, of any number of images that were prepared."""
  return _unit(load(name).images, images, 'images')


def text_features(name: str, texts: Sequence[str]) -> np.ndarray:
  """float32 [n, E] of length one, of any number of texts."""
  return _unit(load(name).texts, texts, 'texts')


def _unit(encode, inputs, kind):
  from tips_jax.core import vectors  # jax is slow to import, and encoders of others need none

  parts = []
  for first in range(0, len(inputs), BATCH):
    parts.append(np.asarray(encode(inputs[first : first + BATCH]), np.float32))
  found = np.concatenate(parts)
  # A cosine of nan is under no threshold: all records would stay.
  if not np.isfinite(found).all():
    count = int(np.sum(~np.isfinite(found)))
    raise InputError(
      f'encoder: got {count} of {found.size} numbers that are not finite for {len(found)} {kind}; '
      f'expected finite features'
    )
  return vectors.unit(found)


def require_texts(name: str) -> None:
  """InputError for an encoder that knows no texts."""
  encoder = load(name)
  with contextlib.suppress(AttributeError):
    encoder.texts(['a'])
    return
  raise InputError(f'encoder: got {name!r}, which encodes no texts; expected a dual encoder')

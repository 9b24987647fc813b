"""Models of transformers by name or from folders, with all of their weights."""

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.archives import reason


def library(where: str) -> types.ModuleType:
  """transformers; InputError where it is not installed. where: the flag or field, for messages."""
  try:
    return importlib.import_module('transformers')
  except ImportError as error:
    raise InputError(
      f"{where}: transformers is not installed ({error}); expected pip install 'tips_jax[caption]'"
    ) from error


def load(where: str, name: str, expected: str, auto: str, **more: Any) -> Any:
  """The model `name` of a class of transformers, without gradients, on the accelerator if there is
  one.

  expected: what it has to be, for messages. auto: name of the class, as AutoModel. Raises
  InputError where it cannot be loaded, or is of another kind, so that weights are lacking:
  transformers would draw them at random.
  """
  from_pretrained = getattr(library(where), auto).from_pretrained

  def open_model():
    model, found = from_pretrained(name, output_loading_info=True, **more)
    if found['missing_keys']:
      lacking = sorted(found['missing_keys'])
      raise ValueError(f'it lacks {len(lacking)} weights, such as {lacking[0]}')
    return model

  return _tried(where, name, expected, open_model).eval().requires_grad_(False).to(device())


def processor(where: str, name: str, expected: str, auto: str = 'AutoProcessor') -> Any:
  """What prepares images and texts for a model; raises InputError as `load` does."""
  from_pretrained = getattr(library(where), auto).from_pretrained
  return _tried(where, name, expected, functools.partial(from_pretrained, name))


def _tried(where: str, name: str, expected: str, open_it: Callable[[], Any]) -> Any:
  try:
    return open_it()
  # No such folder, no network, no such kind of model, no torch.
  except Exception as error:
    raise InputError(
      f'{where}: cannot load {name!r} ({reason(error)}); expected the name or the folder of '
      f'{expected} of transformers'
    ) from error


def device() -> str:
  """The name of the accelerator, or of the CPU."""
  from transformers.utils import import_utils

  return 'cuda' if import_utils.is_torch_cuda_available() else 'cpu'

"""Files of named arrays: npz and safetensors. Nothing is ever unpickled."""

import json
import os
import pathlib
import zipfile

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.core.strict import did_you_mean

INDEX = 'model.safetensors.index.json'


def read_npz(path):
  """{name: float32 array} of an npz file; InputError for a truncated, pickled or foreign one."""
  try:
    with np.load(path, allow_pickle=False) as file:
      if not isinstance(file, np.lib.npyio.NpzFile):
        raise InputError(f'{str(path)!r}: got a single array; expected an npz file')
      return {name.removeprefix('params/'): _float32(file[name], name, path) for name in file.files}
  except OSError as error:
    raise InputError(f'{str(path)!r}: cannot be read ({error.strerror or error})') from None
  except ValueError as error:
    if isinstance(error, InputError):
      raise
    pickled = 'pickle' in str(error).lower()
    raise InputError(
      f'{str(path)!r}: got {"pickled objects, which may run code" if pickled else "no npz file"}; '
      f'expected an npz file of plain arrays'
    ) from None
  except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError) as error:
    raise InputError(
      f'{str(path)!r}: got a truncated or damaged npz file ({error}); fetch it again'
    ) from None


def write_npz(path, arrays):
  """An uncompressed npz file."""
  with open(path, 'wb') as file:
    np.savez(file, **arrays)


def read_safetensors(path):
  """{name: float32 array} of a safetensors file, or of a folder with model.safetensors or its
  shards.
  """
  path, result = pathlib.Path(path), {}
  for file in _shards(path) if path.is_dir() else [path]:
    result |= _read_shard(file)
  return result


def _shards(folder):
  index = folder / INDEX
  if (folder / 'model.safetensors').is_file() or not index.is_file():
    return [folder / 'model.safetensors']
  try:
    files = sorted(set(json.loads(index.read_text())['weight_map'].values()))
  except (ValueError, KeyError, AttributeError):
    raise InputError(f'{str(index)!r}: got no index of safetensors files; fetch it again') from None
  return [folder / os.path.basename(f) for f in files]


def _read_shard(path):
  import safetensors.numpy

  try:
    return {name: _float32(x, name, path) for name, x in safetensors.numpy.load_file(path).items()}
  except OSError as error:
    raise InputError(
      f'{str(path)!r}: cannot be read ({error.strerror or error}); a half-written folder?'
    ) from None
  except safetensors.SafetensorError as error:
    raise InputError(
      f'{str(path)!r}: got a truncated or damaged safetensors file ({error})'
    ) from None


def metadata(path):
  """The {text: text} in the head of a safetensors file."""
  import safetensors

  with safetensors.safe_open(path, 'numpy') as file:
    return file.metadata() or {}


def write_safetensors(path, arrays, about=None):
  import safetensors.numpy

  safetensors.numpy.save_file(
    {k: np.array(x, order='C') for k, x in arrays.items()}, path, metadata=about
  )


def rounded(arrays, dtype):
  """The arrays in the dtype of a file: 'float32', 'bfloat16' or 'float16'; a lone number (the
  temperature) stays.
  """
  import ml_dtypes

  kind = {'bfloat16': ml_dtypes.bfloat16}.get(dtype) or np.dtype(dtype)
  return {k: np.asarray(x).astype(kind if np.ndim(x) else np.float32) for k, x in arrays.items()}


def _float32(x, name, path):
  if x.dtype.kind not in 'fV' and x.dtype.name != 'bfloat16':
    raise InputError(f'{str(path)!r}: {name}: got {x.dtype}; expected numbers with a fraction')
  if (
    x.dtype.kind == 'V' and x.dtype.itemsize == 2 and x.dtype.name != 'bfloat16'
  ):  # bfloat16, as np.load sees it
    import ml_dtypes

    x = x.view(ml_dtypes.bfloat16)
  return np.asarray(x, np.float32)


class Reader:
  """Named arrays that are taken one by one, shapes checked; at the end none may be left."""

  def __init__(self, arrays, where):
    self.arrays, self.where, self.left = arrays, where, set(arrays)

  def __contains__(self, name):
    return name in self.arrays

  def shape(self, name):
    return self.peek(name).shape

  def peek(self, name):
    if name not in self.arrays:
      raise InputError(
        f'{self.where}: got no {name!r} among {len(self.arrays)} arrays; expected it'
        f'{did_you_mean(name, self.arrays)}'
      )
    return self.arrays[name]

  def take(self, name, *shape):
    x = self.peek(name)
    if x.shape != shape:
      raise InputError(f'{self.where}: {name}: got shape {x.shape}; expected {shape}')
    self.left.discard(name)
    return x

  def count(self, template):
    """How many of template.format(0), (1), ... there are."""
    n = 0
    while template.format(n) in self.arrays:
      n += 1
    return n

  def done(self):
    if self.left:
      raise InputError(
        f'{self.where}: got {len(self.left)} arrays that no part of this model is, such as '
        f'{min(self.left)!r}'
      )

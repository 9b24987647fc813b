"""Files of named arrays: npz and safetensors. Pickles are never loaded."""

import json
import os
import pathlib
import zipfile
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.core.strict import did_you_mean

INDEX = 'model.safetensors.index.json'


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
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
    got = 'no npz file'
    if 'pickle' in str(error).lower():
      got = 'pickled objects, which may run code'
    raise InputError(f'{str(path)!r}: got {got}; expected an npz file of plain arrays') from None
  except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError) as error:
    raise InputError(
      f'{str(path)!r}: got a truncated or damaged npz file ({error}); fetch it again'
    ) from None


def write_npz(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
  """An uncompressed npz file."""
  with open(path, 'wb') as file:
    np.savez(file, **arrays)


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """{name: float32 array} of a safetensors file, or of a folder with one, whole or in shards."""
  path = pathlib.Path(path)
  files = [path]
  if path.is_dir():
    files = _shards(path)
  result = {}
  for file in files:
    result |= _read_shard(file)
  return result


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
  index = folder / INDEX
  if (folder / 'model.safetensors').is_file() or not index.is_file():
    return [folder / 'model.safetensors']
  try:
    files = sorted(set(json.loads(index.read_text())['weight_map'].values()))
  except (ValueError, KeyError, AttributeError):
    raise InputError(f'{str(index)!r}: got no index of safetensors files; fetch it again') from None
  # Only base names: an index must not point outside of its folder.
  return [folder / os.path.basename(f) for f in files]


def _read_shard(path: pathlib.Path) -> dict[str, np.ndarray]:
  import safetensors.numpy

  try:
    tensors = safetensors.numpy.load_file(path)
    return {name: _float32(x, name, path) for name, x in tensors.items()}
  except OSError as error:
    raise InputError(
      f'{str(path)!r}: cannot be read ({error.strerror or error}); a half-written folder?'
    ) from None
  except safetensors.SafetensorError as error:
    raise InputError(
      f'{str(path)!r}: got a truncated or damaged safetensors file ({error})'
    ) from None


def metadata(path: str | os.PathLike) -> dict[str, str]:
  """The {text: text} in the head of a safetensors file."""
  import safetensors

  with safetensors.safe_open(path, 'numpy') as file:
    return file.metadata() or {}


def write_safetensors(
  path: str | os.PathLike,
  arrays: Mapping[str, np.ndarray],
  about: dict[str, str] | None = None,
) -> None:
  import safetensors.numpy

  # Many parameters are transposed views; the file holds C order.
  contiguous = {name: np.array(x, order='C') for name, x in arrays.items()}
  safetensors.numpy.save_file(contiguous, path, metadata=about)


def rounded(arrays: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
  """The arrays in the dtype of a file: 'float32', 'bfloat16' or 'float16'. Scalars stay float32."""
  file_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  result = {}
  for name, x in arrays.items():
    scalar = np.ndim(x) == 0  # the temperature, whose rounding would scale every logit
    result[name] = np.asarray(x).astype(np.float32 if scalar else file_dtype)
  return result


def _float32(x: np.ndarray, name: str, path: str | os.PathLike) -> np.ndarray:
  bfloat16 = x.dtype.name == 'bfloat16'
  if x.dtype.kind not in 'fV' and not bfloat16:
    raise InputError(f'{str(path)!r}: {name}: got {x.dtype}; expected numbers with a fraction')
  if x.dtype.kind == 'V' and x.dtype.itemsize == 2 and not bfloat16:
    # npz has no bfloat16: np.load gives raw two-byte values.
    x = x.view(ml_dtypes.bfloat16)
  return np.asarray(x, np.float32)


class Reader:
  """Named arrays that are taken one by one, shapes checked; at the end none may be left.

  where: what the arrays are of, for errors.
  """

  def __init__(self, arrays: Mapping[str, np.ndarray], where: str):
    self.arrays = arrays
    self.where = where
    self.left = set(arrays)

  def __contains__(self, name: str) -> bool:
    return name in self.arrays

  def shape(self, name: str) -> tuple[int, ...]:
    return self.peek(name).shape

  def peek(self, name: str) -> np.ndarray:
    """The array, which stays to be taken."""
    if name not in self.arrays:
      raise InputError(
        f'{self.where}: got no {name!r} among {len(self.arrays)} arrays; expected it'
        f'{did_you_mean(name, self.arrays)}'
      )
    return self.arrays[name]

  def take(self, name: str, *shape: int) -> np.ndarray:
    x = self.peek(name)
    if x.shape != shape:
      raise InputError(f'{self.where}: {name}: got shape {x.shape}; expected {shape}')
    self.left.discard(name)
    return x

  def count(self, template: str) -> int:
    """The number of consecutive names template.format(0), (1), ... that exist."""
    n = 0
    while template.format(n) in self.arrays:
      n += 1
    return n

  def done(self) -> None:
    if self.left:
      raise InputError(
        f'{self.where}: got {len(self.left)} arrays that no part of this model is, such as '
        f'{min(self.left)!r}'
      )

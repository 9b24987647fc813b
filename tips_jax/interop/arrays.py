"""Files of named arrays: npz and safetensors. Pickles are never loaded."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tips_jax.core import strict
from tips_jax.core.errors import InputError
from tips_jax.core.strict import did_you_mean

INDEX = 'model.safetensors.index.json'
_HEADERS = {
  (1, 0): np.lib.format.read_array_header_1_0,
  (2, 0): np.lib.format.read_array_header_2_0,
}
# An npz file of zeros alone is a thousand times smaller than its arrays, weights a little.
_MOST_EXPANDED = 100


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """{name: float32 array} of an npz file; InputError for a damaged, pickled or foreign one, and for
  numbers that are not finite.
  """
  result = {}
  try:
    with zipfile.ZipFile(path) as archive:
      members = archive.infolist()
      most = _MOST_EXPANDED * max(os.path.getsize(path), 1 << 20)
      if sum(member.file_size for member in members) > most:
        raise ValueError(f'it expands to more than {_MOST_EXPANDED} times its size')
      for member in members:
        name = member.filename.removesuffix('.npy').removeprefix('params/')
        if name in result:
          raise ValueError(f'two arrays {name!r}')
        result[name] = _float32(_npy(archive, member), name, path)
  except InputError:
    raise
  except OSError as error:
    raise InputError(f'{str(path)!r}: cannot be read ({error.strerror or error})') from None
  except Exception as error:  # zipfile, its decompressors and NumPy raise a dozen kinds
    raise InputError(
      f'{str(path)!r}: got no npz file, or a truncated or damaged one ({error}); expected one of '
      'plain arrays, without pickled objects'
    ) from None
  return result


def _npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
  """An array of a zip, read to the end of its member: only there its checksum is compared."""
  with archive.open(member) as file:
    version = np.lib.format.read_magic(file)
    shape, fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject:
      raise ValueError(f'{member.filename}: pickled objects, which may run code')
    # Before anything of that size is allocated.
    size = math.prod(shape) * dtype.itemsize
    if size != member.file_size - file.tell():
      raise ValueError(f'{member.filename}: an array of {size} bytes in another number of them')
    flat = np.frombuffer(file.read(), dtype)
  return flat.reshape(shape, order='F' if fortran else 'C')


def write_npz(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
  """An uncompressed npz file."""
  with open(path, 'wb') as file:
    np.savez(file, **arrays)


@dataclasses.dataclass(frozen=True)
class Stored:
  """An array of a safetensors file that is not read yet."""

  path: pathlib.Path
  name: str
  shape: tuple[int, ...]

  def read(self) -> np.ndarray:
    """The array as float32; InputError where it is damaged, or a number is not finite."""
    # Opened anew for each: what was read of a mapped file is in memory until it is closed.
    return _opened(
      self.path, lambda file: _float32(file.get_tensor(self.name), self.name, self.path)
    )


def open_safetensors(path: str | os.PathLike) -> dict[str, Stored]:
  """{name: array to be read} of a safetensors file, or of a folder with one, whole or in shards."""
  path = pathlib.Path(path)
  files = [path]
  if path.is_dir():
    files = _shards(path)
  result = {}
  for file in files:
    shard = _opened(file, functools.partial(_names, file))
    for name in shard.keys() & result.keys():
      raise InputError(f'{str(file)!r}: got a second array {name!r}; expected one in all shards')
    result |= shard
  return result


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """{name: float32 array}, as `open_safetensors`."""
  return {name: stored.read() for name, stored in open_safetensors(path).items()}


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
  index = folder / INDEX
  if (folder / 'model.safetensors').is_file() or not index.is_file():
    return [folder / 'model.safetensors']
  shards = strict.value(dict[str, str], read_json(index).get('weight_map'), f'{index}: weight_map')
  # Only base names: an index must not point outside of its folder.
  return [folder / name for name in sorted(set(map(os.path.basename, shards.values())))]


def _names(path: pathlib.Path, file: Any) -> dict[str, Stored]:
  shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
  return {name: Stored(path, name, tuple(shape)) for name, shape in shapes.items()}


def _opened(path: pathlib.Path, use: Callable[[Any], Any]) -> Any:
  """use(an open safetensors file); InputError for a file that cannot be read."""
  import safetensors

  try:
    with safetensors.safe_open(path, 'numpy') as file:
      return use(file)
  except InputError:
    raise
  except OSError as error:
    raise InputError(
      f'{str(path)!r}: cannot be read ({error.strerror or error}); a half-written folder?'
    ) from None
  except Exception as error:  # its own, and those of types that NumPy lacks
    raise InputError(
      f'{str(path)!r}: got a truncated or damaged safetensors file ({error})'
    ) from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file; InputError for anything else."""
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise InputError(
      f'{str(path)!r}: cannot be read ({error.strerror}); a half-written folder?'
    ) from None
  except (ValueError, RecursionError) as error:
    raise InputError(f'{str(path)!r}: cannot be read ({error}): no JSON') from None
  if not isinstance(content, dict):
    raise InputError(f'{str(path)!r}: got {type(content).__name__}; expected a JSON object')
  return content


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
  return finite(np.asarray(x, np.float32), f'{str(path)!r}: {name}')


def finite(x: np.ndarray, where: str) -> np.ndarray:
  """x; InputError where a number of it is NaN or infinite."""
  bad = x.size - np.count_nonzero(np.isfinite(x))
  if bad:
    raise InputError(f'{where}: got {bad} of {x.size} numbers that are not finite; fetch it again')
  return x


class Reader:
  """Named arrays that are taken out one by one, shapes checked; at the end none may be left.

  arrays: becomes empty, so that its owner does not keep what is already copied elsewhere.
  where: what the arrays are of, for errors.
  """

  def __init__(self, arrays: dict[str, np.ndarray | Stored], where: str):
    self.arrays = arrays
    self.where = where

  def __contains__(self, name: str) -> bool:
    return name in self.arrays

  def shape(self, name: str, rank: int) -> tuple[int, ...]:
    """The shape of an array; InputError unless it has `rank` dimensions."""
    shape = self._known(name).shape
    if len(shape) != rank:
      raise InputError(f'{self.where}: {name}: got shape {shape}; expected {rank} dimensions')
    return shape

  def peek(self, name: str) -> np.ndarray:
    """The array, which stays to be taken."""
    x = self._known(name)
    if isinstance(x, Stored):
      x = x.read()
    return x

  def _known(self, name):
    if name not in self.arrays:
      raise InputError(
        f'{self.where}: got no {name!r} among {len(self.arrays)} arrays; expected it'
        f'{did_you_mean(name, self.arrays)}'
      )
    return self.arrays[name]

  def take(self, name: str, *shape: int) -> np.ndarray:
    got = self._known(name).shape
    if got != shape:
      raise InputError(f'{self.where}: {name}: got shape {got}; expected {shape}')
    x = self.peek(name)
    del self.arrays[name]
    return x

  def count(self, template: str) -> int:
    """The number of consecutive names template.format(0), (1), ... that exist."""
    n = 0
    while template.format(n) in self.arrays:
      n += 1
    return n

  def done(self) -> None:
    if self.arrays:
      raise InputError(
        f'{self.where}: got {len(self.arrays)} arrays that no part of this model is, such as '
        f'{min(self.arrays)!r}'
      )

"""NumPy arrays of a pickle, without NumPy: what it calls is replaced by functions of this module.

A pickle from the web may run code, and NumPy's own constructors crash on states that somebody made
up.
"""

import math
import pickle
import re
from typing import Any, BinaryIO

import numpy as np

_NUMBERS = re.compile(r'[<>|=]?[fiub][1248]')
_MOST_DIMENSIONS = 32


def arrays_of_pickle(file: BinaryIO) -> Any:
  """The dicts, lists and arrays of numbers in a pickle, of Python 2 too; ValueError or
  pickle.UnpicklingError for any other.
  """
  return _finished(_Unpickler(file, encoding='latin1').load())


# That of C keeps a table as long as the largest number in the pickle.
class _Unpickler(pickle._Unpickler):
  def find_class(self, module: str, name: str) -> Any:
    if module.split('.')[0] == 'numpy' and name in _OF_NUMPY:
      return _OF_NUMPY[name]
    if (module, name) == ('_codecs', 'encode'):
      return _encode
    raise pickle.UnpicklingError(f'got {module}.{name}; expected NumPy arrays only')


class _Dtype:
  """A type of numbers, as NumPy's own pickles build it."""

  def __init__(self, code, *_):
    if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
      raise pickle.UnpicklingError(f'got the dtype {code!r}; expected numbers')
    self._code = code

  def __setstate__(self, state):
    order = state[1]
    if order not in ('<', '>', '|', '='):
      raise pickle.UnpicklingError(f'got the byte order {order!r}')
    self._code = order + self._code.lstrip('<>|=')

  def numpy(self):
    return np.dtype(self._code)


class _Array:
  """An array, as NumPy's own pickles build it: first empty, then by its state."""

  def __init__(self, *_):
    self.value = None

  def __setstate__(self, state):
    _, shape, dtype, fortran, data = state
    self.value = _array(data, dtype, shape, 'F' if fortran else 'C')


def _from_buffer(data, dtype, shape, order):
  result = _Array()
  result.value = _array(data, dtype, shape, order)
  return result


def _array(data, dtype, shape, order):
  if isinstance(data, str):  # Python 2 has no bytes
    data = data.encode('latin1')
  if not isinstance(dtype, _Dtype) or len(shape) > _MOST_DIMENSIONS or min(shape, default=1) < 0:
    raise pickle.UnpicklingError(f'got an array of shape {shape!r}')
  numbers = np.frombuffer(data, dtype.numpy())
  if math.prod(shape) != numbers.size:
    raise pickle.UnpicklingError(f'got {numbers.size} numbers for the shape {shape}')
  return numbers.reshape(shape, order=order)


def _encode(text, encoding):
  if encoding != 'latin1':
    raise pickle.UnpicklingError(f'got the encoding {encoding!r}; expected latin1')
  return text.encode('latin1')


_OF_NUMPY = {
  '_reconstruct': _Array,
  'ndarray': _Array,
  'dtype': _Dtype,
  '_frombuffer': _from_buffer,
}


def _finished(value):
  """The value with its arrays in place of what built them."""
  if isinstance(value, _Array):
    return value.value
  if isinstance(value, dict):
    return {key: _finished(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finished(item) for item in value]
  return value

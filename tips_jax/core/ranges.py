"""What fields of the schema are made of: numbers with their ranges, groups, and checks of them."""

import dataclasses
from typing import Annotated, Literal

from tips_jax.core.errors import InputError
from tips_jax.core.strict import Range

# Ranges end where a number means nothing or no machine could hold what it asks for.
Count = Annotated[int, Range(1, 1e9)]
Whole = Annotated[int, Range(0, 1e9)]  # a count that may be none
Pixels = Annotated[int, Range(1, 8192)]
Patch = Annotated[int, Range(1, 256)]  # pixels
Grid = Annotated[int, Range(1, 1024)]  # patches
Width = Annotated[int, Range(1, 1 << 18)]  # numbers in a vector
Layers = Annotated[int, Range(1, 256)]
Entries = Annotated[int, Range(1, 1 << 24)]  # of a vocabulary
Bytes = Annotated[int, Range(0, 1e15)]
Processes = Annotated[int, Range(0, 1024)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 0.9999999)]  # of a moving average: 1 would never move
Seconds = Annotated[float, Range(1e-3, 1e9)]
Factor = Annotated[float, Range(0, 1e6)]
Drop = Annotated[float, Range(0, 0.99)]  # share that is dropped: of all, nothing would be left


def divides(field: str, number: int, what: str, whole: int) -> None:
  """InputError for a number that does not divide a whole."""
  if whole % number:
    raise InputError(f'{field}: got {number}; expected a divisor of the {what} {whole}')


def has_sines(positions: str, width: int) -> None:
  """InputError for sines of a width that has no place for four."""
  if positions == 'sincos' and width % 4:
    raise InputError(f"positions: got 'sincos' with a width of {width}; expected a multiple of 4")


def ascending(field: str, pair: tuple[float, float]) -> None:
  """InputError for a pair whose first number is the larger."""
  if pair[0] > pair[1]:
    raise InputError(f'{field}: got {pair}; expected the least first')


def config(cls: type) -> type:
  """A frozen, keyword-only dataclass."""
  return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@config
class Ramp:
  """A value that moves from `start` to `end` between fractions `begin` and `until` of a run."""

  start: float  # in the range of the field that holds the ramp, as the end
  end: float
  begin: Share = 0.0
  until: Share = 1.0
  shape: Literal['linear', 'cosine'] = 'linear'

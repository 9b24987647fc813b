"""Damaged copies of a file's bytes, for hypothesis: the same ones in every run."""

from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZ = settings(
  max_examples=300,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(HealthCheck),
)


@st.composite
def damaged(draw: Callable, whole: bytes) -> bytes:
  """`whole` with a few changed bytes, and perhaps a part cut out, repeated or put in."""
  data = bytearray(whole)
  for _ in range(draw(st.integers(0, 4))):
    data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
  kind = draw(st.sampled_from(['as it is', 'as it is', 'cut', 'end', 'repeat', 'insert']))
  at = draw(st.integers(0, len(data)))
  length = draw(st.integers(0, 64))
  if kind == 'cut':
    del data[at : at + length]
  elif kind == 'end':
    del data[at:]
  elif kind == 'repeat':
    data[at:at] = data[at : at + length]
  elif kind == 'insert':
    data[at:at] = draw(st.binary(max_size=64))
  return bytes(data)

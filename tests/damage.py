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
def damaged(draw: Callable, whole: bytes, pieces: tuple[bytes, ...] = ()) -> bytes:
  """`whole` with a few changed bytes, and perhaps parts cut out, repeated or put in.

  pieces: what may be put in, beside any bytes: of a format, what its readers stumble over.
  """
  data = bytearray(whole)
  for _ in range(draw(st.integers(0, 4))):
    data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
  inserted = st.binary(max_size=64)
  if pieces:
    inserted |= st.sampled_from(pieces)
  kinds = st.sampled_from(['as it is', 'as it is', 'cut', 'end', 'repeat', 'insert'])
  for kind in draw(st.lists(kinds, min_size=1, max_size=3)):
    at = draw(st.integers(0, len(data)))
    length = draw(st.integers(0, 64))
    if kind == 'cut':
      del data[at : at + length]
    elif kind == 'end':
      del data[at:]
    elif kind == 'repeat':
      data[at:at] = data[at : at + length]
    elif kind == 'insert':
      data[at:at] = draw(inserted)
  return bytes(data)

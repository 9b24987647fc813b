"""Damage for fuzz tests: bytes that are changed, cut, repeated or put in."""

from hypothesis import strategies as st

_PIECES = st.sampled_from(
  [b'"', b"'", b'\\', b'\n', b'\r', b'\0', b',', b'\t', b'[' * 3000, b'{"', b'9' * 40, b'\xff\xfe']
)


@st.composite
def mutated(draw, data: bytes) -> bytes:
  """`data` with one to six changes."""
  for _ in range(draw(st.integers(1, 6))):
    at = draw(st.integers(0, len(data)))
    end = at + draw(st.integers(0, 8))
    kind = draw(st.sampled_from(['change', 'insert', 'cut', 'repeat']))
    if kind == 'change':
      data = data[:at] + draw(st.binary(max_size=end - at)) + data[end:]
    elif kind == 'insert':
      data = data[:at] + draw(_PIECES) + data[at:]
    elif kind == 'cut':
      data = data[:at]
    else:
      data = data[:end] + data[at:]
  return data

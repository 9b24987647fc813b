"""CRC-32C (Castagnoli), the checksum of TFRecord files."""

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # reversed, as the bits come: the least significant first
_BLOCK = 512  # bytes whose parts are looked up together
_AT_ONCE = 64  # blocks: what lies in a processor's cache
# These bytes bring the register from 0 to 0xFFFFFFFF, where it has to start. Zeros in front of them
# change nothing, so that every message has whole blocks.
_START = b'\x54\x64\x1f\x64'


@functools.cache
def _table() -> np.ndarray:
  """uint32 [_BLOCK, 256]: what a byte at a place of a block adds to the register at its end."""
  added = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    added = (added >> 1) ^ (added & 1) * np.uint32(_POLYNOMIAL)
  last = added
  rows = [last]
  while len(rows) < _BLOCK:
    added = (added >> 8) ^ last[added & 255]  # with one more zero byte behind it
    rows.append(added)
  return np.stack(rows[::-1])


def crc32c(data: bytes) -> int:
  """The CRC-32C of bytes (RFC 3720, appendix B.4)."""
  table = _table()
  message = _START + data
  message = bytes(-len(message) % _BLOCK) + message
  blocks = np.frombuffer(message, np.uint8).reshape(-1, _BLOCK)
  rows = 256 * np.arange(_BLOCK)
  first, second, third, fourth = table[:4].tolist()
  register = 0
  for start in range(0, len(blocks), _AT_ONCE):
    # mode: an index that is not checked; all are in the table.
    added = table.ravel().take(rows + blocks[start : start + _AT_ONCE], mode='wrap')
    for block in np.bitwise_xor.reduce(added, axis=1).tolist():
      # The register so far acts as if it were added to the next four bytes.
      register = (
        block
        ^ first[register & 255]
        ^ second[register >> 8 & 255]
        ^ third[register >> 16 & 255]
        ^ fourth[register >> 24]
      )
  return register ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
  """The masked CRC-32C of a TFRecord file: rotated by 15 bits, plus a constant."""
  crc = crc32c(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

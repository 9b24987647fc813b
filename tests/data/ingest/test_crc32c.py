"""CRC-32C against published values."""

import random

import pytest
from tensorboardX import record_writer

from tips_jax.data.ingest import crc32c


@pytest.mark.parametrize(
  'data, expected',
  [
    # RFC 3720, appendix B.4.
    (bytes(32), 0x8A9136AA),
    (b'\xff' * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    # The catalog of CRC algorithms, CRC-32/ISCSI.
    (b'123456789', 0xE3069283),
    (b'', 0),
  ],
)
def test_published_values(data, expected):
  assert crc32c.crc32c(data) == expected


def bit_by_bit(data):
  register = 0xFFFFFFFF
  for byte in data:
    register ^= byte
    for _ in range(8):
      register = register >> 1 ^ 0x82F63B78 * (register & 1)
  return register ^ 0xFFFFFFFF


@pytest.mark.parametrize('size', [1, 3, 507, 508, 509, 1024, 40_000])
def test_any_length_gives_the_sum_of_the_definition(size):
  data = random.Random(size).randbytes(size)
  assert crc32c.crc32c(data) == bit_by_bit(data)


def test_the_mask_is_that_of_another_writer():
  for data in (b'', bytes(8), b'a record'):
    assert crc32c.masked(data) == record_writer.masked_crc32c(data)

"""Mutated tars, compressed and not: samples, or an InputError of one line."""

import bz2
import gzip
import io
import lzma
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.damage import FUZZ, damaged
from tips_jax.core.errors import InputError
from tips_jax.data.ingest.formats import open_input
from tips_jax.data.ingest.reader import Options

SETTINGS = settings(FUZZ, max_examples=400, deadline=10_000)
COMPRESSIONS = {'none': bytes, 'gz': gzip.compress, 'bz2': bz2.compress, 'xz': lzma.compress}


def tar(format):
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w', format=format) as archive:
    for name, data in (
      ('a' * 120 + 'ä.jpg', b'image'),
      ('b.jpg', b'x'),
      ('b.json', b'{"a": 1}'),
      ('b.txt', b'text'),
    ):
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
    info = tarfile.TarInfo('c.jpg')
    info.type = tarfile.LNKTYPE
    info.linkname = 'b.jpg'
    archive.addfile(info)
  return out.getvalue()[: 12 * 1024]


def check(path):
  try:
    samples = list(open_input(str(path), Options()))
  except InputError as error:
    assert '\n' not in str(error)
    return
  assert all(sample.image is not None or sample.problem for sample in samples)


@pytest.mark.parametrize('format', [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize('compression', COMPRESSIONS)
@SETTINGS
@given(data=st.data())
def test_a_mutated_tar_gives_samples_or_one_line(tmp_path, format, compression, data):
  whole = COMPRESSIONS[compression](tar(format))
  (tmp_path / 'a.tar').write_bytes(data.draw(damaged(whole)))
  check(tmp_path / 'a.tar')


@SETTINGS
@given(data=st.data())
def test_a_tar_whose_headers_fit_their_check_sums_gives_samples_or_one_line(tmp_path, data):
  whole = bytearray(tar(tarfile.PAX_FORMAT))
  for _ in range(data.draw(st.integers(1, 3))):
    block = data.draw(st.integers(0, len(whole) // 512 - 1)) * 512
    at = block + data.draw(st.integers(0, 511))
    whole[at] = data.draw(st.integers(0, 255))
    if whole[block + 257 : block + 262] == b'ustar':
      whole[block + 148 : block + 156] = b' ' * 8
      whole[block + 148 : block + 156] = b'%06o\0 ' % sum(whole[block : block + 512])
  (tmp_path / 'a.tar').write_bytes(whole)
  check(tmp_path / 'a.tar')

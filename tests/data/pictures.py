"""Encoded images for tests."""

import io
import zlib

import numpy as np
from PIL import Image


def picture(i, *, size=(32, 24), kind='jpeg', mode='RGB'):
  pixels = np.random.default_rng(i).integers(0, 255, (size[1], size[0], len(mode)), dtype=np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels.squeeze(), mode=None).save(out, kind)
  return out.getvalue()


def png_bomb(side=10_000):
  """A 10k x 10k PNG of a few hundred bytes: the header promises what the data does not hold."""

  def chunk(kind, data):
    return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')

  header = side.to_bytes(4, 'big') * 2 + bytes([8, 2, 0, 0, 0])
  chunks = chunk(b'IHDR', header), chunk(b'IDAT', zlib.compress(bytes(1000))), chunk(b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)

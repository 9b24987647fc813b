import io
import struct
import subprocess
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.damage import FUZZ, damaged
from tips_jax.core.schema import View
from tips_jax.data.ingest import checks
from tips_jax.data.pixels import images, views

KINDS = {
  'JPEG': {'quality': 95},
  'PNG': {},
  'WEBP': {'lossless': True},
  'TIFF': {},
  'AVIF': {'quality': 95},
}


def encode(image, kind, **options):
  out = io.BytesIO()
  image.save(out, kind, **options)
  return out.getvalue()


def picture(height=40, width=56):
  """Smooth, with another color in each corner."""
  y, x = np.mgrid[:height, :width]
  pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], -1)
  return Image.fromarray(pixels.astype(np.uint8))


def turned(image, orientation, kind, **options):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return encode(image, kind, exif=exif, **KINDS[kind], **options)


# --- orientation --------------------------------------------------------------------------------

# Which corner of the stored picture comes to the upper left: (row, column), 0 first, -1 last.
UPPER_LEFT = {
  1: (0, 0),
  2: (0, -1),
  3: (-1, -1),
  4: (-1, 0),
  5: (0, 0),
  6: (-1, 0),
  7: (-1, -1),
  8: (0, -1),
}


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', KINDS)
def test_pixels_are_upright_wherever_an_image_is_decoded(kind, orientation):
  data = turned(picture(), orientation, kind)
  want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert('RGB'))
  assert want.shape == ((56, 40, 3) if orientation > 4 else (40, 56, 3))
  corner = np.asarray(picture())[UPPER_LEFT[orientation]].astype(int)
  assert np.abs(want[0, 0] - corner).max() < 16
  np.testing.assert_array_equal(images.decode(data), want)
  np.testing.assert_array_equal(images.rgb(Image.open(io.BytesIO(data))), want)
  assert images.encoded(data)[:2] == want.shape[:2]
  assert images.size(Image.open(io.BytesIO(data))) == want.shape[:2]
  check = checks.check_image(data, min_side=1, max_pixels=10**6)
  assert check.size == want.shape[1::-1] and not check.problem
  whole = View(size=16, scale=(1, 1), ratio=(1e-9, 1e9), flip=0.0)
  crop = views.crops(data, {'v': whole}, np.random.default_rng(0))['v'][0]
  evaluated = views.evaluation(data, 16).astype(int)
  assert crop.shape == evaluated.shape
  assert np.abs(evaluated[0, 0] - corner).max() < 32


@pytest.mark.parametrize('orientation', [3, 6, 7])
def test_a_jpeg_decoded_at_a_fraction_is_upright_too(orientation):
  data = turned(picture(410, 562), orientation, 'JPEG')
  full = images.decode(data).astype(int)
  image = images.encoded(data)
  for reduction in (2, 4, 8):
    small = image.rgbx(reduction)
    assert small.shape == (-(-image.height // reduction), -(-image.width // reduction), 4)
    at = reduction // 2
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
      # The last block of a side may be a part of one.
      near = full[row * at - (row < 0), column * at - (column < 0)]
      assert np.abs(small[row, column, :3] - near).max() < 12


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_a_value_that_is_no_orientation_and_broken_exif_turn_nothing():
  for exif in (b'Exif\0\0' + b'rubbish' * 3, b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03'):
    data = encode(picture(), 'JPEG', quality=95, exif=exif)
    assert images.decode(data).shape == (40, 56, 3)
  assert images.decode(turned(picture(), 9, 'PNG')).shape == (40, 56, 3)


# --- what is accepted ---------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM', 'AVIF'])
def test_every_accepted_format_passes_the_check_and_is_decoded(kind):
  data = encode(picture(), kind)
  assert checks.check_image(data, min_side=16, max_pixels=10**6).problem == ''
  difference = images.decode(data).astype(int) - np.asarray(picture())
  assert np.abs(difference).mean() < 12


def test_jpeg_2000_is_decoded():
  data = encode(picture(), 'JPEG2000')
  np.testing.assert_array_equal(images.decode(data), np.asarray(picture()))


def test_no_other_format_is_opened_and_no_program_started(monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError('a program was started')

  monkeypatch.setattr(subprocess, 'Popen', refuse)
  for kind in ('EPS', 'ICO', 'PCX', 'TGA', 'DDS'):
    with pytest.raises(ValueError, match='no known image format'):
      images.decode(encode(picture(), kind))


@pytest.mark.parametrize(
  'pixels, kind, message',
  [
    (np.full((20, 30), 0.5, np.float32), 'TIFF', 'TIFF of floats; expected 8 or 16 bits'),
    (np.full((20, 30), 2**30, np.int32), 'TIFF', 'TIFF of integers of 32 bits'),
    (np.full((20, 30), 0.5, np.float32), 'PPM', 'PPM of floats'),
  ],
)
def test_pixels_whose_white_is_not_known_are_refused(pixels, kind, message):
  data = encode(Image.fromarray(pixels), kind)
  with pytest.raises(ValueError, match=message):
    images.decode(data)
  with pytest.raises(ValueError, match='expected 8 or 16 bits'):
    images.rgb(Image.fromarray(pixels))
  check = checks.check_image(data, min_side=1, max_pixels=10**6)
  assert check.problem == 'unreadable' and message in check.detail


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'PPM', 'JPEG2000'])
def test_sixteen_bits_are_scaled(kind):
  ramp = np.repeat(np.linspace(0, 65535, 64)[None], 40, 0).astype(np.uint16)
  got = images.decode(encode(Image.fromarray(ramp), kind))
  assert np.abs(got[5, :, 1] - ramp[5] / 257).max() <= 1


def tiff(*, bits=8, tile=16):
  """An 8 x 8 TIFF of one deflated tile."""
  tags = {256: 8, 257: 8, 258: bits, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 0, 325: 0}
  body = zlib.compress(bytes(tile * tile)[: 2**10])
  tags[324] = 8 + 2 + 12 * len(tags) + 4
  tags[325] = len(body)
  entries = [struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags.items()]
  head = b'II*\0' + struct.pack('<IH', 8, len(tags))
  return head + b''.join(entries) + bytes(4) + body


def test_a_tiff_of_twelve_bits_is_refused():
  assert images.decode(tiff()).shape == (8, 8, 3)
  with pytest.raises(ValueError, match='TIFF of 12 bits; expected 8 or 16'):
    images.decode(tiff(bits=12))


# --- bombs --------------------------------------------------------------------------------------


def with_scans(data, count):
  """A progressive JPEG whose last scan is cut down to its header, and comes often."""
  scan = data[data.rindex(b'\xff\xda') :][: 2 + 8]
  return data[:-2] + scan * (count - data.count(b'\xff\xda')) + data[-2:]


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(monkeypatch):
  data = encode(picture(), 'JPEG', progressive=True)
  assert images.decode(with_scans(data, 50)).shape == (40, 56, 3)

  def explode(*args, **kwargs):
    raise AssertionError('decoded')

  monkeypatch.setattr(images.simplejpeg, 'decode_jpeg', explode)
  monkeypatch.setattr('PIL.JpegImagePlugin.JpegImageFile.load', explode)
  with pytest.raises(ValueError, match='JPEG of 51 scans or more; expected at most 50'):
    images.decode(with_scans(data, 60))
  check = checks.check_image(with_scans(data, 60), min_side=1, max_pixels=10**6)
  assert check.problem == 'unreadable' and 'scans' in check.detail


def test_what_follows_an_image_is_not_counted_as_its_scans():
  """Phones append a film to a photo; its bytes look like markers now and then."""
  for options in ({}, {'progressive': True}):
    data = turned(picture(), 6, 'JPEG', **options)
    film = data + b'\xff\xda\x00\x02' * 100
    np.testing.assert_array_equal(images.decode(film), images.decode(data))


def test_a_tile_much_larger_than_its_tiff_is_refused():
  with pytest.raises(ValueError, match='32768 x 32768 pixels'):
    images.decode(tiff(tile=2**15))


# --- damage -------------------------------------------------------------------------------------

WHOLE = {kind: encode(picture(24, 32), kind) for kind in images.FORMATS}
WHOLE['progressive'] = encode(picture(24, 32), 'JPEG', progressive=True)
WHOLE['turned'] = turned(picture(24, 32), 6, 'JPEG')
WHOLE['palette'] = encode(picture(24, 32).quantize(16), 'PNG')
WHOLE['plain'] = simplejpeg.encode_jpeg(np.asarray(picture(24, 32)), colorsubsampling='420')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', WHOLE)
def test_a_damaged_image_is_decoded_or_a_value_error(kind):
  @FUZZ
  @given(data=st.just(None) | damaged(WHOLE[kind]))
  def check(data):
    data = data or WHOLE[kind]
    verdict = checks.check_image(data, min_side=1, max_pixels=10**6)
    assert verdict.problem in ('', 'unreadable', 'tiny', 'giant')
    try:
      pixels = images.decode(data)
    except ValueError as error:
      assert str(error) and '\n' not in str(error)
    else:
      assert pixels.dtype == np.uint8 and pixels.shape[2:] == (3,) and pixels.size

  check()


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])
@pytest.mark.parametrize('where', ['open', 'getexif', 'load'])
def test_where_memory_runs_out_no_image_is_called_broken(monkeypatch, kind, where):
  """Elsewhere, or a moment later, it can be read: a run that goes on would see other images."""
  data = encode(picture(), kind)

  def out_of_memory(*args, **named):
    raise MemoryError

  def read():
    checks.check_image(data, min_side=1, max_pixels=10**6)
    images.decode(data)

  read()
  if where == 'open':
    monkeypatch.setattr(images.Image, 'open', out_of_memory)
  elif where == 'load' or kind == 'PNG':  # TIFFs are turned by Pillow
    monkeypatch.setattr(type(images.open_image(data)), where, out_of_memory)
  else:
    return
  with pytest.raises(MemoryError):
    checks.check_image(data, min_side=1, max_pixels=10**6)
  with pytest.raises(MemoryError):
    images.decode(data)


def test_what_opencv_says_where_memory_runs_out(monkeypatch):
  def out_of_memory(*args):
    error = cv2.error('Insufficient memory')
    error.code = cv2.Error.STS_NO_MEM
    raise error

  monkeypatch.setattr(images, 'upright', out_of_memory)
  with pytest.raises(MemoryError, match='Insufficient memory'):
    images.rgb(picture())

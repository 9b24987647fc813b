import io
import re

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.pictures import picture, png_bomb
from tips_jax.data.ingest import checks


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_giant_image_is_refused_before_it_is_decoded(monkeypatch):
  def explode(self):
    raise AssertionError('decoded')

  monkeypatch.setattr('PIL.PngImagePlugin.PngImageFile.load', explode)
  check = checks.check_image(png_bomb(), min_side=16, max_pixels=50_000_000)
  assert (check.problem, check.size) == ('giant', (10_000, 10_000))
  assert (
    checks.check_image(png_bomb(100_000), min_side=16, max_pixels=50_000_000).problem == 'giant'
  )


@pytest.mark.parametrize('kind', ['jpeg', 'png', 'webp'])
def test_every_format_is_decoded_to_its_end(kind):
  whole = picture(0, size=(300, 200), kind=kind)
  assert checks.check_image(whole, min_side=16, max_pixels=10**6) == checks.Check(
    '', '', (300, 200)
  )
  assert (
    checks.check_image(whole[: len(whole) * 3 // 4], min_side=16, max_pixels=10**6).problem
    == 'unreadable'
  )


# --- masks --------------------------------------------------------------------------------------

IDS = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32) % 200


def encode(array, kind='png', mode=None, **options):
  out = io.BytesIO()
  image = Image.fromarray(array)
  (image.convert(mode) if mode else image).save(out, kind, **options)
  return out.getvalue()


def mask_of(data, *, size=(32, 24), orientation=1):
  image = checks.Check('', '', size, orientation)
  mask, problem = checks.mask_png(data, image, max_pixels=10**6)
  return mask and np.asarray(Image.open(io.BytesIO(mask))), problem


def test_a_mask_becomes_a_png_of_its_class_ids():
  assert checks.mask_png(encode(IDS), checks.Check('', '', (32, 24)), max_pixels=10**6) == (
    encode(IDS),
    '',
  )
  palette = Image.frombytes('P', (32, 24), IDS.tobytes())
  palette.putpalette(list(range(255, -1, -1)) * 3)
  for kind in ('png', 'bmp', 'gif', 'tiff'):
    out = io.BytesIO()
    palette.save(out, kind, **({'optimize': False} if kind == 'gif' else {}))
    mask, problem = mask_of(out.getvalue())
    assert problem == ''
    np.testing.assert_array_equal(mask, IDS)


@pytest.mark.parametrize(
  'data, reason',
  [
    (b'', 'no mask'),
    (encode(IDS, 'jpeg'), 'a lossy JPEG, which changes class ids; expected a PNG'),
    (encode(IDS, 'tiff', compression='jpeg'), 'a lossy TIFF'),
    (encode(IDS, 'jpeg2000'), 'a lossy JPEG2000'),
    (encode(IDS.astype(np.uint16)), 'got 16 bits; expected class ids of 8 bits'),
    (encode(IDS, mode='1'), 'got 1 bit'),
    (encode(IDS, mode='RGB'), r'got colors \(RGB\)'),
    (encode(IDS[:, :20]), 'got 20x24; expected 32x24'),
    (encode(IDS)[:60], '.'),
    (b'rubbish', 'no known image format'),
  ],
)
def test_what_is_no_mask_is_refused_with_the_reason(data, reason):
  mask, problem = mask_of(data)
  assert mask is None and re.search(reason, problem)


@pytest.mark.parametrize('orientation', [5, 6, 7, 8])
def test_a_mask_of_the_stored_size_is_turned_with_its_image(orientation):
  """The image is stored as 32 x 24 and stands 24 x 32."""
  exif = Image.Exif()
  exif[0x0112] = orientation
  stored = picture(0, size=(32, 24), kind='png')
  out = io.BytesIO()
  Image.open(io.BytesIO(stored)).save(out, 'png', exif=exif)
  image = checks.check_image(out.getvalue(), min_side=1, max_pixels=10**6)
  assert image == checks.Check('', '', (24, 32), orientation)
  like_image = Image.fromarray(IDS)
  like_image.getexif()[0x0112] = orientation
  want = np.asarray(ImageOps.exif_transpose(like_image))
  got, problem = mask_of(encode(IDS), size=image.size, orientation=orientation)
  assert problem == ''
  np.testing.assert_array_equal(got, want)
  # One of the upright size stays as it is; its own EXIF is applied.
  got, _ = mask_of(encode(want), size=image.size, orientation=orientation)
  np.testing.assert_array_equal(got, want)
  got, _ = mask_of(encode(IDS, exif=exif), size=image.size, orientation=orientation)
  np.testing.assert_array_equal(got, want)

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from tips_jax.core.schema import View
from tips_jax.data.pixels import images, views

GLOBAL = View(size=64, scale=(0.4, 1.0))
LOCAL = View(size=28, count=6, scale=(0.05, 0.4), flip=0.0)


def texture(height, width, seed=0):
  """A 1/f image, as photographs have it."""
  rng = np.random.default_rng(seed)
  image = np.zeros((height, width, 3))
  for octave in range(7):
    step = 2**octave
    noise = rng.normal(size=(height // step + 2, width // step + 2, 3))
    for c in range(3):
      layer = Image.fromarray(noise[..., c].astype(np.float32)).resize(
        (width, height), Image.Resampling.BICUBIC
      )
      image[..., c] += step**0.9 * np.asarray(layer)
  return np.clip((image - image.mean()) / image.std() * 45 + 128, 0, 255).astype(np.uint8)


def jpeg(image, quality=95):
  return simplejpeg.encode_jpeg(
    np.ascontiguousarray(image), quality=quality, colorsubsampling='444'
  )


def encode(image, kind, **kwargs):
  out = io.BytesIO()
  image.save(out, kind, **kwargs)
  return out.getvalue()


def whole(size):
  """A view that always is the whole (square) image."""
  return {'v': View(size=size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)}


def crop_whole(data, size):
  return views.crops(data, whole(size), np.random.default_rng(0))['v'][0].astype(int)


def reference_boxes(height, width, view, count, rng):
  """The law of RandomResizedCrop, all tries at once: [count, 4] of top, left, height, width."""
  area = height * width * rng.uniform(*view.scale, size=(count, 10))
  ratio = np.exp(rng.uniform(*np.log(view.ratio), size=(count, 10)))
  w, h = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
  fits = (w <= width) & (h <= height) & (w > 0) & (h > 0)
  keep = fits.any(1)
  first = fits.argmax(1)[keep]
  h, w = h[keep, first], w[keep, first]
  return np.stack([rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w], 1)


@pytest.mark.parametrize('view', [GLOBAL, LOCAL])
def test_boxes_follow_the_law_of_random_resized_crop(view):
  height, width, count = 300, 400, 6000
  view = View(size=view.size, count=count, scale=view.scale, flip=0.3)
  drawn = np.array(views.draw_boxes(height, width, view, np.random.default_rng(0)))
  expected = reference_boxes(height, width, view, 4 * count, np.random.default_rng(1))
  top, left, h, w, flip = drawn.T
  assert (
    (top >= 0).all()
    and (left >= 0).all()
    and (top + h <= height).all()
    and (left + w <= width).all()
  )
  assert abs(flip.mean() - 0.3) < 0.03
  shares = np.linspace(0.05, 0.95, 10)
  for name, function, span in (
    ('area', lambda b: b[:, 2] * b[:, 3] / (height * width), view.scale[1] - view.scale[0]),
    ('ratio', lambda b: np.log(b[:, 3] / b[:, 2]), np.log(16 / 9)),
    ('top', lambda b: b[:, 0] / height, 1),
    ('left', lambda b: b[:, 1] / width, 1),
  ):
    got, want = np.quantile(function(drawn), shares), np.quantile(function(expected), shares)
    assert np.abs(got - want).max() < 0.03 * span, name


@pytest.mark.parametrize(
  'height, width, expected', [(20, 400, (0, 186, 20, 27)), (400, 20, (186, 0, 27, 20))]
)
def test_an_image_too_slim_for_any_box_gives_its_center(height, width, expected):
  view = View(size=8, count=3, scale=(1.0, 1.0), flip=0.0)
  assert views.draw_boxes(height, width, view, np.random.default_rng(0)) == [(*expected, False)] * 3


def test_a_view_of_all_of_the_area_and_any_ratio_is_the_whole_image():
  view = View(size=8, scale=(1.0, 1.0), ratio=(0.01, 100.0), flip=0.0)  # big_vision's resize
  for height, width in ((300, 400), (30, 200), (7, 7)):
    for seed in range(5):
      drawn = views.draw_boxes(height, width, view, np.random.default_rng(seed))
      assert drawn == [(0, 0, height, width, False)]


def rounded(start, length, scale, limit):
  length = max(1, round(length / scale))
  return min(round(start / scale), limit // scale - length) * scale, length * scale


@pytest.mark.parametrize('height, width', [(300, 400), (96, 80), (1024, 704), (616, 816), (32, 40)])
def test_crops_equal_antialiased_crops_of_the_full_decode(height, width):
  """Against Pillow's bilinear resize of the same boxes, rounded as `crops` says.

  What remains: the blur comes in steps, DCT scaling is another low-pass. On this texture (deviation
  45) a shift of half an output pixel costs 7 to 10 levels, a wrong box, flip or channel order 25
  and more.
  """
  data = jpeg(texture(height, width))
  full = Image.fromarray(simplejpeg.decode_jpeg(data))
  config = {'global': GLOBAL, 'local': LOCAL}
  errors = []
  for seed in range(8):
    got = views.crops(data, config, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    for name, view in config.items():
      assert (
        got[name].shape == (view.count, view.size, view.size, 3) and got[name].dtype == np.uint8
      )
      for crop, (top, left, h, w, flip) in zip(
        got[name], views.draw_boxes(height, width, view, rng)
      ):
        scale = 2 ** max(0, int(np.floor(np.log2(min(h, w) / view.size))))
        (top, h), (left, w) = rounded(top, h, scale, height), rounded(left, w, scale, width)
        want = np.asarray(
          full.resize(
            (view.size,) * 2, Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)
          )
        )
        want = want[:, ::-1] if flip else want
        difference = crop.astype(float) - want
        assert abs(difference.mean()) < 1.5
        errors.append(np.sqrt((difference**2).mean()))
  assert np.mean(errors) < 3.5 and max(errors) < 6.5, (np.mean(errors), max(errors))


@pytest.mark.parametrize('height, width', [(300, 400), (1403, 1102)])
def test_a_gradient_shows_each_box_within_half_an_output_pixel(height, width):
  y, x = np.mgrid[:height, :width]
  data = jpeg(
    np.stack([x * 255 / width, y * 255 / height, 0 * x + 128], -1).astype(np.uint8), quality=100
  )
  view = View(size=32, count=8, scale=(0.1, 1.0))
  for seed in range(5):
    crops = views.crops(data, {'v': view}, np.random.default_rng(seed))['v'].astype(float)
    for crop, (top, left, h, w, flip) in zip(
      crops, views.draw_boxes(height, width, view, np.random.default_rng(seed))
    ):
      crop = crop[:, ::-1] if flip else crop
      # at the middle of the crop no border matters; 2 levels: truncation to uint8, JPEG, fast DCT
      assert (
        abs(crop[:, 15:17, 0].mean() - (left + w / 2) * 255 / width)
        < w * 255 / width / 32 * 0.75 + 2
      )
      assert (
        abs(crop[15:17, :, 1].mean() - (top + h / 2) * 255 / height)
        < h * 255 / height / 32 * 0.75 + 2
      )
      slope = (crop[:, -2, 0].mean() - crop[:, 1, 0].mean()) / (w * 255 / width * 29 / 32)
      assert 0.9 < slope < 1.1 or w * 255 / width < 40


def test_jpegs_are_read_at_the_coarsest_scale_that_loses_nothing(monkeypatch):
  seen = []
  real = simplejpeg.decode_jpeg

  def spy(*args, **kwargs):
    image = real(*args, **kwargs)
    seen.append(image.shape)
    return image

  monkeypatch.setattr(images.simplejpeg, 'decode_jpeg', spy)
  data = jpeg(texture(512, 640))
  for size, expected in (
    (512, 512),
    (257, 512),
    (256, 256),
    (129, 256),
    (128, 128),
    (64, 64),
    (16, 64),
  ):
    views.crops(data, whole(size), np.random.default_rng(0))
    assert seen.pop()[0] == expected
  mixed = {**whole(64), 'small': View(size=60, scale=(0.05, 0.05), ratio=(1.0, 1.0))}
  views.crops(data, mixed, np.random.default_rng(0))
  assert (
    seen.pop()[0] == 256
  )  # the small box has 128 pixels a side: a quarter of the scale would enlarge it


@pytest.mark.parametrize('size', [30, 50, 70, 80])
def test_shrinking_keeps_detail_and_does_not_alias(size):
  """On white noise the upper half of the spectrum has about the power that Pillow's antialiased
  resize leaves there.

  Exact area averaging has 1.7 to 2.4 times as much, an unfiltered linear resize 24, 9, 4.4, 3.3
  times at these sizes.
  """
  image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
  data = encode(Image.fromarray(image), 'PNG')
  power = []
  for crop in (
    crop_whole(data, size),
    np.asarray(Image.fromarray(image).resize((size, size), 2)).astype(int),
  ):
    spectrum = np.abs(np.fft.fft2(crop - crop.mean((0, 1)), axes=(0, 1))) ** 2
    frequency = np.abs(np.fft.fftfreq(size))
    power.append(spectrum[np.maximum(frequency[:, None], frequency) > 0.25].sum())
  assert 0.5 < power[0] / power[1] < 2.5, power[0] / power[1]


def test_fine_stripes_vanish_when_shrunk():
  stripes = np.zeros((256, 256, 3), np.uint8)
  stripes[:, ::2] = 255
  data = encode(Image.fromarray(stripes), 'PNG')
  assert (
    crop_whole(data, 60)[2:-2, 2:-2].std() < 3
  )  # an unfiltered linear resize leaves a beat of 40 and more
  assert crop_whole(data, 256).std() > 120


def test_the_same_generator_gives_the_same_crops_and_fills_given_arrays():
  data, config = jpeg(texture(120, 160)), {'global': GLOBAL, 'local': LOCAL}
  first = views.crops(data, config, np.random.default_rng(3))
  out = {name: np.zeros_like(x) for name, x in first.items()}
  assert views.crops(data, config, np.random.default_rng(3), out) is out
  other = views.crops(data, config, np.random.default_rng(4))
  for name in config:
    np.testing.assert_array_equal(out[name], first[name])
    assert (other[name] != first[name]).mean() > 0.5


# --- formats ------------------------------------------------------------------------------------

RED, BLUE = (200, 30, 20), (10, 40, 220)


def halves(mode='RGB'):
  """Left half red, right half blue, 64 x 64."""
  image = Image.new('RGB', (64, 64), RED)
  image.paste(BLUE, (32, 0, 64, 64))
  return image.convert(mode)


def close(crop, left, right, tolerance=6):
  half = crop.shape[1] // 2
  errors = np.abs(crop[:, : half - 2] - left).max(), np.abs(crop[:, half + 2 :] - right).max()
  return max(errors) <= tolerance


@pytest.mark.parametrize(
  'data',
  [
    encode(halves(), 'PNG'),
    encode(halves(), 'BMP'),
    encode(halves(), 'WEBP', lossless=True),
    encode(halves().quantize(16), 'PNG'),
    encode(halves().quantize(16), 'GIF'),
    encode(halves(), 'JPEG', quality=95, subsampling=0),
    encode(halves(), 'JPEG', quality=95, progressive=True),
    encode(halves(), 'GIF', save_all=True, append_images=[Image.new('RGB', (64, 64), 'green')]),
  ],
  ids=['png', 'bmp', 'webp', 'palette', 'gif', 'jpeg', 'progressive', 'animation'],
)
@pytest.mark.parametrize('size', [64, 24])
def test_color_formats(data, size):
  for image in (crop_whole(data, size), views.evaluation(data, size).astype(int)):
    assert close(image, RED, BLUE, tolerance=12)


def test_cmyk_and_gray_jpegs():
  cmyk = encode(halves('CMYK'), 'JPEG', quality=95)
  assert close(crop_whole(cmyk, 32), RED, BLUE, tolerance=25)
  gray = encode(halves('L'), 'JPEG', quality=95)
  expected = np.asarray(halves('L'))[0, [0, -1]].astype(int)
  assert close(crop_whole(gray, 32), expected[0], expected[1])
  assert crop_whole(gray, 32).shape == (32, 32, 3)


def test_transparency_becomes_white():
  image = halves('RGBA')
  image.paste((0, 0, 0, 0), (32, 0, 64, 64))
  for data in (encode(image, 'PNG'), encode(image.quantize(16), 'PNG')):
    assert close(crop_whole(data, 32), RED, 255)
    assert close(views.evaluation(data, 32).astype(int), RED, 255)


def test_sixteen_bits_are_scaled_not_clipped():
  ramp = np.repeat(np.linspace(0, 65535, 64)[None], 64, 0).astype(np.uint16)
  crop = crop_whole(encode(Image.fromarray(ramp), 'PNG'), 64)
  assert np.abs(crop[5, :, 1] - ramp[5] / 257).max() <= 1


# --- bad input ----------------------------------------------------------------------------------


def png_header(width, height):
  def chunk(kind, body):
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(b'0' * 100))
    + chunk(b'IEND', b'')
  )


def jpeg_header(width, height):
  data = bytearray(jpeg(texture(16, 16)))
  at = data.index(b'\xff\xc0') + 5
  data[at : at + 4] = struct.pack('>HH', height, width)
  return bytes(data)


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize(
  'data, reason',
  [
    (b'', 'no known image format'),
    (b'<html>404</html>' * 9, 'no known image format'),
    (b'\xff\xd8\xff', 'no known image format'),
    (jpeg(texture(64, 64))[:900], 'truncated'),
    (encode(halves(), 'PNG')[:-60], 'broken PNG'),
    (png_header(10_000, 10_000), '10000 x 10000 pixels'),
    (jpeg_header(10_000, 9_000), '10000 x 9000 pixels'),
    (png_header(60_000, 60_000), '.'),
  ],
  ids=['empty', 'html', 'stub', 'cut jpeg', 'cut png', 'huge png', 'huge jpeg', 'bomb'],
)
def test_unreadable_images_say_why(data, reason):
  with pytest.raises(ValueError, match=reason):
    views.crops(data, whole(16), np.random.default_rng(0))
  with pytest.raises(ValueError):
    views.evaluation(data, 16)


# --- evaluation ---------------------------------------------------------------------------------


def triangle(n, size):
  """[size, n] weights of an antialiased bilinear resize."""
  scale = n / size
  center = (np.arange(size)[:, None] + 0.5) * scale
  weights = np.maximum(0, 1 - np.abs(np.arange(n) + 0.5 - center) / max(scale, 1))
  return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize('subsampling', ['444', '420'])
def test_training_and_evaluation_see_the_same_levels(subsampling):
  image = texture(96, 96)
  data = simplejpeg.encode_jpeg(image, quality=90, colorsubsampling=subsampling)
  np.testing.assert_array_equal(crop_whole(data, 96), images.decode(data))
  for size in (20, 48, 70):
    difference = crop_whole(data, size) - views.evaluation(data, size)
    assert abs(difference.mean()) < 0.2


@pytest.mark.parametrize('height, width, size', [(90, 130, 32), (20, 31, 48)])
def test_evaluation_is_an_antialiased_bilinear_resize_of_the_whole_image(height, width, size):
  image = texture(height, width)
  want = np.einsum('sh,hwc,tw->stc', triangle(height, size), image, triangle(width, size))
  got = views.evaluation(encode(Image.fromarray(image), 'PNG'), size)
  assert got.dtype == np.uint8 and np.abs(got - want).max() <= 1.5

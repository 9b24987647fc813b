"""Color augmentation against Pillow and NumPy, and its place in the views."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from tips_jax.core import strict
from tips_jax.core.errors import InputError
from tips_jax.core.schema import View
from tips_jax.data.pixels import color, views

IMAGE = cv2.GaussianBlur(
  np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8), (0, 0), 1.5
)
ONCE = dict(jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
# Numbers of a crop: jitter, order, brightness, contrast, saturation, hue, gray, blur, sigma,
# solarize.
MIDDLE = np.full(10, 0.5)


def drawn(**numbers):
  names = 'jitter order brightness contrast saturation hue gray blur sigma solarize'.split()
  result = MIDDLE.copy()
  for name, value in numbers.items():
    result[names.index(name)] = value
  return result


def augment(numbers, **fields):
  return color.augment(IMAGE, View(size=48, **fields), 0, numbers)


def close(got, want, levels=1):
  assert got.dtype == np.uint8 and np.abs(got.astype(int) - np.asarray(want)).max() <= levels


@pytest.mark.parametrize(
  'name, enhance',
  [
    ('brightness', ImageEnhance.Brightness),
    ('contrast', ImageEnhance.Contrast),
    ('saturation', ImageEnhance.Color),
  ],
)
@pytest.mark.parametrize('luck', [0.0, 0.3, 1.0])
def test_jitter_is_that_of_pillow(name, enhance, luck):
  got = augment(drawn(**{name: luck}), **ONCE | {name: 0.4})
  close(got, enhance(Image.fromarray(IMAGE)).enhance(0.6 + 0.8 * luck), levels=2)


def test_the_hue_turns_pure_colors_into_each_other():
  x = np.zeros((4, 4, 3), np.uint8)
  x[..., 0] = 200
  third = View(size=4, **ONCE | dict(hue=1 / 3))
  up = color.augment(x, third, 0, drawn(hue=1.0))
  down = color.augment(x, third, 0, drawn(hue=0.0))
  close(up, np.broadcast_to([0, 200, 0], x.shape), levels=5)  # a step of 256 hues
  close(down, np.broadcast_to([0, 0, 200], x.shape), levels=5)


def test_the_hue_of_gray_is_none_and_no_turn_changes_nothing():
  close(augment(MIDDLE, **ONCE | dict(hue=0.5)), IMAGE, levels=0)
  gray = np.repeat(IMAGE[..., :1], 3, axis=2)
  turned = color.augment(gray, View(size=48, **ONCE | dict(hue=0.5)), 0, drawn(hue=0.9))
  close(turned, gray, levels=0)


def test_gray_solarize_and_blur():
  close(augment(drawn(gray=0.1), gray=0.2), np.stack([Image.fromarray(IMAGE).convert('L')] * 3, -1))
  close(augment(drawn(solarize=0.1), solarize=0.2), ImageOps.solarize(Image.fromarray(IMAGE)), 0)
  weights = np.exp(-(np.arange(-4, 5) ** 2) / (2 * 1.05**2))  # sigma at the middle of 0.1 to 2
  weights /= weights.sum()
  padded = np.pad(IMAGE.astype(float), [(4, 4), (4, 4), (0, 0)], mode='reflect')
  rows = sum(w * padded[i : i + 48] for i, w in enumerate(weights))
  want = sum(w * rows[:, i : i + 48] for i, w in enumerate(weights))
  close(augment(drawn(blur=0.1), blur=0.2), np.rint(want))


def test_the_order_of_the_jitter_is_drawn():
  strong = ONCE | dict(brightness=0.9, contrast=0.9)
  lucky = dict(brightness=1.0, contrast=0.1)
  picture = Image.fromarray(IMAGE)

  def brighter(x):
    return ImageEnhance.Brightness(x).enhance(1.9)

  def flatter(x):
    return ImageEnhance.Contrast(x).enhance(0.28)

  first = augment(drawn(order=0.5 / 24, **lucky), **strong)  # the first of 24: brightness, contrast
  seventh = augment(drawn(order=6.5 / 24, **lucky), **strong)  # contrast, brightness
  close(first, flatter(brighter(picture)), levels=2)
  close(seventh, brighter(flatter(picture)), levels=3)  # 1.9 times the rounding of the first
  assert np.abs(first.astype(int) - seventh).max() > 5


def test_probabilities_are_met():
  view = View(size=4, count=4000, jitter=0.8, gray=0.2)
  numbers = color.draw(view, np.random.default_rng(0))
  assert numbers.shape == (4000, 10)
  assert abs((numbers[:, 0] < view.jitter).mean() - 0.8) < 0.03
  plain = View(size=48, blur=0.5, solarize=0.2)
  rows = color.draw(View(size=48, count=500), np.random.default_rng(1))
  changed = [not np.array_equal(color.augment(IMAGE, plain, 0, row), IMAGE) for row in rows]
  assert abs(np.mean(changed) - (1 - 0.5 * 0.8)) < 0.07


def test_each_crop_has_its_own_probability():
  view = View(size=48, count=2, blur=(0.0, 1.0), solarize=(1.0, 0.0))
  numbers = drawn(blur=0.5, solarize=0.5)
  close(color.augment(IMAGE, view, 0, numbers), ImageOps.solarize(Image.fromarray(IMAGE)), 0)
  blurred = color.augment(IMAGE, view, 1, numbers)
  np.testing.assert_array_equal(blurred, augment(numbers, blur=1.0))
  assert not np.array_equal(blurred, IMAGE)


# --- in the views -------------------------------------------------------------------------------


def crops(view, seed=0):
  out = io.BytesIO()
  Image.fromarray(IMAGE).save(out, 'png')
  return views.crops(out.getvalue(), {'v': view}, np.random.default_rng(seed))['v']


ALL = dict(jitter=0.8, gray=0.2, blur=0.5, solarize=0.2)


def test_the_same_seed_makes_the_same_crops_and_the_boxes_stay():
  colored = View(size=24, count=4, **ALL)
  np.testing.assert_array_equal(crops(colored), crops(colored))
  assert np.abs(crops(colored).astype(int) - crops(colored, seed=1)).max() > 0
  # Where no luck is below the probabilities, the crops are those of a view without color.
  never = View(size=24, count=4, gray=1e-12)
  np.testing.assert_array_equal(crops(never), crops(View(size=24, count=4)))


def test_color_is_off_by_default():
  assert not color.is_on(View(size=8))
  for field in ALL:
    assert color.is_on(View(size=8, **{field: 0.1}))
  assert color.is_on(View(size=8, count=2, blur=(0.0, 0.9)))


@pytest.mark.parametrize(
  'fields, said',
  [
    (dict(jitter=1.5), 'jitter: got 1.5; expected'),
    (dict(brightness=-0.1), 'brightness: got -0.1; expected'),
    (
      dict(blur=(0.1, 0.2, 0.3)),
      r'blur: got \(0.1, 0.2, 0.3\); expected a probability, or one for',
    ),
    (dict(blur=(0.1, 1.2)), r'blur.*1.2.*; expected'),
    (dict(solarize=-0.2), 'solarize: got -0.2; expected'),
    (dict(blur_sigma=(0.0, 1.0)), r'blur_sigma.*0.0.*; expected'),
  ],
)
def test_numbers_out_of_range_are_named(fields, said):
  with pytest.raises(InputError, match=f'data.views.v.{said}'):
    strict.build(View, dict(size=8, count=2, **fields), 'data.views.v')

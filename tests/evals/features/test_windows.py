"""Windows over images of any shape: they cover them, and scores come back to the pixels that they
are of.
"""

import cv2
import numpy as np
import pytest

from tests.data.benchmarks import fake_benchmarks as fake
from tips_jax.evals.features import windows


@pytest.mark.parametrize(
  'shape,count', [((30, 30), 1), ((30, 40), 2), ((40, 30), 2), ((30, 95), 5)]
)
def test_windows_cover_the_image_and_see_its_pixels(shape, count):
  view = windows.Windows(16, 10)
  height, width = view.size(shape)
  assert min(height, width) == 16 and width / height == pytest.approx(shape[1] / shape[0], rel=0.05)
  places, seen = view.places(shape), np.zeros((height, width), int)
  for place in places:
    assert seen[place].shape == (16, 16)
    seen[place] += 1
  assert seen.min() == 1 and len(places) == count
  mask = np.random.default_rng(0).integers(0, 5, shape).astype(np.uint8)
  resized = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
  np.testing.assert_array_equal(view.masks(mask), [resized[place] for place in places])


def test_a_window_of_an_image():
  image = np.zeros((20, 40, 3), np.uint8)
  image[:, 20:] = 255
  view, record = windows.Windows(20, 20), {'image': fake.encoded(image)}
  np.testing.assert_array_equal(view(record | {'window': 0}), image[:, :20])
  np.testing.assert_array_equal(view(record | {'window': 1}), image[:, 20:])


def test_logits_are_averaged_where_windows_overlap():
  """Against sums over all windows, class by class, with overlap, and resized to the mask."""
  rng, view, shape = np.random.default_rng(0), windows.Windows(16, 9), (30, 45)
  (height, width), places = view.size(shape), view.places(shape)
  logits = rng.normal(size=(len(places), 4, 4, 3)).astype(np.float32)
  total, count = np.zeros((height, width, 3)), np.zeros((height, width, 1))
  for place, one in zip(places, logits):
    total[place] += cv2.resize(one, (16, 16), interpolation=cv2.INTER_LINEAR)
    count[place] += 1
  assert count.max() > 1
  wanted = cv2.resize(
    (total / count).astype(np.float32), shape[::-1], interpolation=cv2.INTER_LINEAR
  ).argmax(-1)
  found = view.labels(logits, shape)
  assert found.shape == shape and (found == wanted).mean() > 0.999  # but for rounding
  with pytest.raises(ValueError):
    view.labels(logits[:-1], shape)


def test_patches_of_windows_as_one_grid():
  view, shape = windows.Windows(16, 8), (16, 32)  # windows at 0, 8 and 16
  patch = (
    np.arange(4.0)[None, :, None] + np.array([0, 2, 4])[:, None, None]
  )  # the column of each patch of 4 pixels
  grid = view.patches(np.broadcast_to(patch[:, None], (3, 4, 4, 1)), shape)
  np.testing.assert_array_equal(grid[..., 0], np.broadcast_to(np.arange(8.0), (4, 8)))


def test_codes_tell_records_and_windows():
  codes = windows.codes({5: 2, 7: 1, 9: 3})
  source = windows.Source([{'number': i} for i in range(10)])
  assert [(source[int(c)]['number'], source[int(c)]['window']) for c in codes] == [
    (5, 0),
    (5, 1),
    (7, 0),
    (9, 0),
    (9, 1),
    (9, 2),
  ]
  assert [rows.tolist() for rows in windows.by_image(codes)] == [[0, 1], [2], [3, 4, 5]]
  assert [rows.tolist() for rows in windows.by_image(codes[[0, 1, 3]])] == [
    [0, 1],
    [2],
  ]  # 7 was unreadable


def test_the_whole_image_squeezed():
  logits = np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32)
  wanted = cv2.resize(logits[0], (40, 30), interpolation=cv2.INTER_LINEAR).argmax(-1)
  assert (windows.Whole().labels(logits, (30, 40)) == wanted).mean() > 0.999


@pytest.mark.parametrize(
  'image, size',
  [
    ((512, 683), (448, 602)),
    ((683, 512), (602, 448)),
    ((448, 448), (448, 448)),
    ((300, 500), (448, 756)),
    ((1000, 100), (4480, 448)),
    ((449, 448), (462, 448)),
  ],
)
def test_sizes(image, size):
  """448 x 597 of the notebook's first image becomes 448 x 602, the next multiple of 14."""
  assert windows.resized(*image) == size
  h, w = windows.resized(*image, patch=1)
  assert min(h, w) == 448 and (h, w) == tuple(
    448 if n == min(image) else int(448 * n / min(image)) for n in image
  )


@pytest.mark.parametrize(
  'height, width', [(448, 448), (448, 449), (448, 784), (448, 785), (1500, 448)]
)
def test_windows_of_a_size_cover_it(height, width):
  seen, places = np.zeros((height, width), int), list(windows.windows(height, width))
  for rows, columns in places:
    assert rows.stop - rows.start == columns.stop - columns.start == 448
    seen[rows, columns] += 1
  assert seen.min() == 1 and len(places) == -(-(height - 448) // 336) + -(-(width - 448) // 336) + 1
  assert (places[0][0].start, places[0][1].start) == (0, 0)
  assert [(r, c) for r, c in windows.windows(5, 20, 8, 6)] == [
    (slice(0, 5), slice(x, x + 8)) for x in (0, 6, 12)
  ]

import numpy as np

from tips_jax.data.pixels import boxes


def test_a_box_of_the_whole_image_is_that_of_the_crop():
  found, kept = boxes.to_crop(np.array([[0, 0, 1, 1]]), (0, 0, 40, 60, True), 40, 60)
  np.testing.assert_allclose(found, [[0, 0, 1, 1]])
  assert kept == 1


def test_a_box_is_clipped_to_the_crop_and_its_share_is_known():
  # Rows 10 to 30 and columns 20 to 40 of 40 x 80, in the crop of rows 20 to 40, columns 20 to 60.
  box = np.array([[0.25, 0.25, 0.75, 0.5]])
  found, kept = boxes.to_crop(box, (20, 20, 20, 40, False), 40, 80)
  np.testing.assert_allclose(found, [[0, 0, 0.5, 0.5]])
  np.testing.assert_allclose(kept, 0.5)
  flipped, kept = boxes.to_crop(box, (20, 20, 20, 40, True), 40, 80)
  np.testing.assert_allclose(flipped, [[0, 0.5, 0.5, 1]])
  np.testing.assert_allclose(kept, 0.5)


def test_a_box_outside_and_one_without_area_keep_nothing():
  outside = [[0.0, 0.0, 0.2, 0.2], [0.6, 0.6, 0.6, 0.9], [0.9, 0.6, 0.6, 0.9]]
  _, kept = boxes.to_crop(np.array(outside), (50, 50, 50, 50, False), 100, 100)
  assert kept.tolist() == [0, 0, 0]


def test_no_boxes():
  found, kept = boxes.to_crop(np.zeros((0, 4)), (0, 0, 10, 10, True), 10, 10)
  assert found.shape == (0, 4) and kept.shape == (0,)

"""The pictures: masks, boxes, depth and normals are those of what is visible."""

import numpy as np
import pytest

from tips_jax.data.scenes import draw


@pytest.mark.parametrize('size', [32, 75, 160])
def test_any_size_shows_the_same_scene(size):
  scene, other = draw.draw(11, size=size), draw.draw(11)
  assert scene.image.shape == (size, size, 3) and scene.depth.shape == scene.mask.shape == (
    size,
    size,
  )
  assert {(i.shape, i.color, i.texture, i.size, i.x, i.z) for i in scene.items} == {
    (i.shape, i.color, i.texture, i.size, i.x, i.z) for i in other.items
  }


def test_boxes_and_mask_are_those_of_the_visible_pixels(drawn):
  for scene in drawn:
    assert 1 <= len(scene.items) <= 5
    areas = [np.count_nonzero(scene.owner == i) for i in range(len(scene.items))]
    assert areas == sorted(areas, reverse=True) == [item.pixels for item in scene.items]
    for i, item in enumerate(scene.items):
      y, x = np.nonzero(scene.owner == i)
      assert item.box == (y.min() / 96, x.min() / 96, (y.max() + 1) / 96, (x.max() + 1) / 96)
      assert set(scene.mask[y, x]) == {draw.MASK_CLASSES.index(item.shape)}
    around = np.unique(scene.mask[scene.owner < 0])
    assert draw.MASK_CLASSES[around[0]] in draw.STUFF
    assert len(set(scene.mask[[0, -1], [0, 0]]) | set(around)) >= 2


def _alone(item):
  """The depth in millimeters of one object drawn by itself; inf where it is not."""
  canvas = draw._Canvas(96)
  draw._paint(canvas, 0, item, np.float32([0, 0, 1]))
  return np.where(canvas.owner == 0, canvas.depth * 1000, np.inf)


def test_the_nearest_surface_is_the_visible_one(drawn):
  occlusions = 0
  for scene in drawn:
    depths = np.array([_alone(item) for item in scene.items])
    shown = scene.owner >= 0
    assert np.array_equal(depths.argmin(0)[shown], scene.owner[shown])
    np.testing.assert_allclose(scene.depth[shown], depths.min(0)[shown], atol=0.51)
    covered = np.isfinite(depths).sum(0)
    occlusions += bool((covered > 1).any())
  assert occlusions > len(drawn) / 3


def test_ground_recedes_upwards_and_objects_stand_on_it(drawn):
  for scene in drawn:
    ground = np.isin(scene.mask, [draw.MASK_CLASSES.index(s) for s in ('ground', 'water', 'floor')])
    assert ground.any() and scene.depth.min() > 500 and scene.depth.max() <= 12000
    by_row = np.array(
      [scene.depth[y][ground[y]].mean() if ground[y].any() else np.nan for y in range(96)]
    )
    assert (np.diff(by_row[np.isfinite(by_row)]) <= 0).all()
    normals = scene.normals / 127.5 - 1
    assert abs(normals[ground] - (0, 1, 0)).max() < 0.01
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=0.012)
    for item in scene.items:
      if item.on is None and not item.lifted and item.box[2] < 1 and item.pixels > 40:
        row = int(item.extent[2] * 96)
        assert abs(by_row[row] / 1000 - item.z) < 0.3 * item.z or np.isnan(by_row[row])


def test_color_and_texture_tell_nothing_about_the_class(drawn):
  items = [item for scene in drawn for item in scene.items]
  assert len({item.shape for item in items}) == 14
  for attribute, values in (
    ('color', list(draw.COLORS)),
    ('texture', list(draw.TEXTURES)),
  ):
    table = np.zeros((14, len(values)))
    for item in items:
      table[tuple(draw.SHAPES).index(item.shape), values.index(getattr(item, attribute))] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    freedom = 13 * (len(values) - 1)
    assert ((table - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_typical_objects_look_as_their_kind():
  items = [item for i in range(60) for item in draw.draw(i, size=32, typical=0.75).items]
  textures = sum(item.texture == draw.LOOKS[item.shape][1] for item in items)
  colors = sum(item.color == draw.LOOKS[item.shape][0] for item in items)
  assert 0.7 < textures / len(items) < 0.9 and 0.5 < colors / len(items) < textures / len(items)

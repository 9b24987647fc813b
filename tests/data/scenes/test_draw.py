"""The pictures: masks, boxes, depth and normals are those of what is visible, and things touch what
they rest on.
"""

import numpy as np
import pytest

from tips_jax.data.scenes import draw, placing, textures
from tips_jax.data.scenes.places import SKY
from tips_jax.data.scenes.solids import SHAPES


@pytest.mark.parametrize('size', [32, 75, 160])
def test_any_size_shows_the_same_scene(size):
  scene, other = draw.draw(11, size=size), draw.draw(11)
  assert scene.image.shape == (size, size, 3) and scene.depth.shape == scene.mask.shape == (
    size,
    size,
  )
  assert {(i.shape, i.color, i.texture, i.size, i.pose, i.z, *i.center) for i in scene.items} == {
    (i.shape, i.color, i.texture, i.size, i.pose, i.z, *i.center) for i in other.items
  }
  assert scene.camera == other.camera


def test_boxes_and_mask_are_those_of_the_visible_pixels(drawn):
  for scene in drawn:
    assert 1 <= len(scene.items) <= 5
    areas = [np.count_nonzero(scene.owner == i) for i in range(len(scene.items))]
    assert areas == sorted(areas, reverse=True) == [item.pixels for item in scene.items]
    for i, item in enumerate(scene.items):
      y, x = np.nonzero(scene.owner == i)
      assert item.box == (y.min() / 96, x.min() / 96, (y.max() + 1) / 96, (x.max() + 1) / 96)
      assert set(scene.mask[y, x]) == {draw.MASK_CLASSES.index(item.shape)}
  # A few pixels of objects of which hardly one is visible remain.
  around = np.concatenate([scene.mask[scene.owner < 0] for scene in drawn])
  assert np.mean(around < len(draw.STUFF)) > 0.9999


def _alone(item, rays):
  """The depth in millimeters of one object drawn by itself; inf where it is not."""
  count = rays.shape[1]
  canvas = draw._Canvas(
    depth=np.full(count, np.inf, np.float32),
    normal=np.zeros((3, count), np.float32),
    color=np.zeros((3, count), np.float32),
    owner=np.full(count, -1, np.int8),
  )
  draw._paint_item(canvas, 0, item, rays, size=96, focal=1.0)
  return 1000 * canvas.depth.reshape(96, 96)


def test_the_nearest_surface_is_the_visible_one(drawn):
  occlusions = 0
  for scene in drawn[:100]:
    rays = scene.camera.rays(*draw._pixels(96))
    place = 1000 * scene.place.trace(rays)[0].reshape(96, 96)
    depths = np.array([*(_alone(item, rays) for item in scene.items), place])
    shown = scene.owner >= 0
    assert np.array_equal(depths.argmin(0)[shown], scene.owner[shown])
    np.testing.assert_allclose(scene.depth[shown], depths.min(0)[shown], atol=0.51)
    occlusions += bool((np.isfinite(depths[:-1]).sum(0) > 1).any())
  assert occlusions > 25


def test_the_sky_alone_has_no_depth_and_no_normal(drawn):
  skies = 0
  for scene in drawn:
    sky = (scene.face == SKY) & (scene.owner < 0)
    missing = scene.depth == 0
    # Objects of a few pixels are not listed, but are there.
    assert not (missing & ~sky).any() and np.count_nonzero(sky & ~missing) <= 16
    assert np.array_equal(~scene.normals.any(-1), missing)
    skies += bool(sky.any())
    length = np.linalg.norm(scene.normals[~missing] / 127.5 - 1, axis=-1)
    np.testing.assert_allclose(length, 1, atol=0.015)
  assert 20 < skies < 150


def _unprojected(scene):
  """Points [H, W, 3] in the camera's coordinates."""
  middle = (np.arange(96) + 0.5) / 96 - 0.5
  depth = scene.depth / 1000
  x = middle[None] / scene.camera.focal * depth
  return np.stack([x, -middle[:, None] / scene.camera.focal * depth, -depth], -1)


def test_normals_are_those_of_the_depth(drawn):
  """Finite differences of the points; one pixel aside nothing else begins and nothing bends."""
  angles = {'place': [], 'objects': []}
  for scene in drawn[:120]:
    points = _unprojected(scene)
    normals = scene.normals / 127.5 - 1
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
    across = points[1:-1, 2:] - points[1:-1, :-2]
    up = points[:-2, 1:-1] - points[2:, 1:-1]
    found = np.cross(across, up)
    found /= np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)
    inner = normals[1:-1, 1:-1]
    smooth = np.ones((94, 94), bool)
    for dy, dx in ((0, 1), (2, 1), (1, 0), (1, 2)):
      other = normals[dy : dy + 94, dx : dx + 94]
      same = scene.owner[dy : dy + 94, dx : dx + 94] == scene.owner[1:-1, 1:-1]
      face = scene.face[dy : dy + 94, dx : dx + 94] == scene.face[1:-1, 1:-1]
      on_item = scene.owner[1:-1, 1:-1] >= 0
      smooth &= same & (face | on_item) & ((other * inner).sum(-1) > 0.97)
      smooth &= scene.depth[dy : dy + 94, dx : dx + 94] > 0
    smooth &= scene.depth[1:-1, 1:-1] > 0
    angle = np.rad2deg(np.arccos(np.clip((found * inner).sum(-1), -1, 1)))
    angles['place'].append(angle[smooth & (scene.owner[1:-1, 1:-1] < 0)])
    angles['objects'].append(angle[smooth & (scene.owner[1:-1, 1:-1] >= 0)])
  place, objects = (np.concatenate(angles[name]) for name in angles)
  assert np.median(place) < 1 and np.percentile(place, 99) < 5
  assert np.median(objects) < 3 and np.percentile(objects, 95) < 15


def _gaps(scene, item):
  """Meters from an object to each face of the enclosure."""
  enclosure = scene.place.enclosure
  return enclosure.offsets - (enclosure.normals @ item.hull().T).max(1)


def test_objects_touch_what_they_rest_on(drawn):
  seen = dict.fromkeys(('stand', 'lie', 'lean', 'hang', 'float', 'on', 'step'), 0)
  for scene in drawn:
    for item in scene.items:
      gaps = _gaps(scene, item) / scene.place.scale
      assert not scene.place.collides(item.hull(), on_hill=item.part == 'hill')
      seen[item.pose] += 1
      seen['step'] += item.part == 'step' and item.pose != 'float'
      if item.on:
        seen['on'] += 1
        up = item.on.rotation[:, 1]
        seat = up @ item.on.center + SHAPES[item.on.shape].seat * item.on.half
        assert abs((item.hull() @ up).min() - seat) < 1e-3
      elif item.pose in ('stand', 'lie') and item.part == 'floor':
        assert abs(gaps[0]) < 1e-3
      elif item.pose == 'float':
        assert gaps[0] > 0.05
      elif item.pose == 'hang' and item.part == 'wall':
        assert abs(gaps[1:5]).min() < 1e-3
      elif item.pose == 'lean' and item.part == 'wall':
        assert abs(gaps[0]) < 1e-3 and abs(gaps[1:5]).min() < 1e-3
  assert min(seen.values()) > 5, seen


def test_where_something_is_in_the_picture_says_little_of_its_depth(drawn):
  depth = np.stack([scene.depth for scene in drawn]) / 1000
  known = (depth > 0) & (depth < 10)
  by_position = np.where(known, depth, 0).sum(0) / known.sum(0)
  variance = np.var(depth[known])
  error = np.mean((depth - by_position)[known] ** 2)
  assert 1 - error / variance < 0.3
  normals = np.stack([scene.normals for scene in drawn])[depth > 0] / 127.5 - 1
  level = normals[:, 1] > 0.8
  assert 0.2 < level.mean() < 0.8


def test_shadows_darken_what_the_light_does_not_reach():
  scene = draw.draw(3, objects=1)
  rays = scene.camera.rays(*draw._pixels(96))
  light = np.array([0.5, 0.8, 0.33], np.float32)
  depth, face = scene.place.trace(rays)
  points = depth * rays
  normal = scene.place.normals(points, face)
  length = np.sqrt((rays * rays).sum(0))
  canvas = draw._Canvas(depth, normal, np.ones_like(rays), np.full(96 * 96, -1, np.int8))
  bare = draw._shade(canvas, rays, length, scene.place, [], light, 96)
  shaded = draw._shade(canvas, rays, length, scene.place, scene.items, light, 96)
  darker = (bare - shaded).max(0) > 0.1
  assert 20 < np.count_nonzero(darker) and (shaded <= bare + 1e-5).all()
  # The line from there to the light passes the object; others pass none of it.
  toward = scene.items[0].center[:, None] - points
  distance = np.linalg.norm(np.cross(toward.T, light), axis=-1)
  assert (distance[darker] < 1.7 * scene.items[0].half).all()


def test_color_and_texture_tell_nothing_about_the_class(drawn):
  items = [item for scene in drawn for item in scene.items]
  assert len({item.shape for item in items}) == 14
  for attribute, values in (
    ('color', list(placing.COLORS)),
    ('texture', list(textures.TEXTURES)),
  ):
    table = np.zeros((14, len(values)))
    for item in items:
      table[tuple(SHAPES).index(item.shape), values.index(getattr(item, attribute))] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    freedom = 13 * (len(values) - 1)
    assert ((table - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_typical_objects_look_as_their_kind():
  items = [item for i in range(200) for item in draw.draw(i, size=32, typical=0.75).items]
  textures = sum(item.texture == placing.LOOKS[item.shape][1] for item in items)
  colors = sum(item.color == placing.LOOKS[item.shape][0] for item in items)
  assert 0.7 < textures / len(items) < 0.9 and 0.5 < colors / len(items) < textures / len(items)


def test_a_single_object_is_large_enough_for_a_few_patches():
  sides = []
  for i in range(150):
    [item] = draw.draw(i, objects=1).items
    top, left, bottom, right = item.box
    sides.append(np.sqrt((bottom - top) * (right - left)))
  assert 0.4 < np.median(sides) < 0.7 and np.percentile(sides, 10) > 0.25

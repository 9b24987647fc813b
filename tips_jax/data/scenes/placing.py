"""Which objects a scene has, and where: they stand, lie, lean, hang, float, and stand on others.

They touch what they rest on, and reach into nothing.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tips_jax.data.scenes.places import SKY, Camera, Place
from tips_jax.data.scenes.solids import SHAPES, hull, is_flat
from tips_jax.data.scenes.textures import TEXTURES

COLORS = {
  'red': (214, 48, 44),
  'orange': (243, 138, 32),
  'yellow': (246, 209, 54),
  'green': (64, 160, 70),
  'teal': (32, 158, 160),
  'blue': (48, 98, 210),
  'purple': (128, 66, 172),
  'pink': (240, 130, 178),
  'brown': (130, 82, 46),
  'gray': (142, 146, 150),
}
SIZES = {'small': 0.75, 'medium': 1.0, 'large': 1.3}  # times the usual size of a shape
# The typical color and texture of a shape.
LOOKS = {
  'ball': ('orange', 'striped'),
  'cube': ('brown', 'plain'),
  'cone': ('orange', 'plain'),
  'ring': ('yellow', 'plain'),
  'star': ('yellow', 'gradient'),
  'tree': ('green', 'speckled'),
  'house': ('red', 'checked'),
  'cross': ('gray', 'plain'),
  'arrow': ('blue', 'plain'),
  'cup': ('purple', 'zigzag'),
  'fish': ('teal', 'ringed'),
  'moon': ('gray', 'dotted'),
  'heart': ('pink', 'plain'),
  'table': ('brown', 'ringed'),
}
_ODDS = (0.1, 0.24, 0.29, 0.22, 0.15)  # of 1 to 5 objects
MOST = len(_ODDS)
# Half the height of an object in picture widths: of the only one, which is what the picture is of,
# of the first of several, and of the others.
_ONLY = 0.2, 0.34
_FIRST = 0.13, 0.25
_OTHERS = 0.06, 0.32
_LEVEL = 0.9  # cosine of the steepest ground that things stand on
_EDGE = 0.35  # cosine to the ray at which a relief is too much seen from its edge
_TRIES = 64
_POSES = {'stand': 0.5, 'lie': 0.17, 'lean': 0.12, 'hang': 0.1, 'float': 0.11}


@dataclasses.dataclass
class Item:
  """One object of a scene."""

  shape: str
  color: str
  texture: str
  size: str
  half: float  # meters: a unit of its solid
  # The texture: whether its second color is pale, its frequency and its rotation.
  pale_second: bool
  frequency: float
  phase: float
  pose: str = 'stand'
  on: 'Item | None' = None  # the object it stands on
  part: str = 'floor'  # the part of the place that it touches, or is above
  center: np.ndarray | None = None  # [3], in the world
  rotation: np.ndarray | None = None  # [3, 3], of its solid to the world
  z: float = 0.0  # meters along the camera's axis to its center
  extent: tuple[float, float, float, float] = (0, 0, 0, 0)  # ymin xmin ymax xmax, unoccluded
  # Set by drawing: ymin xmin ymax xmax of the visible pixels, in [0, 1], and their number.
  box: tuple[float, float, float, float] = (0, 0, 0, 0)
  pixels: int = 0

  @property
  def reach(self) -> float:
    """Radius in meters of a ball around its center that holds it."""
    return 1.45 * self.half

  def turned(self, directions: np.ndarray) -> np.ndarray:
    """Directions [3, N] of the world in the units of its solid."""
    return (self.rotation.T / np.float32(self.half)) @ directions

  def to_local(self, points: np.ndarray) -> np.ndarray:
    """Points [3, N] of the world in the coordinates of its solid."""
    return self.turned(points - self.center[:, None])

  def hull(self) -> np.ndarray:
    """Corners [K, 3] in the world."""
    return self.center + (self.half * hull(self.shape)) @ self.rotation.T


def pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
  """One of the options, each as likely."""
  return options[int(rng.integers(len(options)))]


def begin(
  rng: np.random.Generator, camera: Camera, most: int
) -> tuple[list[str], np.ndarray, float]:
  """(shapes of 1 to `most` objects, a point [3] on the ground, meters to it).

  The distance is that at which the first object has a good size in the picture.
  """
  odds = np.array(_ODDS[:most])
  count = rng.choice(most, p=odds / odds.sum()) + 1
  shapes = [pick(rng, tuple(SHAPES))]
  half = SHAPES[shapes[0]].half
  alike = [shape for shape in SHAPES if 0.45 < SHAPES[shape].half / half < 2.2]
  for _ in range(count - 1):
    shapes.append(pick(rng, alike))
  apparent = float(np.exp(rng.uniform(*np.log(_first_sizes(count)))))
  scale = camera.focal * half / apparent
  x, low = rng.uniform(0.3, 0.7), 0.5
  while True:  # lower in the picture until it is below the camera
    y = rng.uniform(low, low + 0.25)
    ray = camera.rotation @ ((x - 0.5) / camera.focal, (0.5 - y) / camera.focal, -1)
    if ray[1] < -0.22:
      return shapes, scale * ray, scale
    low += 0.03


def _first_sizes(count):
  """Bounds of half the height of the first of so many objects, in picture widths."""
  if count == 1:
    return _ONLY
  return _FIRST


def arrange(
  rng: np.random.Generator,
  camera: Camera,
  place: Place,
  shapes: list[str],
  *,
  colors: list[str],
  typical: float,
) -> list[Item]:
  """Objects of these shapes, where they fit; at least one.

  No object covers half of another's extent, except where one stands on the other.
  """
  spots = _Spots(rng, camera, place, _first_sizes(len(shapes)))
  items = []
  for shape in shapes:
    item = _choose(rng, shape, colors)
    if typical and rng.random() < typical:
      color, item.texture = LOOKS[shape]
      if color in colors:  # that of the surroundings would hide it
        item.color = color
    below = None
    carriers = [other for other in items if SHAPES[other.shape].seat and other.pose == 'stand']
    if carriers and rng.random() < 0.45:
      below = carriers[-1]
    if below and _stack(rng, camera, place, item, below, items):
      items.append(item)
    elif _put(rng, camera, place, spots, item, items):
      items.append(item)
  if not items:
    items.append(_float_before(rng, camera, place, item))
  return items


def _float_before(rng, camera, place, item):
  """Where nothing fits, an object floats before what the camera sees: there is always room."""
  item.pose = 'float'
  item.part = 'floor'
  up = np.array([0, 1.0, 0])
  whole = item.half
  for shrink, share, y in itertools.product(
    (1, 0.7, 0.5, 0.35, 0.2), (0.75, 0.6, 0.45), (0.5, 0.35)
  ):
    ray = camera.rays(np.float32([0.5]), np.float32([y]))
    seen = min(float(place.trace(ray)[0][0]), place.scale)
    item.half = whole * shrink
    item.center = (share * seen * ray[:, 0]).astype(np.float32)
    _turn(rng, item, up)
    nearest = _finish(camera, item)
    gap = (place.enclosure.offsets - (place.enclosure.normals @ item.hull().T).max(1))[0]
    if min(gap, nearest) > 0.08 * place.scale and not place.collides(item.hull()):
      break
  return item


def _choose(rng, shape, colors):
  kind = SHAPES[shape]
  size = pick(rng, tuple(SIZES))
  odds = np.array([_POSES[pose] for pose in kind.poses])
  pose = kind.poses[int(rng.choice(len(odds), p=odds / odds.sum()))]
  return Item(
    shape=shape,
    color=pick(rng, colors),
    texture=pick(rng, TEXTURES),
    size=size,
    half=kind.half * SIZES[size] * float(rng.uniform(0.95, 1.05)),
    pale_second=bool(rng.random() < 0.5),
    frequency=float(rng.uniform(1.3, 1.9)),
    phase=float(rng.uniform(0, 2 * np.pi)),
    pose=pose,
  )


class _Spots:
  """Points of the surroundings, all over the picture, where objects may be put."""

  def __init__(self, rng, camera, place, first_sizes):
    self.first_sizes = first_sizes
    x, y = rng.uniform(0.06, 0.94, (2, _TRIES)).astype(np.float32)
    rays = camera.rays(x, y)
    self.depth, self.face = place.trace(rays)
    self.points = np.where(self.face == SKY, 0, self.depth) * rays
    self.normals = place.normals(self.points, self.face)
    names = [material.name for material in place.materials]
    self.names = [*names, 'sky']
    self.level = self.normals[1] > _LEVEL
    water = np.array([name == 'water' for name in self.names])
    self.level &= ~water[self.face]
    walls = np.array([name in ('wall', 'barrier') for name in self.names])
    self.wall = walls[self.face] & (abs(self.normals[1]) < 0.1)


def _put(rng, camera, place, spots, item, items):
  """Sets where an object is, so that it touches nothing else and hides nothing; False if it finds
  no room. Where its pose has none, it stands.
  """
  for pose in dict.fromkeys((item.pose, 'stand')):
    item.pose = pose
    possible = spots.wall if pose in ('hang', 'lean') else spots.level
    for k in _candidates(camera, place, spots, item, possible, items):
      point = spots.points[:, k]
      normal = spots.normals[:, k]
      item.part = spots.names[spots.face[k]]
      if pose == 'lean':
        _lean(rng, place, item, point, normal)
      elif pose == 'hang':
        _hang(rng, item, point, normal)
      else:
        _rest(rng, place, item, point, normal)
      if _fits(camera, place, item, items):
        return True
  return False


def _candidates(camera, place, spots, item, possible, items):
  """Numbers of spots where an object seems to have room, and has a good size in the picture; of the
  first one all, the best first.
  """
  apparent = camera.focal * item.half / np.maximum(spots.depth, 1e-3)
  # Roughly, before it is looked at closely, which takes a hundred times as long.
  center = spots.points + np.float32(0.8 * item.half) * spots.normals
  x, y, _ = camera.project(center.T)
  inside = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) > 0.55 * apparent
  walls = place.enclosure.offsets[:, None] - place.enclosure.normals @ center
  possible = possible & inside & (walls > 0.3 * item.half).all(0)
  for other in items:
    away = center - other.center[:, None]
    possible &= (away * away).sum(0) > (0.7 * (item.half + other.half)) ** 2
  low, high = _OTHERS if items else spots.first_sizes
  good = possible & (apparent > low) & (apparent < high)
  order = np.flatnonzero(good)
  if not items:
    rest = np.flatnonzero(possible & ~good)
    rest = rest[np.argsort(abs(np.log(apparent[rest] / np.sqrt(low * high))))]
    order = np.concatenate([order, rest])
  return order[: 10 if items else 24]


def _cross(a, b):
  """As np.cross, many times faster on two vectors."""
  return np.array([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


def _length(vector):
  return math.sqrt(vector @ vector)


def _basis(y, z):
  """[3, 3] with columns x, y, z; z is made square to y."""
  y = y / _length(y)
  z = z - (z @ y) * y
  z = z / _length(z)
  return np.stack([_cross(y, z), y, z], -1).astype(np.float32)


def _spin(rotation, angle):
  """Turned around its own z axis."""
  c, s = np.cos(angle), np.sin(angle)
  return rotation @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)


def _turn(rng, item, up):
  """Upright on ground with this normal, toward the camera or turned away from it."""
  kind = SHAPES[item.shape]
  view = -item.center  # the camera is at the origin
  side = _cross(up, view)
  angle = np.deg2rad(rng.uniform(-kind.turn, kind.turn))
  level = _cross(side, up)
  toward = level / _length(level) * np.cos(angle)
  toward = toward + side / _length(side) * np.sin(angle)
  item.rotation = _spin(_basis(up, toward), np.deg2rad(rng.uniform(-kind.roll, kind.roll)))


def _rest(rng, place, item, point, up):
  """On the ground at a point, upright or lying, or in the air above it."""
  item.center = point
  if item.pose == 'lie':
    direction = _cross(up, rng.normal(size=3))
    if item.shape in ('cone', 'cup'):  # on its side
      sink = {'cone': -0.37, 'cup': 0.11}[item.shape]
      direction = direction / _length(direction)
      item.rotation = _basis(
        np.cos(sink) * direction + np.sin(sink) * up, _cross(direction, up) + 0.2 * up
      )
    else:
      item.rotation = _basis(direction, up)
  else:
    _turn(rng, item, up)
  _touch(item, point, up)
  if item.pose == 'float':
    item.center = item.center + up * np.float32(place.scale * rng.uniform(0.12, 0.45))


def _touch(item, point, normal):
  """Moves an object along the normal until its outermost corner is in the plane at the point."""
  lowest = (item.hull() @ normal).min() - item.center @ normal
  item.center = (point - lowest * normal).astype(np.float32)


def _hang(rng, item, point, wall):
  kind = SHAPES[item.shape]
  roll = np.deg2rad(rng.uniform(-kind.roll, kind.roll))
  item.rotation = _spin(_basis(np.array([0, 1.0, 0]), wall), roll)
  item.center = point
  _touch(item, point, wall)


def _lean(rng, place, item, point, wall):
  """On the floor below a point of a wall, and against that wall."""
  tilt = np.deg2rad(rng.uniform(12, 30))
  up = np.array([0, 1.0, 0])
  back = np.cos(tilt) * up - np.sin(tilt) * wall
  item.rotation = _spin(
    _basis(back, np.cos(tilt) * wall + np.sin(tilt) * up),
    np.deg2rad(rng.uniform(-1, 1) * min(SHAPES[item.shape].roll, 25)),
  )
  item.center = point
  _touch(item, point, wall)
  item.center[1] = place.floor - ((item.hull()[:, 1]).min() - item.center[1])


def _stack(rng, camera, place, item, below, items):
  """Puts an object on the seat of another one; False where it has no room there."""
  smaller = 0.6 * below.half
  if SHAPES[item.shape].half > 1.2 * SHAPES[below.shape].half:
    return False
  item.half = min(item.half, smaller)
  item.size = 'small'
  if item.pose not in ('stand', 'lie'):
    item.pose = 'stand'
  up = below.rotation[:, 1]
  aside = rng.uniform(-0.35, 0.35, 2)
  seat = below.center + below.half * (
    SHAPES[below.shape].seat * up
    + aside[0] * below.rotation[:, 0]
    + 0.6 * aside[1] * below.rotation[:, 2]
  )
  _rest(rng, place, item, seat, up)
  item.on = below
  item.part = below.part
  if _fits(camera, place, item, items):
    return True
  item.on = None
  return False


def _finish(camera, item):
  x, y, depth = camera.project(item.hull())
  item.z = float(camera.project(item.center[None])[2][0])
  item.extent = tuple(map(float, (y.min(), x.min(), y.max(), x.max())))
  return depth.min()


def _fits(camera, place, item, items):
  """Sets extent and depth; whether the object can be where it is."""
  if is_flat(item.shape):
    across = abs(item.center @ item.rotation[:, 2]) / _length(item.center)
    if across < _EDGE:
      return False
  if place.collides(item.hull(), on_hill=item.part == 'hill'):
    return False
  if _finish(camera, item) < 0.15 * place.scale:
    return False
  top, left, bottom, right = item.extent
  inside = max(0, min(bottom, 1) - max(top, 0)) * max(0, min(right, 1) - max(left, 0))
  if inside < 0.8 * (bottom - top) * (right - left):
    return False
  for other in items:
    if other is item.on:
      continue
    apart = _length(other.center - item.center)
    if apart < 0.85 * (other.half + item.half):
      return False
    front, back = (item, other) if item.z < other.z else (other, item)
    if _hidden(back, front) > 0.5:
      return False
  return True


def _hidden(behind, front):
  """The share of one extent that another covers."""
  (t0, l0, b0, r0), (t1, l1, b1, r1) = behind.extent, front.extent
  height = max(0, min(b0, b1) - max(t0, t1))
  width = max(0, min(r0, r1) - max(l0, l1))
  return height * width / ((b0 - t0) * (r0 - l0))

"""Cameras and surroundings of the scenes: rooms and valleys, with steps, walls, hills and water.

World coordinates in meters: the camera at the origin, y up, -z forward; the camera is pitched and
rolled. A ray parameter is the depth along the camera's axis.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from tips_jax.data.scenes.primitives import (
  Blocks,
  Ellipsoid,
  box,
  gather,
  largest,
  scatter,
  tangents,
)
from tips_jax.data.scenes.textures import PATTERNS, noise

STUFF = ('sky', 'wall', 'mountain', 'ground', 'water', 'floor')
SKY = -1  # number of the face of what has no surface
# Patterns of surfaces; rooms have the same on floors and on walls, so that only the layout tells
# which is which.
_INDOORS = ('plain', 'checked', 'tiles', 'planks', 'bricks', 'striped')
_FARTHEST = 6.0  # times the distance of the objects; behind it is haze


@dataclasses.dataclass(frozen=True)
class Camera:
  """A pinhole camera: focal length in picture widths, angles in radians (down, clockwise)."""

  focal: float
  pitch: float
  roll: float

  @functools.cached_property
  def rotation(self) -> np.ndarray:
    """[3, 3] float32: camera coordinates (x right, y up, z toward the viewer) to the world's."""
    c, s = np.cos(self.pitch), np.sin(self.pitch)
    pitch = np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
    c, s = np.cos(self.roll), np.sin(self.roll)
    return (pitch @ [[c, s, 0], [-s, c, 0], [0, 0, 1]]).astype(np.float32)

  def rays(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Directions [3, N] in the world, of depth 1, through picture points (right, down: 0 to 1)."""
    across = (x - np.float32(0.5)) / np.float32(self.focal)
    up = (np.float32(0.5) - y) / np.float32(self.focal)
    return self.rotation @ np.stack([across, up, np.full_like(across, -1)])

  def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, y, depth) of points [K, 3] of the world: right and down in the picture, and meters."""
    across, up, toward = self.rotation.T @ points.T
    depth = np.maximum(-toward, 1e-3)
    return 0.5 + self.focal * across / depth, 0.5 - self.focal * up / depth, -toward


@dataclasses.dataclass(frozen=True)
class Material:
  """What a face is made of."""

  stuff: str
  pattern: str
  color: str
  name: str  # its part of the place: 'floor', 'wall', 'ceiling', 'step', 'hill'
  cell: float  # meters of a period of the pattern
  shift: tuple[float, float]


@dataclasses.dataclass
class Place:
  """Surroundings: a convex enclosure around the camera, and what stands in it.

  The faces are numbered: those of the enclosure, of the blocks, the hill, the water.
  """

  enclosure: Blocks
  blocks: Blocks | None
  hill: Ellipsoid | None
  materials: list[Material]
  indoors: bool
  sky: str  # its color
  scale: float  # meters to the objects, about
  floor: float  # y of the ground below the objects
  ridge: tuple[float, float] | None = None  # height of hillsides, and where their noise begins
  shore: tuple[np.ndarray, float] | None = None  # ground beyond it is water

  @property
  def hill_face(self) -> int:
    return len(self.materials) - 2

  def trace(self, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(depth [N], face [N]) of the first surface along rays [3, N] from the camera; SKY at inf."""
    closeness = (self.enclosure.normals / self.enclosure.offsets[:, None]) @ rays
    closeness, face = largest(closeness)
    limit = np.float32(1 / (_FARTHEST * self.scale))
    if not self.indoors:
      np.copyto(face, SKY, where=closeness < limit)
    t = 1 / np.maximum(closeness, limit)
    if self.ridge:
      # Hillsides end at a ridge.
      height, start = self.ridge
      where = np.flatnonzero(face > 0)
      x, y, z = gather(rays, where)
      around = np.arctan2(x, z)
      rough = noise(around * 0.25 + start, 0 * around, 3)
      above = t.take(where) * y > self.floor + height * (0.5 + 0.7 * rough)
      face[where[above]] = SKY
    if self.shore:
      direction, start = self.shore
      where = np.flatnonzero(face == 0)
      x, y, z = t.take(where) * gather(rays, where)
      along = direction[0] * x + direction[2] * z
      wave = noise((direction[2] * x - direction[0] * z) / (6 * self.scale), 0 * x, 3)
      face[where[along > start + 0.3 * self.scale * (wave - 0.5)]] = len(self.materials) - 1
    np.copyto(t, np.inf, where=face == SKY)
    origin = np.zeros(3, np.float32)
    if self.hill:
      found, _ = self.hill.trace(origin, rays)
      nearer = found < t
      np.copyto(t, found, where=nearer)
      np.copyto(face, self.hill_face, where=nearer)
    if self.blocks:
      found, number = self.blocks.trace(origin, rays)
      nearer = (found < t) & (found < _FARTHEST * self.scale)
      np.copyto(t, found, where=nearer)
      np.copyto(face, number + np.int32(len(self.enclosure.offsets)), where=nearer)
    return t, face

  def normals(self, points: np.ndarray, face: np.ndarray) -> np.ndarray:
    """Normals [3, N] at points [3, N] of faces [N]; zeros in the sky."""
    normal = gather(self._normals, face + 1)
    if self.hill:
      where = np.flatnonzero(face == self.hill_face)
      curved = self.hill.surface(gather(points, where), 0).normal
      scatter(normal, where, curved / np.sqrt((curved * curved).sum(0)))
    return normal

  def __post_init__(self):
    # By face; the first column is that of the sky.
    normals = [[[0, 0, 0]], -self.enclosure.normals]
    if self.blocks:
      normals.append(self.blocks.normals)
    # Water is as level as the ground.
    normals += [[[0, 1, 0]], -self.enclosure.normals[:1]]
    normals = np.concatenate(normals).astype(np.float32)
    self._normals = np.ascontiguousarray(normals.T)
    self._u, self._v = tangents(normals)

  def collides(self, hull: np.ndarray, on_hill: bool = False) -> bool:
    """Whether a body of corners [K, 3] reaches into a wall, the ground, a block or the hill."""
    tolerance = 0.02 * self.scale
    if ((self.enclosure.normals @ hull.T).max(1) > self.enclosure.offsets + tolerance).any():
      return True
    if self.hill and not on_hill:
      inside = (((hull - self.hill.center) / self.hill.radii) ** 2).sum(1) < 1
      if inside.any():
        return True
    if self.blocks is None:
      return False
    apart = (self.blocks.normals @ hull.T).min(1) >= self.blocks.offsets - tolerance
    start = 0
    for count in self.blocks.counts:
      if not apart[start : start + count].any():
        return True
      start += count
    return False


def choose_camera(rng: np.random.Generator) -> Camera:
  """From a little upwards to steeply down; fields of view from 42 to 67 degrees."""
  return Camera(
    focal=float(np.exp(rng.uniform(np.log(0.75), np.log(1.3)))),
    pitch=float(np.deg2rad(rng.uniform(-4, 48))),
    roll=float(np.deg2rad(np.clip(rng.normal(0, 7), -18, 18))),
  )


def choose_place(
  rng: np.random.Generator, focus: np.ndarray, scale: float, colors: list[str]
) -> Place:
  """Surroundings with ground at `focus` [3], `scale` meters away, in (at least four) colors."""
  indoors = bool(rng.random() < 0.55)
  cell = scale * (scale / 1.2) ** -0.4  # nearer scenes show texture in more detail
  materials = []

  def material(stuff, pattern, color, name):
    return Material(
      stuff,
      pattern,
      color,
      name,
      cell=float(cell * rng.uniform(0.1, 0.22)),
      shift=tuple(rng.uniform(0, 9, 2).tolist()),
    )

  def pick(options):
    return options[int(rng.integers(len(options)))]

  if indoors:
    enclosure = _room(rng, focus, scale)
    floor = material('floor', pick(_INDOORS), colors[1], 'floor')
    wall = material('wall', pick(_INDOORS), colors[0], 'wall')
    materials = [floor, wall, wall, wall, wall]
    if rng.random() < 0.35:  # one wall of another color
      materials[int(rng.integers(1, 5))] = material('wall', pick(_INDOORS), colors[2], 'wall')
    if len(enclosure.offsets) == 6:
      materials.append(material('wall', pick(('plain', 'planks', 'tiles')), colors[3], 'ceiling'))
  else:
    enclosure = _valley(rng, focus, scale)
    floor = material('ground', pick(('grass', 'sand', 'plain', 'tiles')), colors[1], 'floor')
    slope = material('mountain', pick(('grass', 'sand', 'rock')), colors[0], 'mountain')
    materials = [floor] + [slope] * (len(enclosure.offsets) - 1)
  hill = None
  if not indoors and rng.random() < 0.4:
    hill = _hill(rng, focus, scale)
  bodies = []
  chance = rng.random()
  stuff, color = floor.stuff, pick(colors[1:4])
  if chance < 0.4:
    steps = _steps(rng, focus, scale)
    made = material(stuff, pick((floor.pattern, 'plain', 'tiles')), color, 'step')
    for body in steps:
      bodies.append(body)
      materials += [made] * len(body[1])
  elif chance < 0.65:
    bodies.append(_free_wall(rng, focus, scale))
    pattern = pick(('bricks', 'plain', 'planks', 'tiles'))
    materials += [material('wall', pattern, color, 'barrier')] * 6
  materials.append(material('ground', floor.pattern, floor.color, 'hill'))
  materials.append(material('water', 'waves', pick(colors[2:4]), 'water'))
  shore = None
  if not indoors and rng.random() < 0.4:
    direction = _heading(rng.uniform(-1.2, 1.2))
    shore = direction, float(direction @ focus + scale * rng.uniform(0.15, 0.8))
  return Place(
    enclosure=enclosure,
    blocks=Blocks(*bodies) if bodies else None,
    hill=hill,
    materials=materials,
    indoors=indoors,
    sky=colors[2],
    scale=scale,
    floor=float(focus[1]),
    ridge=None if indoors else (scale * float(rng.uniform(0.3, 0.9)), float(rng.uniform(0, 9))),
    shore=shore,
  )


def _heading(angle):
  """The level direction at an angle to the right of forward."""
  return np.array([np.sin(angle), 0, -np.cos(angle)])


def _room(rng, focus, scale):
  """Floor, four walls at right angles, and for half of the rooms a ceiling; outward normals."""
  normals = [np.array([0, -1, 0])]
  offsets = [-focus[1]]
  turn = rng.uniform(0, np.pi / 2)
  for quarter in range(4):
    out = _heading(turn + quarter * np.pi / 2)
    normals.append(out)
    offsets.append(max(out @ focus, 0) + scale * rng.uniform(0.3, 1.3))
  if rng.random() < 0.5:
    normals.append(np.array([0, 1, 0]))
    offsets.append(scale * rng.uniform(0.25, 0.9))
  return Blocks((np.array(normals), np.array(offsets)))


def _valley(rng, focus, scale):
  """Ground with a fall of at most 12 degrees, and two to four hillsides; outward normals."""
  fall = np.deg2rad(rng.uniform(0, 12))
  normals = [np.sin(fall) * _heading(rng.uniform(-np.pi, np.pi)) - (0, np.cos(fall), 0)]
  offsets = [normals[0] @ focus]
  for _ in range(int(rng.integers(2, 5))):
    out = _heading(rng.uniform(-1.3, 1.3))
    steep = np.deg2rad(rng.uniform(20, 65))
    normal = np.sin(steep) * out - (0, np.cos(steep), 0)
    foot = max(out @ focus, 0) + scale * rng.uniform(0.35, 1.6)
    normals.append(normal)
    offsets.append(normal @ (foot * out + (0, focus[1], 0)))
  offsets = np.maximum(offsets, 0.05 * scale)  # the camera is above ground
  return Blocks((np.array(normals), offsets))


def _steps(rng, focus, scale):
  """One to three steps up, away from the camera and to a side."""
  out = _heading(rng.uniform(-1.1, 1.1))
  edge = max(out @ focus + scale * rng.uniform(-0.25, 0.45), 0.15 * scale)
  rise = min(scale * rng.uniform(0.07, 0.18), -focus[1] * 0.3)
  bodies = []
  for step in range(1, int(rng.integers(2, 5))):
    normals = np.stack([np.array([0, 1, 0]), -out])
    bodies.append((normals, np.array([focus[1] + step * rise, -edge])))
    edge = edge + scale * rng.uniform(0.25, 0.5)
  return bodies


def _free_wall(rng, focus, scale):
  """A wall at any angle, behind or beside the objects."""
  length, height = scale * rng.uniform(0.3, 1), scale * rng.uniform(0.2, 0.8)
  normals, offsets = box(-length, length, 0, height, -0.06 * scale, 0.06 * scale)
  turn = rng.uniform(-1.2, 1.2)
  c, s = np.cos(turn), np.sin(turn)
  rotation = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
  center = focus + scale * np.array([rng.uniform(-0.8, 0.8), 0, -rng.uniform(0.35, 0.9)])
  normals = normals @ rotation.T
  return normals, offsets + normals @ center


def _hill(rng, focus, scale):
  out = _heading(rng.uniform(-0.9, 0.9))
  center = focus + scale * rng.uniform(0.5, 1.2) * out
  radii = scale * rng.uniform((0.4, 0.12, 0.4), (0.9, 0.35, 0.8))
  return Ellipsoid(tuple(center), tuple(radii))


def paint(
  place: Place,
  points: np.ndarray,
  face: np.ndarray,
  pixels: np.ndarray,
  palette: Callable[[str], np.ndarray],
) -> np.ndarray:
  """Colors [3, N] before shading. pixels [N]: of the picture on a meter of the surface."""
  color = np.zeros((3, len(face)), np.float32)
  for number in np.flatnonzero(np.bincount(face + 1, minlength=len(place.materials) + 1)[1:]):
    material = place.materials[number]
    where = np.flatnonzero(face == number)
    here = gather(points, where) / np.float32(material.cell)
    u = place._u[number + 1] @ here + np.float32(material.shift[0])
    v = place._v[number + 1] @ here + np.float32(material.shift[1])
    sharp = pixels.take(where) * np.float32(material.cell)
    amount = PATTERNS[material.pattern](u, v, sharp * np.float32(0.4))
    # Patterns finer than a pixel fade out.
    detail = np.clip(sharp * np.float32(0.5) - np.float32(0.5), 0, 1)
    amount = np.float32(0.4) + (amount - np.float32(0.4)) * detail
    first = 0.66 * palette(material.color) + np.float32(0.22)
    second = first * 0.5 + np.float32(0.45) if material.pattern == 'waves' else first * 0.6
    scatter(color, where, first[:, None] + (second - first)[:, None] * amount)
  return color

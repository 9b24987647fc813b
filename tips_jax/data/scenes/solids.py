"""The 14 solids of the scenes: figures around the origin, about two units tall, that face z."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from tips_jax.data.scenes.primitives import (
  Blocks,
  Ellipsoid,
  Figure,
  Frustum,
  Relief,
  box,
  prism,
  table_axis,
)

# --- signed distances of flat figures: negative inside -------------------------------------------


def _disc(u, v, x, y, r):
  return np.hypot(u - x, v - y) - r


def _ellipse(u, v, x, y, a, b):
  k = np.hypot((u - x) / a, (v - y) / b)
  return k * (k - 1) / (np.hypot((u - x) / a**2, (v - y) / b**2) + 1e-6)


def _polygon(u, v, *corners):
  distance = np.full(u.shape, np.inf)
  inside = np.zeros(u.shape, bool)
  for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
    dx, dy = x1 - x0, y1 - y0
    t = np.clip(((u - x0) * dx + (v - y0) * dy) / (dx * dx + dy * dy), 0, 1)
    distance = np.minimum(distance, np.hypot(u - x0 - t * dx, v - y0 - t * dy))
    if dy:
      inside ^= ((v >= min(y0, y1)) & (v < max(y0, y1))) & (u < x0 + (v - y0) * dx / dy)
  return np.where(inside, -distance, distance)


def _union(*distances):
  return np.minimum.reduce(distances)


# --- figures ------------------------------------------------------------------------------------


def _ball():
  return [Ellipsoid()]


def _cube():
  return [Blocks(box(-0.9, 0.9, -0.9, 0.9, -0.9, 0.9))]


def _cone():
  return [Frustum(bottom=-1, top=1, wide=0.8, narrow=0.02)]


def _ring():
  u, v = _plane()
  return [Relief(abs(np.hypot(u, v) - 0.72) - 0.28, bulge=0.26, rim=0.28)]


def _star():
  u, v = _plane()
  angle = np.pi * (0.5 + np.arange(10) / 5)
  r = np.where(np.arange(10) % 2, 0.46, 1.1)
  corners = zip(r * np.cos(angle), r * np.sin(angle) - 0.1)
  return [Relief(_polygon(u, v, *corners), bulge=0.3, rim=0.38)]


def _tree():
  lobes = ((0, 0.5, 0), 0.5), ((-0.4, 0.12, 0.1), 0.4), ((0.4, 0.1, -0.1), 0.42)
  crown = [Ellipsoid(center, (r, r, r)) for center, r in lobes]
  return [*crown, Frustum(bottom=-1, top=0.1, wide=0.2, narrow=0.14, ink=0.55)]


def _house():
  walls = box(-0.75, 0.75, -1, 0.15, -0.6, 0.6)
  roof = prism([(-0.95, 0.1), (0.95, 0.1), (0, 1)], -0.7, 0.7)
  door = box(-0.16, 0.2, -1, -0.3, 0.5, 0.62)
  left = box(-0.58, -0.32, -0.5, -0.18, 0.5, 0.62)
  right = box(0.36, 0.62, -0.5, -0.18, 0.5, 0.62)
  return [Blocks(walls, roof, door, left, right, ink=(0, 0.42, 0.8, 0.8, 0.8))]


def _cross():
  upright = box(-0.33, 0.33, -1, 1, -0.3, 0.3)
  return [Blocks(upright, box(-1, 1, -0.33, 0.33, -0.29, 0.29))]


def _arrow():
  shaft = box(-1, 0.1, -0.28, 0.28, -0.25, 0.25)
  return [Blocks(shaft, prism([(0.1, -0.8), (1.05, 0), (0.1, 0.8)], -0.25, 0.25))]


def _cup():
  handle = [
    box(0.64, 1.15, 0.3, 0.5, -0.11, 0.11),
    box(0.95, 1.15, -0.4, 0.3, -0.11, 0.11),
    box(0.56, 1.15, -0.5, -0.3, -0.11, 0.11),
  ]
  return [Frustum(bottom=-0.9, top=0.85, wide=0.52, narrow=0.72), Blocks(*handle)]


def _fish():
  u, v = _plane()
  body = _ellipse(u, v, -0.25, 0, 0.82, 0.55)
  tail = _polygon(u, v, (0.25, 0), (1.1, 0.65), (0.85, 0), (1.1, -0.65))
  fin = _polygon(u, v, (-0.45, 0.35), (0.15, 0.8), (0.15, 0.3))
  eye = np.maximum(_disc(u, v, -0.66, 0.12, 0.13), -_disc(u, v, -0.68, 0.13, 0.04))
  return [Relief(_union(body, tail, fin), bulge=0.34, rim=0.45, ink=0.85 * (eye < 0))]


def _moon():
  u, v = _plane()
  crescent = np.maximum(_disc(u, v, 0.1, 0, 1), -_disc(u, v, 0.6, 0.2, 0.8))
  return [Relief(crescent, bulge=0.28, rim=0.33)]


def _heart():
  u, v = _plane()
  wedge = (0, -1), (0.905, 0.13), (0.46, 0.5), (0, 0.65), (-0.46, 0.5), (-0.905, 0.13)
  lobes = _disc(u, v, -0.46, 0.4, 0.52), _disc(u, v, 0.46, 0.4, 0.52)
  return [Relief(_union(*lobes, _polygon(u, v, *wedge)), bulge=0.36, rim=0.48)]


def _table():
  legs = []
  for x in (-1.05, 0.85):
    for z in (-0.6, 0.4):
      legs.append(box(x, x + 0.2, -0.9, 0.5, z, z + 0.2))
  return [Blocks(box(-1.15, 1.15, 0.45, 0.68, -0.7, 0.7), *legs, ink=(0, *[0.35] * 4))]


def _plane():
  return np.meshgrid(table_axis(), table_axis())


# --- what solids can do --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kind:
  """What is known of a solid beforehand."""

  make: Callable[[], list[Figure]]
  # Half of its height in meters: what the eye takes the scale of a scene from.
  half: float
  # 'stand', 'lie', 'lean' against a wall, 'hang' on a wall, 'float' in the air.
  poses: tuple[str, ...] = ('stand',)
  # Degrees that it may be turned in its own plane where it stands.
  roll: float = 0
  # Degrees that it may be turned around the vertical, from facing the camera.
  turn: float = 180
  # Height at which others can stand on it.
  seat: float | None = None


_FLAT = ('stand', 'lie', 'lean', 'hang', 'float')
SHAPES = {
  'ball': Kind(_ball, 0.2, ('stand', 'float'), roll=180),
  'cube': Kind(_cube, 0.25, seat=0.9),
  'cone': Kind(_cone, 0.3, ('stand', 'lie')),
  'ring': Kind(_ring, 0.2, _FLAT, roll=180, turn=55),
  'star': Kind(_star, 0.22, _FLAT, roll=30, turn=55),
  'tree': Kind(_tree, 0.5),
  'house': Kind(_house, 0.45, turn=60),
  'cross': Kind(_cross, 0.3, _FLAT, roll=25, turn=60),
  'arrow': Kind(_arrow, 0.25, _FLAT, roll=25, turn=55),
  'cup': Kind(_cup, 0.15, ('stand', 'lie'), turn=180),
  'fish': Kind(_fish, 0.2, ('stand', 'lie', 'hang', 'float'), roll=20, turn=50),
  'moon': Kind(_moon, 0.25, _FLAT, roll=25, turn=55),
  'heart': Kind(_heart, 0.22, _FLAT, roll=20, turn=55),
  'table': Kind(_table, 0.36, turn=70, seat=0.68),
}


@functools.cache
def figures(shape: str) -> list[Figure]:
  return SHAPES[shape].make()


@functools.cache
def is_flat(shape: str) -> bool:
  """Whether it is a relief, which cannot be seen from the edge."""
  return any(isinstance(figure, Relief) for figure in figures(shape))


@functools.cache
def hull(shape: str) -> np.ndarray:
  """Points [K, 3] whose convex hull holds the solid."""
  return np.concatenate([figure.hull() for figure in figures(shape)]).astype(np.float32)

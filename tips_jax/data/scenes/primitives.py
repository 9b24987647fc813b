"""Figures that rays meet: convex blocks, ellipsoids, frustums and reliefs.

All points are in the figure's coordinates. `trace(origin [3], directions [3, N])` gives the ray
parameter [N] of the first surface that is met (inf: none) and a number [N] of the face; `surface`
what is there; `shades(points [3, N], light [3])` whether the figure stands between the points and a
far light. Everything is float32: a scene is drawn in milliseconds.
"""

import dataclasses
import functools
import typing

import numpy as np

# Of a relief's table, which spans [-REACH, REACH]^2.
REACH = 1.25
GRID = 320
_STEPS = 8  # of the search along a ray through a relief
# In units of a figure: nearer than this a surface does not shade itself.
_CLEAR = 0.03


def gather(rows: np.ndarray, index: np.ndarray) -> np.ndarray:
  """rows[:, index] of [K, M], ten times faster."""
  output = np.empty((len(rows), len(index)), rows.dtype)
  for row, values in zip(rows, output):
    np.take(row, index, out=values, mode='clip')
  return output


def scatter(rows: np.ndarray, index: np.ndarray, values: np.ndarray) -> None:
  """rows[:, index] = values, as fast."""
  for row, new in zip(rows, values):
    row[index] = new


def largest(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(maximum [N], number of its row [N]) of [K, N]; argmax along the first axis is slow."""
  best = rows.max(0)
  number = np.zeros(len(best), np.int32)
  for k in range(1, len(rows)):
    np.copyto(number, k, where=rows[k] == best)
  return best, number


class Surface(typing.NamedTuple):
  """A surface at N points."""

  normal: np.ndarray  # [3, N], of any length, out of the figure
  u: np.ndarray  # [N], along the surface, in units of the figure
  v: np.ndarray  # [N], upwards
  ink: np.ndarray | float = 0.0  # how much darker, in [0, 1]


class Blocks:
  """Convex bodies, each the points X with normals @ X <= offsets, of any number of faces."""

  def __init__(self, *bodies: tuple[np.ndarray, np.ndarray], ink=()):
    self.counts = [len(offsets) for _, offsets in bodies]
    self.normals = np.concatenate([normals for normals, _ in bodies]).astype(np.float32)
    self.offsets = np.concatenate([offsets for _, offsets in bodies]).astype(np.float32)
    ink = ink or (0.0,) * len(bodies)
    self.ink = np.repeat(np.asarray(ink, np.float32), self.counts)
    self.u, self.v = tangents(self.normals)

  def trace(self, origin, directions):
    margin = self.offsets - self.normals @ origin
    # 1 / t is affine in the direction: a division per face, none per pixel.
    margin = np.where(abs(margin) < 1e-9, np.float32(1e-9), margin)
    inverse = (self.normals / margin[:, None]) @ directions
    best = np.zeros(directions.shape[1], np.float32)
    face = np.zeros(len(best), np.int32)
    start = 0
    for count in self.counts:
      rows = np.arange(start, start + count)
      start += count
      front = rows[margin[rows] < 0]
      if not len(front):  # the origin is inside
        continue
      enter, first = largest(-inverse[front])
      enter = -enter
      leave = inverse[rows[margin[rows] > 0]].max(0, initial=0)
      hit = (enter > leave) & (enter > best)
      np.copyto(best, enter, where=hit)
      np.copyto(face, front.astype(np.int32).take(first), where=hit)
    with np.errstate(divide='ignore'):
      return 1 / best, face

  def surface(self, points, face):
    u = (gather(self.u.T, face) * points).sum(0)
    v = (gather(self.v.T, face) * points).sum(0)
    return Surface(gather(self.normals.T, face), u, v, self.ink.take(face))

  def shades(self, points, light):
    along = self.normals @ light
    along = np.where(abs(along) < 1e-6, np.float32(1e-6), along)
    crossing = (self.offsets[:, None] - self.normals @ points) / along[:, None]
    shaded = np.zeros(points.shape[1], bool)
    start = 0
    for count in self.counts:
      rows = np.arange(start, start + count)
      start += count
      enter = crossing[rows[along[rows] < 0]].max(0, initial=_CLEAR)
      leave = crossing[rows[along[rows] > 0]].min(0, initial=np.inf)
      shaded |= leave > enter
    return shaded

  def hull(self):
    """The corners [K, 3]."""
    corners = []
    start = 0
    for count in self.counts:
      normals = self.normals[start : start + count].astype(np.float64)
      offsets = self.offsets[start : start + count]
      start += count
      for i in range(count):
        for j in range(i):
          for k in range(j):
            three = normals[[i, j, k]]
            if abs(np.linalg.det(three)) > 1e-6:
              corner = np.linalg.solve(three, offsets[[i, j, k]])
              if (normals @ corner <= offsets + 1e-4).all():
                corners.append(corner)
    return np.array(corners)


@dataclasses.dataclass
class Ellipsoid:
  """An ellipsoid with axes along x, y and z."""

  center: tuple[float, float, float] = (0, 0, 0)
  radii: tuple[float, float, float] = (1, 1, 1)
  ink: float = 0.0

  def trace(self, origin, directions):
    d = directions / self._radii
    o = (origin[:, None] - self._center) / self._radii
    a = (d * d).sum(0)
    b = (o * d).sum(0)
    root = b * b - a * ((o * o).sum() - 1)
    t = (-b - np.sqrt(np.maximum(root, 0))) / a
    return np.where((root > 0) & (t > 0), t, np.float32(np.inf)), 0

  def surface(self, points, face):
    local = (points - self._center) / self._radii
    around = np.arctan2(local[0], local[2]) * self._radii[0]
    return Surface(local / self._radii, around, points[1] - self._center[1], self.ink)

  def shades(self, points, light):
    d = light[:, None] / self._radii
    o = (points - self._center) / self._radii
    a = (d * d).sum()
    b = (o * d).sum(0)
    root = b * b - a * ((o * o).sum(0) - 1)
    return (root > 0) & (np.sqrt(np.maximum(root, 0)) - b > a * _CLEAR)

  def hull(self):
    return _SPHERE * self.radii + self.center

  @functools.cached_property
  def _center(self):
    return np.asarray(self.center, np.float32)[:, None]

  @functools.cached_property
  def _radii(self):
    return np.asarray(self.radii, np.float32)[:, None]


@dataclasses.dataclass
class Frustum:
  """The side of a cone or cylinder around the y axis, and its base; open at the top."""

  bottom: float
  top: float
  # Radii at both ends.
  wide: float
  narrow: float
  ink: float = 0.0

  @property
  def _slope(self):
    return (self.narrow - self.wide) / (self.top - self.bottom)

  def _sides(self, origin, directions):
    """Both ray parameters of the side, inf where they are beyond the ends."""
    q = self._slope
    radius = self.wide + q * (origin[1] - self.bottom)
    dx, dy, dz = directions
    a = dx * dx + dz * dz - (q * dy) ** 2
    b = origin[0] * dx + origin[2] * dz - q * dy * radius
    c = origin[0] ** 2 + origin[2] ** 2 - radius**2
    root = b * b - a * c
    width = np.sqrt(np.maximum(root, 0))
    a = np.where(abs(a) < 1e-9, np.float32(1e-9), a)
    for t in ((-b - width) / a, (width - b) / a):
      y = origin[1] + t * dy
      inside = (root > 0) & (y > self.bottom) & (y < self.top)
      yield np.where(inside, t, np.float32(np.inf))

  def _base(self, origin, directions):
    with np.errstate(divide='ignore', invalid='ignore'):
      t = (self.bottom - origin[1]) / directions[1]
      x = origin[0] + t * directions[0]
      z = origin[2] + t * directions[2]
      return np.where(x * x + z * z < self.wide**2, t, np.float32(np.inf))

  def trace(self, origin, directions):
    best = np.full(directions.shape[1], np.inf, np.float32)
    for t in self._sides(origin, directions):
      np.copyto(best, t, where=(t > 0) & (t < best))
    base = self._base(origin, directions)
    low = (base > 0) & (base < best)
    return np.where(low, base, best), low.astype(np.int32)

  def surface(self, points, face):
    x, y, z = points
    rho = np.hypot(x, z) + 1e-6
    side = np.stack([x / rho, np.full_like(x, -self._slope), z / rho])
    normal = np.where(face, np.float32([[0], [-1], [0]]), side)
    around = np.arctan2(x, z) * (self.wide + self.narrow) / 2
    return Surface(normal, np.where(face, x, around), np.where(face, z, y), self.ink)

  def shades(self, points, light):
    shaded = np.zeros(points.shape[1], bool)
    directions = light[:, None]
    for t in (*self._sides(points, directions), self._base(points, directions)):
      shaded |= (t > _CLEAR) & (t < np.inf)
    return shaded

  def hull(self):
    angle = np.arange(16) * np.pi / 8
    ends = []
    for y, radius in ((self.bottom, self.wide), (self.top, self.narrow)):
      ends.append(np.stack([radius * np.sin(angle), 0 * angle + y, radius * np.cos(angle)], -1))
    return np.concatenate(ends)


class Relief:
  """A figure in the x-y plane that bulges on both sides, as a cushion does.

  distance [G, G]: signed, negative inside, over the table; bulge: greatest thickness of a side;
  rim: width over which it is reached. ink [G, G] in [0, 1].
  """

  def __init__(self, distance, *, bulge, rim, ink=0.0):
    axis = table_axis()
    # Half an ellipse, started inside: at the very rim its slope is without bound.
    inner = np.clip(-distance / rim, 0, 1)
    height = bulge * (np.sqrt(1 - (1 - inner) ** 2 + 0.03) - np.sqrt(0.03))
    dv, du = np.gradient(height, axis, axis)
    # Outside below the plane, so that a search finds the rim.
    height = np.where(distance > 0, -distance, height)
    cells = [distance, height, -du, -dv, np.broadcast_to(ink, distance.shape)]
    self.table = np.stack([cell.ravel() for cell in cells]).astype(np.float32)
    self.thick = float(height.max())
    rows, columns = np.nonzero(distance <= 0)
    inside = np.stack([axis[columns], axis[rows]], -1)
    angle = np.arange(48) * np.pi / 24
    outermost = np.unique(np.argmax(inside @ (np.cos(angle), np.sin(angle)), axis=0))
    self.outline = inside[outermost]

  def _cell(self, x, y):
    scale = np.float32((GRID - 1) / (2 * REACH))
    column = (x + REACH) * scale + np.float32(0.5)
    row = (y + REACH) * scale + np.float32(0.5)
    column = np.clip(column, 0, GRID - 1).astype(np.int32)
    row = np.clip(row, 0, GRID - 1).astype(np.int32)
    return row * GRID + column

  def trace(self, origin, directions):
    t = np.full(directions.shape[1], np.inf, np.float32)
    side = np.zeros(len(t), np.int32)
    # The part of each ray inside the table's box.
    reach = np.float32([[REACH], [REACH], [self.thick]])
    flat = np.where(abs(directions) < 1e-6, np.float32(1e-6), directions)
    one = (reach - origin[:, None]) / flat
    two = (-reach - origin[:, None]) / flat
    enter = np.minimum(one, two).max(0)
    leave = np.maximum(one, two).min(0)
    rays = np.flatnonzero((enter < leave) & (enter > 0))
    if not len(rays):
      return t, side
    d = gather(directions, rays)
    enter = enter.take(rays)
    step = (leave.take(rays) - enter) / np.float32(_STEPS)

    def above(t):
      """How far the ray's point is above the surface of either side."""
      cell = self._cell(origin[0] + t * d[0], origin[1] + t * d[1])
      return abs(origin[2] + t * d[2]) - self.table[1].take(cell)

    before = enter
    height = above(before)
    low, high = before, np.full(len(rays), np.inf, np.float32)
    outside, inside = height, height
    for k in range(1, _STEPS + 1):
      after = enter + np.float32(k) * step
      new = above(after)
      first = (new < 0) & (high == np.inf)
      low = np.where(first, before, low)
      outside = np.where(first, height, outside)
      inside = np.where(first, new, inside)
      high = np.where(first, after, high)
      before, height = after, new
    hit = np.flatnonzero(high < np.inf)
    rays, d = rays.take(hit), gather(d, hit)
    low, high, outside, inside = (x.take(hit) for x in (low, high, outside, inside))
    for _ in range(3):  # between the last point outside and the first one inside
      share = np.clip(outside / np.maximum(outside - inside, 1e-9), 0.05, 0.95)
      middle = low + (high - low) * share
      new = above(middle)
      within = new < 0
      high = np.where(within, middle, high)
      inside = np.where(within, new, inside)
      low = np.where(within, low, middle)
      outside = np.where(within, outside, new)
    t[rays] = high
    side[rays] = np.where(origin[2] + high * d[2] > 0, 1, -1)
    return t, side

  def surface(self, points, face):
    x, y, _ = points
    nx, ny, ink = gather(self.table[2:], self._cell(x, y))
    return Surface(np.stack([nx, ny, face.astype(np.float32)]), x, y, ink)

  def shades(self, points, light):
    down = np.where(abs(light[2]) < 1e-6, np.float32(1e-6), light[2])
    t = -points[2] / down
    cell = self._cell(points[0] + t * light[0], points[1] + t * light[1])
    return (self.table[0].take(cell) < 0) & (t > _CLEAR)

  def hull(self):
    front = np.concatenate([self.outline, np.zeros((len(self.outline), 1))], -1)
    inner = self.outline * 0.6
    bulges = []
    for z in (-self.thick, self.thick):
      bulges.append(np.concatenate([inner, np.full((len(inner), 1), z)], -1))
    return np.concatenate([front, *bulges])


Figure = Blocks | Ellipsoid | Frustum | Relief


def box(x0, x1, y0, y1, z0, z1) -> tuple[np.ndarray, np.ndarray]:
  """Normals [6, 3] and offsets [6] of a box: right, left, top, bottom, front, back."""
  normals = np.kron(np.eye(3), [[1], [-1]])
  return normals, np.array([x1, -x0, y1, -y0, z1, -z0])


def prism(corners: list[tuple[float, float]], z0: float, z1: float):
  """Normals and offsets of a convex polygon, counterclockwise in x and y, from z0 to z1."""
  normals = []
  offsets = []
  for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
    normal = np.array([y1 - y0, x0 - x1, 0]) / np.hypot(x1 - x0, y1 - y0)
    normals.append(normal)
    offsets.append(normal @ (x0, y0, 0))
  return np.array([*normals, (0, 0, 1), (0, 0, -1)]), np.array([*offsets, z1, -z0])


def table_axis() -> np.ndarray:
  """Coordinates [G] of a relief's table along either axis."""
  return np.linspace(-REACH, REACH, GRID)


def tangents(normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Two directions [F, 3] in each face: level, and upwards (where it is level itself, any)."""
  x, y, z = np.asarray(normals, np.float64).T
  flat = x * x + z * z < 0.01
  level = np.where(flat, 1, z)
  aside = np.where(flat, 0.3, -x)
  length = np.hypot(level, aside)
  level, aside = level / length, aside / length
  u = np.stack([level, 0 * level, aside], -1)
  v = np.stack([y * aside, z * level - x * aside, -y * level], -1)
  return u.astype(np.float32), v.astype(np.float32)


def _sphere():
  """Points on the unit sphere, [K, 3]."""
  k = np.arange(80) + 0.5
  polar = np.arccos(1 - 2 * k / 80)
  angle = np.pi * (1 + 5**0.5) * k
  return np.stack([np.sin(polar) * np.cos(angle), np.cos(polar), np.sin(polar) * np.sin(angle)], -1)


_SPHERE = _sphere()

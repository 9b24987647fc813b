"""The elements of the embedded data set's scenes: 14 solids, 8 textures and the patterns of
surroundings.

A solid is a signed distance field over (u to the right, v up), about two units tall, tabulated once
per process; a bevel turns the distance into a surface normal and a bulge, so that one lookup gives
an object's coverage, shading, depth and normals.
"""

import dataclasses
import functools

import numpy as np

# A solid's table spans [-REACH, REACH]^2 with GRID^2 cells.
REACH = 1.25
GRID = 256


# --- signed distances of simple figures: negative inside ----------------------------------------


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


def _rectangle(u, v, x0, y0, x1, y1):
  return _polygon(u, v, (x0, y0), (x1, y0), (x1, y1), (x0, y1))


def _union(*distances):
  return np.minimum.reduce(distances)


# --- solids -------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Solid:
  """Fields over the table's points; the surface is that of faces, else of round, else of bevel."""

  distance: np.ndarray  # signed, negative inside
  bevel: float = 0.0  # width of the rim over which the surface turns toward the viewer
  round: np.ndarray | None = None  # x of the normal, of a body of revolution
  rise: float = 0.0  # its y
  faces: list[tuple[np.ndarray, tuple[float, float, float]]] | None = None  # (where, normal)
  ink: np.ndarray | float = 0.0  # how much darker, in [0, 1]
  seat: float | None = None  # height at which another object can stand on it


def _ball(u, v):
  return _Solid(_disc(u, v, 0, 0, 1), bevel=1)


def _cube(u, v):
  outline = _polygon(u, v, (-1, -1), (0.45, -1), (1, -0.5), (1, 1), (-0.45, 1), (-1, 0.45))
  front = (u < 0.45) & (v < 0.45)
  top = ~front & (v - 0.45 > u - 0.45)
  faces = [(front, (0, 0, 1)), (top, (0, 0.94, 0.34)), (~front & ~top, (0.94, 0, 0.34))]
  return _Solid(outline, faces=faces, seat=0.7)


def _cone(u, v):
  side = _polygon(u, v, (0, 1), (-0.78, -0.74), (0.78, -0.74))
  base = _ellipse(u, v, 0, -0.74, 0.78, 0.26)
  return _Solid(_union(side, base), round=u / np.maximum(0.78 * (1 - v) / 1.74, 0.05), rise=0.4)


def _ring(u, v):
  return _Solid(abs(np.hypot(u, v) - 0.7) - 0.3, bevel=0.3)


def _star(u, v):
  angle = np.pi * (0.5 + np.arange(10) / 5)
  r = np.where(np.arange(10) % 2, 0.46, 1.1)
  return _Solid(_polygon(u, v, *zip(r * np.cos(angle), r * np.sin(angle) - 0.1)), bevel=0.4)


def _tree(u, v):
  lobes = (0, 0.5, 0.5), (-0.45, 0.1, 0.42), (0.45, 0.1, 0.42), (0, 0.05, 0.4)
  crown = _union(*(_disc(u, v, *lobe) for lobe in lobes))
  trunk = _polygon(u, v, (-0.2, -1), (0.2, -1), (0.12, -0.1), (-0.12, -0.1))
  return _Solid(_union(crown, trunk), bevel=0.45, ink=0.55 * (crown > 0))


def _house(u, v):
  walls = _rectangle(u, v, -0.78, -1, 0.78, 0.2)
  roof = _polygon(u, v, (-1.05, 0.1), (1.05, 0.1), (0, 1))
  holes = _union(
    _rectangle(u, v, -0.15, -1, 0.25, -0.3),
    _rectangle(u, v, -0.6, -0.45, -0.3, -0.12),
    _rectangle(u, v, 0.42, -0.45, 0.68, -0.12),
  )
  ink = np.maximum(0.8 * (holes < 0), 0.42 * (roof < 0))
  return _Solid(_union(walls, roof), bevel=0.1, ink=ink)


def _cross(u, v):
  upright = _rectangle(u, v, -0.34, -1, 0.34, 1)
  return _Solid(_union(upright, _rectangle(u, v, -1, -0.34, 1, 0.34)), bevel=0.22)


def _arrow(u, v):
  shaft = (0.1, 0.27), (-1.05, 0.27), (-1.05, -0.27), (0.1, -0.27)
  return _Solid(_polygon(u, v, *shaft, (0.1, -0.8), (1.1, 0), (0.1, 0.8)), bevel=0.25)


def _cup(u, v):
  body = _polygon(u, v, (-0.85, 0.8), (0.5, 0.8), (0.32, -0.9), (-0.67, -0.9))
  foot = _ellipse(u, v, -0.175, -0.88, 0.495, 0.12)
  rim = _ellipse(u, v, -0.175, 0.8, 0.675, 0.2)
  solid = _union(body, foot, rim)
  handle = abs(np.hypot(u - 0.48, v - 0.05) - 0.44) - 0.12
  hollow = _ellipse(u, v, -0.175, 0.8, 0.57, 0.13) < 0
  return _Solid(
    _union(solid, handle), round=np.where(solid < 0, (u + 0.175) / 0.68, 0), ink=0.72 * hollow
  )


def _fish(u, v):
  body = _ellipse(u, v, -0.25, 0, 0.82, 0.52)
  tail = _polygon(u, v, (0.25, 0), (1.05, 0.6), (0.85, 0), (1.05, -0.6))
  fin = _polygon(u, v, (-0.45, 0.35), (0.15, 0.75), (0.15, 0.3))
  eye = np.maximum(_disc(u, v, -0.68, 0.12, 0.12), -_disc(u, v, -0.7, 0.13, 0.04))
  return _Solid(_union(body, tail, fin), bevel=0.45, ink=0.85 * (eye < 0))


def _moon(u, v):
  return _Solid(np.maximum(_disc(u, v, 0.1, 0, 1), -_disc(u, v, 0.58, 0.2, 0.82)), bevel=0.35)


def _heart(u, v):
  wedge = (0, -1), (0.905, 0.13), (0.46, 0.5), (0, 0.65), (-0.46, 0.5), (-0.905, 0.13)
  lobes = _disc(u, v, -0.46, 0.4, 0.52), _disc(u, v, 0.46, 0.4, 0.52)
  return _Solid(_union(*lobes, _polygon(u, v, *wedge)), bevel=0.5)


def _table(u, v):
  top = _polygon(u, v, (-1.15, 0.35), (0.75, 0.35), (1.15, 0.8), (-0.75, 0.8))
  slab = (-1.15, 0.15), (0.75, 0.15), (1.15, 0.6), (1.15, 0.8), (0.75, 0.35), (-1.15, 0.35)
  outline = _union(
    top,
    _polygon(u, v, *slab),
    _rectangle(u, v, -1.1, -1, -0.88, 0.2),
    _rectangle(u, v, 0.5, -1, 0.72, 0.2),
    _rectangle(u, v, 0.9, -0.6, 1.08, 0.5),
    _rectangle(u, v, -0.66, -0.6, -0.5, 0.2),
  )
  faces = [(top < 0, (0, 0.94, 0.34)), (top >= 0, (0, 0, 1))]
  return _Solid(outline, seat=0.58, ink=0.35 * (top > 0), faces=faces)


# Shape: (drawing, how far it may lean in degrees, whether it may hang in the air).
SHAPES = {
  'ball': (_ball, 180, True),
  'cube': (_cube, 0, False),
  'cone': (_cone, 4, False),
  'ring': (_ring, 180, True),
  'star': (_star, 30, True),
  'tree': (_tree, 4, False),
  'house': (_house, 3, False),
  'cross': (_cross, 25, True),
  'arrow': (_arrow, 25, True),
  'cup': (_cup, 3, False),
  'fish': (_fish, 20, True),
  'moon': (_moon, 25, True),
  'heart': (_heart, 20, True),
  'table': (_table, 0, False),
}


@functools.cache
def table(shape: str) -> tuple[np.ndarray, np.ndarray, float | None]:
  """(cells, hull, seat) of a solid.

  Cells [G * G, 6] float32 hold distance, normal x y z, bulge in [0, 1] and ink in [0, 1]; hull
  [K, 2] the outermost points (u, v); seat is that of the solid.
  """
  axis = np.linspace(-REACH, REACH, GRID)
  u, v = np.meshgrid(axis, axis)
  solid = SHAPES[shape][0](u, v)
  d = solid.distance
  if solid.faces is not None:
    normal = np.zeros((*u.shape, 3)) + (0, 0, 1)
    for where, face in solid.faces:
      normal[where] = face
    bulge = np.clip((1 - v) / 2, 0, 1)
  else:
    if solid.round is not None:
      nx = np.clip(solid.round, -1, 1)
      normal = np.stack([nx, np.full_like(nx, solid.rise), np.sqrt(1 - nx**2) + 1e-3], -1)
    else:
      # At the edge the normal is the gradient of the distance, from the bevel inwards z.
      gv, gu = np.gradient(d, axis, axis)
      length = np.hypot(gu, gv) + 1e-6
      slope = 1 - np.clip(-d / solid.bevel, 0, 1)
      z = np.sqrt(1 - slope**2) + 1e-3
      normal = np.stack([gu / length * slope, gv / length * slope, z], -1)
    bulge = np.clip(normal[..., 2], 0, 1)
  normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
  ink = np.broadcast_to(solid.ink, d.shape)
  cells = np.concatenate([d[..., None], normal, bulge[..., None], ink[..., None]], -1)
  inside = np.stack([u[d <= 0], v[d <= 0]], -1)
  angle = np.arange(64) * np.pi / 32
  hull = inside[np.unique(np.argmax(inside @ (np.cos(angle), np.sin(angle)), axis=0))]
  return cells.astype(np.float32).reshape(-1, 6), hull, solid.seat


# --- textures: how much of the second color, in [0, 1], at surface point (u, v) ------------------


@functools.cache
def _cloud(octaves):
  """A periodic [256, 256] field of smooth noise, uniform in [0, 1]; the same in every process."""
  rng = np.random.default_rng(7)
  total = 0
  for octave in range(octaves):
    wave = np.fft.rfft2(rng.standard_normal((256, 256)))
    f = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)) * 256 / (4 * 2**octave)
    layer = np.fft.irfft2(wave * np.exp(-(f**2)))
    total = total + layer / layer.std() / 1.7**octave
  ranks = np.argsort(np.argsort(total, axis=None))  # makes it uniform
  return (ranks / total.size).reshape(256, 256).astype(np.float32)


def noise(u: np.ndarray, v: np.ndarray, octaves: int) -> np.ndarray:
  """Smooth noise in [0, 1] of period 1 at the points (u, v)."""
  return _cloud(octaves)[(v * 256).astype(np.int32) & 255, (u * 256).astype(np.int32) & 255]


def _step(wave, sharp):
  """A step at wave = 0; `sharp` makes it as wide as a pixel."""
  return np.clip(0.5 + wave * sharp, 0, 1)


def _inset(x):
  """The distance of x to the nearest whole number."""
  return 0.5 - abs(x - np.floor(x) - 0.5)


def _saw(x):
  return 2 * abs(x - np.floor(x) - 0.5)


# Of (u, v, sharp). The first eight are textures of objects, the others of surroundings.
PATTERNS = {
  'plain': lambda u, v, s: np.zeros_like(u),
  'striped': lambda u, v, s: _step(_saw(u) - 0.5, s),
  'dotted': lambda u, v, s: _step(0.32 - np.hypot(_saw(u * 0.8) - 0.5, _saw(v * 0.8) - 0.5), s),
  'checked': lambda u, v, s: _step((_saw(u * 0.5) - 0.5) * (_saw(v * 0.5) - 0.5) * 4, 2 * s),
  'gradient': lambda u, v, s: np.clip(0.5 + 0.3 * v, 0, 1),
  'speckled': lambda u, v, s: _step((noise(u * 0.15, v * 0.15, 4) - 0.62) * 5, s),
  'zigzag': lambda u, v, s: _step(_saw(v + 0.6 * _saw(u * 0.8)) - 0.5, s),
  'ringed': lambda u, v, s: _step(_saw(np.hypot(u, v)) - 0.5, s),
  'bricks': lambda u, v, s: (
    1 - _step(np.minimum(_inset(v), 1.6 * _inset(u / 2 + np.floor(v) % 2 / 2)) - 0.07, 3 * s)
  ),
  'tiles': lambda u, v, s: 1 - _step(np.minimum(_inset(u), _inset(v)) - 0.05, 3 * s),
  'planks': lambda u, v, s: (
    0.6 * (1 - _step(_inset(u) - 0.04, 3 * s))
    + 0.55 * noise(np.floor(u) * 0.37 + 0.02, v * 0.03 + np.floor(u) * 0.61, 4)
  ),
  'grass': lambda u, v, s: 0.75 * noise(u * 0.11, v * 0.11, 5),
  'waves': lambda u, v, s: np.clip(1.5 * noise(u * 0.06, v * 0.22, 3) - 0.45, 0, 1),
  'clouds': lambda u, v, s: np.clip(2.2 * noise(u * 0.06, v * 0.16, 4) - 1.1, 0, 1),
}
TEXTURES = tuple(PATTERNS)[:8]

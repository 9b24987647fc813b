"""What the scenes of the embedded data set are made of: 14 solids, 8 textures and the patterns of
their surroundings.

A solid is a signed distance field over (u to the right, v up), about two units tall, tabulated once
per process; a bevel turns the distance into a surface normal and a bulge, so that one lookup gives
an object's coverage, shading, depth and normals.
"""

import functools

import numpy as np

REACH, GRID = 1.25, 256  # a solid's table spans [-REACH, REACH]^2 with GRID^2 cells


def _disc(u, v, x, y, r):
  return np.hypot(u - x, v - y) - r


def _ellipse(u, v, x, y, a, b):
  k = np.hypot((u - x) / a, (v - y) / b)
  return k * (k - 1) / (np.hypot((u - x) / a**2, (v - y) / b**2) + 1e-6)


def _polygon(u, v, *corners):
  distance, inside = np.full(u.shape, np.inf), np.zeros(u.shape, bool)
  for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
    dx, dy = x1 - x0, y1 - y0
    t = np.clip(((u - x0) * dx + (v - y0) * dy) / (dx * dx + dy * dy), 0, 1)
    distance = np.minimum(distance, np.hypot(u - x0 - t * dx, v - y0 - t * dy))
    if dy:
      inside ^= ((v >= min(y0, y1)) & (v < max(y0, y1))) & (u < x0 + (v - y0) * dx / dy)
  return np.where(inside, -distance, distance)


def _rectangle(u, v, x0, y0, x1, y1):
  return _polygon(u, v, (x0, y0), (x1, y0), (x1, y1), (x0, y1))


def _ball(u, v):
  return dict(d=_disc(u, v, 0, 0, 1), bevel=1)


def _cube(u, v):
  d = _polygon(u, v, (-1, -1), (0.45, -1), (1, -0.5), (1, 1), (-0.45, 1), (-1, 0.45))
  front = (u < 0.45) & (v < 0.45)
  top = ~front & (v - 0.45 > u - 0.45)
  return dict(
    d=d,
    faces=[(front, (0, 0, 1)), (top, (0, 0.94, 0.34)), (~front & ~top, (0.94, 0, 0.34))],
    seat=0.7,
  )


def _cone(u, v):
  d = np.minimum(
    _polygon(u, v, (0, 1), (-0.78, -0.74), (0.78, -0.74)), _ellipse(u, v, 0, -0.74, 0.78, 0.26)
  )
  return dict(d=d, round=u / np.maximum(0.78 * (1 - v) / 1.74, 0.05), rise=0.4)


def _ring(u, v):
  return dict(d=abs(np.hypot(u, v) - 0.7) - 0.3, bevel=0.3)


def _star(u, v):
  angle = np.pi * (0.5 + np.arange(10) / 5)
  r = np.where(np.arange(10) % 2, 0.46, 1.1)
  return dict(d=_polygon(u, v, *zip(r * np.cos(angle), r * np.sin(angle) - 0.1)), bevel=0.4)


def _tree(u, v):
  crown = functools.reduce(
    np.minimum,
    [
      _disc(u, v, *lobe)
      for lobe in ((0, 0.5, 0.5), (-0.45, 0.1, 0.42), (0.45, 0.1, 0.42), (0, 0.05, 0.4))
    ],
  )
  trunk = _polygon(u, v, (-0.2, -1), (0.2, -1), (0.12, -0.1), (-0.12, -0.1))
  return dict(d=np.minimum(crown, trunk), bevel=0.45, ink=0.55 * (crown > 0))


def _house(u, v):
  walls, roof = (
    _rectangle(u, v, -0.78, -1, 0.78, 0.2),
    _polygon(u, v, (-1.05, 0.1), (1.05, 0.1), (0, 1)),
  )
  holes = functools.reduce(
    np.minimum,
    [
      _rectangle(u, v, *hole)
      for hole in ((-0.15, -1, 0.25, -0.3), (-0.6, -0.45, -0.3, -0.12), (0.42, -0.45, 0.68, -0.12))
    ],
  )
  return dict(
    d=np.minimum(walls, roof), bevel=0.1, ink=np.maximum(0.8 * (holes < 0), 0.42 * (roof < 0))
  )


def _cross(u, v):
  return dict(
    d=np.minimum(_rectangle(u, v, -0.34, -1, 0.34, 1), _rectangle(u, v, -1, -0.34, 1, 0.34)),
    bevel=0.22,
  )


def _arrow(u, v):
  return dict(
    bevel=0.25,
    d=_polygon(
      u,
      v,
      (-1.05, -0.27),
      (0.1, -0.27),
      (0.1, -0.8),
      (1.1, 0),
      (0.1, 0.8),
      (0.1, 0.27),
      (-1.05, 0.27),
    ),
  )


def _cup(u, v):
  body = _polygon(u, v, (-0.85, 0.8), (0.5, 0.8), (0.32, -0.9), (-0.67, -0.9))
  foot, rim = _ellipse(u, v, -0.175, -0.88, 0.495, 0.12), _ellipse(u, v, -0.175, 0.8, 0.675, 0.2)
  solid = np.minimum(np.minimum(body, foot), rim)
  handle = abs(np.hypot(u - 0.48, v - 0.05) - 0.44) - 0.12
  hollow = _ellipse(u, v, -0.175, 0.8, 0.57, 0.13) < 0
  return dict(
    d=np.minimum(solid, handle), round=np.where(solid < 0, (u + 0.175) / 0.68, 0), ink=0.72 * hollow
  )


def _fish(u, v):
  body, tail = (
    _ellipse(u, v, -0.25, 0, 0.82, 0.52),
    _polygon(u, v, (0.25, 0), (1.05, 0.6), (0.85, 0), (1.05, -0.6)),
  )
  fin = _polygon(u, v, (-0.45, 0.35), (0.15, 0.75), (0.15, 0.3))
  eye = np.maximum(_disc(u, v, -0.68, 0.12, 0.12), -_disc(u, v, -0.7, 0.13, 0.04))
  return dict(d=np.minimum(np.minimum(body, tail), fin), bevel=0.45, ink=0.85 * (eye < 0))


def _moon(u, v):
  return dict(d=np.maximum(_disc(u, v, 0.1, 0, 1), -_disc(u, v, 0.58, 0.2, 0.82)), bevel=0.35)


def _heart(u, v):
  lobes = np.minimum(_disc(u, v, -0.46, 0.4, 0.52), _disc(u, v, 0.46, 0.4, 0.52))
  wedge = _polygon(
    u, v, (0, -1), (0.905, 0.13), (0.46, 0.5), (0, 0.65), (-0.46, 0.5), (-0.905, 0.13)
  )
  return dict(d=np.minimum(lobes, wedge), bevel=0.5)


def _table(u, v):
  top = _polygon(u, v, (-1.15, 0.35), (0.75, 0.35), (1.15, 0.8), (-0.75, 0.8))
  slab = _polygon(
    u, v, (-1.15, 0.15), (0.75, 0.15), (1.15, 0.6), (1.15, 0.8), (0.75, 0.35), (-1.15, 0.35)
  )
  legs = [
    _rectangle(u, v, *leg)
    for leg in (
      (-1.1, -1, -0.88, 0.2),
      (0.5, -1, 0.72, 0.2),
      (0.9, -0.6, 1.08, 0.5),
      (-0.66, -0.6, -0.5, 0.2),
    )
  ]
  return dict(
    d=functools.reduce(np.minimum, [top, slab, *legs]),
    seat=0.58,
    ink=0.35 * (top > 0),
    faces=[(top < 0, (0, 0.94, 0.34)), (top >= 0, (0, 0, 1))],
  )


# shape: (drawing, how far it may lean in degrees, whether it may hang in the air)
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
def table(shape):
  """(cells [G, G, 6] float32: distance, normal x y z, bulge in [0, 1], ink in [0, 1]; hull [K, 2];
  seat or None).
  """
  axis = np.linspace(-REACH, REACH, GRID)
  u, v = np.meshgrid(axis, axis)
  spec = SHAPES[shape][0](u, v)
  d = spec['d']
  gv, gu = np.gradient(d, axis, axis)
  length = np.hypot(gu, gv) + 1e-6
  if 'faces' in spec:
    normal = np.zeros((*u.shape, 3)) + (0, 0, 1)
    for where, n in spec['faces']:
      normal[where] = n
    bulge = np.clip((1 - v) / 2, 0, 1)
  else:
    if 'round' in spec:
      nx = np.clip(spec['round'], -1, 1)
      normal = np.stack([nx, np.full_like(nx, spec.get('rise', 0)), np.sqrt(1 - nx**2) + 1e-3], -1)
    else:
      slope = 1 - np.clip(-d / spec['bevel'], 0, 1)
      normal = np.stack(
        [gu / length * slope, gv / length * slope, np.sqrt(1 - slope**2) + 1e-3], -1
      )
    bulge = np.clip(normal[..., 2], 0, 1)
  normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
  cells = np.concatenate(
    [
      d[..., None],
      normal,
      bulge[..., None],
      np.zeros_like(d)[..., None] + np.expand_dims(spec.get('ink', np.zeros_like(d)), -1),
    ],
    -1,
  ).astype(np.float32)
  inside, angle = np.stack([u[d <= 0], v[d <= 0]], -1), np.arange(64) * np.pi / 32
  hull = inside[np.unique(np.argmax(inside @ (np.cos(angle), np.sin(angle)), axis=0))]
  return cells.reshape(-1, 6), hull, spec.get('seat')


# --- Textures: how much of the second color, in [0, 1], at surface point (u, v); `sharp` softens
# edges to a pixel. ---


@functools.cache
def _cloud(octaves):
  """A periodic [256, 256] field of smooth noise, uniform in [0, 1]; the same in every process."""
  rng, total = np.random.default_rng(7), 0
  for octave in range(octaves):
    wave = np.fft.rfft2(rng.standard_normal((256, 256)))
    f = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)) * 256 / (4 * 2**octave)
    layer = np.fft.irfft2(wave * np.exp(-(f**2)))
    total = total + layer / layer.std() / 1.7**octave
  return (
    (np.argsort(np.argsort(total, axis=None)) / total.size).reshape(256, 256).astype(np.float32)
  )


def noise(u, v, octaves):
  return _cloud(octaves)[(v * 256).astype(np.int32) & 255, (u * 256).astype(np.int32) & 255]


def _step(wave, sharp):
  return np.clip(0.5 + wave * sharp, 0, 1)


def _inset(x):
  """The distance of x to the nearest whole number."""
  return 0.5 - abs(x - np.floor(x) - 0.5)


def _saw(x):
  return 2 * abs(x - np.floor(x) - 0.5)


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

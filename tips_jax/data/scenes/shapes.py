"""What the scenes of the embedded data set are made of: 14 solids, 8 textures and the patterns of their surroundings.

A solid is a signed distance field over (u to the right, v up), about two units tall, tabulated once per
process; a bevel turns the distance into a surface normal and a bulge, so that one lookup gives an object's coverage,
shading, depth and normals.
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
  d = _polygon(u, v, (-1, -1), (.45, -1), (1, -.5), (1, 1), (-.45, 1), (-1, .45))
  front = (u < .45) & (v < .45)
  top = ~front & (v - .45 > u - .45)
  return dict(d=d, faces=[(front, (0, 0, 1)), (top, (0, .94, .34)), (~front & ~top, (.94, 0, .34))], seat=.7)


def _cone(u, v):
  d = np.minimum(_polygon(u, v, (0, 1), (-.78, -.74), (.78, -.74)), _ellipse(u, v, 0, -.74, .78, .26))
  return dict(d=d, round=u / np.maximum(.78 * (1 - v) / 1.74, .05), rise=.4)


def _ring(u, v):
  return dict(d=abs(np.hypot(u, v) - .7) - .3, bevel=.3)


def _star(u, v):
  angle = np.pi * (.5 + np.arange(10) / 5)
  r = np.where(np.arange(10) % 2, .46, 1.1)
  return dict(d=_polygon(u, v, *zip(r * np.cos(angle), r * np.sin(angle) - .1)), bevel=.4)


def _tree(u, v):
  crown = functools.reduce(np.minimum, [
      _disc(u, v, *lobe) for lobe in ((0, .5, .5), (-.45, .1, .42), (.45, .1, .42), (0, .05, .4))])
  trunk = _polygon(u, v, (-.2, -1), (.2, -1), (.12, -.1), (-.12, -.1))
  return dict(d=np.minimum(crown, trunk), bevel=.45, ink=.55 * (crown > 0))


def _house(u, v):
  walls, roof = _rectangle(u, v, -.78, -1, .78, .2), _polygon(u, v, (-1.05, .1), (1.05, .1), (0, 1))
  holes = functools.reduce(np.minimum, [
      _rectangle(u, v, *hole) for hole in ((-.15, -1, .25, -.3), (-.6, -.45, -.3, -.12), (.42, -.45, .68, -.12))])
  return dict(d=np.minimum(walls, roof), bevel=.1, ink=np.maximum(.8 * (holes < 0), .42 * (roof < 0)))


def _cross(u, v):
  return dict(d=np.minimum(_rectangle(u, v, -.34, -1, .34, 1), _rectangle(u, v, -1, -.34, 1, .34)), bevel=.22)


def _arrow(u, v):
  return dict(bevel=.25, d=_polygon(
      u, v, (-1.05, -.27), (.1, -.27), (.1, -.8), (1.1, 0), (.1, .8), (.1, .27), (-1.05, .27)))


def _cup(u, v):
  body = _polygon(u, v, (-.85, .8), (.5, .8), (.32, -.9), (-.67, -.9))
  foot, rim = _ellipse(u, v, -.175, -.88, .495, .12), _ellipse(u, v, -.175, .8, .675, .2)
  solid = np.minimum(np.minimum(body, foot), rim)
  handle = abs(np.hypot(u - .48, v - .05) - .44) - .12
  hollow = _ellipse(u, v, -.175, .8, .57, .13) < 0
  return dict(d=np.minimum(solid, handle), round=np.where(solid < 0, (u + .175) / .68, 0), ink=.72 * hollow)


def _fish(u, v):
  body, tail = _ellipse(u, v, -.25, 0, .82, .52), _polygon(u, v, (.25, 0), (1.05, .6), (.85, 0), (1.05, -.6))
  fin = _polygon(u, v, (-.45, .35), (.15, .75), (.15, .3))
  eye = np.maximum(_disc(u, v, -.68, .12, .12), -_disc(u, v, -.7, .13, .04))
  return dict(d=np.minimum(np.minimum(body, tail), fin), bevel=.45, ink=.85 * (eye < 0))


def _moon(u, v):
  return dict(d=np.maximum(_disc(u, v, .1, 0, 1), -_disc(u, v, .58, .2, .82)), bevel=.35)


def _heart(u, v):
  lobes = np.minimum(_disc(u, v, -.46, .4, .52), _disc(u, v, .46, .4, .52))
  wedge = _polygon(u, v, (0, -1), (.905, .13), (.46, .5), (0, .65), (-.46, .5), (-.905, .13))
  return dict(d=np.minimum(lobes, wedge), bevel=.5)


def _table(u, v):
  top = _polygon(u, v, (-1.15, .35), (.75, .35), (1.15, .8), (-.75, .8))
  slab = _polygon(u, v, (-1.15, .15), (.75, .15), (1.15, .6), (1.15, .8), (.75, .35), (-1.15, .35))
  legs = [_rectangle(u, v, *leg) for leg in (
      (-1.1, -1, -.88, .2), (.5, -1, .72, .2), (.9, -.6, 1.08, .5), (-.66, -.6, -.5, .2))]
  return dict(d=functools.reduce(np.minimum, [top, slab, *legs]), seat=.58, ink=.35 * (top > 0),
              faces=[(top < 0, (0, .94, .34)), (top >= 0, (0, 0, 1))])


# shape: (drawing, how far it may lean in degrees, whether it may hang in the air)
SHAPES = {
    'ball': (_ball, 180, True), 'cube': (_cube, 0, False), 'cone': (_cone, 4, False), 'ring': (_ring, 180, True),
    'star': (_star, 30, True), 'tree': (_tree, 4, False), 'house': (_house, 3, False), 'cross': (_cross, 25, True),
    'arrow': (_arrow, 25, True), 'cup': (_cup, 3, False), 'fish': (_fish, 20, True), 'moon': (_moon, 25, True),
    'heart': (_heart, 20, True), 'table': (_table, 0, False)}


@functools.cache
def table(shape):
  """(cells [G, G, 6] float32: distance, normal x y z, bulge in [0, 1], ink in [0, 1]; hull [K, 2]; seat or None)."""
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
      normal = np.stack([gu / length * slope, gv / length * slope, np.sqrt(1 - slope**2) + 1e-3], -1)
    bulge = np.clip(normal[..., 2], 0, 1)
  normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
  cells = np.concatenate([d[..., None], normal, bulge[..., None], np.zeros_like(d)[..., None] + np.expand_dims(
      spec.get('ink', np.zeros_like(d)), -1)], -1).astype(np.float32)
  inside, angle = np.stack([u[d <= 0], v[d <= 0]], -1), np.arange(64) * np.pi / 32
  hull = inside[np.unique(np.argmax(inside @ (np.cos(angle), np.sin(angle)), axis=0))]
  return cells.reshape(-1, 6), hull, spec.get('seat')


# --- Textures: how much of the second color, in [0, 1], at surface point (u, v); `sharp` softens edges to a pixel. ---


@functools.cache
def _cloud(octaves):
  """A periodic [256, 256] field of smooth noise, uniform in [0, 1]; the same in every process."""
  rng, total = np.random.default_rng(7), 0
  for octave in range(octaves):
    wave = np.fft.rfft2(rng.standard_normal((256, 256)))
    f = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)) * 256 / (4 * 2**octave)
    layer = np.fft.irfft2(wave * np.exp(-f**2))
    total = total + layer / layer.std() / 1.7**octave
  return (np.argsort(np.argsort(total, axis=None)) / total.size).reshape(256, 256).astype(np.float32)


def noise(u, v, octaves):
  return _cloud(octaves)[(v * 256).astype(np.int32) & 255, (u * 256).astype(np.int32) & 255]


def _step(wave, sharp):
  return np.clip(.5 + wave * sharp, 0, 1)


def _inset(x):
  """The distance of x to the nearest whole number."""
  return .5 - abs(x - np.floor(x) - .5)


def _saw(x):
  return 2 * abs(x - np.floor(x) - .5)


PATTERNS = {
    'plain': lambda u, v, s: np.zeros_like(u),
    'striped': lambda u, v, s: _step(_saw(u) - .5, s),
    'dotted': lambda u, v, s: _step(.32 - np.hypot(_saw(u * .8) - .5, _saw(v * .8) - .5), s),
    'checked': lambda u, v, s: _step((_saw(u * .5) - .5) * (_saw(v * .5) - .5) * 4, 2 * s),
    'gradient': lambda u, v, s: np.clip(.5 + .3 * v, 0, 1),
    'speckled': lambda u, v, s: _step((noise(u * .15, v * .15, 4) - .62) * 5, s),
    'zigzag': lambda u, v, s: _step(_saw(v + .6 * _saw(u * .8)) - .5, s),
    'ringed': lambda u, v, s: _step(_saw(np.hypot(u, v)) - .5, s),
    'bricks': lambda u, v, s: 1 - _step(np.minimum(_inset(v), 1.6 * _inset(u / 2 + np.floor(v) % 2 / 2)) - .07, 3 * s),
    'tiles': lambda u, v, s: 1 - _step(np.minimum(_inset(u), _inset(v)) - .05, 3 * s),
    'planks': lambda u, v, s: .6 * (1 - _step(_inset(u) - .04, 3 * s)) + .55 * noise(
        np.floor(u) * .37 + .02, v * .03 + np.floor(u) * .61, 4),
    'grass': lambda u, v, s: .75 * noise(u * .11, v * .11, 5),
    'waves': lambda u, v, s: np.clip(1.5 * noise(u * .06, v * .22, 3) - .45, 0, 1),
    'clouds': lambda u, v, s: np.clip(2.2 * noise(u * .06, v * .16, 4) - 1.1, 0, 1)}
TEXTURES = tuple(PATTERNS)[:8]

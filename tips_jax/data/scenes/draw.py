"""The picture half of the embedded data set: a small scene, drawn in NumPy, with exact annotations.

A pinhole camera (focal length = picture width) looks over a ground plane at 1 to 5 solids, painted
far to near. Colors and textures are drawn independently of the shape, and the surroundings use the
same colors: a patch's raw pixels say little about its class, its context says much. Optionally a
share of the objects has the typical look of its shape instead, as in photographs: what a small
model can learn in minutes. Axes: x right, y up, z toward the viewer for normals; depth in meters
along the viewing axis.
"""

import dataclasses
import typing
from collections.abc import Sequence

import numpy as np

from tips_jax.data.scenes.shapes import GRID, PATTERNS, REACH, SHAPES, TEXTURES, noise, table

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
SIZES = {'small': 0.27, 'medium': 0.38, 'large': 0.5}  # half-heights in meters
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
STUFF = ('sky', 'wall', 'mountain', 'ground', 'water', 'floor')
MASK_CLASSES = STUFF + tuple(SHAPES)
# Name: (far stuff, its pattern, near stuff, its pattern).
BACKGROUNDS = {
  'field': ('sky', 'clouds', 'ground', 'grass'),
  'sea': ('sky', 'clouds', 'water', 'waves'),
  'hills': ('mountain', 'clouds', 'ground', 'grass'),
  'lake': ('mountain', 'clouds', 'water', 'waves'),
  'hall': ('wall', 'plain', 'floor', 'checked'),
  'yard': ('wall', 'bricks', 'floor', 'tiles'),
  'parlour': ('wall', 'striped', 'floor', 'planks'),
  'studio': ('wall', 'gradient', 'floor', 'plain'),
}

_ODDS = (0.1, 0.24, 0.29, 0.22, 0.15)  # of 1 to 5 objects
MOST = len(_ODDS)
_NEAR, _FAR = 1.8, 3.4  # meters, of the objects
_HORIZON = 12.0  # meters, of the backdrop
# Meters between the backs of two objects, and their thickness at most: their depth intervals never
# meet, so that painting far to near is exact.
_GAP, _THICK = 0.27, 0.22


@dataclasses.dataclass
class Item:
  """One object of a scene."""

  shape: str
  color: str
  texture: str
  size: str
  # Center and radius as fractions of the picture.
  x: float
  y: float
  z: float  # meters to its back; it bulges toward the viewer by at most _THICK
  radius: float
  tilt: float  # radians
  flip: float  # -1 mirrors the shape
  stretch: tuple[float, float]
  # The texture: whether its second color is pale, its frequency and its rotation.
  pale_second: bool
  frequency: float
  phase: float
  extent: tuple[float, float, float, float] = (0, 0, 0, 0)  # ymin xmin ymax xmax, unoccluded
  on: 'Item | None' = None  # the object it stands on
  lifted: bool = False  # whether it hangs in the air
  # Set by drawing: ymin xmin ymax xmax of the visible pixels, in [0, 1], and their number.
  box: tuple[float, float, float, float] = (0, 0, 0, 0)
  pixels: int = 0


@dataclasses.dataclass
class Scene:
  """A picture and its annotations."""

  image: np.ndarray  # uint8 [H, W, 3]
  mask: np.ndarray  # uint8 [H, W], ids into MASK_CLASSES
  depth: np.ndarray  # uint16 [H, W], millimeters
  normals: np.ndarray  # uint8 [H, W, 3], n * 127.5 + 127.5
  owner: np.ndarray  # int8 [H, W], number of the item; -1: none
  items: list[Item]  # the visible objects, the largest first
  # The surroundings: stuff, pattern, color.
  far: tuple[str, str, str]
  near: tuple[str, str, str]


def _unit(*v):
  return np.asarray(v, np.float32) / np.float32(np.linalg.norm(v))


def pick(rng: np.random.Generator, options: Sequence[typing.Any]) -> typing.Any:
  """One of the options, each as likely."""
  return options[int(rng.integers(len(options)))]


def _palette(color):
  return np.asarray(COLORS[color], np.float32) / 255


def _place(rng, *, most, typical, horizon, height, colors):
  """Chooses 1 to `most` objects, far to near; all lengths in picture widths.

  No object covers half of another's extent, except where one stands on the other.
  """
  odds = np.array(_ODDS[:most])
  count = rng.choice(most, p=odds / odds.sum()) + 1
  slack = np.sort(rng.uniform(0, _FAR - _NEAR - _GAP * (count - 1), count))
  depths = (_NEAR + slack + _GAP * np.arange(count))[::-1]
  # Number of the object that stands on the one before it.
  stacked = int(rng.integers(1, count)) if count > 1 and rng.random() < 0.22 else None
  items = []
  for i, z in enumerate(depths):
    below = None
    if i == stacked and items and table(items[-1].shape)[2] is not None:
      below = items[-1]
      z = below.z - _GAP + 0.02
    item = _choose(rng, z, below, colors, carries=i + 1 == stacked, small=i == stacked)
    if typical and rng.random() < typical:
      color, item.texture = LOOKS[item.shape]
      if color in colors:  # that of the surroundings would hide it
        item.color = color
    item.radius = SIZES[item.size] * float(rng.uniform(0.93, 1.07)) / item.z
    if _find_position(rng, item, items, base=horizon + height / item.z):
      items.append(item)
  return items


def _choose(rng, z, below, colors, *, carries, small):
  """An object without radius and position. `carries`: the next one shall stand on it."""
  shape = pick(rng, ('cube', 'table') if carries else tuple(SHAPES))
  size = 'small' if small else pick(rng, tuple(SIZES))
  if carries and size == 'small':
    size = 'medium'
  _, lean, may_float = SHAPES[shape]
  return Item(
    shape=shape,
    color=pick(rng, colors),
    texture=pick(rng, TEXTURES),
    size=size,
    x=0.0,
    y=0.0,
    z=float(z),
    radius=0.0,
    tilt=float(np.deg2rad(rng.uniform(-lean, lean))),
    flip=pick(rng, (-1.0, 1.0)),
    stretch=tuple(rng.uniform(0.94, 1.06, 2).tolist()),
    pale_second=bool(rng.random() < 0.5),
    frequency=float(rng.uniform(1.3, 1.9)),
    phase=float(rng.uniform(0, 2 * np.pi)),
    on=below,
    lifted=bool(may_float and below is None and rng.random() < 0.3),
  )


def _find_position(rng, item, items, *, base):
  """Sets x, y and extent so that no object hides another; False after twelve tries."""
  below = item.on
  dx, dy = _to_picture(item, *table(item.shape)[1].T)
  for _ in range(12):
    if below:
      item.x = below.x + below.radius * float(rng.uniform(-0.25, 0.25))
      base = below.y - below.radius * below.stretch[1] * table(below.shape)[2]
    else:
      item.x = float(rng.uniform(0.1, 0.9))
      # Half of those in the air hang over another one, for the relation 'above'.
      if item.lifted and items and rng.random() < 0.5:
        item.x = items[rng.integers(len(items))].x + float(rng.uniform(-0.05, 0.05))
    item.y = base - dy.max()
    if item.lifted:
      highest = -dy.min() + 0.02
      item.y = float(rng.uniform(min(highest, item.y), max(item.y - 0.15, highest)))
    item.extent = (item.y + dy.min(), item.x + dx.min(), item.y + dy.max(), item.x + dx.max())
    clear = all(_hidden(other, item) < 0.5 for other in items if other is not below)
    if clear and (not below or item.extent[0] > -0.1):
      return True
  return False


def _to_picture(item, u, v):
  """Offsets (right, down) in picture widths of surface point (u, v) from the object's center."""
  c, s = np.cos(item.tilt), np.sin(item.tilt)
  u, v = u * item.flip * item.stretch[0], v * item.stretch[1]
  return item.radius * (c * u - s * v), -item.radius * (s * u + c * v)


def _hidden(behind, front):
  """The share of one extent that another covers."""
  (t0, l0, b0, r0), (t1, l1, b1, r1) = behind.extent, front.extent
  height = max(0, min(b0, b1) - max(t0, t1))
  width = max(0, min(r0, r1) - max(l0, l1))
  return height * width / ((b0 - t0) * (r0 - l0))


class _Canvas:
  def __init__(self, size):
    self.rgb = np.zeros((size, size, 3), np.float32)
    self.mask = np.zeros((size, size), np.uint8)
    self.depth = np.zeros((size, size), np.float32)
    self.normals = np.zeros((size, size, 3), np.float32)
    self.owner = np.full((size, size), -1, np.int8)


def _backdrop(canvas, rng, *, far, near, horizon, height, light):
  """Paints far and near stuff.

  Returns (first ground row, world x of the ground [h, W], depth of the ground [h, 1]).
  """
  size = len(canvas.rgb)
  columns = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5)[None]
  rows = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None]
  distance = float(rng.uniform(3.8, 5.5)) if far[0] == 'wall' else _HORIZON
  first = int(np.clip(np.ceil((horizon + height / distance) * size), 1, size - 1))
  shift = rng.uniform(0, 8, 4).astype(np.float32)
  up = (first - 0.5) / size - rows[:first]
  _paint_far(canvas, far, columns, up, distance, horizon, shift, light)

  depth = np.minimum(height / np.maximum(rows[first:] - horizon, 1e-3), distance)
  x = columns * depth
  soft = 0.66 * _palette(near[2]) + 0.22
  scale = {'checked': 4.0, 'tiles': 2.6}.get(near[1], 3.0)
  detail = np.clip(size * 0.5 / (depth * scale), 0, 1)  # patterns finer than a pixel fade out
  u, v = x * scale + shift[2], depth * scale + shift[3] + 0 * x
  amount = PATTERNS[near[1]](u, v, size / (depth * scale * 3)) * detail + 0.4 * (1 - detail)
  second = soft * 0.5 + 0.45 if near[1] == 'waves' else soft * 0.6
  color = soft + amount[..., None] * (second - soft)
  haze = np.clip((depth - 2.5) / 12, 0, 0.35)[..., None]
  canvas.rgb[first:] = color * (1 - haze) + haze * canvas.rgb[:first].mean((0, 1))
  canvas.mask[first:] = STUFF.index(near[0])
  canvas.depth[first:] = depth
  canvas.normals[first:] = (0, 1, 0)
  return first, x, depth


def _paint_far(canvas, far, columns, up, distance, horizon, shift, light):
  """Paints wall, sky or mountains into the rows above the ground; `up` [h, 1] is their height."""
  size = len(canvas.rgb)
  first = len(up)
  stuff, pattern, color_name = far
  tone = _palette(color_name)
  soft = 0.62 * tone + 0.33
  u, v = (columns * distance + shift[0]) + 0 * up, up * distance + shift[1] + 0 * columns
  if stuff == 'wall':
    scale = {'bricks': 2.6, 'striped': 1.3, 'gradient': 0.55}.get(pattern, 1)
    if pattern != 'bricks':
      v = v - shift[1] - 1.8
    amount = PATTERNS[pattern](u * scale, v * scale, size / (distance * scale * 2))[..., None]
    if pattern == 'bricks':
      color = soft + amount * (0.5 * (tone * 0.3 + 0.6) + 0.2 - 0.45 * soft)
    else:
      color = soft + amount * (-0.28 * soft)
    # Brightest near the light.
    color = color * (1.06 - 0.25 * np.hypot(columns - np.sign(light[0]) * 0.3, up - 0.4)[..., None])
  else:
    amount = PATTERNS['clouds'](u * 0.5, v * 0.5, 1)[..., None]
    bright = np.clip(1.15 - up * 1.5, 0.55, 1.15)[..., None]
    sky = soft * 0.92 if stuff == 'sky' else 0.35 * soft + np.float32(0.52)
    color = (sky * (0.72 + 0.3 * bright)) * (1 - 0.75 * amount) + 0.75 * amount
  canvas.rgb[:first] = color
  canvas.mask[:first] = STUFF.index('sky' if stuff == 'mountain' else stuff)
  canvas.depth[:first] = distance
  canvas.normals[:first] = (0, 0, 1)
  if stuff == 'mountain':
    waves = noise(columns[0] * 0.22 + shift[2], columns[0] * 0 + shift[3], 2)
    top = 0.07 + 0.2 * horizon + 0.3 * horizon * waves
    ridge = np.clip((top - up) * size + 0.5, 0, 1)[..., None]
    rough = (0.62 + 0.4 * noise(u * 0.12, v * 0.25, 5))[..., None]
    rock = soft * rough * (0.82 + 0.3 * (up / top)[..., None])
    canvas.rgb[:first] += ridge * (rock - canvas.rgb[:first])
    canvas.mask[:first][ridge[..., 0] > 0.5] = STUFF.index('mountain')


def _shadow(canvas, item, light, *, first, x, depth):
  """Darkens the ground on the far side of an object from the light."""
  foot = item if item.on is None else item.on
  radius = item.radius * item.z
  lift = (foot.extent[2] - item.extent[2]) * item.z
  along = (depth[:, 0] - foot.z - light[2] * 0.3 * radius) / (0.55 * radius)
  rows = np.flatnonzero(abs(along) < 1.7)
  if not len(rows):
    return
  rows = slice(rows[0], rows[-1] + 1)
  offset = light[0] * (0.5 * radius + 0.4 * lift)
  across = (x[rows] - (item.x - 0.5) * item.z + offset) / (1.05 * radius)
  strength = 0.5 if item.on is None and not item.lifted else 0.28
  shade = np.exp(-((across**2 + along[rows, None] ** 2) ** 1.5))
  canvas.rgb[first:][rows] *= (1 - strength * shade)[..., None]


def _paint(canvas, index, item, light):
  """Paints an object over what is there: color, mask, depth, normals and owner."""
  size = len(canvas.rgb)
  top, left, bottom, right = (int(k * size) for k in item.extent)
  y0, y1 = max(top - 2, 0), min(bottom + 3, size)
  x0, x1 = max(left - 2, 0), min(right + 3, size)
  if y0 >= y1 or x0 >= x1:
    return
  # Surface point (u, v) of each pixel, and its cell in the shape's table.
  right = ((np.arange(x0, x1, dtype=np.float32) + 0.5) / size - item.x)[None] / item.radius
  up = (item.y - (np.arange(y0, y1, dtype=np.float32) + 0.5) / size)[:, None] / item.radius
  c, s = np.float32(np.cos(item.tilt)), np.float32(np.sin(item.tilt))
  u = (c * right + s * up) * (item.flip / item.stretch[0])
  v = (c * up - s * right) / item.stretch[1]
  cells = table(item.shape)[0]
  pixel = np.float32(item.radius * size)
  spec = cells[_cell(v) * GRID + _cell(u)]
  covered = np.flatnonzero(spec[..., 0] * pixel < 0.5)
  where = (covered // (x1 - x0) + y0) * size + covered % (x1 - x0) + x0
  d, nx, ny, nz, bulge, ink = spec.reshape(-1, 6)[covered].T
  u, v = u.reshape(-1)[covered], v.reshape(-1)[covered]
  nx = nx * np.float32(item.flip)
  normal = np.stack([c * nx - s * ny, s * nx + c * ny, nz], -1)

  wrap = item.frequency * (1 + 0.45 * (1 - nz))  # the texture crowds toward the rim, as on a solid
  if item.texture == 'gradient':
    wrap = np.float32(1.6)
  if item.texture != 'ringed':
    turn, lean = np.float32(np.cos(item.phase)), np.float32(np.sin(item.phase))
    u, v = turn * u - lean * v, lean * u + turn * v
  amount = PATTERNS[item.texture](u * wrap, v * wrap, pixel / np.float32(2 * item.frequency))
  first = _palette(item.color)
  second = first * 0.35 + 0.65 if item.pale_second else first * 0.42
  lit = np.maximum(normal @ light, 0)
  outline = 1 - 0.38 * np.clip(1.6 + d * pixel, 0, 1)
  shade = (1 - ink) * (0.5 + 0.62 * lit) * outline
  color = (first + amount[:, None] * (second - first)) * shade[:, None]
  color += (0.22 * lit**12)[:, None]  # a highlight

  # Colors blend at the rim; the annotations of a pixel are those of one object.
  rgb = canvas.rgb.reshape(-1, 3)
  alpha = np.clip(0.5 - d * pixel, 0, 1)[:, None]
  rgb[where] += alpha * (color - rgb[where])
  solid = alpha[:, 0] > 0.5
  where = where[solid]
  thickness = min(0.5 * item.radius * item.z, _THICK)
  canvas.mask.reshape(-1)[where] = MASK_CLASSES.index(item.shape)
  canvas.depth.reshape(-1)[where] = item.z - thickness * bulge[solid]
  canvas.normals.reshape(-1, 3)[where] = normal[solid]
  canvas.owner.reshape(-1)[where] = index


def _cell(k):
  """The row or column of a shape's table for a surface coordinate."""
  return np.clip((k + REACH) * ((GRID - 1) / (2 * REACH)) + 0.5, 0, GRID - 1).astype(np.int32)


def draw(
  index: int, *, size: int = 96, seed: int = 0, objects: int = MOST, typical: float = 0.0
) -> Scene:
  """Draws scene number `index` at size x size pixels, of at most `objects` objects.

  `typical` is the share of objects with the LOOKS of their shape. The scene is a function of these
  five numbers alone.
  """
  rng = np.random.default_rng((seed, index))
  background = BACKGROUNDS[pick(rng, tuple(BACKGROUNDS))]
  colors = [tuple(COLORS)[k] for k in rng.permutation(len(COLORS))]
  far = (*background[:2], colors[0])
  near = (*background[2:], colors[1])
  horizon = float(rng.uniform(0.26, 0.46))
  height = float(rng.uniform(0.75, 1)) * (0.95 - horizon) * _NEAR
  # From the left or the right, above, and before the scene.
  side = pick(rng, (-1, 1))
  light = _unit(side * rng.uniform(0.35, 0.8), rng.uniform(0.35, 0.8), rng.uniform(0.55, 0.8))

  canvas = _Canvas(size)
  first, x, depth = _backdrop(
    canvas, rng, far=far, near=near, horizon=horizon, height=height, light=light
  )
  items = _place(
    rng, most=objects, typical=typical, horizon=horizon, height=height, colors=colors[2:]
  )
  for item in items:
    _shadow(canvas, item, light, first=first, x=x, depth=depth)
  for i, item in enumerate(items):
    _paint(canvas, i, item, light)

  items, owner = _visible(items, canvas.owner)
  # The camera: noise and exposure.
  image = rng.standard_normal(canvas.rgb.shape, dtype=np.float32)
  image *= np.float32(rng.uniform(1.5, 5))
  image += canvas.rgb * np.float32(255 * rng.uniform(0.88, 1.06))
  return Scene(
    image=np.clip(image, 0, 255).astype(np.uint8),
    mask=canvas.mask,
    depth=np.rint(canvas.depth * 1000).astype(np.uint16),
    normals=np.rint(canvas.normals * 127.5 + 127.5).astype(np.uint8),
    owner=owner,
    items=items,
    far=far,
    near=near,
  )


def _visible(items: Sequence[Item], owner: np.ndarray) -> tuple[list[Item], np.ndarray]:
  """The items with their visible boxes, the largest first, and `owner` with their new numbers.

  Objects of which hardly a pixel is visible are dropped.
  """
  least = max(1, owner.size // 1200)
  kept = []
  for i, item in enumerate(items):
    visible = owner == i
    item.pixels = int(np.count_nonzero(visible))
    if item.pixels >= least:
      kept.append(i)
      rows = np.flatnonzero(visible.any(1))
      columns = np.flatnonzero(visible.any(0))
      corners = (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)
      item.box = tuple(float(k) / len(owner) for k in corners)
  kept.sort(key=lambda i: -items[i].pixels)
  renumber = np.full(len(items) + 1, -1, np.int8)  # the last is that of -1
  renumber[kept] = np.arange(len(kept))
  return [items[i] for i in kept], renumber[owner]

"""The picture half of the embedded data set: a small scene, drawn in NumPy, with everything about
it known exactly.

A pinhole camera (focal length = picture width) looks over a ground plane at 1 to 5 solids, painted
far to near. Colors and textures are drawn independently of the shape, and the surroundings use the
same colors: a patch's raw pixels say little about its class, what is around it says much. Where
asked for, a share of the objects looks as is typical of its kind instead, as in the world: what a
small model can learn in minutes.
Axes: x right, y up, z toward the viewer for normals; depth in meters along the viewing axis.
"""

import dataclasses

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
LOOKS = {  # what is typical of a shape: color, texture
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
# name: (far stuff, its pattern, near stuff, its pattern)
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
_NEAR, _FAR, _HORIZON = (
  1.8,
  3.4,
  12.0,
)  # meters: nearest and farthest object, and where the backdrop hangs
_GAP, _THICK = (
  0.27,
  0.22,
)  # no two objects' depth intervals meet, so that painting far to near is exact


@dataclasses.dataclass
class Item:
  """One object: what it is (shape .. size), where it stands, and what is seen of it (box, pixels;
  set by drawing).
  """

  shape: str
  color: str
  texture: str
  size: str
  x: float  # center column and row, fractions of the picture; radius likewise
  y: float
  z: float  # meters to its back; it bulges toward the viewer by at most _THICK
  radius: float
  tilt: float
  flip: float
  stretch: tuple[float, float]
  pale_second: bool
  frequency: float
  phase: float
  extent: tuple[float, float, float, float] = (0, 0, 0, 0)  # ymin xmin ymax xmax, unoccluded
  on: 'Item | None' = None
  lifted: bool = False
  box: tuple[float, float, float, float] = (
    0,
    0,
    0,
    0,
  )  # ymin xmin ymax xmax of the visible pixels, in [0, 1]
  pixels: int = 0


@dataclasses.dataclass
class Scene:
  """Picture and truth: image and normals [H, W, 3] uint8, mask [H, W] uint8, depth [H, W] uint16
  mm, owner [H, W] int8.

  `items` are the visible objects, the largest first; `owner` indexes them (-1: none). `far` and
  `near` are (stuff, pattern, color).
  """

  image: np.ndarray
  mask: np.ndarray
  depth: np.ndarray
  normals: np.ndarray
  owner: np.ndarray
  items: list[Item]
  background: str
  far: tuple[str, str, str]
  near: tuple[str, str, str]


def _unit(*v):
  return np.asarray(v, np.float32) / np.float32(np.linalg.norm(v))


def _pick(rng, options):
  return options[int(rng.integers(len(options)))]


def _palette(color):
  return np.asarray(COLORS[color], np.float32) / 255


def _place(rng, *, most, typical, horizon, height, colors):
  """Choose 1 to `most` objects, far to near; all lengths in picture widths.

  No object's extent covers half of another's, but where one stands on the other.
  """
  odds = np.array(_ODDS[:most])
  count = rng.choice(most, p=odds / odds.sum()) + 1
  slack = np.sort(rng.uniform(0, _FAR - _NEAR - _GAP * (count - 1), count))
  depths = (_NEAR + slack + _GAP * np.arange(count))[::-1]
  stacked = int(rng.integers(1, count)) if count > 1 and rng.random() < 0.22 else None
  items = []
  for i, z in enumerate(depths):
    shape = _pick(rng, tuple(SHAPES) if i + 1 != stacked else ('cube', 'table'))
    size = _pick(rng, tuple(SIZES)) if i != stacked else 'small'
    if i + 1 == stacked and size == 'small':
      size = 'medium'
    below = items[-1] if i == stacked and items and table(items[-1].shape)[2] is not None else None
    _, lean, may_float = SHAPES[shape]
    item = Item(
      shape=shape,
      color=_pick(rng, colors),
      texture=_pick(rng, TEXTURES),
      size=size,
      x=0.0,
      y=0.0,
      z=float(below.z - _GAP + 0.02 if below else z),
      radius=0.0,
      tilt=float(np.deg2rad(rng.uniform(-lean, lean))),
      flip=_pick(rng, (-1.0, 1.0)),
      stretch=tuple(rng.uniform(0.94, 1.06, 2).tolist()),
      pale_second=bool(rng.random() < 0.5),
      frequency=float(rng.uniform(1.3, 1.9)),
      phase=float(rng.uniform(0, 2 * np.pi)),
      on=below,
      lifted=bool(may_float and below is None and rng.random() < 0.3),
    )
    if typical and rng.random() < typical:
      color, item.texture = LOOKS[shape]
      item.color = (
        color if color in colors else item.color
      )  # that of the surroundings would hide it
    item.radius = SIZES[item.size] * float(rng.uniform(0.93, 1.07)) / item.z
    dx, dy = _to_picture(item, *table(item.shape)[1].T)
    base = horizon + height / item.z
    for _ in range(12):
      if below:
        item.x = below.x + below.radius * float(rng.uniform(-0.25, 0.25))
        base = below.y - below.radius * below.stretch[1] * table(below.shape)[2]
      else:
        item.x = float(rng.uniform(0.1, 0.9))
        if item.lifted and items and rng.random() < 0.5:
          item.x = items[rng.integers(len(items))].x + float(rng.uniform(-0.05, 0.05))
      item.y = base - dy.max()
      if item.lifted:
        item.y = float(
          rng.uniform(min(-dy.min() + 0.02, item.y), max(item.y - 0.15, -dy.min() + 0.02))
        )
      item.extent = (item.y + dy.min(), item.x + dx.min(), item.y + dy.max(), item.x + dx.max())
      clear = all(_hidden(other, item) < 0.5 for other in items if other is not below)
      if clear and (not below or item.extent[0] > -0.1):
        items.append(item)
        break
  return items


def _to_picture(item, u, v):
  """Offsets (right, down) in picture widths of surface point (u, v) from the object's center."""
  c, s = np.cos(item.tilt), np.sin(item.tilt)
  u, v = u * item.flip * item.stretch[0], v * item.stretch[1]
  return item.radius * (c * u - s * v), -item.radius * (s * u + c * v)


def _hidden(behind, front):
  (t0, l0, b0, r0), (t1, l1, b1, r1) = behind.extent, front.extent
  return (
    max(0, min(b0, b1) - max(t0, t1)) * max(0, min(r0, r1) - max(l0, l1)) / ((b0 - t0) * (r0 - l0))
  )


class _Canvas:
  def __init__(self, size):
    self.rgb = np.zeros((size, size, 3), np.float32)
    self.mask = np.zeros((size, size), np.uint8)
    self.depth = np.zeros((size, size), np.float32)
    self.normals = np.zeros((size, size, 3), np.float32)
    self.owner = np.full((size, size), -1, np.int8)


def _backdrop(canvas, rng, *, far, near, horizon, height, light):
  """Paint far and near stuff; returns (first ground row, ground's world x [h, W], ground's depth
  [h, 1]).
  """
  size = len(canvas.rgb)
  columns = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5)[None]
  rows = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None]
  wall = float(rng.uniform(3.8, 5.5)) if far[0] == 'wall' else _HORIZON
  first = int(np.clip(np.ceil((horizon + height / wall) * size), 1, size - 1))
  shift = rng.uniform(0, 8, 4).astype(np.float32)

  tone, up = _palette(far[2]), (first - 0.5) / size - rows[:first]
  soft = 0.62 * tone + 0.33
  u, v = (columns * wall + shift[0]) + 0 * up, up * wall + shift[1] + 0 * columns
  if far[0] == 'wall':
    scale = {'bricks': 2.6, 'striped': 1.3, 'gradient': 0.55}.get(far[1], 1)
    v = v if far[1] == 'bricks' else v - shift[1] - 1.8
    amount = PATTERNS[far[1]](u * scale, v * scale, size / (wall * scale * 2))[..., None]
    color = soft + amount * (
      0.5 * (tone * 0.3 + 0.6) + 0.2 - 0.45 * soft if far[1] == 'bricks' else -0.28 * soft
    )
    color = color * (1.06 - 0.25 * np.hypot(columns - np.sign(light[0]) * 0.3, up - 0.4)[..., None])
  else:
    amount = PATTERNS['clouds'](u * 0.5, v * 0.5, 1)[..., None]
    bright = np.clip(1.15 - up * 1.5, 0.55, 1.15)[..., None]
    sky = soft * 0.92 if far[0] == 'sky' else 0.35 * soft + np.float32(0.52)
    color = (sky * (0.72 + 0.3 * bright)) * (1 - 0.75 * amount) + 0.75 * amount
  canvas.rgb[:first] = color
  canvas.mask[:first] = STUFF.index('sky' if far[0] == 'mountain' else far[0])
  canvas.depth[:first] = wall
  canvas.normals[:first] = (0, 0, 1)
  if far[0] == 'mountain':
    top = (
      0.07
      + 0.2 * horizon
      + 0.3 * horizon * noise(columns[0] * 0.22 + shift[2], columns[0] * 0 + shift[3], 2)
    )
    ridge = np.clip((top - up) * size + 0.5, 0, 1)[..., None]
    rock = (
      soft
      * (0.62 + 0.4 * noise(u * 0.12, v * 0.25, 5))[..., None]
      * (0.82 + 0.3 * (up / top)[..., None])
    )
    canvas.rgb[:first] += ridge * (rock - canvas.rgb[:first])
    canvas.mask[:first][ridge[..., 0] > 0.5] = STUFF.index('mountain')

  depth = np.minimum(height / np.maximum(rows[first:] - horizon, 1e-3), wall)
  x = columns * depth
  tone = _palette(near[2])
  soft = 0.66 * tone + 0.22
  scale = {'checked': 4.0, 'tiles': 2.6, 'planks': 3.0}.get(near[1], 3.0)
  detail = np.clip(size * 0.5 / (depth * scale), 0, 1)  # patterns finer than a pixel fade out
  amount = PATTERNS[near[1]](
    x * scale + shift[2], depth * scale + shift[3] + 0 * x, size / (depth * scale * 3)
  ) * detail + 0.4 * (1 - detail)
  second = soft * 0.6 if near[1] != 'waves' else soft * 0.5 + 0.45
  color = soft + amount[..., None] * (second - soft)
  haze = np.clip((depth - 2.5) / 12, 0, 0.35)[..., None]
  canvas.rgb[first:] = color * (1 - haze) + haze * canvas.rgb[:first].mean((0, 1))
  canvas.mask[first:] = STUFF.index(near[0])
  canvas.depth[first:] = depth
  canvas.normals[first:] = (0, 1, 0)
  return first, x, depth


def _shadow(canvas, item, light, *, first, x, depth):
  foot = item if item.on is None else item.on
  radius, lift = item.radius * item.z, (foot.extent[2] - item.extent[2]) * item.z
  along = (depth[:, 0] - foot.z - light[2] * 0.3 * radius) / (0.55 * radius)
  rows = np.flatnonzero(abs(along) < 1.7)
  if not len(rows):
    return
  rows = slice(rows[0], rows[-1] + 1)
  across = (x[rows] - (item.x - 0.5) * item.z + light[0] * (0.5 * radius + 0.4 * lift)) / (
    1.05 * radius
  )
  strength = 0.5 if item.on is None and not item.lifted else 0.28
  canvas.rgb[first:][rows] *= (
    1 - strength * np.exp(-((across**2 + along[rows, None] ** 2) ** 1.5))
  )[..., None]


def _paint(canvas, index, item, light):
  size = len(canvas.rgb)
  top, left, bottom, right = (int(k * size) for k in item.extent)
  y0, y1, x0, x1 = max(top - 2, 0), min(bottom + 3, size), max(left - 2, 0), min(right + 3, size)
  if y0 >= y1 or x0 >= x1:
    return
  right = ((np.arange(x0, x1, dtype=np.float32) + 0.5) / size - item.x)[None] / item.radius
  up = (item.y - (np.arange(y0, y1, dtype=np.float32) + 0.5) / size)[:, None] / item.radius
  c, s = np.float32(np.cos(item.tilt)), np.float32(np.sin(item.tilt))
  u, v = (
    (c * right + s * up) * (item.flip / item.stretch[0]),
    (c * up - s * right) / item.stretch[1],
  )
  row, column = (
    np.clip((k + REACH) * ((GRID - 1) / (2 * REACH)) + 0.5, 0, GRID - 1).astype(np.int32)
    for k in (v, u)
  )
  cells, pixel = table(item.shape)[0], np.float32(item.radius * size)
  spec = cells[row * GRID + column]
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
  color = (first + amount[:, None] * (second - first)) * ((1 - ink) * (0.5 + 0.62 * lit) * outline)[
    :, None
  ]
  color += (0.22 * lit**12)[:, None]

  rgb, alpha = canvas.rgb.reshape(-1, 3), np.clip(0.5 - d * pixel, 0, 1)[:, None]
  rgb[where] += alpha * (color - rgb[where])
  solid = alpha[:, 0] > 0.5
  where = where[solid]
  canvas.mask.reshape(-1)[where] = MASK_CLASSES.index(item.shape)
  canvas.depth.reshape(-1)[where] = item.z - min(0.5 * item.radius * item.z, _THICK) * bulge[solid]
  canvas.normals.reshape(-1, 3)[where] = normal[solid]
  canvas.owner.reshape(-1)[where] = index


def draw(index, *, size=96, seed=0, objects=MOST, typical=0.0):
  """Draw scene number `index` at size x size pixels, of at most `objects` objects; returns a
  `Scene`.

  typical: the share of objects with the LOOKS of their shape. It is a function of these five
  numbers alone.
  """
  rng = np.random.default_rng((seed, index))
  name = _pick(rng, tuple(BACKGROUNDS))
  far_stuff, far_pattern, near_stuff, near_pattern = BACKGROUNDS[name]
  colors = [tuple(COLORS)[k] for k in rng.permutation(len(COLORS))]
  far, near = (far_stuff, far_pattern, colors[0]), (near_stuff, near_pattern, colors[1])
  horizon = float(rng.uniform(0.26, 0.46))
  height = float(rng.uniform(0.75, 1)) * (0.95 - horizon) * _NEAR
  light = _unit(
    _pick(rng, (-1, 1)) * rng.uniform(0.35, 0.8), rng.uniform(0.35, 0.8), rng.uniform(0.55, 0.8)
  )

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

  items, canvas.owner = _visible(items, canvas.owner)
  image = rng.standard_normal(canvas.rgb.shape, dtype=np.float32)
  image *= np.float32(rng.uniform(1.5, 5))
  image += canvas.rgb * np.float32(255 * rng.uniform(0.88, 1.06))
  return Scene(
    image=np.clip(image, 0, 255).astype(np.uint8),
    mask=canvas.mask,
    depth=np.rint(canvas.depth * 1000).astype(np.uint16),
    normals=np.rint(canvas.normals * 127.5 + 127.5).astype(np.uint8),
    owner=canvas.owner,
    items=items,
    background=name,
    far=far,
    near=near,
  )


def _visible(items, owner):
  """Drop objects of which hardly a pixel is seen, sort the rest by visible area, and renumber
  `owner` to match.
  """
  least = max(1, owner.size // 1200)
  for i, item in enumerate(items):
    seen = owner == i
    item.pixels = int(np.count_nonzero(seen))
    if item.pixels:
      rows, columns = np.nonzero(seen.any(1))[0], np.nonzero(seen.any(0))[0]
      item.box = tuple(
        float(k) / len(owner) for k in (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)
      )
  order = sorted(
    (i for i, item in enumerate(items) if item.pixels >= least), key=lambda i: -items[i].pixels
  )
  renumber = np.full(len(items) + 1, -1, np.int8)
  renumber[order] = np.arange(len(order))
  return [items[i] for i in order], renumber[owner]

"""The picture half of the embedded data set: a small scene, drawn in NumPy, with exact annotations.

A camera of random height, pitch, roll and field of view sees a room or a valley with 1 to 5 solids
that stand, lie, lean, hang, float, and stand on each other; every pixel is a ray that is cut with
planes and solids. Where in the picture something is says little of its depth or direction. Colors
and textures are drawn independently of the shape, and the surroundings use the same colors: a
patch's raw pixels say little about its class, its context says much. Optionally a share of the
objects has the typical look of its shape instead, as in photographs: what a small model can learn
in minutes. The sizes of solids are known (solids.SHAPES): they tell how far away things are.
"""

import dataclasses
import functools
import typing
from collections.abc import Sequence

import cv2
import numpy as np

from tips_jax.data.scenes import placing
from tips_jax.data.scenes.places import (
  SKY,
  STUFF,
  Camera,
  Place,
  choose_camera,
  choose_place,
  paint,
)
from tips_jax.data.scenes.placing import COLORS, MOST, Item, pick
from tips_jax.data.scenes.primitives import gather, scatter
from tips_jax.data.scenes.solids import SHAPES, figures
from tips_jax.data.scenes.textures import PATTERNS

MASK_CLASSES = STUFF + tuple(SHAPES)
_AMBIENT = 0.42  # of the light comes from everywhere
_GRAIN = 50_000  # starts of a scene's noise


@dataclasses.dataclass
class Scene:
  """A picture and its annotations."""

  image: np.ndarray  # uint8 [H, W, 3]
  mask: np.ndarray  # uint8 [H, W], ids into MASK_CLASSES
  depth: np.ndarray  # uint16 [H, W], millimeters; 0 in the sky
  normals: np.ndarray  # uint8 [H, W, 3], n * 127.5 + 127.5; 0 in the sky
  owner: np.ndarray  # int8 [H, W], number of the item; -1: none
  face: np.ndarray  # int [H, W], face of the place behind the items
  items: list[Item]  # the visible objects, the largest first
  camera: Camera
  place: Place

  @functools.cached_property
  def shares(self) -> np.ndarray:
    """Visible share of the picture of each face of the place."""
    seen = np.where(self.owner < 0, self.face + 1, 0)
    counts = np.bincount(seen.ravel(), minlength=len(self.place.materials) + 1)
    return counts[1:] / self.face.size


class _Canvas(typing.NamedTuple):
  """What is known of each of N pixels."""

  depth: np.ndarray  # [N]
  normal: np.ndarray  # [3, N], in the world
  color: np.ndarray  # [3, N], before shading
  owner: np.ndarray  # [N]


def draw(
  index: int, *, size: int = 96, seed: int = 0, objects: int = MOST, typical: float = 0.0
) -> Scene:
  """Draws scene number `index` at size x size pixels, of at most `objects` objects.

  `typical` is the share of objects with the LOOKS of their shape. The scene is a function of these
  five numbers alone.
  """
  rng = np.random.default_rng((seed, index))
  camera = choose_camera(rng)
  colors = [tuple(COLORS)[k] for k in rng.permutation(len(COLORS))]
  shapes, focus, scale = placing.begin(rng, camera, objects)
  place = choose_place(rng, focus, scale, colors)
  items = placing.arrange(rng, camera, place, shapes, colors=colors[3:], typical=typical)
  # From the left or the right, above, and mostly from before the scene.
  side = pick(rng, (-1, 1))
  light = np.array([side * rng.uniform(0.3, 0.9), rng.uniform(0.5, 1), rng.uniform(0.1, 0.9)])
  light = (light / np.linalg.norm(light)).astype(np.float32)

  rays = camera.rays(*_pixels(size))
  depth, face = place.trace(rays)
  points = np.where(face == SKY, 0, depth) * rays
  normal = place.normals(points, face)
  length = np.sqrt((rays * rays).sum(0))
  # Fewer where a surface is far or seen at a slant.
  slant = np.maximum(abs((normal * rays).sum(0)) / length, np.float32(0.08))
  color = paint(place, points, face, slant * np.float32(size * camera.focal) / depth, _palette)
  canvas = _Canvas(depth, normal, color, owner=np.full(len(depth), -1, np.int8))
  for number, item in enumerate(items):
    _paint_item(canvas, number, item, rays, size=size, focal=camera.focal)
  rgb = _shade(canvas, rays, length, place, items, light, size)
  _paint_sky(rgb, face, canvas, rays, place, light)

  mask = _stuff(place)[face]
  shapes = np.array([MASK_CLASSES.index(item.shape) for item in items] + [0], np.uint8)
  mask = np.where(canvas.owner >= 0, shapes[canvas.owner], mask).reshape(size, size)
  rgb = _soften(rgb.T.reshape(size, size, 3), face, canvas.owner)
  # The camera: noise and exposure.
  start = int(rng.integers(_GRAIN))
  image = _grain(rgb.size)[start : start + rgb.size].reshape(rgb.shape)
  image = image * np.float32(rng.uniform(1.5, 5))
  image += rgb * np.float32(255 * rng.uniform(0.88, 1.06))
  seen = np.isfinite(canvas.depth) & (canvas.depth < 65)
  normals = camera.rotation.T @ canvas.normal
  normals = np.where(seen, np.rint(normals * 127.5 + 127.5), 0).astype(np.uint8)
  items, owner = _visible(items, canvas.owner.reshape(size, size))
  return Scene(
    image=np.clip(image, 0, 255).astype(np.uint8),
    mask=mask,
    depth=np.where(seen, np.rint(canvas.depth * 1000), 0).astype(np.uint16).reshape(size, size),
    normals=np.ascontiguousarray(normals.T).reshape(size, size, 3),
    owner=owner,
    face=face.reshape(size, size),
    items=items,
    camera=camera,
    place=place,
  )


@functools.lru_cache(4)
def _pixels(size):
  """(x, y) of the centers of all pixels, [N] each, as fractions of the picture."""
  middle = (np.arange(size, dtype=np.float32) + 0.5) / size
  x, y = np.meshgrid(middle, middle)
  return x.ravel(), y.ravel()


@functools.lru_cache(4)
def _grain(count):
  """Normal noise of which a scene takes `count` values; drawn once, as it takes long."""
  return np.random.default_rng(5).standard_normal(_GRAIN + count, np.float32)


@functools.cache
def _palette(color):
  return np.asarray(COLORS[color], np.float32) / 255


def _stuff(place):
  """Class ids by face; the last one is that of the sky."""
  ids = [STUFF.index(material.stuff) for material in place.materials]
  return np.array([*ids, STUFF.index('sky')], np.uint8)


def _paint_item(canvas, number, item, rays, *, size, focal):
  """Puts an object where it is nearer than what is there."""
  top, left, bottom, right = item.extent
  y0, y1 = max(int(top * size) - 1, 0), min(int(bottom * size) + 2, size)
  x0, x1 = max(int(left * size) - 1, 0), min(int(right * size) + 2, size)
  if y0 >= y1 or x0 >= x1:
    return
  pixels = (np.arange(y0, y1)[:, None] * size + np.arange(x0, x1)).ravel()
  origin, directions = (
    item.to_local(np.zeros((3, 1), np.float32)),
    item.turned(gather(rays, pixels)),
  )
  nearest = canvas.depth.take(pixels)
  parts = figures(item.shape)
  which = np.full(len(pixels), -1, np.int8)
  face = np.zeros(len(pixels), np.int32)
  for k, figure in enumerate(parts):
    t, number_of_face = figure.trace(origin[:, 0], directions)
    nearer = t < nearest
    np.copyto(nearest, t, where=nearer)
    np.copyto(which, k, where=nearer)
    np.copyto(face, number_of_face, where=nearer)
  for k, figure in enumerate(parts):
    hit = np.flatnonzero(which == k)
    if not len(hit):
      continue
    where = pixels.take(hit)
    t = nearest.take(hit)
    ray = gather(directions, hit)
    surface = figure.surface(origin + t * ray, face.take(hit))
    normal = surface.normal / np.sqrt((surface.normal**2).sum(0))
    # A wall of no thickness has two sides: the near one is seen.
    normal = np.where((normal * ray).sum(0) > 0, -normal, normal)
    canvas.depth[where] = t
    scatter(canvas.normal, where, item.rotation @ normal)
    canvas.owner[where] = number
    pixel = np.float32(focal * size * item.half) / (t * np.float32(2 * item.frequency))
    scatter(canvas.color, where, _texture(item, surface, pixel))


def _texture(item, surface, sharp):
  """Colors [3, N] of an object's surface."""
  u, v = surface.u, surface.v
  scale = np.float32(1.4 if item.texture == 'gradient' else item.frequency)
  if item.texture != 'ringed':
    turn, lean = np.float32(np.cos(item.phase)), np.float32(np.sin(item.phase))
    u, v = turn * u - lean * v, lean * u + turn * v
  amount = PATTERNS[item.texture](u * scale, v * scale, sharp)
  first = _palette(item.color)
  second = first * 0.35 + 0.65 if item.pale_second else first * 0.42
  color = first[:, None] + amount * (second - first)[:, None]
  return color * (1 - surface.ink)


def _shade(canvas, rays, length, place, items, light, size):
  """Colors [3, N] in the light: Lambert's law, shadows, highlights, haze."""
  known = np.isfinite(canvas.depth)
  points = np.where(known, canvas.depth, 0) * rays
  shadow = np.zeros(len(known), bool)
  if place.blocks:
    # Away from the surface, so that it does not shade itself.
    raised = points + canvas.normal * np.float32(0.02 * place.scale)
    shadow |= place.blocks.shades(raised, light)
  squares = (points * points).sum(0)
  along = light @ points
  for item in items:
    center = item.center
    toward = light @ center - along
    distance = squares - 2 * (center @ points) + center @ center - toward * toward
    near = np.flatnonzero((distance < item.reach**2) & (toward > -item.reach) & known)
    if not len(near):
      continue
    local = item.to_local(gather(points, near))
    ray = item.turned(light[:, None])[:, 0]
    ray = ray / np.linalg.norm(ray)
    shaded = np.zeros(len(near), bool)
    for figure in figures(item.shape):
      shaded |= figure.shades(local, ray)
    shadow[near] |= shaded
  lit = light @ canvas.normal
  soft = shadow.astype(np.float32).reshape(size, size)
  soft = cv2.GaussianBlur(soft, (3, 3), 0.7).ravel()
  lit = np.maximum(lit, 0) * (1 - soft)
  ambient = _AMBIENT + 0.1 * canvas.normal[1]
  rgb = canvas.color * (ambient + (1.05 - _AMBIENT) * lit)
  # Highlights of objects, halfway between the light and the eye.
  shiny = np.flatnonzero(canvas.owner >= 0)
  half = light[:, None] - gather(rays, shiny) / length.take(shiny)
  half /= np.sqrt((half * half).sum(0))
  mirror = np.maximum((half * gather(canvas.normal, shiny)).sum(0), 0)
  gloss = np.float32(0.25) * mirror**24 * (1 - soft.take(shiny))
  scatter(rgb, shiny, gather(rgb, shiny) + gloss)
  if not place.indoors:
    haze = np.clip((canvas.depth / place.scale - 1.5) * 0.12, 0, 0.4)
    haze[~known] = 0
    rgb += haze * (_sky_color(place)[:, None] - rgb)
  return rgb


def _sky_color(place):
  return 0.45 * _palette(place.sky) + np.float32(0.5)


def _paint_sky(rgb, face, canvas, rays, place, light):
  where = np.flatnonzero((face == SKY) & (canvas.owner < 0))
  if not len(where):
    return
  x, y, z = gather(rays, where)
  up = y / np.hypot(x, z)
  u = np.arctan2(x, -z) + place.ridge[1]
  cloud = PATTERNS['clouds'](u, up + 1, 1)
  bright = np.clip(1.05 - 0.25 * up, 0.7, 1.05)
  color = _sky_color(place)[:, None] * bright
  scatter(rgb, where, color + 0.7 * cloud * (1 - color))


def _soften(rgb, face, owner):
  """Blends the colors where two surfaces meet, as a lens does."""
  number = (face * 8 + owner).reshape(rgb.shape[:2])
  edge = np.zeros(number.shape, bool)
  across = number[:, 1:] != number[:, :-1]
  down = number[1:] != number[:-1]
  edge[:, 1:] |= across
  edge[:, :-1] |= across
  edge[1:] |= down
  edge[:-1] |= down
  rgb = np.ascontiguousarray(rgb)
  blurred = cv2.GaussianBlur(rgb, (3, 3), 0.6)
  np.copyto(rgb, blurred, where=edge[..., None])
  return rgb


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

"""Pictures of what a task found on images: Result -> PNG bytes, or None without examples.

They are transparent, in colors that read on light and on dark pages.

What the examples (dicts) of a result hold. Maps of another size than the image are resized to it.
  segmented: image, truth and predicted: class ids [h, w], 255 = void
  depths: image, truth and predicted: meters [h, w], 0 = missing
  normals: image, truth and predicted: [h, w, 3] of any length, 0 = missing
  classified: image, truth and predicted: a class id, or a name
  retrieved: text, or image: the query; images: the nearest ones, best first; right: which of them
    are right; rank: of the right one, from 1
  patch_features: image, patch [h, w, D]
image, images: uint8 [H, W, 3].
"""

import textwrap
from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np
from matplotlib.patches import Rectangle

from tips_jax.data.ingest.checks import VOID
from tips_jax.data.scenes import draw as scenes
from tips_jax.evals.probes import normals as normals_lib
from tips_jax.evals.report import legends, style
from tips_jax.evals.tasks.spec import Result

_EXAMPLES = 6  # of a picture
_NEAREST = 6  # of a query
_ROW_WIDTH = 7.6  # inches, at most
_TILE_HEIGHT = 1.6
_TILE_PIXELS = 240  # of its long side
_GAP = 0.06  # inches between tiles
# Color maps of even lightness: an edge in the picture is one in the values.
_DEPTHS = 'viridis'
_ERRORS = 'inferno'
_MAX_ANGLE = 60  # degrees, the end of the scale of errors of normals
_SCENES = (
  *('#c4dcf3', '#ddd0ee', '#b5c9b7', '#dccdaa', '#98cddb', '#ecd3c4', '#e4572e', '#2e6fba'),
  *('#f2b134', '#7b4fa3', '#ef6aa8', '#2f8f4e', '#a8442f', '#3cb6a8', '#8c6d31', '#1b3a6b'),
  *('#ff8c61', '#5b7f1e', '#c2185b', '#6b6f76'),
)


def segmented(result: Result, overlay: bool = False) -> bytes | None:
  """Masks beside the truth, and in red what is wrong. overlay: masks over the gray image."""
  examples = _examples(result)
  if not examples:
    return None
  colors = palette(result.classes)
  images, truth, predicted = _maps(examples)
  tiles = {'truth': [], 'predicted': []}
  if not overlay:
    tiles['wrong'] = []
  notes = []
  for image, true, guess in zip(images, truth, predicted):
    right = guess == true
    known = true != VOID
    notes.append(f'{100 * right[known].mean():.0f} % right' if known.any() else '')
    if overlay:
      tiles['truth'].append(_striped(_blend(image, true, colors), known))
      tiles['predicted'].append(_blend(image, guess, colors))
    else:
      tiles['truth'].append(_striped(colors[true], known))
      tiles['predicted'].append(colors[guess])
      # The image, pale below the red, shows where it is wrong.
      red = matplotlib.colors.to_rgb(style.WRONG)
      wrong = np.where(right[..., None], 0.25 + 0.6 * _gray(image), red)
      tiles['wrong'].append(_striped(wrong, known))
  rows = _rows(images, tiles, notes)

  def draw():
    figure = _grid(rows)
    legends.class_legend(figure, truth + predicted, result.classes, colors)
    return figure

  return style.png(draw)


def depths(result: Result) -> bytes | None:
  """Depth beside the truth on one logarithmic scale of colors, and the error."""
  examples = _examples(result)
  if not examples:
    return None
  images, truth, predicted = _maps(examples, cv2.INTER_LINEAR)
  known = []
  errors = []
  for true, guess in zip(truth, predicted):
    known.append(np.isfinite(true) & (true > 0))
    errors.append(np.abs(guess - true))
  # One scale for all examples, so that equal colors are equal depths.
  low, high = _range(truth, known)
  low = max(low, 1e-3)  # the scale is logarithmic
  largest = max(_range(errors, known)[1], 1e-3)
  tiles = {'truth': [], 'predicted': [], 'error': []}
  for true, guess, error, seen in zip(truth, predicted, errors, known):
    tiles['truth'].append(_striped(_colored(true, _DEPTHS, low, high, np.log), seen))
    tiles['predicted'].append(_colored(guess, _DEPTHS, low, high, np.log))
    tiles['error'].append(_striped(_colored(error, _ERRORS, 0, largest), seen))
  notes = _rmse_notes(errors, known, '.2f', ' m')

  def draw():
    figure = _grid(_rows(images, tiles, notes))
    legends.color_scale(figure, 0, _DEPTHS, low, high, 'depth, meters', 'log')
    legends.color_scale(figure, 1, _ERRORS, 0, largest, 'error, meters')
    legends.missing_legend(figure, known)
    return figure

  return style.png(draw)


def normals(result: Result) -> bytes | None:
  """Surface normals as colors beside the truth, and the angle between the two."""
  examples = _examples(result)
  if not examples:
    return None
  images, truth, predicted = _maps(examples, cv2.INTER_LINEAR)
  known = []
  errors = []
  tiles = {'truth': [], 'predicted': [], 'error': []}
  for true, guess in zip(truth, predicted):
    true = normals_lib.unit(true[..., :3])
    guess = normals_lib.unit(guess[..., :3])
    seen = normals_lib.known(true)
    error = normals_lib.degrees(guess, true)
    known.append(seen)
    errors.append(error)
    # From [-1, 1] to colors.
    tiles['truth'].append(_striped((true + 1) / 2, seen))
    tiles['predicted'].append((guess + 1) / 2)
    tiles['error'].append(_striped(_colored(error, _ERRORS, 0, _MAX_ANGLE), seen))
  notes = _rmse_notes(errors, known, '.0f', '°')

  def draw():
    figure = _grid(_rows(images, tiles, notes))
    legends.ball(figure)
    legends.color_scale(figure, 1, _ERRORS, 0, _MAX_ANGLE, 'error, degrees')
    legends.missing_legend(figure, known)
    return figure

  return style.png(draw)


def classified(result: Result) -> bytes | None:
  """Images and their predicted classes, green where right; under a wrong one the true class."""
  examples = _examples(result)
  if not examples:
    return None

  def draw():
    figure = _grid([('', _images(examples), None)])
    for axes, example in zip(figure.axes, examples):
      right = example['truth'] == example['predicted']
      color = style.RIGHT if right else style.WRONG
      centered = dict(ha='center', va='top', transform=axes.transAxes)
      predicted = style.short_name(result.classes, example['predicted'], 21)
      axes.text(0.5, -0.05, predicted, fontsize=9, weight='bold', color=color, **centered)
      if not right:
        truth = style.short_name(result.classes, example['truth'], 21)
        axes.text(0.5, -0.19, f'truth: {truth}', fontsize=8, **centered)
    return figure

  return style.png(draw)


def retrieved(result: Result) -> bytes | None:
  """Rows: a query (text or image) and the nearest images, cut to squares, the right ones framed."""
  examples = _examples(result)
  if not examples:
    return None
  query_width = 1.25  # in tiles
  columns = 0
  for example in examples:
    columns = max(columns, min(len(example['images']), _NEAREST))
    if example.get('text'):
      query_width = 2.6

  def draw():
    figure = style.new_figure(1.12 * (query_width + columns + 0.6), 1.12 * len(examples))
    grid = figure.add_gridspec(
      len(examples),
      columns + 2,
      width_ratios=[query_width] + [1] * columns + [0.6],
      wspace=0.06,
      hspace=0.08,
      left=0,
      right=1,
      top=1,
      bottom=0,
    )
    for row, example in enumerate(examples):
      _query(figure, grid[row, 0], example)
      right = []
      if example.get('right') is not None:
        right = np.atleast_1d(example['right']).tolist()
      for i, image in enumerate(example['images'][:_NEAREST]):
        axes = style.tile(figure, grid[row, i + 1], _square(image))
        if i in right:
          frame = dict(fill=False, edgecolor=style.RIGHT, linewidth=6)
          axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, **frame))
      if row == 0:
        figure.axes[0].set_title('query', fontsize=9.5, pad=6)
        figure.axes[1].set_title('nearest first, the right ones framed', fontsize=9.5, pad=6)
      rank = example.get('rank')
      if not rank and right:
        rank = 1 + min(right)
      if rank:
        look = dict(color=style.INK, weight='normal')
        if rank <= _NEAREST:
          look['color'] = style.RIGHT
        if rank == 1:
          look['weight'] = 'bold'
        _words(figure, grid[row, columns + 1], 0.06, f'rank {rank:,}', **look)
    return figure

  return style.png(draw)


def patch_features(result: Result) -> bytes | None:
  """Images, and the first three principal components of all their patches together as colors."""
  examples = [e for e in result.examples if e.get('patch') is not None][:_EXAMPLES]
  if not examples:
    return None
  grids = [np.asarray(example['patch'], np.float32) for example in examples]
  # Components of all images together: only then does a color mean the same in each.
  colors = components(np.concatenate([grid.reshape(-1, grid.shape[-1]) for grid in grids]))
  images = _images(examples)
  maps = []
  start = 0
  for grid, image in zip(grids, images):
    height, width = grid.shape[:2]
    part = colors[start : start + height * width].reshape(height, width, 3)
    start += height * width
    maps.append(cv2.resize(part, image.shape[1::-1], interpolation=cv2.INTER_NEAREST))
  return style.png(lambda: _grid(_rows(images, {'patch features': maps})))


# --- colors ---------------------------------------------------------------------------------------


def palette(names: Sequence[str]) -> np.ndarray:
  """Colors [256, 3] in [0, 1] by class id; scenes have their own, and background is gray."""
  i = np.arange(256)
  # Steps of the golden ratio keep the hues of neighbors far apart.
  hue = (0.02 + i * 0.618034) % 1
  saturation = np.array([0.72, 0.5, 0.85])[i % 3]
  value = np.array([0.93, 0.72, 0.55, 0.85])[i // 2 % 4]
  colors = matplotlib.colors.hsv_to_rgb(np.stack([hue, saturation, value], -1))
  if tuple(names) == tuple(scenes.MASK_CLASSES):
    colors[: len(_SCENES)] = matplotlib.colors.to_rgba_array(_SCENES)[:, :3]
  for k, name in enumerate(names[:256]):
    if name == 'background':
      colors[k] = 0.42, 0.46, 0.52
  return colors


def components(patch_ND: np.ndarray) -> np.ndarray:
  """The first three principal components of features as colors in [0, 1]: float32 [N, 3]."""
  flat = patch_ND.astype(np.float64)
  flat = flat - flat.mean(0)
  _, vectors = np.linalg.eigh(flat.T @ flat)
  axes = vectors[:, ::-1][:, :3]
  axes = axes * np.where(axes.sum(0) < 0, -1, 1)  # a sign that does not depend on the solver
  projected = np.pad(flat @ axes, ((0, 0), (0, 3 - axes.shape[1])))
  # Few extreme patches would leave no contrast to the others.
  low, high = np.percentile(projected, [2, 98], axis=0)
  colors = (projected - low) / np.maximum(high - low, 1e-12)
  return np.clip(colors, 0, 1).astype(np.float32)


# --- tiles ----------------------------------------------------------------------------------------


def _examples(result):
  return list(result.examples)[:_EXAMPLES]


def _images(examples):
  return [_resized(example['image']) for example in examples]


def _grid(rows):
  """A figure of tiles of one height.

  rows: (title, tiles, notes under them or None), all of the same number of tiles.
  """
  ratios = [image.shape[1] / image.shape[0] for image in rows[0][1]]
  height = min(_TILE_HEIGHT, _ROW_WIDTH / sum(ratios))
  width = height * sum(ratios) + _GAP * (len(ratios) - 1)
  figure = style.new_figure(width + style.LEFT, height * len(rows) + _GAP * (len(rows) - 1))
  grid = figure.add_gridspec(
    len(rows),
    len(ratios),
    width_ratios=ratios,
    wspace=_GAP * len(ratios) / width,
    hspace=_GAP / height,
    left=style.LEFT / (width + style.LEFT),
    right=1,
    top=1,
    bottom=0,
  )
  for row, (title, images, notes) in enumerate(rows):
    for column, image in enumerate(images):
      if image.dtype != np.uint8:
        image = np.clip(image, 0, 1)
      axes = style.tile(figure, grid[row, column], image)
      if column == 0:
        axes.set_ylabel(title, labelpad=6, fontsize=9.5)
      if notes and notes[column]:
        axes.set_xlabel(notes[column], labelpad=3, fontsize=8.5)
  return figure


def _rows(images, tiles, notes=None):
  """The rows of `_grid`: images, then tiles by title; the notes are under the last row."""
  rows = [('image', images, None)]
  for title, row in tiles.items():
    rows.append((title, row, None))
  rows[-1] = (*rows[-1][:2], notes)
  return rows


def _rmse_notes(errors, known, decimals, unit):
  notes = []
  for error, seen in zip(errors, known):
    note = ''
    if seen.any():
      note = f'RMSE {np.sqrt(np.square(error[seen]).mean()):{decimals}}{unit}'
    notes.append(note)
  return notes


def _query(figure, place, example):
  text = example.get('text')
  if text:
    text = textwrap.fill(textwrap.shorten(text, 150, placeholder=' …'), 36)
    _words(figure, place, 0, text, linespacing=1.3)
  else:
    style.tile(figure, place, _square(example['image'])).set_anchor('W')


def _words(figure, place, x, text, **options):
  axes = figure.add_subplot(place)
  axes.axis('off')
  axes.text(x, 0.5, text, va='center', fontsize=9, transform=axes.transAxes, **options)


def _resized(image):
  """uint8 [H, W, 3] with a long side of _TILE_PIXELS."""
  image = np.asarray(image)
  scale = _TILE_PIXELS / max(image.shape[:2])
  size = tuple(max(1, round(n * scale)) for n in image.shape[1::-1])
  # Only AREA averages the pixels that a smaller image leaves out.
  how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
  return cv2.resize(image, size, interpolation=how)


def _square(image):
  """The central square of an image as a tile."""
  image = np.asarray(image)
  height, width = image.shape[:2]
  side = min(height, width)
  top = (height - side) // 2
  left = (width - side) // 2
  return _resized(image[top : top + side, left : left + side])


def _maps(examples, interpolation=cv2.INTER_NEAREST):
  """(images, truths, predictions) of one size each; truth is never interpolated."""
  truth = []
  predicted = []
  images = _images(examples)
  for image, example in zip(images, examples):
    for maps, name, how in (
      (truth, 'truth', cv2.INTER_NEAREST),
      (predicted, 'predicted', interpolation),
    ):
      resized = cv2.resize(
        np.asarray(example[name], np.float32), image.shape[1::-1], interpolation=how
      )
      if interpolation == cv2.INTER_NEAREST:  # class ids
        resized = resized.astype(np.int64).clip(0, VOID)
      maps.append(resized)
  return images, truth, predicted


def _striped(image, known):
  """The tile, with stripes where nothing is known."""
  y, x = np.indices(known.shape)
  return np.where(known[..., None], image, style.STRIPES[(x + y) // 7 % 2])


def _gray(image):
  return np.repeat(image.mean(-1, keepdims=True) / 255, 3, -1)


def _blend(image, ids, colors):
  """The gray image under the colors of its classes, with their outlines."""
  color = colors[ids]
  mixed = 0.35 * (0.3 + 0.7 * _gray(image)) + 0.65 * color
  edge = cv2.morphologyEx(ids.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
  return np.where(edge[..., None], 0.75 * color, mixed)


def _range(maps, known):
  """(1 %, 99 %) quantiles of the known values: a few outliers must not stretch the scale."""
  values = np.concatenate([values[seen] for values, seen in zip(maps, known)])
  if not len(values):
    return 0.0, 1.0
  low, high = np.percentile(values, [1, 99])
  # A scale needs a width, even if all values are equal.
  return float(low), float(max(high, 1.001 * low, 1e-3))


def _colored(values, cmap, low, high, scale=np.asarray):
  values = scale(np.clip(np.nan_to_num(values), low, high))
  return matplotlib.colormaps[cmap]((values - scale(low)) / (scale(high) - scale(low)))[..., :3]

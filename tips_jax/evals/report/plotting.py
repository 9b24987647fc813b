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
from tips_jax.evals.report import style
from tips_jax.evals.tasks.spec import Result

_EXAMPLES, _NEAREST = 6, 6  # of a picture, of a query
_LEGEND = 24  # classes named in a legend
_ROW_WIDTH, _TILE_HEIGHT = 7.6, 1.6  # inches, at most
_TILE_PIXELS = 240  # of its long side
_GAP, _LEFT = 0.06, 0.3  # inches between tiles; before the first, for the titles of rows
_STRIPES = np.array([[166, 176, 189], [198, 206, 216]], np.uint8)
_DEPTHS, _ERRORS = 'viridis', 'inferno'
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
  known = [mask != VOID for mask in truth]
  tiles = {'truth': [], 'predicted': [], 'wrong': []}
  notes = []
  for image, true, guess, seen in zip(images, truth, predicted, known):
    right = guess == true
    notes.append(f'{100 * right[seen].mean():.0f} % right' if seen.any() else None)
    if overlay:
      tiles['truth'].append(_striped(_blend(image, true, colors), seen))
      tiles['predicted'].append(_blend(image, guess, colors))
    else:
      tiles['truth'].append(_striped(colors[true], seen))
      tiles['predicted'].append(colors[guess])
      red = matplotlib.colors.to_rgb(style.WRONG)
      wrong = np.where(right[..., None], 0.25 + 0.6 * _gray(image), red)
      tiles['wrong'].append(_striped(wrong, seen))
  rows = [('image', images, None), ('truth', tiles['truth'], None)]
  if overlay:
    rows.append(('predicted', tiles['predicted'], notes))
  else:
    rows += [('predicted', tiles['predicted'], None), ('wrong', tiles['wrong'], notes)]

  def draw():
    figure = _grid(rows)
    _class_legend(figure, truth + predicted, result.classes)
    return figure

  return style.png(draw)


def depths(result: Result) -> bytes | None:
  """Depth beside the truth on one logarithmic scale of colors, and the error."""
  examples = _examples(result)
  if not examples:
    return None
  images, truth, predicted = _maps(examples, cv2.INTER_LINEAR)
  known = [np.isfinite(depth) & (depth > 0) for depth in truth]
  errors = [np.abs(guess - true) for guess, true in zip(predicted, truth)]
  # One scale for all examples, so that equal colors are equal depths.
  low, high = _range(truth, known)
  low = max(low, 1e-3)
  largest = max(_range(errors, known)[1], 1e-3)
  tiles = {'truth': [], 'predicted': [], 'error': []}
  for true, guess, error, seen in zip(truth, predicted, errors, known):
    tiles['truth'].append(_striped(_colored(true, _DEPTHS, low, high, np.log), seen))
    tiles['predicted'].append(_colored(guess, _DEPTHS, low, high, np.log))
    tiles['error'].append(_striped(_colored(error, _ERRORS, 0, largest), seen))
  notes = _rmse_notes(errors, known, '.2f', ' m')

  def draw():
    figure = _grid(_error_rows(images, tiles, notes))
    _color_scale(figure, 0, _DEPTHS, low, high, 'depth, meters', 'log')
    _color_scale(figure, 1, _ERRORS, 0, largest, 'error, meters')
    _missing_legend(figure, known)
    return figure

  return style.png(draw)


def normals(result: Result) -> bytes | None:
  """Surface normals as colors beside the truth, and the angle between the two."""
  examples = _examples(result)
  if not examples:
    return None
  images, truth, predicted = _maps(examples, cv2.INTER_LINEAR)
  truth = [normals_lib.unit(field[..., :3]) for field in truth]
  predicted = [normals_lib.unit(field[..., :3]) for field in predicted]
  known = [normals_lib.known(field) for field in truth]
  errors = [normals_lib.degrees(guess, true) for guess, true in zip(predicted, truth)]
  tiles = {'truth': [], 'predicted': [], 'error': []}
  for true, guess, error, seen in zip(truth, predicted, errors, known):
    tiles['truth'].append(_striped((true + 1) / 2, seen))
    tiles['predicted'].append((guess + 1) / 2)
    tiles['error'].append(_striped(_colored(error, _ERRORS, 0, _MAX_ANGLE), seen))
  notes = _rmse_notes(errors, known, '.0f', '°')

  def draw():
    figure = _grid(_error_rows(images, tiles, notes))
    _ball(figure)
    _color_scale(figure, 1, _ERRORS, 0, _MAX_ANGLE, 'error, degrees')
    _missing_legend(figure, known)
    return figure

  return style.png(draw)


def classified(result: Result) -> bytes | None:
  """Images and their predicted classes, green where right; under a wrong one the true class."""
  examples = _examples(result)
  if not examples:
    return None

  def draw():
    figure = _grid([('', [_resized(example['image']) for example in examples], None)])
    for axes, example in zip(figure.axes, examples):
      right = example['truth'] == example['predicted']
      centered = dict(ha='center', va='top', transform=axes.transAxes)
      predicted = style.short_name(result.classes, example['predicted'], 21)
      color = style.RIGHT if right else style.WRONG
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
  query_width = 2.6 if any(example.get('text') for example in examples) else 1.25
  columns = max(min(len(example['images']), _NEAREST) for example in examples)

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
      right = example.get('right')
      right = [] if right is None else np.atleast_1d(right).tolist()
      for i, image in enumerate(example['images'][:_NEAREST]):
        axes = style.tile(figure, grid[row, i + 1], _square(image))
        if i in right:
          frame = dict(fill=False, edgecolor=style.RIGHT, linewidth=6)
          axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, **frame))
      if row == 0:
        figure.axes[0].set_title('query', fontsize=9.5, pad=6)
        figure.axes[1].set_title('nearest first, the right ones framed', fontsize=9.5, pad=6)
      rank = example.get('rank') or (1 + min(right) if right else None)
      if rank:
        color = style.RIGHT if rank <= _NEAREST else style.INK
        weight = 'bold' if rank == 1 else 'normal'
        _words(figure, grid[row, columns + 1], 0.06, f'rank {rank:,}', color=color, weight=weight)
    return figure

  return style.png(draw)


def patch_features(result: Result) -> bytes | None:
  """Images, and the first three principal components of all their patches together as colors."""
  examples = [e for e in result.examples if e.get('patch') is not None][:_EXAMPLES]
  if not examples:
    return None
  grids = [np.asarray(example['patch'], np.float32) for example in examples]
  colors = components(np.concatenate([grid.reshape(-1, grid.shape[-1]) for grid in grids]))
  images = [_resized(example['image']) for example in examples]
  maps = []
  start = 0
  for grid, image in zip(grids, images):
    height, width = grid.shape[:2]
    part = colors[start : start + height * width].reshape(height, width, 3)
    start += height * width
    maps.append(cv2.resize(part, image.shape[1::-1], interpolation=cv2.INTER_NEAREST))
  return style.png(lambda: _grid([('image', images, None), ('patch features', maps, None)]))


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


def _grid(rows):
  """A figure of tiles of one height.

  rows: (title, tiles, notes under them or None), all of the same number of tiles.
  """
  ratios = [image.shape[1] / image.shape[0] for image in rows[0][1]]
  height = min(_TILE_HEIGHT, _ROW_WIDTH / sum(ratios))
  width = height * sum(ratios) + _GAP * (len(ratios) - 1)
  figure = style.new_figure(width + _LEFT, height * len(rows) + _GAP * (len(rows) - 1))
  grid = figure.add_gridspec(
    len(rows),
    len(ratios),
    width_ratios=ratios,
    wspace=_GAP * len(ratios) / width,
    hspace=_GAP / height,
    left=_LEFT / (width + _LEFT),
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


def _error_rows(images, tiles, notes):
  return [
    ('image', images, None),
    ('truth', tiles['truth'], None),
    ('predicted', tiles['predicted'], None),
    ('error', tiles['error'], notes),
  ]


def _rmse_notes(errors, known, decimals, unit):
  notes = []
  for error, seen in zip(errors, known):
    note = None
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
  return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def _square(image):
  """The central square of an image as a tile."""
  image = np.asarray(image)
  height, width = image.shape[:2]
  side = min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  return _resized(image[top : top + side, left : left + side])


def _maps(examples, interpolation=cv2.INTER_NEAREST):
  """(images, truths, predictions) of one size each; truth is never interpolated."""
  images, truth, predicted = [], [], []
  for example in examples:
    image = _resized(example['image'])
    size = image.shape[1::-1]
    images.append(image)
    for maps, name, how in (
      (truth, 'truth', cv2.INTER_NEAREST),
      (predicted, 'predicted', interpolation),
    ):
      resized = cv2.resize(np.asarray(example[name], np.float32), size, interpolation=how)
      if interpolation == cv2.INTER_NEAREST:  # class ids
        resized = resized.astype(np.int64).clip(0, VOID)
      maps.append(resized)
  return images, truth, predicted


def _striped(image, known):
  """The tile, with stripes where nothing is known."""
  y, x = np.indices(known.shape)
  return np.where(known[..., None], image, _STRIPES[(x + y) // 7 % 2] / 255)


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
  low, high = np.percentile(values, [1, 99]) if len(values) else (0.0, 1.0)
  return float(low), float(max(high, 1.001 * low, 1e-3))


def _colored(values, cmap, low, high, scale=np.asarray):
  values = scale(np.clip(np.nan_to_num(values), low, high))
  return matplotlib.colormaps[cmap]((values - scale(low)) / (scale(high) - scale(low)))[..., :3]


# --- scales and legends under the tiles -----------------------------------------------------------


def _below(figure, half, width, height=0.1):
  """Axes under the left (0) or right (1) half of the tiles; width and height in inches."""
  w, h = figure.get_size_inches()
  return figure.add_axes((_LEFT / w + half * 0.5, -(0.36 + height) / h, width / w, height / h))


def _color_scale(figure, half, cmap, low, high, label, scale='linear'):
  width = figure.get_size_inches()[0]
  axes = _below(figure, half, min(2.4, 0.38 * width))
  edges = np.linspace(low, high, 257) if scale == 'linear' else np.geomspace(low, high, 257)
  axes.pcolormesh(edges, [0, 1], np.linspace(0, 1, 256)[None], cmap=cmap, rasterized=True)
  axes.set(yticks=[], xlim=(low, high), xscale=scale)
  ticks = [digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5)]
  ticks = [tick for tick in ticks if low <= tick <= high]
  if scale == 'linear' or len(ticks) < 2:
    # A narrow picture has no place for more numbers.
    locator = matplotlib.ticker.MaxNLocator(4 if width > 3 else 2)
    ticks = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
  axes.set_xticks(ticks, [f'{tick:.4g}' for tick in ticks])
  axes.set_xticks([], minor=True)
  axes.tick_params(length=2, labelsize=8)
  axes.set_title(label, fontsize=8.5, pad=3)
  style.hide_frame(axes)


def _ball(figure):
  """The key to the colors of normals: a ball seen from the front."""
  y, x = np.mgrid[1:-1:96j, -1:1:96j]
  inside = x * x + y * y <= 1
  z = np.sqrt(np.maximum(1 - x * x - y * y, 0))
  axes = _below(figure, 0, 0.5, 0.5)
  axes.imshow(np.concatenate([(np.stack([x, y, z], -1) + 1) / 2, inside[..., None]], -1))
  axes.axis('off')
  if figure.get_size_inches()[0] > 4:
    text = 'colors of a ball\nseen from the front'
    axes.text(1.15, 0.5, text, va='center', fontsize=8.5, transform=axes.transAxes)


_KEY = dict(frameon=False, fontsize=8.5, handlelength=1, handleheight=1, borderaxespad=0)


def _missing_legend(figure, known):
  if all(seen.all() for seen in known):
    return
  w, h = figure.get_size_inches()
  place = 1, -(0.3 if w > 6 else 0.85) / h  # beside the scales, or under them
  figure.legend([_stripes()], ['missing'], loc='upper right', bbox_to_anchor=place, **_KEY)


def _stripes():
  dark, light = (tuple(color / 255) for color in _STRIPES)
  return Rectangle((0, 0), 1, 1, facecolor=light, edgecolor=dark, hatch='//////', linewidth=0)


def _class_legend(figure, maps, names):
  """The classes with the most pixels, in the order of their ids."""
  counts = np.bincount(np.concatenate([ids.ravel() for ids in maps]), minlength=256)
  void = counts[VOID]
  counts[VOID] = 0
  present = int((counts > 0).sum())
  ids = sorted(np.argsort(-counts, kind='stable')[: min(_LEGEND, present)].tolist())
  colors = palette(names)
  handles = [Rectangle((0, 0), 1, 1, color=colors[i]) for i in ids]
  labels = [style.short_name(names, i, 15) for i in ids]
  if void:
    handles.append(_stripes())
    labels.append('void')
  if present > len(ids):
    handles.append(Rectangle((0, 0), 1, 1, alpha=0))
    labels.append(f'and {present - len(ids)} more')
  w, h = figure.get_size_inches()
  fit = int(w / (0.4 + 0.07 * max(map(len, labels))))  # entries of a line: a letter is 0.07 inches
  figure.legend(
    handles,
    labels,
    loc='upper left',
    bbox_to_anchor=(0.2 / w, -0.22 / h),
    ncols=max(1, min(len(handles), fit)),
    columnspacing=1.1,
    **_KEY,
  )

"""The pictures of the evaluation's page, as PNG bytes: transparent, in colors that read on light
and on dark paper.

What an outcome's examples (dicts) hold. Maps of another size than the image are brought to its
size; whatever is missing is not drawn.
  segmentation, zeroshot_segmentation: image, truth and predicted: class ids [h, w], 255 = void
  depth, dpt_depth: image, truth and predicted: meters [h, w], 0 = missing
  dpt_normals: image, truth and predicted: [h, w, 3] of any length, 0 = missing
  knn, linear, zeroshot: image, truth and predicted: a class id, or a name
  retrieval: text, images: the nearest ones, best first; right: place of the right one among them;
  rank: from 1
  instance_retrieval: image (the query), images, right: places of all right ones among them
  any: patch [h, w, D]: its principal components are drawn. image, images: uint8 [H, W, 3]
An outcome may have `classes`, the names.
"""

import io
import textwrap

import cv2
import matplotlib
import numpy as np
from matplotlib.patches import Rectangle

from tips_jax.data.ingest.checks import VOID
from tips_jax.data.scenes import draw as scenes_draw
from tips_jax.evals.probes import normals
from tips_jax.evals.report import plotting as pictures

MOST, TOP = 6, 6  # examples of a picture, images found for one
INK, FAINT, RIGHT, WRONG = '#6f7f93', '#8a97a85c', '#1fa855', '#e5484d'
STYLE = pictures.STYLE | {
  'text.color': INK,
  'axes.labelcolor': INK,
  'xtick.color': INK,
  'ytick.color': INK,
  'axes.edgecolor': FAINT,
}
_STRIPES = np.array([[166, 176, 189], [198, 206, 216]], np.uint8)
_DEPTHS, _ERRORS = 'viridis', 'inferno'
_LEGEND = 24  # classes named in a legend
_WIDE, _TALL, _SIDE = (
  7.6,
  1.6,
  240,
)  # inches of a row, inches of a tile at most, pixels of its long side


def examples(outcome, kind) -> bytes | None:
  """The examples of an outcome; None without any."""
  shown = list(outcome.examples)[:MOST]
  if not shown:
    return None
  with matplotlib.rc_context(STYLE):
    return png(_DRAW[kind](shown, tuple(getattr(outcome, 'classes', None) or ())))


def patch_features(outcome) -> bytes | None:
  """Images and the first three principal components of all their patches together; None without
  patches.
  """
  shown = [e for e in outcome.examples if e.get('patch') is not None][:MOST]
  if not shown:
    return None
  grids = [np.asarray(e['patch'], np.float32) for e in shown]
  flat = np.concatenate([grid.reshape(-1, grid.shape[-1]) for grid in grids])
  colors = pictures.components(flat[None, None])[0, 0].astype(np.float32)
  parts = np.split(colors, np.cumsum([grid.shape[0] * grid.shape[1] for grid in grids])[:-1])
  images = [_image(e) for e in shown]
  maps = [
    cv2.resize(
      part.reshape(*grid.shape[:2], 3), image.shape[1::-1], interpolation=cv2.INTER_NEAREST
    )
    for part, grid, image in zip(parts, grids, images)
  ]
  with matplotlib.rc_context(STYLE):
    return png(_strips([('image', images, None), ('patch features', maps, None)]))


def palette(names) -> np.ndarray:
  """Colors [256, 3] in [0, 1] by class id. `scenes` keeps its own; a class called background is
  gray.
  """
  if tuple(names) == tuple(scenes_draw.MASK_CLASSES):
    return pictures.mask_palette()
  i = np.arange(256)
  found = matplotlib.colors.hsv_to_rgb(
    np.stack(
      [
        (0.02 + i * 0.618034) % 1,
        np.array([0.72, 0.5, 0.85])[i % 3],
        np.array([0.93, 0.72, 0.55, 0.85])[i // 2 % 4],
      ],
      -1,
    )
  )
  for k, name in enumerate(names[:256]):
    if name == 'background':
      found[k] = 0.42, 0.46, 0.52
  return found


# --- one function for each kind: (examples, class names) -> figure
# ---------------------------------


def _masks(shown, names):
  colors = palette(names)
  images, truth, predicted = _maps(shown)
  known = [t != VOID for t in truth]
  wrong = [
    np.where((p != t)[..., None], matplotlib.colors.to_rgb(WRONG), 0.25 + 0.6 * _gray(i))
    for p, t, i in zip(predicted, truth, images)
  ]
  note = [
    f'{100 * (p == t)[k].mean():.0f} % right' if k.any() else None
    for p, t, k in zip(predicted, truth, known)
  ]
  figure = _strips(
    [
      ('image', images, None),
      ('truth', [_void(colors[t], k) for t, k in zip(truth, known)], None),
      ('predicted', [colors[p] for p in predicted], None),
      ('wrong', [_void(w, k) for w, k in zip(wrong, known)], note),
    ]
  )
  _class_legend(figure, truth + predicted, names)
  return figure


def _overlays(shown, names):
  colors = palette(names)
  images, truth, predicted = _maps(shown)
  known = [t != VOID for t in truth]
  note = [
    f'{100 * (p == t)[k].mean():.0f} % right' if k.any() else None
    for p, t, k in zip(predicted, truth, known)
  ]
  figure = _strips(
    [
      ('image', images, None),
      ('truth', [_void(_blend(i, t, colors), k) for i, t, k in zip(images, truth, known)], None),
      ('predicted', [_blend(i, p, colors) for i, p in zip(images, predicted)], note),
    ]
  )
  _class_legend(figure, truth + predicted, names)
  return figure


def _depths(shown, names):
  del names
  images, truth, predicted = _maps(shown, cv2.INTER_LINEAR)
  known = [np.isfinite(t) & (t > 0) for t in truth]
  low, high = _range([t[k] for t, k in zip(truth, known)])
  low = max(low, 1e-3)
  errors = [np.abs(p - t) for p, t in zip(predicted, truth)]
  most = max(_range([e[k] for e, k in zip(errors, known)])[1], 1e-3)
  note = [
    f'RMSE {np.sqrt(np.square(e[k]).mean()):.2f} m' if k.any() else None
    for e, k in zip(errors, known)
  ]
  figure = _strips(
    [
      ('image', images, None),
      (
        'truth',
        [_void(_colored(t, _DEPTHS, low, high, np.log), k) for t, k in zip(truth, known)],
        None,
      ),
      ('predicted', [_colored(p, _DEPTHS, low, high, np.log) for p in predicted], None),
      ('error', [_void(_colored(e, _ERRORS, 0, most), k) for e, k in zip(errors, known)], note),
    ]
  )
  _scale(figure, 0, _DEPTHS, low, high, 'depth, meters', 'log')
  _scale(figure, 1, _ERRORS, 0, most, 'error, meters')
  _void_key(figure, not all(map(np.all, known)), 'missing')
  return figure


def _normals(shown, names):
  del names
  images, truth, predicted = _maps(shown, cv2.INTER_LINEAR)
  truth, predicted = ([normals.unit(m[..., :3]) for m in maps] for maps in (truth, predicted))
  known = [normals.known(t) for t in truth]
  errors = [normals.degrees(p, t) for p, t in zip(predicted, truth)]
  note = [
    f'RMSE {np.sqrt(np.square(e[k]).mean()):.0f}°' if k.any() else None
    for e, k in zip(errors, known)
  ]
  figure = _strips(
    [
      ('image', images, None),
      ('truth', [_void((t + 1) / 2, k) for t, k in zip(truth, known)], None),
      ('predicted', [(p + 1) / 2 for p in predicted], None),
      ('error', [_void(_colored(e, _ERRORS, 0, 60), k) for e, k in zip(errors, known)], note),
    ]
  )
  _ball(figure)
  _scale(figure, 1, _ERRORS, 0, 60, 'error, degrees')
  _void_key(figure, not all(map(np.all, known)), 'missing')
  return figure


def _labels(shown, names):
  figure = _strips([('', [_image(e) for e in shown], None)])
  for axes, e in zip(figure.axes, shown):
    right, short = (
      e['truth'] == e['predicted'],
      lambda i: textwrap.shorten(name_of(names, i), 21, placeholder='…'),
    )
    axes.text(
      0.5,
      -0.05,
      short(e['predicted']),
      ha='center',
      va='top',
      fontsize=9,
      weight='bold',
      color=RIGHT if right else WRONG,
      transform=axes.transAxes,
    )
    if not right:
      axes.text(
        0.5,
        -0.19,
        f'truth: {short(e["truth"])}',
        ha='center',
        va='top',
        fontsize=8,
        transform=axes.transAxes,
      )
  return figure


def _found(shown, names):
  """Rows: a query (text or image), and what was found for it, the right ones framed; the middle of
  each image.
  """
  del names
  texts = [e.get('text') for e in shown]
  wide = 2.6 if any(texts) else 1.25
  top = max(min(len(e['images']), TOP) for e in shown)
  figure = pictures.new_figure(1.12 * (wide + top + 0.6), 1.12 * len(shown))
  grid = figure.add_gridspec(
    len(shown),
    top + 2,
    width_ratios=[wide] + [1] * top + [0.6],
    wspace=0.06,
    hspace=0.08,
    left=0,
    right=1,
    top=1,
    bottom=0,
  )
  for row, (e, text) in enumerate(zip(shown, texts)):
    if text:
      words = figure.add_subplot(grid[row, 0])
      words.axis('off')
      words.text(
        0,
        0.5,
        textwrap.fill(textwrap.shorten(text, 150, placeholder=' …'), 36),
        va='center',
        fontsize=9,
        linespacing=1.3,
        transform=words.transAxes,
      )
    else:
      pictures.draw_tile(figure, grid[row, 0], _square(e['image'])).set_anchor('W')
    right = np.atleast_1d(e['right']).tolist() if e.get('right') is not None else []
    for place, image in enumerate(e['images'][:TOP]):
      axes = pictures.draw_tile(figure, grid[row, place + 1], _square(image))
      if place in right:
        axes.add_patch(
          Rectangle(
            (0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=RIGHT, linewidth=6
          )
        )
    if row == 0:
      for axes, title in zip(figure.axes[:2], ('query', 'nearest first, the right ones framed')):
        axes.set_title(title, fontsize=9.5, pad=6)
    note = figure.add_subplot(grid[row, top + 1])
    note.axis('off')
    rank = e.get('rank') or (1 + min(right) if right else None)
    if rank:
      note.text(
        0.06,
        0.5,
        f'rank {rank:,}',
        va='center',
        fontsize=9,
        transform=note.transAxes,
        color=RIGHT if rank <= TOP else INK,
        weight='bold' if rank == 1 else 'normal',
      )
  return figure


_DRAW = {
  'segmentation': _masks,
  'zeroshot_segmentation': _overlays,
  'depth': _depths,
  'dpt_depth': _depths,
  'dpt_normals': _normals,
  'knn': _labels,
  'linear': _labels,
  'zeroshot': _labels,
  'retrieval': _found,
  'instance_retrieval': _found,
}


# --- parts ----------------------------------------------------------------------------------------


def _strips(strips):
  """(title, tiles, notes or None) of each row; all rows have the same number of tiles. Every tile
  is as tall.
  """
  wide = [t.shape[1] / t.shape[0] for t in strips[0][1]]
  tall = min(_TALL, _WIDE / sum(wide))
  width = tall * sum(wide) + 0.06 * (len(wide) - 1)
  figure = pictures.new_figure(width + 0.3, tall * len(strips) + 0.06 * (len(strips) - 1))
  grid = figure.add_gridspec(
    len(strips),
    len(wide),
    width_ratios=wide,
    wspace=0.06 * len(wide) / width,
    hspace=0.06 / tall,
    left=0.3 / (width + 0.3),
    right=1,
    top=1,
    bottom=0,
  )
  for row, (title, tiles, notes) in enumerate(strips):
    for column, tile in enumerate(tiles):
      axes = pictures.draw_tile(
        figure, grid[row, column], np.clip(tile, 0, 1) if tile.dtype != np.uint8 else tile
      )
      if column == 0:
        axes.set_ylabel(title, labelpad=6, fontsize=9.5)
      if notes and notes[column]:
        axes.set_xlabel(notes[column], labelpad=3, fontsize=8.5)
  return figure


def _image(e):
  return _small(e['image'])


def _small(image):
  """uint8 [H, W, 3], its long side at most _SIDE pixels: what a tile shows; small images are
  enlarged by pixels.
  """
  image = np.asarray(image)
  scale = _SIDE / max(image.shape[:2])
  size = tuple(max(1, round(n * scale)) for n in image.shape[1::-1])
  return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def _square(image):
  """The middle of an image as a tile."""
  image, side = np.asarray(image), min(np.shape(image)[:2])
  top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
  return _small(image[top : top + side, left : left + side])


def _maps(shown, interpolation=cv2.INTER_NEAREST):
  """(images, truths, predictions) of one size each; truth is never interpolated."""
  images = [_image(e) for e in shown]
  fit = lambda e, name, how: [
    cv2.resize(np.asarray(x[name], np.float32), i.shape[1::-1], interpolation=how)
    for x, i in zip(e, images)
  ]
  truth, predicted = fit(shown, 'truth', cv2.INTER_NEAREST), fit(shown, 'predicted', interpolation)
  if interpolation == cv2.INTER_NEAREST:
    truth, predicted = (
      [m.astype(np.int64).clip(0, VOID) for m in maps] for maps in (truth, predicted)
    )
  return images, truth, predicted


def _void(tile, known):
  """The tile, striped where nothing is known."""
  y, x = np.indices(known.shape)
  return np.where(known[..., None], tile, _STRIPES[(x + y) // 7 % 2] / 255)


def _gray(image):
  return np.repeat(image.mean(-1, keepdims=True) / 255, 3, -1)


def _blend(image, ids, colors):
  """The image in gray under its classes, with their outlines."""
  color = colors[ids]
  mixed = 0.35 * (0.3 + 0.7 * _gray(image)) + 0.65 * color
  edge = cv2.morphologyEx(ids.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
  return np.where(edge[..., None], 0.75 * color, mixed)


def _range(values):
  values = np.concatenate([v.ravel() for v in values])
  low, high = np.percentile(values, [1, 99]) if len(values) else (0.0, 1.0)
  return float(low), float(max(high, 1.001 * low, 1e-3))


def _colored(values, cmap, low, high, scale=np.asarray):
  values = scale(np.clip(np.nan_to_num(values), low, high))
  return matplotlib.colormaps[cmap]((values - scale(low)) / (scale(high) - scale(low)))[..., :3]


def name_of(names, i) -> str:
  """A class: its name, or its number where it has none."""
  if isinstance(i, str):
    return i
  return str(names[int(i)]) if int(i) < len(names) else str(int(i))


def _below(figure, place, width, height=0.1):
  """Axes under the tiles: the left (0) or right (1) half of the figure; width and height in inches."""
  w, h = figure.get_size_inches()
  return figure.add_axes((0.3 / w + place * 0.5, -(0.36 + height) / h, width / w, height / h))


def _scale(figure, place, cmap, low, high, label, scale='linear'):
  room = figure.get_size_inches()[0]
  axes = _below(figure, place, min(2.4, 0.38 * room))
  edges = np.linspace(low, high, 257) if scale == 'linear' else np.geomspace(low, high, 257)
  axes.pcolormesh(edges, [0, 1], np.linspace(0, 1, 256)[None], cmap=cmap, rasterized=True)
  axes.set(yticks=[], xlim=(low, high), xscale=scale)
  ticks = [t for p in range(-3, 4) for t in (10.0**p, 2 * 10.0**p, 5 * 10.0**p) if low <= t <= high]
  if scale == 'linear' or len(ticks) < 2:
    most = 4 if room > 3 else 2
    ticks = [
      t for t in matplotlib.ticker.MaxNLocator(most).tick_values(low, high) if low <= t <= high
    ]
  axes.set_xticks(ticks, [f'{t:.4g}' for t in ticks])
  axes.set_xticks([], minor=True)
  axes.tick_params(length=2, labelsize=8)
  axes.set_title(label, fontsize=8.5, pad=3)
  for spine in axes.spines.values():
    spine.set_visible(False)


def _ball(figure):
  """The key to the colors of normals: a ball seen from the front."""
  y, x = np.mgrid[1:-1:96j, -1:1:96j]
  inside = x * x + y * y <= 1
  z = np.sqrt(np.maximum(1 - x * x - y * y, 0))
  axes = _below(figure, 0, 0.5, 0.5)
  axes.imshow(np.concatenate([(np.stack([x, y, z], -1) + 1) / 2, inside[..., None]], -1))
  axes.axis('off')
  if figure.get_size_inches()[0] > 4:
    axes.text(
      1.15,
      0.5,
      'colors of a ball\nseen from the front',
      va='center',
      fontsize=8.5,
      transform=axes.transAxes,
    )


def _void_key(figure, shown, label):
  if shown:
    w, h = figure.get_size_inches()
    place = 1, -(0.3 if w > 6 else 0.85) / h  # beside the scales, or under them
    figure.legend(
      [_striped()],
      [label],
      loc='upper right',
      bbox_to_anchor=place,
      frameon=False,
      fontsize=8.5,
      handlelength=1,
      handleheight=1,
      borderaxespad=0,
    )


def _striped():
  dark, light = (tuple(color / 255) for color in _STRIPES)
  return Rectangle((0, 0), 1, 1, facecolor=light, edgecolor=dark, hatch='//////', linewidth=0)


def _class_legend(figure, maps, names):
  counts = np.bincount(np.concatenate([m.ravel() for m in maps]), minlength=256)
  void, counts[VOID] = counts[VOID], 0
  ids = sorted(np.argsort(-counts, kind='stable')[: min(_LEGEND, int((counts > 0).sum()))].tolist())
  colors, more = palette(names), int((counts > 0).sum()) - len(ids)
  handles = [Rectangle((0, 0), 1, 1, color=colors[i]) for i in ids]
  labels = [textwrap.shorten(name_of(names, i), 15, placeholder='…') for i in ids]
  if void:
    handles, labels = [*handles, _striped()], [*labels, 'void']
  if more > 0:
    handles, labels = [*handles, Rectangle((0, 0), 1, 1, alpha=0)], [*labels, f'and {more} more']
  w, h = figure.get_size_inches()
  fit = int(w / (0.4 + 0.07 * max(map(len, labels))))
  figure.legend(
    handles,
    labels,
    loc='upper left',
    frameon=False,
    bbox_to_anchor=(0.2 / w, -0.22 / h),
    fontsize=8.5,
    ncols=max(1, min(len(handles), fit)),
    handlelength=1,
    handleheight=1,
    columnspacing=1.1,
    borderaxespad=0,
  )


def png(figure) -> bytes:
  """The figure as a file; tight, without a background."""
  held = io.BytesIO()
  figure.savefig(
    held,
    dpi=160,
    bbox_inches='tight',
    pad_inches=0.06,
    transparent=True,
    format='png',
    metadata={'Software': None},
  )
  return held.getvalue()

"""The pictures of the report, as PNG files. Only report.py imports this, late, for matplotlib's
sake.
"""

import dataclasses
import textwrap

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tips_jax.core import log
from tips_jax.data import views
from tips_jax.data.ingest.checks import VOID
from tips_jax.evals.datasets import protocols
from tips_jax.evals.features import reading as features
from tips_jax.evals.probes import masks as segmentation

_INK, _SOFT, _LINE, _ACCENT, _PALE, _WARM = (
  '#1c2733',
  '#64748b',
  '#e2e8f0',
  '#0f766e',
  '#cbd5e1',
  '#d97706',
)
STYLE = {
  'font.family': 'sans-serif',
  'font.size': 10,
  'text.color': _INK,
  'axes.edgecolor': _LINE,
  'axes.labelcolor': _SOFT,
  'xtick.color': _SOFT,
  'ytick.color': _SOFT,
  'axes.titlesize': 11,
  'axes.titlelocation': 'left',
  'axes.spines.top': False,
  'axes.spines.right': False,
}
_CLASSES = (
  '#c4dcf3',
  '#ddd0ee',
  '#b5c9b7',
  '#dccdaa',
  '#98cddb',
  '#ecd3c4',
  '#e4572e',
  '#2e6fba',
  '#f2b134',
  '#7b4fa3',
  '#ef6aa8',
  '#2f8f4e',
  '#a8442f',
  '#3cb6a8',
  '#8c6d31',
  '#1b3a6b',
  '#ff8c61',
  '#5b7f1e',
  '#c2185b',
  '#6b6f76',
)
_COLUMNS, _QUERIES, _TOP, _GALLERY = 8, 6, 6, 1000


def draw(
  folder,
  *,
  values,
  labels,
  encoder,
  store,
  config,
  tokenizer,
  text_length,
  probe,
  metrics_path,
  losses,
):
  """Draws what there is material for into `folder`; returns the file names in the order of the
  page.
  """
  drawn = []
  with matplotlib.rc_context(STYLE):
    for name, figure in (
      ('bars.png', lambda: bars(values, labels)),
      ('features.png', lambda: patch_features(encoder, store, config, probe)),
      ('retrieval.png', lambda: retrieval_sheet(encoder, store, config, tokenizer, text_length)),
      ('losses.png', lambda: loss_curves(log.read(metrics_path) if metrics_path else [], losses)),
      (
        'progress.png',
        lambda: progress(log.read(metrics_path) if metrics_path else [], values['after'], labels),
      ),
    ):
      made = figure()
      if made is None:
        (folder / name).unlink(missing_ok=True)  # of an earlier report
        continue
      made.savefig(folder / name, dpi=160, bbox_inches='tight', pad_inches=0.08, facecolor='white')
      drawn.append(name)
  return drawn


def bars(values, labels):
  """Before and after as bars, chance and the pixel baseline as marks, of what is a share."""
  names = [name for name in values['after'] if protocols.unit(name)[0] == '%']
  if not names:
    return None
  figure = new_figure(9.6, 0.62 * len(names) + 0.9)
  axes = figure.add_subplot()
  y = np.arange(len(names))[::-1]
  get = lambda column: np.array([100 * values[column].get(name, np.nan) for name in names], float)
  axes.barh(y + 0.19, get('before'), 0.34, color=_PALE, label='before')
  axes.barh(y - 0.19, get('after'), 0.34, color=_ACCENT, label='after')
  for column, color, label in (('chance', _INK, 'chance'), ('baseline', _WARM, 'pixels')):
    axes.vlines(get(column), y - 0.42, y + 0.42, color=color, linewidth=2, label=label)
  top = max(5.0, np.nanmax([np.nanmax(get(c), initial=0) for c in values]))
  for place, value in zip(y, get('after')):
    if np.isfinite(value):
      axes.text(
        value + top * 0.008,
        place - 0.19,
        f'{value:.1f}',
        va='center',
        fontsize=9,
        color=_ACCENT,
        bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.6, 'alpha': 0.85},
      )
  axes.set(
    yticks=y, yticklabels=[labels.get(name, name) for name in names], xlim=(0, min(top * 1.08, 104))
  )
  axes.set_xlabel('%')
  axes.tick_params(length=0)
  axes.tick_params(axis='y', labelcolor=_INK)
  axes.xaxis.grid(True, color=_LINE)
  axes.set_axisbelow(True)
  axes.spines['bottom'].set_visible(False)
  handles, keys = axes.get_legend_handles_labels()
  axes.legend(
    handles[2:] + handles[:2],
    keys[2:] + keys[:2],
    ncols=4,
    frameon=False,
    loc='lower left',
    bbox_to_anchor=(-0.01, 1.0),
    borderaxespad=0.1,
  )
  return figure


def patch_features(encoder, store, config, probe):
  """Rows: images, principal components of their patches, predicted and true masks."""
  if not config.tasks and config.split not in store.splits:  # benchmarks alone are measured
    return None
  source = store.source(config.split)
  numbers = features.records(
    source, min(config.limit, max(_COLUMNS, config.batch_size))
  )  # one batch fits the PCA
  images, rows = next(features.batches(source, numbers, config=config), (None, None))
  if images is None:
    return None
  patch = features.finite(encoder.image(images)['patch'])[: len(rows)]
  shown = np.arange(min(_COLUMNS, len(rows))) * len(rows) // min(_COLUMNS, len(rows))
  strips = [
    ('image', [images[i] for i in shown]),
    ('patch features', list(_enlarge(components(patch)[shown], config.size))),
  ]
  used = set()
  if 'mask' in store.features:
    masks, square = {}, (config.size, config.size)
    if probe:
      masks['linear probe'] = [
        segmentation.upsample_argmax(probe.logits(patch[i]), square) for i in shown
      ]
    masks['truth'] = [views.evaluation_mask(rows[i][1]['mask'], config.size) for i in shown]
    strips += [(title, [mask_palette()[mask] for mask in found]) for title, found in masks.items()]
    used = set(np.unique(list(masks.values())))
  figure = new_figure(1.25 * len(shown) + 0.3, 1.25 * len(strips))
  grid = figure.add_gridspec(
    len(strips), len(shown), wspace=0.05, hspace=0.05, left=0.03, right=1, top=1, bottom=0
  )
  for row, (title, tiles) in enumerate(strips):
    for column, tile in enumerate(tiles):
      axes = draw_tile(figure, grid[row, column], tile)
      if column == 0:
        axes.set_ylabel(title, color=_SOFT, labelpad=6)
  _legend(figure, sorted(used - {VOID}), segmentation.class_names(store))
  return figure


def retrieval_sheet(encoder, store, config, tokenizer, text_length):
  """Texts and the images nearest to each, the right one framed."""
  if 'retrieval' not in config.tasks or tokenizer is None:
    return None
  size = min(config.limit, _GALLERY)
  found = features.extract(
    encoder,
    store,
    config.split,
    config=dataclasses.replace(config, limit=size),
    names=('embedding',),
    tokenizer=tokenizer,
    text_length=text_length,
  )
  if found.text is None:
    return None
  image, text = features.normalize(found.image['embedding']), features.normalize(found.text)
  count, top = min(_QUERIES, len(text)), min(_TOP, len(image))
  queries = (2 * np.arange(count) + 1) * len(text) // (2 * count)
  source = store.source(config.split)
  figure = new_figure(1.22 * (top + 3.4), 1.22 * count)
  grid = figure.add_gridspec(
    count,
    top + 2,
    width_ratios=[2.7] + [1] * top + [0.7],
    wspace=0.06,
    hspace=0.06,
    left=0,
    right=1,
    top=1,
    bottom=0,
  )
  for row, query in enumerate(queries):
    scores, right = image @ text[query], found.owner[query]
    rank = int((~(scores < scores[right])).sum())
    words = figure.add_subplot(grid[row, 0])
    words.axis('off')
    words.text(
      0,
      0.5,
      textwrap.fill(textwrap.shorten(found.captions[query], 190, placeholder=' …'), 42),
      va='center',
      fontsize=9.5,
      linespacing=1.35,
      transform=words.transAxes,
    )
    for column, place in enumerate(np.argsort(-scores, kind='stable')[:top]):
      tile = views.evaluation(source[int(found.record[place])]['image'], config.size)
      axes = draw_tile(figure, grid[row, column + 1], tile)
      if place == right:
        axes.add_patch(
          Rectangle(
            (0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor='#16a34a', linewidth=6
          )
        )
    note = figure.add_subplot(grid[row, top + 1])
    note.axis('off')
    note.text(
      0.06,
      0.5,
      f'rank {rank:,}',
      va='center',
      fontsize=10,
      transform=note.transAxes,
      color=_ACCENT if rank <= top else _SOFT,
      weight='bold' if rank == 1 else 'normal',
    )
  return figure


def loss_curves(lines, losses):
  """One panel for each term of the loss."""
  if losses is None:
    losses = ['loss']
  return _panels({name: _curve(lines, name) for name in losses}, smooth=True)


def progress(lines, names, labels):
  """One panel for each metric (of the recalls, R@1) that was measured at three steps or more, as
  papers print it.
  """
  curves = {
    labels.get(name, name): (steps, protocols.UNITS[protocols.unit(name)[0]][0] * y)
    for name in names
    if not name.endswith(('_r5', '_r10'))
    for steps, y in [_curve(lines, name)]
    if len(steps) >= 3
  }
  return _panels(curves, smooth=False)


def components(patch_BhwD):
  """The first three principal components of patch features as colors: [B, h, w, 3] in [0, 1]."""
  flat = patch_BhwD.reshape(-1, patch_BhwD.shape[-1]).astype(np.float64)
  flat = flat - flat.mean(0)
  _, vectors = np.linalg.eigh(flat.T @ flat)
  axes = vectors[:, ::-1][:, :3]
  axes = axes * np.where(axes.sum(0) < 0, -1, 1)  # a sign that does not depend on the solver
  projected = np.pad(flat @ axes, ((0, 0), (0, 3 - axes.shape[1])))
  low, high = np.percentile(projected, [2, 98], axis=0)
  return np.clip((projected - low) / np.maximum(high - low, 1e-12), 0, 1).reshape(
    *patch_BhwD.shape[:3], 3
  )


def _panels(curves, *, smooth):
  curves = {name: (x, y) for name, (x, y) in curves.items() if len(x) > 1}
  if not curves:
    return None
  columns = len(curves) if len(curves) <= 4 else 3
  rows = -(-len(curves) // columns)
  figure = new_figure(10.2, 2.5 * rows)
  grid = figure.add_gridspec(rows, columns, hspace=0.5, wspace=0.22)
  for i, (name, (x, y)) in enumerate(curves.items()):
    axes = figure.add_subplot(grid[i // columns, i % columns])
    if smooth:
      axes.plot(x, y, color=_ACCENT, alpha=0.25, linewidth=1)
      y = _smooth(y, max(1, len(y) // 30))
    axes.plot(x, y, color=_ACCENT, linewidth=1.8, marker=None if smooth else 'o', markersize=4)
    axes.set_title(name, color=_INK, fontsize=9.5 if columns == 4 else 11)
    axes.margins(x=0.01 if smooth else 0.04)
    axes.yaxis.grid(True, color=_LINE)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    axes.tick_params(length=0, labelsize=9)
    axes.set_axisbelow(True)
    if i // columns == rows - 1 or i + columns >= len(curves):
      axes.set_xlabel('step')
  return figure


def _curve(lines, name):
  """(steps, values) of the lines that hold a number for `name`; a step written twice counts once,
  the last.
  """
  found = {line['step']: line[name] for line in lines if isinstance(line.get(name), (int, float))}
  return np.array(list(found), float), np.array(list(found.values()), float)


def _smooth(y, half):
  """A moving average over up to 2 half + 1 points around each, fewer at the ends."""
  total = np.concatenate([[0], np.cumsum(y)])
  i = np.arange(len(y))
  back = np.minimum(i, half)  # at the start the window stays symmetric: losses fall steeply there
  ahead = np.minimum(back, len(y) - 1 - i)
  return (total[i + ahead + 1] - total[i - back]) / (ahead + back + 1)


def new_figure(width, height):
  figure = Figure(figsize=(width, height))
  FigureCanvasAgg(figure)
  return figure


def draw_tile(figure, place, image):
  axes = figure.add_subplot(place)
  axes.imshow(image, interpolation='antialiased', aspect='equal')
  axes.set(xticks=[], yticks=[])
  for spine in axes.spines.values():
    spine.set_visible(False)
  return axes


def _enlarge(maps, size):
  return [
    np.clip(cv2.resize(m.astype(np.float32), (size, size), interpolation=cv2.INTER_LINEAR), 0, 1)
    for m in maps
  ]


def mask_palette():
  """256 colors by class id: soft ones first (surroundings, in `scenes`), 255 (void) is white."""
  first = matplotlib.colors.to_rgba_array(_CLASSES)[:, :3]
  i = np.arange(256 - len(first))
  rest = matplotlib.colors.hsv_to_rgb(
    np.stack([i * 0.618 % 1, 0.45 + 0.3 * (i % 2), 0.9 - 0.2 * (i // 2 % 3)], -1)
  )
  rest[-1] = 1
  return np.concatenate([first, rest])


def _legend(figure, ids, names):
  if not ids or not names:
    return
  colors = mask_palette()
  handles = [Rectangle((0, 0), 1, 1, color=colors[i]) for i in ids]
  figure.legend(
    handles,
    [names[i] if i < len(names) else str(i) for i in ids],
    loc='upper center',
    frameon=False,
    bbox_to_anchor=(0.51, -0.01),
    ncols=min(10, len(ids)),
    fontsize=9,
    handlelength=1,
    handleheight=1,
    columnspacing=1.2,
    labelcolor=_SOFT,
  )

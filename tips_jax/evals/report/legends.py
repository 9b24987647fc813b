"""Scales and legends under the tiles of a picture."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tips_jax.data.ingest.checks import VOID
from tips_jax.evals.report import style

_CLASSES = 24  # named in a legend
_KEY = dict(frameon=False, fontsize=8.5, handlelength=1, handleheight=1, borderaxespad=0)


def _below(figure: Figure, half: int, width: float, height: float = 0.1) -> Axes:
  """Axes under the left (0) or right (1) half of the tiles; width and height in inches."""
  w, h = figure.get_size_inches()
  return figure.add_axes((style.LEFT / w + half * 0.5, -(0.36 + height) / h, width / w, height / h))


def color_scale(
  figure: Figure,
  half: int,
  cmap: str,
  low: float,
  high: float,
  label: str,
  scale: str = 'linear',
) -> None:
  """A bar of colors with numbers, under the left (0) or right (1) half."""
  width = figure.get_size_inches()[0]
  axes = _below(figure, half, min(2.4, 0.38 * width))
  space = np.geomspace if scale == 'log' else np.linspace
  colors = np.linspace(0, 1, 256)[None]
  axes.pcolormesh(space(low, high, 257), [0, 1], colors, cmap=cmap, rasterized=True)
  axes.set(yticks=[], xlim=(low, high), xscale=scale)
  # matplotlib labels powers of ten only, of which a short scale may have none.
  ticks = np.outer(10.0 ** np.arange(-3, 4), (1, 2, 5)).ravel()
  ticks = ticks[(low <= ticks) & (ticks <= high)]
  if scale == 'linear' or len(ticks) < 2:
    # A narrow picture has no place for more numbers.
    locator = matplotlib.ticker.MaxNLocator(4 if width > 3 else 2)
    ticks = locator.tick_values(low, high)
    ticks = ticks[(low <= ticks) & (ticks <= high)]
  axes.set_xticks(ticks, [f'{tick:.4g}' for tick in ticks])
  axes.set_xticks([], minor=True)
  axes.tick_params(length=2, labelsize=8)
  axes.set_title(label, fontsize=8.5, pad=3)
  style.hide_frame(axes)


def ball(figure: Figure) -> None:
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


def missing_legend(figure: Figure, known: Sequence[np.ndarray]) -> None:
  """The key to the stripes, if a tile has any. known: bool [h, w] of each image."""
  if all(map(np.all, known)):
    return
  w, h = figure.get_size_inches()
  place = 1, -(0.3 if w > 6 else 0.85) / h  # beside the scales, or under them
  figure.legend([_stripes()], ['missing'], loc='upper right', bbox_to_anchor=place, **_KEY)


def _stripes() -> Rectangle:
  dark, light = map(tuple, style.STRIPES)
  return Rectangle((0, 0), 1, 1, facecolor=light, edgecolor=dark, hatch='//////', linewidth=0)


def class_legend(
  figure: Figure, maps: Sequence[np.ndarray], names: Sequence[str], colors: np.ndarray
) -> None:
  """The classes with the most pixels, in the order of their ids."""
  counts = np.bincount(np.concatenate([*map(np.ravel, maps)]), minlength=256)
  void = counts[VOID]
  counts[VOID] = 0
  # The legend has the largest classes, in the order of the data set.
  present = int((counts > 0).sum())
  ids = sorted(np.argsort(-counts, kind='stable')[: min(_CLASSES, present)].tolist())
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

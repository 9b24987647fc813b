"""What has axes: confusions, bars, and the curves of a training run, as PNG bytes."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

from tips_jax.evals.report import style
from tips_jax.evals.report.style import FAINT, INK, WRONG
from tips_jax.evals.report.tables import UNITS, Row
from tips_jax.evals.tasks.spec import Result

_CLASSES = 10  # of a confusion matrix
_VALUE = '#17a08f'
_BEFORE = '#9fb3c1'
_PUBLISHED = '#8172e6'
_REFERENCES = (  # column, color, name in the legend
  ('chance', '#d97f12', 'chance'),
  ('pixel_baseline', '#c2458b', 'raw pixels'),
)
_MIN_POINTS = 3  # of a curve of a metric: two points say nothing of the way between them


def confusion(result: Result) -> bytes | None:
  """The classes that are taken for one another most often, in percent of each true class."""
  counts = result.confusion
  if counts is None or len(counts) < 3:
    return None
  counts = np.asarray(counts, np.float64)
  share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  chosen = most_confused(share)
  if not chosen:
    return None
  part = share[np.ix_(chosen, chosen)]
  labels = [style.short_name(result.classes, i, 22) for i in chosen]
  column_labels = list(labels)
  if len(chosen) < len(share):
    # A row sums to 100 % with the classes that are left out.
    rest = np.maximum(share[chosen].sum(1) - part.sum(1), 0)
    part = np.concatenate([part, rest[:, None]], 1)
    column_labels.append('any other')
  rows, columns = part.shape
  right = np.eye(rows, columns, dtype=bool)
  color = np.empty((rows, columns, 3))
  color[:] = matplotlib.colors.to_rgb(WRONG)
  color[right] = matplotlib.colors.to_rgb(_VALUE)
  color[:, rows:] = matplotlib.colors.to_rgb(INK)
  # The root makes rare confusions visible.
  strength = np.where(right, 0.5 + 0.45 * part, 0.9 * np.sqrt(part)).clip(0, 1)

  def draw():
    figure = style.new_figure(0.52 * columns, 0.36 * rows)
    axes = figure.add_axes((0, 0, 1, 1))
    pixels = np.concatenate([color, strength[..., None]], -1)
    axes.imshow(pixels, aspect='auto', interpolation='nearest')
    for y, x in np.ndindex(part.shape):
      if part[y, x] < 0.005:  # would be printed as 0
        continue
      ink = 'white' if strength[y, x] > 0.55 else INK
      centered = dict(ha='center', va='center', fontsize=9)
      axes.text(x, y, f'{100 * part[y, x]:.0f}', color=ink, **centered)
    axes.set(yticks=range(rows), yticklabels=labels, xticks=range(columns))
    axes.set_xticklabels(column_labels, rotation=38, ha='left')
    axes.xaxis.tick_top()
    axes.set_ylabel('truth', labelpad=8)
    axes.set_xlabel('predicted, % of the true class', labelpad=8)
    axes.tick_params(length=0)
    style.hide_frame(axes)
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which='minor', color=FAINT, linewidth=0.7)
    axes.tick_params(which='minor', length=0)
    return figure

  return style.png(draw)


def most_confused(share: np.ndarray, most: int = _CLASSES) -> list[int]:
  """Classes of the largest off-diagonal entries of a confusion [K, K] with rows of sum 1."""
  off_diagonal = np.where(np.eye(len(share), dtype=bool), 0, share)
  chosen = []
  # Both classes of a pair, or neither: one alone would show nothing.
  for flat in np.argsort(-off_diagonal, axis=None, kind='stable'):
    pair = [int(i) for i in np.unravel_index(flat, off_diagonal.shape)]
    new = [i for i in pair if i not in chosen]
    if not off_diagonal[tuple(pair)] or len(chosen) + len(new) > most:
      break
    chosen += new
  return chosen


def bars(rows: Sequence[Row], labels: Sequence[str]) -> bytes | None:
  """Metrics in percent of the first evaluation as bars, before training where measured; chance,
  raw pixels and published numbers as marks.
  """
  if not rows:
    return None
  # Two bars for a row, or one that takes the place of both.
  height = 0.36
  offset = 0
  measured = 'measured'
  if any(row.columns['before'] is not None for row in rows):
    height = 0.3
    offset = 0.17
    measured = 'after'

  def draw():
    figure = style.new_figure(6, 0.58 * len(rows) + 0.3)
    axes = figure.add_axes((0, 0, 1, 1))
    places = np.arange(len(rows))[::-1]
    for y, row in zip(places, rows):
      if row.columns['before'] is not None:
        axes.barh(y + offset, row.columns['before'], height, color=_BEFORE, label='before')
      _bar(axes, y - offset, row.values[0], height, measured)
      for column, color, name in _REFERENCES:
        value = row.columns[column]
        if value is not None:
          axes.vlines(value, y - 0.36, y + 0.36, color=color, linewidth=2.5, label=name)
      # One model above its bar, the other below it.
      for figures, side in zip(row.published, (-1, 1)):
        _published(axes, y, figures, side)
    axes.set(yticks=places, yticklabels=labels, xlim=(0, 104), ylim=(-0.6, len(rows) - 0.4))
    axes.set_xlabel('%')
    axes.tick_params(length=0)
    axes.xaxis.grid(True, color=FAINT)
    axes.set_axisbelow(True)
    style.hide_frame(axes)
    # Every bar has a label; the legend names each kind once.
    by_label = {}
    for handle, label in zip(*axes.get_legend_handles_labels()):
      by_label.setdefault(label, handle)
    figure.legend(
      by_label.values(),
      by_label.keys(),
      ncols=3,
      frameon=False,
      loc='lower left',
      fontsize=9,
      bbox_to_anchor=(-0.005, 1),
      borderaxespad=0.2,
    )
    return figure

  return style.png(draw)


def _bar(axes, y, value, height, label):
  axes.barh(y, value, height, color=_VALUE, label=label)
  # Inside of the bar where the number has room, else behind it.
  place = dict(xytext=(5, 0), ha='left', color=_VALUE)
  if value > 12:
    place = dict(xytext=(-5, 0), ha='right', color='white')
  words = dict(textcoords='offset points', fontsize=9, va='center', weight='bold')
  axes.annotate(f'{value:.1f}', (value, y), **place, **words)


def _published(axes, y, figure, side):
  model = figure['model'].replace(' (released)', '')
  label = 'published, nearest released models'
  axes.plot(figure['value'], y, 'D', color=_PUBLISHED, markersize=6, label=label)
  offset = dict(textcoords='offset points', fontsize=7, ha='center', va='center')
  axes.annotate(model, (figure['value'], y), (0, 11 * side), **offset)


def losses(lines: Sequence[Mapping], names: Sequence[str]) -> bytes | None:
  """One panel for each term of the loss by step, as logged (pale) and smoothed."""
  curves = {}
  for name in names:
    steps, values = _curve(lines, name)
    if len(steps) > 1:
      curves[name] = steps, values
  return _panels(curves, smooth=True)


def progress(lines: Sequence[Mapping], metrics: Mapping[str, tuple[str, str]]) -> bytes | None:
  """One panel for each metric by step. metrics: name in metrics.jsonl -> (label, unit)."""
  curves = {}
  for name, (label, unit) in metrics.items():
    steps, values = _curve(lines, name)
    if len(steps) >= _MIN_POINTS:
      curves[label] = steps, UNITS[unit][0] * values
  return _panels(curves, smooth=False)


def _panels(curves, *, smooth):
  if not curves:
    return None
  columns = len(curves) if len(curves) <= 4 else 3
  rows = -(-len(curves) // columns)

  def draw():
    figure = style.new_figure(10.2, 2.5 * rows)
    grid = figure.add_gridspec(rows, columns, hspace=0.5, wspace=0.22)
    for i, (name, (steps, values)) in enumerate(curves.items()):
      axes = figure.add_subplot(grid[i // columns, i % columns])
      if smooth:
        axes.plot(steps, values, color=_VALUE, alpha=0.25, linewidth=1)
        values = smoothed(values, max(1, len(values) // 30))
        axes.plot(steps, values, color=_VALUE, linewidth=1.8)
      else:
        axes.plot(steps, values, color=_VALUE, linewidth=1.8, marker='o', markersize=4)
      axes.set_title(name, fontsize=9.5)
      axes.margins(x=0.03)
      axes.yaxis.grid(True, color=FAINT)
      axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
      axes.tick_params(length=0, labelsize=9)
      axes.set_axisbelow(True)
      if i + columns >= len(curves):  # nothing below it
        axes.set_xlabel('step')
    return figure

  return style.png(draw)


def _curve(lines, name):
  """(steps, values) of the lines with a number for `name`; of a repeated step the last one."""
  by_step = {}
  for line in lines:
    # Lines of training and of evaluations alternate; a restart repeats steps.
    if isinstance(line.get(name), (int, float)):
      by_step[line['step']] = line[name]
  return np.array(list(by_step), float), np.array(list(by_step.values()), float)


def smoothed(values: np.ndarray, half: int) -> np.ndarray:
  """A moving average over up to 2 half + 1 points around each, fewer at the ends."""
  total = np.concatenate([[0], np.cumsum(values)])
  i = np.arange(len(values))
  back = np.minimum(i, half)
  # At the start the window stays symmetric: losses fall steeply there.
  ahead = np.minimum(back, len(values) - 1 - i)
  return (total[i + ahead + 1] - total[i - back]) / (ahead + back + 1)

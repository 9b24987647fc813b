"""The charts of the evaluation's page, as PNG bytes: which classes are taken for one another, and
bars.
"""

import textwrap

import matplotlib
import numpy as np

from tips_jax.evals.report import plotting as pictures
from tips_jax.evals.report.figures import FAINT, INK, STYLE, WRONG, name_of, png

WORST = 10  # classes of a confusion matrix
_OURS, _CHANCE, _PUBLISHED = '#17a08f', '#d97f12', '#8172e6'


def confusion(outcome) -> bytes | None:
  """The classes that are taken for one another most often, at most ten: shares of each true class
  in percent.
  """
  counts = getattr(outcome, 'confusion', None)
  if counts is None or len(counts) < 3:
    return None
  counts, names = np.asarray(counts, np.float64), getattr(outcome, 'classes', None) or ()
  share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  chosen = worst(share)
  if not len(chosen):
    return None
  part = share[np.ix_(chosen, chosen)]
  rest = np.maximum(share[chosen].sum(1) - part.sum(1), 0)
  part = np.concatenate([part, rest[:, None]], 1) if len(chosen) < len(share) else part
  n, columns = part.shape
  with matplotlib.rc_context(STYLE):
    figure = pictures.new_figure(0.52 * columns, 0.36 * n)
    axes = figure.add_axes((0, 0, 1, 1))
    right = np.eye(n, columns, dtype=bool)
    color = np.where(
      right[..., None], matplotlib.colors.to_rgb(_OURS), matplotlib.colors.to_rgb(WRONG)
    )
    color[:, n:] = matplotlib.colors.to_rgb(INK)
    strength = np.where(right, 0.5 + 0.45 * part, 0.9 * np.sqrt(part)).clip(0, 1)
    axes.imshow(
      np.concatenate([color, strength[..., None]], -1), aspect='auto', interpolation='nearest'
    )
    for y, x in np.ndindex(part.shape):
      if part[y, x] >= 0.005:
        axes.text(
          x,
          y,
          f'{100 * part[y, x]:.0f}',
          ha='center',
          va='center',
          fontsize=9,
          color='white' if strength[y, x] > 0.55 else INK,
        )
    label = lambda i: textwrap.shorten(name_of(names, i), 22, placeholder='…')
    axes.set(yticks=range(n), yticklabels=[label(i) for i in chosen], xticks=range(columns))
    axes.set_xticklabels(
      [*(label(i) for i in chosen), 'any other'][:columns], rotation=38, ha='left'
    )
    axes.xaxis.tick_top()
    axes.set_ylabel('truth', labelpad=8)
    axes.set_xlabel('predicted, % of the true class', labelpad=8)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
      spine.set_visible(False)
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
    axes.grid(which='minor', color=FAINT, linewidth=0.7)
    axes.tick_params(which='minor', length=0)
    return png(figure)


def worst(share, most: int = WORST):
  """Classes of a row-normalized confusion [K, K]: those of its largest off-diagonal entries, the
  worst pair first.
  """
  off = np.where(np.eye(len(share), dtype=bool), 0, share)
  chosen = []
  for place in np.argsort(-off, axis=None, kind='stable'):
    pair = [int(i) for i in np.unravel_index(place, off.shape)]
    new = [i for i in pair if i not in chosen]
    if not off[tuple(pair)] or len(chosen) + len(new) > most:
      break
    chosen += new
  return chosen


def bars(rows) -> bytes | None:
  """rows: (label, ours, chance or None, ((model, value), ...)) in percent."""
  if not rows:
    return None
  with matplotlib.rc_context(STYLE):
    figure = pictures.new_figure(6, 0.58 * len(rows) + 0.3)
    axes = figure.add_axes((0, 0, 1, 1))
    y = np.arange(len(rows))[::-1]
    axes.barh(y, [row[1] for row in rows], 0.36, color=_OURS, label='ours')
    for place, (_, ours, chance, published) in zip(y, rows):
      if chance is not None and np.isfinite(chance):
        axes.vlines(
          chance, place - 0.27, place + 0.27, color=_CHANCE, linewidth=2.5, label='chance'
        )
      for (model, value), side in zip(published, (-1, 1)):
        axes.plot(
          value,
          place,
          'D',
          color=_PUBLISHED,
          markersize=6,
          label='published, nearest released models',
        )
        axes.annotate(
          model,
          (value, place),
          (0, 11 * side),
          textcoords='offset points',
          fontsize=7,
          ha='center',
          va='center',
        )
      if np.isfinite(ours):
        inside = ours > 12
        axes.annotate(
          f'{ours:.1f}',
          (ours, place),
          (-5 if inside else 5, 0),
          textcoords='offset points',
          fontsize=9,
          va='center',
          ha='right' if inside else 'left',
          color='white' if inside else _OURS,
          weight='bold',
        )
    axes.set(
      yticks=y, yticklabels=[row[0] for row in rows], xlim=(0, 104), ylim=(-0.6, len(rows) - 0.4)
    )
    axes.set_xlabel('%')
    axes.tick_params(length=0)
    axes.xaxis.grid(True, color=FAINT)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
      spine.set_visible(False)
    handles = dict(
      reversed(list(zip(*reversed(axes.get_legend_handles_labels()))))
    )  # the bars come last
    figure.legend(
      handles.values(),
      handles.keys(),
      ncols=3,
      frameon=False,
      loc='lower left',
      fontsize=9,
      bbox_to_anchor=(-0.005, 1),
      borderaxespad=0.2,
    )
    return png(figure)

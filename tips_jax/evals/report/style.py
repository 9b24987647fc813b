"""The style of all pictures of a page, and the parts that plotting.py and charts.py share."""

import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

# Colors that read on a light and on a dark page.
INK = '#6f7f93'
FAINT = '#8a97a85c'
RIGHT = '#1fa855'
WRONG = '#e5484d'
STRIPES = np.array([[166, 176, 189], [198, 206, 216]]) / 255  # where nothing is known
LEFT = 0.3  # inches before the first tile of a row, for the titles of rows
STYLE = {
  'font.family': 'sans-serif',
  'font.size': 10,
  'text.color': INK,
  'axes.edgecolor': FAINT,
  'axes.labelcolor': INK,
  'xtick.color': INK,
  'ytick.color': INK,
  'axes.titlesize': 11,
  'axes.titlelocation': 'left',
  'axes.spines.top': False,
  'axes.spines.right': False,
}


def png(draw: Callable[[], Figure]) -> bytes:
  """The figure that `draw` makes in the style of the page; tight, without a background."""
  with matplotlib.rc_context(STYLE):
    buffer = io.BytesIO()
    draw().savefig(
      buffer,
      dpi=160,
      bbox_inches='tight',
      pad_inches=0.06,
      transparent=True,
      format='png',
      # The version of matplotlib would make equal pictures different files.
      metadata={'Software': None},
    )
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
  """A figure of so many inches that belongs to no window."""
  # pyplot would keep every figure, and choose a backend for all of the process.
  figure = Figure(figsize=(width, height))
  FigureCanvasAgg(figure)
  return figure


def tile(figure: Figure, place: SubplotSpec, image: np.ndarray) -> Axes:
  """Draws an image without ticks and frame."""
  axes = figure.add_subplot(place)
  axes.imshow(image, interpolation='antialiased', aspect='equal')
  axes.set(xticks=[], yticks=[])
  hide_frame(axes)
  return axes


def hide_frame(axes: Axes) -> None:
  for spine in axes.spines.values():
    spine.set_visible(False)


def short_name(names: Sequence[str], label: Any, width: int) -> str:
  """The name of a class, or its number where it has none, in at most `width` letters."""
  if not isinstance(label, str):
    label = int(label)
    if label < len(names):
      label = names[label]
  return textwrap.shorten(str(label), width, placeholder='…')

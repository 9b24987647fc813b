"""What a curation did: numbers (curation.json), a page with pictures, a table for the terminal."""

import collections
import functools
import html
import json
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from tips_jax.core import files, strict
from tips_jax.curation.choosing import Dropped
from tips_jax.curation.funnel import Funnel
from tips_jax.curation.records import Pictures
from tips_jax.data import store
from tips_jax.evals.report import page, style

FILE = 'curation.json'
PAGE = 'curation.html'
_EXAMPLES = 12  # of a step, of what went and of what stayed
_TILE = 112  # pixels
_BINS = 40
# What the value of a record is, by the kind of the step.
_VALUES = {
  'image_size': 'shorter side, pixels',
  'text_length': 'words',
  'junk_text': 'words that are left',
  'language': 'probability of the language that was found',
  'similarity': 'cosine of image and text',
  'near_duplicates': 'largest correlation with an image of a like hash',
  'decontaminate': 'largest correlation with an image of a like hash',
  'retrieve': 'cosine to the nearest query',
  'balance': 'cosine to the center of the cluster',
}

_LEAD = (
  'From all records to those that stay, step by step. All that went is listed in '
  '<a href="dropped.jsonl">dropped.jsonl</a>; the numbers are in '
  '<a href="curation.json">curation.json</a>.'
)


def write(folder: pathlib.Path, funnel: Funnel, opened: store.Store) -> dict[str, Any]:
  """Writes FILE and PAGE into the folder of a store; returns the content of FILE."""
  steps = []
  for number, name in enumerate(funnel.names):
    reached = funnel.reached(number)
    step = {'title': name, 'records': len(reached)}
    step['dropped'] = int(np.sum(funnel.by == number))
    if number:
      step['settings'] = strict.plain(funnel.curation.steps[number - 1])
      step['values'] = _histogram(funnel.values(number)[reached])
    steps.append(step)
  content = {
    'store': pathlib.Path(opened.path).name,
    'splits': {split: int(funnel.stays(split).sum()) for split in funnel.curation.splits},
    'records': len(funnel.by),
    'stay': sum(int(funnel.stays(split).sum()) for split in funnel.curation.splits),
    'steps': steps,
  }
  files.write(folder / PAGE, _page(content, funnel))
  # Last: it is what `read` reads.
  files.write(folder / FILE, json.dumps(content, indent=1))
  return content


def read(folder: pathlib.Path) -> dict[str, Any]:
  """What `write` returned."""
  return json.loads((folder / FILE).read_text())


def summary(content: Mapping[str, Any]) -> str:
  """The funnel as text."""
  rows = [('records', '', f'{content["records"]:,}')]
  for step in content['steps']:
    if step['dropped'] or 'settings' in step:
      share = f'{100 * step["dropped"] / max(step["records"], 1):.1f} %'
      rows.append((step['title'], f'-{step["dropped"]:,}', share))
  rows.append(('stay', '', f'{content["stay"]:,}'))
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for name, dropped, number in rows:
    lines.append(f'{name:<{widths[0]}}  {dropped:>{widths[1]}}  {number:>{widths[2]}}')
  return '\n'.join(lines)


def _histogram(values) -> dict[str, Any] | None:
  """Counts of values between edges; None where there are none."""
  values = values[np.isfinite(values)].astype(np.float64)
  if not len(values):
    return None
  # Few are far out: they are counted at the ends.
  low, high = np.percentile(values, [0.5, 99.5])
  if low == high:
    low, high = low - 0.5, high + 0.5
  counts, edges = np.histogram(values.clip(low, high), _BINS, (low, high))
  return {'edges': [float(f'{edge:.6g}') for edge in edges], 'counts': counts.tolist()}


# --- the page -----------------------------------------------------------------------------------


def _page(content, funnel):
  parts = [f'<h1>Curation</h1>\n<p>{_LEAD}</p>\n<dl>']
  facts = {'store': content['store'], 'records': f'{content["records"]:,}'}
  facts['stay'] = f'{content["stay"]:,}'
  parts += [
    f'<div><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>'
    for name, text in facts.items()
  ]
  parts.append(f'</dl>\n<section><h2>Funnel</h2>{_bars(content)}</section>')
  examples = _examples(funnel)
  for number, step in enumerate(content['steps']):
    if number or step['dropped']:
      parts.append(_section(funnel, number, step, examples[number]))
  return page.document('Curation', '\n'.join(parts), _STYLE)


def _bars(content):
  lines = []
  for step in content['steps']:
    before = 100 * step['records'] / max(content['records'], 1)
    went = 100 * step['dropped'] / max(content['records'], 1)
    lines.append(
      f'<tr><td>{html.escape(step["title"])}</td><td>{step["records"]:,}</td>'
      f'<td>-{step["dropped"]:,}</td><td class="bar"><i style="width:{before - went:.2f}%"></i>'
      f'<b style="width:{went:.2f}%"></b></td></tr>'
    )
  share = 100 * content['stay'] / max(content['records'], 1)
  lines.append(
    f'<tr><td>stay</td><td>{content["stay"]:,}</td><td></td>'
    f'<td class="bar"><i style="width:{share:.2f}%"></i></td></tr>'
  )
  head = '<tr><th>step</th><th>records</th><th>went</th><th></th></tr>'
  return f'<table class="funnel">{head}{"".join(lines)}</table>'


def _examples(funnel) -> Sequence[list[Dropped]]:
  """Of each step some of what it dropped, spread evenly over all of it."""
  counts = list(funnel.counts().values())
  wanted = {}
  for number, count in enumerate(counts):
    wanted[number] = set(np.linspace(0, max(count - 1, 0), _EXAMPLES).astype(int).tolist())
  seen = collections.Counter()
  found = [[] for _ in counts]
  for number, dropped in funnel.dropped():
    if seen[number] in wanted[number]:
      found[number].append(dropped)
    seen[number] += 1
  return found


def _section(funnel, number, step, examples):
  title = html.escape(step['title'])
  field = step.get('settings', {}).get('field', 'alt_text')  # the texts that it has judged
  parts = [f'<section><h2>{title}</h2>']
  settings = {k: v for k, v in step.get('settings', {}).items() if k not in ('kind', 'name')}
  text = ', '.join(f'{name} = {value}' for name, value in settings.items())
  parts.append(
    f'<p>{step["dropped"]:,} of {step["records"]:,} records went. {html.escape(text)}</p>'
  )
  if step.get('values'):
    kind = step['settings']['kind']
    parts.append('<figure>' + page.image(_chart(step['values'], _VALUES[kind]), 'values'))
    parts.append('</figure>')
  if examples:
    tiles = [_tile_of_dropped(funnel, dropped, field) for dropped in examples]
    parts.append(f'<h3>Went</h3><div class="tiles">{"".join(tiles)}</div>')
  stayed = funnel.reached(number + 1)
  if len(stayed):
    chosen = stayed[np.unique(np.linspace(0, len(stayed) - 1, _EXAMPLES).astype(int))]
    values = np.full(len(funnel.by), np.nan)
    if number:
      values = funnel.values(number)
    tiles = []
    for row in chosen.tolist():
      value = '' if not np.isfinite(values[row]) else f'{values[row]:.3g}'
      tiles.append(_tile(funnel, row, value, field=field))
    parts.append(f'<h3>Stayed</h3><div class="tiles">{"".join(tiles)}</div>')
  return ''.join(parts) + '</section>'


def _chart(histogram, label):
  def draw():
    figure = style.new_figure(6.4, 1.5)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.stairs(histogram['counts'], histogram['edges'], fill=True, color='#17a08f')
    axes.set_xlabel(label)
    axes.set_ylabel('records')
    return figure

  return style.png(draw)


def _tile_of_dropped(funnel, dropped, field):
  other = ''
  if dropped.row_of is not None:
    other = _picture(_pixels_of(funnel, dropped.row_of))
  if dropped.picture_of is not None:
    name, number = dropped.picture_of
    other = _picture(_set(name)[number].pixels())
  return _tile(funnel, dropped.row, dropped.reason, other, field=field)


@functools.lru_cache(maxsize=8)
def _set(name):
  return Pictures(name, 'evaluations')


def _pixels_of(funnel, row):
  """None where the image cannot be read."""
  try:
    return funnel.table.record(row).pixels
  except ValueError:
    return None


def _tile(funnel, row, note, other='', *, field):
  """A record: its picture, the one it is like, its texts of a field and a note."""
  try:
    texts = funnel.table.record(row).texts(field)
  except ValueError:
    texts = []
  text = textwrap.shorten(' | '.join(texts), 70, placeholder='…') or f'(no {field})'
  pictures = _picture(_pixels_of(funnel, row)) + other
  return f'<div><span>{pictures}</span><q>{html.escape(text)}</q><em>{html.escape(note)}</em></div>'


def _picture(pixels):
  if pixels is None:
    return ''
  height, width = pixels.shape[:2]
  scale = _TILE / max(height, width)
  size = (max(round(width * scale), 1), max(round(height * scale), 1))
  small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
  source = page.data_uri(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
  return f'<img src="{source}" width="{size[0]}" height="{size[1]}" alt="">'


_STYLE = """
.tiles {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, auto)); gap: 14px;
  margin-bottom: 20px; align-items: end;
}
.tiles > div { font-size: 12px; line-height: 1.35; max-width: 244px; overflow-wrap: anywhere; }
.tiles span { display: flex; gap: 4px; align-items: end; }
.tiles img { background: #fff; border-radius: 4px; }
.tiles q { display: block; quotes: none; margin-top: 4px; }
.tiles em { display: block; color: var(--soft); font-style: normal; }
table.funnel td { padding: 6px 12px; }
table.funnel td.bar { width: 55%; text-align: left; white-space: nowrap; font-size: 0; }
table.funnel td.bar i, table.funnel td.bar b {
  display: inline-block; height: 14px; background: var(--number);
}
table.funnel td.bar b { background: #e5484d; }
"""

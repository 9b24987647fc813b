"""The page of an evaluation: one HTML file with its pictures inside, for light and dark screens."""

import base64
import dataclasses
import html
import struct
from collections.abc import Sequence

import cv2
import numpy as np

from tips_jax.evals.datasets.protocols import UNITS
from tips_jax.evals.report import tables
from tips_jax.evals.report.tables import ARROWS, COLUMNS, OTHER, Row, credit, label, number
from tips_jax.evals.tasks import table

_LEAD = 'A frozen encoder, measured on images that it was not trained on.'
_LEAD_OF_RUN = 'The model before and after training, frozen, on images that it was not trained on.'
_RESULTS = (
  'An arrow says whether more or less is better. Chance: an answer that looks at no '
  'image.{baselines} Published: the released models nearest in size, marked by how far the number '
  'can be trusted: V read in a primary source, T second-hand, T2 in two second-hand sources that '
  'agree. They were measured with the full protocol on the full data set.'
)
_BASELINES = {
  'position': ' By position: the mean, or the commonest class, of the training images there.',
  'pixel_baseline': (
    ' Pixels: the same evaluation of raw pixels; for retrieval, a regression from small images to '
    'words.'
  ),
  'pixels_position': (
    ' Pixels and position: least squares from the raw pixels of a patch, with a constant for each '
    'place.'
  ),
  'oracle': (
    ' Oracle: the truth, averaged over each patch: what is left is lost by the resolution.'
  ),
}
_FOOTER = (
  'Every number with its unit and options is in <a href="results.json">results.json</a>; the '
  'pictures are PNG files in <a href="pictures/">pictures</a>.'
)


@dataclasses.dataclass(frozen=True)
class Picture:
  """A picture of a section; `note` is a caption of its own."""

  label: str
  png: bytes
  note: str = ''


@dataclasses.dataclass
class Section:
  """A part of the page, under the results."""

  # In the names of the files of its pictures.
  name: str
  title: str
  caption: str
  pictures: list[Picture] = dataclasses.field(default_factory=list)
  # Of results.json: all of their numbers are shown, folded away.
  entries: list[dict] = dataclasses.field(default_factory=list)


def page(
  content: dict,
  rows: Sequence[Row],
  heads: Sequence[str],
  sections: Sequence[Section],
  notes: Sequence[str],
) -> str:
  """The HTML of an evaluation with the `content` of results.json.

  rows, heads, notes: of the table of results, as in tables.py.
  """
  left, right = tables.columns(rows)
  lead = _LEAD_OF_RUN if 'before' in left else _LEAD
  baselines = ''.join(_BASELINES.get(name, '') for name in right)
  facts = {
    'checkpoint': content['checkpoint']['name'],
    'sha256': content['checkpoint']['sha256'][:12],
    **content['facts'],
  }
  parts = [f'<h1>{html.escape(content["title"])}</h1>\n<p>{lead}</p>\n<dl>']
  parts += [_fact(name, text) for name, text in facts.items() if text]
  parts.append(f'</dl>\n<section><h2>Results</h2>\n<p>{_RESULTS.format(baselines=baselines)}</p>')
  # A wide table scrolls by itself: the page must not.
  parts.append(f'<div class="scroll">{_table(rows, heads, left, right)}</div>')
  parts += [f'<p class="note">{html.escape(note)}</p>' for note in notes]
  parts.append('</section>')
  parts += map(_section, sections)
  parts.append(f'<footer>{_FOOTER}</footer>')
  return document(content['title'], '\n'.join(parts))


def document(title: str, body: str, style: str = '') -> str:
  """A page in the style of all pages, of HTML. style: CSS of its own."""
  return _PAGE.format(title=html.escape(title), style=_STYLE + style, body=body)


def _fact(name, text):
  return f'<div><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>'


def _table(rows, heads, left, right):
  titles = ['data set', 'task', 'metric', *left, *heads, *map(COLUMNS.get, right), 'published']
  lines = [_cells(map(html.escape, titles), 'th')]
  previous = None
  for row in rows:
    cells = ['', html.escape(row.task.replace('_', ' ')), _metric(row.kind, row.metric)]
    opening = '<tr>'
    if row.dataset != previous:
      # A line above it, and its name once.
      opening = '<tr class="first">'
      cells[0] = html.escape(row.dataset)
      previous = row.dataset
    values = [_value(row, i) for i in range(len(row.values))]
    published = ''.join(_published(figure, row.unit) for figure in row.published)
    line = opening + _cells(cells + tables.numbers(row, left)) + ''.join(values)
    lines.append(line + _cells([*tables.numbers(row, right), published or '-']))
  return '<table class="wide">\n<tr>' + '</tr>\n'.join(lines) + '</tr>\n</table>'


def _cells(texts, tag='td'):
  """Cells of a line, from HTML."""
  return ''.join(f'<{tag}>{text}</{tag}>' for text in texts)


def _metric(kind, name):
  described = table.metric(f'{kind}/{name}')
  text = html.escape(label(kind, name))
  return f'{text}<i>{UNITS[described.unit][2]} {ARROWS[described.better]}</i>'


def _value(row, i):
  classes = 'value'
  if i in row.best:
    classes += ' best'
  text = number(row.values[i], row.unit)
  if row.differences[i]:
    classes += ' other'
    # The reason appears under the pointer, and in the notes below the table.
    text += f' <abbr title="{html.escape(row.differences[i])}">{OTHER}</abbr>'
  return f'<td class="{classes}">{text}</td>'


def _published(figure, unit):
  source = html.escape(figure['source'])
  model = html.escape(credit(figure))
  return f'<div><small title="{source}">{model}</small> {number(figure["value"], unit)}</div>'


def _section(section):
  parts = [f'<section><h2>{html.escape(section.title)}</h2>']
  if section.pictures:
    parts.append(f'<p>{html.escape(section.caption)}</p>')
  for picture in section.pictures:
    parts.append('<figure>')
    if picture.label:
      parts.append(f'<h3>{html.escape(picture.label)}</h3>')
    if picture.note:
      parts.append(f'<p>{html.escape(picture.note)}</p>')
    # For readers that see no pictures; the numbers are in the tables.
    parts.append(image(picture.png, f'{section.title}: {picture.label}') + '</figure>')
  parts += map(_details, section.entries)
  return ''.join(parts) + '</section>'


def image(png: bytes, alt: str) -> str:
  """The HTML of a picture of the size in which it was drawn."""
  source = _data_uri(png)
  return f'<img src="{source}" style="width:{_width(png)}px" alt="{html.escape(alt)}">'


def _details(entry):
  """All numbers of an entry of results.json, folded away."""
  metrics = entry['metrics']
  # The metrics of an entry have the same columns, those of its evaluation.
  columns = [name for name in COLUMNS if any(name in metric for metric in metrics.values())]
  lines = [_cells(['', 'value', *map(COLUMNS.get, columns)], 'th')]
  for name, metric in metrics.items():
    unit = metric['unit']
    line = _cells([_metric(entry['kind'], name)])
    line += f'<td class="value">{number(metric["value"], unit)}</td>'
    lines.append(line + _cells(number(metric.get(column), unit) for column in columns))
  items = {
    'Time': [f'{part} {seconds:.1f} s' for part, seconds in entry['seconds'].items()],
    'Protocol': map('{} = {}'.format, entry['options'], entry['options'].values()),
    'Chosen': map('{} = {}'.format, entry['chosen'], entry['chosen'].values()),
    'Images': [f'{split["images"]:,} of {role}' for role, split in entry['data'].items()],
  }
  notes = ''
  for title, texts in items.items():
    text = ', '.join(texts)
    if text:
      notes += f'<p>{title}: {html.escape(text)}</p>'
  return (
    f'<details><summary>{html.escape(entry["dataset"])}, {html.escape(entry["task"])}: all numbers'
    '</summary><div class="scroll"><table><tr>'
    + '</tr><tr>'.join(lines)
    + f'</tr></table></div>{notes}</details>'
  )


def _data_uri(png):
  return data_uri(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED))


def data_uri(pixels: np.ndarray) -> str:
  """A picture inside the page, uint8 BGR or BGRA, as WebP: a fifth of the size of a PNG."""
  webp = cv2.imencode('.webp', pixels, (cv2.IMWRITE_WEBP_QUALITY, 86))[1]
  return 'data:image/webp;base64,' + base64.b64encode(webp).decode()


def _width(png):
  """In CSS pixels, such that the text of the picture is as large as that of the page."""
  # Bytes 16 to 19 of a PNG are its width.
  return round(struct.unpack('>I', png[16:20])[0] / 1.28)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body></html>
"""

_STYLE = """
:root {
  color-scheme: light dark; --ink: #1c2733; --soft: #64748b; --line: #e2e8f0; --paper: #ffffff;
  --desk: #f4f6f8; --number: #0f766e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #dbe4ee; --soft: #8b9bb0; --line: #263241; --paper: #141c26; --desk: #0c121a;
    --number: #2ec4b2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--desk); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", sans-serif;
}
main { max-width: 1200px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 34px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 0 0 4px; letter-spacing: -0.01em; }
h3 { font-size: 15px; font-weight: 600; margin: 0 0 10px; }
p { color: var(--soft); margin: 0 0 18px; max-width: 76ch; }
p.note { margin: 8px 0 0; }
a { color: var(--number); }
dl { display: flex; flex-wrap: wrap; gap: 14px 36px; margin: 20px 0 0; }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; font-weight: 600; }
section {
  background: var(--paper); border: 1px solid var(--line); border-radius: 14px;
  padding: 24px 28px; margin-top: 24px;
}
figure { margin: 0 0 26px; }
figure:last-child { margin: 0; }
figure p { font-size: 14px; margin-bottom: 10px; }
img { display: block; max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 9px 12px; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: 14px; }
td { border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
td i { color: var(--soft); font-style: normal; font-size: 13px; margin-left: 7px; }
td small { color: var(--soft); font-size: 12px; margin-right: 6px; }
td.value { color: var(--number); }
td.best { font-weight: 700; }
td.other { color: var(--soft); }
td abbr { text-decoration: none; color: #d1453b; }
table.wide td {
  border-bottom: 0; padding: 5px 9px; vertical-align: top; font-size: 14.5px;
}
table.wide th { padding: 5px 9px; white-space: normal; vertical-align: bottom; }
table.wide :is(td, th):is(:nth-child(2), :nth-child(3)) { text-align: left; white-space: normal; }
table.wide i { white-space: nowrap; }
table.wide tr.first td { border-top: 1px solid var(--line); padding-top: 11px; }
table.wide td:first-child { font-weight: 600; }
table.wide tr > :first-child { padding-left: 0; }
table.wide tr > :last-child { padding-right: 0; }
details { border-top: 1px solid var(--line); padding: 9px 0 0; margin-top: 9px; }
details table { width: auto; min-width: 50%; margin: 6px 0 10px; }
details p { font-size: 13px; margin: 0 0 6px; }
summary { color: var(--soft); font-size: 14px; cursor: pointer; }
footer { color: var(--soft); font-size: 14px; margin-top: 24px; }
@media (max-width: 640px) {
  main { padding: 24px 12px; }
  section { padding: 18px 14px; border-radius: 10px; }
}
"""

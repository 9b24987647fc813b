"""The page of an evaluation, and its words: one HTML file that needs nothing else, for light and dark screens."""

import base64
import html
import struct

import cv2
import numpy as np

from tips_jax.evals.datasets.protocols import UNITS
from tips_jax.evals.report import html as html_page

KINDS = {  # kind: (title, metrics of the table, what its picture shows and what is good)
  'segmentation': (
    'Linear segmentation',
    ('miou',),
    'Test images, their true classes, those that a linear probe reads off the patches, and in red the '
    'pixels it gets wrong: good masks follow the outlines, and red remains only along borders.',
  ),
  'depth': (
    'Linear depth',
    ('rmse',),
    'Depth from a linear probe beside the truth, on one logarithmic scale of colors, and the error: good '
    'depth has the layout and the objects in the right order, and an error row that stays dark.',
  ),
  'dpt_depth': (
    'Depth with a DPT decoder',
    ('rmse',),
    'Depth from a trained decoder beside the truth, on one logarithmic scale of colors, and the error: '
    'good depth has sharp outlines, and an error row that stays dark.',
  ),
  'dpt_normals': (
    'Surface normals with a DPT decoder',
    ('rmse', 'angular_rmse'),
    'The direction that each surface faces, as a color (the ball is the key), and the angle between '
    'prediction and truth: good normals have flat walls of one color and bend only where surfaces '
    'do.',
  ),
  'knn': (
    'k-NN classification',
    ('accuracy', 'top1'),
    'Test images and the class that their nearest training images vote for, green where it is right: good '
    'features err, if at all, toward a class that looks much the same.',
  ),
  'linear': (
    'Linear classification',
    ('accuracy', 'top1'),
    'Test images and the class that a linear probe gives them, green where it is right: good features err, '
    'if at all, toward a class that looks much the same.',
  ),
  'instance_retrieval': (
    'Instance retrieval',
    ('r1',),
    'A query image and the images nearest to it, those of the same instance framed: in a good sheet the '
    'frames stand at the left.',
  ),
  'retrieval': (
    'Retrieval between images and texts',
    ('i2t_r1', 't2i_r1'),
    'Evenly spaced test texts, not chosen ones, and the images nearest to each, the right one framed: in '
    'a good sheet the frame stands first, and the others fit the words in part.',
  ),
  'zeroshot': (
    'Zero-shot classification',
    ('accuracy', 'top1'),
    'Test images and the class whose texts lie nearest, without any training on this data, green where '
    'it is right: a good model errs, if at all, toward a related class.',
  ),
  'zeroshot_segmentation': (
    'Zero-shot segmentation',
    ('miou',),
    'Each patch takes the class whose texts lie nearest, drawn over the image beside the '
    'truth: good overlays cover whole objects and stop at their outlines.',
  ),
}
MORE = {  # sections of no kind, in front of the others
  'bars': (
    'Classification at a glance',
    'Accuracy and recall as bars, chance as a line, published numbers as diamonds: a good bar '
    'reaches far past its line, and toward the diamonds.',
  ),
  'features': (
    'What the patches know',
    'The first three principal components of all patch features of these images, as red, green and blue: '
    'good features give each object an even color with clear borders, and like things one color in all '
    'images.',
  ),
}
CONFUSION = (
  'The classes most often taken for one another, in percent of the true class: in a good matrix all that is '
  'strong stands on the diagonal.'
)
_METRICS = {
  'miou': 'mIoU',
  'rmse': 'RMSE',
  'angular_rmse': 'RMSE',
  'rmse_pooled': 'RMSE, pooled',
  'r1': 'R@1',
  'r1_own': 'R@1, own index',
  'accuracy': 'accuracy',
  'top1': 'top-1 accuracy',
  'top5': 'top-5 accuracy',
  'abs_rel': 'relative error',
  'delta1': 'within 25 %',
  'pixel_accuracy': 'pixel accuracy',
  'mean': 'mean angle',
  'median': 'median angle',
  **{
    f'{way}_r{k}': f'{label} R@{k}'
    for k in (1, 5, 10)
    for way, label in (('i2t', 'image to text'), ('t2i', 'text to image'))
  },
}
ARROWS = {'higher': '↑', 'lower': '↓'}
OTHER = '≠'  # a number that was measured otherwise than the first of its row
_RESULTS = (
  'An arrow tells whether more or less is better. Naive: an answer that looks at no image. Published: the '
  'released models nearest in size, marked by how far the number can be trusted: V read in a primary source, '
  'T second-hand, T2 in two second-hand sources that agree. It holds for the whole protocol and the full '
  'data set.'
)


def metric(name: str) -> str:
  """A metric as people call it; what stands before a slash (a CLS token) stays."""
  before, _, last = name.rpartition('/')
  return f'{_METRICS.get(last, last)}{before and f" ({before})"}'


def number(value, unit: str) -> str:
  """A number with the decimals of its unit; '-' for none."""
  return '-' if value is None else f'{value:.{UNITS[unit][1]}f}'


def credit(figure) -> str:
  """Whose number it is, and how far it can be trusted."""
  return f'{figure["model"].replace(" (released)", "")} [{figure["trust"]}]'


def page(contents, rows, heads, figures, notes) -> str:
  """The page. `contents`, `rows`: as in sheet.py; `heads`: of the columns of numbers; `figures`: section (of KINDS or
  MORE) -> [(label, PNG bytes, note)]; `notes`: what must be said below the table."""
  content = contents[0]
  checkpoint = content['checkpoint']
  about = {
    'checkpoint': checkpoint['name'],
    'sha256': checkpoint['sha256'][:12],
    **content['facts'],
  }
  entries = {kind: [e for e in content['results'] if e['kind'] == kind] for kind in KINDS}
  sections = '\n'.join(
    _section(key, figures.get(key, ()), entries.get(key, ()))
    for key in [*MORE, *KINDS]
    if figures.get(key) or entries.get(key)
  )
  below = ''.join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
  return html_page.page(
    content['title'],
    lead='A frozen encoder, judged on images that it did not learn from.',
    facts={k: v for k, v in about.items() if v},
    sections=sections,
    style=_STYLE,
    results=f'<p>{_RESULTS}</p>\n<div class="scroll">{_table(rows, heads)}</div>{below}',
    footer='Every number with its unit and options is in <a href="results.json">results.json</a>; the pictures are '
    'PNG files in <a href="pictures/">pictures</a>.',
  )


def _table(rows, heads):
  titles = ['data set', 'task', 'metric', *heads, 'chance', 'published']
  lines, before = [], None
  for row in rows:
    values = ''.join(
      f'<td class="ours{" best" * (i in row["best"])}{" other" * bool(other)}">{number(v, row["unit"])}'
      + (f' <abbr title="{html.escape(other)}">{OTHER}</abbr>' if other else '')
      + '</td>'
      for i, (v, other) in enumerate(zip(row['values'], row['other']))
    )
    published = (
      ''.join(
        f'<div><small title="{html.escape(f["source"])}">{html.escape(credit(f))}</small> '
        f'{number(f["value"], row["unit"])}</div>'
        for f in row['published']
      )
      or '-'
    )
    first = row['dataset'] != before
    before = row['dataset']
    lines.append(
      f'<tr{" class=first" * first}><td>{html.escape(row["dataset"]) * first}</td>'
      f'<td>{html.escape(row["task"].replace("_", " "))}</td>'
      f'<td>{html.escape(metric(row["metric"]))}<i>{UNITS[row["unit"]][2]} {ARROWS[row["better"]]}</i></td>'
      f'{values}<td>{number(row["chance"], row["unit"])}</td><td>{published}</td></tr>'
    )
  return (
    '<table class="wide"><tr>'
    + ''.join(f'<th>{html.escape(t)}</th>' for t in titles)
    + '</tr>\n'
    + '\n'.join(lines)
    + '</table>'
  )


def _section(key, figures, entries):
  title, *_, caption = (MORE | KINDS)[key]
  shown = ''.join(
    f'<figure>{f"<h3>{html.escape(label)}</h3>" if label else ""}{f"<p>{html.escape(note)}</p>" if note else ""}'
    f'<img src="{_inline(png)}" style="width:{_width(png)}px" alt="{html.escape(f"{title}: {label}")}"></figure>'
    for label, png, note in figures
  )
  caption = f'<p>{html.escape(caption)}</p>' if figures else ''
  return f'<section><h2>{html.escape(title)}</h2>{caption}{shown}{"".join(map(_details, entries))}</section>'


def _details(entry):
  """All numbers of an outcome, folded away."""
  rows = ''.join(
    f'<tr><td>{html.escape(metric(name))}<i>{UNITS[m["unit"]][2]} {ARROWS[m["better"]]}</i></td>'
    f'<td class="ours">{number(m["value"], m["unit"])}</td><td>{number(m["chance"], m["unit"])}</td></tr>'
    for name, m in entry['metrics'].items()
  )
  notes = (
    ', '.join(f'{k} {v:.1f} s' for k, v in entry['seconds'].items()),
    ', '.join(f'{k} = {v}' for k, v in entry['options'].items()),
    ', '.join(f'{k} = {v}' for k, v in entry['chosen'].items()),
    ', '.join(f'{one["images"]:,} of {role}' for role, one in entry['data'].items()),
  )
  notes = ''.join(
    f'<p>{label}: {html.escape(note)}</p>'
    for label, note in zip(('Time', 'Protocol', 'Found', 'Images'), notes)
    if note
  )
  return (
    f'<details><summary>{html.escape(entry["dataset"])}: all numbers</summary><div class="scroll"><table>'
    f'<tr><th></th><th>ours</th><th>chance</th></tr>{rows}</table></div>{notes}</details>'
  )


def _inline(png):
  """The picture as a data URI: WebP, a fifth of the PNG's size."""
  pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
  webp = cv2.imencode('.webp', pixels, (cv2.IMWRITE_WEBP_QUALITY, 86))[1]
  return 'data:image/webp;base64,' + base64.b64encode(webp).decode()


def _width(png):
  """In CSS pixels, at which its text is as large as the page's."""
  return round(struct.unpack('>I', png[16:20])[0] / 1.28)


_STYLE = """
:root { color-scheme: light dark; --number: #0f766e; }
section { padding: 24px 28px; }
main { max-width: 1200px; }
img { max-width: 100%; }
figure { margin: 0 0 26px; } figure:last-child { margin: 0; } figure p { font-size: 14px; margin-bottom: 10px; }
h3 { font-size: 15px; font-weight: 600; margin: 0 0 10px; }
td { color: var(--ink); } td.ours { color: var(--number); } td.best { font-weight: 700; }
td.other { color: var(--soft); } td abbr { text-decoration: none; color: #d1453b; } p.note { margin: 8px 0 0; }
td i { color: var(--soft); font-style: normal; font-size: 13px; margin-left: 7px; }
td small { color: var(--soft); font-size: 12px; margin-right: 6px; }
table.wide td:nth-child(2), table.wide th:nth-child(2), table.wide td:nth-child(3), table.wide th:nth-child(3)
{ text-align: left; white-space: normal; }
table.wide td { border-bottom: 0; padding: 5px 9px; vertical-align: top; font-size: 14.5px; }
table.wide th { padding: 5px 9px; white-space: normal; vertical-align: bottom; }
table.wide i { white-space: nowrap; }
table.wide tr.first td { border-top: 1px solid var(--line); padding-top: 11px; }
table.wide td:first-child { font-weight: 600; } table.wide tr > :first-child { padding-left: 0; }
table.wide tr > :last-child { padding-right: 0; }
th { border-bottom: 0; }
details { border-top: 1px solid var(--line); padding: 9px 0 0; margin-top: 9px; }
details table { width: auto; min-width: 50%; margin: 6px 0 10px; } details p { font-size: 13px; margin: 0 0 6px; }
summary { color: var(--soft); font-size: 14px; cursor: pointer; }
a { color: var(--number); }
@media (max-width: 640px) { main { padding: 24px 12px; } section { padding: 18px 14px; border-radius: 10px; } }
@media (prefers-color-scheme: dark) {
:root { --ink: #dbe4ee; --soft: #8b9bb0; --line: #263241; --paper: #141c26; --desk: #0c121a; --number: #2ec4b2; }
}
"""

"""The end of a run: `report.json`, pictures, one HTML page that shows them, and a table for the terminal."""
import html
import json
import math
import os
import pathlib

from tips_jax.core.config import Evals, InputError

COLUMNS = ('before', 'after', 'chance', 'baseline')
_HEADS = {'before': 'before', 'after': 'after', 'chance': 'chance', 'baseline': 'pixels'}
_LABELS = {'knn/accuracy': 'k-NN classification, accuracy', 'segmentation/miou': 'linear segmentation, mIoU',
           **{f'retrieval/{way}_r{k}': f'{text} retrieval, R@{k}' for k in (1, 5, 10)
              for way, text in (('t2i', 'text to image'), ('i2t', 'image to text'))}}
_CAPTIONS = {
    'bars.png': ('What training changed', 'Bars: the model before and after training. Marks: chance, and the same '
                 'evaluators on raw pixels.'),
    'features.png': ('What the patches know', 'Test images, the first three principal components of their patch '
                     'features as colours, and, where masks exist, a linear probe beside the truth (white: void).'),
    'retrieval.png': ('Finding an image by its text', 'Evenly spaced test texts, not chosen ones, and the images '
                      'nearest to each. The right image is framed; its rank stands at the right.'),
    'losses.png': ('How it got there', 'Each term of the loss by step: as logged (pale) and smoothed.'),
    'progress.png': ('Evaluated on the way', 'The same tasks, measured while training ran.'),
}


def write(workdir, *, before, after, chance, baseline, encoder, store, config: Evals, tokenizer=None,
          text_length: int = 64, probe=None, title: str = 'tips_jax', facts=None, metrics_path=None, terms=None) -> str:
  """Writes report.json, report/*.png and index.html into `workdir`; returns the table for the terminal.

  `before` ... `baseline`: metric name -> number, any of them possibly empty. `encoder`, `store`, `tokenizer`,
  `text_length`, `config`: as in run.evaluate; `probe`: its keep['probe'], draws the predicted masks. `facts`: lines
  (name -> text) about the run for the page. `metrics_path`: the metrics.jsonl whose `terms` (default: 'loss' and names
  that start with 'loss/' or 'terms/') are drawn. Raises InputError where the folder cannot be written.
  """
  from tips_jax.evals import pictures  # matplotlib is slow to import
  workdir = pathlib.Path(workdir)
  values = dict(zip(COLUMNS, (before, after, chance, baseline)))
  try:
    (workdir / 'report').mkdir(parents=True, exist_ok=True)
    write_whole(workdir / 'report.json', json.dumps({c: _finite(values[c]) for c in COLUMNS}, indent=1) + '\n')
    drawn = pictures.draw(
        workdir / 'report', values=values, labels=_LABELS, encoder=encoder, store=store, config=config,
        tokenizer=tokenizer, text_length=text_length, probe=probe, metrics_path=metrics_path, terms=terms)
    write_whole(workdir / 'index.html', page(title, values, drawn, facts or {}))
  except OSError as error:
    raise InputError(f'workdir: cannot write the report to {str(workdir)!r} ({error.strerror})') from None
  return table(**values)


def table(*, before, after, chance, baseline) -> str:
  """The metrics as plain text, in percent, one a line."""
  values = dict(zip(COLUMNS, (before, after, chance, baseline)))
  names = _names(values)
  width = max(map(len, names), default=0)
  lines = [' ' * width + ''.join(f'{_HEADS[c]:>10}' for c in COLUMNS)]
  lines += [f'{name:{width}}' + ''.join(f'{_percent(values[c].get(name)):>10}' for c in COLUMNS) for name in names]
  return '\n'.join(lines)


def page(title, values, pictures, facts) -> str:
  """The HTML of the report; `pictures` are file names inside `report/`."""
  rows = '\n'.join(
      f'<tr><td>{html.escape(_LABELS.get(name, name))}<code>{html.escape(name)}</code></td>'
      + ''.join(f'<td class="{c}">{_percent(values[c].get(name))}</td>' for c in COLUMNS) + '</tr>'
      for name in _names(values))
  figures = '\n'.join(
      f'<section><h2>{_CAPTIONS[name][0]}</h2><p>{_CAPTIONS[name][1]}</p>'
      f'<img src="report/{name}" alt="{_CAPTIONS[name][0]}"></section>' for name in pictures)
  about = ''.join(f'<div><dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd></div>' for k, v in facts.items())
  return _PAGE.format(title=html.escape(title), rows=rows, figures=figures, facts=about, style=STYLE)


def _names(values):
  return list(dict.fromkeys(name for c in ('after', 'before', 'chance', 'baseline') for name in values[c]))


def _percent(value):
  return '-' if value is None or not math.isfinite(value) else f'{100 * value:.1f} %'


def _finite(values):
  return {k: float(v) if math.isfinite(v) else None for k, v in values.items()}


def write_whole(path, text):
  temporary = path.with_suffix('.tmp')
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)


STYLE = '''
:root { --ink: #1c2733; --soft: #64748b; --line: #e2e8f0; --accent: #0f766e; --paper: #ffffff; --desk: #f4f6f8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--desk); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 34px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 0 0 4px; letter-spacing: -0.01em; }
p { color: var(--soft); margin: 0 0 18px; max-width: 76ch; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 14px; padding: 26px 28px; }
section { margin-top: 24px; }
img { display: block; width: 100%; height: auto; }
dl { display: flex; flex-wrap: wrap; gap: 14px 36px; margin: 20px 0 0; }
dt { color: var(--soft); font-size: 13px; } dd { margin: 0; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 9px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: 14px; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
td code { color: var(--soft); font-size: 12px; margin-left: 10px; }
td.after { color: var(--accent); font-weight: 700; } td.chance, td.baseline, td.before { color: #475569; }
footer { color: var(--soft); font-size: 14px; margin-top: 24px; }
'''

_PAGE = '''<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
<h1>{title}</h1>
<p>What the model knew before and after training, on images that it never saw.</p>
<dl>{facts}</dl>
<section><h2>Results</h2>
<p>Chance: a random ranking (exact), or the commonest class everywhere. Pixels: the same evaluators on raw pixels; for
retrieval, a ridge regression from small images and colour histograms to bags of words, fitted on the training split.
</p>
<div class="scroll"><table>
<tr><th></th><th>before</th><th>after</th><th>chance</th><th>pixels</th></tr>
{rows}
</table></div></section>
{figures}
<footer>All features are frozen. The numbers are in <a href="report.json">report.json</a>, the curves in
<a href="metrics.jsonl">metrics.jsonl</a>.</footer>
</main></body></html>
'''

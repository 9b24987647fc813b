"""The end of a run: `report.json`, pictures, one HTML page that shows them, and a table for the
terminal.
"""

import html
import json
import math
import pathlib

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Evals
from tips_jax.evals.datasets import protocols
from tips_jax.evals.report import html as html_page

COLUMNS = ('before', 'after', 'chance', 'baseline')
_HEADS = {'before': 'before', 'after': 'after', 'chance': 'chance', 'baseline': 'pixels'}
_LABELS = {
  'knn/accuracy': 'k-NN classification, accuracy',
  'segmentation/miou': 'linear segmentation, mIoU',
  **{
    f'retrieval/{way}_r{k}': f'{text} retrieval, R@{k}'
    for k in (1, 5, 10)
    for way, text in (('t2i', 'text to image'), ('i2t', 'image to text'))
  },
  'depth/rmse': 'linear depth, RMSE',
  'dpt_depth/rmse': 'DPT depth, RMSE',
  'dpt_normals/angular_rmse': 'DPT normals, RMSE',
  'linear/accuracy': 'linear classification, accuracy',
  'instance_retrieval/r1': 'instance retrieval, R@1',
  'zeroshot/accuracy': 'zero-shot classification, accuracy',
  'zeroshot_segmentation/miou': 'zero-shot segmentation, mIoU',
}
_RESULTS = (
  'Chance: a random ranking (exact), the commonest class everywhere, or the mean depth or normal. Pixels: '
  'the same evaluators on raw pixels; for retrieval, a ridge regression from small images and color '
  'histograms to bags of words, fitted on the training split.'
)
_CAPTIONS = {
  'bars.png': (
    'What training changed',
    'Bars: the model before and after training. Marks: chance, and the same '
    'evaluators on raw pixels.',
  ),
  'features.png': (
    'What the patches know',
    'Test images, the first three principal components of their patch '
    'features as colors, and, where masks exist, a linear probe beside the truth (white: void).',
  ),
  'retrieval.png': (
    'Finding an image by its text',
    'Evenly spaced test texts, not chosen ones, and the images '
    'nearest to each. The right image is framed; its rank stands at the right.',
  ),
  'losses.png': (
    'How it got there',
    'Each term of the loss by step: as logged (pale) and smoothed.',
  ),
  'progress.png': ('Evaluated on the way', 'The same tasks, measured while training ran.'),
}


def write(
  workdir,
  *,
  before,
  after,
  chance,
  baseline,
  encoder,
  store,
  config: Evals,
  tokenizer=None,
  text_length: int = 64,
  probe=None,
  title: str = 'tips_jax',
  facts=None,
  metrics_path=None,
  losses=None,
) -> str:
  """Writes report.json, report/*.png and index.html into `workdir`; returns the table for the
  terminal.

  `before` ... `baseline`: metric name -> number, any of them possibly empty. `encoder`, `store`,
  `tokenizer`,
  `text_length`, `config`: as in run.evaluate; `probe`: its keep['probe'], draws the predicted
  masks. `facts`: lines (name -> text) about the run for the page. `metrics_path`: the metrics.jsonl
  whose `losses` (default: 'loss' and names that start with 'loss/' or 'losses/') are drawn. Raises
  InputError where the folder cannot be written.
  """
  from tips_jax.evals.report import training_plotting as pictures  # matplotlib is slow to import

  workdir = pathlib.Path(workdir)
  values = dict(zip(COLUMNS, map(_numbers, (before, after, chance, baseline))))
  try:
    (workdir / 'report').mkdir(parents=True, exist_ok=True)
    content = {c: _finite(values[c]) for c in COLUMNS}
    html_page.write_whole(workdir / 'report.json', json.dumps(content, indent=1) + '\n')
    drawn = pictures.draw(
      workdir / 'report',
      values=values,
      labels=_LABELS,
      encoder=encoder,
      store=store,
      config=config,
      tokenizer=tokenizer,
      text_length=text_length,
      probe=probe,
      metrics_path=metrics_path,
      losses=losses,
    )
    html_page.write_whole(workdir / 'index.html', page(title, values, drawn, facts or {}))
  except OSError as error:
    raise InputError(
      f'workdir: cannot write the report to {str(workdir)!r} ({error.strerror})'
    ) from None
  return table(**values)


def table(*, before, after, chance, baseline) -> str:
  """The metrics as plain text, one a line, in the unit that papers print."""
  values = dict(zip(COLUMNS, (before, after, chance, baseline)))
  names = _names(values)
  width = max(map(len, names), default=0)
  lines = [' ' * width + ''.join(f'{_HEADS[c]:>10}' for c in COLUMNS)]
  lines += [
    f'{name:{width}}' + ''.join(f'{_shown(name, values[c]):>10}' for c in COLUMNS) for name in names
  ]
  return '\n'.join(lines)


def page(title, values, pictures, facts) -> str:
  """The HTML of the report; `pictures` are file names inside `report/`."""
  rows = '\n'.join(
    f'<tr><td>{html.escape(_LABELS.get(name, name))}<code>{html.escape(name)}</code></td>'
    + ''.join(f'<td class="{c}">{_shown(name, values[c])}</td>' for c in COLUMNS)
    + '</tr>'
    for name in _names(values)
  )
  figures = '\n'.join(
    f'<section><h2>{_CAPTIONS[name][0]}</h2><p>{_CAPTIONS[name][1]}</p>'
    f'<img src="report/{name}" alt="{_CAPTIONS[name][0]}"></section>'
    for name in pictures
  )
  results = (
    f'<p>{_RESULTS}</p>\n<div class="scroll"><table>\n<tr><th></th>'
    + ''.join(f'<th>{_HEADS[c]}</th>' for c in COLUMNS)
    + f'</tr>\n{rows}\n</table></div>'
  )
  return html_page.page(
    title,
    lead='What the model knew before and after training, on images that it never saw.',
    facts=facts,
    results=results,
    sections=figures,
    footer='All features are frozen. The numbers are in <a href="report.json">report.json</a>, the curves in '
    '<a href="metrics.jsonl">metrics.jsonl</a>.',
  )


def _names(values):
  return list(
    dict.fromkeys(name for c in ('after', 'before', 'chance', 'baseline') for name in values[c])
  )


def _shown(name, values):
  value, (factor, decimals, sign) = (
    values.get(name, math.nan),
    protocols.UNITS[protocols.unit(name)[0]],
  )
  return f'{factor * value:.{decimals}f} {sign}' if math.isfinite(value) else '-'


def _numbers(values):
  """With nan for null, which metrics.jsonl has in its place."""
  return {k: math.nan if v is None else v for k, v in values.items()}


def _finite(values):
  return {k: float(v) if math.isfinite(v) else None for k, v in values.items()}

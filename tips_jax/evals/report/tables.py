"""The table of results: one evaluation, or several side by side.

A number of several evaluations counts against the first of its row only where both were measured
alike: with the same options (the protocol's constants and the size), on the same images (their
count and fingerprint). Any other number is marked, with the reason, and is never the best.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from tips_jax.evals.datasets.protocols import UNITS
from tips_jax.evals.tasks import table as tasks

# Columns beside the measured numbers: key in results.json -> head.
COLUMNS = {'before': 'before', 'chance': 'chance', 'pixel_baseline': 'pixels'}
ARROWS = {'higher': '↑', 'lower': '↓'}
OTHER = '≠'  # of a number that was measured otherwise than the first of its row
_SIZE = re.compile(
  r'so400m|(?<![a-z])[sblg](?=[-_/ ]?1[46])|(?<=vit)[-_ ]?[sblg]|small|base|large|giant'
)
_ORDER = 'sbl4g'  # sizes of models; 4: So400m


@dataclasses.dataclass(eq=False)
class Row:
  """One metric of one task on one data set, with the numbers of every evaluation in the table."""

  dataset: str
  task: str
  kind: str
  metric: str
  unit: str
  better: str
  # Of each evaluation; None where it does not have the metric.
  values: list[float | None]
  # Why the number of an evaluation cannot be compared with the first of the row; '': it can.
  differences: list[str]
  # Of the first evaluation that has one, by the names in COLUMNS.
  columns: dict[str, float | None]
  published: list[dict]

  @property
  def best(self) -> set[int]:
    """The evaluations with the best of the numbers that may be compared."""
    comparable = {}
    for i, value in enumerate(self.values):
      if value is not None and not self.differences[i]:
        comparable[i] = value
    best = (max if self.better == 'higher' else min)(comparable.values(), default=None)
    return {i for i, value in comparable.items() if value == best}


def rows(contents: Sequence[dict]) -> list[Row]:
  """One row for each data set, task and main metric that any of the evaluations has."""
  by_key, first_entries = {}, {}
  for i, content in enumerate(contents):
    for entry in content['results']:
      for name in main_metrics(entry['kind'], entry['metrics']):
        metric = entry['metrics'][name]
        key = entry['dataset'], entry['task'], name
        if key not in by_key:
          first_entries[key] = entry
          by_key[key] = Row(
            dataset=entry['dataset'],
            task=entry['task'],
            kind=entry['kind'],
            metric=name,
            unit=metric['unit'],
            better=metric['better'],
            values=[None] * len(contents),
            differences=[''] * len(contents),
            columns=dict.fromkeys(COLUMNS),
            published=[],
          )
        row = by_key[key]
        row.values[i] = metric['value']
        row.differences[i] = _differences(entry, first_entries[key])
        for column, value in row.columns.items():
          if value is None:
            row.columns[column] = metric.get(column)
        if not row.published:
          figures = [figure for figure in entry['published'] if figure['metric'] == name]
          row.published = nearest(figures, contents[0]['checkpoint']['name'])
  order = {dataset: i for i, dataset in enumerate(dict.fromkeys(key[0] for key in by_key))}
  return sorted(by_key.values(), key=lambda row: order[row.dataset])


def main_metrics(kind: str, metrics: Iterable[str]) -> list[str]:
  """The metrics of a task that its table shows; the first one where none of them is there."""
  names = [name for name in metrics if '/' not in name and tasks.metric(f'{kind}/{name}').shown]
  return names or list(metrics)[:1]


def label(kind: str, name: str) -> str:
  """A metric of a task as papers print it; the CLS token before the slash is put behind it."""
  token, _, _ = name.rpartition('/')
  return tasks.metric(f'{kind}/{name}').label + (f' ({token})' if token else '')


def columns(rows: Sequence[Row]) -> list[str]:
  """The columns of the table beside the measured numbers: chance, and those that have numbers."""
  return [
    name
    for name in COLUMNS
    if name == 'chance' or any(row.columns[name] is not None for row in rows)
  ]


def heads(contents: Sequence[dict]) -> list[str]:
  """The heading of the numbers of each evaluation; equal names with the hash behind them."""
  if len(contents) == 1:
    measured = [metric for entry in contents[0]['results'] for metric in entry['metrics'].values()]
    return ['after' if any(metric.get('before') is not None for metric in measured) else 'ours']
  names = [content['checkpoint']['name'] for content in contents]
  heads = []
  for i, content in enumerate(contents):
    head = names[i]
    if names.count(head) > 1:
      head += f' {content["checkpoint"]["sha256"][:6] or i + 1}'
    heads.append(head)
  return heads


def notes(contents: Sequence[dict], rows: Sequence[Row]) -> list[str]:
  """Lines that say which numbers must not be compared, and why."""
  names = heads(contents)
  notes = []
  for row in rows:
    for name, difference in zip(names, row.differences):
      if difference:
        notes.append(f'{OTHER} {row.dataset}, {row.task.replace("_", " ")}, {name}: {difference}')
  if notes:
    notes.insert(
      0,
      f'{OTHER} measured otherwise than the first number of its row, so not to be compared with '
      'it:',
    )
  return list(dict.fromkeys(notes))


def table(contents: Sequence[dict]) -> str:
  """The table as text; of several evaluations the best number of a row has a star."""
  body = rows(contents)
  extra = columns(body)
  before = [name for name in extra if name == 'before']
  after = [name for name in extra if name != 'before']
  titles = [COLUMNS[name] for name in before] + heads(contents) + [COLUMNS[name] for name in after]
  lines = [['data set', 'task', 'metric', '', *titles, 'published', '']]
  previous = None
  for row in body:
    line = [
      row.dataset if row.dataset != previous else '',
      row.task,
      label(row.kind, row.metric),
      f'{UNITS[row.unit][2]} {ARROWS[row.better]}',
    ]
    previous = row.dataset
    line += [number(row.columns[name], row.unit) for name in before]
    for i, value in enumerate(row.values):
      line.append(number(value, row.unit) + (_mark(row, i) if len(contents) > 1 else ''))
    line += [number(row.columns[name], row.unit) for name in after]
    figures = [[number(figure['value'], row.unit), credit(figure)] for figure in row.published]
    lines.append(line + (figures[0] if figures else ['-', '']))
    for figure in figures[1:]:
      lines.append([''] * len(line) + figure)
  return '\n'.join(_aligned(lines) + notes(contents, body))


def _mark(row, i):
  if row.differences[i]:
    return OTHER
  return '*' if i in row.best else ' '


def _aligned(lines):
  """Lines of equal columns: words to the left, numbers to the right."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  words = {0, 1, 2, len(widths) - 1}
  aligned = []
  for line in lines:
    cells = [
      f'{cell:<{width}}' if i in words else f'{cell:>{width}}'
      for i, (cell, width) in enumerate(zip(line, widths))
    ]
    aligned.append('  '.join(cells).rstrip())
  return aligned


def number(value: float | None, unit: str) -> str:
  """A number with the decimals of its unit; '-' for none."""
  return '-' if value is None else f'{value:.{UNITS[unit][1]}f}'


def credit(figure: dict) -> str:
  """The model of a published figure, and how far the number can be trusted."""
  return f'{figure["model"].replace(" (released)", "")} [{figure["trust"]}]'


def nearest(figures: Sequence[dict], name: str) -> list[dict]:
  """Of published figures that of TIPS and that of TIPSv2 whose model is nearest in size to the
  checkpoint `name`.

  A name without a size counts as a small model; of a name with the generation in it, only that
  generation is given.
  """
  generation, size, resolution = _model(name)
  best = {}
  for figure in figures:
    other, other_size, other_resolution = _model(figure['model'])
    distance = (
      abs(other_size - size),
      '(released)' not in figure['model'] and other == 'tips',
      other_resolution != resolution,
    )
    if other not in best or distance < best[other][0]:
      best[other] = distance, figure
  chosen = [generation] if generation in best else sorted(best)
  return [best[key][1] for key in chosen]


def _model(name):
  """(generation or '', place of the size in _ORDER, resolution), read off the name of a model."""
  lower = name.lower()
  # The name of this package says nothing of the model.
  generation = re.search(r'tips(?![-_ ]?jax)[-_ ]?(v2)?', lower)
  size = _SIZE.search(lower)
  letter = size.group().replace('so400m', '4').strip('-_ ')[0] if size else 's'
  return (
    re.sub(r'[-_ ]', '', generation.group()) if generation else '',
    _ORDER.index(letter),
    'lr' if re.search(r'\blr\b|low', lower) else 'hr',
  )


def _differences(entry, first):
  """How an entry was measured otherwise than the `first` of its row; '' if the two compare."""
  if entry is first:
    return ''
  differences = []
  options, expected = entry['options'], first['options']
  for name in dict.fromkeys([*expected, *options]):
    if options.get(name) != expected.get(name):
      differences.append(f'{name} {_short(options.get(name))}, not {_short(expected.get(name))}')
  for role in dict.fromkeys([*first['data'], *entry['data']]):
    split, expected = entry['data'].get(role, {}), first['data'].get(role, {})
    images, expected_images = split.get('images', 0), expected.get('images', 0)
    if images != expected_images:
      differences.append(f'{images:,} images of {role}, not {expected_images:,}')
    elif split != expected:
      differences.append(f'other images of {role}')
  return '; '.join(differences)


def _short(option):
  return 'none' if option is None else f'{option!r:.48}'

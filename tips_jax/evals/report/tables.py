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
COLUMNS = {
  'before': 'before',
  'chance': 'chance',
  'position': 'by position',
  'pixel_baseline': 'pixels',
  'pixels_position': 'pixels and position',
  'oracle': 'oracle',
}
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
    choose = {'higher': max, 'lower': min}[self.better]
    best = choose(comparable.values(), default=None)
    # Equal numbers are all the best.
    return {i for i, value in comparable.items() if value == best}


def rows(contents: Sequence[dict]) -> list[Row]:
  """One row for each data set, task and main metric that any of the evaluations has."""
  by_key = {}
  first_entries = {}
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
  # A data set is in one place, even if a later evaluation adds a task of it.
  order = list(dict.fromkeys(row.dataset for row in by_key.values()))
  return sorted(by_key.values(), key=lambda row: order.index(row.dataset))


def main_metrics(kind: str, metrics: Iterable[str]) -> list[str]:
  """The metrics of a task that its table shows; the first one where none of them is there."""
  names = [name for name in metrics if '/' not in name and tasks.metric(f'{kind}/{name}').shown]
  return names or list(metrics)[:1]


def label(kind: str, name: str) -> str:
  """A metric of a task as papers print it; the CLS token before the slash is put behind it."""
  token, _, _ = name.rpartition('/')
  text = tasks.metric(f'{kind}/{name}').label
  if token:
    text += f' ({token})'
  return text


def columns(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
  """The columns left and right of the measured numbers: chance, and those that have numbers."""
  filled = {'chance'}
  for row in rows:
    filled |= {name for name, value in row.columns.items() if value is not None}
  left = [name for name in COLUMNS if name in filled and name == 'before']
  right = [name for name in COLUMNS if name in filled and name != 'before']
  return left, right


def numbers(row: Row, names: Iterable[str]) -> list[str]:
  """The numbers of a row in columns beside the measured ones."""
  return [number(row.columns[name], row.unit) for name in names]


def heads(contents: Sequence[dict]) -> list[str]:
  """The heading of the numbers of each evaluation; equal names with the hash behind them."""
  if len(contents) == 1:
    for entry in contents[0]['results']:
      for metric in entry['metrics'].values():
        if metric.get('before') is not None:
          return ['after']
    return ['ours']
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
  # The metrics of a task differ for the same reason.
  return list(dict.fromkeys(notes))


def table(contents: Sequence[dict]) -> str:
  """The table as text; of several evaluations the best number of a row has a star."""
  body = rows(contents)
  left, right = columns(body)
  titles = [*map(COLUMNS.get, left), *heads(contents), *map(COLUMNS.get, right)]
  lines = [['data set', 'task', 'metric', '', *titles, 'published', '']]
  previous = None
  for row in body:
    line = ['', row.task, label(row.kind, row.metric), f'{UNITS[row.unit][2]} {ARROWS[row.better]}']
    if row.dataset != previous:
      line[0] = previous = row.dataset
    line += numbers(row, left)
    for i, value in enumerate(row.values):
      cell = number(value, row.unit)
      if len(contents) > 1:
        cell += _mark(row, i)
      line.append(cell)
    line += numbers(row, right)
    published = [[number(figure['value'], row.unit), credit(figure)] for figure in row.published]
    published = published or [['-', '']]
    lines.append(line + published[0])
    # Further figures have lines of their own, below the first.
    for figure in published[1:]:
      lines.append([''] * len(line) + figure)
  return '\n'.join(_aligned(lines) + notes(contents, body))


def _mark(row, i):
  if row.differences[i]:
    return OTHER
  if i in row.best:
    return '*'
  return ' '  # so that digits of a column stay below each other


def _aligned(lines):
  """Lines of equal columns: words to the left, numbers to the right."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  words = {0, 1, 2, len(widths) - 1}
  aligned = []
  for line in lines:
    cells = list(map(str.rjust, line, widths))
    for i in words:
      cells[i] = line[i].ljust(widths[i])
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
  if generation in best:
    return [best[generation][1]]
  return [best[other][1] for other in sorted(best)]


def _model(name):
  """(generation or '', place of the size in _ORDER, resolution), read off the name of a model."""
  lower = name.lower()
  # The name of this package says nothing of the model.
  match = re.search(r'tips(?![-_ ]?jax)[-_ ]?(v2)?', lower)
  generation = re.sub(r'[-_ ]', '', match.group()) if match else ''
  size = _SIZE.search(lower)
  letter = size.group().replace('so400m', '4').strip('-_ ')[0] if size else 's'
  resolution = 'lr' if re.search(r'\blr\b|low', lower) else 'hr'
  return generation, _ORDER.index(letter), resolution


def _differences(entry, first):
  """How an entry was measured otherwise than the `first` of its row; '' if the two compare."""
  if entry is first:
    return ''
  differences = []
  options = entry['options']
  expected = first['options']
  for name in dict.fromkeys([*expected, *options]):
    if options.get(name) != expected.get(name):
      differences.append(f'{name} {_short(options.get(name))}, not {_short(expected.get(name))}')
  for role in dict.fromkeys([*first['data'], *entry['data']]):
    split = entry['data'].get(role, {})
    expected = first['data'].get(role, {})
    images = split.get('images', 0)
    expected_images = expected.get('images', 0)
    if images != expected_images:
      differences.append(f'{images:,} images of {role}, not {expected_images:,}')
    elif split != expected:  # the fingerprint, of as many images
      differences.append(f'other images of {role}')
  return '; '.join(differences)


def _short(option):
  return 'none' if option is None else f'{option!r:.48}'

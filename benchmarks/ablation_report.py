"""The table, the figure and the JSON of benchmarks/ablation.py, from the records of its runs."""

import collections
import io
import json
import math
import pathlib
import statistics
from collections.abc import Sequence

from matplotlib import ticker
from PIL import Image

from benchmarks import ablation_protocol as protocol
from tips_jax.core import files
from tips_jax.evals.report import style

# What shows why a term helps or does not: mean of the last lines of metrics.jsonl.
SIGNS = (
  'distill/teacher_entropy',
  'distill/agreement',
  'distill/prototype_use',
  'masked/teacher_entropy',
  'masked/agreement',
  'masked/prototype_use',
  'spread/rank',
  'gradient_norm',
)
_LAST = 5  # lines
RANDOM = 'random weights'
_PANELS = 4  # side by side


def signs(lines: Sequence[dict]) -> dict[str, float]:
  """What the end of a run says of its terms, and the median of its speed."""
  result = {}
  for name in SIGNS:
    values = [line[name] for line in lines if line.get(name) is not None]
    if values:
      result[name] = statistics.fmean(values[-_LAST:])
  speeds = [line['images_per_s'] for line in lines if 'images_per_s' in line]
  if speeds:
    result['images_per_s'] = statistics.median(speeds)
  return result


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
  """The mean and its standard error over seeds; nan as the error of one."""
  if len(values) < 2:
    return values[0], math.nan
  return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def write(path: pathlib.Path, records: Sequence[dict], *, data: str, planned: int) -> None:
  """Writes PATH.json, PATH.md and PATH.webp.

  records: of the finished runs, in the order of the rows. planned: number of all runs.
  """
  files.write(path.with_suffix('.json'), json.dumps(records, indent=1) + '\n')
  files.write(path.with_suffix('.md'), page(records, data=data, planned=planned, name=path.name))
  image = Image.open(io.BytesIO(style.png(lambda: figure(records, data))))
  picture = io.BytesIO()
  image.save(picture, 'WEBP', quality=80)
  files.write(path.with_suffix('.webp'), picture.getvalue())


def page(records: Sequence[dict], *, data: str, planned: int, name: str) -> str:
  """The page in Markdown: means, orderings, signs."""
  commits = sorted({record['commit'] for record in records})
  flags = sorted({' '.join(record['flags']) for record in records} - {''})
  parts = [
    f'# Ablation on {data}',
    f'{len(records)} of {planned} runs; mean and standard error over seeds. Protocol: '
    f'`benchmarks/ablation_protocol.py`. Commit: {", ".join(commits)}. '
    + ''.join(f'Flags: `{text}`. ' for text in flags),
    f'![]({name}.webp)',
    _means(records, data),
    'The orderings of the papers (TIPS, Table 1; TIPSv2, Tables 3, 4 and 9); the difference is '
    'paired by seed, and shown where it is beyond two standard errors:',
    _orderings(records, data),
    'The end of the runs:',
    _signs(records),
  ]
  return '\n\n'.join(filter(None, parts)) + '\n'


def _groups(records):
  """(row, budget) -> its records."""
  groups = collections.defaultdict(list)
  for record in records:
    groups[record['row'], record['budget']].append(record)
  return groups


def _table(head, rows):
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _number(values, digits):
  mean, error = mean_and_error(values)
  if math.isnan(error):
    return f'{mean:.{digits}f}'
  return f'{mean:.{digits}f} ± {error:.{digits}f}'


def _means(records, data):
  columns = protocol.COLUMNS[data]
  titles = [column.title for column in columns]
  rows = []
  for record in records:
    if record['random']:
      numbers = [_number([record['random'][c.title]], c.digits) for c in columns]
      rows.append([RANDOM, '0', '', *numbers])
      break
  for (row, _), group in _groups(records).items():
    numbers = [_number([r['measures'][c.title] for r in group], c.digits) for c in columns]
    rows.append([row, f'{group[0]["images"]:,}', str(len(group)), *numbers])
  return _table(['row', 'images', 'seeds', *titles], rows)


def differences(records: Sequence[dict], worse: str, better: str, title: str) -> dict[str, list]:
  """Budget -> differences better - worse of a column, of each seed that has both rows."""
  values = {}
  for record in records:
    values[record['row'], record['budget'], record['seed']] = record['measures'][title]
  result = collections.defaultdict(list)
  for (row, budget, seed), value in values.items():
    if row == better and (worse, budget, seed) in values:
      result[budget].append(value - values[worse, budget, seed])
  return result


def verdict(values: Sequence[float], lower_is_better: bool) -> str:
  """Whether a difference has the sign that is expected, beyond two standard errors."""
  mean, error = mean_and_error(values)
  if math.isnan(error):
    return 'one seed'
  if abs(mean) <= 2 * error:
    return 'not shown'
  return 'shown' if (mean < 0) == lower_is_better else 'the opposite'


def _orderings(records, data):
  columns = {column.title: column for column in protocol.COLUMNS[data]}
  rows = []
  for worse, better, title in protocol.ORDERINGS:
    if title not in columns:
      continue
    for budget, values in differences(records, worse, better, title).items():
      said = verdict(values, columns[title].better == 'lower')
      rows.append(
        [f'{better} over {worse}', title, budget, _number(values, columns[title].digits), said]
      )
  return _table(['ordering', 'measure', 'runs', 'difference', ''], rows) if rows else ''


def _signs(records):
  names = [*SIGNS, 'images_per_s']
  rows = []
  for (row, budget), group in _groups(records).items():
    numbers = []
    for name in names:
      values = [record['signs'][name] for record in group if name in record['signs']]
      numbers.append(f'{statistics.fmean(values):.3g}' if values else '')
    rows.append([row, budget, *numbers])
  return _table(['row', 'runs', *names], rows)


def figure(records: Sequence[dict], data: str):
  """One panel a column: rows with seeds and means, or, of several budgets, curves over images."""
  columns = protocol.COLUMNS[data]
  groups = _groups(records)
  rows = list(dict.fromkeys(row for row, _ in groups))
  curves = len({budget for _, budget in groups}) > 1
  lines = math.ceil(len(columns) / _PANELS)
  drawn = style.new_figure(2.6 * _PANELS, lines * (2.6 if curves else 0.8 + 0.22 * len(rows)))
  for number, column in enumerate(columns):
    axes = drawn.add_subplot(lines, _PANELS, number + 1)
    axes.set_title(column.title, fontsize=9)
    if curves:
      _curves(axes, groups, rows, column.title)
    else:
      _points(axes, groups, rows, column.title)
      axes.set_yticks(range(len(rows)), rows if number % _PANELS == 0 else [''] * len(rows))
      axes.invert_yaxis()
  if curves:
    axes.legend(fontsize=8, frameon=False)
  drawn.tight_layout()
  return drawn


def _points(axes, groups, rows, title):
  for place, row in enumerate(rows):
    [group] = [group for (name, _), group in groups.items() if name == row]
    values = [record['measures'][title] for record in group]
    mean, error = mean_and_error(values)
    axes.plot(values, [place] * len(values), '.', color=style.FAINT)
    spread = None if math.isnan(error) else 2 * error
    axes.errorbar(mean, place, xerr=spread, fmt='o', color=style.RIGHT, markersize=4)


def _curves(axes, groups, rows, title):
  for row in rows:
    points = []
    for (name, _), group in groups.items():
      if name == row:
        values = [record['measures'][title] for record in group]
        points.append((group[0]['images'], *mean_and_error(values)))
    images, means, errors = zip(*sorted(points))
    errors = [0 if math.isnan(error) else 2 * error for error in errors]
    axes.errorbar(images, means, yerr=errors, fmt='o-', markersize=3, label=row)
  seen = sorted({group[0]['images'] for group in groups.values()})
  axes.set_xscale('log')
  axes.set_xticks(seen)
  axes.xaxis.set_major_formatter(ticker.EngFormatter(places=0, sep=''))
  axes.minorticks_off()
  axes.set_xlabel('images seen')

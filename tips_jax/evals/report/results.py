"""What an evaluation writes: `results.json`, a page with pictures, and a table for the terminal.

`evaluate` and the end of a training run both write through `write`. All numbers of results.json
are in the unit that papers print: percent, meters, degrees.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tips_jax.core import files, log
from tips_jax.core.errors import InputError
from tips_jax.evals.datasets import protocols
from tips_jax.evals.report import page, tables
from tips_jax.evals.tasks import table
from tips_jax.evals.tasks.spec import Result

SCHEMA = 2
FILE = 'results.json'
PAGE = 'index.html'
PICTURES = 'pictures'
REPORT = 'report.json'


def write(
  output: str | os.PathLike,
  results: Sequence[Result],
  *,
  title: str,
  facts: Mapping[str, Any] | None = None,
  checkpoint: str = '',
  sha256: str = '',
  others: Sequence = (),
  before: Mapping[str, float] | None = None,
  pixel_baseline: Mapping[str, float] | None = None,
  metrics_path: str | os.PathLike | None = None,
  losses: Sequence[str] = (),
) -> str:
  """Writes results.json, pictures/*.png and index.html into `output`; returns the table.

  facts: lines (name -> text) of the page. checkpoint: name of what was evaluated (default: the
  title), by which the nearest published models are found. others: further columns of the table,
  each a results.json, its folder, or its content.
  before, pixel_baseline: {f'{result.prefix}/{metric}': number}, in the units of `result.metrics`.
  With `before`, report.json holds the same columns as maps.
  metrics_path: the metrics.jsonl of a training run, from which the curves of `losses` and of the
  metrics are drawn.
  Raises InputError where the folder cannot be written, or an evaluation of `others` not read.
  """
  output = pathlib.Path(output)
  measured = content(
    results,
    checkpoint=checkpoint or title,
    sha256=sha256,
    title=title,
    facts=facts,
    before=before,
    pixel_baseline=pixel_baseline,
  )
  # The first of the table, to which the others are compared.
  contents = [measured]
  for other in others:
    contents.append(other if isinstance(other, dict) else read(other))
  rows = tables.rows(contents)
  from tips_jax.evals.report import figures  # matplotlib is slow to import

  lines = log.read(pathlib.Path(metrics_path)) if metrics_path else []
  sections = figures.sections(results, measured['results'], rows, lines, losses)
  with files.writing(f'output: cannot write the results to {str(output)!r}'):
    (output / PICTURES).mkdir(parents=True, exist_ok=True)
    # First, so that the numbers are there even if a picture cannot be written.
    _write_json(output / FILE, measured)
    if before is not None:
      _write_json(output / REPORT, _report(results, before, pixel_baseline or {}))
    _write_pictures(output / PICTURES, sections)
    text = page.page(measured, rows, tables.heads(contents), sections, tables.notes(contents, rows))
    files.write(output / PAGE, text)
  return tables.table(contents)


def compare(paths: Sequence) -> str:
  """The table of several results.json (or folders that hold one), side by side."""
  return tables.table(list(map(read, paths)))


def read(path: str | os.PathLike) -> dict:
  """The content of a results.json, or of the folder that holds it; InputError where it is none."""
  path = pathlib.Path(path)
  if path.is_dir():
    path /= FILE
  try:
    parsed = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise InputError(f'results: cannot read {str(path)!r} ({error.strerror})') from None
  except ValueError:
    raise InputError(
      f'results: got {str(path)!r}, which is not JSON; expected a {FILE} of an evaluation'
    ) from None
  schema = parsed.get('schema') if isinstance(parsed, dict) else None
  # Numbers of another schema may have other units or protocols.
  if schema != SCHEMA:
    raise InputError(
      f'results: got schema {schema!r} in {str(path)!r}; expected {SCHEMA}, a {FILE} of an '
      'evaluation'
    )
  return parsed


def content(
  results: Sequence[Result],
  *,
  checkpoint: str,
  sha256: str = '',
  title: str = '',
  facts: Mapping[str, Any] | None = None,
  before: Mapping[str, float] | None = None,
  pixel_baseline: Mapping[str, float] | None = None,
) -> dict:
  """What results.json holds; null is a number that is not finite."""
  columns = {}
  if before is not None:
    columns['before'] = before
  if pixel_baseline is not None:
    columns['pixel_baseline'] = pixel_baseline
  return {
    'schema': SCHEMA,
    'title': title,
    'checkpoint': {'name': checkpoint, 'sha256': sha256},
    'facts': {str(name): str(text) for name, text in (facts or {}).items()},
    'results': _with_averages([_entry(result, columns) for result in results]),
  }


def _entry(result, columns):
  metrics = {}
  for name, value in result.metrics.items():
    described = table.metric(f'{result.spec.name}/{name}')
    unit = described.unit
    metric = {
      'value': _printed(value, unit),
      'unit': unit,
      'better': described.better,
      'chance': _printed(result.chance.get(name), unit),
    }
    for column, values in columns.items():
      metric[column] = _printed(values.get(f'{result.prefix}/{name}'), unit)
    for column, values in result.baselines.items():
      metric[column] = _printed(values.get(name), unit)
    metrics[name] = metric
  return {
    'dataset': result.dataset,
    'task': result.task,
    'kind': result.spec.name,
    'metrics': metrics,
    'published': _published(result),
    'seconds': {name: round(float(value), 3) for name, value in result.seconds.items()},
    # What decides whether numbers may be compared (tables.py).
    'options': _plain(result.options),
    'chosen': _plain(result.chosen),
    'data': _plain(result.data),
  }


def _published(result):
  published = []
  for name, figures in result.published.items():
    unit = table.metric(f'{result.spec.name}/{name}').unit
    for figure in figures:
      # The reader of results.json has no table of units.
      published.append({'metric': name, 'unit': unit} | dataclasses.asdict(figure))
  return published


def _with_averages(entries):
  """The entries, and after the data sets of a group (UnED) their average.

  Published figures of a group hold for its average, so they move there, and only where all of its
  data sets were measured.
  """
  sizes = collections.Counter(protocol.group for protocol in protocols.PROTOCOLS.values())
  groups = collections.defaultdict(list)
  for entry in entries:
    protocol = protocols.PROTOCOLS.get(entry['dataset'])
    if protocol and protocol.group:
      groups[protocol.group, entry['task']].append(entry)
  averaged = list(entries)
  for (group, _), members in groups.items():
    published = members[0]['published'] if len(members) == sizes[group] else []
    for member in members:
      member['published'] = []
    if len(members) == 1:
      continue
    data = {}
    for member in members:
      # Each data set has roles of the same names.
      for role, split in member['data'].items():
        data[f'{member["dataset"]} {role}'] = split
    average = {
      'dataset': f'{group}, mean of {len(members)}',
      'metrics': {name: _mean_metric(name, members) for name in members[0]['metrics']},
      'published': published,
      # Of time and choices there is no mean.
      'seconds': {},
      'chosen': {},
      'data': data,
    }
    averaged.insert(averaged.index(members[-1]) + 1, members[0] | average)
  return averaged


def _mean_metric(name, members):
  """A metric of the members with the mean of every column; null where one of them has no number."""
  mean = dict(members[0]['metrics'][name])
  for column in ('value', *tables.COLUMNS):
    if column in mean:
      values = [member['metrics'].get(name, {}).get(column) for member in members]
      mean[column] = None if None in values else math.fsum(values) / len(values)
  return mean


def _printed(value, unit):
  """A number in the unit that papers print; None where there is none."""
  if value is None:
    return None
  return _finite(float(value) * tables.UNITS[unit][0])


def _finite(value):
  """None for what is not finite (JSON has no NaN) or null in a metrics.jsonl."""
  if value is None or not math.isfinite(value):
    return None
  return float(value)


def _plain(x):
  """Options as JSON: arrays become lists, and what JSON does not know becomes its text."""
  if isinstance(x, dict):
    return {str(name): _plain(value) for name, value in x.items()}
  if isinstance(x, (list, tuple, np.ndarray)):
    return list(map(_plain, x))
  if isinstance(x, np.generic):
    x = x.item()
  if x is None or isinstance(x, (bool, int, str)) or isinstance(x, float) and math.isfinite(x):
    return x
  return str(x)


def _report(results, before, pixel_baseline):
  """report.json: {column: {f'{result.prefix}/{metric}': number}}, in the units of the results."""
  after = {}
  chance = {}
  for result in results:
    for name, value in result.metrics.items():
      after[f'{result.prefix}/{name}'] = value
    for name, value in result.chance.items():
      chance[f'{result.prefix}/{name}'] = value
  report = {'before': before, 'after': after, 'chance': chance, 'pixel_baseline': pixel_baseline}
  for column, values in report.items():
    report[column] = {name: _finite(value) for name, value in values.items()}
  return report


def _write_pictures(folder, sections):
  """Writes the pictures of all sections, and deletes those of an earlier evaluation."""
  names = set()
  for section in sections:
    for picture in section.pictures:
      # Labels have spaces and commas, and come from the names of data sets.
      name = re.sub(r'[^\w.]+', '-', f'{picture.label} {section.name}').strip('-.') + '.png'
      files.write(folder / name, picture.png)
      names.add(name)
  # Else a picture of an earlier evaluation would be taken for one of this.
  for path in folder.glob('*.png'):
    if path.name not in names:
      path.unlink()


def _write_json(path, values):
  files.write(path, json.dumps(values, indent=1, allow_nan=False) + '\n')

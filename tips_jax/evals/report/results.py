"""What an evaluation leaves behind: `results.json`, a table for the terminal, and one page with
pictures.

An outcome (evals/suite.py) has `dataset`, `task`, `metrics` and `chance` (name -> number: shares in
[0, 1], meters, degrees), `published` (metric -> published.Figures), `seconds`, `examples`, and
perhaps `spec`, `options`, `classes` and `confusion`, `data` and `chosen`. All numbers are written
as papers print them: percent, meters, degrees.

Of several evaluations side by side a number counts against the first of its row only where both
were measured alike: with the same options (the protocol's constants and the size) on the same
images, by count and fingerprint. Any other number is marked, said why, and is never the best.
"""

import collections
import json
import math
import os
import pathlib
import re

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.evals.datasets import protocols
from tips_jax.evals.report import html as html_page
from tips_jax.evals.report import page as sheet_page
from tips_jax.evals.report.page import ARROWS, KINDS, OTHER, UNITS

SCHEMA = 2
FILE, PAGE, PICTURES = 'results.json', 'index.html', 'pictures'
_BARS = ('knn', 'linear', 'zeroshot', 'instance_retrieval')
_SIZE = re.compile(
  r'so400m|(?<![a-z])[sblg](?=[-_/ ]?1[46])|(?<=vit)[-_ ]?[sblg]|small|base|large|giant'
)
_ORDER = 'sbl4g'  # sizes of models; 4: So400m


def write(
  output, outcomes, *, title: str, facts=None, checkpoint: str = '', sha256: str = '', others=()
) -> str:
  """Writes results.json, pictures/*.png and index.html into `output`; returns the table for the
  terminal.

  `facts`: lines (name -> text) for the page. `checkpoint`, `sha256`: name (default: the title) and
  hash of what was evaluated; by its name the nearest published models are found. `others`: of other
  checkpoints that stand beside it in both tables, results.json or what `results` gives. InputError
  where the folder cannot be written, or another not read.
  """
  output, outcomes = pathlib.Path(output), list(outcomes)
  content = results(
    outcomes, checkpoint=checkpoint or title, sha256=sha256, title=title, facts=facts
  )
  contents = [content, *(other if isinstance(other, dict) else read(other) for other in others)]
  try:
    (output / PICTURES).mkdir(parents=True, exist_ok=True)
    html_page.write_whole(output / FILE, json.dumps(content, indent=1, allow_nan=False) + '\n')
    rows, figures = (
      _rows(contents),
      collections.defaultdict(list),
    )  # section -> (label, PNG bytes, note)
    for section, label, png, note in _drawn(outcomes, rows):
      name = re.sub(r'[^\w.]+', '-', f'{label} {section}').strip('-.')
      temporary = output / PICTURES / f'{name}.tmp'
      temporary.write_bytes(png)
      os.replace(temporary, output / PICTURES / f'{name}.png')
      figures[section].append((label, png, note))
    html_page.write_whole(
      output / PAGE,
      sheet_page.page(contents, rows, _heads(contents), figures, _notes(contents, rows)),
    )
  except OSError as error:
    raise InputError(
      f'output: cannot write the results to {str(output)!r} ({error.strerror})'
    ) from None
  return table(contents)


def compare(paths) -> str:
  """The table of several results.json (or folders that hold one), side by side."""
  return table([read(path) for path in paths])


def read(path) -> dict:
  """The content of a results.json, or of the folder that holds it; InputError where it is none."""
  path = pathlib.Path(path)
  path = path / FILE if path.is_dir() else path
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise InputError(f'results: cannot read {str(path)!r} ({error.strerror})') from None
  except ValueError:
    raise InputError(
      f'results: got {str(path)!r}, which is not JSON; expected a {FILE} of an evaluation'
    ) from None
  found = content.get('schema') if isinstance(content, dict) else None
  if found != SCHEMA:
    raise InputError(
      f'results: got schema {found!r} in {str(path)!r}; expected {SCHEMA}, a {FILE} of an evaluation'
    )
  return content


# --- results.json ---------------------------------------------------------------------------------


def results(outcomes, *, checkpoint: str, sha256: str = '', title: str = '', facts=None) -> dict:
  """What results.json holds: every number in the unit that papers print, with that unit; null: not
  a number.
  """
  entries = [_entry(outcome) for outcome in outcomes]
  return {
    'schema': SCHEMA,
    'title': title,
    'checkpoint': {'name': checkpoint, 'sha256': sha256},
    'facts': {str(k): str(v) for k, v in (facts or {}).items()},
    'results': _averaged(entries),
  }


def kind_of(task: str) -> str:
  """'zeroshot_segmentation_voc21' -> 'zeroshot_segmentation'; InputError for a task that there is
  not.
  """
  for kind in sorted(KINDS, key=len, reverse=True):
    if task == kind or task.startswith(kind + '_'):
      return kind
  raise InputError(f'task: got {task!r}; expected one of {", ".join(KINDS)}')


def _entry(outcome):
  kind, metrics = _kind(outcome), {}
  for name, value in outcome.metrics.items():
    unit, better = _unit(kind, name)
    metrics[name] = {
      'value': _number(value, unit),
      'unit': unit,
      'better': better,
      'chance': _number(outcome.chance.get(name, math.nan), unit),
    }
  figures = [
    {
      'metric': metric,
      'model': f.model,
      'value': f.value,
      'unit': _unit(kind, metric)[0],
      'trust': f.trust,
      'source': f.source,
    }
    for metric, found in dict(outcome.published).items()
    for f in found
  ]
  return {
    'dataset': outcome.dataset,
    'task': outcome.task,
    'kind': kind,
    'metrics': metrics,
    'published': figures,
    'seconds': {k: round(float(v), 3) for k, v in dict(outcome.seconds).items()},
    **{name: _plain(getattr(outcome, name, None) or {}) for name in ('options', 'chosen', 'data')},
  }


def _kind(outcome):
  return outcome.spec.name if getattr(outcome, 'spec', None) else kind_of(outcome.task)


def _averaged(entries):
  """The entries, and after data sets of which only the average is published that average, with the
  figures.
  """
  groups, found = collections.defaultdict(list), list(entries)
  for entry in entries:
    protocol = protocols.PROTOCOLS.get(entry['dataset'])
    if protocol and protocol.group:
      groups[protocol.group, entry['task']].append(entry)
  for (group, _), members in groups.items():
    whole = len(members) == sum(p.group == group for p in protocols.PROTOCOLS.values())
    published = members[0]['published'] if whole else []
    for member in members:
      member['published'] = []
    if len(members) > 1:
      metrics = {
        name: first
        | {
          key: _mean([m['metrics'].get(name, {}).get(key) for m in members])
          for key in ('value', 'chance')
        }
        for name, first in members[0]['metrics'].items()
      }
      found.insert(
        found.index(members[-1]) + 1,
        members[0]
        | {
          'dataset': f'{group}, mean of {len(members)}',
          'metrics': metrics,
          'seconds': {},
          'chosen': {},
          'published': published,
          'data': {
            f'{m["dataset"]} {role}': one for m in members for role, one in m['data'].items()
          },
        },
      )
  return found


def _mean(values):
  return None if None in values else math.fsum(values) / len(values)


def _unit(kind, metric):
  """(unit, what is better) of a metric."""
  return protocols.unit(f'{kind}/{metric}')


def _number(value, unit):
  value = float(value) * UNITS[unit][0]
  return value if math.isfinite(value) else None


def _plain(x):
  """Options as JSON: arrays become lists, what JSON does not know its text."""
  if isinstance(x, dict):
    return {str(k): _plain(v) for k, v in x.items()}
  if isinstance(x, (list, tuple, np.ndarray)):
    return [_plain(v) for v in x]
  x = x.item() if isinstance(x, np.generic) else x
  return (
    x
    if x is None or isinstance(x, (bool, int, str)) or isinstance(x, float) and math.isfinite(x)
    else str(x)
  )


# --- tables ---------------------------------------------------------------------------------------


def nearest(figures, name: str) -> list[dict]:
  """Of published figures that of TIPS and that of TIPSv2 whose model is nearest in size to the
  checkpoint `name`.

  A name that tells no size is taken for a small one; where it tells the generation, that alone
  counts.
  """
  generation, size, detail = _model(name)
  best = {}
  for figure in figures:
    own, own_size, own_detail = _model(figure['model'])
    far = (
      abs(own_size - size),
      '(released)' not in figure['model'] and own == 'tips',
      own_detail != detail,
    )
    if own not in best or far < best[own][0]:
      best[own] = far, figure
  chosen = [generation] if generation in best else sorted(best)
  return [best[own][1] for own in chosen]


def _model(name):
  """(generation or '', size, resolution) that the name of a model tells."""
  low = name.lower()
  generation, size = re.search(r'tips(?![-_ ]?jax)[-_ ]?(v2)?', low), _SIZE.search(low)
  letter = size.group().replace('so400m', '4').strip('-_ ')[0] if size else 's'
  return (
    re.sub(r'[-_ ]', '', generation.group()) if generation else '',
    _ORDER.index(letter),
    'lr' if re.search(r'\blr\b|low', low) else 'hr',
  )


def table(contents) -> str:
  """The metrics of one results.json or of several side by side, right-aligned; of several, the best
  has a star.
  """
  rows, several = _rows(contents), len(contents) > 1
  lines = [['data set', 'task', 'metric', '', *_heads(contents), 'chance', 'published', '']]
  before = None
  for row in rows:
    unit = row['unit']
    mark = lambda i, row=row: OTHER if row['other'][i] else '*' if i in row['best'] else ' '
    values = [sheet_page.number(v, unit) + mark(i) * several for i, v in enumerate(row['values'])]
    lines.append(
      [
        row['dataset'] if row['dataset'] != before else '',
        row['task'],
        sheet_page.metric(row['metric']),
        f'{UNITS[unit][2]} {ARROWS[row["better"]]}',
        *values,
        sheet_page.number(row['chance'], unit),
      ]
    )
    before = row['dataset']
    figures = [
      [sheet_page.number(f['value'], unit), sheet_page.credit(f)] for f in row['published']
    ] or [['-', '']]
    lines[-1] += figures[0]
    lines += [[''] * (len(lines[0]) - 2) + figure for figure in figures[1:]]
  widths = [max(map(len, column)) for column in zip(*lines)]
  left = {0, 1, 2, len(widths) - 1}
  shown = [
    '  '.join(
      f'{cell:<{w}}' if i in left else f'{cell:>{w}}'
      for i, (cell, w) in enumerate(zip(line, widths))
    ).rstrip()
    for line in lines
  ]
  return '\n'.join(shown + _notes(contents, rows))


def _rows(contents):
  """One row for each data set, task and metric of the table that any of the contents has.

  `other`: of each number, how it was measured otherwise than the first of the row; '' where both
  may be compared.
  """
  found, first = {}, {}
  for number, content in enumerate(contents):
    for entry in content['results']:
      names = [n for n in entry['metrics'] if n in KINDS[entry['kind']][1]] or list(
        entry['metrics']
      )[:1]
      for name in names:
        metric, key = entry['metrics'][name], (entry['dataset'], entry['task'], name)
        row = found.setdefault(
          key,
          {
            'dataset': entry['dataset'],
            'task': entry['task'],
            'kind': entry['kind'],
            'metric': name,
            'unit': metric['unit'],
            'better': metric['better'],
            'values': [None] * len(contents),
            'chance': None,
            'published': [],
            'other': [''] * len(contents),
          },
        )
        row['values'][number] = metric['value']
        row['other'][number] = _otherwise(entry, first.setdefault(key, entry))
        row['chance'] = metric['chance'] if row['chance'] is None else row['chance']
        row['published'] = row['published'] or nearest(
          [f for f in entry['published'] if f['metric'] == name], contents[0]['checkpoint']['name']
        )
  for row in found.values():
    alike = {i: v for i, v in enumerate(row['values']) if v is not None and not row['other'][i]}
    top = (max if row['better'] == 'higher' else min)(alike.values(), default=None)
    row['best'] = {i for i, v in alike.items() if v == top}
  order = {dataset: i for i, dataset in enumerate(dict.fromkeys(key[0] for key in found))}
  return sorted(found.values(), key=lambda row: order[row['dataset']])


def _otherwise(entry, first) -> str:
  """In what an entry was measured otherwise than the `first` of its row; '' where the two may be
  compared.
  """
  if entry is first:
    return ''
  if 'data' not in entry or 'data' not in first:
    return 'an older evaluation, which does not say on what data'
  short = lambda x: f'{x!r:.48}' if x is not None else 'none'
  own, wanted = entry['options'], first['options']
  found = [
    f'{name} {short(own.get(name))}, not {short(wanted.get(name))}'
    for name in dict.fromkeys([*wanted, *own])
    if own.get(name) != wanted.get(name)
  ]
  own, wanted = entry['data'], first['data']
  for role in dict.fromkeys([*wanted, *own]):
    ours, theirs = own.get(role, {}), wanted.get(role, {})
    if ours.get('images') != theirs.get('images'):
      found.append(f'{ours.get("images", 0):,} images of {role}, not {theirs.get("images", 0):,}')
    elif ours != theirs:
      found.append(f'other images of {role}')
  return '; '.join(found)


def _notes(contents, rows):
  """Lines that say which numbers must not be compared, and why."""
  heads = _heads(contents)
  found = [
    f'{OTHER} {row["dataset"]}, {row["task"].replace("_", " ")}, {heads[i]}: {other}'
    for row in rows
    for i, other in enumerate(row['other'])
    if other
  ]
  return (
    [
      f'{OTHER} measured otherwise than the first number of its row, so not to be compared with it:',
      *dict.fromkeys(found),
    ]
    if found
    else []
  )


def _heads(contents):
  """What stands over the numbers of each: the name, told apart by the hash where two are equal."""
  if len(contents) == 1:
    return ['ours']
  names = [content['checkpoint']['name'] for content in contents]
  return [
    name if names.count(name) == 1 else f'{name} {content["checkpoint"]["sha256"][:6] or i + 1}'
    for i, (name, content) in enumerate(zip(names, contents))
  ]


def _drawn(outcomes, rows):
  """Yields (section, label, PNG bytes, note) of what there is material for."""
  from tips_jax.evals.report import charts as sheet_charts  # matplotlib is slow to import
  from tips_jax.evals.report import figures as sheet_pictures

  lines = [
    (
      f'{row["dataset"]}, {KINDS[row["kind"]][0]}',
      row['values'][0],
      row['chance'],
      [(f['model'].replace(' (released)', ''), f['value']) for f in row['published']],
    )
    for row in rows
    if row['kind'] in _BARS and row['values'][0] is not None
  ]
  if lines:
    yield 'bars', '', sheet_charts.bars(lines), ''
  seen = set()
  for outcome in outcomes:
    png = None if outcome.dataset in seen else sheet_pictures.patch_features(outcome)
    if png:
      seen.add(outcome.dataset)
      yield 'features', outcome.dataset, png, ''
  for outcome in outcomes:
    kind = _kind(outcome)
    variant = outcome.task.removeprefix(kind).strip('_') if outcome.task.startswith(kind) else ''
    label = ' '.join(filter(None, (outcome.dataset, variant)))
    for png, name, note in (
      (sheet_pictures.examples(outcome, kind), label, ''),
      (sheet_charts.confusion(outcome), f'{label}: confusion', sheet_page.CONFUSION),
    ):
      if png:
        yield kind, name, png, note

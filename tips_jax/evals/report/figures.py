"""Which pictures a page shows: goes over results, and calls plotting and charts."""

from collections.abc import Mapping, Sequence

from tips_jax.evals.report import charts, plotting, tables
from tips_jax.evals.report.page import Picture, Section
from tips_jax.evals.report.tables import Row
from tips_jax.evals.tasks import table
from tips_jax.evals.tasks.spec import Result

# Sections of a run, and those of all tasks together: name -> (title, caption).
_FRONT = {
  'losses': (
    'Losses',
    'Each loss by step, unweighted, as logged (pale) and smoothed. The last, `loss`, is their '
    'weighted sum: it climbs where weights ramp in.',
  ),
  'progress': ('Progress', 'The metrics, measured while training ran.'),
  'bars': (
    'Classification and retrieval at a glance',
    'Accuracy and recall as bars, chance (and raw pixels) as lines, published numbers as '
    'diamonds: a good bar reaches far past its lines, and toward the diamonds.',
  ),
  'features': (
    'What the patches know',
    'The first three principal components of all patch features of these images, as red, green '
    'and blue: good features give each object an even color with clear borders, and like things '
    'one color in all images.',
  ),
}
_CONFUSION = (
  'The classes most often taken for one another, in percent of the true class: in a good matrix '
  'all that is strong is on the diagonal.'
)


def sections(
  results: Sequence[Result],
  entries: Sequence[dict],
  rows: Sequence[Row],
  lines: Sequence[Mapping] = (),
  losses: Sequence[str] = (),
) -> list[Section]:
  """The sections of a page, in order; those without pictures and numbers are left out.

  entries: the results as in results.json; rows: those of the table; lines: of metrics.jsonl, whose
  `losses` are drawn.
  """
  by_name = {name: Section(name, *words) for name, words in _FRONT.items()}
  for spec in table.TASKS.values():
    by_name[spec.name] = Section(spec.name, spec.title, spec.caption)
  for entry in entries:
    by_name[entry['kind']].entries.append(entry)

  def add(name, label, png, note=''):
    if png is not None:  # else there is nothing to draw: no examples, or too few points
      by_name[name].pictures.append(Picture(label, png, note))

  add('losses', '', charts.losses(lines, losses))
  add('progress', '', charts.progress(lines, _logged(results)))
  charted = []
  labels = []
  for row in rows:
    spec = table.spec(row.kind)
    # Only accuracies share an axis; a row without a number has no bar.
    if spec.charted and row.values[0] is not None:
      charted.append(row)
      labels.append(f'{row.dataset}, {spec.title}')
  add('bars', '', charts.bars(charted, labels))
  datasets = set()
  for result in results:
    # The tasks of a data set have the same images: one picture of them is enough.
    if result.dataset not in datasets:
      png = plotting.patch_features(result)
      add('features', result.dataset, png)
      if png is not None:
        datasets.add(result.dataset)
  for result in results:
    label = result.dataset
    if result.task.startswith(f'{result.spec.name}_'):  # a variant: zeroshot_segmentation_voc20
      label += ' ' + result.task.removeprefix(f'{result.spec.name}_')
    add(result.spec.name, label, result.spec.draw(result))
    add(result.spec.name, f'{label}: confusion', charts.confusion(result), _CONFUSION)
  return [section for section in by_name.values() if section.pictures or section.entries]


def _logged(results):
  """{name in metrics.jsonl: (label, unit)} of the main metrics."""
  metrics = {}
  for result in results:
    for name in tables.main_metrics(result.spec.name, result.metrics):
      unit = table.metric(f'{result.spec.name}/{name}').unit
      label = tables.label(result.spec.name, name)
      title = f'{result.dataset} {result.task.replace("_", " ")}, {label}'
      metrics[f'eval/{result.prefix}/{name}'] = title, unit
  return metrics

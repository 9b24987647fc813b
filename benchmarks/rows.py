"""Rows of a small config side by side: trains each with several seeds, measures them frozen, and
prints means, standard errors, and the differences from the first row.

  python -m benchmarks.rows --config=configs/regions.py --rows clip all --folder=runs/regions \
    --task=region_classification,region_retrieval,tagging,retrieval --size=64
  python -m benchmarks.rows --config=configs/lightclip_ablation.py --folder=runs/lightclip \
    --rows clip softened aligned masked all --task=zeroshot,retrieval --size=128

A row is an argument of the config; the first run draws the scenes for all. Runs are
FOLDER/ROW-SEED: the same command goes on where it was stopped, and takes what is finished; with
other flags, but for --rows and --seeds, it wants another folder. Flags after `--` go to every run.
"""

import argparse
import collections
import json
import pathlib
import signal
import sys

from benchmarks import ablation
from benchmarks.ablation_report import mean_and_error
from tips_jax.core import errors
from tips_jax.evals.tasks.table import TASKS

MEASURED = 'measured'  # folder in that of a run


def run(
  programs: ablation.Programs, args: argparse.Namespace, row: str, seed: int
) -> dict[str, float]:
  """Trains and measures one run, or what is missing of it: {'task metric': value} of the metrics
  that tables show.
  """
  folder = args.folder / f'{row}-{seed}'
  output = folder / MEASURED
  said = args.folder / f'{row}-{seed}.log'
  if not (output / 'results.json').exists():
    flags = [f'--config={args.config}:{row}', f'--workdir={folder}', f'--config.seed={seed}']
    if args.store != folder / 'scenes':
      flags.append(f'--config.data.store={args.store}')
    programs.run(args.core, 'main', [*flags, *args.flags], said)
    flags = [
      f'--checkpoint={folder}',
      f'--store={args.store}',
      f'--task={args.task}',
      f'--size={args.size}',
      f'--output={output}',
      '--recipe=short',
      '--norandom',
    ]
    programs.run(args.core, 'evaluate', flags, said)
  return shown(json.loads((output / 'results.json').read_text()))


def shown(results: dict) -> dict[str, float]:
  """The numbers of a results.json that its own table shows."""
  numbers = {}
  for entry in results['results']:
    known = {metric.name for metric in TASKS[entry['task']].metrics if metric.shown}
    for name, metric in entry['metrics'].items():
      if name in known:
        numbers[f'{entry["task"]} {name}'] = metric['value']
  return numbers


def table(found: dict[tuple[str, int], dict[str, float]]) -> str:
  """Markdown of {(row, seed): numbers}: a line for each row, and one for its differences from the
  first, paired by seed.
  """
  rows = collections.defaultdict(dict)
  for (row, seed), numbers in found.items():
    rows[row][seed] = numbers
  first = next(iter(rows))
  columns = list(next(iter(found.values())))
  lines = [['row', 'seeds', *columns], ['---'] * (2 + len(columns))]
  for row, seeds in rows.items():
    cells = []
    for column in columns:
      cells.append(_said([numbers[column] for numbers in seeds.values()]))
    lines.append([f'`{row}`', str(len(seeds)), *cells])
    both = sorted(seeds.keys() & rows[first].keys())
    if row == first or not both:
      continue
    cells = []
    for column in columns:
      cells.append(_said([seeds[s][column] - rows[first][s][column] for s in both], '+'))
    lines.append([f'`{row}` - `{first}`', str(len(both)), *cells])
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _said(values, sign=''):
  mean, error = mean_and_error(values)
  if len(values) < 2:
    return f'{mean:{sign}.1f}'
  return f'{mean:{sign}.1f} ± {error:.1f}'


def main(arguments: list[str]) -> int:
  """Runs the command line (without the program's name) and returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.rows',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--config', required=True, help='file whose argument names a row')
  parser.add_argument('--rows', nargs='+', required=True)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--folder', type=pathlib.Path, required=True, help='of the runs')
  parser.add_argument('--store', type=pathlib.Path, help="default: the first run's scenes")
  parser.add_argument('--task', required=True, help='as of evaluate')
  parser.add_argument('--size', type=int, default=64, help='pixels, as of evaluate')
  parser.add_argument('--core', default='0')
  parser.add_argument('flags', nargs='*', help='of every run, after --')
  args = parser.parse_args(arguments)
  args.folder = args.folder.absolute()
  # The first row draws the scenes of all: another one is another folder too.
  args.store = args.store or args.folder / f'{args.rows[0]}-0' / 'scenes'
  settings = {name: getattr(args, name) for name in ('config', 'task', 'size', 'flags')}
  try:
    ablation.claim(args.folder, settings | {'store': str(args.store)})
  except errors.InputError as error:
    print(f'error: {error}', file=sys.stderr)
    return error.code
  programs = ablation.Programs([args.core])
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, programs.stop)
  found = {}
  try:
    # Seed by seed: what is stopped has whole ones.
    for seed in range(args.seeds):
      for row in args.rows:
        found[row, seed] = run(programs, args, row, seed)
  except ablation.Failed as error:
    print(f'error: {row}-{seed}: {error}', file=sys.stderr)
  if found:
    print(table(found))
  if len(found) == args.seeds * len(args.rows):
    return 0
  return errors.AGAIN if programs.stopped.is_set() else 1


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

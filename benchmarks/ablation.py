"""The orderings of the papers at small scale: trains the rows of configs/ablation.py with several
seeds, measures them frozen (benchmarks/ablation_protocol.py), and writes a table and a figure.

  python -m benchmarks.ablation --folder=runs/ablation --images=64000 --cores=0,1
  python -m benchmarks.ablation --folder=runs/ablation --images=64000 --equal=time
  python -m benchmarks.ablation --folder=runs/ablation --data=fashion --packs=DIR --images=64000
  python -m benchmarks.ablation --folder=runs/ablation --rows=both,all --scaling=16000,32000,64000

Each run is `python -m tips_jax.main` on one core. Stopped at any time, the same command goes on: a
run resumes exactly, a finished one is not run again; one that fails is named at the end (exit code
1), and the others are finished first. Runs that the table in --output has already, with the same
config, are taken from there: a table may grow on several machines. With --equal=time every row gets
the time in which the row `all` sees --images images, by speeds that are measured once and kept in
FOLDER. DIR holds the packs. Flags after `--` go to every run, and such runs have a folder of their
own:

  python -m benchmarks.ablation --folder=runs/b128 --rows=all -- --config.schedule.batch_size=128
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import queue
import shutil
import signal
import subprocess
import sys
import threading

from benchmarks import ablation_protocol as protocol
from benchmarks import ablation_report as report
from configs import ablation as config
from tips_jax.core import errors, files, log, processes, strict
from tips_jax.data.scenes import dataset as scenes

ROOT = pathlib.Path(__file__).resolve().parents[1]
DONE = 'ablation.json'  # of a run that is trained and measured
SPEED_STEPS = 40
WARMUP = 0.05  # of the steps
REFERENCE = 'all'  # its time is that of all rows in a table of equal time


class Failed(Exception):
  """A program did not end well; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run and its evaluation."""

  row: str
  seed: int
  steps: int
  batch_size: int
  folder: pathlib.Path

  @property
  def images(self) -> int:
    return self.steps * self.batch_size

  def seen(self) -> int:
    """Images that it has seen so far; all of them when it is measured too."""
    if (self.folder / DONE).exists():
      return self.images
    lines = log.read(self.folder / log.FILE)
    if not lines:
      return 0
    return min(lines[-1]['step'] * self.batch_size, self.images - 1)


class Programs:
  """Starts programs, each on one core, and ends all of them when this one is stopped."""

  def __init__(self, cores: list[str]):
    self.cores = queue.SimpleQueue()
    for core in cores:
      self.cores.put(core)
    self.stopped = threading.Event()
    self._running = set()
    self._lock = threading.Lock()

  def stop(self, *_) -> None:
    """Ends all programs: training saves first."""
    self.stopped.set()
    for process in list(self._running):
      process.terminate()

  def run(self, core: str, module: str, flags: list[str], said: pathlib.Path) -> None:
    """Runs `python -m tips_jax.MODULE`; what it says is added to a file. Failed with its last line
    where it does not end with 0.
    """
    command = ['taskset', '-c', core, sys.executable, '-m', f'tips_jax.{module}', *flags]
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    with open(said, 'a') as file:
      with self._lock:
        if self.stopped.is_set():
          raise Failed('stopped')
        process = subprocess.Popen(
          command,
          cwd=ROOT,
          env=environment,
          stdout=file,
          stderr=subprocess.STDOUT,
          start_new_session=True,  # Ctrl-C reaches this program alone, which ends the others once
        )
        self._running.add(process)
        if self.stopped.is_set():
          process.terminate()
      code = process.wait()
      self._running.discard(process)
    if self.stopped.is_set():
      raise Failed('stopped')
    if code:
      last = said.read_text().strip().splitlines()[-1:]
      raise Failed(f'exit code {code}: {"".join(last)} ({said})')


def claim(folder: pathlib.Path, settings: dict) -> None:
  """Makes the folder of a command's runs, which all have these settings; InputError where it holds
  runs with others, which would be mixed with these.
  """
  path = folder / 'settings.json'
  if path.exists():
    known = json.loads(path.read_text())
    if known != settings:
      raise errors.InputError(
        f'--folder: got {str(folder)!r}, whose runs have {known}, and {settings}; expected another '
        'folder'
      )
  folder.mkdir(parents=True, exist_ok=True)
  files.write(path, json.dumps(settings))


class Table:
  """All runs of one command."""

  def __init__(self, options: argparse.Namespace):
    self.options = options
    self.folder = options.folder.absolute()
    self.stores = self.folder / 'stores'
    self.programs = Programs(options.cores)
    self.failures = []
    self.others = []  # records of a written table that this command does not plan
    self.batch_size = _batch_size(self.config_arg(options.rows[0]), options.flags)

  def config_arg(self, row: str) -> str:
    return f'{row},{self.options.data}{",runlocal" if self.options.runlocal else ""}'

  def flags(self, row: str, seed: int, steps: int) -> list[str]:
    """Flags of the training run of a row."""
    return [
      f'--config={ROOT}/configs/ablation.py:{self.config_arg(row)}',
      f'--config.data.store={self.stores / self.options.data}',
      f'--config.seed={seed}',
      f'--config.schedule.total_steps={steps}',
      f'--config.schedule.warmup_steps={int(WARMUP * steps)}',
      *self.options.flags,
    ]

  def claim(self) -> None:
    """InputError where the folder holds runs of another kind."""
    settings = {name: getattr(self.options, name) for name in ('flags', 'runlocal', 'scenes')}
    claim(self.folder, settings)
    self.stores.mkdir(exist_ok=True)

  def prepare(self) -> None:
    """Makes the stores that are not there."""
    data = self.options.data
    if data == 'scenes':
      settings = config.get_config(self.config_arg(self.options.rows[0])).data.scenes.to_dict()
      _draw(self.stores / data, settings | self.options.scenes)
    needed = protocol.stores(data, self.stores, self.options.packs)
    tables = self.stores / 'ccp_tables'
    if data == 'fashion' and not tables.exists():
      protocol.write_folds(self.options.packs / 'ccp', tables)
    for name, flags in needed.items():
      if not (self.stores / name).exists():
        print(f'preparing {name}', file=sys.stderr)
        self.programs.run(
          self.options.cores[0],
          'prepare',
          [*flags, f'--output={self.stores / name}'],
          self.stores / f'{name}.log',
        )

  def runs(self) -> list[Run]:
    """What is to be run, seed by seed, so that a table that is stopped has whole seeds."""
    sizes = self.options.scaling or [self.options.images]
    speeds = {}
    if self.options.equal == 'time':
      speeds = self.speeds()
    result = []
    for seed in range(self.options.seeds):
      for images in sizes:
        for row in self.options.rows:
          share = 1.0
          if speeds:
            share = speeds[row] / speeds[REFERENCE]
          steps = max(1, round(images * share / self.batch_size))
          name = f'{self.options.data}-{self.options.equal}-{images}'
          folder = self.folder / name / f'{row}-{seed}'
          result.append(Run(row, seed, steps, self.batch_size, folder))
    return result

  def speeds(self) -> dict[str, float]:
    """Images per second of each row, the best of a short run, measured on one core after another:
    other work on the machine can only make it less.
    """
    path = self.folder / f'speed-{self.options.data}.json'
    known = json.loads(path.read_text()) if path.exists() else {}
    for row in dict.fromkeys((REFERENCE, *self.options.rows)):
      if row not in known:
        print(f'measuring the speed of {row}', file=sys.stderr)
        workdir = self.folder / f'speed-{self.options.data}' / row
        workdir.mkdir(parents=True, exist_ok=True)
        flags = [*self.flags(row, 0, SPEED_STEPS), f'--workdir={workdir}']
        # The prototype terms are raised from zero, but computed from the first step on.
        flags.append('--config.log.every_steps=5')
        self.programs.run(self.options.cores[0], 'main', flags, workdir / 'said.log')
        lines = log.read(workdir / log.FILE)
        known[row] = max(line.get('images_per_s', 0.0) for line in lines)
        files.write(path, json.dumps(known, indent=1))
    return known

  def finish(self, run: Run) -> None:
    """Trains and measures one run on a free core; what is done already is not done again."""
    core = self.programs.cores.get()
    try:
      if not (run.folder / DONE).exists():
        run.folder.mkdir(parents=True, exist_ok=True)
        said = run.folder / 'said.log'
        flags = [*self.flags(run.row, run.seed, run.steps), f'--workdir={run.folder}']
        self.programs.run(core, 'main', flags, said)
        results = self.measure(run, core, said)
        files.write(run.folder / DONE, json.dumps(self.record(run, results), indent=1))
    except Failed as error:
      if not self.programs.stopped.is_set():
        self.failures.append(f'{run.folder.name}: {error}')
    finally:
      self.programs.cores.put(core)

  def measure(self, run: Run, core: str, said: pathlib.Path) -> dict[str, pathlib.Path]:
    """Evaluates a trained run; name of the evaluation -> folder of its results."""
    results = {}
    cache = run.folder / 'cache'
    needed = protocol.evaluations(self.options.data, self.stores, self.options.packs)
    for name, flags in needed.items():
      output = run.folder / 'measured' / name
      results[name] = output
      # Random weights depend on neither row nor seed, only on the towers.
      random = run.row == self.options.rows[-1] and run.seed == 0
      if not (output / 'results.json').exists():
        flags = [
          f'--checkpoint={run.folder}',
          f'--output={output}',
          f'--cache={cache}',
          f'--random={random}',
          *flags,
        ]
        self.programs.run(core, 'evaluate', flags, said)
    shutil.rmtree(cache, ignore_errors=True)
    return results

  def record(self, run: Run, results: dict[str, pathlib.Path]) -> dict:
    """What the table needs to know of a run."""
    contents = {name: _results(path) for name, path in results.items()}
    before = {}
    for name, path in results.items():
      if (path / 'random_weights').exists():
        before[name] = _results(path / 'random_weights')
    return {
      'config': self.digest(run),
      'row': run.row,
      'seed': run.seed,
      'images': run.images,
      'budget': run.folder.parent.name,
      'flags': self.options.flags,
      'commit': _commit(),
      'measures': protocol.measures(self.options.data, contents),
      'random': protocol.measures(self.options.data, before) if before else None,
      'signs': report.signs(log.read(run.folder / log.FILE)),
    }

  def digest(self, run: Run) -> str:
    """Of all that decides what a run learns, but for the code. Of what the row says, not of the
    whole config: a field that the schema gets later, at its default, changes no run.
    """
    content = {
      'row': config.row(run.row, self.options.data),
      'runlocal': self.options.runlocal,
      'seed': run.seed,
      'steps': run.steps,
      'flags': self.options.flags,
      'scenes': [scenes.REVISION, self.options.scenes],
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def take_known(self, planned: list[Run]) -> None:
    """Takes the records of runs that the written table has, and that are not in this folder.
    InputError where it has a planned run by another recipe: the new table would lose it.
    """
    path = self.table().with_suffix('.json')
    if not self.options.output or not path.exists():
      return
    wanted = {(run.row, run.seed, run.folder.parent.name): run for run in planned}
    for record in json.loads(path.read_text()):
      run = wanted.get((record['row'], record['seed'], record['budget']))
      if run is None:
        self.others.append(record)
        continue
      if record['config'] != self.digest(run):
        raise errors.InputError(
          f'--output: got {str(self.options.output)!r}, whose table has {run.folder.name} by '
          f'another recipe or other flags (at {record["commit"]}); expected another folder'
        )
      if not (run.folder / DONE).exists():
        run.folder.mkdir(parents=True, exist_ok=True)
        files.write(run.folder / DONE, json.dumps(record, indent=1))

  def table(self) -> pathlib.Path:
    """Path of the table, without its suffix."""
    kind = 'scaling' if self.options.scaling else self.options.equal
    return (self.options.output or self.folder) / f'ablation_{self.options.data}_{kind}'

  def go(self) -> int:
    """Does all that is missing; returns the exit code."""
    self.claim()
    try:
      self.prepare()
      planned = self.runs()
      self.take_known(planned)
    except Failed as error:
      print(f'error: {error}', file=sys.stderr)
      return errors.AGAIN if self.programs.stopped.is_set() else 1
    bar = log.Progress(sum(run.images for run in planned), label='images', every_s=60)
    with concurrent.futures.ThreadPoolExecutor(len(self.options.cores)) as pool:
      waiting = {pool.submit(self.finish, run) for run in planned}
      while waiting:
        done, waiting = concurrent.futures.wait(waiting, timeout=5)
        for future in done:
          future.result()
        finished = len(planned) - len(waiting)
        bar.update(sum(run.seen() for run in planned), note=f'{finished}/{len(planned)} runs')
    bar.close()
    self.write(planned)
    for line in self.failures:
      print(f'failed: {line}', file=sys.stderr)
    if self.programs.stopped.is_set():
      return errors.AGAIN
    return 1 if self.failures else 0

  def write(self, planned: list[Run]) -> None:
    """Writes the table of the runs that are finished."""
    records = list(self.others)
    for run in planned:
      if (run.folder / DONE).exists():
        records.append(json.loads((run.folder / DONE).read_text()))
    if not records:
      return
    order = list(config.ROWS)
    records.sort(key=lambda record: order.index(record['row']))
    path = self.table()
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(planned) + len(self.others)
    report.write(path, records, data=self.options.data, planned=count)
    print(path.with_suffix('.md').read_text())


def _batch_size(arg, flags):
  size = config.get_config(arg).schedule.batch_size
  for flag in flags:
    name, _, value = flag.partition('=')
    if name == '--config.schedule.batch_size':
      size = int(value)
  return size


def _draw(store, settings):
  total = settings['train'] + settings['test']
  bar = log.Progress(total, label='scene')

  def progress(done, total):
    bar.update(done)

  scenes.build(store, processes=processes.cores(), progress=progress, **settings)
  bar.close()


def _results(folder):
  return json.loads((folder / 'results.json').read_text())


def _commit():
  """The commit of this code, with a + where files are changed; '' outside of a clone."""
  command = ['git', 'describe', '--always', '--dirty=+']
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  return result.stdout.strip()


def options(arguments: list[str]) -> argparse.Namespace:
  """The flags; InputError where one does not fit."""
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.ablation',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  names = ','.join(config.ROWS)
  parser.add_argument('--folder', type=pathlib.Path, required=True, help='of runs and stores')
  parser.add_argument('--data', default='scenes', choices=list(config.DATA))
  parser.add_argument('--rows', default=names, help=f'default: {names}')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--images', type=int, default=64_000, help='that a run sees')
  parser.add_argument('--equal', default='images', choices=('images', 'time'))
  parser.add_argument('--scaling', default='', help='several numbers of images instead of one')
  parser.add_argument('--cores', default='0', help='one run on each')
  parser.add_argument('--packs', type=pathlib.Path, help='folder of fashion, ccp, flickr8k ...')
  parser.add_argument('--output', type=pathlib.Path, help='of the table; default: FOLDER')
  parser.add_argument('--scenes', type=int, help='drawn for training; default: as the config says')
  parser.add_argument('--runlocal', action='store_true', help='tiny towers, to try it')
  parser.add_argument('flags', nargs='*', help='of every run, after --')
  known = parser.parse_args(arguments)
  known.rows = known.rows.split(',')
  for row in known.rows:
    if row not in config.ROWS:
      raise strict.unknown('--rows', row, config.ROWS)
  for name in ('seeds', 'images'):
    if getattr(known, name) < 1:
      raise errors.InputError(f'--{name}: got {getattr(known, name)}; expected at least 1')
  known.scaling = [int(images) for images in known.scaling.split(',') if images]
  if known.scaling and known.equal == 'time':
    raise errors.InputError('--scaling: got it with --equal=time; expected --equal=images')
  known.cores = known.cores.split(',')
  known.scenes = dict(train=known.scenes) if known.scenes else {}
  if known.data != 'scenes':
    if not known.packs or not (known.packs / known.data).is_dir():
      raise errors.InputError(
        f'--packs: got {str(known.packs)!r}; expected a folder that holds {known.data!r}'
      )
    known.packs = known.packs.absolute()
  return known


def main(arguments: list[str]) -> int:
  """Runs the command line (without the program's name) and returns the exit code."""
  try:
    table = Table(options(arguments))
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, table.programs.stop)
    return table.go()
  except errors.InputError as error:
    print(f'error: {error}', file=sys.stderr)
    return error.code


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

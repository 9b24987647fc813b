"""Stops one run at random moments, again and again, and compares it with an uninterrupted one.

  python benchmarks/kills.py --kills=20 --terms=20

Prints one JSON line: the signals sent, what each stopped (start-up, compiling, training, ...), and
whether the final parameters, teachers, optimizer state and loss curve equal the uninterrupted run's
exactly. tests/test_end_to_end.py uses the same functions.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = {
  'data.scenes.train': 24,
  'data.scenes.test': 12,
  'data.scenes.size': 48,
  'towers.image.depth': 1,
  'towers.text.depth': 1,
  'schedule.batch_size': 8,
  'schedule.warmup_steps': 2,
  'evals.size': 48,
  'log.every_steps': 1,
  'log.tensorboard': False,
}


def command(workdir, *, config='configs/quickstart.py:v2,runlocal', **overrides):
  """The command line of a tiny run; overrides: {'schedule.total_steps': 8}."""
  fields = [f'--config.{name}={value}' for name, value in (TINY | overrides).items()]
  return [
    sys.executable,
    '-m',
    'tips_jax.main',
    f'--config={config}',
    f'--workdir={workdir}',
    *fields,
  ]


def environment(cache):
  """One CPU device, and a cache of compiled programs, so that only the first run compiles."""
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }


def attempt(arguments, env, *, stop=None, when=None, limit=600):
  """(exit code, standard output, standard error); sends the signal `stop` once `when(stderr so
  far)` is true.
  """
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    process = subprocess.Popen(arguments, env=env, cwd=ROOT, stdout=out, stderr=err)
    said = lambda file: os.pread(file.fileno(), 1 << 20, 0).decode()
    begin = time.monotonic()
    try:
      while process.poll() is None:
        if time.monotonic() - begin > limit:
          raise TimeoutError(f'{arguments}: no end in {limit} s\n{said(err)}')
        if stop and when(said(err)):
          process.send_signal(stop)
          stop = None
        time.sleep(0.02)
    finally:
      if process.poll() is None:
        process.kill()
        process.wait()
    return process.returncode, said(out), said(err)


def curve(workdir):
  """{step: every logged number but rates and times}."""
  rates = ('images_per_s', 'data_wait', 'goodput')
  times = ('time', 'run_seconds', 'compile_seconds', 'eval/seconds')
  result = collections.defaultdict(dict)
  for line in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines():
    line = json.loads(line)
    result[line.pop('step')] |= {k: v for k, v in line.items() if k not in rates + times}
  return dict(result)


def arrays(workdir):
  """{name: array} of the newest checkpoint: parameters, teachers, optimizer, memory, counters,
  place in the data.
  """
  import jax
  from orbax.checkpoint import v1 as ocp

  from tips_jax.runs import folder as runs

  out = ocp.load_checkpointables(runs.find(workdir, 'workdir'))
  parts = {k: out[k] for k in ('params', 'teachers', 'train', 'data') if k in out}
  return {
    jax.tree_util.keystr(path): np.asarray(x)
    for path, x in jax.tree_util.tree_flatten_with_path(parts)[0]
  }


def same(one, other):
  """Whether two results of `arrays` hold the same bits."""
  return sorted(one) == sorted(other) and all(one[k].tobytes() == other[k].tobytes() for k in one)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--terms', type=int, default=20)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--folder', default='', help='for the runs; default: a temporary one')
  options = parser.parse_args()
  folder = pathlib.Path(options.folder or tempfile.mkdtemp())
  env, rng = environment(folder / 'compiled'), random.Random(options.seed)
  fields = {
    'schedule.total_steps': options.steps,
    'checkpoint.every_steps': 25,
    'evals.every_steps': 100,
    'evals.report': False,
  }

  whole, stopped = folder / 'whole', folder / 'stopped'
  attempt(command(folder / 'warm', **fields | {'schedule.total_steps': 1}), env)
  begin = time.monotonic()
  code, _, err = attempt(command(whole, **fields), env)
  if code:
    sys.exit(err)
  length = time.monotonic() - begin
  signals = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terms
  rng.shuffle(signals)
  codes, moments, rounds, want = (
    collections.Counter(),
    collections.Counter(),
    0,
    (arrays(whole), curve(whole)),
  )
  equal_state = equal_curve = True
  while signals:  # a run that ends before all signals are sent is compared, and another one begins
    shutil.rmtree(stopped, ignore_errors=True)
    code = None
    while code != 0:
      moment, started = rng.uniform(0, 0.8 * length), time.monotonic()
      stop = signals[-1] if signals else None
      code, _, err = attempt(
        command(stopped, **fields),
        env,
        stop=stop,
        when=lambda _, m=moment, s=started: time.monotonic() - s > m,
      )
      if code not in (0, 75, -signal.SIGKILL, -signal.SIGTERM):
        sys.exit(f'exit code {code}\n{err}')
      if code:
        signals.pop()
        codes[str(code)] += 1
        phase = (
          'training' if 'compiled in' in err else 'compiling' if 'compiling' in err else 'start-up'
        )
        moments[phase] += 1
        print(
          f'{stop.name} after {moment:.1f} s, in {phase}: exit code {code}; {len(signals)} left',
          file=sys.stderr,
        )
    rounds += 1
    equal_state &= same(arrays(stopped), want[0])
    equal_curve &= curve(stopped) == want[1]
  print(
    json.dumps(
      {
        'kills': options.kills,
        'losses': options.terms,
        'exit_codes': codes,
        'stopped_during': moments,
        'runs': rounds,
        'seconds_of_one': round(length, 1),
        'equal_state': equal_state,
        'equal_curve': equal_curve,
      }
    )
  )
  if not options.folder:
    shutil.rmtree(folder)
  sys.exit(not (equal_state and equal_curve))


if __name__ == '__main__':
  sys.path.insert(0, str(ROOT))
  main()

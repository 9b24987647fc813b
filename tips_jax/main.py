"""python -m tips_jax.main --config=FILE[:arg] --workdir=DIR [--config.a.b=value] [--dry_run]
[--multihost]

Trains. Exit codes: 0 done; 2 bad input, in one line; 3 diverged; 75 stopped by a signal, all saved,
or what may pass, such as a busy disk or a process that was lost: run the same command again.
"""

import sys

from tips_jax.runtime import huge_pages, terminal
from tips_jax.runtime.signals import Preemption, Stopped

SIGNALS = Preemption()
if __name__ == '__main__':  # before the slow imports: a signal during them loses nothing
  huge_pages.restart()
  terminal.survive()
  SIGNALS.install()

import contextlib
import faulthandler
import json
import os
import pathlib
import traceback
from typing import Any

from tips_jax.core import buckets, chips, cli, files, schema, strict
from tips_jax.core.errors import AGAIN, InputError

FLAGS = cli.Flags()
FLAGS.add_config_file()
FLAGS.add_path('workdir', None, 'Folder of the run: checkpoints, metrics, report.')
FLAGS.add_boolean(
  'multihost',
  None,
  'Join the other processes before anything else. Addresses come from the cluster (Cloud TPU, '
  'GKE, SLURM, Open MPI) or from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.',
)
FLAGS.add_string(
  'compilation_cache',
  '',
  "Folder for compiled programs, or 'off'. Default: JAX_COMPILATION_CACHE_DIR, else "
  '.jax_cache beside the work folder.',
)
FLAGS.add_boolean(
  'dry_run', False, 'Print the config, parameters, FLOPs and memory; allocate nothing.'
)
FLAGS.add_integer(
  'verbosity',
  None,
  'What the libraries log: 0 information, -1 warnings. Default: warnings of jax alone.',
)

# The processes of the run, once they are known: how `run` ends depends on them.
PEERS = []


def main() -> None:
  """Trains, or with --dry_run describes, what the flags say."""
  cli.require_address_space()
  config = cli.load_config(FLAGS)
  if FLAGS.dry_run:  # accelerators may belong to a run
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  # Plans count with the same share of a GPU's memory. jaxlib takes one of these names, never both.
  if 'XLA_CLIENT_MEM_FRACTION' not in os.environ:
    os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', str(chips.GPU_SHARE))
  # These import jax, which no signal may end halfway.
  from tips_jax.data.reading import pipeline
  from tips_jax.evals import during_training
  from tips_jax.runtime import lock
  from tips_jax.train import initialization, workdir
  from tips_jax.train import method as method_lib

  during_training.check(config)
  if FLAGS.dry_run:
    describe(config)
    return
  initialization.require_sources(config)
  huge_pages.announce()
  # Where only `disposable` work is done, a signal may end the process at once.
  with SIGNALS.interruptible(disposable=True):
    peers = join(config)  # before anything touches a device
    if peers.lead and config.data.store:  # generated scenes have all texts
      pipeline.require_texts(config.data, method_lib.contrasted(config))
  method = method_lib.build(config)
  with SIGNALS.interruptible(disposable=True):
    bucket = workdir.in_bucket(FLAGS.workdir, '--workdir', peers)
    if bucket:
      folder = bucket.folder
    else:
      folder = workdir.open_workdir(FLAGS.workdir, '--workdir', peers)
  with contextlib.ExitStack() as closing:
    with SIGNALS.interruptible(disposable=True):  # it may wait for another host
      closing.enter_context(lock.held(folder, '--workdir', peers, bucket))
      if bucket:
        closing.enter_context(bucket.mirrored())
    train(method, folder, peers, bucket)


def train(method: Any, folder: pathlib.Path, peers: Any, bucket: Any = None) -> None:
  """Trains a method in its work folder, or in that of this process for one in a bucket, and writes
  the report.
  """
  from tips_jax.evals import during_training
  from tips_jax.train import loop, summary, workdir

  config = method.config
  warning = summary.sinkhorn_warning(method)
  if warning and peers.lead:
    print(warning, file=sys.stderr)
  # Everything that is missing (data, tokenizer, benchmarks) is an error before the first step.
  with SIGNALS.interruptible(disposable=True):
    keep_programs(peers, folder)
    method = workdir.with_scenes(method, folder, peers, shared=not bucket)
    evaluation = None
    if config.evals.tasks or config.evals.suite:
      evaluation = during_training.DuringTraining(method.config, check_shards=peers.lead)
  try:
    encoder = loop.train(method, folder, SIGNALS, evaluation=evaluation, peers=peers, bucket=bucket)
  except loop.Diverged as error:  # another start would diverge again: not the code of a restart
    print(f'diverged: {error}', file=sys.stderr)
    sys.exit(3)
  with SIGNALS.interruptible(disposable=True):
    if peers.lead and evaluation and config.evals.report:
      print(evaluation.report(folder, encoder))
      print(f'report: {buckets.join(bucket.url if bucket else str(folder), "index.html")}')
    peers.barrier('end')


def describe(config: schema.Config) -> None:
  """--dry_run: the resolved config, and what the method costs."""
  from tips_jax.train import method, summary

  built = method.build(config)
  print(json.dumps(strict.plain(config), indent=1), '\n')
  print(summary.text(built))


def join(config: schema.Config) -> Any:
  """The other processes of the run (runtime.peers.Peers); none without --multihost."""
  from tips_jax.runtime import peers as peers_lib
  from tips_jax.runtime import rendezvous

  if FLAGS.multihost:
    peers = peers_lib.join(config, SIGNALS)
  else:
    others = rendezvous.others(os.environ)
    # Each process would train alone, and all would write to one folder.
    if others and FLAGS.multihost is None:
      raise InputError(
        f'--multihost: missing, and there are several processes ({others}); expected --multihost, '
        'or --nomultihost where each runs for itself'
      )
    peers = peers_lib.Peers(SIGNALS)
  PEERS.append(peers)
  return peers


def keep_programs(peers: Any, workdir: pathlib.Path) -> None:
  """Compiled programs are kept for the next start."""
  from tips_jax.runtime import compile_cache

  if FLAGS.compilation_cache not in ('', compile_cache.OFF):
    files.require_writable(FLAGS.compilation_cache, '--compilation_cache')
  folder = compile_cache.use(workdir, FLAGS.compilation_cache)
  if folder and peers.lead:
    print(f'compiled programs: {folder}', file=sys.stderr)


def run() -> None:
  """Entry point: one line and a code for whatever a user can mend, a traceback for our own
  faults.
  """
  if cli.print_help(sys.argv, FLAGS, __doc__):
    return
  faulthandler.enable()
  try:
    cli.parse(FLAGS, sys.argv)
    cli.set_verbosity(FLAGS.verbosity)
    main()
    return
  except InputError as error:
    code = error.code
    text = str(error)
    print(f'error: {text}', file=sys.stderr)
  except Stopped:
    code = AGAIN
    text = ''
    print('stopped by a signal; all is saved: run the same command again to go on', file=sys.stderr)
  except Exception as error:
    if not PEERS or PEERS[0].count == 1:
      raise
    # Of a lost process the others see broken connections: its own error is the one to report.
    PEERS[0].verdict(error)
    traceback.print_exc()
    code = 1
    text = f'{type(error).__name__}: {error}'.splitlines()[0]
  # The other processes would wait for this one in their next collective.
  for peers in PEERS:
    if text:
      peers.fail(code, text)
    else:
      peers.leave()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)  # at once: a compiler thread may still be at work


if __name__ == '__main__':
  run()

"""python -m tips_jax.main --config=FILE[:arg] --workdir=DIR [--config.a.b=value] [--dry_run]
[--multihost]

Trains. Exit codes: 0 done; 2 bad input, in one line; 3 diverged; 75 stopped by a signal, saved, or
another process of
the run was lost or did not come: run it again.
"""

import os
import sys

# XLA's CPU buffers are freed after each step and faulted in again by the next; on huge pages a
# small model's step takes half as long (docs/lab.md). glibc reads this once, as a process starts.
if __name__ == '__main__' and sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
  os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

from tips_jax.runtime.signals import EXIT, Preemption, Stopped

PREEMPTION = Preemption()
PEERS = []  # the processes of the run, once they are known
if __name__ == '__main__':  # before the slow imports: a signal during them loses nothing
  PREEMPTION.install()

import pathlib
import re
import socket
import time
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from tips_jax.core import schema, strict
from tips_jax.core.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file, with an argument after a colon: configs/vitb.py:v2.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, metrics, report.')
_MULTIHOST = flags.DEFINE_bool(
  'multihost',
  None,
  'Join the other processes before anything else. Addresses come from the cluster (Cloud TPU, '
  'GKE, SLURM, Open MPI) or from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.',
)
_CACHE = flags.DEFINE_string(
  'compilation_cache',
  '',
  "Folder for compiled programs, or 'off'. Default: JAX_COMPILATION_CACHE_DIR, else "
  '.jax_cache beside the work folder.',
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Print the config, parameters, FLOPs and memory; allocate nothing.'
)


def main(_):
  config = load_config()
  if _DRY_RUN.value:
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  from tips_jax.evals import during_training
  from tips_jax.train import method as method_lib  # and jax, whose import no signal may end halfway

  during_training.check(config)
  if not _DRY_RUN.value:  # before anything touches a device
    with PREEMPTION.interruptible(disposable=True):
      peers = join(config)
  method = method_lib.build(config)
  if _DRY_RUN.value:
    import json

    from tips_jax.train import summary

    print(json.dumps(strict.plain(config), indent=1), '\n')
    print(summary.text(method))
    return
  with PREEMPTION.interruptible(disposable=True):
    workdir = open_workdir(peers)
    keep_programs(peers, workdir)
    method = with_scenes(method, workdir, peers)
    evaluation = None
    if config.evals.tasks or config.evals.suite:
      evaluation = during_training.DuringTraining(method.config)
    from tips_jax.train import loop
  try:
    encoder = loop.train(method, workdir, PREEMPTION, evaluation=evaluation, peers=peers)
  except loop.Diverged as error:
    print(f'diverged: {error}', file=sys.stderr)
    sys.exit(3)
  with PREEMPTION.interruptible(disposable=True):
    if peers.lead and evaluation and config.evals.report:
      print(evaluation.report(workdir, encoder))
      print(f'report: {workdir / "index.html"}')
    peers.barrier('end')


def load_config():
  """The checked config; InputError for a file, an argument, a field or a value that does not fit."""
  if _CONFIG.value is None:
    raise InputError('--config: missing; expected a file such as configs/quickstart.py')
  return strict.build(schema.Config, _CONFIG.value)


def join(config):
  """The other processes of the run; none without --multihost."""
  from tips_jax.runtime import peers as multihost
  from tips_jax.runtime import rendezvous

  if _MULTIHOST.value:
    peers = multihost.join(config, PREEMPTION)
  else:
    found = rendezvous.others(os.environ)
    if found and _MULTIHOST.value is None:
      raise InputError(
        f'--multihost: missing, and there are several processes ({found}); expected --multihost, or '
        '--nomultihost where each runs for itself'
      )
    peers = multihost.Peers(PREEMPTION)
  PEERS.append(peers)
  return peers


def open_workdir(peers):
  """The work folder, made, known to be writable, and the same one for all processes."""
  if not _WORKDIR.value:
    raise InputError('--workdir: missing; expected a folder for the run')
  if '://' in _WORKDIR.value:
    raise InputError(
      f'--workdir: got {_WORKDIR.value!r}; expected a folder; a bucket is mounted first (gcsfuse)'
    )
  path = pathlib.Path(_WORKDIR.value)
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f'.writable-{socket.gethostname()}-{os.getpid()}'
    probe.write_text('')
    seen = path / peers.share('workdir', probe.name)
    end = time.monotonic() + 30  # a network's folder may show a new file late
    while not seen.exists() and time.monotonic() < end:
      time.sleep(0.1)
    if not seen.exists():
      raise InputError(
        f'--workdir: got {str(path)!r}, in which process {peers.index} does not see what process 0 '
        'wrote; expected a folder that all hosts share'
      )
    peers.barrier('workdir-seen')
    probe.unlink()
  except OSError as error:
    raise InputError(
      f'--workdir: got {str(path)!r}; expected a writable folder ({error.strerror})'
    ) from None
  return path


def keep_programs(peers, workdir):
  """Compiled programs are kept for the next start."""
  from tips_jax.runtime import compile_cache as cache

  folder = cache.use(workdir, _CACHE.value)
  if folder and peers.lead:
    print(f'compiled programs: {folder}', file=sys.stderr)


def with_scenes(method, workdir, peers):
  """The method on the store it names, or on generated scenes inside the work folder."""
  import dataclasses

  from tips_jax.core import log
  from tips_jax.data.scenes import dataset as scenes

  data = method.config.data
  if data.store:
    return method
  if not data.scenes.train:
    raise InputError(
      "data.store: got ''; expected a folder written by `python -m tips_jax.prepare`, or any TFDS "
      'folder'
    )
  spec, path = data.scenes, None
  if peers.lead:
    progress = log.Progress(spec.train + spec.test, label='scene')
    path = scenes.build(
      str(workdir / 'scenes'),
      **dataclasses.asdict(spec),
      seed=method.config.seed,
      progress=lambda done, total: progress.update(done),
    )
    progress.close()
  path = peers.share('scenes', path)
  data = dataclasses.replace(data, store=path)
  return dataclasses.replace(method, config=dataclasses.replace(method.config, data=data))


def run():
  """Entry point: one line and a code for whatever a user can mend, a traceback for our own faults."""
  logging.set_verbosity(
    logging.WARNING
  )  # jax and orbax tell more than a user needs; --verbosity=0 brings it back
  # A config file may import its neighbors, wherever it is called from.
  for arg in sys.argv:
    if arg.startswith('--config='):
      path = pathlib.Path(arg.split('=', 1)[1].split(':')[0]).absolute()
      sys.path[:0] = map(str, path.parents[1:3])  # of configs/x.py and of configs/methods/x.py
  try:
    app.run(main, flags_parser=parse)
  except InputError as error:
    code, text = getattr(error, 'code', 2), str(error)
    print(f'error: {text}', file=sys.stderr)
  except Stopped:
    code, text = EXIT, ''
    print('stopped by a signal; all is saved: run the same command again to go on', file=sys.stderr)
  except Exception as error:
    if not PEERS or PEERS[0].count == 1:
      raise
    PEERS[0].verdict(error)
    traceback.print_exc()
    code, text = 1, f'{type(error).__name__}: {error}'.splitlines()[0]
  for peers in PEERS:
    peers.fail(code, text) if text else peers.leave()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)  # at once: a compiler thread may still be at work


def parse(argv):
  """absl's parser, with its errors as InputErrors."""
  if {'--help', '-help', '-h'} & set(argv):
    print(
      f'{__doc__}{flags.FLAGS.main_module_help()}\n\nFields of the config: tips_jax/core/schema.py, or --dry_run.'
    )
    sys.exit()
  try:
    rest = flags.FLAGS(argv)
    hasattr(_CONFIG.value, 'lock')  # a file that cannot be read is an error on first use only
  except InputError:
    raise
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    raise InputError(reason(error, argv)) from None
  if rest[1:]:
    raise InputError(f'arguments: got {rest[1]!r}; expected only flags, written --name=value')
  return rest


def reason(error, argv):
  """One line for what absl or ml_collections raised."""
  text = str(error).strip()
  last = text.splitlines()[-1].strip()
  if isinstance(error, OSError):
    return f'--config: got a file that cannot be read; {last}'
  if 'Traceback' in text:  # from inside a config file
    return last.split('InputError: ')[-1] if 'InputError: ' in last else f'--config: {last}'
  if isinstance(error, (AttributeError, KeyError)):
    name, hint = re.search(r'\w+', text), re.search(r'mean "(\w+)"', text)
    for arg in argv:
      if name and arg.startswith('--config.') and name[0] in re.split('[.=]', arg):
        return f'{arg}: unknown field {name[0]!r}' + (
          f'; did you mean {hint[1]!r}?' if hint else ''
        )
  return f'command line: {" ".join(text.split())}'


if __name__ == '__main__':
  run()

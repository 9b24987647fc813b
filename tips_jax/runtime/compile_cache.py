"""Compiled programs, kept beside the work folder: the second start of a run, or of its sister,
compiles nothing.
"""

import functools
import hashlib
import os
import pathlib
import platform

import jax

FOLDER = '.jax_cache'
OFF = 'off'
_HIT = '/jax/compilation_cache/cache_hits'
_hits = []  # one entry for each program that was found


def use(workdir: pathlib.Path, folder: str = '') -> str | None:
  """Keeps programs in `folder`, or in JAX_COMPILATION_CACHE_DIR, or beside the work folder; 'off'
  keeps none.

  Returns the folder, or None. Programs for a CPU go to a folder of its kind, as code for one may
  not run on another.
  """
  if folder == OFF:
    jax.config.update('jax_enable_compilation_cache', False)
    return None
  path = pathlib.Path(
    folder
    or os.environ.get('JAX_COMPILATION_CACHE_DIR')
    or pathlib.Path(workdir).absolute().parent / FOLDER
  )
  if jax.default_backend() == 'cpu':
    path /= f'cpu-{_processor()}'
  jax.config.update('jax_compilation_cache_dir', str(path))
  _listen()
  return path


def hits() -> int:
  """How many programs came from the cache so far."""
  return len(_hits)


@functools.cache
def _listen():
  def count(event, **_):
    if event == _HIT:
      _hits.append(event)

  jax.monitoring.register_event_listener(count)


def _processor():
  """What this machine's processor can do, as a short name."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    can = next(line for line in lines if line.startswith(('flags', 'Features')))
  except (OSError, StopIteration):
    can = platform.processor()
  return f'{platform.machine()}-{hashlib.sha256(can.encode()).hexdigest()[:8]}'

"""Huge pages for XLA's buffers on a CPU.

XLA frees its CPU buffers after each step, and the next step faults them in again, page by page. On
huge pages a small model's step takes half as long (docs/lab.md).
"""

import os
import sys

_NAME = 'GLIBC_TUNABLES'
_VALUE = 'glibc.malloc.hugetlb=1'
_RESTARTED = 'TIPS_JAX_RESTARTED'  # tells the new process


def restart() -> None:
  """Runs the same command again with huge pages, unless the environment has settled it.

  glibc reads the setting once, as a process starts. A debugger or a profiler would lose sight of
  the new process, so under one nothing happens.
  """
  watched = sys.gettrace() or sys.getprofile() or 'pydevd' in sys.modules
  if sys.platform != 'linux' or _NAME in os.environ or watched:
    return
  os.environ[_NAME] = _VALUE
  os.environ[_RESTARTED] = '1'
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def announce() -> None:
  """Says that the process was started again: not at the restart, as bad input is one line alone."""
  if os.environ.pop(_RESTARTED, ''):
    print(f'started again with {_NAME}={_VALUE}, for faster steps on a CPU', file=sys.stderr)

"""Processes of this machine: the cores that one may use, and an end together with its parent."""

import multiprocessing
import os
import threading


def cores() -> int:
  """Those that this process may use, of all that the machine has."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def end_with_parent() -> None:
  """Makes a child of `multiprocessing` end when its parent does, however that ends."""
  threading.Thread(target=_wait, name='parent', daemon=True).start()


def _wait():
  multiprocessing.parent_process().join()
  os._exit(1)  # at once: the main thread may be in the middle of its work, or wait for more

"""Writes down what every thread is doing when nothing has finished for too long. It ends nothing.

In a run of many hosts a hung process makes all others wait for it. Each goes by its own
clock, so that every host leaves its stacks.
"""

import contextlib
import faulthandler
import pathlib
import sys
import threading
import time
from collections.abc import Iterator


class Watchdog:
  """Watches from its making to `close`; `beat(doing)` says that something has finished and what
  comes next.
  """

  def __init__(self, workdir, *, seconds, process=0):
    self._path = pathlib.Path(workdir) / f'stall-{process}.txt'
    self._seconds = seconds
    self._process = process
    self._paused = False
    self.beat('starting')
    self._closed = threading.Event()
    if seconds > 0:
      threading.Thread(target=self._watch, name='watchdog', daemon=True).start()

  def beat(self, doing: str) -> None:
    self._doing = doing
    self._since = time.monotonic()
    self._said = False  # once for each time that nothing happens

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Looks away while this process waits for another one, which is watched there."""
    self._paused = True
    try:
      yield
    finally:
      self.beat(self._doing)
      self._paused = False

  def close(self) -> None:
    self._closed.set()

  def _watch(self):
    while not self._closed.wait(min(self._seconds / 4, 5)):
      passed = time.monotonic() - self._since
      if passed > self._seconds and not self._said and not self._paused:
        self._said = True
        self._dump(
          f'process {self._process}: {self._doing} for {passed:.0f} s: stacks of all threads'
        )

  def _dump(self, head):
    print(f'{head} (also in {self._path})', file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    try:
      with open(self._path, 'a') as file:
        file.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")} {head}\n')
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.write('\n')
    except OSError:  # the disk may be what hangs
      pass

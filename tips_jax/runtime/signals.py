"""Signals: a run that is asked to stop saves and says so with its exit code.

SIGTERM, SIGINT and SIGHUP (a closed terminal) raise `Stopped` where nothing is lost by it
(start-up, compiling, evaluation) and are noted in a training step, after which the loop saves. Exit
code AGAIN: stopped, saved, run the same command again. In a run of several processes a signal to
one is a signal to all (peers.py).
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from tips_jax.core.errors import AGAIN


class Stopped(BaseException):
  """The process was asked to stop. Not an Exception: nobody may swallow it."""


class Preemption:
  """`requested` after a signal; inside `interruptible()` the signal raises Stopped at once.

  `disposable`: inside `interruptible(disposable=True)`, while no signal has been heard: nothing
  would be lost if the process ended here and now.
  """

  def __init__(self):
    self.requested = False
    self.disposable = False
    self._interruptible = False

  def install(self) -> 'Preemption':
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._handle)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
      signal.signal(signal.SIGHUP, self._handle)
    sys.unraisablehook = _unraisable
    return self

  def _handle(self, number, frame):
    if self.requested and number == signal.SIGINT:
      os._exit(AGAIN)  # a second Ctrl-C: now
    self.requested = True
    if self._interruptible:
      self._interruptible = self.disposable = False  # once: what follows is saving
      raise Stopped

  @contextlib.contextmanager
  def interruptible(self, *, disposable: bool = False) -> Iterator[None]:
    """Code that may be left at any point; a signal that came before is honored here."""
    if self.requested:
      raise Stopped
    self._interruptible = True
    self.disposable = disposable
    try:
      yield
    finally:
      self._interruptible = self.disposable = False


def _unraisable(event):
  """Stopped may be raised inside of a callback of the garbage collector, which ignores it and
  prints a traceback. Nothing is lost: the signal is noted, and heard at the next point where all
  may stop.
  """
  if not issubclass(event.exc_type, Stopped):
    sys.__unraisablehook__(event)

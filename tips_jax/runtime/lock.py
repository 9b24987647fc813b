"""One run at a time in a work folder, also where the locks of files hold on one host alone."""

import contextlib
import fcntl
import os
import pathlib
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol

from tips_jax.core import files
from tips_jax.core.errors import InputError, PassingError
from tips_jax.runtime.peers import Peers

FILE = '.lock'  # names the process that holds it, and when that last gave a sign of life
_BEAT_S = 20
# A run that is silent for so long is over. Mounted buckets show a change after up to a minute.
_SILENT_S = 90
_LOOK_S = 1


class Signs(Protocol):
  """Where hosts that do not see the file find the signs of life, as in a bucket."""

  def read_sign(self) -> str: ...

  def write_sign(self, text: str) -> None: ...


@contextlib.contextmanager
def held(
  workdir: pathlib.Path, flag: str, peers: Peers, signs: Signs | None = None
) -> Iterator[None]:
  """Within it no other run can be in the work folder: InputError, which names `flag`, where one is,
  and PassingError where it is on another host.

  On one host the system takes the lock of process 0 back when that ends, however it ends. Other
  hosts may not see the lock; they go by the signs of life in the file, or in `signs`, and wait
  until a run that was killed has been silent for long enough.
  """
  if not peers.lead:
    peers.barrier('locked')
    yield
    return
  path = workdir / FILE
  signs = signs or _File(path)
  what = f'{flag}: cannot write {str(path)!r}'
  with files.writing(what):
    file = open(path, 'a')
  with file:
    locked = True
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise InputError(f'{_at_work(workdir, flag, signs.read_sign())} of that one') from None
    except OSError:  # a file system without locks
      locked = False
    if not locked or _host(signs.read_sign()) != socket.gethostname():
      _wait_for_silence(workdir, flag, signs)
    with _signs_of_life(signs, what):
      peers.barrier('locked')
      yield


class _File:
  """The signs of life in the file itself."""

  def __init__(self, path):
    self._path = path

  def read_sign(self):
    return self._path.read_text(errors='replace')

  def write_sign(self, text):
    # All are of one length, and written over each other: a reader never finds an empty file.
    mode = 'w'
    if text and self.read_sign():
      mode = 'r+'
    with open(self._path, mode) as file:
      file.write(text)


def _wait_for_silence(workdir, flag, signs):
  """Returns when the run that the signs name, if any, must be over; PassingError once it gives
  another sign of life.
  """
  sign = signs.read_sign()
  if not _host(sign):
    return
  # Another host's clock may be ahead.
  age = max(time.time() - int(sign.split()[-1]), 0)
  wait = _SILENT_S - age
  end = time.monotonic() + wait
  if wait > 0:
    print(
      f'{workdir}: {_process(sign)} was at work here {age:.0f} s ago; waiting for up to '
      f'{wait:.0f} s for another sign of it',
      file=sys.stderr,
      flush=True,
    )
  while time.monotonic() < end:
    time.sleep(_LOOK_S)
    latest = signs.read_sign()
    if not latest:
      return
    if latest != sign:
      # It may be about to stop: a scheduler that has moved the run should start it again.
      raise PassingError(
        f'{_at_work(workdir, flag, latest)} of that one, or {_SILENT_S} s without a sign of it'
      )


def _at_work(workdir, flag, sign):
  return (
    f'{flag}: got {str(workdir)!r}, where another run is at work ({_process(sign)}); expected a '
    'folder for each run, or the end'
  )


def _process(sign):
  return sign.rpartition(' at ')[0]


def _host(sign):
  """The host that a sign of life names; '' for none."""
  match = re.fullmatch(r'process \d+ on (\S+) at \d{1,12}\n', sign)
  return match[1] if match else ''


@contextlib.contextmanager
def _signs_of_life(signs, what):
  """Within it a thread writes, again and again, who is at work and when. what: for the error of
  the first time.
  """
  process = f'process {os.getpid()} on {socket.gethostname()}'
  ended = threading.Event()

  def sign():
    return f'{process} at {time.time():.0f}\n'

  def keep_beating():
    while not ended.wait(_BEAT_S):
      with contextlib.suppress(OSError, InputError):  # the disk may be full for a while, or away
        signs.write_sign(sign())

  with files.writing(what):
    signs.write_sign('')
    signs.write_sign(sign())
  thread = threading.Thread(target=keep_beating, name='signs-of-life', daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    with contextlib.suppress(OSError, InputError):
      signs.write_sign('')

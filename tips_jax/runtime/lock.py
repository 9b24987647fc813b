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

from tips_jax.core import files
from tips_jax.core.errors import InputError, PassingError
from tips_jax.runtime.peers import Peers

FILE = '.lock'  # names the process that holds it, and when that last gave a sign of life
_BEAT_S = 20
# A run that is silent for so long is over. Mounted buckets show a change after up to a minute.
_SILENT_S = 90
_LOOK_S = 1


@contextlib.contextmanager
def held(workdir: pathlib.Path, flag: str, peers: Peers) -> Iterator[None]:
  """Within it no other run can be in the work folder: InputError, which names `flag`, where one is,
  and PassingError where it is on another host.

  On one host the system takes the lock of process 0 back when that ends, however it ends. Other
  hosts may not see the lock; they go by the signs of life in the file, and wait until a run that
  was killed has been silent for long enough.
  """
  if not peers.lead:
    peers.barrier('locked')
    yield
    return
  path = workdir / FILE
  what = f'{flag}: cannot write {str(path)!r}'
  with files.writing(what):
    file = open(path, 'a')
  with file:
    locked = True
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise InputError(f'{_at_work(workdir, flag, _sign(path))} of that one') from None
    except OSError:  # a file system without locks
      locked = False
    if not locked or _host(_sign(path)) != socket.gethostname():
      _wait_for_silence(workdir, flag)
    with _signs_of_life(path, what):
      peers.barrier('locked')
      yield


def _wait_for_silence(workdir, flag):
  """Returns when the run that the file names, if any, must be over; PassingError once it gives
  another sign of life.
  """
  path = workdir / FILE
  sign = _sign(path)
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
    latest = _sign(path)
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


def _sign(path):
  return path.read_text(errors='replace')


def _process(sign):
  return sign.rpartition(' at ')[0]


def _host(sign):
  """The host that a sign of life names; '' for none."""
  match = re.fullmatch(r'process \d+ on (\S+) at \d{1,12}\n', sign)
  return match[1] if match else ''


@contextlib.contextmanager
def _signs_of_life(path, what):
  """Within it a thread writes, again and again, who is at work and when. what: for the error of
  the first time.
  """
  process = f'process {os.getpid()} on {socket.gethostname()}'
  ended = threading.Event()

  def sign():
    return f'{process} at {time.time():.0f}\n'

  def write(text, mode):
    with open(path, mode) as file:
      file.write(text)

  def keep_beating():
    while not ended.wait(_BEAT_S):
      # All are of one length, and written over each other: a reader never finds an empty file.
      with contextlib.suppress(OSError):  # the disk may be full for a while, or away
        write(sign(), 'r+')

  with files.writing(what):
    write(sign(), 'w')
  thread = threading.Thread(target=keep_beating, name='signs-of-life', daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    with contextlib.suppress(OSError):
      write('', 'w')

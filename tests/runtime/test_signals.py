"""Signals at odd moments, and terminals that go away."""

import os
import pty
import subprocess
import sys

import pytest

PROGRAM = """
import gc, os, signal, weakref
from tips_jax.runtime.signals import Preemption, Stopped

signals = Preemption().install()

class Loop: pass

def within(_):  # what is raised here, Python ignores
  os.kill(os.getpid(), signal.SIGTERM)

loop = Loop()
reference = weakref.ref(loop, within)
try:
  with signals.interruptible():
    del loop
except Stopped:
  print('raised')
print(signals.requested)
class Other:
  def __del__(self): raise ValueError('ours')
Other()
"""


def test_it_is_noted_without_a_traceback_and_other_errors_are_shown():
  done = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, text=True)
  assert done.returncode == 0 and done.stdout.split()[-1] == 'True', done
  assert 'Stopped' not in done.stderr and 'ValueError: ours' in done.stderr


# As a shell starts a program: its terminal ends it, unless it is asked not to.
CONTROLLED = """
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
# A run in small: it works until it is asked to stop, says so at length, and saves.
SAVES = """
import pathlib, sys, time
from tips_jax.runtime import terminal
from tips_jax.runtime.signals import Preemption

terminal.survive()
signals = Preemption().install()
print('ready')
end = time.monotonic() + 60
while not signals.requested and time.monotonic() < end:
  time.sleep(0.01)
for _ in range(1000):
  print('stopping' * 10)
  print('stopping' * 10, file=sys.stderr)
pathlib.Path(sys.argv[1]).write_text(str(signals.requested))
sys.exit(75)
"""


def test_a_closed_terminal_is_a_signal_and_what_cannot_be_printed_costs_nothing(tmp_path):
  saved = tmp_path / 'saved'
  terminal, inside = pty.openpty()
  process = subprocess.Popen(
    [sys.executable, '-c', CONTROLLED + SAVES, str(saved)],
    stdin=inside,
    stdout=inside,
    stderr=inside,
    start_new_session=True,
  )
  os.close(inside)
  assert b'ready' in os.read(terminal, 1000)
  os.close(terminal)
  assert process.wait() == 75 and saved.read_text() == 'True'


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_output_on_a_full_disk_costs_nothing(tmp_path):
  saved = tmp_path / 'saved'
  with open('/dev/full', 'w') as full:
    command = [sys.executable, '-c', SAVES, str(saved)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=full, text=True)
  assert process.stdout.readline() == 'ready\n'
  process.stdout.close()  # a pipe that nobody reads
  process.terminate()
  assert process.wait() == 75 and saved.read_text() == 'True'


def test_an_ignored_hangup_is_left_alone():
  """As under nohup."""
  program = (
    'import os, signal; from tips_jax.runtime.signals import Preemption\n'
    'signal.signal(signal.SIGHUP, signal.SIG_IGN); signals = Preemption().install()\n'
    'os.kill(os.getpid(), signal.SIGHUP); print(signals.requested)'
  )
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
  assert done.stdout == 'False\n', done.stderr

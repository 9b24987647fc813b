"""A signal that arrives inside of a callback of the garbage collector."""

import subprocess
import sys

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

"""Tasks in several processes of this machine, which end with the one that started them."""

import multiprocessing
import multiprocessing.connection
import signal
import traceback
from collections.abc import Callable, Sequence

from tips_jax.core.errors import InputError, PassingError
from tips_jax.core.processes import end_with_parent
from tips_jax.data.ingest.tasks import Tasks, Tell

_LOOK_S = 1.0


def do(open_work: Callable[[], Tasks], numbers: Sequence[int], workers: int, tell: Tell) -> None:
  """Does the tasks `numbers` in their order, each in one of `workers` processes.

  `open_work` is sent to them. Raises the InputError of the first task that has one, and
  PassingError where a process is killed; the others then end at once.
  """
  # A fork would share the files that are open and the locks of threads.
  context = multiprocessing.get_context('spawn')
  # Images and bytes that each has read: each writes its own numbers alone.
  counters = context.RawArray('d', 2 * workers)
  told = [0, 0.0]
  todo = list(reversed(numbers))
  processes = {}
  try:
    for index in range(workers):
      ours, theirs = context.Pipe()
      process = context.Process(
        target=_work, args=(theirs, open_work, counters, index), daemon=True
      )
      process.start()
      theirs.close()
      processes[ours] = process
    busy = set(processes)
    while busy:
      for connection in multiprocessing.connection.wait(busy, timeout=_LOOK_S):
        _take(connection, processes[connection])
        if todo:
          connection.send(todo.pop())
        else:
          busy.remove(connection)
      total = (sum(counters[::2]), sum(counters[1::2]))
      tell(int(total[0] - told[0]), total[1] - told[1])
      told = total
  finally:
    for connection, process in processes.items():
      process.kill()
      process.join()
      connection.close()


def _take(connection, process):
  """Takes what a process says when it is ready for a task; raises what went wrong in it."""
  try:
    error = connection.recv()
  except (EOFError, ConnectionError):
    process.join()
    raise PassingError(
      f'--workers: a process died (exit code {process.exitcode}), as the system does where memory '
      f'runs out: run the same command again to go on, with fewer workers should it come back'
    ) from None
  if isinstance(error, BaseException):
    raise error


# --- in a process -------------------------------------------------------------------------------


def _work(connection, open_work, counters, index):
  # The first process stops the others.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  end_with_parent()

  def tell(images, size):
    counters[2 * index] += images
    counters[2 * index + 1] += size

  try:
    work = open_work()
    connection.send(None)
    while True:
      work.do(connection.recv(), tell)
      connection.send(None)
  except EOFError:
    pass
  except InputError as error:
    connection.send(error)
  except OSError as error:
    connection.send(InputError(f'cannot write the store ({error})'))
  except BaseException:
    connection.send(RuntimeError(f'in a process of --workers:\n{traceback.format_exc()}'))

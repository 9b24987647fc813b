"""What the command-line programs share: flags of their own, one line for bad input, and the exit
codes.
"""

import signal
import sys

from absl import flags

from tips_jax.core.errors import InputError


def run(work, argv, values, *, about, stopped):
  """Calls work(argv) and returns its exit code, or 0.

  values: the program's FlagValues; about: its help. Bad input is one line and 2; Ctrl-C prints
  `stopped` and is 130, SIGTERM 143.
  """
  if {'--help', '-h', '-help'} & set(argv):
    print(f'{about}\n{values.get_help()}')
    return 0
  before = signal.signal(signal.SIGTERM, _stop)
  try:
    return work(argv) or 0
  except (InputError, flags.Error) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt as stop:
    print(f'\nstopped: {stopped}', file=sys.stderr)
    return 143 if stop.args == ('SIGTERM',) else 130
  finally:
    signal.signal(signal.SIGTERM, before)


def parse(values, argv, hint=''):
  """Reads the command line into `values`, afresh; InputError for what is no flag."""
  values.unparse_flags()
  for name in values:
    values[name].unparse()
  rest = values(argv)[1:]
  if rest:
    raise InputError(f'arguments: got {rest[0]!r}; expected only flags, written --name=value{hint}')


def _stop(signum, frame):
  raise KeyboardInterrupt('SIGTERM')

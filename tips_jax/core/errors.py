"""The errors that a user can mend, and what the system says of a disk."""

import errno
import re

AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command may work later
# Somebody has to act. All other errors of a disk may pass: a network disk that is busy or away.
_LASTING = {
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.ENAMETOOLONG,
  errno.ENOTDIR,
  errno.EISDIR,
  errno.EEXIST,
  errno.ELOOP,
}
# As TensorStore and libraries in Rust write it.
_NUMBER = re.compile(r'\bOS error (\d+)', re.IGNORECASE)
_PASSING = re.compile(r'\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)\b')


class InputError(ValueError):
  """A flag, a config field or a file that does not fit. Programs print it as one line; exit code
  2.
  """

  code = 2

  def __init__(self, message: str):
    # Libraries write some of their reasons on several lines.
    super().__init__(' '.join(message.splitlines()))


class PassingError(InputError):
  """Nothing that a user has to mend: the same command may work later."""

  code = AGAIN


def disk_error(error: BaseException | None) -> int | None:
  """The errno of what the system said of a disk, also where a library wrapped it; None for any
  other error.
  """
  seen = set()
  # A failed save that is raised once more can be the context of itself.
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and error.errno:
      return error.errno
    number = _NUMBER.search(str(error))
    if number:
      return int(number[1])
    error = error.__cause__ or error.__context__
  return None


def may_pass(error: BaseException | None) -> bool:
  """Whether an error of a disk may be gone later."""
  number = disk_error(error)
  if number is None:
    return bool(_PASSING.search(str(error)))
  return number not in _LASTING

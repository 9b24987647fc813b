"""The shards of a data set: array_record files, each of which stays open while it is read."""

import os
import resource

from tips_jax.core.errors import InputError

_OTHER_FILES = 256  # that a process may open beside its shards: logs, checkpoints, sockets


def allow_open_files(where: str, count: int) -> None:
  """Raises this process's limit of open files so that `count` more fit, with its children's.

  Raises InputError where the system does not allow that many.
  """
  needed = len(os.listdir('/dev/fd')) + count + _OTHER_FILES
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if _at_least(soft, needed):
    return
  if not _at_least(hard, needed):
    raise InputError(
      f'{where}: got {count:,} shards, each an open file, and a limit of {hard:,} open files; '
      f'expected at least {needed:,}: raise it with `ulimit -n {needed}`, as root or in the '
      f"system's settings"
    )
  # macOS takes no unlimited number.
  limit = hard
  if hard == resource.RLIM_INFINITY:
    limit = needed
  resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _at_least(limit, needed):
  return limit == resource.RLIM_INFINITY or limit >= needed

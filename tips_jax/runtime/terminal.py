"""Output that may go away: a terminal that is closed, a pipe that nobody reads, a full disk."""

import io
import sys


class _Lasting(io.FileIO):
  """What cannot be written is dropped: a run has more to lose than its words."""

  def write(self, data):
    try:
      return super().write(data)
    except OSError:
      return len(data)


def survive() -> None:
  """From now on no print raises; what is written while the terminal is gone is lost."""
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name)
    if isinstance(stream, io.TextIOWrapper):
      stream.flush()
      raw = _Lasting(stream.fileno(), 'w', closefd=False)
      lasting = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors='backslashreplace',  # not every terminal has every letter
        line_buffering=True,
      )
      setattr(sys, name, lasting)

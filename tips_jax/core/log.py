"""What a run tells the outside: `metrics.jsonl` and TensorBoard for machines, one progress line for
people.
"""

import json
import math
import os
import pathlib
import shutil
import sys
import time

from tips_jax.core import files
from tips_jax.core.errors import InputError
from tips_jax.core.schema import Log

FILE = 'metrics.jsonl'


class Metrics:
  """Appends scalars to `workdir/metrics.jsonl`, one JSON object a line, and to TensorBoard.

  `resume_step`: the step of the restored checkpoint; later lines, which the resumed run writes
  again, are dropped in one atomic replacement. -1: a new run, earlier lines go. A line cut short by
  a kill goes too. Non-finite values are null in the file. Raises InputError where the folder cannot
  be written.
  """

  def __init__(self, workdir, *, config: Log, resume_step: int = -1):
    self.path = pathlib.Path(workdir) / FILE
    self._tensorboard = None
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      kept = ''.join(
        json.dumps(line) + '\n' for line in read(self.path) if line['step'] <= resume_step
      )
      files.write(self.path, kept)
      self._file = open(self.path, 'a')
      if config.tensorboard:
        from tensorboardX import SummaryWriter  # slow to import, and optional

        self._tensorboard = SummaryWriter(
          str(self.path.parent / 'tensorboard'), purge_step=max(resume_step + 1, 0)
        )
    except OSError as error:
      raise InputError(
        f'workdir: got {str(workdir)!r}; expected a writable folder ({error.strerror})'
      ) from None

  def write(self, step: int, values: dict) -> None:
    """Adds one line: `step` and the values (numbers, 0-d arrays or strings)."""
    values = {
      name: value if isinstance(value, str) else _number(value) for name, value in values.items()
    }
    try:
      self._file.write(
        json.dumps({'step': int(step), **{k: _finite(v) for k, v in values.items()}}) + '\n'
      )
      self._file.flush()
      if self._tensorboard:
        for name, value in values.items():
          if not isinstance(value, str):
            self._tensorboard.add_scalar(name, value, int(step))
    except OSError as error:
      raise InputError(f'{FILE}: cannot write {str(self.path)!r} ({error.strerror})') from None

  def close(self) -> None:
    self._file.close()
    if self._tensorboard:
      self._tensorboard.close()


def read(path) -> list[dict]:
  """The lines of a metrics file in order; a last line without its end is left out; no file: no
  lines.
  """
  try:
    text = pathlib.Path(path).read_text()
  except FileNotFoundError:
    return []
  lines = text.split('\n')[:-1]  # what follows the last newline was cut short
  try:
    return [json.loads(line) for line in lines if line]
  except json.JSONDecodeError as error:
    raise InputError(
      f'{path}: got a line that is not JSON ({error}); expected one object a line'
    ) from None


def evaluation(line: dict) -> dict[str, float | None]:
  """{metric: value} of a line that holds an evaluation; {} for any other line."""
  return {
    name.removeprefix('eval/'): value
    for name, value in line.items()
    if name.startswith('eval/') and name != 'eval/seconds'
  }


class Progress:
  """One line that fits the terminal: step/total, %, loss, ETA, images/s.

  Rewritten in place on a terminal; elsewhere (a log file) a plain line every `every_s` seconds and
  at the end. The ETA counts from the first `update`, so that compiling does not spoil it. `silent`:
  says nothing.
  """

  def __init__(
    self,
    total: int,
    *,
    label: str = 'step',
    every_s: float = 10.0,
    stream=None,
    silent: bool = False,
  ):
    self.total, self.label, self.every_s = total, label, every_s
    self.stream = open(os.devnull, 'w') if silent else stream or sys.stderr
    self.tty = self.stream.isatty()
    self._first = None  # (time, step) of the first update
    self._shown_at = -math.inf
    self._line = ''
    self._open = False  # a line without its end stands on the terminal

  def update(self, step: int, *, loss=None, images_per_s=None, note: str = '') -> None:
    """Shows step `step` of the total, with whatever of the rest is given (raw: also nan and inf)."""
    now = time.monotonic()
    self._first = self._first or (now, step)
    parts = [f'{self.label} {step:,}/{self.total:,}', f'{100 * step / max(self.total, 1):.0f} %']
    if loss is not None:
      parts.append(f'loss {float(loss):.4g}')
    parts.append(f'ETA {self._eta(now, step)}')
    if images_per_s is not None:
      parts.append(f'{float(images_per_s):,.0f} images/s')
    if note:
      parts.append(note)
    self._line = '  '.join(parts)
    if now - self._shown_at < (0.1 if self.tty else self.every_s) and step < self.total:
      return
    self._shown_at = now
    if self.tty:
      width = self._width() - 1
      while len('  '.join(parts)) > width and len(parts) > 1:  # the last parts matter least
        parts.pop()
      self.stream.write('\r\x1b[2K' + self._bar(step, '  '.join(parts)[: max(width, 0)], width))
      self._open = True
    else:
      self.stream.write(self._line + '\n')
    self.stream.flush()

  def message(self, text: str) -> None:
    """Prints a line of its own; the progress line comes back below it with the next update."""
    self.stream.write(('\r\x1b[2K' if self._open else '') + text + '\n')
    self.stream.flush()
    self._open, self._shown_at = False, -math.inf if self.tty else self._shown_at

  def close(self) -> None:
    if self._open:
      self.stream.write('\n')
      self.stream.flush()
      self._open = False

  def _eta(self, now, step):
    start, first = self._first
    if step >= self.total:
      return '0:00'
    if step <= first:
      return '-'
    return _clock((now - start) / (step - first) * (self.total - step))

  def _bar(self, step, text, width):
    room = min(width - len(text) - 2, 24)
    if room < 8:
      return text
    done, left = (
      ('━', '─') if 'utf' in (getattr(self.stream, 'encoding', '') or '').lower() else ('=', '-')
    )
    full = min(int(room * step / max(self.total, 1)), room)
    return f'{done * full}{left * (room - full)}  {text}'

  def _width(self):
    try:
      return os.get_terminal_size(self.stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
      return shutil.get_terminal_size().columns


def _clock(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'


def _number(value):
  return value.item() if hasattr(value, 'item') else value


def _finite(value):
  return None if isinstance(value, float) and not math.isfinite(value) else value

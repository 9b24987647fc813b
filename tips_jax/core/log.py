"""Metrics logging and progress display: metrics.jsonl, TensorBoard, one line on the terminal."""

import collections
import contextlib
import json
import math
import os
import pathlib
import shutil
import sys
import time
from typing import TextIO

from tips_jax.core import files
from tips_jax.core.errors import InputError, PassingError
from tips_jax.core.schema import Log

FILE = 'metrics.jsonl'
_BUFFER = 1 << 20  # bytes


class Metrics:
  """Appends scalars to `workdir/metrics.jsonl`, one JSON object a line, and to TensorBoard.

  Non-finite values are null in the file. Errors of the disk are those of `files.writing`.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    config: Log,
    # Step of the restored checkpoint: later lines, which the resumed run writes again, are dropped,
    # and so is a line that a kill has cut short. -1: a new run, all earlier lines go.
    resume_step: int = -1,
  ):
    self.path = pathlib.Path(workdir) / FILE
    self._events = None
    with self._writing():
      self.path.parent.mkdir(parents=True, exist_ok=True)
      kept = ''
      lines, damaged = _lines(self.path)
      if damaged:
        _set_aside(self.path, damaged)
      for line in lines:
        if line['step'] <= resume_step:
          kept += json.dumps(line) + '\n'
      files.write(self.path, kept)
      # Lines that a busy disk does not take wait in the buffer.
      self._file = open(self.path, 'ab', buffering=_BUFFER)
      if config.tensorboard:
        self._events = _Events(self.path.parent / 'tensorboard', max(resume_step + 1, 0))

  def _writing(self):
    return files.writing(f'workdir: cannot write metrics in {str(self.path.parent)!r}')

  def write(self, step: int, values: dict) -> None:
    """Adds one line: `step` and the values (numbers, 0-d arrays or strings).

    On disk at once, or with the next `flush` where the disk is busy.
    """
    values = {name: _number(value) for name, value in values.items()}
    line = {'step': int(step)}
    for name, value in values.items():
      line[name] = _finite(value)
    with self._writing():
      self._file.write(json.dumps(line).encode() + b'\n')
      if self._events:
        self._events.add(int(step), values)
    with contextlib.suppress(PassingError):
      self.flush()

  def flush(self) -> None:
    """All lines are on disk: a kill after this loses none. PassingError where the disk is busy."""
    with self._writing():
      self._file.flush()
      if self._events:
        self._events.flush()

  def close(self) -> None:
    """Closes both files."""
    with self._writing():
      self._file.close()
      if self._events:
        self._events.close()


class _Events:
  """TensorBoard's file of events.

  Not tensorboardX's SummaryWriter: its thread ends with the first error of the disk, and then `add`
  waits for that thread for ever.
  """

  def __init__(self, folder, first_step):
    # Slow to import, and optional.
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    self._event = event_pb2.Event
    self._scalar = summary.scalar
    folder.mkdir(exist_ok=True)
    self._writer = event_file_writer.EventsWriter(str(folder / 'events'))
    # What an earlier start has written of this step and later ones counts no more.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step=first_step, session_log=start)

  def add(self, step, values):
    for name, value in values.items():
      if not isinstance(value, str):
        self._write(step=step, summary=self._scalar(name, value))

  def _write(self, **fields):
    self._writer.write_event(self._event(wall_time=time.time(), **fields))

  def flush(self):
    self._writer.flush()

  def close(self):
    self._writer.close()


def _set_aside(path, damaged):
  """Moves damaged lines out of the way of a run that goes on: nothing is lost."""
  aside = path.with_name('metrics.damaged')
  with open(aside, 'ab') as file:
    for text in damaged:
      file.write(text + b'\n')
  print(f'{path}: damaged lines, now in {aside.name}: {len(damaged)}', file=sys.stderr)


def read(path: str | pathlib.Path) -> list[dict]:
  """The lines of a metrics file in order; no file: no lines.

  A last line without its end and damaged lines are left out; InputError where all are damaged.
  """
  return _lines(pathlib.Path(path))[0]


def _lines(path):
  """(the lines of a metrics file, its damaged lines as they are)."""
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    return [], []
  whole = []
  damaged = []
  for text in data.split(b'\n')[:-1]:  # what follows the last newline was cut short
    line = _measured(text)
    if line is not None:
      whole.append(line)
    elif text:
      damaged.append(text)
  if damaged and not whole:
    raise InputError(
      f'{path}: got lines that are not JSON objects with a step, such as {damaged[0][:80]!r}; '
      f'expected one object a line'
    )
  return whole, damaged


def _measured(text):
  """The content of a line of a metrics file; None where it is none that Metrics wrote."""
  try:
    line = json.loads(text.decode())
  except (ValueError, RecursionError):
    return None
  if not isinstance(line, dict) or type(line.get('step')) is not int:
    return None
  for value in evaluation(line).values():
    if type(value) not in (int, float, type(None)):
      return None
  return line


def evaluation(line: dict) -> dict[str, float | None]:
  """{metric: value} of a line that holds an evaluation; {} for any other line."""
  return {
    name.removeprefix('eval/'): value
    for name, value in line.items()
    if name.startswith('eval/') and name != 'eval/seconds'
  }


class UniqueLines:
  """Appends rows to a .jsonl file, each one once, also when a run is resumed."""

  def __init__(self, path: pathlib.Path):
    # Read once, here: the file may list very many rows, and `add` is called between two steps.
    self._path = path
    data = b''  # bytes: a damaged line may be no text
    if path.exists():
      data = path.read_bytes()
    complete, newline, cut = data.rpartition(b'\n')
    if cut:  # by a kill
      files.write(path, complete + newline)
    self._lines = set(complete.split(b'\n'))

  def add(self, row: dict) -> None:
    """Writes a row as one line of JSON, unless the file has that line."""
    line = json.dumps(row).encode()
    if line in self._lines:
      return
    self._lines.add(line)
    with files.writing(f'cannot write {str(self._path)!r}'), open(self._path, 'ab') as file:
      file.write(line + b'\n')


# Columns of the progress line at most, however wide the terminal is.
_COLUMNS = 100


class Progress:
  """One line that fits the terminal: step/total, %, losses, ETA, images per second.

  Rewritten in place on a terminal; elsewhere (a log file) a plain line every `every_s` seconds and
  at the end. The ETA counts from the first `update`, so that compiling does not spoil it.
  """

  def __init__(
    self,
    total: int,
    *,
    # What is counted.
    label: str = 'step',
    every_s: float = 10.0,
    stream: TextIO | None = None,
    # Says nothing: all processes of a run but the first.
    silent: bool = False,
  ):
    self.total = total
    self.label = label
    self.every_s = every_s
    self.stream = stream or sys.stderr
    if silent:
      self.stream = open(os.devnull, 'w')
    self.tty = self.stream.isatty()
    # (time, step) of the first update.
    self._first: tuple[float, int] | None = None
    self._shown_at = -math.inf
    # The cursor is behind a line without its end.
    self._open = False

  def update(
    self,
    step: int,
    *,
    losses: dict[str, float] | None = None,
    images_per_s: float | None = None,
    note: str = '',
  ) -> None:
    """Shows step `step` of the total, with whatever of the rest is given (also nan and inf)."""
    now = time.monotonic()
    if self._first is None:
      self._first = now, step
    interval = self.every_s
    if self.tty:
      interval = 0.1
    if now - self._shown_at < interval and step < self.total:
      return
    self._shown_at = now
    rest = [f'ETA {self._eta(now, step)}']
    if images_per_s is not None:
      rest.append(f'{float(images_per_s):,.0f} img/s')
    if note:
      rest.append(note)
    self._show(step, losses or {}, rest)
    self.stream.flush()

  def _show(self, step, losses, rest):
    count = f'{self.label} {step:,}/{self.total:,}'
    percent = f'{100 * step / max(self.total, 1):.0f} %'
    full = []
    short = []
    # contrastive_web and contrastive_synthetic are 'web' and 'synthetic' where space is short.
    for name, short_name in _short_names(losses).items():
      full.append(f'{name} {losses[name]:.3g}')
      short.append(f'{short_name} {losses[name]:.3g}')
    # From the best line to the shortest; on a terminal the last parts then go, one by one.
    lines = [
      [count, percent, *full, *rest],
      [count, *full, *rest],
      [count, percent, *short, *rest],
      [count, *short, *rest],
    ]
    width = _COLUMNS
    if self.tty:
      width = min(width, self._width() - 1)
    parts = next((parts for parts in lines if len('  '.join(parts)) <= width), lines[-1])
    if not self.tty:
      self.stream.write('  '.join(parts) + '\n')
      return
    while len('  '.join(parts)) > width and len(parts) > 1:
      parts.pop()
    self.stream.write('\r\x1b[2K' + self._bar(step, '  '.join(parts)[: max(width, 0)], width))
    self._open = True

  def message(self, text: str) -> None:
    """Prints a line of its own; the progress line comes back below it with the next update."""
    if self._open:
      self.stream.write('\r\x1b[2K')
      self._open = False
    self.stream.write(text + '\n')
    self.stream.flush()
    if self.tty:
      self._shown_at = -math.inf

  def close(self) -> None:
    """Ends the line on the terminal."""
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
    length = min(width - len(text) - 2, 24)
    if length < 8:
      return text
    done = '='
    left = '-'
    if 'utf' in (getattr(self.stream, 'encoding', '') or '').lower():
      done = '━'
      left = '─'
    full = min(int(length * step / max(self.total, 1)), length)
    return f'{done * full}{left * (length - full)}  {text}'

  def _width(self):
    try:
      return os.get_terminal_size(self.stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
      return shutil.get_terminal_size().columns


def _short_names(losses):
  """{name: the same without a first word that it shares with others}."""
  first = collections.Counter(name.partition('_')[0] for name in losses)
  names = {}
  for name in losses:
    word, _, others = name.partition('_')
    names[name] = name
    if others and first[word] > 1:
      names[name] = others
  return names


def spent(line: dict) -> str:
  """Where the time of a run went, of a line with `goodput` and `run_seconds` (train/clock.py)."""
  share = line['goodput']
  seconds = line['run_seconds']
  return (
    f'goodput {100 * share:.0f} %: {_clock(share * seconds)} of the {_clock(seconds)} since the '
    'first start went into steps that count'
  )


def _clock(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}h{minutes:02d}m'
  return f'{minutes}:{seconds:02d}'


def _number(value):
  return value.item() if hasattr(value, 'item') else value


def _finite(value):
  """JSON has no nan and no inf."""
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value

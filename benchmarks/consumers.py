"""What a step's time went into, of a trace that jax's profiler wrote: by part of the method, and by
kernel.

A kernel names the instruction of the compiled program that it is of, or is named after it; the
program says of an instruction which pass or loss it belongs to (tips_jax/planning/parts.py).
"""

import collections
import pathlib
import re

from tips_jax.planning import parts
from tips_jax.train.method import Method

TOP = 20
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.MULTILINE)


def read(folder: str, program: str, method: Method, *, steps: int) -> dict:
  """Milliseconds a step and shares of the time in which anything ran.

  folder: of the trace; program: text of the compiled program; steps: how many were traced.
  """
  events = _events(folder)
  origin = {}
  for name, op_name in _INSTRUCTION.findall(program):
    origin[name] = origin[_as_kernel(name)] = op_name
  kernels = collections.Counter()
  counts = collections.Counter()
  by_part = collections.Counter()
  unknown = 0.0
  for name, instruction, begin, end in events:
    # Of several kernels of an instruction each has a number behind its name.
    names = instruction, name, _as_kernel(name), re.sub(r'_\d+$', '', name)
    op_name = next((origin[one] for one in names if one in origin), '')
    part = parts.part(op_name, *parts.scopes(method))
    if not op_name:
      unknown += end - begin
      part = parts.Part('unknown', '', '')
    by_part[part.name, part.direction, part.layer] += end - begin
    kernels[name, op_name] += end - begin
    counts[name, op_name] += 1
  busy = _covered([event[2:] for event in events])
  total = sum(by_part.values()) or 1.0
  span = max((e[3] for e in events), default=0) - min((e[2] for e in events), default=0)
  milliseconds = lambda ns: round(ns / 1e6 / steps, 4)
  share = lambda ns: round(ns / total, 4)
  return dict(
    steps=steps,
    span_ms=milliseconds(span),
    busy_ms=milliseconds(busy),
    events_per_step=round(len(events) / steps),
    unknown_share=share(unknown),
    parts=[
      dict(part=name, direction=direction, layer=layer, ms=milliseconds(ns), share=share(ns))
      for (name, direction, layer), ns in by_part.most_common()
    ],
    kernels=[
      dict(
        kernel=name[:120],
        op_name=op_name[-160:],
        count=round(counts[name, op_name] / steps, 1),
        ms=milliseconds(ns),
        share=share(ns),
      )
      for (name, op_name), ns in kernels.most_common(TOP)
    ],
  )


def _as_kernel(name):
  """How XLA names a kernel after an instruction."""
  return re.sub(r'[.\-]', '_', name)


def _events(folder):
  """[(kernel, instruction or '', begin, end)] in nanoseconds, of the first device's streams; where
  there is none, of the instructions that a CPU ran.
  """
  import jax

  files = sorted(pathlib.Path(folder).rglob('*.xplane.pb'), key=lambda file: file.stat().st_mtime)
  if not files:
    return []
  planes = list(jax.profiler.ProfileData.from_file(str(files[-1])).planes)
  device = [plane for plane in planes if plane.name.startswith('/device:GPU')][:1]
  result = []
  for plane in device or planes:
    lines = list(plane.lines)
    # Beside the streams there may be lines that sum them up.
    streams = [line for line in lines if line.name.startswith('Stream')]
    for line in streams or lines:
      for event in line.events:
        stats = dict(event.stats)
        if device or 'hlo_op' in stats:
          end = event.start_ns + event.duration_ns
          result.append((event.name, str(stats.get('hlo_op', '')), event.start_ns, end))
  return _innermost(result)


def _innermost(events):
  """Without those of a name that others of the same line lie in: on a CPU a loop is one, too."""
  outer = ('while', 'call', 'conditional')
  return [event for event in events if not event[1].startswith(outer)]


def _covered(intervals):
  """Nanoseconds in which at least one of the intervals was under way."""
  total = 0.0
  until = float('-inf')
  for begin, end in sorted(intervals):
    total += max(0.0, end - max(begin, until))
    until = max(until, end)
  return total

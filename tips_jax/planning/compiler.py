"""Compiles the step for a mesh, ahead of time or for attached devices, and reads the result."""

import atexit
import contextlib
import dataclasses
import glob
import os
import pathlib
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from tips_jax.planning import cost, hlo, topologies

_LLO = (
  '--xla_jf_dump_to={} --xla_jf_dump_llo_text=true '
  '--xla_jf_dump_llo_pass_label_regex=^final_bundles'
)
# How XLA says that a program is too big: bytes in all (arguments are among them), and the bytes
# that there are.
_TOO_BIG = (
  r'required for [\w ]+ \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)',
  r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm',
  r'allocate ([\d.]+)([KMGT]?)i?B.{0,200}?(?:limit|available|only)\D*([\d.]+)([KMGT]?)i?B',
)
_schedules = None  # folder that libtpu writes kernels' schedules to; fixed once it is loaded


@dataclasses.dataclass(frozen=True)
class Compiled:
  module: hlo.Module
  schedules: dict  # kernel -> cycles
  stats: dict  # bytes per device: arguments, outputs, aliases, temporaries, code
  peak: list  # [(bytes, op_name, opcode, Array or None)] that are alive at the fullest moment
  seconds: float


class TooBig(Exception):
  """The program does not fit: bytes used, and the bytes that a program may use."""

  def __init__(self, used, limit, seconds, text):
    super().__init__(text)
    self.used, self.limit, self.seconds, self.text = used, limit, seconds, text


def prepare() -> None:
  """Environment for compiling without a TPU; call it before libtpu is loaded, else kernels have no
  schedules.
  """
  global _schedules
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault(
    'TPU_WORKER_HOSTNAMES', 'localhost'
  )  # else libtpu asks a server that is not there
  os.environ.setdefault(
    'TPU_ACCELERATOR_TYPE', 'v5litepod-4'
  )  # says nothing about what is compiled for
  if _schedules is None:
    _schedules = tempfile.mkdtemp(prefix='tips_plan_')
    atexit.register(shutil.rmtree, _schedules, ignore_errors=True)
    os.environ['LIBTPU_INIT_ARGS'] = ' '.join(
      [os.environ.get('LIBTPU_INIT_ARGS', ''), _LLO.format(_schedules)]
    ).strip()


def compile_step(
  lowered: jax.stages.Lowered,
  *,
  platform: str,
  dump: Any = '',
  say: Callable[[str], None] = lambda text: None,
  options: Any = None,
) -> Any:
  """Compiled from jax's Lowered.

  Args:
    platform: 'tpu', 'gpu' or 'cpu'.
    dump: folder that keeps the optimized HLO.
    say: called with a line now and then.
    options: of the compiler, beside the dump's.
  Raises: TooBig.
  """
  folder = pathlib.Path(dump or tempfile.mkdtemp(prefix='tips_plan_hlo_'))
  folder.mkdir(parents=True, exist_ok=True)
  clean(_schedules)
  asked = {'xla_dump_to': str(folder), 'xla_dump_hlo_as_text': True} if platform == 'tpu' else {}
  begin = time.time()
  try:
    with _clock(say), topologies.hidden_flags() if platform == 'tpu' else contextlib.nullcontext():
      compiled = lowered.compile(compiler_options=asked | (options or {}))
    seconds = time.time() - begin
    text = read(folder, 'after_codegen') or compiled.as_text()
    if dump and platform != 'tpu':
      (folder / 'step.after_optimizations.txt').write_text(text)
    module = hlo.parse(text)
    found = compiled.memory_analysis()
    parts = ('argument', 'output', 'alias', 'temp', 'generated_code')
    stats = {p: getattr(found, f'{p}_size_in_bytes', 0) for p in parts}
    return Compiled(module, schedules(module), stats, peak(folder, module), seconds)
  except Exception as error:  # jax raises its runtime error, of several names
    used = next((m for m in (re.search(p, str(error), re.S) for p in _TOO_BIG) if m), None)
    if not used:
      raise
    unit = lambda n, letter: float(n) * 1024 ** ' KMGT'.index(letter or ' ')
    raise TooBig(
      unit(*used.groups()[:2]), unit(*used.groups()[2:]), time.time() - begin, str(error)
    ) from None
  finally:
    clean(_schedules)
    if not dump:
      shutil.rmtree(folder, ignore_errors=True)


def clean(folder: str | None) -> None:
  for path in glob.glob(f'{folder}/*') if folder else ():
    os.remove(path)


def read(folder: str | os.PathLike, stage: str) -> str:
  """The text of the biggest module that was dumped at a stage, or ''."""
  found = glob.glob(f'{folder}/*{stage}.txt')
  return pathlib.Path(max(found, key=os.path.getsize)).read_text() if found else ''


def schedules(module: hlo.Module) -> dict[str, int]:
  """{kernel: cycles} from what libtpu has just written; the compiler's own estimates leave kernels
  out.
  """
  kernels = {
    r.instruction.name: (re.search(r'"body":"([^"]*)"', r.instruction.rest), r.instruction.arrays)
    for r in module.runs
    if r.instruction.target in cost.KERNELS
  }
  kernels = {
    name: (body and body[1], [(a.dtype, a.dims) for a in arrays])
    for name, (body, arrays) in kernels.items()
  }
  result = {}
  for path in glob.glob(f'{_schedules}/*final_bundles.txt') if _schedules else ():
    name = re.fullmatch(r'\d+-(.*)-\d+-final_bundles\.txt', os.path.basename(path))
    if name and name[1] in kernels:
      result[name[1]] = cost.schedule(pathlib.Path(path).read_text())
  # Of kernels that are the same, libtpu writes one.
  for name in kernels.keys() - result.keys():
    twins = [t for t in result if kernels[t] == kernels[name]]
    if twins:
      result[name] = result[twins[0]]
  return result


def peak(folder: str | os.PathLike, module: hlo.Module) -> list[tuple]:
  """What is alive at the fullest moment, from the buffer assignment: bytes, op_name, opcode and
  Array of each value.
  """
  assignment, ranges = read(folder, 'buffer-assignment'), read(folder, 'live-range')
  if not assignment or not ranges:
    return []
  alive = {
    n: (int(a), int(b)) for n, a, b in re.findall(r'^\s+(\S+?)(?:\{\})?:(\d+)-(\d+)$', ranges, re.M)
  }
  values = []
  for block in re.split(r'^allocation ', assignment, flags=re.M)[1:]:
    head = block[: block.index('\n')]
    if 'preallocated-temp' not in head or re.search(r'color [1-9]', head):
      continue
    for name, size, offset in re.findall(
      r'value: <\d+ (\S+)(?: \([^)]*\))? @\d+> \(size=(\d+),offset=(\d+)\)', block
    ):
      if name.removesuffix('{}') in alive:
        values.append((name, int(size), int(offset), *alive[name.removesuffix('{}')]))
  return [(size, *_origin(module, name)) for name, size in _fullest(values)]


def _fullest(values):
  """Names and sizes of the values at the moment with the most bytes; of those that share a place,
  the biggest.
  """
  events = sorted(
    [(v[3], 1, k) for k, v in enumerate(values)] + [(v[4] + 1, 0, k) for k, v in enumerate(values)]
  )
  places, total, best, moment = {}, 0, -1, 0
  for at, starts, k in events:
    _, size, offset, _, _ = values[k]
    here = places.setdefault(offset, {})
    before = max(here.values(), default=0)
    if starts:
      here[k] = size
    else:
      here.pop(k, None)
    total += max(here.values(), default=0) - before
    if starts and total > best:
      best, moment = total, at
  chosen = {}
  for name, size, offset, begin, end in values:
    if begin <= moment <= end and size > chosen.get(offset, ('', -1))[1]:
      chosen[offset] = name, size
  return list(chosen.values())


def _origin(module, value):
  """(op_name, opcode, Array) of a value such as 'while.12{3}'; of a copy, those of its source."""
  name, _, index = value.rstrip('}').partition('{')
  computation = next((c for c in module.computations.values() if name in c), {})
  first = i = computation.get(name)
  while (
    i is not None
    and not i.op_name
    and i.operands
    and i.opcode in ('copy', 'copy-start', 'copy-done', 'bitcast')
  ):
    i = computation.get(i.operands[0])
  if i is None:
    return '', '', None
  if i.opcode == 'get-tuple-element' and i.operands[0] in computation:
    i = computation[i.operands[0]] if not i.op_name else i
  position = int(index.split(',')[0]) if index.strip() else 0
  return i.op_name, i.opcode, first.arrays[position] if position < len(first.arrays) else None


@contextlib.contextmanager
def _clock(say):
  """Says every 15 seconds how long it has taken."""
  done, begin = threading.Event(), time.time()

  def tick():
    while not done.wait(15):
      say(f'compiling: {time.time() - begin:.0f} s')

  thread = threading.Thread(target=tick, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def progress(text: str) -> None:
  print(text, file=sys.stderr, flush=True)

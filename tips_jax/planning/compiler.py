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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from tips_jax.planning import cost, hlo, topologies
from tips_jax.train import lowering

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

  def __init__(self, used: float, limit: float, seconds: float, text: str):
    super().__init__(text)
    self.used = used
    self.limit = limit
    self.seconds = seconds


def prepare() -> None:
  """Environment for compiling without a TPU; call it before libtpu is loaded, else kernels have no
  schedules.
  """
  global _schedules
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  # Else libtpu asks a server that is not there.
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  # It says nothing about what is compiled for.
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
  if _schedules is None:
    _schedules = tempfile.mkdtemp(prefix='tips_plan_')
    atexit.register(shutil.rmtree, _schedules, ignore_errors=True)
    given = os.environ.get('LIBTPU_INIT_ARGS', '')
    os.environ['LIBTPU_INIT_ARGS'] = f'{given} {_LLO.format(_schedules)}'.strip()


def compile_step(
  lowered: jax.stages.Lowered,
  *,
  platform: str,
  dump: Any = '',
  say: Callable[[str], None] = lambda text: None,
  options: Any = None,
) -> Compiled:
  """Compiles jax's Lowered and reads what the compiler tells about the program.

  Args:
    platform: of the devices: 'tpu', 'gpu' or any other.
    dump: folder that keeps the optimized HLO.
    say: called with a line now and then.
    options: of the compiler, beside the dump's.
  Raises: TooBig.
  """
  folder = pathlib.Path(dump or tempfile.mkdtemp(prefix='tips_plan_hlo_'))
  folder.mkdir(parents=True, exist_ok=True)
  clean(_schedules)
  settings = {}
  environment = contextlib.nullcontext()
  if platform in ('tpu', 'gpu'):
    # Only the dump has the buffer assignment; executables give their text alone.
    settings = {'xla_dump_to': str(folder), 'xla_dump_hlo_as_text': True}
  if platform == 'tpu':
    environment = topologies.hidden_flags()
  begin = time.time()
  try:
    with _clock(say), environment:
      compiled = lowered.compile(compiler_options=settings | (options or {}))
    seconds = time.time() - begin
    text = read(folder, 'after_codegen') or compiled.as_text()
    if dump and platform != 'tpu':
      (folder / 'step.after_optimizations.txt').write_text(text)
    module = hlo.parse(text)
    analysis = compiled.memory_analysis()
    stats = {}
    for kind in ('argument', 'output', 'alias', 'temp', 'generated_code'):
      stats[kind] = getattr(analysis, f'{kind}_size_in_bytes', 0)
    return Compiled(module, schedules(module), stats, peak(folder, module), seconds)
  except Exception as error:  # jax raises its runtime error, of several names
    refused = lowering.refused_option(error)
    if refused:
      raise refused from None
    sizes = _too_big(str(error))
    if not sizes:
      raise
    raise TooBig(*sizes, time.time() - begin, str(error)) from None
  finally:
    clean(_schedules)
    if not dump:
      shutil.rmtree(folder, ignore_errors=True)


def _too_big(message: str) -> tuple[float, float] | None:
  """Bytes (used, available) of an error about memory; None for any other."""
  for pattern in _TOO_BIG:
    match = re.search(pattern, message, re.S)
    if match:
      used, used_unit, limit, limit_unit = match.groups()
      return _bytes(used, used_unit), _bytes(limit, limit_unit)
  return None


def _bytes(number: str, unit: str) -> float:
  return float(number) * 1024 ** ' KMGT'.index(unit or ' ')


def clean(folder: str | None) -> None:
  if folder:
    for path in pathlib.Path(folder).iterdir():
      path.unlink()


def read(folder: str | os.PathLike, stage: str) -> str:
  """The text of the biggest module that was dumped at a stage, or ''."""
  paths = glob.glob(f'{folder}/*{stage}.txt')
  if not paths:
    return ''
  return pathlib.Path(max(paths, key=os.path.getsize)).read_text()


def schedules(module: hlo.Module) -> dict[str, int]:
  """{kernel: cycles} from what libtpu has just written; the compiler's own estimates leave kernels
  out.
  """
  if not _schedules:
    return {}
  programs = {}  # kernel -> its program and shapes, the same for kernels that are the same
  for run in module.runs:
    i = run.instruction
    if i.target in cost.KERNELS:
      shapes = tuple((a.dtype, a.dims) for a in i.arrays)
      programs[i.name] = (i.search(r'"body":"([^"]*)"'), shapes)
  result = {}
  cycles = {}  # program -> cycles
  for path in pathlib.Path(_schedules).glob('*final_bundles.txt'):
    name = re.fullmatch(r'\d+-(.*)-\d+-final_bundles\.txt', path.name)
    if name and name[1] in programs:
      result[name[1]] = cycles[programs[name[1]]] = cost.schedule(path.read_text())
  # Of kernels that are the same, libtpu writes one.
  for name, program in programs.items():
    if name not in result and program in cycles:
      result[name] = cycles[program]
  return result


@dataclasses.dataclass(frozen=True)
class _Value:
  """A value of the buffer assignment."""

  name: str
  size: int  # bytes
  offset: int  # in its allocation
  begin: int  # first and last moment at which it is alive
  end: int


def peak(folder: str | os.PathLike, module: hlo.Module) -> list[tuple]:
  """What is alive at the fullest moment, from the buffer assignment: bytes, op_name, opcode and
  Array of each value.
  """
  assignment = read(folder, 'buffer-assignment')
  ranges = read(folder, 'live-range')
  alive = {}
  for name, begin, end in re.findall(r'^\s+(\S+?)(?:\{\})?:(\d+)-(\d+)$', ranges, re.M):
    alive[name] = (int(begin), int(end))
  values = []
  for block in re.split(r'^allocation ', assignment, flags=re.M)[1:]:
    head = block[: block.index('\n')]
    # Other colors are memories on the chip.
    if 'preallocated-temp' not in head or re.search(r'color [1-9]', head):
      continue
    for name, size, offset in re.findall(
      r'value: <\d+ (\S+)(?: \([^)]*\))? @\d+> \(size=(\d+),offset=(\d+)\)', block
    ):
      if name.removesuffix('{}') in alive:
        values.append(_Value(name, int(size), int(offset), *alive[name.removesuffix('{}')]))
  return [(value.size, *_origin(module, value.name)) for value in _fullest(values)]


def _fullest(values: Sequence[_Value]) -> list[_Value]:
  """The values at the moment with the most bytes; of those that share a place, the biggest."""
  events = []  # (moment, whether it begins, index): at one moment, ends come before beginnings
  for k, value in enumerate(values):
    events += [(value.begin, True, k), (value.end + 1, False, k)]
  places = {}  # offset -> {index: size} of the values that are alive there
  total = 0
  best = -1
  moment = 0
  for at, begins, k in sorted(events):
    place = places.setdefault(values[k].offset, {})
    before = max(place.values(), default=0)
    if begins:
      place[k] = values[k].size
    else:
      place.pop(k, None)
    total += max(place.values(), default=0) - before
    if begins and total > best:
      best = total
      moment = at
  largest = {}  # offset -> value
  for value in values:
    if value.begin <= moment <= value.end:
      other = largest.get(value.offset)
      if other is None or value.size > other.size:
        largest[value.offset] = value
  return list(largest.values())


def _origin(module: hlo.Module, value: str) -> tuple[str, str, hlo.Array | None]:
  """(op_name, opcode, Array) of a value such as 'while.12{3}'; of a copy, those of its source."""
  name, _, index = value.rstrip('}').partition('{')
  computation = module.scope(name)
  first = i = computation.get(name)
  # The compiler's own copies have no op_name.
  while (
    i is not None
    and not i.op_name
    and i.operands
    and i.opcode in ('copy', 'copy-start', 'copy-done', 'bitcast')
  ):
    i = computation.get(i.operands[0])
  if i is None:
    return '', '', None
  if i.opcode == 'get-tuple-element' and not i.op_name:
    i = computation.get(i.operands[0], i)
  position = int(index.split(',')[0] or 0)
  array = None
  if position < len(first.arrays):
    array = first.arrays[position]
  return i.op_name, i.opcode, array


@contextlib.contextmanager
def _clock(say: Callable[[str], None]) -> Iterator[None]:
  """Says every 15 seconds how long it has taken."""
  done = threading.Event()
  begin = time.time()

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

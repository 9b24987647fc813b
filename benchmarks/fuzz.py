"""Damaged inputs for every reader: each one is read, or refused in one line.

  python benchmarks/fuzz.py [--inputs=10000 --seed=0 --reader=csv --only=17 --keep=FOLDER]

Valid inputs of benchmarks/fuzz_inputs.py are damaged (bits, cuts, splices, numbers, other kinds of
values, nesting) and read one by one in a worker process, which is killed after 20 s and begun anew
when it dies. Faults: a traceback, an error of several lines, a hang, more than 2 GB, a dead
process, another program that is started, anything written outside of the input's folder. Prints a
table by reader, then each fault once with the number that repeats it (--reader, --seed and --only);
exit code 1 where there is one. --keep: copies of the inputs with faults.
"""

import argparse
import collections
import faulthandler
import gzip
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback

LIMIT_S = 20
LIMIT_BYTES = 2 * 10**9
ODD = [None, True, -1, 0, 10**30, 1e300, float('nan'), '', '../../outside', '\0', 'a\nb', [], {}]
EXTREMES = [b'0', b'-1', b'9' * 25, b'1e999', b'NaN', b'2147483648', b'18446744073709551615']
DEEP = [b'[' * 50_000, b'{"a":' * 20_000, b'(' * 50_000, b'"', b'\0' * 600, b'\xff\xfe', b'\r\n']


# --- damage -------------------------------------------------------------------------------------


def flip(rng: random.Random, data: bytearray) -> None:
  for _ in range(rng.choice((1, 1, 2, 8, 64))):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(rng: random.Random, data: bytearray) -> None:
  at = rng.randrange(len(data))
  end = rng.choice((len(data), at + rng.randrange(1, 65)))
  del data[at:end]


def splice(rng: random.Random, data: bytearray) -> None:
  at = rng.randrange(len(data))
  start = rng.randrange(len(data))
  piece = data[start : start + rng.choice((4, 64, 512, len(data)))]
  end = rng.choice((at, at + len(piece)))  # put in, or written over
  data[at:end] = piece


def number(rng: random.Random, data: bytearray) -> None:
  """A number in text becomes an extreme one, or bytes that may be a number."""
  written = list(re.finditer(rb'-?\d+(\.\d+)?', data))
  if written and rng.random() < 0.6:
    start, end = rng.choice(written).span()
    value = rng.choice((*EXTREMES, b'9' * (end - start), b'0' * (end - start)))
    data[start:end] = value
    return
  size = rng.choice((1, 2, 4, 8))
  at = rng.randrange(len(data))
  value = rng.choice((0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1))
  data[at : at + size] = value.to_bytes(size, rng.choice(('little', 'big')))


def nest(rng: random.Random, data: bytearray) -> None:
  at = rng.randrange(len(data))
  data[at:at] = rng.choice(DEEP)


def retype(rng: random.Random, data: bytearray) -> None:
  """A value somewhere in a JSON text becomes one of another kind, or vanishes."""
  lines = bytes(data).splitlines()
  row = rng.randrange(len(lines))
  content = [parsed(data)]
  if content != [None]:
    lines = [b'']
    row = 0
  else:
    content = [parsed(lines[row])]
    if content == [None]:
      return flip(rng, data)
  parent = content
  key = 0
  while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.8:
    parent = parent[key]
    key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
  if rng.random() < 0.2 and parent is not content:
    del parent[key]
  else:
    parent[key] = rng.choice(ODD)
  lines[row] = json.dumps(content[0]).encode()
  data[:] = b'\n'.join(lines)


def parsed(text: bytes) -> object:
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    return None


def damage(rng: random.Random, path: pathlib.Path) -> None:
  """Damages a file; of tars and gzip also what is inside, with the sums that fit."""
  data = bytearray(path.read_bytes())
  inside = path.suffix == '.gz' and rng.random() < 0.7
  if inside:
    data = bytearray(gzip.decompress(data))
  for _ in range(rng.choice((1, 1, 1, 2, 4))):
    if data:
      rng.choice((flip, cut, splice, number, nest, retype, retype))(rng, data)
  if '.tar' in path.name and rng.random() < 0.7:
    for at in range(0, len(data) - 511, 512):
      if data[at + 257 : at + 262] == b'ustar':
        data[at + 148 : at + 156] = b' ' * 8
        data[at + 148 : at + 156] = b'%06o\0 ' % sum(data[at : at + 512])
  path.write_bytes(gzip.compress(data) if inside else data)


# --- the worker ---------------------------------------------------------------------------------


def work(base: pathlib.Path, seed: int, connection) -> None:
  """Reads inputs, each a (reader, number) of the connection, and answers (outcome, detail)."""
  import platform
  import resource

  from benchmarks.fuzz_inputs import READERS

  output = os.open(base / 'output.txt', os.O_WRONLY | os.O_APPEND | os.O_CREAT)
  os.dup2(output, 1)
  os.dup2(output, 2)
  faulthandler.enable()  # into output.txt, where the process dies or hangs
  os.chdir(base / 'home')
  # More than is allowed, so that it is measured; and a bound for the machine's sake.
  resource.setrlimit(resource.RLIMIT_DATA, (3 * LIMIT_BYTES, 3 * LIMIT_BYTES))
  platform.processor()  # libraries ask for it, by a program, once
  events = []
  sys.addaudithook(lambda event, values: events.append(watch(base, event, values)))
  while True:
    name, index = connection.recv()
    reader = READERS[name]
    shutil.rmtree(base / 'input', ignore_errors=True)
    shutil.copytree(base / 'valid' / name, base / 'input')
    rng = random.Random(f'{seed} {name} {index}')
    files = sorted(path for path in (base / 'input').rglob('*') if path.is_file())
    if index >= 0:  # -1: as it is
      damage(rng, rng.choice(files))
    os.truncate(base / 'output.txt', 0)
    before = everything(base)
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak of memory starts anew
    start = memory('VmRSS')  # grows from input to input: libraries keep caches
    events.clear()
    connection.send(('begin', ''))
    outcome = read(reader, base / 'input')
    strange = ' '.join(filter(None, events)) or ' '.join(sorted(everything(base) ^ before))
    taken = memory('VmHWM') - start
    if taken > LIMIT_BYTES:
      outcome = ('memory', f'{taken / 1e9:.1f} GB')
    if strange:
      outcome = ('outside', strange)
    connection.send(outcome)


def memory(field: str) -> int:
  """Bytes of this process, by a field of /proc/self/status."""
  found = re.search(rf'{field}:\s+(\d+)', pathlib.Path('/proc/self/status').read_text())
  return int(found[1]) * 1024


def read(reader, folder: pathlib.Path) -> tuple[str, str]:
  try:
    reader.read(folder)
  except reader.refuses as error:
    lines = str(error).splitlines()
    return ('refused' if len(lines) == 1 else 'lines', ' / '.join(lines)[:300])
  except BaseException as error:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if 'tips_jax' in frame.filename] or frames
    reason = (str(error).splitlines() or [''])[0][:120]
    place = f'{pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}'
    return 'traceback', f'{place}: {type(error).__name__}: {reason}'
  return 'accepted', ''


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
TARGETS = {'os.mkdir': 0, 'os.rename': 1, 'os.link': 1, 'os.symlink': 1, 'os.remove': 0}
PROGRAMS = ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork')


def watch(base: pathlib.Path, event: str, values: tuple) -> str:
  """What an event of Python's audit does that no reader may do; '' for nothing."""
  if event in PROGRAMS:
    return f'{event} {values[0]!r}'
  if event == 'open' and (values[2] or 0) & WRITES:
    target = values[0]
  elif event in TARGETS:
    target = values[TARGETS[event]]
  else:
    return ''
  if isinstance(target, int) or os.fspath(target) == '/dev/null':
    return ''
  path = os.path.abspath(os.fsdecode(target))
  if path.startswith(f'{base}/'):  # the rest is seen in the folders
    return ''
  return f'{event} {path!r}'


def everything(base: pathlib.Path) -> set[str]:
  """All files and folders beside the input's folder."""
  found = set(os.listdir(base)) - {'input'}
  for folder in ('home', 'tmp'):
    found |= {f'{folder}/{name}' for name in os.listdir(base / folder)}
  return found


# --- the campaign -------------------------------------------------------------------------------


class Worker:
  """A process that reads; it is begun anew when it hangs or dies."""

  def __init__(self, base: pathlib.Path, seed: int):
    self._arguments = base, seed
    self._process = None

  def read(self, name: str, index: int) -> tuple[str, str]:
    if not self._process:
      context = multiprocessing.get_context('spawn')
      self._connection, theirs = context.Pipe()
      self._process = context.Process(target=work, args=(*self._arguments, theirs), daemon=True)
      self._process.start()
      theirs.close()
    self._connection.send((name, index))
    try:
      self._connection.recv()  # 'begin': the process is up, and the input is damaged
      if self._connection.poll(LIMIT_S):
        outcome = self._connection.recv()
        if outcome[0] == 'memory':
          self.close()
        return outcome
      os.kill(self._process.pid, signal.SIGABRT)
      self._process.join(5)
      outcome = 'hang', f'{self._place()}: over {LIMIT_S} s'
    except EOFError:
      self._process.join()
      code = self._process.exitcode
      reason = signal.Signals(-code).name if code < 0 else f'exit code {code}'
      outcome = 'died', f'{self._place()}: {reason}'
    self.close()
    return outcome

  def _place(self) -> str:
    """The innermost line of the package in what faulthandler wrote."""
    text = (self._arguments[0] / 'output.txt').read_text(errors='replace')
    found = re.search(r'tips_jax/\S*?(\w+\.py)", line (\d+)', text)
    return ':'.join(found.groups()) if found else '?'

  def close(self) -> None:
    if self._process:
      self._process.kill()
      self._process.join()
      self._process = None


def campaign(names: list[str], options: argparse.Namespace, base: pathlib.Path) -> bool:
  """Reads all inputs and prints the result; whether there was no fault."""
  from benchmarks.fuzz_inputs import READERS

  os.environ |= {'HOME': str(base / 'home'), 'TMPDIR': str(base / 'tmp'), 'JAX_PLATFORMS': 'cpu'}
  for folder in ('valid', 'home', 'tmp'):
    (base / folder).mkdir()
  (base / 'output.txt').touch()
  for name in names:
    (base / 'valid' / name).mkdir()
    READERS[name].write(base / 'valid' / name)
  worker = Worker(base, options.seed)
  counts = collections.defaultdict(collections.Counter)
  faults = {}
  for i, name in enumerate(names):
    kind, detail = worker.read(name, -1)
    if kind != 'accepted':
      faults[name, 'valid input refused', detail] = [detail, -1]
    numbers = range(options.inputs // len(names) + (i < options.inputs % len(names)))
    if options.only is not None:
      numbers = [options.only]
    for index in numbers:
      kind, detail = worker.read(name, index)
      counts[name][kind] += 1
      if kind not in ('accepted', 'refused'):
        # A traceback is one fault wherever it has the same place and error.
        alike = re.sub(r'\d{5,}', '#', ':'.join(detail.split(':')[:3]))
        found = faults.setdefault((name, kind, alike), [detail])
        found.append(index)
        if options.keep and len(found) == 2:
          kept = pathlib.Path(options.keep) / f'{name}-{index}'
          shutil.copytree(base / 'input', kept, dirs_exist_ok=True)
      if options.only is not None:
        print(kind, detail, (base / 'output.txt').read_text(errors='replace'), sep='\n')
    print(f'{name}: {dict(counts[name])}', file=sys.stderr, flush=True)
  worker.close()
  print(f'{"reader":<24}{"inputs":>8}{"accepted":>10}{"refused":>9}{"faults":>8}')
  total = collections.Counter()
  for name, of_name in [*counts.items(), ('all', total)]:
    inputs = of_name.total()
    good = of_name['accepted'] + of_name['refused']
    row = f'{inputs:>8,}{of_name["accepted"]:>10,}{of_name["refused"]:>9,}{inputs - good:>8,}'
    print(f'{name:<24}{row}')
    total += of_name
  for (name, kind, _), (detail, *found) in faults.items():
    print(f'{name}: {kind} x {len(found)}, --only={found[0]}: {detail}')
  return not faults


def main() -> None:
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
  from benchmarks.fuzz_inputs import READERS

  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--inputs', type=int, default=10_000, help='of all readers together')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--reader', choices=list(READERS), help='default: all')
  parser.add_argument('--only', type=int, help='the number of one input of the reader')
  parser.add_argument('--keep', help='a folder for the inputs with faults')
  options = parser.parse_args()
  names = [options.reader] if options.reader else list(READERS)
  with tempfile.TemporaryDirectory() as folder:
    fine = campaign(names, options, pathlib.Path(folder).resolve())
  sys.exit(not fine)


if __name__ == '__main__':
  main()

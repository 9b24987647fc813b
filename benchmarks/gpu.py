"""The parts of benchmarks/gpu.sh: a session on a borrowed GPU, in commands of at most ten minutes.

  benchmarks/gpu.sh [PART ...] [--output=FOLDER] [--configs=configs/vitl.py:v2,configs/vitg.py:v2]
      [--batches=144,128,96] [--seconds=570] [--smoke] [-- --config.a.b=value ...]

  check    packages, GPU, driver, versions; what is missing, in a line each
  peak     the most that large square products of bfloat16 reach, by jax and by torch
  ours     benchmarks/step.py at the largest batch that fits, with a profile of its kernels
  torch    benchmarks/torch_step.py likewise, beginning with the batch of ours
  launches ours again without CUDA graphs, where each kernel is launched by itself and so is known
  plan     tips_jax.plan for one such GPU, at the batch of ours; needs no GPU

Without a part: all but `launches`, in this order. Each program is a process of its own; as soon as
it ends, its line goes to FOLDER/gpu.jsonl, FOLDER/gpu.md (the page, benchmarks/gpu_page.py) is
written anew, and FOLDER/gpu.log has what it said; FOLDER is runs/gpu by default. Where OUT names a
folder, it gets copies. What is there already is not measured again, so that the same command
continues a session. What cannot end within `seconds` is stopped, and the page says so.

smoke: on the CPU, tiny, to try the session itself out. Exit codes: 0 all was measured, 1 something
was not, 2 bad input or nothing to measure with.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_page  # noqa: E402
from tips_jax.core import chips  # noqa: E402

PARTS = ('check', 'peak', 'ours', 'torch', 'launches', 'plan')
CONFIGS = 'configs/vitl.py:v2,configs/vitg.py:v2'
SMOKE = 'configs/vits.py:v2,runlocal'
NEEDED = ('jax', 'flax', 'optax', 'ml_collections', 'absl', 'etils')
VERSIONS = (
  *('jax', 'jaxlib', 'jax-cuda12-plugin', 'jax-cuda13-plugin', 'flax', 'optax'),
  *('nvidia-cudnn-cu12', 'nvidia-cudnn-cu13', 'torch', 'triton'),
)
# Images of a step, the most first, by GB of the card's memory that a run may use: on an H100 and an
# H200. By the plans (docs/measurements.md) a step of ViT-L takes 3.1 GB and 0.46 to 0.48 an image,
# one of ViT-g 15 and 1.2.
BATCHES = {
  'vitl': {76: (144, 128, 96, 64), 136: (256, 192, 144, 96)},
  'vitg': {76: (48, 40, 32, 24), 136: (96, 80, 64, 48)},
}
SIZES = (4096, 8192, 12288, 16384)
TOO_LARGE = re.compile('does not fit|RESOURCE_EXHAUSTED|out of memory', re.IGNORECASE)
LEAST, RESERVE = 30, 15  # seconds that a program is started with, and that the page is left
FILES = ('gpu.jsonl', 'gpu.md', 'gpu.log')


class Session:
  """The lines of a folder, and programs that add to them."""

  def __init__(self, args):
    self.args = args
    self.folder = pathlib.Path(args.output)
    self.folder.mkdir(parents=True, exist_ok=True)
    self.file = self.folder / 'gpu.jsonl'
    self.lines = gpu_page.read(self.file)
    self.end = time.monotonic() + args.seconds
    self.complete = True

  def found(self, part, config=''):
    """The line of a part that was measured, or None."""
    for line in self.lines:
      if line['part'] == part and line.get('config', '') == config and 'error' not in line:
        return line
    return None

  def add(self, line):
    """A line more, and the page anew."""
    self.lines.append(line)
    with self.file.open('a') as file:
      file.write(json.dumps(line) + '\n')
    (self.folder / 'gpu.md').write_text(gpu_page.text(self.lines))
    self.copy()
    shown = {k: v for k, v in line.items() if isinstance(v, str | int | float)}
    print('  '.join(f'{k}={v}' for k, v in shown.items()), flush=True)
    self.complete &= 'error' not in line

  def copy(self):
    out = os.environ.get('OUT')
    for name in FILES:
      if out and (self.folder / name).exists():
        shutil.copyfile(self.folder / name, pathlib.Path(out) / name)

  def run(self, part, command, *, config='', environment=None):
    """The JSON object that a program prints last, as the line of a part; {'error': ...} otherwise,
    which only the caller may add.
    """
    begin = time.monotonic()
    left = self.end - begin
    name = dict(part=part, config=config) if config else dict(part=part)
    if left < LEAST:
      return name | dict(error='no time was left')
    with (self.folder / 'gpu.log').open('a') as log:
      log.write(f'\n== {part} {config}: {" ".join(command)}\n')
      log.flush()
      process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (environment or {}),
        cwd=ROOT,
        start_new_session=True,  # torch.compile has processes of its own
      )
      try:
        out, said = process.communicate(timeout=left - RESERVE)
      except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, said = process.communicate()
        said += f'\nerror: it was stopped after {time.monotonic() - begin:.0f} s'
      log.write(said)
    seconds = round(time.monotonic() - begin, 1)
    line = _last_object(out) or dict(error=_reason(said))
    return name | line | dict(wall_s=seconds)


def _reason(said):
  """The line of what a program said that tells why it ended."""
  lines = [line.strip() for line in said.splitlines() if line.strip()] or ['it said nothing']
  errors = [line for line in lines if re.match(r'error: |[\w.]*Error\b', line)]
  return (errors or lines)[-1][:300]


def _last_object(text):
  """The last JSON object of a program's output: a line, or all of it; None without one."""
  for candidate in (*reversed(text.strip().splitlines()), text):
    try:
      value = json.loads(candidate)
    except ValueError:
      continue
    if isinstance(value, dict):
      return value
  return None


def check(session):
  """What is there. Adds a line; SystemExit without what our step needs."""
  missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
  if missing:
    print(
      f'error: missing packages: {", ".join(missing)}; expected them installed, or their wheels in '
      f'{ROOT / ".whl"} (docs/measurements.md, "On a borrowed GPU")',
      file=sys.stderr,
    )
    raise SystemExit(2)
  for name, what in (('torch', 'the twin'), ('triton', 'torch.compile')):
    if not importlib.util.find_spec(name):
      print(f'{name} is missing: {what} is left out', flush=True)
  program = (
    'import jax, json; d = jax.devices()[0]; print(json.dumps(dict(platform=d.platform, '
    'device=d.device_kind, count=jax.device_count(), '
    'usable_gb=(d.memory_stats() or {}).get("bytes_limit", 0) / 1e9)))'
  )
  share = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.9'}
  line = session.run('check', [sys.executable, '-c', program], environment=share)
  if not session.args.smoke and line.get('platform') != 'gpu':
    print(
      f'error: no GPU: jax sees {line.get("device", line.get("error"))}; expected an NVIDIA GPU '
      'and a jax with CUDA, or --smoke',
      file=sys.stderr,
    )
    raise SystemExit(2)
  query = 'name,driver_version,memory.total,clocks.max.sm,power.limit'
  said = ''
  if shutil.which('nvidia-smi'):
    done = subprocess.run(
      ['nvidia-smi', f'--query-gpu={query}', '--format=csv'], capture_output=True, text=True
    )
    said = done.stdout.strip()
  before = session.found('check')
  if before and before['device'] != line['device']:
    print(
      f'error: --output: {session.folder} has lines of a {before["device"]}, and this is a '
      f'{line["device"]}; expected another folder',
      file=sys.stderr,
    )
    raise SystemExit(2)
  session.add(line | dict(nvidia_smi=said, python=platform.python_version(), versions=_versions()))


def _versions():
  result = {}
  for name in VERSIONS:
    try:
      result[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return result


def batches(session, config):
  """Batch sizes to try, the most first, none above that of ours; 0 is the config's own."""
  args = session.args
  first = _batch(session, config)
  if args.batches:
    sizes = [int(size) for size in args.batches.split(',')]
  elif args.smoke:
    sizes = [0]
  else:
    usable = (session.found('check') or {}).get('usable_gb') or chips.CHIPS[args.chip].hbm / 1e9
    table = BATCHES.get(pathlib.Path(config.partition(':')[0]).stem, {0: (0,)})
    sizes = table[max((gb for gb in table if gb <= usable + 2), default=min(table))]
  if first:
    sizes = [first, *(size for size in sizes if 0 < size < first)]
  return sizes


def _batch(session, config):
  """Images of our step, where it is measured; else 0."""
  return (session.found('ours', config) or {}).get('batch_size', 0)


def step(session, part, config, command, environment=None):
  """Adds the line of the largest batch that fits."""
  for size in batches(session, config):
    program = [sys.executable, *command, f'--config={config}', f'--batch={size}']
    program += [f'--steps={session.args.steps}', *session.args.rest]
    line = session.run(part, program, config=config, environment=environment)
    if not TOO_LARGE.search(line.get('error', '')):
      break
    print(f'{part} {config}: {size} images: {line["error"]}', flush=True)
  session.add(line)


def ours(session, config, part='ours', environment=None):
  profile = pathlib.Path(os.environ.get('TMPDIR', '/tmp')) / 'tips_gpu_profile'
  shutil.rmtree(profile, ignore_errors=True)
  command = ['benchmarks/step.py', f'--profile={profile}']
  step(session, part, config, command, environment)


def launches(session, config):
  flags = os.environ.get('XLA_FLAGS', '')
  without = {'XLA_FLAGS': f'{flags} --xla_gpu_enable_command_buffer='.strip()}
  ours(session, config, 'launches', {} if session.args.smoke else without)


def twin(session, config):
  if not importlib.util.find_spec('torch'):
    return session.add(dict(part='torch', config=config, error='torch is not installed'))
  mode = 'default'
  if session.args.smoke or not importlib.util.find_spec('triton'):
    mode = 'none'
  step(session, 'torch', config, ['benchmarks/torch_step.py', f'--compile={mode}', '--profile'])


def plan(session, config):
  kind = (session.found('check') or {}).get('device', '')
  topology = f'gpu:{chips.name(kind) or session.args.chip}x1'
  if session.args.smoke:
    topology = 'cpu'
  command = [sys.executable, '-m', 'tips_jax.plan', f'--config={config}', f'--topology={topology}']
  command += [f'--batch={batches(session, config)[0]}', '--json', '--top=0', *session.args.rest]
  session.add(session.run('plan', command, config=config))


def peak(session):
  line = {}
  for library in ('torch', 'jax'):
    if importlib.util.find_spec(library):
      command = [sys.executable, __file__, *['--smoke'] * session.args.smoke]
      line |= session.run('peak', [*command, '--of_products', library])
  session.add(line)


def products(library, sizes):
  """{'library': {side: TFLOP/s}}: medians of products of two random bfloat16 matrices."""
  run, wait = {'jax': _products_of_jax, 'torch': _products_of_torch}[library]()
  found = {}
  for side in sizes:
    product = run(side)
    for _ in range(3):
      wait(product())
    rates = []
    for _ in range(5):
      begin = time.perf_counter()
      for _ in range(10):  # launched ahead, so that launching is not what is measured
        result = product()
      wait(result)
      rates.append(10 * 2 * side**3 / (time.perf_counter() - begin) / 1e12)
    found[side] = round(sorted(rates)[2], 4)
  return {library: found}


def _products_of_jax():
  import jax
  import jax.numpy as jnp

  def run(side):
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
    compiled = jax.jit(jnp.matmul).lower(a, b).compile()
    return lambda: compiled(a, b)

  return run, jax.block_until_ready


def _products_of_torch():
  import torch

  device = 'cuda' if torch.cuda.is_available() else 'cpu'

  def run(side):
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return lambda: a @ b

  return run, lambda _: torch.cuda.synchronize() if device == 'cuda' else None


def parse(argv):
  parser = argparse.ArgumentParser(
    prog='benchmarks/gpu.sh',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  rest = []
  if '--' in argv:
    rest = argv[argv.index('--') + 1 :]
    argv = argv[: argv.index('--')]
  parser.add_argument('parts', nargs='*', metavar='PART', help=', '.join(PARTS))
  parser.add_argument('--output', default='runs/gpu')
  parser.add_argument('--configs', default='', help='with commas; an argument of v2 stays whole')
  parser.add_argument('--batches', default='', help='to try, in this order')
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--seconds', type=float, default=570)
  parser.add_argument('--chip', default='h100', choices=chips.GPUS, help='of a plan without a GPU')
  parser.add_argument('--smoke', action='store_true')
  parser.add_argument('--of_products', choices=('jax', 'torch'), help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  args.rest = rest
  for part in args.parts:
    if part not in PARTS:
      parser.error(f'got the part {part!r}; expected some of {", ".join(PARTS)}')
  # An option of a config has a comma, too: a new config begins with its folder.
  text = args.configs or (SMOKE if args.smoke else CONFIGS)
  args.configs = text.replace(',configs/', ' configs/').split()
  return args


def main(argv):
  args = parse(argv)
  if args.smoke:
    os.environ['JAX_PLATFORMS'] = 'cpu'
  if args.of_products:
    sizes = (128, 256) if args.smoke else SIZES
    print(json.dumps(products(args.of_products, sizes)), flush=True)
    return 0
  session = Session(args)
  parts = args.parts or [part for part in PARTS if part != 'launches']
  if set(parts) - {'plan'}:
    check(session)
  if 'peak' in parts and not session.found('peak'):
    peak(session)
  for config in args.configs:
    for part, measure in dict(ours=ours, torch=twin, launches=launches, plan=plan).items():
      if part in parts and not session.found(part, config):
        measure(session, config)
  print((session.folder / 'gpu.md').read_text())
  return 0 if session.complete else 1


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

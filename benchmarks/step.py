"""Seconds a step, images/s, compile time and memory of training steps: one JSON line each.

  python benchmarks/step.py [CONFIG ...]      each config's `:runlocal`, in a process of its own;
      for instance: python benchmarks/step.py vitb.py:v2 methods/clip.py
  python benchmarks/step.py --config=configs/vitl.py:v2 [--config.a.b=value] [--batch=64]
      [--steps=10] [--profile=FOLDER]         one config as it is, in this process

Random images; the input is not measured. FLOPs are the closed form's, as utilization counts them:
nothing that is computed again. profile: a trace of three steps goes there, and a second line
also says what took their time (benchmarks/consumers.py).
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tips_jax.core import chips, cli  # noqa: E402

PROFILED = 3

FLAGS = cli.Flags()
FLAGS.add_config_file()
FLAGS.add_integer('batch', 0, 'Images of a step in place of schedule.batch_size.', 0)
FLAGS.add_integer('steps', 10, 'Timed steps, after two that are not.', 1)
FLAGS.add_string('profile', '', 'Folder for a trace of three more steps.')


def random_batch(config, size):
  """{name: array} of `size` rows: random pixels, words and which of the texts are there."""
  import numpy as np

  from tips_jax.data.reading.batch import layout

  rng = np.random.default_rng(0)
  batch = {}
  for name, entry in layout(config.data).items():
    if entry.dtype == np.float32:  # boxes, and no text is read of a box without area
      batch[name] = np.zeros((size, *entry.shape), entry.dtype)
      continue
    high = {np.uint8: 256, np.int32: 300, np.bool_: 2}[entry.dtype]
    batch[name] = rng.integers(0, high, (size, *entry.shape)).astype(entry.dtype)
  return batch


def load(flags):
  """The config that the flags of a program name, with their batch size."""
  import dataclasses

  config = cli.load_config(flags)
  size = flags.batch or config.schedule.batch_size
  return dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, batch_size=size))


def measure(config, *, steps, profile=''):
  """Yields what a line says of a config, and with a profile, which may fail, the same with it.

  InputError where the step does not fit into the memory.
  """
  import jax

  from benchmarks import consumers
  from tips_jax.models import attention
  from tips_jax.runtime import memory
  from tips_jax.train import lowering, sharding, state, summary
  from tips_jax.train import method as method_lib

  method = method_lib.build(config)
  size = config.schedule.batch_size
  mesh = sharding.make_mesh(config.mesh, size)
  begin = time.perf_counter()
  compiled = memory.checked(lowering.compiled(lowering.lower(method, mesh)))
  compile_seconds = time.perf_counter() - begin
  with jax.set_mesh(mesh):
    places = lowering.abstract_state(method, mesh)[1]
    now = jax.jit(lambda: state.init(method), out_shardings=places)()
    batch = jax.device_put(random_batch(config, size), sharding.batch(mesh))
    times = []
    for _ in range(steps + 2):
      begin = time.perf_counter()
      now, metrics = compiled(now, batch)
      jax.block_until_ready((now, metrics))
      times.append(time.perf_counter() - begin)
  device = jax.local_devices()[0]
  heads = {
    name: attention.chosen(
      config.compute.attention, config.compute.dtype, tower.width // tower.heads
    )
    for name, tower in config.towers.items()
    if hasattr(tower, 'heads')
  }
  analysis = compiled.memory_analysis()
  stats = device.memory_stats() or {}
  line = dict(
    device=device.device_kind,
    parameters=sum(x.size for x in jax.tree.leaves(now.params)),
    attention=heads,
    **rates(times[2:], size, sum(summary.flops(method).values())),
    compile_s=round(compile_seconds, 1),
    step_temporaries_mib=analysis and round(analysis.temp_size_in_bytes / 2**20, 1),
    device_peak_gb=round(stats.get('peak_bytes_in_use', 0) / 1e9, 2),
    process_peak_mib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    loss=round(float(metrics['loss']), 4),
  )
  yield line
  if profile:
    with jax.set_mesh(mesh), jax.profiler.trace(profile):
      for _ in range(PROFILED):
        now, metrics = compiled(now, batch)
      jax.block_until_ready((now, metrics))
    found = consumers.read(profile, compiled.as_text(), method, steps=PROFILED)
    yield line | dict(profile=found)


def rates(times, size, flops):
  """The part of a line that follows from seconds of steps and FLOPs of an image."""
  median = sorted(times)[len(times) // 2]
  return dict(
    batch_size=size,
    seconds_per_step=round(median, 5),
    fastest_and_slowest=[round(min(times), 5), round(max(times), 5)],
    images_per_s=round(size / median, 1),
    tflop_per_image=flops / 1e12,
    gflops=round(flops * size / median / 1e9, 2),
  )


def all_of(names):
  names = names or sorted(
    p.relative_to(ROOT / 'configs').as_posix()
    for p in (ROOT / 'configs').rglob('*.py')
    if 'def get_config' in p.read_text()
  )
  for name in names:
    file, _, arg = name.partition(':')
    local = ','.join(filter(None, [arg, 'runlocal']))
    config = f'--config={ROOT}/configs/{file.removesuffix(".py")}.py:{local}'
    run = subprocess.run([sys.executable, __file__, config], capture_output=True, text=True)
    lines = run.stdout.strip().splitlines()
    result = {'error': run.stderr.strip().splitlines()[-1:]}
    if run.returncode == 0 and lines:
      result = json.loads(lines[-1])
    print(json.dumps({'config': name} | result), flush=True)


def main(argv):
  if not any(arg.startswith('-') for arg in argv[1:]):
    return all_of(argv[1:])

  def one(argv):
    cli.parse(FLAGS, argv)
    # As a run does (main.py), and before jax is imported.
    os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', str(chips.GPU_SHARE))
    config = load(FLAGS)
    for line in measure(config, steps=FLAGS.steps, profile=FLAGS.profile):
      print(json.dumps(line), flush=True)

  return cli.run(one, argv, FLAGS, about=__doc__, stopped='nothing was measured')


if __name__ == '__main__':
  sys.exit(main(sys.argv))

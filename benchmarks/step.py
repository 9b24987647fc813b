"""Seconds a step, images/s, compile time and peak memory of every config's `:runlocal`: one JSON
line each.

  python benchmarks/step.py [CONFIG ...]      for instance: python benchmarks/step.py vitb.py:v2
  methods/clip.py

Each config runs in a process of its own, so that the peak is its own. Random images; the input is
not measured.
"""

import json
import pathlib
import resource
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 10


def measure(name):
  """One JSON line for one config, in this process."""
  sys.path.insert(0, str(ROOT))
  import importlib

  import jax
  import numpy as np

  from tips_jax.core import schema, strict
  from tips_jax.data.reading.batch import layout
  from tips_jax.train import method as method_lib
  from tips_jax.train import sharding, state, step, summary

  file, _, arg = name.partition(':')
  module = importlib.import_module('configs.' + file.removesuffix('.py').replace('/', '.'))
  method = method_lib.build(
    strict.build(schema.Config, module.get_config(','.join(filter(None, [arg, 'runlocal']))))
  )
  c, rng = method.config, np.random.default_rng(0)
  size = c.schedule.batch_size
  batch = {}
  for entry_name, entry in layout(c.data).items():
    high = {np.uint8: 256, np.int32: 300, np.bool_: 2}[entry.dtype]
    batch[entry_name] = rng.integers(0, high, (size, *entry.shape)).astype(entry.dtype)
  mesh = sharding.make_mesh(c.mesh, size)
  with jax.set_mesh(mesh):
    s = jax.jit(lambda: state.init(method))()
    batch = jax.device_put(batch, sharding.batch(mesh))
    begin = time.perf_counter()
    fn = jax.jit(step.make(method), donate_argnums=0).lower(s, batch).compile()
    compiled = time.perf_counter() - begin
    times = []
    for _ in range(STEPS):
      begin = time.perf_counter()
      s, metrics = fn(s, batch)
      jax.block_until_ready(s)
      times.append(time.perf_counter() - begin)
  median = sorted(times)[STEPS // 2]
  memory = fn.memory_analysis()
  print(
    json.dumps(
      {
        'config': name,
        'device': jax.devices()[0].device_kind,
        'batch_size': size,
        'seconds_per_step': round(median, 4),
        'images_per_s': round(size / median, 1),
        'compile_s': round(compiled, 1),
        'gflops': round(sum(summary.flops(method).values()) * size / median / 1e9, 2),
        'step_temporaries_mib': round(memory.temp_size_in_bytes / 2**20, 1) if memory else None,
        'process_peak_mib': round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        'loss': round(float(metrics['loss']), 4),
      }
    )
  )


def main(names):
  names = names or sorted(
    p.relative_to(ROOT / 'configs').as_posix()
    for p in (ROOT / 'configs').rglob('*.py')
    if 'def get_config' in p.read_text()
  )
  for name in names:
    run = subprocess.run([sys.executable, __file__, '--one', name], capture_output=True, text=True)
    print(
      run.stdout.strip()
      or json.dumps({'config': name, 'error': run.stderr.strip().splitlines()[-1:]}),
      flush=True,
    )


if __name__ == '__main__':
  measure(sys.argv[2]) if sys.argv[1:2] == ['--one'] else main(sys.argv[1:])

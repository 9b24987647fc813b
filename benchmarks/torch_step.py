"""Seconds a step, images/s and memory of the torch twin of our step (benchmarks/torch_twin.py): one
JSON line, as benchmarks/step.py prints it.

  python benchmarks/torch_step.py --config=configs/vitl.py:v2 [--config.a.b=value] [--batch=64]
      [--compile=default] [--checkpoint] [--steps=10] [--profile]

compile: 'none', or a mode of torch.compile. checkpoint: blocks are computed again in the backward
pass, where activations do not fit. profile: a second line also says which kernels took the time.
"""

import json
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['JAX_PLATFORMS'] = 'cpu'  # the memory of the GPU is torch's here
# Else pieces of memory that are too short for anything add up.
os.environ.setdefault('PYTORCH_CUDA_ALLOC_CONF', 'expandable_segments:True')

import torch  # noqa: E402

from benchmarks import step as step_lib  # noqa: E402
from benchmarks.torch_twin import Twin  # noqa: E402
from tips_jax.core import cli  # noqa: E402
from tips_jax.core.errors import InputError  # noqa: E402
from tips_jax.train import summary  # noqa: E402

MODES = ('none', 'default', 'max-autotune-no-cudagraphs')
UNTIMED = 3
PROFILED, TOP = 3, 20

FLAGS = cli.Flags()
FLAGS.add_config_file()
FLAGS.add_integer('batch', 0, 'Images of a step in place of schedule.batch_size.', 0)
FLAGS.add_integer('steps', 10, 'Timed steps, after three that are not.', 1)
FLAGS.add_enum('compile', 'default', MODES, 'Mode of torch.compile.')
FLAGS.add_boolean('checkpoint', False, 'Compute blocks again in the backward pass.')
FLAGS.add_boolean('profile', False, 'Three more steps under the profiler.')


def random_mask(config, size, device):
  """[size, P] bool: the config's share of the patches, drawn anew."""
  side = config.data.views['global'].size // config.towers['image'].patch
  count = round(config.masks['random'].ratio * side**2)
  ranks = torch.rand(size, side**2, device=device).argsort(1).argsort(1)
  return ranks < count


def measure(config, *, steps, mode, checkpoint, profile):
  """Yields what a line says, and with a profile, which may fail, the same with it.

  InputError where the step does not fit into the memory.
  """
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  size = config.schedule.batch_size
  wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
  twin = Twin(config, device=device, mode=mode, checkpoint=checkpoint)
  batch = {
    k: torch.from_numpy(v).to(device) for k, v in step_lib.random_batch(config, size).items()
  }
  times = []

  def one():
    begin = time.perf_counter()
    loss = twin.step(batch, random_mask(config, size, device))
    wait()
    times.append(time.perf_counter() - begin)
    return loss

  try:
    for _ in range(steps + UNTIMED):
      loss = one()
  except torch.OutOfMemoryError as error:
    reason = str(error).splitlines()[0]
    raise InputError(f'the step does not fit into the memory: {reason}') from error
  peak = torch.cuda.max_memory_allocated() if device == 'cuda' else 0
  line = dict(
    device=torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
    torch=torch.__version__,
    compile=mode,
    checkpoint=checkpoint,
    parameters=sum(p.numel() for p in twin.params.values()),
    **step_lib.rates(times[UNTIMED:], size, sum(summary.flops(twin.method).values())),
    compile_s=round(times[0], 1),
    device_peak_gb=round(peak / 1e9, 2),
    loss=round(float(loss), 4),
  )
  yield line
  if profile:
    yield line | dict(profile=profiled(one))


def profiled(one):
  from torch.profiler import ProfilerActivity

  kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + torch.cuda.is_available()]
  with torch.profiler.profile(activities=kinds) as trace:
    for _ in range(PROFILED):
      one()
  spent = lambda e: getattr(e, 'self_device_time_total', 0) or e.self_cpu_time_total
  on_gpu = [e for e in trace.key_averages() if 'CUDA' in str(e.device_type)]
  events = on_gpu or list(trace.key_averages())
  total = sum(map(spent, events)) or 1
  events.sort(key=spent, reverse=True)
  kernels = []
  for event in events[:TOP]:
    milliseconds = round(spent(event) / 1e3 / PROFILED, 4)
    share = round(spent(event) / total, 4)
    count = round(event.count / PROFILED, 1)
    kernels.append(dict(kernel=event.key[:120], count=count, ms=milliseconds, share=share))
  return dict(busy_ms=round(total / 1e3 / PROFILED, 4), kernels=kernels)


def main(argv):
  def one(argv):
    cli.parse(FLAGS, argv)
    config = step_lib.load(FLAGS)
    flags = dict(mode=FLAGS.compile, checkpoint=FLAGS.checkpoint, profile=FLAGS.profile)
    for line in measure(config, steps=FLAGS.steps, **flags):
      print(json.dumps(line), flush=True)

  return cli.run(one, argv, FLAGS, about=__doc__, stopped='nothing was measured')


if __name__ == '__main__':
  sys.exit(main(sys.argv))

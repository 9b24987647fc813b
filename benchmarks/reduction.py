"""What merging patches saves: the time of an image tower, forward and backward, with and without.

  python -m benchmarks.reduction --size=448

Both are compiled in one process and timed in turns; the ratio is that of the least times, as what
else the machine does only adds to them.
"""

import dataclasses
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.core import cli, schema
from tips_jax.models import towers, vit

FLAGS = cli.Flags()
FLAGS.add_integer('size', 448, 'Pixels of the square images.', 1)
FLAGS.add_integer('batch', 1, 'Images.', 1)
FLAGS.add_integer('repeats', 5, 'Calls of each that are timed.', 1)
FLAGS.add_integer('after', 4, 'Blocks that see all patches.', 1)
FLAGS.add_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of activations.')
# ViT-S/16.
_TOWER = schema.ViT(
  kind='vit', width=384, depth=12, heads=6, mlp=1536, patch=16, grid=14, cls=('cls',)
)


def main(argv: list[str]) -> int:
  """Prints the least milliseconds of both, their ratio, and that of the counted FLOPs."""
  return cli.run(_measure, argv, FLAGS, about=__doc__, stopped='nothing was written')


def _measure(argv):
  cli.parse(FLAGS, argv)
  compute = schema.Compute(dtype=FLAGS.dtype)
  reduced = dataclasses.replace(_TOWER, reduce=schema.Reduction(keep=0.25, after=FLAGS.after))
  params = towers.init('image', _TOWER, seed=0)
  shape = (FLAGS.batch, 1, FLAGS.size, FLAGS.size, 3)
  images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
  steps = {}
  for name, tower in {'all patches': _TOWER, 'a quarter': reduced}.items():
    steps[name] = _step(tower, compute, params, images)
  times = {name: [] for name in steps}
  for _ in range(FLAGS.repeats):
    for name, step in steps.items():
      start = time.perf_counter()
      jax.block_until_ready(step(params, images))
      times[name].append(time.perf_counter() - start)
  for name, seconds in times.items():
    print(f'{name}: least {1e3 * min(seconds):.1f} ms, median {1e3 * np.median(seconds):.1f} ms')
  whole, fewer = (min(seconds) for seconds in times.values())
  flops = [vit.ViT.flops(tower, {'images': shape[1:]}) for tower in (_TOWER, reduced)]
  print(f'ratio of the least times: {fewer / whole:.3f}; of FLOPs: {flops[1] / flops[0]:.3f}')
  return 0


def _step(tower, compute, params, images):
  """The compiled gradient of some loss of all outputs."""

  def loss(params, images):
    out = towers.apply(params, tower, compute, {'images': images})
    return sum(jnp.square(x.astype(jnp.float32)).mean() for x in out.values())

  return jax.jit(jax.grad(loss)).lower(params, images).compile()


if __name__ == '__main__':
  sys.exit(main(sys.argv))

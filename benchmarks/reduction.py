"""What merging patches saves: the time of an image tower, forward and backward, with and without.

  python benchmarks/reduction.py --size=448

Both are compiled in one process and timed in turns; the ratio is that of the least times, as what
else the machine does only adds to them.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.core import schema
from tips_jax.models import towers, vit

# ViT-S/16.
_TOWER = schema.ViT(
  kind='vit', width=384, depth=12, heads=6, mlp=1536, patch=16, grid=14, cls=('cls',)
)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--size', type=int, default=448, help='pixels of the square images')
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--repeats', type=int, default=5, help='timed calls of each')
  parser.add_argument('--after', type=int, default=4, help='blocks that see all patches')
  parser.add_argument('--dtype', default='float32', help='of activations')
  args = parser.parse_args()
  compute = schema.Compute(dtype=args.dtype)
  reduced = dataclasses.replace(_TOWER, reduce=schema.Reduction(keep=0.25, after=args.after))
  params = towers.init('image', _TOWER, seed=0)
  shape = (args.batch, 1, args.size, args.size, 3)
  images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
  steps = {}
  for name, tower in {'all patches': _TOWER, 'a quarter': reduced}.items():
    steps[name] = _step(tower, compute, params, images)
  times = {name: [] for name in steps}
  for _ in range(args.repeats):
    for name, step in steps.items():
      start = time.perf_counter()
      jax.block_until_ready(step(params, images))
      times[name].append(time.perf_counter() - start)
  for name, seconds in times.items():
    print(f'{name}: least {1e3 * min(seconds):.1f} ms, median {1e3 * np.median(seconds):.1f} ms')
  whole, fewer = (min(seconds) for seconds in times.values())
  flops = [vit.ViT.flops(tower, {'images': shape[1:]}) for tower in (_TOWER, reduced)]
  print(f'ratio of the least times: {fewer / whole:.3f}; of FLOPs: {flops[1] / flops[0]:.3f}')


def _step(tower, compute, params, images):
  """The compiled gradient of some loss of all outputs."""

  def loss(params, images):
    out = towers.apply(params, tower, compute, {'images': images})
    return sum(jnp.square(x.astype(jnp.float32)).mean() for x in out.values())

  return jax.jit(jax.grad(loss)).lower(params, images).compile()


if __name__ == '__main__':
  main()

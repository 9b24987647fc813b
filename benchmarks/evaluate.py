"""Where an evaluation's time goes: kNN, retrieval and linear segmentation, each from an empty
cache.

  python benchmarks/evaluate.py [--scale=s] [--images=5000] [--size=112] [--workdir=DIR]

Random weights, float32, on drawn scenes, of which `--images` train and a fifth as many are
measured; retrieval searches the former. They are drawn once, in --workdir where it is given.
`wall`: all of `suite.run`, after a small run that compiles the towers; `encoder`: inside its calls;
`reading`: waiting for images and the disk; `task`: what comes after. Ten minutes on two idle CPU
cores; --images=200 a minute.
"""

import argparse
import dataclasses
import importlib
import os
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from tips_jax.core import schema, strict
from tips_jax.data import store
from tips_jax.data.scenes import dataset as scenes
from tips_jax.evals import suite
from tips_jax.evals.datasets import evaluations
from tips_jax.evals.features.cache import Cache
from tips_jax.interop.encoder import Encoder
from tips_jax.interop.weights import Weights
from tips_jax.models import towers

SCALES = ('s', 'b', 'l', 'so400m', 'g')
TASKS = ('knn', 'retrieval', 'segmentation')
BATCH = 64


def encoder(scale, tokenizer):
  """As `python -m tips_jax.evaluate` makes it of a checkpoint."""
  page = importlib.import_module(f'configs.vit{scale}').get_config('v1')
  known = {name: page.towers[name] for name in ('image', 'text', 'logit')}
  known = {name: strict.value(schema.Tower, tower, name) for name, tower in known.items()}
  params = {name: towers.init(name, tower, seed=0) for name, tower in known.items()}
  return Encoder(Weights(name=scale, towers=known, params=params, tokenizer=tokenizer), exact=True)


def measure(model, job, limit=0):
  """(wall seconds, the outcome's own account of them)."""
  with tempfile.TemporaryDirectory() as folder:
    begin = time.perf_counter()
    [outcome] = suite.run(model, [job], cache=Cache(folder), batch_size=BATCH, limit=limit)
    return time.perf_counter() - begin, outcome.seconds


def run(args, folder):
  counts = dict(train=args.images, test=-(-args.images // 5), size=args.size)
  path = scenes.build(folder / 'scenes-{train}-{test}-{size}'.format(**counts), **counts)
  model = encoder(args.scale, pathlib.Path(path, store.TOKENIZER_FILE).read_bytes())
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  row = '{:13} {:>7} {:>8} {:>8} {:>8} {:>8} {:>6} {:>9}'.format
  print(f'{args.scale}, {args.size} x {args.size}, {cores} cores; seconds')
  print(row('', 'images', 'wall', 'encoder', 'reading', 'task', 'share', 'images/s'), flush=True)
  for job in evaluations.of_store(path, only=TASKS, size=args.size):
    if job.task.kind == 'retrieval':
      job = dataclasses.replace(job, splits={'test': 'train'})
    measure(model, job, limit=BATCH)
    wall, seconds = measure(model, job)
    images = sum(counts[split] for split in job.splits.values())
    parts = [f'{s:.1f}' for s in (wall, seconds['encoder'], seconds['reading'], seconds['task'])]
    print(
      row(
        job.task.name, images, *parts, f'{seconds["encoder"] / wall:.0%}', f'{images / wall:.1f}'
      ),
      flush=True,
    )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--scale', default='s', choices=SCALES)
  parser.add_argument('--images', type=int, default=5000)
  parser.add_argument('--size', type=int, default=112)
  parser.add_argument('--workdir')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    run(args, pathlib.Path(args.workdir or scratch))


if __name__ == '__main__':
  main()

"""Size and latency of LightCLIP's image towers beside ViT-S, as onnxruntime runs them on one thread
of a CPU: what a phone or a browser would load.

  python -m benchmarks.phone
  python -m benchmarks.phone --size=192 --runs=20

Random weights: neither size nor time depends on them. Each model gets one image; the time is the
median of --runs, which go round over all models, so that what else the machine does hits all alike.
int8 is `export --to=onnx --dtype=int8`.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import numpy as np

from configs import vits
from configs.methods import clip
from tips_jax.core import schema, strict
from tips_jax.interop import onnx
from tips_jax.interop.weights import Weights
from tips_jax.models import towers

DTYPES = ('float32', 'int8')
WARMUP = 2


def models(size: int) -> dict[str, Weights]:
  """{name: weights} of the towers, LightCLIP's with their projection to the joint space."""
  result = {}
  for name, tower in clip.LIGHT.items():
    tower = strict.value(schema.ImageTower, tower, name)
    head = schema.ProjectionHead(kind='projection', width=tower.width, output=512)
    result[name] = _weights(name, size, image=tower, image_head=head)
  small = strict.value(schema.ViT, dict(kind='vit') | vits.IMAGE, 'vits')
  result['vit_s14'] = _weights('vit_s14', size, image=small)
  return result


def _weights(name, size, **known):
  params = {role: towers.init(role, tower, seed=0) for role, tower in known.items()}
  params = {role: _arrays(tree) for role, tree in params.items()}
  return Weights(name=name, towers=known, params=params, size=size)


def _arrays(tree):
  import jax

  return jax.tree.map(np.asarray, tree)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n\n')[0])
  parser.add_argument('--size', type=int, default=224, help='pixels of a side')
  parser.add_argument('--runs', type=int, default=30)
  args = parser.parse_args()
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = options.inter_op_num_threads = 1
  pixels = np.random.default_rng(0).random((1, 3, args.size, args.size), np.float32)
  sessions = {}
  bytes_of = {}
  least = {}
  for name, weights in models(args.size).items():
    outputs = {}
    for dtype in DTYPES:
      with tempfile.TemporaryDirectory() as folder:
        onnx.write(weights, folder, resolution=args.size, dtype=dtype)
        path = pathlib.Path(folder, onnx.FILES['image'])
        bytes_of[name, dtype] = path.stat().st_size
        session = onnxruntime.InferenceSession(path.read_bytes(), options)
      sessions[name, dtype] = session
      outputs[dtype] = session.run(['cls'], {'pixel_values': pixels})[0].ravel()
    a, b = (outputs[dtype] for dtype in DTYPES)
    least[name] = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
  times = {key: [] for key in sessions}
  for run in range(WARMUP + args.runs):
    for key, session in sessions.items():
      start = time.perf_counter()
      session.run(None, {'pixel_values': pixels})
      if run >= WARMUP:
        times[key].append(time.perf_counter() - start)
  print(f'{"tower":<14}{"dtype":<9}{"MB":>8}{"ms":>9}{"cosine with float32":>22}')
  for (name, dtype), taken in times.items():
    cosine = least[name] if dtype == 'int8' else 1.0
    size = bytes_of[name, dtype] / 1e6
    print(f'{name:<14}{dtype:<9}{size:>8.1f}{statistics.median(taken) * 1e3:>9.1f}{cosine:>22.4f}')


if __name__ == '__main__':
  main()

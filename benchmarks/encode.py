"""Images/s and texts/s of `tips_jax.load` beside the same weights in transformers and torch, and
the peak memory.

  python benchmarks/encode.py [--sizes=S,B] [--batches=8,32] [--rounds=7] [--size=224]

Random weights, float32, all cores. Each side is a process of its own that stays; they take turns,
and a row is the median of the rounds. Full texts have 64 tokens, short ones 5 to 20 that are padded
to 64. Fails where outputs differ.
"""

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from tips_jax.core.processes import cores

ROOT = pathlib.Path(__file__).resolve().parent.parent
WIDTHS = {'S': (384, 6), 'B': (768, 12)}
TOLERANCE = 1e-4
LENGTH, VOCAB = 64, 32_000
WORK = ('images', 'full texts', 'short texts')


def inputs(what, batch, size):
  rng = np.random.default_rng(batch)
  if what == 'images':
    return rng.random((batch, size, size, 3), np.float32)
  ids = rng.integers(2, VOCAB, (batch, LENGTH))
  lengths = np.full(batch, LENGTH) if what == 'full texts' else rng.integers(5, 21, batch)
  return np.where(np.arange(LENGTH) < lengths[:, None], ids, 0)


def write(name, folder):
  """A Hugging Face folder of random weights."""
  sys.path.insert(0, str(ROOT))
  import jax

  from tips_jax.core import schema
  from tips_jax.interop.weights import Weights
  from tips_jax.interop.write import write as save
  from tips_jax.models import towers

  width, heads = WIDTHS[name]
  shape = dict(width=width, depth=12, heads=heads, mlp=4 * width)
  known = {
    'image': schema.ViT(kind='vit', mask_token=True, **shape),
    'text': schema.TextTower(kind='text', vocab=VOCAB, **shape),
    'logit': schema.Logit(kind='logit'),
  }
  params = {
    k: jax.device_get(jax.jit(lambda k=k, t=t: towers.init(k, t, seed=0))())
    for k, t in known.items()
  }
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: np.float32(x + 0.02 * rng.standard_normal(x.shape)), params)
  save(Weights(name=name, towers=known, params=params), 'hf', folder)


def ours(folder):
  sys.path.insert(0, str(ROOT))
  import tips_jax

  encoder = tips_jax.load(folder)
  return encoder.encode_image, encoder.encode_text, lambda x: x


def theirs(folder):
  import torch
  import transformers

  torch.set_num_threads(cores())
  model = transformers.Tipsv2Model.from_pretrained(folder).eval()

  @torch.no_grad()
  def image(x):
    out = model.vision_model(x).last_hidden_state.numpy()
    side = int((out.shape[1] - 2) ** 0.5)
    return out[:, :2], out[:, 2:].reshape(len(out), side, side, -1)

  @torch.no_grad()
  def text(ids):
    return model.text_model(ids, attention_mask=(ids != 0).long()).pooler_output.numpy()

  return (
    image,
    text,
    lambda x: torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x),
  )


def serve(side, folder, size):
  """Reads jobs (what, batch, rounds) as JSON lines; answers with seconds, outputs and the peak so
  far.
  """
  image, text, prepare = {'ours': ours, 'torch': theirs}[side](folder)
  for line in sys.stdin:
    job = json.loads(line)
    x = prepare(inputs(job['what'], job['batch'], size))
    run = image if job['what'] == 'images' else text
    if job.get('save'):
      out = run(x)
      np.savez(job['save'], *(out if isinstance(out, tuple) else (out,)))
    begin = time.perf_counter()
    for _ in range(job['repeats']):
      run(x)
    seconds = (time.perf_counter() - begin) / job['repeats']
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({'seconds': seconds, 'peak_mib': peak}), flush=True)


class Side:
  def __init__(self, name, folder, size):
    self.name = name
    self._process = subprocess.Popen(
      [sys.executable, __file__, '--serve', name, str(folder), str(size)],
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    )

  def __call__(self, **job):
    self._process.stdin.write(json.dumps(job) + '\n')
    self._process.stdin.flush()
    line = self._process.stdout.readline()
    if not line:
      raise SystemExit(
        f'{self.name} ended; python {__file__} --serve {self.name} FOLDER SIZE shows why'
      )
    return json.loads(line)

  def close(self):
    self._process.stdin.close()
    self._process.wait()


def compare(name, batches, rounds, size, scratch):
  """Rows of the table for one size of model. A pair of processes for each batch size, for its own
  peaks.
  """
  folder = scratch / name
  folder.mkdir()
  # Not in this process: a child's peak begins with what its parent held.
  subprocess.run(
    [sys.executable, __file__, '--write', name, str(folder)], check=True, stderr=subprocess.DEVNULL
  )
  for batch in batches:
    sides, peaks = [Side(n, folder, size) for n in ('ours', 'torch')], {}
    for what in WORK:
      saved = {s.name: scratch / f'{s.name}.npz' for s in sides}
      first = [s(what=what, batch=batch, repeats=1, save=str(saved[s.name])) for s in sides]
      a, b = (np.load(path) for path in saved.values())
      error = max(float(np.abs(a[k] - b[k]).max()) for k in a.files)
      # A second a turn: short enough that both meet the same noise.
      repeats = max(1, round(1 / min(f['seconds'] for f in first)))
      times = {s.name: [] for s in sides}
      for i in range(rounds):
        for s in sides[:: 1 if i % 2 else -1]:
          answer = s(what=what, batch=batch, repeats=repeats)
          times[s.name].append(answer['seconds'])
          peaks[s.name] = answer['peak_mib']
      rate = {n: batch / statistics.median(t) for n, t in times.items()}
      ratios = sorted(b / a for a, b in zip(times['ours'], times['torch']))
      yield (
        name,
        batch,
        what,
        f'{rate["ours"]:.2f}',
        f'{rate["torch"]:.2f}',
        f'{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})',
        f'{error:.1e}',
        f'{peaks["ours"]:.0f}',
        f'{peaks["torch"]:.0f}',
      )
      if not error <= TOLERANCE:
        raise SystemExit(
          f'{name}, {what}: outputs differ by {error:.2e}; expected at most {TOLERANCE}'
        )
    for s in sides:
      s.close()


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--sizes', default='S,B')
  parser.add_argument('--batches', default='8,32')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--size', type=int, default=224)
  args = parser.parse_args()
  row = '{:5} {:>5}  {:12} {:>9} {:>9}  {:18} {:>8} {:>9} {:>9}'.format
  print(
    f'{cores()} cores, {args.size} x {args.size}; per second; peaks in MiB, of all that the '
    'process did until then'
  )
  print(
    row('model', 'batch', '', 'tips_jax', 'torch', 'ratio (range)', 'max abs', 'ours', 'torch'),
    flush=True,
  )
  with tempfile.TemporaryDirectory() as scratch:
    for name in args.sizes.split(','):
      for line in compare(
        name,
        [int(b) for b in args.batches.split(',')],
        args.rounds,
        args.size,
        pathlib.Path(scratch),
      ):
        print(row(*line), flush=True)


if __name__ == '__main__':
  match sys.argv[1:]:
    case ['--serve', side, folder, size]:
      serve(side, folder, int(size))
    case ['--write', name, folder]:
      write(name, folder)
    case _:
      main()

"""Input speed on one core: images/s from JPEG records to 1 x 224 + 6 x 98 crops and two tokenized
texts.

  python benchmarks/input.py [--images=2048 --seconds=4 --repeats=5]

Makes photo-like 300 x 400 JPEGs (1/f noise and soft blobs, quality 90, 4:2:0) in a temporary store,
pins itself to one core and prints one JSON line per measurement: `per_s_wall` and `per_s_cpu` are
medians over the repeats, images by wall time and by the process's CPU time (trust the latter where
others use the machine), `best_per_s_cpu` is the fastest repeat.
"""

import importlib.util
import io
import itertools
import json
import os
import statistics
import tempfile
import time

import cv2
import numpy as np
import simplejpeg
from absl import app, flags
from PIL import Image

from tips_jax.core.schema import Data, Text, View
from tips_jax.data import store, tokenizer, views
from tips_jax.data.pipeline import Pipeline

IMAGES = flags.DEFINE_integer(
  'images', 2048, 'records in the store; an eighth of them are different photos'
)
SECONDS = flags.DEFINE_float('seconds', 4.0, 'length of one repeat')
REPEATS = flags.DEFINE_integer('repeats', 5, 'repeats of each measurement')
BATCH = flags.DEFINE_integer('batch', 32, 'batch size')

VIEWS = {'global': View(size=224), 'local': View(size=98, count=6, scale=(0.05, 0.4), flip=0.0)}
TEXTS = {'web': Text(field='alt_text'), 'synthetic': Text(field='captions')}
HEIGHT, WIDTH = 300, 400


def photo(rng):
  """A 1/f image with a few soft-edged blobs, about as compressible as a photograph."""
  image = np.zeros((HEIGHT, WIDTH, 3), np.float32)
  for octave in range(7):
    step = 2**octave
    noise = rng.normal(size=(HEIGHT // step + 2, WIDTH // step + 2, 3)).astype(np.float32)
    image += step**0.9 * cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
  for _ in range(6):
    center = (int(rng.integers(WIDTH)), int(rng.integers(HEIGHT)))
    color = (rng.normal(size=3) * 60).tolist()
    cv2.circle(image, center, int(rng.integers(15, 90)), color, thickness=-1, lineType=cv2.LINE_AA)
  image = (image - image.mean()) / image.std() * 50 + 128
  return np.clip(image, 0, 255).astype(np.uint8)


def make_store(folder, count):
  """Writes the store; returns its path and the encoded images."""
  rng = np.random.default_rng(0)
  words = ['w' + ''.join(rng.choice(list('aeioukrst'), 4)) for _ in range(400)]
  captions = [' '.join(rng.choice(words, 12)) for _ in range(count)]
  photos = [
    simplejpeg.encode_jpeg(photo(rng), quality=90, colorsubsampling='420')
    for _ in range(max(1, count // 8))
  ]
  path = os.path.join(folder, 'store')
  temporary = store.temporary_folder(path)
  writer = store.Writer(temporary, store.features())
  for i, caption in enumerate(captions):
    writer.add(
      'train',
      {
        'image': photos[i % len(photos)],
        'id': str(i),
        'alt_text': caption,
        'captions': [captions[i - 1], captions[i - 2]],
      },
    )
  writer.close()
  tokenizer.train(captions, os.path.join(temporary, 'tokenizer.model'), vocab_size=1000)
  return store.finish(temporary, path, {}), photos


def measure(cases):
  """Runs every case in turn, again and again, so that a noisy minute hurts all alike; prints a JSON
  line for each.

  A case is (what it is as a dict, a function, the images that one call of it handles).
  """
  rates = [[] for _ in cases]
  for _ in range(REPEATS.value):
    for (_, step, images), rate in zip(cases, rates):
      step()
      wall, cpu, done = time.perf_counter(), time.process_time(), 0
      while time.perf_counter() - wall < SECONDS.value:
        step()
        done += images
      rate.append((done / (time.perf_counter() - wall), done / (time.process_time() - cpu)))
      time.sleep(0.1)  # a pipeline's read-ahead ends before the next case begins
  for (what, _, _), rate in zip(cases, rates):
    wall, cpu = zip(*rate)
    print(
      json.dumps(
        {
          **what,
          'per_s_wall': round(statistics.median(wall)),
          'per_s_cpu': round(statistics.median(cpu)),
          'best_per_s_cpu': round(max(cpu)),
        }
      )
    )


def pillow_crops(data, rng):
  """The same crops with Pillow alone: full decode, antialiased bilinear resize of each box."""
  image = Image.open(io.BytesIO(data)).convert('RGB')
  crops = {}
  for name, view in VIEWS.items():
    crops[name] = np.empty((view.count, view.size, view.size, 3), np.uint8)
    for i, (top, left, height, width, flip) in enumerate(
      views.draw_boxes(image.height, image.width, view, rng)
    ):
      box = (left, top, left + width, top + height)
      crop = image.resize((view.size, view.size), Image.Resampling.BILINEAR, box=box)
      crops[name][i] = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop
  return crops


class PillowDataset:
  """The map-style data set that torch's DataLoader reads: Pillow's crops of the same bytes, without
  texts.
  """

  def __init__(self, photos, count):
    self.photos, self.count = photos, count

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    return pillow_crops(self.photos[i % len(self.photos)], np.random.default_rng(i))


def main(_):
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  with tempfile.TemporaryDirectory() as folder:
    path, photos = make_store(folder, IMAGES.value)
    print(
      json.dumps(
        {
          'name': 'files',
          'records': IMAGES.value,
          'photos': len(photos),
          'height': HEIGHT,
          'width': WIDTH,
          'quality': 90,
          'mean_bytes': round(statistics.mean(map(len, photos))),
          'pinned_to_one_core': True,
        }
      )
    )
    cycle = itertools.cycle(photos)
    rng = np.random.default_rng(0)
    pipelines = {
      n: Pipeline(
        Data(store=path, views=VIEWS, texts=TEXTS, threads=n, prefetch=1),
        batch_size=BATCH.value,
        seed=0,
      )
      for n in (1, 16)
    }
    cases = [
      ({'name': 'decode'}, lambda: simplejpeg.decode_jpeg(next(cycle), 'RGBX', fastdct=True), 1),
      ({'name': 'decode and resize'}, lambda: views.crops(next(cycle), VIEWS, rng), 1),
      *(
        ({'name': 'whole pipeline', 'threads': n}, p.__next__, BATCH.value)
        for n, p in pipelines.items()
      ),
      ({'name': 'pillow, decode and resize'}, lambda: pillow_crops(next(cycle), rng), 1),
    ]
    if importlib.util.find_spec('torch'):
      import torch

      torch.set_num_threads(1)
      loader = torch.utils.data.DataLoader(
        PillowDataset(photos, 10**9), batch_size=BATCH.value, num_workers=0
      )
      cases.append(
        (
          {'name': 'torch DataLoader, pillow crops', 'workers': 0},
          iter(loader).__next__,
          BATCH.value,
        )
      )
    measure(cases)
    for pipeline in pipelines.values():
      pipeline.close()


if __name__ == '__main__':
  app.run(main)

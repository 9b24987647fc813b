"""Input speed on one core: images/s from JPEG records to crops and two tokenized texts.

  python benchmarks/input.py [--images=2048 --seconds=4 --repeats=5]
  python benchmarks/input.py --open_s=0.1 --read_s=0.02

The second line measures reading alone, from files that are far away, such as a mounted bucket:
every open and every request for records takes so long. It prints the time to the first batch, with
all shards still closed, and the records per second after it. Where others use the machine, the
processor and not the wait may decide: then per_s_cpu is near per_s_wall.

Makes photo-like 300 x 400 JPEGs (1/f noise and soft blobs, quality 90, 4:2:0) in a temporary store,
pins itself to one core and prints one JSON line per measurement; crops are 1 x 224 + 6 x 98 pixels.
`per_s_wall` and `per_s_cpu` are medians over the repeats, images by wall time and by the process's
CPU time (trust the latter where others use the machine), `best_per_s_cpu` is the fastest repeat.
"""

import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from absl import app, flags
from array_record.python import array_record_module
from PIL import Image

from tips_jax.core.schema import Data, Text, View
from tips_jax.data import store, tokenizer
from tips_jax.data.pixels import views
from tips_jax.data.reading.pipeline import Pipeline

IMAGES = flags.DEFINE_integer(
  'images', 2048, 'records in the store; an eighth of them are different photos'
)
SECONDS = flags.DEFINE_float('seconds', 4.0, 'length of one repeat')
REPEATS = flags.DEFINE_integer('repeats', 5, 'repeats of each measurement')
BATCH = flags.DEFINE_integer('batch', 32, 'batch size')
OPEN_S = flags.DEFINE_float('open_s', 0.0, 'seconds that opening a shard takes')
READ_S = flags.DEFINE_float('read_s', 0.0, 'seconds that a request for records takes')

VIEWS = {'global': View(size=224), 'local': View(size=98, count=6, scale=(0.05, 0.4), flip=0.0)}
COLOR = dict(jitter=0.8, gray=0.2, blur=0.5, solarize=0.2)  # about DINOv2's
COLORED = {name: dataclasses.replace(view, **COLOR) for name, view in VIEWS.items()}
TEXTS = {'web': Text(field='alt_text'), 'synthetic': Text(field='captions')}
HEIGHT, WIDTH = 300, 400


# What is measured as a dict, the function, and the images that one call of it handles.
Case = tuple[dict, Callable[[], object], int]


def photo(rng: np.random.Generator) -> np.ndarray:
  """A 1/f image with a few soft-edged blobs, about as compressible as a photograph."""
  image = np.zeros((HEIGHT, WIDTH, 3), np.float32)
  for octave in range(7):  # the larger the structures, the stronger
    step = 2**octave
    noise = rng.normal(size=(HEIGHT // step + 2, WIDTH // step + 2, 3)).astype(np.float32)
    image += step**0.9 * cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
  for _ in range(6):
    center = (int(rng.integers(WIDTH)), int(rng.integers(HEIGHT)))
    color = (rng.normal(size=3) * 60).tolist()
    cv2.circle(image, center, int(rng.integers(15, 90)), color, thickness=-1, lineType=cv2.LINE_AA)
  image = (image - image.mean()) / image.std() * 50 + 128
  return np.clip(image, 0, 255).astype(np.uint8)


def make_tars(folder: pathlib.Path, path: str, each: int = 512) -> str:
  """Writes webdataset tars with what is in a store; returns their folder."""
  place = folder / 'tars'
  place.mkdir()
  samples = list(_samples(path))
  for number in range(math.ceil(len(samples) / each)):
    with tarfile.open(place / f'{number:05}.tar', 'w') as tar:
      for image, row in samples[number * each : (number + 1) * each]:
        key = row.pop('id')
        for end, data in {'jpg': image, 'json': json.dumps(row).encode()}.items():
          info = tarfile.TarInfo(f'{int(key):09}.{end}')
          info.size = len(data)
          tar.addfile(info, io.BytesIO(data))
  return str(place)


def make_parquet(folder: pathlib.Path, path: str, rows: int) -> str:
  """Writes a parquet file with what is in a store, `rows` a group; returns its folder."""
  place = folder / f'parquet-{rows}'
  place.mkdir()
  table = [{'image': image, **row} for image, row in _samples(path)]
  pq.write_table(pa.Table.from_pylist(table), place / '0.parquet', row_group_size=rows)
  return str(place)


def _samples(path):
  """(image, its id and texts) of each record of a store."""
  for record in store.open_store(path).source('train'):
    captions = [text.decode() for text in record['captions']]
    row = {'id': record['id'].decode(), 'alt_text': record['alt_text'].decode()}
    yield record['image'], {**row, 'captions': captions}


def make_store(folder: pathlib.Path, count: int, **options: int) -> tuple[str, list[bytes]]:
  """Writes the store; returns its path and the encoded images."""
  rng = np.random.default_rng(0)
  words = ['w' + ''.join(rng.choice(list('aeioukrst'), 4)) for _ in range(400)]
  captions = [' '.join(rng.choice(words, 12)) for _ in range(count)]
  photos = []
  for _ in range(max(1, count // 8)):
    photos.append(simplejpeg.encode_jpeg(photo(rng), quality=90, colorsubsampling='420'))
  path = folder / 'store'
  temporary = store.temporary_folder(path)
  writer = store.Writer(temporary, store.features(), **options)
  for i, caption in enumerate(captions):
    example = {
      'image': photos[i % len(photos)],
      'id': str(i),
      'alt_text': caption,
      'captions': [captions[i - 1], captions[i - 2]],
    }
    writer.add('train', example)
  writer.close()
  tokenizer.train(captions, temporary / store.TOKENIZER_FILE, vocab_size=1000)
  return store.finish(temporary, path, {}), photos


def measure(cases: Sequence[Case]) -> None:
  """Prints a JSON line for each case."""
  rates = [[] for _ in cases]
  # Every case in turn, again and again, so that a noisy minute affects all alike.
  for _ in range(REPEATS.value):
    for (_, step, images), rate in zip(cases, rates):
      step()  # warms the caches
      wall = time.perf_counter()
      cpu = time.process_time()
      done = 0
      while time.perf_counter() - wall < SECONDS.value:
        step()
        done += images
      rate.append((done / (time.perf_counter() - wall), done / (time.process_time() - cpu)))
      time.sleep(0.1)  # a pipeline's read-ahead ends before the next case begins
  for (what, _, _), rate in zip(cases, rates):
    wall, cpu = zip(*rate)
    report(
      **what,
      per_s_wall=round(statistics.median(wall)),
      per_s_cpu=round(statistics.median(cpu)),
      best_per_s_cpu=round(max(cpu)),
    )


def report(**values: object) -> None:
  """Prints one JSON line."""
  print(json.dumps(values))


def pillow_crops(data: bytes, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """The same crops with Pillow alone: full decode, antialiased bilinear resize of each box."""
  image = Image.open(io.BytesIO(data)).convert('RGB')
  crops = {}
  for name, view in VIEWS.items():
    crops[name] = np.empty((view.count, view.size, view.size, 3), np.uint8)
    boxes = views.draw_boxes(image.height, image.width, view, rng)
    for i, (top, left, height, width, flip) in enumerate(boxes):
      box = (left, top, left + width, top + height)
      crop = image.resize((view.size, view.size), Image.Resampling.BILINEAR, box=box)
      if flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
      crops[name][i] = crop
  return crops


class PillowDataset:
  """The map-style data set of torch's DataLoader: Pillow's crops of the same bytes, no texts."""

  def __init__(self, photos: Sequence[bytes], count: int):
    self.photos = photos
    self.count = count

  def __len__(self):
    return self.count

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    return pillow_crops(self.photos[i % len(self.photos)], np.random.default_rng(i))


def torch_loader(photos: Sequence[bytes]) -> Callable[[], object]:
  """A function that gives the next batch of torch's DataLoader."""
  import torch

  torch.set_num_threads(1)
  dataset = PillowDataset(photos, 10**9)
  loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH.value, num_workers=0)
  return iter(loader).__next__


def webdataset_loader(folder: str) -> Callable[[], object]:
  """A function that gives the next batch of torch's DataLoader on tars, as webdataset's manual has
  it: tars are shuffled, and samples in a buffer of a thousand; no worker processes.
  """
  import torch
  import webdataset

  torch.set_num_threads(1)
  rng = np.random.default_rng(0)
  tars = sorted(map(str, pathlib.Path(folder).glob('*.tar')))

  def prepared(sample):
    crops = pillow_crops(sample['jpg'], rng)
    row = json.loads(sample['json'])
    return {**crops, 'web': row['alt_text'], 'synthetic': row['captions'][0]}

  dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), repeat=True, empty_check=False)
  dataset = dataset.shuffle(1000).map(prepared)
  loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH.value, num_workers=0)
  return iter(loader).__next__


def tf_data(folder: pathlib.Path, path: str) -> Callable[[], object]:
  """A function that gives the next batch of tf.data on a TFRecord file, by one thread."""
  import tensorflow as tf

  file = str(folder / 'records.tfrecord')
  with tf.io.TFRecordWriter(file) as writer:
    for raw in store.open_store(path).source('train').raw:
      writer.write(raw)
  features = {
    'image': tf.io.FixedLenFeature((), tf.string),
    'alt_text': tf.io.FixedLenFeature((), tf.string),
    'captions': tf.io.RaggedFeature(tf.string),
  }

  def crops(record):
    example = tf.io.parse_single_example(record, features)
    image = tf.io.decode_jpeg(example['image'], 3)
    size = tf.shape(image)
    result = {'web': example['alt_text'], 'synthetic': example['captions'][0]}
    for name, view in VIEWS.items():
      several = []
      for _ in range(view.count):
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
          size,
          tf.zeros((0, 0, 4)),
          area_range=view.scale,
          aspect_ratio_range=view.ratio,
          use_image_if_no_bounding_boxes=True,
        )
        crop = tf.image.resize(tf.slice(image, begin, extent), [view.size] * 2, antialias=True)
        several.append(tf.cast(crop, tf.uint8))
      result[name] = tf.stack(several)
    return result

  options = tf.data.Options()
  options.threading.private_threadpool_size = 1
  dataset = tf.data.TFRecordDataset(file).repeat().shuffle(1000).map(crops).batch(BATCH.value)
  return iter(dataset.with_options(options)).__next__


class FarReader:
  """array_record's reader of a file that is far away."""

  reader = array_record_module.ArrayRecordReader

  def __init__(self, *args: object, **kwargs: object):
    time.sleep(OPEN_S.value)
    self._reader = self.reader(*args, **kwargs)
    self.num_records = self._reader.num_records

  def read(self, first: int, stop: int) -> list[bytes]:
    time.sleep(READ_S.value)
    return self._reader.read(first, stop)


def measure_far() -> None:
  """Reading alone: batches of two texts, without images to decode."""
  with tempfile.TemporaryDirectory() as folder:
    path, _ = make_store(pathlib.Path(folder), IMAGES.value, shard_bytes=2**20)
    shards = len(list(pathlib.Path(path).glob('*.array_record*')))
    array_record_module.ArrayRecordReader = FarReader
    for neighbors in (1, 16):
      begin = time.perf_counter()
      data = Data(store=path, views={}, texts=TEXTS, neighbors=neighbors)
      pipeline = Pipeline(data, batch_size=BATCH.value, seed=0)
      next(pipeline)
      first_s = time.perf_counter() - begin
      batches = 0
      begin = time.perf_counter()
      cpu = time.process_time()
      while time.perf_counter() - begin < SECONDS.value:
        next(pipeline)
        batches += 1
      wall = time.perf_counter() - begin
      cpu = time.process_time() - cpu
      pipeline.close()
      report(
        name='far away',
        shards=shards,
        open_s=OPEN_S.value,
        read_s=READ_S.value,
        threads=data.threads,
        batch=BATCH.value,
        neighbors=neighbors,
        first_batch_s=round(first_s, 2),
        per_s_wall=round(batches * BATCH.value / wall),
        per_s_cpu=round(batches * BATCH.value / cpu),
      )


def main(_: Sequence[str]) -> None:
  if hasattr(os, 'sched_setaffinity'):  # Linux
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  if OPEN_S.value or READ_S.value:
    measure_far()
    return
  with tempfile.TemporaryDirectory() as folder:
    path, photos = make_store(pathlib.Path(folder), IMAGES.value)
    report(
      name='files',
      records=IMAGES.value,
      photos=len(photos),
      height=HEIGHT,
      width=WIDTH,
      quality=90,
      mean_bytes=round(statistics.mean(map(len, photos))),
      pinned_to_one_core=True,
    )
    cycle = itertools.cycle(photos)
    rng = np.random.default_rng(0)
    batch = BATCH.value
    cases = [
      ({'name': 'decode'}, lambda: simplejpeg.decode_jpeg(next(cycle), 'RGBX', fastdct=True), 1),
      ({'name': 'decode and resize'}, lambda: views.crops(next(cycle), VIEWS, rng), 1),
      ({'name': 'decode, resize, color'}, lambda: views.crops(next(cycle), COLORED, rng), 1),
    ]
    pipelines = []
    tokens = os.path.join(path, store.TOKENIZER_FILE)
    inputs = {
      'store': (path, (1, 16)),
      'tars': (make_tars(pathlib.Path(folder), path), (16,)),
      'parquet, 64 rows a group': (make_parquet(pathlib.Path(folder), path, 64), (16,)),
      'parquet, 512 rows a group': (make_parquet(pathlib.Path(folder), path, 512), (16,)),
    }
    for name, (place, numbers) in inputs.items():
      for threads in numbers:
        data = Data(
          store=place, tokenizer=tokens, views=VIEWS, texts=TEXTS, threads=threads, prefetch=1
        )
        pipelines.append(Pipeline(data, batch_size=batch, seed=0))
        what = {'name': 'whole pipeline', 'input': name, 'threads': threads}
        cases.append((what, pipelines[-1].__next__, batch))
    cases.append(({'name': 'pillow, decode and resize'}, lambda: pillow_crops(next(cycle), rng), 1))
    if importlib.util.find_spec('torch'):
      what = {'name': 'torch DataLoader, pillow crops', 'workers': 0}
      cases.append((what, torch_loader(photos), batch))
    if importlib.util.find_spec('torch') and importlib.util.find_spec('webdataset'):
      what = {'name': 'torch DataLoader on webdataset, pillow crops, texts as they are'}
      cases.append((what, webdataset_loader(inputs['tars'][0]), batch))
    if importlib.util.find_spec('tensorflow'):
      what = {'name': 'tf.data on TFRecords, crops of TensorFlow, texts as they are'}
      cases.append((what, tf_data(pathlib.Path(folder), path), batch))
    measure(cases)
    for pipeline in pipelines:
      pipeline.close()


if __name__ == '__main__':
  app.run(main)

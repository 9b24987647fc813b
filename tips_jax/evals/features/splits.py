"""What the tasks of a data set share: its splits as rectangles, encoded once, with their
annotations beside them.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tips_jax.data.pixels import images
from tips_jax.evals.features import reading
from tips_jax.evals.probes import depth, dpt, masks, normals

EXAMPLES = 6
# Encoded annotations held in memory: probes read them once an epoch.
_KEPT = 2048
# Shapes of a task that see a central square: all of it, or ImageNet's share of 224 in 256.
_CUT = {'cut': True, 'center': 0.875}
# Images that are tried for the shape of a split: the first may be broken.
_LOOKED_AT = 16


@dataclasses.dataclass(frozen=True)
class Resize:
  """How an image becomes uint8 [height, width, 3]: squeezed as it is, or `cut` to its central
  square first, of this share of its short side (True: all of it)."""

  height: int
  width: int
  cut: bool | float = False

  def __call__(self, record):
    image = Image.fromarray(self.crop(decode(record)))
    return np.asarray(image.resize((self.width, self.height), Image.Resampling.BILINEAR))

  def crop(self, array: np.ndarray) -> np.ndarray:
    """The part of an image or an annotation [H, W, ...] that is seen."""
    if not self.cut:
      return array
    side = round(self.cut * min(array.shape[:2]))
    top = (array.shape[0] - side) // 2
    left = (array.shape[1] - side) // 2
    return array[top : top + side, left : left + side]


class SplitFeatures:
  """A split, or some of its records, with its features; i counts the readable images."""

  def __init__(self, source, numbers, features, crop=lambda array: array):
    self.arrays = features.arrays
    self.intermediate_layers = features.intermediate_layers
    self.label = features.label
    self.key = features.key
    self.rows = numbers[features.rows]
    self._source = source
    self._crop = crop
    # Encoded, not decoded: a PNG takes a fraction of its pixels.
    self._annotation = functools.lru_cache(_KEPT)(lambda name, i: self.record(i)[name])

  def __len__(self):
    return len(self.rows)

  def record(self, i: int) -> dict:
    return self._source[int(self.rows[i])]

  def image(self, i: int) -> np.ndarray:
    """uint8 [H, W, 3] at its own resolution."""
    return self._crop(decode(self.record(i)))

  def encoded(self, name: str, i: int) -> dict:
    """The record's annotation alone, as it is stored, under its name."""
    return {name: self._annotation(name, int(i))}

  def mask(self, i: int) -> np.ndarray:
    """Class ids uint8 [H, W]."""
    return self._crop(masks.decode_mask(self._annotation('mask', int(i))))

  def depth(self, i: int) -> np.ndarray:
    """Meters [H, W], 0 = missing."""
    return self._crop(depth.decode(self._annotation('depth', int(i))))

  def normals(self, i: int) -> np.ndarray:
    """[H, W, 3], zeros = missing."""
    return self._crop(normals.decode(self._annotation('normals', int(i))))

  def shown(self) -> list[int]:
    """At most EXAMPLES numbers, evenly spaced."""
    return reading.records(self, EXAMPLES).tolist()


class DatasetFeatures:
  """The splits of one data set, each encoded when it is first needed, with all outputs that any of
  its jobs needs.
  """

  def __init__(self, encoder, jobs, *, cache, batch_size, limit, progress, label):
    self._encoder = encoder
    self._jobs = jobs
    self._cache = cache
    self._batch_size = batch_size
    self._limit = limit
    self._progress = progress
    self._label = label
    # By (split, how images are seen): tasks that see a split alike share its features.
    self._parts = {}
    self._seconds = {id(job): {'encoder': 0.0, 'reading': 0.0} for job in jobs}
    self._frames = {id(job): frame(job, encoder) for job in jobs if job.shape != 'aspect'}

  def get(self, job: Any, role: str) -> SplitFeatures:
    """The SplitFeatures of a job's split: 'train', 'test' or 'index'."""
    split = job.splits[role]
    shape = self._frames[id(job)]
    if (split, shape) not in self._parts:
      users = []
      outputs = set()
      for other in self._jobs:
        if self._frames.get(id(other)) == shape and split in other.splits.values():
          users.append(other)
          outputs.update(other.spec.outputs)
      # One pass of the encoder gives what any of them needs.
      self._parts[split, shape] = self.extract(
        users,
        split,
        self.numbers(job, role),
        shape,
        outputs=outputs,
        crop=shape.crop,
        key=dataclasses.astuple(shape),
      )
    return self._parts[split, shape]

  def numbers(self, job: Any, role: str) -> np.ndarray:
    """Numbers of the records of a split that take part."""
    source = job.data.source(job.splits[role])
    return reading.records(source, self._limit or len(source))

  def extract(
    self,
    jobs: Sequence,
    split: str,
    numbers: np.ndarray,
    prepare: Callable[[dict], np.ndarray],
    *,
    outputs: Iterable[str],
    key: Any,
    source: Any = None,
    **options,
  ) -> SplitFeatures:
    """Some records of a split, or of `source`, made of it, for jobs that share the cost."""
    data = jobs[0].data
    source = source or data.source(split)
    # All that the features depend on: equal keys are equal arrays.
    about = {
      'data': data.fingerprint(split),
      'split': split,
      'frame': key,
      'records': hashlib.sha256(np.asarray(numbers, np.int64).tobytes()).hexdigest(),
    }
    layers = ()
    if 'intermediate_layers' in outputs:
      layers = dpt.intermediate_layers_of(self._encoder.depth)
    with self._bar(f'{jobs[0].dataset} {split}', len(numbers)) as bar:
      features = self._cache.extract(
        self._encoder,
        _Some(source, numbers),
        prepare,
        key=about,
        outputs=sorted(set(outputs) - {'intermediate_layers'}),
        intermediate_layers=layers,
        batch_size=self._batch_size,
        progress=bar,
      )
    self._charge(jobs, features.seconds)
    return SplitFeatures(source, numbers, features, **options)

  def texts(self, job: Any, texts: Sequence[str]) -> np.ndarray:
    """Embeddings [T, E] of texts."""
    with self._bar('texts', len(set(texts))) as bar:
      embeddings, seconds = self._cache.texts(self._encoder, texts, progress=bar)
    self._charge([job], {'encoder': seconds})
    return embeddings

  def seconds(self, job: Any) -> dict[str, float]:
    """'encoder' and 'reading' of a job so far, its share of what it has in common with others."""
    return dict(self._seconds[id(job)])

  def total(self) -> float:
    """Seconds in the encoder and reading, of all jobs."""
    return sum(sum(seconds.values()) for seconds in self._seconds.values())

  def _charge(self, jobs, seconds):
    # Jobs share the time evenly: none of them is more to blame for it than another.
    for job in jobs:
      for name, value in seconds.items():
        self._seconds[id(job)][name] += value / len(jobs)

  def _bar(self, label, total):
    """A progress line, or None, as a context that closes it."""
    if not self._progress:
      return contextlib.nullcontext()
    return contextlib.closing(self._progress(f'{self._label} {label}', total))


@dataclasses.dataclass(kw_only=True)
class TaskInputs:
  """What a task has to work with: its evaluation, the encoder, the splits, where to keep what it
  trains, and what it shares with the others of its pool (tasks/instance_retrieval.Pool)."""

  evaluation: Any
  encoder: Any
  parts: DatasetFeatures
  cache: Any
  output: Any
  pool: Any = None

  def part(self, role: str) -> SplitFeatures:
    return self.parts.get(self.evaluation, role)

  def texts(self, texts: Sequence[str]) -> np.ndarray:
    return self.parts.texts(self.evaluation, texts)


class _Some:
  """Some records of a source, by number."""

  def __init__(self, source, numbers):
    self._source = source
    self._numbers = numbers

  def __len__(self):
    return len(self._numbers)

  def __getitem__(self, i):
    return self._source[int(self._numbers[i])]


def decode(record: Mapping) -> np.ndarray:
  """uint8 [H, W, 3]; ValueError where the image is missing or broken."""
  _check_image(record)
  return images.decode(record['image'])


def header(record: Mapping) -> tuple[int, int]:
  """(height, width) of a record's image, without decoding it; ValueError where there is none."""
  _check_image(record)
  return images.encoded(record['image'])[:2]


def frame(job: Any, encoder: Any) -> Resize:
  """The Resize of a job: whole patches, at least as large as asked."""
  if job.shape == 'native':
    height, width = _native(job.data.source(job.splits['train']))
    scale = job.size / min(height, width) if job.size else 1
    height = round(scale * height)
    width = round(scale * width)
  else:
    height = width = job.size or getattr(encoder, 'size', 224)
  # Up to whole patches: nothing is cut off.
  height = -(-height // encoder.patch) * encoder.patch
  width = -(-width // encoder.patch) * encoder.patch
  return Resize(height, width, cut=_CUT.get(job.shape, False))


def _native(source):
  """(height, width) of the first image that can be read."""
  for i in range(min(len(source), _LOOKED_AT)):
    try:
      return header(source[i])
    except ValueError:
      continue
  return 224, 224


def _check_image(record):
  if not record['image']:
    raise ValueError(record.get('problem') or 'no image')

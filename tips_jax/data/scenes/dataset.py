"""`scenes`, the embedded data set: small drawn scenes with every annotation that the house's tasks
need.

Each record is a store's record (see store.py): a JPEG, a noisy web-like alt text, a short and a
long synthetic caption (none for 3 %), and exact annotations. mask: ids into MASK_CLASSES (six kinds
of surroundings, then the shapes); label: the shape with most visible pixels; depth: millimeters,
finite everywhere (sky and mountains are a backdrop at 12 m);
normals: x right, y up, z toward the viewer; boxes: of the visible pixels, largest object first,
with one region caption and one tag (the shape's name) each. A record is a function of (seed, split,
index, size, objects, typical) alone.

Left and right occur in the captions: train on this data set with `flip` 0.
"""

import dataclasses
import json
import os
import shutil

import cv2
import numpy as np
import tensorflow_datasets as tfds

from tips_jax.core.errors import InputError
from tips_jax.data import store
from tips_jax.data.scenes import draw as scenes_draw
from tips_jax.data.scenes import words as scenes_words

LABELS = tuple(scenes_draw.SHAPES)
MASK_CLASSES = scenes_draw.MASK_CLASSES
_REVISION = 1  # of the drawing and the grammar: a store of another revision is not reused
_FIRST = {
  'train': 0,
  'test': 2**31,
}  # scene number of a split's first record: splits never share a scene
_NO_CAPTIONS = 0.03
_DESCRIPTION = 'Drawn scenes of textured solids on structured backgrounds.'
_VOCAB_SIZE = 1024  # whole words and file-name pieces; the grammar has about 250 words


@dataclasses.dataclass(eq=False)
class ScenesConfig(tfds.core.BuilderConfig):
  """How many scenes, their side in pixels, the seed, the most objects of one, the share of those
  that look typical.
  """

  name: str = 'custom'
  train: int = 2000
  test: int = 500
  size: int = 96
  seed: int = 0
  objects: int = scenes_draw.MOST
  typical: float = 0.0


class Scenes(tfds.core.GeneratorBasedBuilder):
  """The same records for those who use TFDS directly: `Scenes(data_dir=...,
  file_format='array_record')`, or with `config=ScenesConfig(...)`; then `download_and_prepare()`.
  `build` adds what makes it a store of the house.
  """

  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS = [ScenesConfig(name='default')]
  code_path = None  # no checksums beside this file: nothing is ever downloaded

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self, description=_DESCRIPTION, features=_features(), disable_shuffling=True
    )

  def _split_generators(self, dl_manager):
    counts = {'train': self.builder_config.train, 'test': self.builder_config.test}
    return {
      split: self._generate_examples(split, count) for split, count in counts.items() if count
    }

  def _generate_examples(self, split, count):
    for i in range(count):
      c = self.builder_config
      yield (
        i,
        example(i, split=split, size=c.size, seed=c.seed, objects=c.objects, typical=c.typical),
      )


def _features():
  return store.features(store.ANNOTATIONS, labels=LABELS)


def example(index, *, split='train', size=96, seed=0, objects=scenes_draw.MOST, typical=0.0):
  """Record `index` of a split: the dict that the store's features encode, images as JPEG or PNG
  bytes.
  """
  number = _FIRST[split] + index
  scene = scenes_draw.draw(number, size=size, seed=seed, objects=objects, typical=typical)
  rng = np.random.default_rng((seed, number, 1))
  texts = scenes_words.captions(scene, rng)
  return {
    'image': _encode('.jpg', scene.image[..., ::-1], cv2.IMWRITE_JPEG_QUALITY, 92),
    'id': f'{split}-{index:07d}',
    'alt_text': scenes_words.alt_text(scene, rng),
    'captions': texts if rng.random() >= _NO_CAPTIONS else [],
    'label': scene.items[0].shape,
    'mask': _png(scene.mask),
    'depth': _png(scene.depth),
    'normals': _png(scene.normals[..., ::-1]),
    'boxes': np.array([item.box for item in scene.items], np.float32),
    'region_captions': scenes_words.region_captions(scene, rng),
    'tags': [item.shape for item in scene.items],
  }


def build(path, *, train, test, size, seed=0, objects=scenes_draw.MOST, typical=0.0, progress=None):
  """Generate the store at `path`, and a tokenizer from its training texts, unless it is there
  already; return `path`.

  `progress(done, total)` is called after each record. Raises InputError for a bad number, and when
  `path` holds anything but this very data set.
  """
  from tips_jax.data import tokenizer  # here, so that drawing alone does not load SentencePiece

  spec = dict(train=train, test=test, size=size, seed=seed, objects=objects, typical=typical)
  for name, least in dict(train=1, test=0, size=32, seed=0, objects=1).items():
    if not isinstance(spec[name], int) or spec[name] < least:
      raise InputError(
        f'scenes.{name}: got {spec[name]!r}; expected an integer of at least {least}'
      )
  if objects > scenes_draw.MOST:
    raise InputError(f'scenes.objects: got {objects}; expected at most {scenes_draw.MOST}')
  if not 0 <= typical <= 1:
    raise InputError(f'scenes.typical: got {typical}; expected a share from 0 to 1')
  info = {'scenes': {'revision': _REVISION, **spec}}
  path = os.path.abspath(os.path.expanduser(path))
  if os.path.exists(os.path.join(path, store.INFO_FILE)):
    found = store.open_store(path).info
    if found != info:
      raise InputError(
        f'scenes: {path!r} holds other data: got {found}; expected {info}; give another path or remove that one'
      )
    return path

  folder = store.temporary_folder(path)
  try:
    writer = store.Writer(folder, _features(), name='scenes', description=_DESCRIPTION)
    texts = []
    for split, count in (('train', train), ('test', test)):
      for i in range(count):
        record = example(i, split=split, size=size, seed=seed, objects=objects, typical=typical)
        writer.add(split, record)
        if split == 'train':
          texts += [record['alt_text'], *record['captions'], *record['region_captions']]
        if progress:
          progress(i + 1 + (train if split == 'test' else 0), train + test)
    writer.close()
    with open(os.path.join(folder, 'annotations.json'), 'w') as file:
      json.dump({'mask_classes': MASK_CLASSES}, file)
    tokenizer.train(texts, os.path.join(folder, store.TOKENIZER_FILE), vocab_size=_VOCAB_SIZE)
    return store.finish(folder, path, info)
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise


def _png(array):
  return _encode('.png', array, cv2.IMWRITE_PNG_COMPRESSION, 1)


def _encode(suffix, array, *options):
  return cv2.imencode(suffix, array, options)[1].tobytes()

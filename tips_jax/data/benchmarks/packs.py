"""Readers of the small packs: a zip of images with one JSON line an image, or an npz of encoded
images.

Splits: `camvid` holds out one sequence (frames of one drive resemble each other), `rgbd` the last
fifth of its film, `cifar10` and `flickr8k` have their own, `coco_mini` is for testing alone (masks
and boxes; or captions).
"""

import io
import zipfile

import numpy as np
from PIL import Image

from tips_jax.core.errors import InputError
from tips_jax.data.benchmarks import reader as base
from tips_jax.data.ingest.reader import Sample

_NO_CLASS = 254  # a mask value that no class has: the checker tells


class _Pack(base.Benchmark):
  """`images.zip` (or one a split) with rows in a JSONL; `_keep` picks the rows of a split."""

  zip_file, table = 'images.zip', 'train.jsonl'

  def _list(self, split):
    self.meta = self._json(self.root / 'meta.json')
    try:
      self._members = set(zipfile.ZipFile(self.root / self._in(self.zip_file)).namelist())
    except (OSError, zipfile.BadZipFile) as error:
      raise InputError(
        f'{self.name}: missing split {self.split!r}: {self.root / self._in(self.zip_file)} is not a '
        f'whole zip ({error}); see {base.PAGE}'
      ) from error
    rows = self._json_lines(self.root / self._in(self.table))
    return self._keep(rows, split)

  def _in(self, file):
    return file.format(split=self.official[self.split])

  def _keep(self, rows, split):
    return rows

  def _files(self, row):
    return [row[field] for field in ('image', 'mask', 'depth') if field in row]

  def _key(self, row):
    return row['image']

  def missing(self):
    return [name for row in self.items for name in self._files(row) if name not in self._members]

  def _read(self, name):
    if not hasattr(self, '_zip'):
      self._zip = zipfile.ZipFile(self.root / self._in(self.zip_file))
    if name not in self._members:
      raise FileNotFoundError(2, 'not in the zip', name)
    return self._zip.read(name)

  def __getstate__(self):
    return {
      name: value for name, value in vars(self).items() if name not in ('_zip', '_annotations_json')
    }

  def captions_of(self, row):
    return row.get('captions')


class CamVid(_Pack):
  """CamVid at 480x360, 11 classes; void is 11 in the pack."""

  name, folders, annotations = 'camvid', ('camvid',), ('mask',)
  official = {'train': 'train', 'test': 'train'}
  held_out = '0001TP'

  def _keep(self, rows, split):
    self.mask_classes = tuple(self.meta['classes'][: self.meta['ignore_index']])
    self._table = np.arange(256, dtype=np.uint8)
    self._table[self.meta['ignore_index']] = base.VOID
    return [row for row in rows if (row['sequence'] == self.held_out) == (self.split == 'test')]

  def _sample(self, row):
    mask = base.class_ids(self._read(row['mask']), self._table)
    return Sample(row['image'], self._read(row['image']), '', [], {'mask': mask})


class Rgbd(_Pack):
  """One kitchen (7-Scenes) at 320x240 with depth; normals are derived from it.

  A Kinect's depth comes in steps of about a centimeter, hence differences over several pixels and
  none over edges.
  """

  name, folders, annotations = 'rgbd', ('rgbd',), ('depth', 'normals')
  official = {'train': 'train', 'test': 'train'}
  step, jump = 3, 0.05

  def _keep(self, rows, split):
    first = len(rows) * 4 // 5
    return rows[first:] if self.split == 'test' else rows[:first]

  def _sample(self, row):
    data = self._read(row['depth'])
    fx, _, cx, cy = row['fx_fy_cx_cy']
    depth = np.asarray(Image.open(io.BytesIO(data)))
    normals, valid = base.normals_from_depth(
      depth, fx, center=(cx, cy), step=self.step, jump=self.jump
    )
    extra = {'depth': data, 'normals': base.png(base.encode_normals(normals, valid))}
    return Sample(row['image'], self._read(row['image']), '', [], extra)


class Flickr8k(_Pack):
  """Flickr8k at 128x128, five captions an image; `test` is the official dev split."""

  name, folders = 'flickr8k', ('flickr8k',)
  official = {'train': 'train', 'test': 'dev'}
  zip_file, table = '{split}.zip', '{split}.jsonl'

  def _sample(self, row):
    return Sample(row['image'], self._read(row['image']), '', list(row['captions']), {})


class CocoMini(_Pack):
  """COCO photos: `test` those with a panoptic mask, `captions` those with captions; all with boxes.

  Class ids are the ranks of the panoptic category ids in meta.json, without 0 (unlabeled: void).
  """

  name, folders = 'coco_mini', ('coco_mini',)
  official = {'test': 'train', 'captions': 'train'}

  def _keep(self, rows, split):
    self.annotations = ('mask', 'boxes', 'tags') if self.split == 'test' else ('boxes', 'tags')
    ids = sorted(int(i) for i in self.meta['semantic_classes'] if i != '0')
    if self.split == 'test':
      self.mask_classes = tuple(self.meta['semantic_classes'][str(i)] for i in ids)
    self._table = np.full(256, _NO_CLASS, np.uint8)
    self._table[0] = base.VOID
    self._table[ids] = np.arange(len(ids))
    return [row for row in rows if ('mask' in row if self.split == 'test' else row['captions'])]

  def _sample(self, row):
    width, height = row['size']
    corners = np.array([box for _, box in row['boxes']], np.float64).reshape(-1, 4)
    x, y, w, h = corners.T
    boxes = (
      np.stack([y / height, x / width, (y + h) / height, (x + w) / width], -1)
      .clip(0, 1)
      .astype(np.float32)
    )
    extra = {'boxes': boxes, 'tags': [name for name, _ in row['boxes']]}
    if self.split == 'test':
      extra['mask'] = base.class_ids(self._read(row['mask']), self._table)
    return Sample(row['image'], self._read(row['image']), '', list(row['captions']), extra)


class Cifar10(base.Benchmark):
  """CIFAR-10 as encoded 32x32 images in an npz; official train and test."""

  name, folders, annotations = 'cifar10', ('cifar10',), ('label',)
  official = {'train': 'train', 'test': 'test'}

  def _list(self, split):
    self.label_names = tuple(self._json(self.root / 'meta.json')['classes'])
    path = self.root / f'{split}.npz'
    try:
      with np.load(path) as arrays:
        self._blob, self._offsets, self._labels = (
          arrays['blob'].tobytes(),
          arrays['offsets'],
          arrays['label'],
        )
    except (OSError, KeyError, ValueError) as error:
      raise InputError(
        f'{self.name}: missing split {self.split!r}: cannot read {path} ({error})'
      ) from error
    return range(len(self._labels))

  def _files(self, index):
    return [self.root / f'{self.official[self.split]}.npz']

  def missing(self):
    return []

  def _key(self, index):
    return f'{self.split}-{index:05d}'

  def _sample(self, index):
    image = self._blob[self._offsets[index] : self._offsets[index + 1]]
    return Sample(self._key(index), image, '', [], {'label': int(self._labels[index])})


READERS = (CamVid, Rgbd, Cifar10, Flickr8k, CocoMini)

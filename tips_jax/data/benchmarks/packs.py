"""Readers of the small packs: a zip of images with one JSON line per image, or an npz of encoded
images.

Splits: `camvid` holds out one sequence (frames of one drive resemble each other), `rgbd` the last
fifth of its film, `cifar10` and `flickr8k` have official ones, `coco_mini` is for testing alone
(masks and boxes, or captions).
"""

import functools
import io
import pathlib
import typing
import zipfile

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.data.benchmarks import reader as base
from tips_jax.data.benchmarks import values
from tips_jax.data.ingest import archives
from tips_jax.data.ingest.checks import VOID
from tips_jax.data.pixels.images import open_image

_NO_CLASS = 254  # a mask value that no class has: the checks of the data set report it

Row = dict[str, typing.Any]  # one image, as the pack's JSONL has it


class _Pack(base.Benchmark):
  """`images.zip` (or one zip per split) with rows in a JSONL; `_keep` picks the rows of a split."""

  zip_file = 'images.zip'
  table = 'train.jsonl'

  def _list(self, split):
    self.meta = self._json(self.root / 'meta.json')
    path = self.root / self.zip_file.format(split=split)
    try:
      with zipfile.ZipFile(path) as archive:
        self._members = set(archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
      raise self._missing_split(f'{path} is not a complete zip ({error})') from error
    rows = self._json_lines(self.root / self.table.format(split=split))
    for row in rows:
      _check_row(row)
    return self._keep(rows)

  def _keep(self, rows):
    return rows

  def files_of(self, row: Row) -> list[str]:
    return [row[field] for field in ('image', 'mask', 'depth') if field in row]

  def key_of(self, row: Row) -> str:
    return row['image']

  def missing(self) -> list[str]:
    return [name for row in self.items for name in self.files_of(row) if name not in self._members]

  @functools.cached_property
  def _zip(self):
    return zipfile.ZipFile(self.root / self.zip_file.format(split=self.official[self.split]))

  def _read(self, name):
    if name not in self._members:
      raise FileNotFoundError(2, 'not in the zip', name)
    data, problem = archives.read_member(self._zip, name)
    if problem:
      raise ValueError(f'{name}: {problem}')
    return data

  def captions_of(self, row: Row) -> list[str] | None:
    return row.get('captions')

  def _image(self, row):
    return self._read(row['image'])


def _check_row(row):
  """Raises ValueError for a row that names no image, or holds other types than a pack's rows do."""
  values.get_name(row, 'image')
  for field in ('mask', 'depth'):
    if field in row:
      values.get_name(row, field)
  if 'captions' in row:
    values.get_list(row, 'captions', str)


class CamVid(_Pack):
  """CamVid at 480x360, 11 classes; void is 11 in the pack."""

  name = 'camvid'
  folders = ('camvid',)
  annotations = ('mask',)
  official = {'train': 'train', 'test': 'train'}
  held_out = '0001TP'

  def _keep(self, rows):
    void = values.get(self.meta, 'ignore_index', int)
    self.mask_classes = tuple(values.get_list(self.meta, 'classes', str)[:void])
    self._table = np.arange(256, dtype=np.uint8)
    self._table[void] = VOID
    testing = self.split == 'test'
    return [row for row in rows if (values.get(row, 'sequence', str) == self.held_out) == testing]

  def _extra(self, row):
    return {'mask': base.class_ids(self._read(row['mask']), self._table)}


class Rgbd(_Pack):
  """One kitchen (7-Scenes) at 320x240 with depth; normals are derived from it."""

  name = 'rgbd'
  folders = ('rgbd',)
  annotations = ('depth', 'normals')
  official = {'train': 'train', 'test': 'train'}
  # A Kinect's depth comes in steps of about a centimeter, hence differences over several pixels
  # and none across edges.
  step = 3
  jump = 0.05

  def _keep(self, rows):
    first = len(rows) * 4 // 5
    return rows[first:] if self.split == 'test' else rows[:first]

  def _extra(self, row):
    data = self._read(row['depth'])
    focal, _, x, y = row['fx_fy_cx_cy']
    depth = np.asarray(open_image(data))
    normals, valid = base.normals_from_depth(
      depth, focal, center=(x, y), step=self.step, jump=self.jump
    )
    return {'depth': data, 'normals': base.png(base.encode_normals(normals, valid))}


class Flickr8k(_Pack):
  """Flickr8k at 128x128, five captions per image; `test` is the official dev split."""

  name = 'flickr8k'
  folders = ('flickr8k',)
  official = {'train': 'train', 'test': 'dev'}
  zip_file = '{split}.zip'
  table = '{split}.jsonl'


class CocoMini(_Pack):
  """COCO photos: `test` those with a panoptic mask, `captions` those with captions; all with boxes.

  Class ids are the ranks of the panoptic category ids in meta.json, without 0 (unlabeled: void).
  """

  name = 'coco_mini'
  folders = ('coco_mini',)
  official = {'test': 'train', 'captions': 'train'}

  def _keep(self, rows):
    names = values.get(self.meta, 'semantic_classes', dict)
    ids = sorted(int(i) for i in names if i != '0')
    self._table = np.full(256, _NO_CLASS, np.uint8)
    self._table[0] = VOID
    self._table[ids] = np.arange(len(ids))
    if self.split == 'test':
      self.annotations = ('mask', 'boxes', 'region_tags', 'tags')
      self.mask_classes = tuple(values.get(names, str(i), str) for i in ids)
      return [row for row in rows if 'mask' in row]
    self.annotations = ('boxes', 'region_tags', 'tags')
    return [row for row in rows if values.get(row, 'captions', list)]

  def _extra(self, row):
    width, height = row['size']
    names = [values.of_kind(name, 'boxes', str) for name, _ in row['boxes']]
    corners = np.array([box for _, box in row['boxes']], np.float64).reshape(-1, 4)
    x, y, w, h = corners.T
    # From COCO's pixels to a store's fractions.
    boxes = np.stack([y / height, x / width, (y + h) / height, (x + w) / width], -1).clip(0, 1)
    extra = {'boxes': boxes.astype(np.float32), 'region_tags': names}
    extra['tags'] = list(dict.fromkeys(names))  # an image has a tag once
    if self.split == 'test':
      extra['mask'] = base.class_ids(self._read(row['mask']), self._table)
    return extra


class Cifar10(base.Benchmark):
  """CIFAR-10 as encoded 32x32 images in an npz; official train and test."""

  name = 'cifar10'
  folders = ('cifar10',)
  annotations = ('label',)
  official = {'train': 'train', 'test': 'test'}

  def _list(self, split):
    self.label_names = tuple(values.get_list(self._json(self.root / 'meta.json'), 'classes', str))
    path = self.root / f'{split}.npz'
    try:
      with archives.open_zip(path) as archive:
        self._blob = _array(archive, 'blob').tobytes()  # all images, one after the other
        self._offsets = _array(archive, 'offsets')
        self._labels = _array(archive, 'label')
    except (KeyError, ValueError) as error:
      raise InputError(
        f'{self.name}: missing split {self.split!r}: cannot read {path} ({error})'
      ) from error
    return range(len(self._labels))

  def files_of(self, index: int) -> list[pathlib.Path]:
    return [self.root / f'{self.official[self.split]}.npz']

  def missing(self) -> list[str]:
    return []

  def key_of(self, index: int) -> str:
    return f'{self.split}-{index:05d}'

  def _image(self, index):
    return self._blob[self._offsets[index] : self._offsets[index + 1]]

  def _extra(self, index):
    return {'label': int(self._labels[index])}


def _array(archive, name):
  """An array of an npz, no larger than a file may be."""
  data, problem = archives.read_member(archive, f'{name}.npy')
  if problem:
    raise ValueError(f'{name}: {problem}')
  return np.load(io.BytesIO(data))


READERS = (CamVid, Rgbd, Cifar10, Flickr8k, CocoMini)

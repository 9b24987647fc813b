"""Readers of the dense benchmarks in their official layouts: masks (PASCAL, ADE20K), depth, normals
(NYUv2, NAVI).
"""

import gzip
import io
import pickle

import numpy as np
from PIL import Image, ImageOps

from tips_jax.core.errors import InputError
from tips_jax.data.benchmarks import class_names
from tips_jax.data.benchmarks import reader as base
from tips_jax.data.ingest.reader import Sample


class _Masks(base.Benchmark):
  """Images and masks of the same stem in two folders."""

  annotations = ('mask',)
  table = None

  def _files(self, item):
    return item

  def _sample(self, item):
    image, mask = item
    return Sample(
      image.name,
      image.read_bytes(),
      '',
      [],
      {'mask': base.class_ids(mask.read_bytes(), self.table)},
    )


class _Pascal(_Masks):
  lists = masks = ''

  def _list(self, split):
    stems = self._lines(self.root / 'ImageSets' / self.lists / f'{split}.txt')
    return [
      (self.root / 'JPEGImages' / f'{stem}.jpg', self.root / self.masks / f'{stem}.png')
      for stem in stems
    ]


class Voc(_Pascal):
  """PASCAL VOC 2012: 20 classes and the background (0); border pixels are void (255)."""

  name, folders = 'voc', ('VOCdevkit/VOC2012', 'VOC2012')
  official = {'train': 'train', 'test': 'val'}
  lists, masks, mask_classes = 'Segmentation', 'SegmentationClass', class_names.VOC


class Context(_Pascal):
  """PASCAL Context: 59 classes and the background (0), as MMSegmentation's conversion writes them."""

  name, folders = 'context', ('VOCdevkit/VOC2010', 'VOC2010')
  official = {'train': 'train', 'test': 'val'}
  lists, masks, mask_classes = (
    'SegmentationContext',
    'SegmentationClassContext',
    class_names.CONTEXT,
  )


class Ade20k(_Masks):
  """ADE20K SceneParsing 2016: official ids 1..150 become 0..149, official 0 (other) is void."""

  name, folders = 'ade20k', ('ADEChallengeData2016', 'ade/ADEChallengeData2016')
  official = {'train': 'training', 'test': 'validation'}
  mask_classes = class_names.ADE20K
  table = ((np.arange(256) + 255) % 256).astype(
    np.uint8
  )  # official 0 -> 255; 151 and more stay wrong, and are told

  def _list(self, split):
    names = base.names_in(self.root / 'images' / split, '.jpg')
    masks = self.root / 'annotations' / split
    return [(self.root / 'images' / split / name, masks / f'{name[:-4]}.png') for name in names]


class Nyu(base.Benchmark):
  """NYUv2 depth as BTS distributes it: RGB JPEGs beside uint16 PNGs of millimeters, listed in
  nyu_{train,test}.txt.
  """

  name, folders, annotations = 'nyu', ('nyu', 'nyu_depth_v2'), ('depth',)
  official = {'train': 'nyu_train.txt', 'test': 'nyu_test.txt'}
  inside = ('', 'sync', 'official_splits/test')  # where BTS unpacks the two halves

  def _list(self, split):
    items = []
    for line in self._lines(self.root / split):
      fields = line.split()
      if len(fields) < 2:
        raise InputError(
          f'nyu: {self.root / split}: got the line {line!r}; expected IMAGE DEPTH FOCAL'
        )
      items.append([field.lstrip('/') for field in fields[:2]])
    places = [self.root / folder for folder in self.inside]
    self._place = next((p for p in places if items and (p / items[0][0]).exists()), self.root)
    return items

  def _files(self, item):
    return [self._place / name for name in item]

  def _key(self, item):
    return item[0]

  def _sample(self, item):
    image, depth = self._files(item)
    return Sample(item[0], image.read_bytes(), '', [], {'depth': depth.read_bytes()})


class NyuNormals(base.Benchmark):
  """NYUv2 with normals as Probe3D has them: GeoNet's .mat files to train on, the labeled 654
  (Ladicky) to test on.

  `nyu_geonet/*.mat` (`img`, `depth`, `norm`) less the two that Probe3D leaves out;
  `nyuv2/nyu_depth_v2_labeled.mat` (needs h5py), `all_normals.pklz` and `test_SN40.json`. Normals
  keep their own axes, the same in both halves.
  """

  name, folders, annotations = 'nyu_normals', ('nyuv2', 'nyu_geonet'), ('depth', 'normals')
  official = {'train': 'nyu_geonet', 'test': 'nyuv2'}
  mean_rgb = (122.175, 116.169, 103.508)
  left_out = (21_181, 6_919)  # numbers in the sorted listing
  max_depth = 10.0  # meters; more is missing

  def _root(self, data_dir):
    folder = data_dir / self.official[self.split]
    if not folder.is_dir():
      raise InputError(
        f'{self.name}: missing split {self.split!r}: {data_dir} has no folder {folder.name!r}; '
        f'see {base.PAGE}'
      )
    return folder

  def _list(self, split):
    if self.split == 'train':
      names = base.names_in(self.root, '.mat')
      for number in self.left_out:
        del names[number : number + 1]
      return names
    rows = self._json(self.root / 'test_SN40.json')
    return [int(row['img'].split('_')[0]) - 1 for row in rows]

  def _files(self, item):
    if self.split == 'train':
      return [self.root / item]
    return [self.root / 'nyu_depth_v2_labeled.mat', self.root / 'all_normals.pklz']

  def _key(self, item):
    return f'{item}'

  def _sample(self, item):
    if self.split == 'train':
      from scipy import io as matlab  # only now: it is slow to load

      arrays = matlab.loadmat(self.root / item)
      image, depth, normals = (arrays[name][:480, :640] for name in ('img', 'depth', 'norm'))
      image = (
        (image.astype(np.float32) + 2 * np.float32(self.mean_rgb)).clip(0, 255).astype(np.uint8)
      )
    else:
      labeled, all_normals = self._labeled()
      image = labeled['images'][item].transpose(2, 1, 0)  # the file is [N, 3, W, H]
      depth = labeled['rawDepths'][item].T
      normals = all_normals[item]
    depth = np.where(depth > self.max_depth, 0, depth)
    valid = np.abs(np.linalg.norm(normals, axis=-1) - 1) < 0.1
    extra = {
      'depth': base.png(base.millimeters(depth)),
      'normals': base.png(base.encode_normals(normals, valid)),
    }
    return Sample(self._key(item), base.png(np.ascontiguousarray(image)), '', [], extra)

  def _labeled(self):
    if not hasattr(self, '_opened'):
      try:
        import h5py
      except ImportError as error:
        raise InputError(
          'nyu_normals: nyu_depth_v2_labeled.mat is an HDF5 file; expected h5py: pip install h5py'
        ) from error
      mat, normals = self._files(0)
      try:
        with gzip.open(normals) as file:
          loaded = _ArraysOnly(file, encoding='latin1').load()  # 5 GB of them
      except (pickle.UnpicklingError, EOFError) as error:
        raise InputError(
          f'nyu_normals: {normals} is no pickle of arrays ({error}); copy it again'
        ) from error
      self._opened = h5py.File(mat, 'r'), loaded['all_normals']
    return self._opened

  def __getstate__(self):
    return {name: value for name, value in vars(self).items() if name != '_opened'}


class _ArraysOnly(pickle.Unpickler):
  """A pickle from the web may run code; this one may hold NumPy arrays."""

  def find_class(self, module, name):
    arrays = ('_reconstruct', 'ndarray', 'dtype', 'scalar', '_frombuffer')
    if (
      module.split('.')[0] == 'numpy' and name in arrays or (module, name) == ('_codecs', 'encode')
    ):
      return super().find_class(module.replace('numpy.core', 'numpy._core'), name)
    raise pickle.UnpicklingError(f'got {module}.{name}; expected NumPy arrays only')


class Navi(base.Benchmark):
  """NAVI v1 as Probe3D cuts it: multiview scenes to train on, the wild set to test on, 512x512
  around the object.

  Objects without a wild set, or without a multiview scene, are left out. The image is resized to a
  short side of 512 and center-cropped, then a square around the object is resized to 512 (image
  bicubic, depth and normals nearest). Depth is the official inverse depth; normals come from it
  with the focal length at the first size, the principal point in the corner of the square and holes
  far away: what Probe3D does, so that numbers compare.
  """

  name, folders, annotations = 'navi', ('navi_v1', 'navi_v1.0', 'navi'), ('depth', 'normals')
  official = {'train': 'multiview', 'test': 'wild_set'}
  side = 512
  depth_code = 65_535 * 10.0  # pixel value = depth_code / depth in millimeters
  hole = 1e6  # meters, for normals

  def _list(self, split):
    items = []
    for thing in sorted(p for p in self.root.iterdir() if p.is_dir()):
      scenes = sorted(p for p in thing.iterdir() if (p / 'annotations.json').is_file())
      wild = [p for p in scenes if p.name == 'wild_set']
      multiview = [p for p in scenes if p.name.startswith('multiview')]
      if not wild or not multiview:
        continue
      for scene in wild if split == 'wild_set' else multiview:
        for row in sorted(self._json(scene / 'annotations.json'), key=lambda row: row['filename']):
          items.append(
            (scene, row['filename'], row['camera']['focal_length'], tuple(row['image_size']))
          )
    return items

  def _files(self, item):
    scene, name, _, _ = item
    return scene / 'images' / name, scene / 'depth' / f'{name.rpartition(".")[0]}.png'

  def _key(self, item):
    scene, name, _, _ = item
    return f'{scene.parent.name}/{scene.name}/{name}'

  def _sample(self, item):
    _, _, focal, (height, width) = item
    image_path, depth_path = self._files(item)
    image, code = Image.open(image_path), ImageOps.exif_transpose(Image.open(depth_path))
    if sorted(image.size) != sorted((width, height)) or code.size != (width, height):
      raise ValueError(
        f'image {image.size}, depth {code.size}; expected both {(width, height)} as annotations.json'
      )
    image.draft(
      'RGB', (2 * self.side,) * 2
    )  # a JPEG is decoded at a half or less, never under twice the size wanted
    image = ImageOps.exif_transpose(image).convert('RGB')
    focal = focal * self.side / min(width, height)
    image = self._center(image, Image.Resampling.BICUBIC)
    code = np.asarray(self._center(code, Image.Resampling.NEAREST)).astype(np.float64)
    depth = np.where(code > 0, self.depth_code / np.maximum(code, 1) / 1000, 0)  # meters
    top, left, side = _square_around(depth > 0)
    depth = depth[top : top + side, left : left + side]
    normals, valid = base.normals_from_depth(depth, focal, missing=self.hole)
    image = image.crop((left, top, left + side, top + side)).resize(
      (self.side,) * 2, Image.Resampling.BICUBIC
    )
    nearest = np.arange(self.side) * side // self.side
    pick = lambda x: x[nearest][:, nearest]
    extra = {
      'depth': base.png(base.millimeters(pick(depth))),
      'normals': base.png(base.encode_normals(pick(normals), pick(valid))),
    }
    out = io.BytesIO()
    image.save(out, 'jpeg', quality=95, subsampling=0)
    return Sample(self._key(item), out.getvalue(), '', [], extra)

  def _center(self, image, resampling):
    scale = self.side / min(image.size)
    width, height = (max(self.side, round(n * scale)) for n in image.size)
    left, top = (width - self.side) // 2, (height - self.side) // 2
    return image.resize((width, height), resampling).crop(
      (left, top, left + self.side, top + self.side)
    )


def _square_around(mask):
  """(top, left, side) of the smallest square around the true pixels of a square mask, moved inside
  where it leaves.
  """
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  if not len(rows):
    raise ValueError('depth: the object is outside of the center crop')
  side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
  place = lambda first, last, size: int(np.clip((first + last + 1 - side) // 2, 0, size - side))
  return (
    place(rows[0], rows[-1], len(mask)),
    place(columns[0], columns[-1], mask.shape[1]),
    int(side),
  )


READERS = (Voc, Ade20k, Context, Nyu, NyuNormals, Navi)

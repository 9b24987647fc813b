"""Readers of the dense benchmarks in their official layouts: masks (PASCAL, ADE20K), depth and
normals (NYUv2, NAVI).
"""

import functools
import gzip
import io
import operator
import pathlib
import typing

import numpy as np
from PIL import Image, ImageOps

from tips_jax.core.errors import InputError
from tips_jax.data.benchmarks import class_names, values
from tips_jax.data.benchmarks import reader as base
from tips_jax.data.benchmarks.pickled import arrays_of_pickle
from tips_jax.data.ingest.reader import Sample
from tips_jax.data.pixels.images import FORMATS

Pair = tuple[pathlib.Path, pathlib.Path]  # the files of an image and of its annotation


class _Masks(base.Benchmark):
  """Images and masks of the same stem in two folders."""

  annotations = ('mask',)
  table = None  # official class ids -> ours, where they differ

  def files_of(self, item: Pair) -> Pair:
    return item

  def _extra(self, item):
    return {'mask': base.class_ids(item[1].read_bytes(), self.table)}


class _Pascal(_Masks):
  lists = ''  # folder of the files that list a split
  masks = ''  # folder of the masks

  def _list(self, split):
    images = self.root / 'JPEGImages'
    masks = self.root / self.masks
    lines = self._lines(self.root / 'ImageSets' / self.lists / f'{split}.txt')
    stems = map(values.inside, lines)
    return [(images / f'{stem}.jpg', masks / f'{stem}.png') for stem in stems]


class Voc(_Pascal):
  """PASCAL VOC 2012: 20 classes and the background (0); border pixels are void (255)."""

  name = 'voc'
  folders = ('VOCdevkit/VOC2012', 'VOC2012')
  official = {'train': 'train', 'test': 'val'}
  lists = 'Segmentation'
  masks = 'SegmentationClass'
  mask_classes = class_names.VOC


class Context(_Pascal):
  """PASCAL Context as MMSegmentation converts it: 59 classes and the background (0)."""

  name = 'context'
  folders = ('VOCdevkit/VOC2010', 'VOC2010')
  official = {'train': 'train', 'test': 'val'}
  lists = 'SegmentationContext'
  masks = 'SegmentationClassContext'
  mask_classes = class_names.CONTEXT


class Ade20k(_Masks):
  """ADE20K SceneParsing 2016: official ids 1..150 become 0..149, official 0 (other) is void."""

  name = 'ade20k'
  folders = ('ADEChallengeData2016', 'ade/ADEChallengeData2016')
  official = {'train': 'training', 'test': 'validation'}
  mask_classes = class_names.ADE20K
  # Official 0 becomes 255. Ids of 151 and more stay invalid, so that the checks report them.
  table = ((np.arange(256) + 255) % 256).astype(np.uint8)

  def _list(self, split):
    images = self.root / 'images' / split
    masks = self.root / 'annotations' / split
    names = base.names_in(images, '.jpg')
    return [(images / name, masks / f'{name[:-4]}.png') for name in names]


class Nyu(base.Benchmark):
  """NYUv2 depth as BTS distributes it: RGB JPEGs beside uint16 PNGs of millimeters.

  The files are listed in nyu_{train,test}.txt.
  """

  name = 'nyu'
  folders = ('nyu', 'nyu_depth_v2')
  annotations = ('depth',)
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
      items.append([values.inside(field.lstrip('/')) for field in fields[:2]])
    places = [self.root / folder for folder in self.inside]
    self._place = next((p for p in places if items and (p / items[0][0]).exists()), self.root)
    return items

  def files_of(self, item: list[str]) -> list[pathlib.Path]:
    return [self._place / name for name in item]

  def key_of(self, item: list[str]) -> str:
    return item[0]

  def _extra(self, item):
    return {'depth': self.files_of(item)[1].read_bytes()}


class NyuNormals(base.Benchmark):
  """NYUv2 with normals as Probe3D has them: GeoNet's to train on, the labeled 654 to test on.

  `nyu_geonet/*.mat` (`img`, `depth`, `norm`) less the two that Probe3D leaves out;
  `nyuv2/nyu_depth_v2_labeled.mat` (needs h5py), `all_normals.pklz` (Ladicky) and `test_SN40.json`.
  Normals keep their original axes, the same in both halves.
  """

  name = 'nyu_normals'
  folders = ('nyuv2', 'nyu_geonet')
  annotations = ('depth', 'normals')
  official = {'train': 'nyu_geonet', 'test': 'nyuv2'}
  mean_rgb = (122.175, 116.169, 103.508)
  left_out = (21_181, 6_919)  # numbers in the sorted listing
  max_depth = 10.0  # meters; more is missing

  def _root(self, data_dir):
    folder = data_dir / self.official[self.split]
    if not folder.is_dir():
      raise self._missing_split(f'{data_dir} has no folder {folder.name!r}')
    return folder

  def _list(self, split):
    if self.split == 'train':
      names = base.names_in(self.root, '.mat')
      for number in self.left_out:
        del names[number : number + 1]
      return names
    names = [values.get(row, 'img', str) for row in self._json(self.root / 'test_SN40.json')]
    return [int(name.split('_')[0]) - 1 for name in names]

  def files_of(self, item: str | int) -> list[pathlib.Path]:
    if self.split == 'train':
      return [self.root / item]
    return [self.root / 'nyu_depth_v2_labeled.mat', self.root / 'all_normals.pklz']

  def key_of(self, item: str | int) -> str:
    return str(item)

  def _sample(self, item):
    if self.split == 'train':
      from scipy import io as matlab  # only now: it is slow to load

      arrays = matlab.loadmat(self.root / item)
      image, depth, normals = (arrays[name][:480, :640] for name in ('img', 'depth', 'norm'))
      # Probe3D reads them so: the files hold the image less twice its mean.
      image = image.astype(np.float32) + 2 * np.float32(self.mean_rgb)
      image = image.clip(0, 255).astype(np.uint8)
    else:
      labeled, all_normals = self._labeled
      image = labeled['images'][item].transpose(2, 1, 0)  # the file is [N, 3, W, H]
      depth = labeled['rawDepths'][item].T
      normals = all_normals[item]
    depth = np.where(depth > self.max_depth, 0, depth)
    valid = np.abs(np.linalg.norm(normals, axis=-1) - 1) < 0.1
    extra = {
      'depth': base.png(base.millimeters(depth)),
      'normals': base.png(base.encode_normals(normals, valid)),
    }
    return Sample(self.key_of(item), base.png(np.ascontiguousarray(image)), '', [], extra)

  @functools.cached_property
  def _labeled(self):
    """(the opened .mat file, all normals [N, H, W, 3])."""
    try:
      import h5py
    except ImportError as error:
      raise InputError(
        'nyu_normals: nyu_depth_v2_labeled.mat is an HDF5 file; expected h5py: '
        "pip install h5py, or tips_jax with its extra: pip install -e '.[hdf5]'"
      ) from error
    mat, normals = self.files_of(0)
    try:
      with gzip.open(normals) as file:
        loaded = arrays_of_pickle(file)  # 5 GB of them
        if file.read(1):  # only at the end is its checksum compared
          raise ValueError('more than one pickle')
      opened = h5py.File(mat, 'r')
      return opened, loaded['all_normals']
    except FileNotFoundError:
      raise
    except Exception as error:  # damaged files raise a dozen kinds
      raise InputError(
        f'nyu_normals: {mat} is no HDF5 file or {normals} no pickle of arrays ({error}); copy it '
        'again'
      ) from error


class _Shot(typing.NamedTuple):
  """One photo of NAVI."""

  scene: pathlib.Path
  filename: str
  focal: float  # in pixels
  size: tuple[int, int]  # (height, width)


class Navi(base.Benchmark):
  """NAVI v1 as Probe3D cuts it: 512x512 around the object.

  Multiview scenes to train on, the wild set to test on; objects that lack either are left out. The
  image is resized to a short side of 512 and center-cropped, then a square around the object is
  resized to 512 (image bicubic, depth and normals nearest). Depth is the official inverse depth;
  normals come from it with the focal length at the first size, the principal point in the corner of
  the square and holes far away: what Probe3D does, so that numbers compare.
  """

  name = 'navi'
  folders = ('navi_v1', 'navi_v1.0', 'navi')
  annotations = ('depth', 'normals')
  official = {'train': 'multiview', 'test': 'wild_set'}
  side = 512
  depth_code = 65_535 * 10.0  # pixel value = depth_code / depth in millimeters
  hole = 1e6  # meters, for normals

  def _list(self, split):
    wild = sorted(self.root.glob('*/wild_set/annotations.json'))
    multiview = sorted(self.root.glob('*/multiview*/annotations.json'))
    objects = {path.parts[-3] for path in wild} & {path.parts[-3] for path in multiview}
    items = []
    for path in wild if split == 'wild_set' else multiview:
      if path.parts[-3] not in objects:
        continue
      shots = []
      for row in self._json(path):
        focal = values.get(values.get(row, 'camera', dict), 'focal_length', int, float)
        size = tuple(values.get_list(row, 'image_size', int))
        shots.append(_Shot(path.parent, values.get_name(row, 'filename'), focal, size))
      items += sorted(shots, key=operator.attrgetter('filename'))
    return items

  def files_of(self, item: _Shot) -> Pair:
    stem = item.filename.rpartition('.')[0]
    return item.scene / 'images' / item.filename, item.scene / 'depth' / f'{stem}.png'

  def key_of(self, item: _Shot) -> str:
    return f'{item.scene.parent.name}/{item.scene.name}/{item.filename}'

  def _sample(self, item):
    height, width = item.size
    image_path, depth_path = self.files_of(item)
    image = Image.open(image_path, formats=FORMATS)
    code = ImageOps.exif_transpose(Image.open(depth_path, formats=FORMATS))
    if sorted(image.size) != sorted((width, height)) or code.size != (width, height):
      raise ValueError(
        f'image {image.size}, depth {code.size}; expected both {(width, height)}, the size in '
        f'annotations.json'
      )
    # A JPEG is decoded at a half or less, but never under twice the final size.
    image.draft('RGB', (2 * self.side,) * 2)
    image = ImageOps.exif_transpose(image).convert('RGB')
    focal = item.focal * self.side / min(width, height)
    image = self._center(image, Image.Resampling.BICUBIC)
    code = np.asarray(self._center(code, Image.Resampling.NEAREST)).astype(np.float64)
    depth = np.where(code > 0, self.depth_code / np.maximum(code, 1) / 1000, 0)  # meters
    top, left, side = _square_around(depth > 0)
    depth = depth[top : top + side, left : left + side]
    normals, valid = base.normals_from_depth(depth, focal, missing=self.hole)
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((self.side,) * 2, Image.Resampling.BICUBIC)
    nearest = np.arange(self.side) * side // self.side
    pick = np.ix_(nearest, nearest)
    extra = {
      'depth': base.png(base.millimeters(depth[pick])),
      'normals': base.png(base.encode_normals(normals[pick], valid[pick])),
    }
    out = io.BytesIO()
    image.save(out, 'jpeg', quality=95, subsampling=0)
    return Sample(self.key_of(item), out.getvalue(), '', [], extra)

  def _center(self, image, resampling):
    """The image with a short side of `side`, center-cropped to a square."""
    scale = self.side / min(image.size)
    width, height = (max(self.side, round(n * scale)) for n in image.size)
    left = (width - self.side) // 2
    top = (height - self.side) // 2
    image = image.resize((width, height), resampling)
    return image.crop((left, top, left + self.side, top + self.side))


def _square_around(mask):
  """(top, left, side) of the smallest square around the true pixels of a square mask.

  Where it would leave the mask, it is moved inside.
  """
  rows = np.flatnonzero(mask.any(1))
  columns = np.flatnonzero(mask.any(0))
  if not len(rows):
    raise ValueError('depth: the object is outside of the center crop')
  side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1

  def start(span, size):
    return int(np.clip((span[0] + span[-1] + 1 - side) // 2, 0, size - side))

  return start(rows, mask.shape[0]), start(columns, mask.shape[1]), int(side)


READERS = (Voc, Ade20k, Context, Nyu, NyuNormals, Navi)

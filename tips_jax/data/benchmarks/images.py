"""Readers of the benchmarks of whole images in their official layouts: classes, instances and
captions.
"""

import csv
import functools
import os
import pathlib
import re

from tips_jax.core.errors import InputError
from tips_jax.data.benchmarks import reader as base
from tips_jax.data.benchmarks import values

_IMAGES = ('.jpeg', '.jpg', '.png')

# Items.
Labeled = tuple[str, int]  # path below the root, label
Tagged = tuple[str, list[str]]  # path below images, tags
Captioned = tuple[str, str, list[str]]  # folder, file name, captions


class ImageNet(base.Benchmark):
  """ImageNet-1k: train/WNID/*.JPEG and val/WNID/*.JPEG, or Kaggle's flat val with its CSV.

  Classes are the WordNet ids of train (of val where there is no train), sorted; their names:
  class_names.IMAGENET.
  """

  name = 'imagenet'
  annotations = ('label',)
  folders = ('imagenet', 'ILSVRC2012', 'imagenet/ILSVRC/Data/CLS-LOC', 'ILSVRC/Data/CLS-LOC')
  official = {'train': 'train', 'test': 'val'}

  def _root(self, data_dir):
    root = super()._root(data_dir)
    inner = root / 'ILSVRC' / 'Data' / 'CLS-LOC'  # as Kaggle's archive unpacks
    return inner if inner.is_dir() else root

  def _list(self, split):
    self.label_names = tuple(_folders(self.root / 'train') or _folders(self.root / 'val'))
    folder = self.root / split
    if not folder.is_dir():
      raise self._missing_split(f'no folder {folder}')
    ids = {wnid: i for i, wnid in enumerate(self.label_names)}
    inside = _folders(folder)
    if not inside:
      return self._flat(folder, ids)
    items = []
    for wnid in inside:
      for name in base.names_in(folder / wnid, *_IMAGES):
        items.append((f'{split}/{wnid}/{name}', ids.get(wnid, -1)))
    return items

  def _flat(self, folder, ids):
    # Kaggle's archive has it some folders above.
    folders = (self.root, *self.root.parents[:3])
    table = base.first_existing(*(p / 'LOC_val_solution.csv' for p in folders))
    if not table.exists():
      raise InputError(
        f'{self.name}: split {self.split!r}: {folder} has no folders of classes, and there is no '
        f'{table.name} beside it; expected either; see {base.PAGE}'
      )
    with open(table, newline='') as file:
      label = {row['ImageId']: row['PredictionString'].split()[0] for row in csv.DictReader(file)}
    self.label_names = self.label_names or tuple(sorted(set(label.values())))
    ids = ids or {wnid: i for i, wnid in enumerate(self.label_names)}
    items = []
    for name in base.names_in(folder, *_IMAGES):
      wnid = label.get(os.path.splitext(name)[0])
      items.append((f'{folder.name}/{name}', ids.get(wnid, -1)))
    return items

  def files_of(self, item: Labeled) -> list[pathlib.Path]:
    return [self.root / item[0]]

  def missing(self) -> list[str]:
    return []  # the folders were listed

  def _extra(self, item):
    return {'label': item[1]}


def _folders(path):
  if not path.is_dir():
    return []
  return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())


class Uned(base.Benchmark):
  """One of the eight domains of UnED: uned/info_files/DOMAIN/SPLIT.json and uned/images.

  `tags` are the classes of an image as 'DOMAIN/ID' (a query may have several), so that the merged
  index of all domains compares correctly; `label` is the first, a number of this split alone.
  `test` holds the queries; where there is `index` they are searched in it, else in `test` itself
  without the query.
  """

  folders = ('uned', 'UnED')
  annotations = ('label', 'tags')
  official = {'train': 'train', 'val': 'val', 'test': 'test'}

  def _list(self, split):
    domain = self.name.removeprefix('uned_')
    items = []
    for row in self._json(self.root / 'info_files' / domain / f'{split}.json'):
      classes = values.get(row, 'class_id', int, str, list)
      if isinstance(classes, list):
        values.get_list(row, 'class_id', int, str)
      else:
        classes = [classes]
      items.append((values.get_name(row, 'path'), [f'{domain}/{i}' for i in classes]))
    # Labels are numbered within the split; tags compare across splits and domains.
    self.label_names = tuple(sorted({tags[0] for _, tags in items}))
    self._ids = {name: i for i, name in enumerate(self.label_names)}
    return items

  def files_of(self, item: Tagged) -> list[pathlib.Path]:
    return [self.root / 'images' / item[0]]

  def key_of(self, item: Tagged) -> str:
    return item[0]

  def tags_of(self, item: Tagged) -> list[str]:
    """The classes of an item without opening its image."""
    return item[1]

  def _extra(self, item):
    return {'label': self._ids[item[1][0]], 'tags': item[1]}


class UnedFood2k(Uned):
  name = 'uned_food2k'


class UnedCars(Uned):
  name = 'uned_cars'


class UnedSop(Uned):
  name = 'uned_sop'


class UnedInshop(Uned):
  name = 'uned_inshop'
  official = Uned.official | {'index': 'index'}


class UnedInat(Uned):
  name = 'uned_inat'


class UnedMet(Uned):
  name = 'uned_met'
  official = Uned.official | {'index': 'index', 'val_index': 'small_index'}


class UnedGldv2(Uned):
  name = 'uned_gldv2'
  official = Uned.official | {'index': 'index'}


class UnedRp2k(Uned):
  name = 'uned_rp2k'

  def files_of(self, item: Tagged) -> list[pathlib.Path]:
    images = self.root / 'images'
    return [base.first_existing(images / item[0], images / _escaped(item[0]))]


def _escaped(path):
  """The name as unzip writes it where the file system's encoding is not UTF-8: '#U' and hex."""
  return re.sub(r'[^\x00-\x7f]', lambda character: f'#U{ord(character[0]):04x}', path)


class _Karpathy(base.Benchmark):
  """Images and the captions of Karpathy's JSON (`dataset_*.json`)."""

  table = ''
  official = {'train': ('train', 'restval'), 'val': ('val',), 'test': ('test',)}

  def _list(self, split):
    table = base.first_existing(
      self.root / self.table,
      self.root / 'karpathy' / self.table,
      self.root / 'annotations' / self.table,
    )
    items = []
    for row in values.get(self._json(table), 'images', list):
      if values.get(row, 'split', str) not in split:
        continue
      folder = ''
      if 'filepath' in row:
        folder = values.get_name(row, 'filepath')
      sentences = values.get_list(row, 'sentences', dict)
      captions = [values.get(sentence, 'raw', str).strip() for sentence in sentences]
      items.append((folder, values.get_name(row, 'filename'), captions))
    return items

  def captions_of(self, item: Captioned) -> list[str]:
    return item[2]

  def key_of(self, item: Captioned) -> str:
    return item[1]


class Flickr30k(_Karpathy):
  """Flickr30k, Karpathy split."""

  name = 'flickr30k'
  folders = ('flickr30k', 'Flickr30k')
  table = 'dataset_flickr30k.json'

  @functools.cached_property
  def _images(self):
    root = self.root
    return base.first_existing(
      root / 'flickr30k-images', root / 'flickr30k_images', root / 'images', root / 'Images'
    )

  def files_of(self, item: Captioned) -> list[pathlib.Path]:
    return [self._images / item[1]]


class Coco(_Karpathy):
  """COCO captions, Karpathy split, from the images of 2014 or, where they are missing, of 2017."""

  name = 'coco'
  folders = ('coco', 'COCO')
  table = 'dataset_coco.json'

  def files_of(self, item: Captioned) -> list[pathlib.Path]:
    folder, name, _ = item
    if (self.root / folder).is_dir():
      return [self.root / folder / name]
    short = name.rpartition('_')[2]  # COCO_val2014_000000000042.jpg is 000000000042.jpg in 2017
    return [base.first_existing(self.root / 'val2017' / short, self.root / 'train2017' / short)]


class Docci(base.Benchmark):
  """DOCCI: one long description per image, from docci_descriptions.jsonlines.

  An item is (file name, description).
  """

  name = 'docci'
  folders = ('docci', 'DOCCI')
  official = {'train': 'train', 'test': 'test', 'qual_dev': 'qual_dev', 'qual_test': 'qual_test'}

  def _list(self, split):
    items = []
    for row in self._json_lines(self.root / 'docci_descriptions.jsonlines'):
      if not values.get(row, 'example_id', str).startswith(split):
        continue
      # The small splits (qual_dev, qual_test) are marked by their ids alone.
      if split not in ('train', 'test') or values.get(row, 'split', str) == split:
        description = values.get(row, 'description', str)
        items.append((values.get_name(row, 'image_file'), description.strip()))
    return items

  def captions_of(self, item: tuple[str, str]) -> list[str]:
    return [item[1]]

  def files_of(self, item: tuple[str, str]) -> list[pathlib.Path]:
    return [self.root / 'images' / item[0]]


UNED = (UnedFood2k, UnedCars, UnedSop, UnedInshop, UnedInat, UnedMet, UnedGldv2, UnedRp2k)
READERS = (ImageNet, *UNED, Flickr30k, Coco, Docci)

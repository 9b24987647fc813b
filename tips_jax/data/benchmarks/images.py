"""Readers of the benchmarks of whole images in their official layouts: classes, instances,
captions.
"""

import csv
import os

from tips_jax.core.errors import InputError
from tips_jax.data.benchmarks import reader as base
from tips_jax.data.ingest.reader import Sample

_IMAGES = ('.jpeg', '.jpg', '.png')


class ImageNet(base.Benchmark):
  """ImageNet-1k: train/WNID/*.JPEG and val/WNID/*.JPEG, or Kaggle's flat val with
  LOC_val_solution.csv.

  Classes are the WordNet ids of train (of val where there is no train), sorted; their names:
  class_names.IMAGENET.
  """

  name, annotations = 'imagenet', ('label',)
  folders = ('imagenet', 'ILSVRC2012', 'imagenet/ILSVRC/Data/CLS-LOC', 'ILSVRC/Data/CLS-LOC')
  official = {'train': 'train', 'test': 'val'}

  def _root(self, data_dir):
    found = super()._root(data_dir)
    inner = found / 'ILSVRC' / 'Data' / 'CLS-LOC'
    return inner if inner.is_dir() else found

  def _list(self, split):
    classes = [name for part in ('train', 'val') for name in _folders(self.root / part)]
    self.label_names = tuple(sorted(_folders(self.root / 'train') or set(classes)))
    folder = self.root / split
    if not folder.is_dir():
      raise InputError(
        f'{self.name}: missing split {self.split!r}: no folder {folder}; see {base.PAGE}'
      )
    ids = {wnid: i for i, wnid in enumerate(self.label_names)}
    inside = _folders(folder)
    if inside:
      return [
        (f'{split}/{wnid}/{name}', ids.get(wnid, -1))
        for wnid in inside
        for name in base.names_in(folder / wnid, *_IMAGES)
      ]
    return self._flat(folder, ids)

  def _flat(self, folder, ids):
    tables = [p / 'LOC_val_solution.csv' for p in (self.root, *self.root.parents[:3])]
    table = next((p for p in tables if p.is_file()), None)
    if table is None:
      raise InputError(
        f'{self.name}: split {self.split!r}: {folder} has no folders of classes, and there is no '
        f'{tables[0].name} beside it; expected either; see {base.PAGE}'
      )
    with open(table, newline='') as file:
      label = {row['ImageId']: row['PredictionString'].split()[0] for row in csv.DictReader(file)}
    self.label_names = self.label_names or tuple(sorted(set(label.values())))
    ids = ids or {wnid: i for i, wnid in enumerate(self.label_names)}
    return [
      (f'{folder.name}/{name}', ids.get(label.get(os.path.splitext(name)[0]), -1))
      for name in base.names_in(folder, *_IMAGES)
    ]

  def _files(self, item):
    return [self.root / item[0]]

  def missing(self):
    return []  # the folders were listed

  def _sample(self, item):
    path, label = item
    return Sample(os.path.basename(path), (self.root / path).read_bytes(), '', [], {'label': label})


def _folders(path):
  return sorted(entry.name for entry in os.scandir(path) if entry.is_dir()) if path.is_dir() else []


class Uned(base.Benchmark):
  """One of the eight domains of UnED: uned/info_files/DOMAIN/SPLIT.json and uned/images.

  `tags` are the classes of an image as 'DOMAIN/ID' (a query may have several), so that the merged
  index of all domains compares right; `label` is the first, a number of this split alone. `test`
  holds the queries; where there is `index` they are searched in it, else in `test` itself without
  the query.
  """

  folders, annotations = ('uned', 'UnED'), ('label', 'tags')
  domain = ''

  def _list(self, split):
    rows = self._json(self.root / 'info_files' / self.domain / f'{split}.json')
    items = []
    for row in rows:
      classes = row['class_id'] if isinstance(row['class_id'], list) else [row['class_id']]
      items.append((row['path'], [f'{self.domain}/{i}' for i in classes]))
    self.label_names = tuple(sorted({classes[0] for _, classes in items}))
    self._ids = {name: i for i, name in enumerate(self.label_names)}
    return items

  def _files(self, item):
    images = self.root / 'images'
    return [
      images
      / (item[0] if self.domain != 'rp2k' or (images / item[0]).exists() else _escaped(item[0]))
    ]

  def _key(self, item):
    return item[0]

  def tags_of(self, item):
    """The classes of an item without opening its image."""
    return item[1]

  def _sample(self, item):
    extra = {'label': self._ids[item[1][0]], 'tags': item[1]}
    return Sample(item[0], self._files(item)[0].read_bytes(), '', [], extra)


def _escaped(path):
  """The name as unzip writes it where the file system's encoding is not UTF-8: #U and four hex
  digits.
  """
  return ''.join(c if ord(c) < 128 else f'#U{ord(c):04x}' for c in path)


_ALONE, _INDEXED = {'train': 'train', 'val': 'val', 'test': 'test'}, {'index': 'index'}
UNED = {
  'food2k': _ALONE,
  'cars': _ALONE,
  'sop': _ALONE,
  'inshop': _ALONE | _INDEXED,
  'inat': _ALONE,
  'met': _ALONE | _INDEXED | {'val_index': 'small_index'},
  'gldv2': _ALONE | _INDEXED,
  'rp2k': _ALONE,
}


class _Karpathy(base.Benchmark):
  """Images and the captions of Karpathy's JSON (`dataset_*.json`): `images` with `filename`,
  `split`, `sentences`.
  """

  table = ''
  official = {'train': ('train', 'restval'), 'val': ('val',), 'test': ('test',)}

  def _list(self, split):
    tables = (
      self.root / self.table,
      self.root / 'karpathy' / self.table,
      self.root / 'annotations' / self.table,
    )
    path = next((p for p in tables if p.is_file()), tables[0])
    content = self._json(path)
    return [
      (row.get('filepath', ''), row['filename'], [s['raw'].strip() for s in row['sentences']])
      for row in content['images']
      if row['split'] in split
    ]

  def captions_of(self, item):
    return item[2]

  def _key(self, item):
    return item[1]

  def _sample(self, item):
    return Sample(
      item[1], self._files(item)[0].read_bytes(), '', [text for text in item[2] if text], {}
    )


class Flickr30k(_Karpathy):
  """Flickr30k, Karpathy split."""

  name, folders, table = 'flickr30k', ('flickr30k', 'Flickr30k'), 'dataset_flickr30k.json'

  def _files(self, item):
    folder = next(
      (
        f
        for f in ('flickr30k-images', 'flickr30k_images', 'images', 'Images')
        if (self.root / f).is_dir()
      ),
      'flickr30k-images',
    )
    return [self.root / folder / item[1]]


class Coco(_Karpathy):
  """COCO captions, Karpathy split, from the images of 2014 or, where these are not there, of 2017."""

  name, folders, table = 'coco', ('coco', 'COCO'), 'dataset_coco.json'

  def _files(self, item):
    folder, name, _ = item
    if (self.root / folder).is_dir():
      return [self.root / folder / name]
    short = name.rpartition('_')[2]
    places = [self.root / year / short for year in ('val2017', 'train2017')]
    return [next((p for p in places if p.exists()), places[0])]


class Docci(base.Benchmark):
  """DOCCI: one long description an image, from docci_descriptions.jsonlines."""

  name, folders = 'docci', ('docci', 'DOCCI')
  official = {'train': 'train', 'test': 'test', 'qual_dev': 'qual_dev', 'qual_test': 'qual_test'}

  def _list(self, split):
    rows = self._json_lines(self.root / 'docci_descriptions.jsonlines')
    of_split = [row for row in rows if row['example_id'].startswith(split)]
    if split in ('train', 'test'):  # the small ones go by their ids alone
      of_split = [row for row in of_split if row['split'] == split]
    return [(row['image_file'], row['description'].strip()) for row in of_split]

  def captions_of(self, item):
    return [item[1]]

  def _files(self, item):
    return [self.root / 'images' / item[0]]

  def _sample(self, item):
    return Sample(item[0], self._files(item)[0].read_bytes(), '', [item[1]] if item[1] else [], {})


def _domain(domain, splits):
  return type(
    f'Uned_{domain}',
    (Uned,),
    {'name': f'uned_{domain}', 'domain': domain, 'official': splits, '__module__': __name__},
  )


Uned_food2k, Uned_cars, Uned_sop, Uned_inshop, Uned_inat, Uned_met, Uned_gldv2, Uned_rp2k = (
  _domain(domain, splits) for domain, splits in UNED.items()
)
READERS = (
  ImageNet,
  Uned_food2k,
  Uned_cars,
  Uned_sop,
  Uned_inshop,
  Uned_inat,
  Uned_met,
  Uned_gldv2,
  Uned_rp2k,
  Flickr30k,
  Coco,
  Docci,
)

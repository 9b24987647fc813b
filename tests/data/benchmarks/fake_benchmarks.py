"""Tiny folders in the official layouts of the benchmarks: `WRITE[name](data_dir)` writes one,
COUNTS is its content.
"""

import gzip
import io
import json
import pickle
import zipfile

import numpy as np
from PIL import Image

W, H = 40, 30


def pixels(seed=0, size=(W, H), low=0, high=256):
  return np.random.default_rng(seed).integers(low, high, (size[1], size[0], 3)).astype(np.uint8)


def encoded(array, kind='png', **options):
  out = io.BytesIO()
  Image.fromarray(array).save(out, kind, **options)
  return out.getvalue()


def array(data):
  """The pixels of an encoded image."""
  return np.asarray(Image.open(io.BytesIO(data)))


def put(path, data):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return path


def jpeg(path, seed=0, size=(W, H)):
  return put(path, encoded(pixels(seed, size), 'jpeg'))


def ids(values, seed=0, size=(W, H)):
  """A mask [H, W] that holds every one of `values`."""
  rng = np.random.default_rng(seed)
  mask = rng.choice(np.array(values, np.uint8), (size[1], size[0]))
  mask.flat[: len(values)] = values
  return mask


def palette(mask):
  image = Image.fromarray(mask, 'P')
  image.putpalette(np.random.default_rng(1).integers(0, 256, 768).astype(np.uint8).tobytes())
  out = io.BytesIO()
  image.save(out, 'png')
  return out.getvalue()


def pascal(root, lists, masks, values):
  for split, count in (('train', 2), ('val', 3)):
    stems = [f'2007_{split}{i:04d}' for i in range(count)]
    put(root / 'ImageSets' / lists / f'{split}.txt', '\n'.join(stems) + '\n')
    for i, stem in enumerate(stems):
      jpeg(root / 'JPEGImages' / f'{stem}.jpg', i)
      put(root / masks / f'{stem}.png', palette(ids(values, i)))


def voc(data_dir):
  pascal(data_dir / 'VOCdevkit/VOC2012', 'Segmentation', 'SegmentationClass', [0, 1, 20, 255])


def context(data_dir):
  pascal(
    data_dir / 'VOCdevkit/VOC2010', 'SegmentationContext', 'SegmentationClassContext', [0, 1, 59]
  )


def ade20k(data_dir):
  root = data_dir / 'ADEChallengeData2016'
  for split, short, count in (('training', 'train', 2), ('validation', 'val', 3)):
    for i in range(count):
      name = f'ADE_{short}_{i + 1:08d}'
      jpeg(root / 'images' / split / f'{name}.jpg', i)
      put(root / 'annotations' / split / f'{name}.png', encoded(ids([0, 1, 2, 150], i)))


def depth_png(seed=0, size=(W, H), missing=True):
  depth = np.random.default_rng(seed).integers(900, 3000, (size[1], size[0])).astype(np.uint16)
  depth[0, 0] = 0 if missing else 900
  return encoded(depth)


def nyu(data_dir):
  for split, rooms, inside in (
    ('train', ['/kitchen_0028b', '/den_1'], ''),
    ('test', ['bathroom'] * 3, ''),
  ):
    lines = []
    for i, room in enumerate(rooms):
      image, depth = f'{room}/rgb_{i:05d}.jpg', f'{room}/sync_depth_{i:05d}.png'
      lines.append(f'{image} {depth} 518.8579')
      jpeg(data_dir / 'nyu' / inside / image.lstrip('/'), i)
      put(data_dir / 'nyu' / inside / depth.lstrip('/'), depth_png(i))
    put(data_dir / 'nyu' / f'nyu_{split}.txt', '\n'.join(lines))


def unit_normals(seed, shape=(H, W)):
  normals = np.random.default_rng(seed).normal(size=(*shape, 3))
  return (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(np.float32)


def nyu_geonet(data_dir):
  from scipy import io as matlab

  (data_dir / 'nyu_geonet').mkdir(parents=True)
  for i in range(3):
    img = pixels(i).astype(np.float32) - 2 * np.float32([122.175, 116.169, 103.508])
    depth = np.full((H, W), 2.0, np.float32)
    depth[0, 0] = 11
    matlab.savemat(
      data_dir / 'nyu_geonet' / f'kitchen_0001_{i}.mat',
      {'img': img, 'depth': depth, 'norm': unit_normals(i)},
    )


def nyu_labeled(data_dir):
  import h5py

  root, count = data_dir / 'nyuv2', 4
  root.mkdir(parents=True)
  with h5py.File(
    root / 'nyu_depth_v2_labeled.mat', 'w'
  ) as file:  # MATLAB's [H, W, 3, N] reads reversed
    file['images'] = np.stack([pixels(i) for i in range(count)]).transpose(0, 3, 2, 1)
    file['rawDepths'] = np.full((count, W, H), 1.5, np.float32)
  with gzip.open(root / 'all_normals.pklz', 'wb') as file:
    pickle.dump(
      {'all_normals': np.stack([unit_normals(i) for i in range(count)])}, file, protocol=2
    )
  put(root / 'test_SN40.json', json.dumps([{'img': f'{i + 1:04d}_img.png'} for i in (1, 3)]))


def navi(data_dir):
  things = {
    'dog': ('multiview-00-pixel_5', 'multiview-01-canon', 'wild_set'),
    'cat': ('multiview-00-pixel_5',),
  }
  for thing, scenes in things.items():
    for scene in scenes:
      folder, rows = data_dir / 'navi_v1' / thing / scene, []
      for i in range(2):
        jpeg(folder / 'images' / f'{i:03d}.jpg', i, (64, 48))
        code = np.zeros((48, 64), np.uint16)
        code[10:30, 20:50] = round(655_350 / 500)  # half a meter, an object off the center
        put(folder / 'depth' / f'{i:03d}.png', encoded(code))
        rows.append(
          {'filename': f'{i:03d}.jpg', 'image_size': [48, 64], 'camera': {'focal_length': 60.0}}
        )
      put(folder / 'annotations.json', json.dumps(rows[::-1]))


WNIDS = ('n01440764', 'n01443537', 'n02129604')


def imagenet(data_dir):
  for split, count in (('train', 2), ('val', 1)):
    for k, wnid in enumerate(WNIDS):
      for i in range(count):
        jpeg(data_dir / 'imagenet' / split / wnid / f'{wnid}_{split}_{i}.JPEG', 10 * k + i)


def imagenet_kaggle(data_dir):
  root = data_dir / 'imagenet'
  for wnid in WNIDS:
    jpeg(root / 'ILSVRC/Data/CLS-LOC/train' / wnid / f'{wnid}_1.JPEG')
  names = [f'ILSVRC2012_val_{i:08d}' for i in range(3)]
  for name in names:
    jpeg(root / 'ILSVRC/Data/CLS-LOC/val' / f'{name}.JPEG')
  rows = [f'{name},{wnid} 1 2 3 4 {wnid} 5 6 7 8' for name, wnid in zip(names, reversed(WNIDS))]
  put(root / 'LOC_val_solution.csv', '\n'.join(['ImageId,PredictionString', *rows]))


def uned(domain, splits):
  def write(data_dir):
    for split, classes in splits.items():
      rows = [
        {'path': f'{domain}/{split}/{i}.jpg', 'class_id': label} for i, label in enumerate(classes)
      ]
      put(data_dir / 'uned/info_files' / domain / f'{split}.json', json.dumps(rows))
      for i, row in enumerate(rows):
        name = row['path']
        if domain == 'rp2k' and i == 0:  # as unzip writes a name it cannot
          row['path'] = f'{domain}/{split}/\u7f8e.jpg'
          name = f'{domain}/{split}/#U7f8e.jpg'
        jpeg(data_dir / 'uned/images' / name, i)
      put(data_dir / 'uned/info_files' / domain / f'{split}.json', json.dumps(rows))

  return write


def karpathy(root, table, folders, name='{}.jpg'):
  rows = []
  for i, split in enumerate(('train', 'restval', 'val', 'test', 'test')):
    folder = folders[i % len(folders)]
    row = {
      'filename': name.format(i),
      'split': split,
      'imgid': i,
      'sentences': [{'raw': f'A caption {k} of {i} . '} for k in range(5)],
    }
    rows.append(row | ({'filepath': folder} if len(folders) > 1 else {}))
    jpeg(root / folder / row['filename'], i)
  put(root / table, json.dumps({'images': rows}))


def flickr30k(data_dir):
  karpathy(data_dir / 'flickr30k', 'dataset_flickr30k.json', ['flickr30k-images'])


def coco(data_dir):
  karpathy(
    data_dir / 'coco', 'dataset_coco.json', ['train2014', 'val2014'], 'COCO_val2014_{:012d}.jpg'
  )


def docci(data_dir):
  rows = []
  for split, count in (('train', 2), ('test', 3), ('qual_dev', 1)):
    for i in range(count):
      jpeg(data_dir / 'docci/images' / f'{split}_{i:05d}.jpg', i)
      official = {'qual_dev': 'train'}.get(split, split)
      rows.append(
        {
          'example_id': f'{split}_{i:05d}',
          'split': official,
          'image_file': f'{split}_{i:05d}.jpg',
          'description': f'A long description of {split} {i}.',
        }
      )
  rows.append(rows[0] | {'split': 'left out'})
  put(data_dir / 'docci/docci_descriptions.jsonlines', '\n'.join(map(json.dumps, rows)))


def pack(root, rows, members, meta, stem='train', archive='images'):
  root.mkdir(parents=True, exist_ok=True)
  put(root / 'meta.json', json.dumps(meta))
  put(root / f'{stem}.jsonl', '\n'.join(map(json.dumps, rows)))
  with zipfile.ZipFile(root / f'{archive}.zip', 'w') as file:
    for name, data in members.items():
      file.writestr(name, data)


def camvid(data_dir):
  rows, members = [], {}
  for i, sequence in enumerate(('0016E5', '0001TP', '0006R0', '0001TP')):
    rows.append({'image': f'train/{i}.jpg', 'mask': f'train/{i}.mask.png', 'sequence': sequence})
    members |= {
      f'train/{i}.jpg': encoded(pixels(i), 'jpeg'),
      f'train/{i}.mask.png': encoded(ids([0, 10, 11], i)),
    }
  names = [f'class{i}' for i in range(11)]
  pack(data_dir / 'camvid', rows, members, {'classes': [*names, 'Unlabeled'], 'ignore_index': 11})


def rgbd(data_dir):
  rows, members = [], {}
  for i in range(5):
    rows.append(
      {'image': f'{i}.jpg', 'depth': f'{i}.depth.png', 'fx_fy_cx_cy': [30.0, 30.0, W / 2, H / 2]}
    )
    depth = np.full((H, W), 1500, np.uint16)
    depth[0, 0] = 0
    members |= {f'{i}.jpg': encoded(pixels(i), 'jpeg'), f'{i}.depth.png': encoded(depth)}
  pack(data_dir / 'rgbd', rows, members, {})


def flickr8k(data_dir):
  for split, count in (('train', 3), ('dev', 2)):
    rows = [
      {'image': f'{split}{i}.jpg', 'captions': [f'Caption {k} .' for k in range(5)]}
      for i in range(count)
    ]
    members = {row['image']: encoded(pixels(i), 'jpeg') for i, row in enumerate(rows)}
    pack(data_dir / 'flickr8k', rows, members, {}, split, split)


def cifar10(data_dir):
  root = data_dir / 'cifar10'
  put(root / 'meta.json', json.dumps({'classes': [f'class{i}' for i in range(10)]}))
  for split, count in (('train', 12), ('test', 11)):
    files = [encoded(pixels(i, (32, 32)), 'webp') for i in range(count)]
    np.savez(
      root / f'{split}.npz',
      blob=np.frombuffer(b''.join(files), np.uint8),
      offsets=np.cumsum([0, *map(len, files)]),
      label=(np.arange(count) % 10).astype(np.int32),
    )


def coco_mini(data_dir):
  members = {
    'train/0.jpg': encoded(pixels(0), 'jpeg'),
    'train/1.jpg': encoded(pixels(1), 'jpeg'),
    'train/0.png': encoded(ids([0, 1, 184, 200])),
  }
  rows = [
    {
      'image': 'train/0.jpg',
      'size': [W, H],
      'captions': [],
      'mask': 'train/0.png',
      'boxes': [['person', [10, 6, 20, 12]]],
    },
    {'image': 'train/1.jpg', 'size': [W, H], 'captions': ['A', 'B'], 'boxes': []},
  ]
  meta = {
    'semantic_classes': {'0': 'unlabeled', '1': 'person', '184': 'tree-merged', '200': 'rug-merged'}
  }
  pack(data_dir / 'coco_mini', rows, members, meta)


UNED = {
  'met': {'test': [3, 7], 'index': [7, 3, 9], 'train': [3], 'val': [3], 'small_index': [3]},
  'gldv2': {'test': [[3, 4], 7], 'index': [7, 3, 4]},
  'inshop': {'test': [1], 'index': [1, 2]},
}
UNED |= {domain: {'test': [1, 1, 2, 2]} for domain in ('food2k', 'cars', 'sop', 'inat', 'rp2k')}
WRITE = {
  'voc': voc,
  'ade20k': ade20k,
  'context': context,
  'nyu': nyu,
  'navi': navi,
  'imagenet': imagenet,
  'flickr30k': flickr30k,
  'coco': coco,
  'docci': docci,
  'camvid': camvid,
  'rgbd': rgbd,
  'flickr8k': flickr8k,
  'cifar10': cifar10,
  'coco_mini': coco_mini,
}
WRITE |= {f'uned_{domain}': uned(domain, splits) for domain, splits in UNED.items()}
COUNTS = {
  'voc': {'train': 2, 'test': 3},
  'ade20k': {'train': 2, 'test': 3},
  'context': {'train': 2, 'test': 3},
  'nyu': {'train': 2, 'test': 3},
  'navi': {'train': 4, 'test': 2},
  'imagenet': {'train': 6, 'test': 3},
  'flickr30k': {'train': 2, 'val': 1, 'test': 2},
  'coco': {'train': 2, 'val': 1, 'test': 2},
  'docci': {'train': 2, 'test': 3, 'qual_dev': 1},
  'camvid': {'train': 2, 'test': 2},
  'rgbd': {'train': 4, 'test': 1},
  'flickr8k': {'train': 3, 'test': 2},
  'cifar10': {'train': 12, 'test': 11},
  'coco_mini': {'test': 1, 'captions': 1},
}
COUNTS |= {
  f'uned_{domain}': {
    split: len(classes) for split, classes in splits.items() if split in ('test', 'index')
  }
  for domain, splits in UNED.items()
}

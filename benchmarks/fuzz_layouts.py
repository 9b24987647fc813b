"""Tiny folders in the official layouts of benchmarks, for benchmarks/fuzz.py."""

import gzip
import io
import json
import pickle
import zipfile

import numpy as np

from benchmarks.fuzz_files import (
  DEPTH,
  HEIGHT,
  JPEG,
  MASK,
  OTHER,
  WIDTH,
  Folder,
  lines,
  put,
  zipped,
)


def karpathy(name: str, inside: str) -> dict[str, bytes | str]:
  row = {'filepath': inside, 'filename': '0.jpg', 'split': 'test', 'sentences': [{'raw': 'A dog'}]}
  table_name = f'{name}/dataset_{name}.json'
  return {table_name: json.dumps({'images': [row]}), f'{name}/{inside}/0.jpg': JPEG}


def npz(**arrays: object) -> bytes:
  out = io.BytesIO()
  np.savez(out, **arrays)
  return out.getvalue()


SHOT = {'filename': '0.jpg', 'image_size': [HEIGHT, WIDTH], 'camera': {'focal_length': 60.0}}
SEEN = {'image': '0.jpg', 'size': [WIDTH, HEIGHT], 'mask': '0.png', 'captions': ['a', 'b']}
SEEN_META = {'semantic_classes': {'0': 'unlabeled', '1': 'person', '8': 'tree'}}
CAMVID = [
  {'image': f'{i}.jpg', 'mask': '0.png', 'sequence': s} for i, s in enumerate(('0001TP', 'a'))
]
CAMVID_META = {'classes': [f'class{i}' for i in range(12)], 'ignore_index': 11}
FRAMES = [{'image': '0.jpg', 'depth': '0.png', 'fx_fy_cx_cy': [30.0, 30.0, 12, 10]}] * 5
LAYOUTS = {
  'voc': {
    'VOC2012/ImageSets/Segmentation/val.txt': 'a\n',
    'VOC2012/JPEGImages/a.jpg': JPEG,
    'VOC2012/SegmentationClass/a.png': MASK,
  },
  'nyu': {
    'nyu/nyu_test.txt': 'bath/rgb_0.jpg bath/sync_depth_0.png 518.8579\n',
    'nyu/bath/rgb_0.jpg': JPEG,
    'nyu/bath/sync_depth_0.png': DEPTH,
  },
  'navi': {
    'navi_v1/dog/wild_set/annotations.json': json.dumps([SHOT]),
    'navi_v1/dog/multiview-00/annotations.json': '[]',
    'navi_v1/dog/wild_set/images/0.jpg': JPEG,
    'navi_v1/dog/wild_set/depth/0.png': DEPTH,
  },
  'imagenet': {
    'imagenet/ILSVRC/Data/CLS-LOC/train/n01440764/a.JPEG': JPEG,
    'imagenet/ILSVRC/Data/CLS-LOC/val/val_0.JPEG': OTHER,
    'imagenet/LOC_val_solution.csv': 'ImageId,PredictionString\nval_0,n01440764 1 2',
  },
  'uned_met': {
    'uned/info_files/met/test.json': json.dumps([{'path': 'met/0.jpg', 'class_id': [3, 4]}]),
    'uned/images/met/0.jpg': JPEG,
  },
  'flickr30k': karpathy('flickr30k', 'flickr30k-images'),
  'coco': karpathy('coco', 'val2014'),
  'docci': {
    'docci/docci_descriptions.jsonlines': lines(
      {'example_id': 'test_0', 'split': 'test', 'image_file': 'a.jpg', 'description': 'A dog.'}
    ),
    'docci/images/a.jpg': JPEG,
  },
  'camvid': {
    'camvid/meta.json': json.dumps(CAMVID_META),
    'camvid/train.jsonl': lines(*CAMVID),
    'camvid/images.zip': zipped({'0.jpg': JPEG, '1.jpg': OTHER, '0.png': MASK}),
  },
  'rgbd': {
    'rgbd/meta.json': '{}',
    'rgbd/train.jsonl': lines(*FRAMES),
    'rgbd/images.zip': zipped({'0.jpg': JPEG, '0.png': DEPTH}, zipfile.ZIP_STORED),
  },
  'flickr8k': {
    'flickr8k/meta.json': '{}',
    'flickr8k/dev.jsonl': lines({'image': '0.jpg', 'captions': ['a', 'b']}),
    'flickr8k/dev.zip': zipped({'0.jpg': JPEG}),
  },
  'cifar10': {
    'cifar10/meta.json': json.dumps({'classes': ['cat', 'dog']}),
    'cifar10/test.npz': npz(
      blob=np.frombuffer(JPEG + OTHER, np.uint8),
      offsets=np.cumsum([0, len(JPEG), len(OTHER)]),
      label=np.int32([0, 1]),
    ),
  },
  'coco_mini': {
    'coco_mini/meta.json': json.dumps(SEEN_META),
    'coco_mini/train.jsonl': lines(SEEN | {'boxes': [['person', [1, 2, 9, 9]]]}),
    'coco_mini/images.zip': zipped({'0.jpg': JPEG, '0.png': MASK}),
  },
}


def write_nyu_normals(folder: Folder) -> None:
  import h5py

  normals = np.full((2, HEIGHT, WIDTH, 3), 3**-0.5, np.float32)
  pickled = gzip.compress(pickle.dumps({'all_normals': normals}, protocol=2))
  rows = [{'img': '0001_img.png'}, {'img': '0002_img.png'}]
  put(folder, {'nyuv2/all_normals.pklz': pickled, 'nyuv2/test_SN40.json': json.dumps(rows)})
  with h5py.File(folder / 'nyuv2/nyu_depth_v2_labeled.mat', 'w') as file:
    file['images'] = np.zeros((2, 3, WIDTH, HEIGHT), np.uint8)
    file['rawDepths'] = np.full((2, WIDTH, HEIGHT), 1.5, np.float32)

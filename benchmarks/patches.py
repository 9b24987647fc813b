"""What the patches of trained models hold: are they of their place, or alike in the whole image?

  python benchmarks/patches.py runs/a runs/b [--train=1500] [--test=500] [--size=64]

A row for each checkpoint. First the variance of the last layer's patches (of length one): between
images, between positions, and what is left, which is of this place in this image. Where nearly all
is between images, patches are copies of one summary, and a prototype of a patch is a prototype of
its image: masked modelling has nothing local to predict. Then the effective rank, and what linear
probes read from a patch of drawn scenes of one object: masks (mIoU), depth (R2), normals (mean
angle), and from the first CLS token the object's kind. Fast (half a minute a model), for research;
the evaluations with protocols are `python -m tips_jax.evaluate`.
"""

import argparse
import pathlib
import sys

import cv2
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import tips_jax
from benchmarks import scenes as world
from tips_jax.data.scenes import dataset
from tips_jax.evals.probes import logistic

OBJECTS = dict(size=96, objects=1, typical=0.8)
BATCH = 250
HEADER = ('', 'image', 'position', 'local', 'rank', 'masks', 'depth', 'normals', 'kind')


def shares(patch_NhwD):
  """Shares of the variance between images, between positions, and of the rest; effective rank."""
  n, h, w, d = patch_NhwD.shape
  x = patch_NhwD.reshape(n, h * w, d).astype(np.float64)
  x /= np.linalg.norm(x, axis=-1, keepdims=True)
  x -= x.mean((0, 1))
  total = np.square(x).sum(-1).mean()
  images = np.square(x.mean(1)).sum(-1).mean() / total
  positions = np.square(x.mean(0)).sum(-1).mean() / total
  eigenvalues = np.linalg.eigvalsh(np.cov(x.reshape(-1, d).T)).clip(1e-12)
  eigenvalues /= eigenvalues.sum()
  rank = np.exp(-(eigenvalues * np.log(eigenvalues)).sum())
  return images, positions, 1 - images - positions, rank


def encode(encoder, images, size):
  """Patches [N, h, w, D] and the first CLS token [N, D] of images squeezed to `size` pixels."""
  small = [cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for image in images]
  parts = [encoder.inspect(np.stack(small[i : i + BATCH])) for i in range(0, len(small), BATCH)]
  patch = np.concatenate([np.asarray(part['patch'], np.float32) for part in parts])
  name = encoder.cls_names[0]
  return patch, np.concatenate([np.asarray(part[name], np.float32) for part in parts])


def cells(values, grid):
  """[N, H, W, ...] at the centers of a grid's cells."""
  at = ((np.arange(grid) + 0.5) * values.shape[1] / grid).astype(int)
  return values[:, at][:, :, at]


def dense(train, test, seen, unseen):
  """mIoU, R2 of the depth, and mean angle of normals, by linear probes of one patch."""
  n, grid, _, width = seen.shape
  flat = seen.reshape(-1, width)
  groups = np.repeat(np.arange(n), grid * grid)
  shape = test['mask'].shape[1:]
  probe = logistic.fit(
    flat,
    cells(train['mask'], grid).ravel(),
    classes=len(dataset.MASK_CLASSES),
    groups=groups,
  )
  found = [world.score_masks(world.enlarge(probe.logits(unseen), shape), test['mask'])]
  mean = flat.mean(0)
  scale = flat.std(0) + 1e-6
  x = np.c_[(flat - mean) / scale, np.ones(len(flat))]
  y = np.concatenate([(unseen - mean) / scale, np.ones((*unseen.shape[:3], 1))], -1)
  for kind in ('depth', 'normals'):
    target = cells(train[kind], grid).reshape(len(flat), -1)
    known = (target != 0).any(-1).astype(np.float64)
    answer = world.enlarge(y @ world.ridge(x, target, known, groups), shape)
    if kind == 'depth':
      found.append(world.score_depth(answer, test[kind], target[known > 0].mean()))
    else:
      found.append(world.score_normals(answer, test[kind]))
  return found


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('checkpoints', nargs='+')
  parser.add_argument('--train', type=int, default=1500)
  parser.add_argument('--test', type=int, default=500)
  parser.add_argument('--size', type=int, default=64)
  args = parser.parse_args()
  drawn = argparse.Namespace(**OBJECTS)
  train = world.read(args.train, 'train', drawn)
  test = world.read(args.test, 'test', drawn)
  names, kinds = np.unique(train['label'], return_inverse=True)
  print('| ' + ' | '.join(HEADER) + ' |')
  print('|---' * len(HEADER) + '|', flush=True)
  for path in args.checkpoints:
    encoder = tips_jax.load(path)
    seen, cls = encode(encoder, train['image'], args.size)
    unseen, test_cls = encode(encoder, test['image'], args.size)
    probe = logistic.fit(cls, kinds, classes=len(names))
    kind = 100 * (names[probe.logits(test_cls).argmax(-1)] == test['label']).mean()
    image, position, local, rank = shares(unseen)
    miou, depth, normals = dense(train, test, seen, unseen)
    print(
      f'| {pathlib.Path(path).name} | {image:.2f} | {position:.2f} | {local:.2f} | {rank:.1f} '
      f'| {miou:.1f} | {depth:.3f} | {normals:.1f} | {kind:.1f} |',
      flush=True,
    )


if __name__ == '__main__':
  main()

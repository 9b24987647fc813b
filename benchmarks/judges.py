"""Our numbers beside those of programs that are not ours, for one checkpoint.

  pip install --no-deps clip-benchmark==1.6.2 && pip install torchvision
  python benchmarks/judges.py --checkpoint=PATH --data=DIR [--limit=1000]

The checkpoint is exported for transformers; there, images and texts go through its own image
processor and tokenizer. clip-benchmark measures retrieval on flickr8k and zero-shot classification
on cifar10; scikit-learn fits k-NN and logistic regression to what `python -m tips_jax.encode`
writes, with the k and the L2 strength that our tasks chose; the zero-shot pipeline of transformers
classifies the first images of cifar10. --limit: images of a split. Fails where a pipeline's
probability or a share of images differs more than rounding explains.
"""

import argparse
import io
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import tips_jax
from tips_jax.evals import suite
from tips_jax.evals.datasets import evaluations
from tips_jax.evals.features import reading
from tips_jax.evals.features.cache import Cache
from tips_jax.evals.tasks import prompts

ROOT = pathlib.Path(__file__).resolve().parent.parent
TASKS = {'flickr8k': ('retrieval',), 'cifar10': ('zeroshot', 'knn', 'linear')}
BATCH = 50
PIPELINE_IMAGES = 100
# What rounding may change: a few images of a thousand that are nearly as near to another class.
SHARE = 2e-3
PROBABILITY = 1e-4
TEMPERATURE = 0.07  # of the votes of our k-NN


def program(name, **flags):
  """Runs a program of ours as a user does."""
  flags = [f'--{flag}={value}' for flag, value in flags.items()]
  subprocess.run([sys.executable, '-m', f'tips_jax.{name}', *flags], cwd=ROOT, check=True)


def measure(encoder, data, limit, folder):
  """({"flickr8k/retrieval": Result, ...} of our tasks, the data sets that they measured)."""
  jobs = []
  for name, tasks in TASKS.items():
    jobs += evaluations.of_benchmark(name, data, only=tasks, size=encoder.size)
  results = suite.run(encoder, jobs, cache=Cache(folder / 'cache'), limit=limit)
  return {result.prefix: result for result in results}, {job.dataset: job.data for job in jobs}


def records(data, split, limit):
  source = data.source(split)
  return [source[int(i)] for i in reading.records(source, limit)]


def picture(record):
  return Image.open(io.BytesIO(record['image'])).convert('RGB')


class Clip:
  """A model of transformers as clip-benchmark calls it."""

  def __init__(self, folder):
    import torch
    import transformers

    self.model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    self.processor = transformers.AutoProcessor.from_pretrained(folder)

  def encode_image(self, pixels):
    return self.model.vision_model(pixel_values=pixels).pooler_output

  def encode_text(self, tokens):
    return self.model.text_model(**tokens).pooler_output

  def tokenize(self, texts):
    return self.processor.tokenizer(
      texts, padding='max_length', truncation=True, return_tensors='pt'
    )

  def pixels(self, images):
    return self.processor.image_processor(images, return_tensors='pt')['pixel_values']


class Loader:
  """Batches (pixels, targets) of records."""

  def __init__(self, clip, rows, target, collect=list):
    self.clip = clip
    self.rows = rows
    self.target = target
    self.collect = collect

  def __len__(self):
    return -(-len(self.rows) // BATCH)

  def __iter__(self):
    for start in range(0, len(self.rows), BATCH):
      batch = self.rows[start : start + BATCH]
      pixels = self.clip.pixels([picture(record) for record in batch])
      yield pixels, self.collect([self.target(record) for record in batch])


def retrieval(clip, rows):
  """{our metric: value of clip-benchmark}."""
  from clip_benchmark.metrics import zeroshot_retrieval

  loader = Loader(clip, rows, lambda record: reading.texts_of(record, 'captions'))
  found = zeroshot_retrieval.evaluate(
    clip, loader, clip.tokenize, 'cpu', amp=False, recall_k_list=[1, 5, 10]
  )
  result = {}
  for k in (1, 5, 10):
    result[f't2i_r{k}'] = found[f'image_retrieval_recall@{k}']
    result[f'i2t_r{k}'] = found[f'text_retrieval_recall@{k}']
  return result


def zeroshot(clip, rows, classes, templates):
  """As `retrieval`: its classes and logits, counted by scikit-learn, as its own count fails with
  NumPy 2.4.
  """
  import torch
  from clip_benchmark.metrics import zeroshot_classification
  from sklearn import metrics

  templates = [template.replace('{}', '{c}') for template in templates]
  classifier = zeroshot_classification.zero_shot_classifier(
    clip, clip.tokenize, list(classes), templates, 'cpu', amp=False
  )
  loader = Loader(clip, rows, lambda record: int(record['label']), torch.tensor)
  logits, labels = zeroshot_classification.run_classification(
    clip, classifier, loader, 'cpu', amp=False
  )
  result = {}
  for name, k in {'accuracy': 1, 'top5': 5}.items():
    result[name] = metrics.top_k_accuracy_score(labels, logits, k=k, labels=range(len(classes)))
  return result


def encoded(checkpoint, rows, folder):
  """(CLS tokens [N, D], labels [N]) of records, by way of `python -m tips_jax.encode`."""
  folder.mkdir()
  for i, record in enumerate(rows):
    (folder / f'{i:05d}.image').write_bytes(record['image'])
  output = folder / 'features.npz'
  program('encode', checkpoint=checkpoint, images=f'{folder}/*.image', output=output)
  with np.load(output) as features:
    assert len(features['paths']) == len(rows)
    return features['cls'][:, 0], np.array([int(record['label']) for record in rows])


def probes(train, test, k, l2):
  """{task: accuracy} of scikit-learn."""
  from sklearn import linear_model, neighbors, pipeline, preprocessing

  x, y = train
  knn = neighbors.KNeighborsClassifier(
    min(k, len(x)), metric='cosine', algorithm='brute', weights=lambda d: np.exp(-d / TEMPERATURE)
  )
  linear = pipeline.make_pipeline(
    preprocessing.StandardScaler(),
    # Our loss is a mean over the images, theirs a sum.
    linear_model.LogisticRegression(C=1 / (l2 * len(x)), max_iter=5000),
  )
  return {'knn': knn.fit(x, y).score(*test), 'linear': linear.fit(x, y).score(*test)}


def pipeline_differs(encoder, folder, rows, classes):
  """(largest difference of a probability, images whose order of classes differs)."""
  import transformers

  classify = transformers.pipeline('zero-shot-image-classification', model=str(folder))
  images = [picture(record) for record in rows]
  texts = [f'a photo of a {name}.' for name in classes]
  logits = encoder.similarity(images, texts)
  shares = np.exp(logits - logits.max(1, keepdims=True))
  shares /= shares.sum(1, keepdims=True)
  largest = 0.0
  other = 0
  for image, row in zip(images, shares, strict=True):
    answers = classify(image, candidate_labels=texts, hypothesis_template='{}')
    other += [answer['label'] for answer in answers] != [texts[i] for i in np.argsort(-row)]
    for answer in answers:
      largest = max(largest, abs(answer['score'] - row[texts.index(answer['label'])]))
  return largest, other


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--checkpoint', required=True)
  parser.add_argument('--data', required=True)
  parser.add_argument('--limit', type=int, default=1000)
  args = parser.parse_args()
  args.checkpoint = os.path.abspath(args.checkpoint)
  encoder = tips_jax.load(args.checkpoint, exact=True)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    exported = folder / 'exported'
    program('export', checkpoint=args.checkpoint, to='hf', output=exported)
    ours, data = measure(encoder, args.data, args.limit, folder)
    clip = Clip(exported)
    pairs = records(data['flickr8k'], 'test', args.limit)
    test = records(data['cifar10'], 'test', args.limit)
    train = records(data['cifar10'], 'train', args.limit)
    classes = data['cifar10'].label_names('test')
    zero = ours['cifar10/zeroshot']
    theirs = {
      'flickr8k/retrieval': retrieval(clip, pairs),
      'cifar10/zeroshot': zeroshot(
        clip, test, classes, prompts.templates(zero.options['templates'])
      ),
    }
    found = probes(
      encoded(args.checkpoint, train, folder / 'train'),
      encoded(args.checkpoint, test, folder / 'test'),
      ours['cifar10/knn'].chosen['k'],
      ours['cifar10/linear'].chosen['l2'],
    )
    for task, accuracy in found.items():
      theirs[f'cifar10/{task}'] = {'accuracy': accuracy}
    difference, other = pipeline_differs(encoder, exported, test[:PIPELINE_IMAGES], classes)
  agree = difference <= PROBABILITY and not other
  print('| | ours | theirs |\n|---|---|---|')
  for task, metrics in theirs.items():
    for metric, value in metrics.items():
      own = ours[task].metrics[metric]
      agree &= abs(own - value) <= SHARE
      print(f'| {task}, {metric} | {own:.4f} | {value:.4f} |')
  print(f'pipeline: probabilities differ by {difference:.1e} at most; other order: {other} images')
  sys.exit(0 if agree else 'error: they differ')


if __name__ == '__main__':
  main()

"""How the tables of benchmarks/ablation.py are measured: the same for every row, fixed before any
run.

All is on frozen features of the last checkpoint, by `python -m tips_jax.evaluate` with the short
recipes (small decoders, 30,000 patches), with the flags below:

- scenes: `--suite=quick`, 1,024 drawn scenes to learn from and 256 to measure on, squeezed to the
  64 pixels of training.
- fashion: article type on the 1,000 photos of dev, learned from the 8,083 of train, 96 pixels.
  Segmentation on `ccp`, squeezed to 128 pixels: mean of five folds, every fifth photo is tested;
  pixels of the class null (background and unlabeled) do not count.
- flickr8k: dev with its five captions, 96 pixels; CamVid (62 test frames of another drive) and the
  kitchen (the last 80 frames), 128 pixels.

Class by nearest neighbors is measured on the first CLS token, which reads alt texts where a row has
two. Retrieval is the mean of R@1 in both directions among the images of the test split. A caption
is looked up with the CLS token that learned captions where there is one of its own, an alt text
with the first; their mean is the column `retrieval`. So a row that learned one kind of text is
asked for both.
"""

import dataclasses
import io
import json
import pathlib
import zipfile

import numpy as np
from PIL import Image

VOID = 255
FOLDS = 5


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of the table: the mean of `picks`, each (evaluation, task, metrics): the first of the
  metrics that there is.
  """

  title: str
  picks: tuple[tuple[str, str, tuple[str, ...]], ...]
  better: str = 'higher'
  digits: int = 1


# --- stores -------------------------------------------------------------------------------------


def stores(data: str, folder: pathlib.Path, packs: pathlib.Path | None) -> dict[str, list[str]]:
  """The stores of a data set below `folder`, which `prepare` makes of its packs: name -> flags.
  The first is what a run learns from.
  """
  if data == 'scenes':
    return {'scenes_alt': _alt_texts(folder / 'scenes')}
  pack = packs / data
  own = [
    f'--input={pack}/train.jsonl',
    f'--images={pack}/train.zip',
    f'--test_input={pack}/dev.jsonl',
    f'--test_images={pack}/dev.zip',
    '--tokenizer',
  ]
  if data == 'flickr8k':
    # Five captions an image: one is its alt text, always the same.
    return {data: [*own, '--vocab_size=6000', '--first_caption_as_alt_text']}
  result = {
    data: [*own, '--vocab_size=4000', '--label_column=label'],
    'fashion_alt': _alt_texts(folder / data),
  }
  for fold in range(FOLDS):
    tables = folder / 'ccp_tables'
    result[f'ccp{fold}'] = [
      f'--input={tables}/train{fold}.jsonl',
      f'--test_input={tables}/test{fold}.jsonl',
      f'--images={tables}/images.zip',
      f'--test_images={tables}/images.zip',
      '--mask_column=mask',
      '--alt_text_column=none',
      '--captions_column=none',
    ]
  return result


def _alt_texts(store):
  """The test split of a store with its alt texts alone."""
  return [f'--input={store}', '--input_split=test', '--split=test', '--captions_column=none']


def write_folds(pack: pathlib.Path, folder: pathlib.Path) -> None:
  """The pack `ccp` as tables of each fold beside one zip, in which class null is void and the
  others count from 0.
  """
  part = folder.with_name(f'{folder.name}.part')
  part.mkdir(parents=True, exist_ok=True)
  rows = [json.loads(line) for line in (pack / 'train.jsonl').read_text().splitlines()]
  with (
    zipfile.ZipFile(pack / 'images.zip') as old,
    zipfile.ZipFile(part / 'images.zip', 'w') as new,
  ):
    for row in rows:
      new.writestr(row['image'], old.read(row['image']))
      mask = np.asarray(Image.open(io.BytesIO(old.read(row['mask']))))
      data = io.BytesIO()
      # 0 - 1 is 255 in 8 bits, which is void.
      Image.fromarray(mask - np.uint8(1)).save(data, 'PNG')
      new.writestr(row['mask'], data.getvalue())
  for fold in range(FOLDS):
    for name, tested in (('train', False), ('test', True)):
      lines = [json.dumps(r) for i, r in enumerate(rows) if (i % FOLDS == fold) == tested]
      (part / f'{name}{fold}.jsonl').write_text('\n'.join(lines) + '\n')
  part.rename(folder)


# --- evaluations --------------------------------------------------------------------------------


def evaluations(
  data: str, folder: pathlib.Path, packs: pathlib.Path | None
) -> dict[str, list[str]]:
  """The evaluations of a run on a data set: name -> flags of `evaluate`."""
  if data == 'scenes':
    tasks = '--task=segmentation,depth,dpt_normals,knn,retrieval,zeroshot_segmentation'
    return {
      'quick': ['--suite=quick', tasks, '--size=64'],
      'alt': [f'--store={folder}/scenes_alt', '--task=retrieval', '--size=64'],
    }
  short = '--recipe=short'
  if data == 'flickr8k':
    tests = f'--data={packs}'
    return {
      'flickr8k': ['--suite=flickr8k', tests, '--size=96'],
      'camvid': ['--suite=camvid', tests, '--task=segmentation', '--size=128', short],
      'rgbd': ['--suite=rgbd', tests, '--task=depth', '--size=128', short],
    }
  result = {
    'fashion': [f'--store={folder}/fashion', '--task=knn,linear,retrieval', '--size=96', short],
    'alt': [f'--store={folder}/fashion_alt', '--task=retrieval', '--size=96'],
  }
  for fold in range(FOLDS):
    result[f'ccp{fold}'] = [
      f'--store={folder}/ccp{fold}',
      '--task=segmentation',
      '--size=128',
      short,
    ]
  return result


def _recalls(evaluation, token):
  """Both directions, of a CLS token where there is more than one."""
  picks = []
  for metric in ('t2i_r1', 'i2t_r1'):
    picks.append((evaluation, 'retrieval', (f'{token}/{metric}', metric)))
  return tuple(picks)


def _one(evaluation, task, metric):
  return ((evaluation, task, (metric,)),)


def _texts(evaluation):
  """Columns of retrieval by captions, by alt texts, and by both."""
  captions = _recalls(evaluation, 'synthetic')
  alt_texts = _recalls('alt', 'web')
  return (
    Column('captions R@1, %', captions),
    Column('alt texts R@1, %', alt_texts),
    Column('retrieval, %', captions + alt_texts),
  )


def _folds(metric):
  picks = ()
  for fold in range(FOLDS):
    picks += _one(f'ccp{fold}', 'segmentation', metric)
  return picks


COLUMNS = {
  'scenes': (
    Column('segmentation mIoU, %', _one('quick', 'segmentation', 'miou')),
    Column('depth RMSE, m', _one('quick', 'depth', 'rmse'), 'lower', 3),
    Column('normals RMSE, degrees', _one('quick', 'dpt_normals', 'angular_rmse'), 'lower', 1),
    Column('zero-shot segmentation mIoU, %', _one('quick', 'zeroshot_segmentation', 'miou')),
    Column('kNN, %', _one('quick', 'knn', 'accuracy')),
    *_texts('quick'),
  ),
  'fashion': (
    Column('segmentation mIoU, %', _folds('miou')),
    Column('pixel accuracy, %', _folds('pixel_accuracy')),
    Column('kNN, %', _one('fashion', 'knn', 'accuracy')),
    Column('linear, %', _one('fashion', 'linear', 'accuracy')),
    *_texts('fashion'),
  ),
  'flickr8k': (
    Column('segmentation mIoU, %', _one('camvid', 'segmentation', 'miou')),
    Column('depth RMSE, m', _one('rgbd', 'depth', 'rmse'), 'lower', 3),
    Column('retrieval, %', _recalls('flickr8k', 'synthetic')),
  ),
}


def measures(data: str, results: dict[str, dict]) -> dict[str, float]:
  """Column -> number, of results.json of each evaluation; KeyError for one that is not there."""
  found = {}
  for name, content in results.items():
    for entry in content['results']:
      for metric, measured in entry['metrics'].items():
        found[name, entry['task'], metric] = measured['value']
  numbers = {}
  for column in COLUMNS[data]:
    values = []
    for evaluation, task, metrics in column.picks:
      known = [found[evaluation, task, m] for m in metrics if (evaluation, task, m) in found]
      if not known:
        raise KeyError((evaluation, task, metrics))
      values.append(known[0])
    numbers[column.title] = float(np.mean(values))
  return numbers


# --- what the papers say ------------------------------------------------------------------------

_SEGMENTATION = 'segmentation mIoU, %'
_DEPTH = 'depth RMSE, m'
_NORMALS = 'normals RMSE, degrees'
_RETRIEVAL = 'retrieval, %'
# (worse row, better row, column): TIPS, Table 1; TIPSv2, Tables 3, 4 and 9 (docs/method.md).
ORDERINGS = (
  ('web', 'synthetic', _SEGMENTATION),
  ('both', 'distill', _SEGMENTATION),
  ('both', 'masked', _SEGMENTATION),
  ('distill', 'all', _SEGMENTATION),
  ('both', 'all', _SEGMENTATION),
  ('web', 'all', _SEGMENTATION),
  ('web', 'synthetic', _DEPTH),
  ('both', 'distill', _DEPTH),
  ('both', 'masked', _DEPTH),
  ('distill', 'all', _DEPTH),
  ('web', 'all', _DEPTH),
  ('both', 'all', _DEPTH),
  ('web', 'synthetic', _NORMALS),
  ('both', 'distill', _NORMALS),
  ('both', 'masked', _NORMALS),
  ('distill', 'all', _NORMALS),
  ('both', 'all', _NORMALS),
  ('web', 'all', _NORMALS),
  ('synthetic', 'web', 'kNN, %'),
  ('web', 'both', _RETRIEVAL),
  ('synthetic', 'both', _RETRIEVAL),
  ('sampled', 'both', _RETRIEVAL),
  ('both', 'all', _RETRIEVAL),
  ('all', 'ibotpp', 'zero-shot segmentation mIoU, %'),
  ('head_ema', 'v2', _RETRIEVAL),
)

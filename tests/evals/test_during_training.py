"""What a run measures on the way: an encoder that knows everything, one that knows nothing, every
task on real towers, benchmarks too, and what lacks is said in one line.
"""

import dataclasses
import json
import pathlib
import tempfile

import numpy as np
import pytest

from tests.data.benchmarks import fake_benchmarks as fake
from tips_jax import evaluate
from tips_jax.core import log, schema
from tips_jax.core.errors import InputError
from tips_jax.data import store as store_lib
from tips_jax.data import tokenizer as tokenizer_lib
from tips_jax.data.scenes import dataset as scenes
from tips_jax.evals import during_training, suite
from tips_jax.evals.datasets import evaluations, on_disk
from tips_jax.evals.during_training import DuringTraining
from tips_jax.evals.features import cache
from tips_jax.evals.tasks import table
from tips_jax.interop import write
from tips_jax.interop.encoder import Encoder
from tips_jax.interop.weights import Weights
from tips_jax.models import towers

SIZE, TRAIN, TEST = 32, 20, 12
THREE = ('retrieval', 'knn', 'segmentation')
ALL = (*THREE, 'depth', 'dpt_depth', 'dpt_normals', 'linear', 'instance_retrieval')
ALL += ('zeroshot', 'zeroshot_segmentation')
SMALL = dict(channels=4, widths=(4, 4, 4, 4), epochs=1, batch=10)
TINY = {
  'segmentation': dict(mode='square'),
  'depth': dict(steps=4, batch=4, learning_rates=(1e-3, 1e-2), upsample=1, bins=8),
  'dpt_depth': SMALL | dict(bins=8),
  'dpt_normals': SMALL,
  'linear': dict(steps=5),
  'zeroshot': dict(templates='photo'),
}
RECALLS = {f'{way}_r{k}' for way in ('t2i', 'i2t') for k in (1, 5, 10)}


def config_of(store, *tasks, has_text=True, texts=True, best='', **evals):
  """A config of a run, as far as the evaluation reads it."""
  text = schema.TextTower(kind='text', width=16, depth=1, heads=2, mlp=32)
  return schema.Config(
    name='run',
    data=schema.Data(
      store=str(store.path),
      views={},
      texts={'web': schema.Text(field='captions')} if texts else {},
      text_length=16,
    ),
    towers={'text': text} if has_text else {},
    passes={},
    losses={},
    schedule=schema.Schedule(total_steps=1, batch_size=1),
    checkpoint=schema.Checkpoint(best_metric=best),
    evals=schema.Evals(tasks=tasks, **(dict(size=SIZE, batch_size=7) | evals)),
  )


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
  path = scenes.build(tmp_path_factory.mktemp('run') / 'scenes', train=TRAIN, test=TEST, size=SIZE)
  return store_lib.open_store(path)


@pytest.fixture(scope='module')
def model(drawn):
  words = tokenizer_lib.Tokenizer(drawn.tokenizer_path)
  known = {
    'image': schema.ViT(kind='vit', width=16, depth=4, heads=2, mlp=32, patch=8, grid=4),
    'text': schema.TextTower(
      kind='text', width=16, depth=1, heads=2, mlp=32, vocab=words.vocab_size
    ),
  }
  weights = Weights(
    name='tiny',
    towers=known,
    params={name: towers.init(name, tower, seed=0) for name, tower in known.items()},
    tokenizer=pathlib.Path(words.path).read_bytes(),
    size=SIZE,
    text_length=16,
  )
  return Encoder(weights, exact=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
  """Recipes that take no time, and a folder of our own for what is temporary."""
  for name, spec in table.TASKS.items():
    tiny = dataclasses.replace(spec, short_constants=TINY.get(name, {}))
    monkeypatch.setitem(table.TASKS, name, tiny)
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
  (tmp_path / 'temporary').mkdir()


# --- an encoder that reads the answer -----------------------------------------------------------


def test_an_encoder_that_sees_scores_high(store, encoder, make_encoder):
  evaluation = DuringTraining(config_of(store, *THREE))
  found = evaluation(encoder)
  assert {name for name in found if name.startswith('retrieval/')} == {
    f'retrieval/{name}' for name in RECALLS
  }
  assert {'knn/accuracy', 'knn/synthetic/accuracy', 'segmentation/miou'} < set(found)
  assert all(type(value) is float for value in found.values())
  assert found['knn/accuracy'] == 1.0 and found['segmentation/miou'] > 0.8
  assert found['retrieval/t2i_r5'] > 0.5 and found['retrieval/t2i_r1'] <= found['retrieval/t2i_r5']
  assert evaluation(make_encoder()) == found


def test_noise_scores_about_chance(store, make_encoder):
  found = DuringTraining(config_of(store, *THREE))(make_encoder(noise=1e4))
  assert found['knn/accuracy'] < 0.75 and found['segmentation/miou'] < 0.4
  assert found['retrieval/t2i_r1'] < 1 / 20 + 0.25


def test_a_diverged_model_scores_no_retrieval(store, make_encoder):
  found = DuringTraining(config_of(store, *THREE))(make_encoder(noise=np.nan))
  assert all(value == 0 for name, value in found.items() if name.startswith('retrieval/'))
  assert np.isfinite(list(found.values())).all()


def test_only_the_tasks_of_the_config(store, encoder):
  for task in THREE:
    found = DuringTraining(config_of(store, task))(encoder)
    assert found and all(name.startswith(f'{task}/') for name in found)
  encoder.images.clear()
  assert DuringTraining(config_of(store))(encoder) == {} and encoder.images == []


# --- real towers --------------------------------------------------------------------------------


@pytest.mark.once
def test_every_task_gives_the_numbers_of_evaluate(drawn, model, tmp_path):
  """To the digit, for every metric of all ten tasks, through the files of an export."""
  evaluation = DuringTraining(config_of(drawn, *ALL, batch_size=8, limit=16))
  found = evaluation(model)
  assert {name.split('/')[0] for name in found} == set(ALL)
  assert all(np.isfinite(value) for value in found.values())

  with write.new_folder(tmp_path / 'export') as folder:
    write.write(model.weights, 'safetensors', folder)
  arguments = ['evaluate', f'--checkpoint={tmp_path / "export"}', f'--store={drawn.path}']
  arguments += [f'--size={SIZE}', '--limit=16', '--recipe=short', f'--task={",".join(ALL)}']
  arguments += [f'--output={tmp_path / "evaluation"}', f'--cache={tmp_path / "cache"}']
  assert evaluate.main(arguments) == 0

  content = json.loads((tmp_path / 'evaluation' / 'results.json').read_text())
  scale = {'%': 100, 'm': 1, 'deg': 1}
  published = {}
  for entry in content['results']:
    for name, metric in entry['metrics'].items():
      published[f'{entry["task"]}/{name}'] = metric['value'], scale[metric['unit']]
  assert set(published) == set(found)
  for name, (value, unit) in published.items():
    assert value == found[name] * unit, name


def test_the_report_of_a_run(drawn, model, tmp_path):
  evaluation = DuringTraining(config_of(drawn, 'depth', *THREE, batch_size=8))
  found = evaluation(model)
  line = {'step': 0} | {f'eval/{name}': 0.5 for name in found}
  trained = {'step': 4, 'goodput': 0.5, 'run_seconds': 60.0}
  (tmp_path / log.FILE).write_text(f'{json.dumps(line)}\n{json.dumps(trained)}\n')
  table_text = evaluation.report(tmp_path, model)
  assert 'retrieval' in table_text and 'segmentation' in table_text
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['after'] == found and report['before'] == dict.fromkeys(found, 0.5)
  assert {name.split('/')[0] for name in report['chance']} == {'depth', *THREE}
  pixels = report['pixel_baseline']
  assert {name.split('/')[0] for name in pixels} == {'depth', *THREE} and set(pixels) < set(found)
  assert 'goodput 50 %: 0:30 of the 1:00' in (tmp_path / 'index.html').read_text()
  # The columns of both files are the same numbers.
  for entry in json.loads((tmp_path / 'results.json').read_text())['results']:
    for name, metric in entry['metrics'].items():
      assert metric['before'] == 0.5 * {'%': 100}.get(metric['unit'], 1)
      assert (metric['pixel_baseline'] is not None) == (f'{entry["task"]}/{name}' in pixels)


def test_nothing_stays(drawn, model, tmp_path, monkeypatch):
  """Neither files nor, once removed, files that are still open; not after an error either."""
  folders, extract, fail = [], cache.Cache.extract, False

  def left():
    return list((tmp_path / 'temporary').iterdir())

  def spy(self, *args, **options):
    folders.append(self.folder)
    if fail:
      raise cache.DiskFull('--cache: full')
    return extract(self, *args, **options)

  monkeypatch.setattr(cache.Cache, 'extract', spy)
  evaluation = DuringTraining(config_of(drawn, 'depth'))
  evaluation(model)
  assert folders and left() == []
  assert str(folders[0]) not in pathlib.Path('/proc/self/maps').read_text()
  fail = True
  with pytest.raises(InputError, match='^evals: --cache: full; in training TMPDIR says where'):
    evaluation(model)
  assert left() == []


def test_the_split_is_that_of_the_config(drawn):
  config = config_of(drawn, 'linear', 'instance_retrieval', split='train[50%:]')
  linear, instance = DuringTraining(config)._own
  assert linear.splits == {'train': 'train', 'test': 'train[50%:]'}
  assert instance.splits == {'test': 'train[50%:]'}
  assert len(linear.data.source('train[50%:]')) == TRAIN // 2


def test_benchmarks(drawn, model, tmp_path, monkeypatch):
  monkeypatch.setattr(on_disk, '_count', lambda *_: None)  # of thousands of images
  for name in ('flickr8k', 'uned_food2k', 'cifar10'):
    fake.WRITE[name](tmp_path / 'data')
  options = dict(suite='flickr8k,uned_food2k', data=str(tmp_path / 'data'))
  found = DuringTraining(config_of(drawn, 'instance_retrieval', **options))(model)
  assert {
    'instance_retrieval/r1',
    'uned_food2k/instance_retrieval/r1',
    'flickr8k/retrieval/t2i_r1',
  } <= set(found)
  silent = DuringTraining(
    config_of(drawn, has_text=False, suite='cifar10', data=str(tmp_path / 'data'))
  )
  # Zero-shot classification needs texts.
  assert [evaluation.task.kind for evaluation in silent._groups[0]] == ['knn', 'linear']
  with pytest.raises(InputError, match="evals.suite: 'flickr8k' needs a text tower"):
    DuringTraining(config_of(drawn, has_text=False, **options))
  with pytest.raises(InputError, match="evals.suite: 'flickr8k' needs a tokenizer"):
    DuringTraining(config_of(drawn, texts=False, **options))


# --- what lacks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'tasks, fields, message',
  [
    ((), dict(suite='voc'), '^evals.data: missing; expected the folder of voc; docs/datasets.md'),
    (
      (),
      dict(suite='tips', data='/nowhere'),
      "^evals.data: got '/nowhere', which is no folder; expected the folder of",
    ),
    ((), dict(suite='vok', data='.'), "^evals.suite: .*got 'vok'.*did you mean 'voc'"),
    ((), dict(suite='quick', data='.'), "^evals.suite: .*got 'quick'"),
    ((), dict(suite='voc', data='.'), 'voc'),
    (('retrieval',), dict(has_text=False), "^evals.tasks: 'retrieval' needs a text tower"),
    (('zeroshot',), dict(has_text=False), "^evals.tasks: 'zeroshot' needs a text tower"),
    (
      ('zeroshot_segmentation',),
      dict(texts=False),
      "^evals.tasks: 'zeroshot_segmentation' needs a tokenizer",
    ),
    (('depth',), dict(split='tset'), "got 'tset'.*did you mean 'test'"),
    (('dept',), {}, r"^evals.tasks\[0\]: got 'dept'.*did you mean 'depth'"),
    (('knn',), dict(best='kn/accuracy'), '^checkpoint.best_metric.*kn/accuracy'),
  ],
)
def test_what_lacks_is_said_in_one_line(drawn, tmp_path, monkeypatch, tasks, fields, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match=message) as caught:
    DuringTraining(config_of(drawn, *tasks, **fields))
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('task', ALL)
def test_an_annotation_that_lacks(tmp_path, write_store, task):
  bare = write_store(tmp_path / 'bare', annotations=())
  feature = table.TASKS[task].annotation
  if feature == 'captions':
    return
  with pytest.raises(
    InputError, match=f"^evals.tasks: '{task}' needs the feature '{feature}', and store"
  ):
    DuringTraining(config_of(bare, task))


@pytest.mark.parametrize('split, void', [('training', ('train', 'test')), ('test', ('test',))])
def test_masks_of_void_are_refused_in_training_as_in_evaluate(
  tmp_path, write_store, encoder, split, void
):
  """In the same words: training gave a silent nan once."""
  store = write_store(tmp_path / 'void', void=void)
  with pytest.raises(InputError) as in_training:
    DuringTraining(config_of(store, 'segmentation'))(encoder)
  [evaluation] = evaluations.of_store(store.path, only=('segmentation',))
  with pytest.raises(InputError) as in_evaluate:
    suite.run(encoder, [evaluations.short(evaluation)], cache=cache.Cache(tmp_path / 'cache'))
  message = f'void: every pixel of the {split} masks is void; expected classes'
  assert str(in_evaluate.value) == message
  assert str(in_training.value) == f'evals: {message}'


@pytest.mark.parametrize(
  'metric, lower',
  [('knn/accuracy', False), ('depth/rmse', True), ('dpt_normals/angular_rmse', True)],
)
def test_errors_are_minimized(drawn, metric, lower):
  evaluation = DuringTraining(config_of(drawn, metric.split('/')[0], best=metric))
  assert evaluation.lower_is_better is lower


def test_without_training_texts_there_is_no_pixel_baseline_of_retrieval(
  tmp_path, write_store, encoder
):
  store = write_store(tmp_path / 'store', train=0)
  evaluation = DuringTraining(config_of(store, 'retrieval'))
  assert evaluation._pixels(encoder) == {}


def test_check_opens_no_data():
  class Nowhere:
    path = '/nowhere'

  during_training.check(config_of(Nowhere, 'knn'))
  with pytest.raises(InputError, match='evals.tasks'):
    during_training.check(config_of(Nowhere, 'kn'))

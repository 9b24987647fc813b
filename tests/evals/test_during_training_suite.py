"""The suite inside a run: every task on a tiny store and real towers, benchmarks too, nothing left
behind.
"""

import dataclasses
import pathlib
import tempfile
import typing

import numpy as np
import pytest

from tests.data.benchmarks import fake_benchmarks as fake
from tips_jax.core import schema, strict
from tips_jax.core.errors import InputError
from tips_jax.core.schema import Evals
from tips_jax.data import store as store_lib
from tips_jax.data import tokenizer as tokenizer_lib
from tips_jax.data.scenes import dataset as scenes
from tips_jax.evals import during_training as run
from tips_jax.evals import during_training_suite as run_suite
from tips_jax.evals import suite
from tips_jax.evals.datasets import jobs as suite_data
from tips_jax.evals.datasets import on_disk as checker
from tips_jax.evals.features import cache as cache_lib
from tips_jax.evals.tasks import table
from tips_jax.interop.encoder import Encoder
from tips_jax.interop.weights import Weights
from tips_jax.models import towers

SIZE, TRAIN, TEST = 32, 20, 12
HERE = ('retrieval', 'knn', 'segmentation')
ALL = typing.get_args(typing.get_args(typing.get_type_hints(Evals)['tasks'])[0])
SMALL = dict(hidden=4, widths=(4, 4, 4, 4), epochs=1, batch=10)
TINY = {
  'depth': dict(steps=4, batch=4, learning_rates=(1e-3, 1e-2), upsample=1, bins=8),
  'dpt_depth': SMALL | dict(bins=8),
  'normals': SMALL,
  'linear': dict(steps=5),
  'zeroshot': dict(templates='photo'),
}
FIRST = {
  'depth': 'rmse',
  'dpt_depth': 'rmse',
  'dpt_normals': 'angular_rmse',
  'linear': 'accuracy',
  'instance_retrieval': 'r1',
  'zeroshot': 'accuracy',
  'zeroshot_segmentation': 'miou',
}


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
  path = scenes.build(tmp_path_factory.mktemp('run') / 'scenes', train=TRAIN, test=TEST, size=SIZE)
  return store_lib.open_store(path)


@pytest.fixture(scope='module')
def words(drawn):
  return tokenizer_lib.Tokenizer(drawn.tokenizer_path)


@pytest.fixture(scope='module')
def model(words):
  known = {
    'image': schema.ViT(kind='vit', width=16, depth=4, heads=2, mlp=32, patch=8, grid=4),
    'text': schema.TextTower(
      kind='text', width=16, depth=1, heads=2, mlp=32, vocab=words.vocab_size
    ),
  }
  params = {name: towers.init(name, tower, seed=0) for name, tower in known.items()}
  return Encoder(
    Weights(
      name='tiny',
      towers=known,
      params=params,
      tokenizer=pathlib.Path(words.path).read_bytes(),
      size=SIZE,
      text_length=16,
    )
  )


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
  """Recipes that take no time, and a folder of our own for what is temporary."""
  monkeypatch.setattr(suite_data, '_SHORT', TINY)
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
  (tmp_path / 'temporary').mkdir()


def config_of(*tasks, **fields):
  return Evals(tasks=tasks, size=SIZE, batch_size=8, **fields)


def test_all_tasks_of_the_suite_may_be_named():
  assert set(ALL) == {*table.TASKS}
  with pytest.raises(InputError, match=r"evals.tasks\[0\]: got 'dept'.*did you mean 'depth'"):
    strict.build(Evals, {'tasks': ('dept',)}, 'evals')


def test_every_task(drawn, words, model, tmp_path):
  keep, options = {}, dict(tokenizer=words, text_length=16)
  found = run.evaluate(model, drawn, config=config_of(*ALL), keep=keep, **options)
  assert list(dict.fromkeys(name.split('/')[0] for name in found)) == [
    *HERE,
    *(t for t in ALL if t not in HERE),
  ]
  assert all(type(v) is float and np.isfinite(v) for v in found.values())
  for task, metric in FIRST.items():
    assert f'{task}/{metric}' in found and f'{task}/{metric}' in keep['chance']
  here = run.evaluate(
    model, drawn, config=config_of(*HERE), **options
  )  # whose numbers stay what they were
  assert here == {name: value for name, value in found.items() if name.split('/')[0] in HERE}

  [job] = run_suite.jobs(drawn, config_of('depth'), ['depth'])['']  # by the suite itself
  [outcome] = suite.run(model, [job], cache=cache_lib.Cache(tmp_path / 'cache'), batch_size=8)
  assert {
    f'depth/{name}': value for name, value in outcome.metrics.items()
  }.items() <= found.items()
  assert job.options['steps'] == 4 and outcome.options['size'] == SIZE

  chance, baseline = run.baselines(drawn, config_of(*ALL), patch=8, keep=keep, **options)
  assert set(chance) <= set(found) and keep['chance'].items() <= chance.items()
  assert {name.split('/')[0] for name in chance} == set(ALL)
  assert {name.split('/')[0] for name in baseline} == set(HERE)
  assert run.baselines(drawn, config_of('depth'), patch=8, keep=keep) == (keep['chance'], {})


def test_nothing_stays(drawn, words, model, tmp_path, monkeypatch):
  """Neither files nor, once removed, files that are still open; not after an error either."""
  folders, extract, left = (
    [],
    cache_lib.Cache.extract,
    lambda: list((tmp_path / 'temporary').iterdir()),
  )

  def seen(cache, *args, **options):
    folders.append(cache.folder)
    result = extract(cache, *args, **options)
    assert str(cache.folder) in pathlib.Path('/proc/self/maps').read_text()
    if fail:
      raise cache_lib.DiskFull('--cache: full')
    return result

  monkeypatch.setattr(cache_lib.Cache, 'extract', seen)
  fail = False
  run.evaluate(model, drawn, config=config_of('depth'), tokenizer=words)
  assert (
    folders and left() == [] and str(folders[0]) not in pathlib.Path('/proc/self/maps').read_text()
  )
  fail = True
  with pytest.raises(InputError, match='^evals: --cache: full; in training TMPDIR says where'):
    run.evaluate(model, drawn, config=config_of('depth'), tokenizer=words)
  assert left() == []


def test_the_split_and_the_limit_are_those_of_the_config(drawn):
  config = config_of('linear', 'instance_retrieval', split='train[50%:]')
  jobs = run_suite.jobs(drawn, config, config.tasks)['']
  assert [job.splits for job in jobs] == [
    {'train': 'train', 'test': config.split},
    {'test': config.split},
  ]
  assert len(jobs[0].data.source(jobs[0].splits['test'])) == TRAIN // 2


def test_benchmarks(drawn, words, model, tmp_path, monkeypatch):
  monkeypatch.setattr(checker, '_count', lambda *_: None)  # of thousands of images
  for name in ('flickr8k', 'uned_food2k', 'cifar10'):
    fake.WRITE[name](tmp_path / 'data')
  config = config_of(
    'instance_retrieval', suite='flickr8k,uned_food2k', data=str(tmp_path / 'data')
  )
  jobs = run.check(drawn, config, tokenizer=words)
  found = run.evaluate(model, drawn, config=config, tokenizer=words, jobs=jobs)
  assert {
    'instance_retrieval/r1',
    'uned_food2k/instance_retrieval/r1',
    'flickr8k/retrieval/t2i_r1',
  } <= set(found)
  silent = run.check(drawn, dataclasses.replace(config, suite='cifar10'), has_text=False)
  assert [job.task.kind for job in silent['cifar10']] == [
    'knn',
    'linear',
  ]  # and no zero-shot classification
  with pytest.raises(InputError, match="evals.suite: 'flickr8k' needs a text tower"):
    run.check(drawn, config, has_text=False)
  with pytest.raises(InputError, match="evals.suite: 'flickr8k' needs a tokenizer"):
    run.check(drawn, config)


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(suite='voc'), '^evals.data: missing; expected the folder of voc; docs/datasets.md'),
    (
      dict(suite='tips', data='/nowhere'),
      "^evals.data: got '/nowhere', which is no folder; expected the folder of",
    ),
    (dict(suite='vok', data='.'), "^evals.suite: .*got 'vok'.*did you mean 'voc'"),
    (dict(suite='quick', data='.'), "^evals.suite: .*got 'quick'"),
    (dict(suite='voc', data='.'), 'voc'),
    (dict(tasks=('zeroshot',), has_text=False), "^evals.tasks: 'zeroshot' needs a text tower"),
    (
      dict(tasks=('zeroshot_segmentation',), tokenizer=None),
      "^evals.tasks: 'zeroshot_segmentation' needs a tokenizer",
    ),
    (dict(tasks=('depth',), split='tset'), "got 'tset'.*did you mean 'test'"),
  ],
)
def test_what_lacks_is_said_in_one_line(drawn, words, tmp_path, monkeypatch, fields, message):
  monkeypatch.chdir(tmp_path)
  options = {'tokenizer': words} | {
    name: fields[name] for name in ('has_text', 'tokenizer') if name in fields
  }
  config = Evals(
    size=SIZE, **{name: value for name, value in fields.items() if name not in options}
  )
  with pytest.raises(InputError, match=message) as caught:
    run.check(drawn, config, **options)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'task, feature',
  [
    ('depth', 'depth'),
    ('dpt_normals', 'normals'),
    ('linear', 'label'),
    ('instance_retrieval', 'label'),
    ('zeroshot_segmentation', 'mask'),
  ],
)
def test_an_annotation_that_lacks(tmp_path, write_store, task, feature):
  bare = write_store(tmp_path / 'bare', annotations=())
  with pytest.raises(
    InputError, match=f"^evals.tasks: '{task}' needs the feature '{feature}', and store"
  ):
    run.check(bare, config_of(task), tokenizer=object())

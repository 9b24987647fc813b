"""The evaluation as a user calls it: tables and pages, what is kept, what is refused, and how it
stops.
"""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from tests.data.benchmarks import fake_benchmarks as fake
from tests.interop.conftest import model
from tips_jax import evaluate
from tips_jax.data.scenes import dataset as scenes
from tips_jax.evals import suite
from tips_jax.evals.datasets import evaluations
from tips_jax.evals.features import cache as cache_lib
from tips_jax.evals.report import figures
from tips_jax.evals.report import results as sheet
from tips_jax.evals.tasks import table
from tips_jax.interop import read, write
from tips_jax.interop.encoder import Encoder

SIZE = 32


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return scenes.build(tmp_path_factory.mktemp('data') / 'mine', train=24, test=12, size=SIZE)


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory, store):
  """Folders of three exports: 'one' and 'two' of other weights, 'images' without a text tower."""
  folder = tmp_path_factory.mktemp('checkpoints')
  with open(f'{store}/tokenizer.model', 'rb') as file:
    tokenizer = file.read()
  for name, options in {
    'one': dict(seed=1),
    'two': dict(seed=2),
    'images': dict(text=False),
  }.items():
    own = {} if name == 'images' else dict(tokenizer=tokenizer, vocab=1024)
    with write.new_folder(folder / name) as new:
      write.write(model(patch=8, **own, **options), 'safetensors', new, dtype='float32')
  return folder


@pytest.fixture
def plain(monkeypatch):
  """No pictures, which take their time."""
  monkeypatch.setattr(figures, 'sections', lambda *_: [])


@pytest.fixture
def call(checkpoints, capsys, tmp_path):
  def run(*switches, **flags):
    flags = {
      'checkpoint': checkpoints / 'one',
      'cache': tmp_path / 'cache',
      'output': tmp_path / 'out',
    } | flags
    code = evaluate.main(
      ['evaluate', *switches, *(f'--{k}={v}' for k, v in flags.items() if v is not None)]
    )
    return code, *capsys.readouterr()

  return run


def test_a_store_of_ones_own(call, plain, store, tmp_path, monkeypatch):
  code, out, err = call(store=store, task='knn,retrieval,segmentation', batch_size=8)
  assert code == 0, err
  assert re.search(r'mine +knn +accuracy', out) and re.search(r'segmentation +mIoU', out)
  assert 'written: ' in out and 'ETA' in err
  content = json.loads((tmp_path / 'out/results.json').read_text())
  assert [r['task'] for r in content['results']] == ['knn', 'retrieval', 'segmentation']
  assert content['checkpoint']['name'] == 'one' and not (tmp_path / 'out/random_weights').exists()
  assert (tmp_path / 'out/index.html').is_file()
  monkeypatch.setattr(Encoder, 'inspect', lambda *_, **__: pytest.fail('computed again'))
  again, out2, _ = call(store=store, task='knn,retrieval,segmentation', batch_size=8)
  assert again == 0 and out2 == out


def test_all_that_the_annotations_serve(checkpoints, store):
  with_texts, without = (evaluations.of_store(store, texts=texts) for texts in (True, False))
  assert [job.task.name for job in with_texts] == list(table.TASKS)
  assert [job.task.name for job in without] == [
    name for name, kind in table.TASKS.items() if not kind.needs_text
  ]


def test_quick_stands_beside_random_weights(call, plain, tmp_path, monkeypatch):
  monkeypatch.setattr(
    evaluations, '_SCENES', evaluations._SCENES | dict(train=16, test=8, size=SIZE)
  )
  code, out, err = call(suite='quick', task='knn,instance_retrieval', batch_size=8)
  assert code == 0, err
  assert re.search(r'one +random weights +chance', out) and 'drawing scenes' in err
  random = sheet.read(tmp_path / 'out/random_weights')
  assert random['checkpoint']['name'] == 'random weights'
  assert random['checkpoint']['sha256'] != sheet.read(tmp_path / 'out')['checkpoint']['sha256']
  code, out, _ = call('--norandom', suite='quick', task='knn,instance_retrieval', batch_size=8)
  assert code == 0 and 'random weights' not in out


def test_evaluations_side_by_side(call, plain, checkpoints, store, tmp_path):
  assert call(store=store, task='knn', output=tmp_path / 'small', limit=10)[0] == 0
  assert (
    call(store=store, task='knn', output=tmp_path / 'two', checkpoint=checkpoints / 'two')[0] == 0
  )
  code, out, err = call(store=store, task='knn', compare=f'{tmp_path / "two"},{tmp_path / "small"}')
  assert code == 0 and re.search(r'one \w{6} +two +one \w{6} +chance', out), err
  assert 'two: ' not in out and re.search(
    r'≠ mine, knn, one \w{6}: 10 images of train, not 24; 10 images of test', out
  )
  assert '10 images of train' in (tmp_path / 'out/index.html').read_text()
  code, table, _ = call(
    checkpoint=None,
    cache=None,
    output=None,
    compare=','.join(str(tmp_path / name) for name in ('out', 'two', 'small')),
  )
  assert code == 0 and out.startswith(table)
  for flags, message in (
    (dict(compare='a'), "got 'a' alone; expected two"),
    (dict(compare='a,b', store=store), '--compare, --store: got both without --checkpoint'),
    (dict(compare='a,b'), "cannot read 'a'"),
  ):
    code, _, err = call(**{'checkpoint': None, 'cache': None, 'output': None} | flags)
    assert code == 2 and message in err and len(err.splitlines()) == 1
  code, _, err = call(store=store, task='knn', compare='nowhere')
  assert code == 2 and "cannot read 'nowhere'" in err


def test_the_short_recipe_has_no_published_figures_beside_it(store):
  depth, knn = (
    dataclasses.replace(job, published={'rmse': ('figure',)})
    for job in evaluations.of_store(store, only=('depth', 'knn'))
  )
  short = evaluations.short(depth)
  assert short.options['bins'] < depth.options['bins'] and not short.published
  assert evaluations.short(knn) == knn and knn.published  # there is nothing to shorten


def test_the_recipe_is_a_fact_of_the_page(call, plain, store, tmp_path):
  assert call(store=store, task='depth', recipe='short', limit=6)[0] == 0
  content = json.loads((tmp_path / 'out/results.json').read_text())
  assert content['results'][0]['options']['bins'] == 64
  assert content['facts']['recipe'] == 'short'


def test_default_folders_are_beside_the_checkpoint(call, plain, store, checkpoints):
  code, out, err = call(store=store, task='knn', output=None, cache=None)
  assert code == 0, err
  assert (checkpoints / 'evaluation/mine-knn-one/results.json').is_file()
  assert (checkpoints / 'evaluation/cache/features').is_dir()


def test_public_benchmarks(call, tmp_path):
  for name in ('camvid', 'rgbd'):
    fake.WRITE[name](tmp_path / 'data')
  code, out, _ = call('--check', checkpoint=None, suite='camvid,rgbd', data=tmp_path / 'data')
  assert code == 2 and '0 of 2 data sets are ready' in out  # the fakes are too small
  code, _, err = call(suite='camvid', data=tmp_path / 'data')
  assert code == 2 and 'images; expected 305' in err
  code, out, _ = call('--check', checkpoint=None, suite='quick')
  assert code == 0 and 'nothing to check' in out


def test_check_of_a_store(call, store):
  code, out, _ = call('--check', checkpoint=None, store=store, task='depth,zeroshot')
  assert code == 0 and 'ready for depth, zeroshot' in out


def test_nothing_is_overwritten(call, plain, checkpoints, store, tmp_path):
  assert call(store=store, task='knn')[0] == 0
  before = (tmp_path / 'out/results.json').read_text()
  code, _, err = call(store=store, task='knn', checkpoint=checkpoints / 'two')
  assert code == 2 and "holds the evaluation of another checkpoint, 'one'" in err
  code, _, err = call(store=store, task='linear')
  assert code == 2 and 'holds mine knn, which this run does not measure' in err
  assert (tmp_path / 'out/results.json').read_text() == before
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other/letter.txt').write_text('mine')
  code, _, err = call(store=store, task='knn', output=tmp_path / 'other')
  assert code == 2 and 'holds other things than an evaluation' in err
  assert call(store=store, task='knn,linear')[0] == 0  # what was there, and more


@pytest.mark.parametrize('signal,expected', [((), 130), (('SIGTERM',), 143)])
def test_stopped_and_gone_on(call, plain, store, monkeypatch, signal, expected):
  inspect, seen = Encoder.inspect, []

  def stop(self, images, **options):
    if len(seen) == 2:
      raise KeyboardInterrupt(*signal)
    seen.append(len(images))
    return inspect(self, images, **options)

  monkeypatch.setattr(Encoder, 'inspect', stop)
  code, _, err = call(store=store, task='knn', batch_size=8)
  assert code == expected and 'to go on from the cache' in err and 'Traceback' not in err

  def go(self, images, **options):
    seen.append(len(images))
    return inspect(self, images, **options)

  monkeypatch.setattr(Encoder, 'inspect', go)
  assert call(store=store, task='knn', batch_size=8)[0] == 0
  assert seen == [8] * 5  # 24 images to learn from and 12 to measure on, once


@pytest.mark.parametrize(
  'flags,message',
  [
    (dict(suite='quick', checkpoint=None), '--checkpoint: missing'),
    (dict(), 'got neither; expected one of them'),
    (dict(suite='quick', store='STORE'), 'got both; expected one of them'),
    (dict(suite='quik'), "--suite: got 'quik'; .* did you mean 'quick'"),
    (dict(suite='tips,vox', data='.'), "--suite: got 'vox'; .* did you mean 'voc'"),
    (dict(store='STORE', task='depht'), "--task: got 'depht'; .* did you mean 'depth'"),
    (dict(suite='tips'), '--data: missing; expected the folder of voc, .*docs/datasets.md'),
    (
      dict(suite='voc', data='nowhere'),
      "--data: got 'nowhere', which is no folder; .*docs/datasets.md",
    ),
    (
      dict(suite='voc', data='.'),
      "voc: missing data set: .* has no folder 'VOCdevkit/VOC2012'; see docs/datasets.md",
    ),
    (dict(store='nowhere'), "store: got 'nowhere', which is not a folder"),
    (dict(store='STORE', checkpoint='nowhere'), "got 'nowhere', which does not exist"),
    (
      dict(store='STORE', task='retrieval', checkpoint='IMAGES'),
      'got the checkpoint .* without a text tower',
    ),
    (dict(suite='voc', task='knn', data='.'), "--task: got 'knn', which none of voc has"),
    (dict(suite='quick', batch_size=0), 'batch_size'),
    (dict(sweet='quick'), 'sweet'),
  ],
)
def test_bad_flags(call, checkpoints, store, tmp_path, monkeypatch, flags, message):
  monkeypatch.chdir(tmp_path)
  places = {'STORE': store, 'IMAGES': checkpoints / 'images'}
  code, _, err = call(**{k: places.get(v, v) for k, v in flags.items()})
  assert code == 2 and len(err.strip().splitlines()) == 1 and re.search(message, err), err
  assert list(tmp_path.iterdir()) == []


def test_help_says_the_flags(capsys):
  assert evaluate.main(['evaluate', '--help']) == 0
  assert {'--checkpoint', '--suite', '--[no]check'} <= set(
    re.findall(r'--[\w\[\]]+', capsys.readouterr().out)
  )


def test_eight_devices_give_the_numbers_of_one(checkpoints, store, tmp_path):
  """Features bit for bit, hence the metrics."""
  weights = read.read(checkpoints / 'one')
  jobs = evaluations.of_store(
    store, only=('segmentation', 'knn', 'retrieval', 'zeroshot_segmentation'), size=SIZE
  )
  results, arrays = [], []
  for count in (1, 8):
    encoder = Encoder(weights, devices=jax.devices()[:count], exact=True)
    cache = cache_lib.Cache(tmp_path / str(count))
    results.append(
      [outcome.metrics for outcome in suite.run(encoder, jobs, cache=cache, batch_size=16)]
    )
    files = sorted(cache.folder.glob('*/*/*.npy')) + sorted(cache.folder.glob('texts/*.npy'))
    arrays.append({path.relative_to(cache.folder): np.load(path) for path in files})
  assert results[0] == results[1] and arrays[0].keys() == arrays[1].keys() and len(arrays[0]) > 8
  for name, array in arrays[0].items():
    np.testing.assert_array_equal(array, arrays[1][name], str(name))

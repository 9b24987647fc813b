"""The suite: every task on every kind of data, features shared, and what it refuses before it
computes any.
"""

import dataclasses
import json

import numpy as np
import pytest

from tests.data.benchmarks import fake_benchmarks as fake
from tests.evals.stub_encoder import Stub
from tips_jax.core.errors import InputError
from tips_jax.data import store
from tips_jax.data.scenes import dataset as scenes
from tips_jax.evals import suite
from tips_jax.evals.datasets import evaluations, protocols, sources
from tips_jax.evals.datasets.protocols import Constant
from tips_jax.evals.features import cache as cache_lib
from tips_jax.evals.features import reading, splits
from tips_jax.evals.probes import dpt_train
from tips_jax.evals.report import results
from tips_jax.evals.tasks import retrieval, table

SIZE, TRAIN, TEST = 32, 20, 12
MAX_DEPTH = 2.0  # meters; some of the scenes are deeper
TINY = {
  'depth': dict(
    max_depth=MAX_DEPTH, steps=4, batch=4, learning_rates=(1e-3, 1e-2), upsample=1, bins=8
  ),
  'dpt_depth': dict(
    max_depth=MAX_DEPTH, channels=4, widths=(4, 4, 4, 4), epochs=1, bins=8, batch=10
  ),
  'dpt_normals': dict(channels=4, widths=(4, 4, 4, 4), epochs=1, batch=10),
  'linear': dict(steps=5),
  'knn': dict(k=(1, 3)),
  'zeroshot': dict(templates='photo'),
}


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  return scenes.build(
    tmp_path_factory.mktemp('suite') / 'scenes', train=TRAIN, test=TEST, size=SIZE
  )


def tiny(jobs):
  """The same jobs with constants that take no time."""
  result = []
  for job in jobs:
    changed = {name: Constant(value, '?') for name, value in TINY.get(job.task.kind, {}).items()}
    constants = {
      k: v for k, v in job.task.constants.items() if k != 'crop' or job.task.kind == 'segmentation'
    }
    result.append(
      dataclasses.replace(job, task=dataclasses.replace(job.task, constants=constants | changed))
    )
  return result


def jobs_of(path, *kinds, **options):
  return tiny(evaluations.of_store(path, only=kinds, **{'size': SIZE} | options))


@pytest.fixture(scope='module')
def everything(path, tmp_path_factory):
  """(outcomes by task, encoder, folder of the output, cache) of all tasks on scenes."""
  folder, encoder = tmp_path_factory.mktemp('run'), Stub()
  cache = cache_lib.Cache(folder / 'cache')
  outcomes = suite.run(encoder, jobs_of(path), cache=cache, output=folder / 'out', batch_size=8)
  return {outcome.task: outcome for outcome in outcomes}, encoder, folder / 'out', cache


# --- all tasks ----------------------------------------------------------------------------------


def test_scenes_serve_every_task(everything):
  outcomes = everything[0]
  assert list(outcomes) == list(table.TASKS)
  for outcome in outcomes.values():
    assert outcome.metrics and all(np.isfinite(v) for v in outcome.metrics.values()), outcome
    assert set(outcome.chance) <= set(outcome.metrics) and outcome.chance
    assert 1 <= len(outcome.examples) <= 6
    assert (
      set(outcome.seconds) == {'encoder', 'reading', 'task'} and min(outcome.seconds.values()) >= 0
    )
    assert outcome.spec.name in table.TASKS
    for metric in suite_metrics(outcome.spec.name):
      assert metric in outcome.metrics and metric in outcome.chance


def suite_metrics(kind):
  """The metrics that published tables have, of a kind."""
  known = {
    'segmentation': ['miou'],
    'zeroshot_segmentation': ['miou'],
    'depth': ['rmse'],
    'dpt_depth': ['rmse'],
    'dpt_normals': ['angular_rmse'],
    'instance_retrieval': ['r1'],
    'retrieval': ['i2t_r1', 't2i_r1'],
    'region_retrieval': ['r2t_r1', 't2r_r1'],
    'tagging': ['map'],
  }
  return known.get(kind, ['accuracy'])


def test_dense_tasks_have_answers_without_features_and_an_oracle(everything):
  for task, outcome in everything[0].items():
    if task not in ('segmentation', 'depth', 'dpt_depth', 'dpt_normals'):
      assert not outcome.baselines
      continue
    assert outcome.baselines.keys() == {'position', 'pixels_position', 'oracle'}
    [metric] = suite_metrics(task)
    better = 1 if task == 'segmentation' else -1
    oracle = outcome.baselines['oracle'][metric]
    for name in ('position', 'pixels_position'):
      assert outcome.baselines[name].keys() == outcome.metrics.keys()
      assert better * oracle > better * outcome.baselines[name][metric]
    assert better * oracle > better * outcome.chance[metric]


def test_both_cls_tokens_are_reported(everything):
  for task in ('knn', 'linear', 'zeroshot'):
    assert {'accuracy', 'synthetic/accuracy'} <= set(everything[0][task].metrics)
  assert {'t2i_r1', 'synthetic/t2i_r1', 'synthetic/i2t_r10'} <= set(
    everything[0]['retrieval'].metrics
  )
  assert everything[0]['instance_retrieval'].metrics.keys() == {'r1', 'synthetic/r1'}


def test_features_are_computed_once(everything, path):
  """Four passes: squeezed images (train and test), the same cut (intermediate_layers), in windows,
  and by their own shape (test).
  """
  _, encoder, _, cache = everything
  assert encoder.images == 3 * (24 + 16) + 16  # batches of 8 of 20 and of 12
  again = Stub()
  suite.run(again, jobs_of(path), cache=cache, batch_size=8)
  assert again.images == 0 and again.texts == []


def test_results_go_to_the_sheet(everything, tmp_path):
  chosen = [
    everything[0][name] for name in ('dpt_normals', 'instance_retrieval', 'zeroshot_segmentation')
  ]
  text = results.write(tmp_path, chosen, title='test', sha256='0' * 64)
  content = json.loads((tmp_path / results.FILE).read_text())
  assert [entry['task'] for entry in content['results']] == [outcome.task for outcome in chosen]
  assert 'instance_retrieval' in text and (tmp_path / results.PAGE).stat().st_size > 10_000
  assert len(list((tmp_path / results.PICTURES).iterdir())) >= 3
  json.dumps(results.content(everything[0].values(), checkpoint='stub'), allow_nan=False)


def test_decoders_are_kept_and_trained_once(everything, path, monkeypatch, tmp_path):
  _, _, output, cache = everything
  for task in ('dpt_depth', 'dpt_normals'):
    ours = dpt_train.load(output / 'decoders' / f'scenes_{task}.npz')
    with np.load(output / 'decoders' / f'scenes_{task}_official.npz') as official:
      kernel = official['project.weight']
    np.testing.assert_array_equal(ours.params['project']['kernel'].transpose(3, 2, 0, 1), kernel)
  monkeypatch.setattr(dpt_train, 'fit', lambda *_, **__: pytest.fail('trained again'))
  [outcome] = suite.run(Stub(), jobs_of(path, 'dpt_depth'), cache=cache, batch_size=8)
  assert outcome.metrics == everything[0]['dpt_depth'].metrics


def test_retrieval_is_that_of_all_captions(everything, path):
  """Against the features of the encoder, and the captions of the records."""
  source = store.open_store(path).source('test')
  images = np.stack([splits.decode(source[i]) for i in range(TEST)])
  texts = [(t, i) for i in range(TEST) for t in reading.texts_of(source[i], 'captions')]
  embedding = Stub().inspect(images)
  text, owner = Stub().encode_text([t for t, _ in texts]), [i for _, i in texts]
  for name, prefix in (('web', ''), ('synthetic', 'synthetic/')):
    wanted = retrieval.recalls(embedding[name], text, np.array(owner))
    assert {k: everything[0]['retrieval'].metrics[prefix + k] for k in wanted} == pytest.approx(
      wanted
    )
  for example in everything[0]['retrieval'].examples:
    assert example['text'] in dict(texts) and 1 <= example['rank'] <= TEST
    assert (example['right'] is None) == (example['rank'] > 6)


def test_depth_that_is_not_scored_is_not_shown(everything):
  for task in ('depth', 'dpt_depth'):
    assert all(example['truth'].max() <= MAX_DEPTH for example in everything[0][task].examples)
    assert any((example['truth'] == 0).any() for example in everything[0][task].examples)


def test_examples_have_the_resolution_of_the_data(everything):
  for task in ('segmentation', 'depth', 'dpt_depth', 'dpt_normals', 'zeroshot_segmentation'):
    for example in everything[0][task].examples:
      assert example['image'].shape == (SIZE, SIZE, 3) and example['image'].dtype == np.uint8
      assert example['truth'].shape[:2] == (SIZE, SIZE)
  counts = everything[0]['zeroshot_segmentation'].confusion
  assert counts.sum() == TEST * SIZE * SIZE  # scenes have no void pixel


def test_a_projection_leaves_one_token():
  arrays = {'web': np.eye(3), 'synthetic': np.eye(3) * 2, 'embedding': np.ones((3, 5))}
  part = type('SplitFeatures', (), {'arrays': arrays})()
  from tips_jax.evals.tasks import common

  assert list(common.joint(part, ('web', 'synthetic'))) == ['embedding']
  arrays['embedding'] = arrays['synthetic']
  assert list(common.joint(part, ('web', 'synthetic'))) == ['web', 'synthetic']


def test_interrupted_and_gone_on(path, tmp_path):
  """A run that is stopped in the middle gives the numbers of a whole one, without the images it
  had.
  """
  cache, jobs = cache_lib.Cache(tmp_path / 'cache'), jobs_of(path, 'segmentation', 'knn')
  with pytest.raises(KeyboardInterrupt):
    suite.run(Stub(stop_after=16), jobs, cache=cache, batch_size=8)
  encoder = Stub()
  resumed = suite.run(encoder, jobs, cache=cache, batch_size=8)
  whole = suite.run(Stub(), jobs, cache=cache_lib.Cache(tmp_path / 'other'), batch_size=8)
  assert encoder.images == 4 + 16 + 24 + 16  # what the windows still lacked; then squeezed
  assert [o.metrics for o in resumed] == [o.metrics for o in whole]


def test_limit(path, tmp_path):
  encoder = Stub()
  suite.run(encoder, jobs_of(path, 'knn'), cache=cache_lib.Cache(tmp_path), batch_size=4, limit=8)
  assert encoder.images == 16


def test_what_was_measured_is_told(path, tmp_path):
  jobs = jobs_of(path, 'knn', 'segmentation')
  run = lambda jobs, **options: suite.run(
    Stub(), jobs, cache=cache_lib.Cache(tmp_path), batch_size=8, **options
  )
  whole, part = run(jobs), run(jobs, limit=10)
  for one, other in zip(whole, part):
    assert one.data['train']['images'] == TRAIN and other.data['train']['images'] == 10
    assert (
      one.data['test']['sha256'] == other.data['test']['sha256'] == jobs[0].data.fingerprint('test')
    )
    assert one.options == other.options and one.options['size'] == SIZE
  assert whole[0].chosen.keys() == {'k', 'synthetic/k'} and whole[1].options['patches'] == 'all'


def with_constants(job, **values):
  constants = job.task.constants | {name: Constant(value, '?') for name, value in values.items()}
  return dataclasses.replace(job, task=dataclasses.replace(job.task, constants=constants))


def test_segmentation_squeezed_or_in_windows(path, tmp_path):
  """A square image is one window: both ways see the same pixels, and so do samples that hold all
  patches.
  """
  [job] = jobs_of(path, 'segmentation')
  run = lambda **values: suite.run(
    Stub(), [with_constants(job, **values)], cache=cache_lib.Cache(tmp_path)
  )[0]
  windows, square, sampled = run(), run(mode='square'), run(patches=100)
  assert windows.metrics == square.metrics
  assert sampled.options['patches'] == 100 // TRAIN and sampled.metrics != windows.metrics
  assert windows.confusion.sum() == TEST * SIZE * SIZE


def test_segmentation_keeps_the_aspect_ratio(tmp_path):
  """A mask of 40 x 30 under windows of 16: every known pixel is scored once, and no image is
  squeezed.
  """
  fake.WRITE['voc'](tmp_path / 'data')
  [job] = [
    job
    for job in evaluations.of_benchmark('voc', tmp_path / 'data', only=('segmentation',), size=16)
  ]
  encoder = Stub()
  [outcome] = suite.run(encoder, [job], cache=cache_lib.Cache(tmp_path / 'cache'), batch_size=1)
  assert encoder.images == 5 * 2  # 21 x 16 pixels: two windows of each image
  masks = [splits.masks.decode_mask(job.data.source('test')[i]['mask']) for i in range(3)]
  known = np.concatenate([mask[mask != 255] for mask in masks])
  np.testing.assert_array_equal(outcome.confusion.sum(1), np.bincount(known, minlength=21))
  assert outcome.examples[0]['patch'].shape == (2, 3, 8)


def test_sliding_windows(path, tmp_path):
  [job] = jobs_of(path, 'zeroshot_segmentation', size=16)
  constants = job.task.constants | {'mode': Constant('slide', 'V'), 'stride': Constant(8, 'V')}
  job = dataclasses.replace(job, task=dataclasses.replace(job.task, constants=constants))
  [outcome] = suite.run(Stub(), [job], cache=cache_lib.Cache(tmp_path), batch_size=8)
  assert outcome.confusion.sum() == TEST * SIZE * SIZE


@pytest.mark.parametrize('asked,wanted', [(32, (32, 32)), (33, (40, 40)), (0, (32, 32))])
def test_frames_are_whole_patches(path, asked, wanted):
  [job] = evaluations.of_store(path, only=('knn',), size=asked)
  frame = splits.frame(job, Stub())
  assert (frame.height, frame.width) == wanted


def test_a_cut_frame_takes_the_center_of_image_and_annotation():
  frame = splits.Resize(8, 8, cut=True)
  array = np.arange(10 * 6 * 3, dtype=np.uint8).reshape(10, 6, 3)
  np.testing.assert_array_equal(frame.crop(array), array[2:8])
  np.testing.assert_array_equal(splits.Resize(8, 8).crop(array), array)
  assert splits.Resize(8, 8, cut=0.875).crop(np.zeros((16, 32, 3))).shape == (14, 14, 3)


@pytest.mark.parametrize('resize,cut', [('square', False), ('cut', True), ('center', 0.875)])
def test_a_protocol_says_how_images_are_resized(path, resize, cut):
  [job] = jobs_of(path, 'knn')
  assert splits.frame(with_constants(job, resize=resize), Stub()) == splits.Resize(SIZE, SIZE, cut)


# --- public benchmarks --------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize('name', list(fake.WRITE))
def test_benchmarks_in_their_official_layouts(name, tmp_path):
  fake.WRITE[name](tmp_path / 'data')
  jobs = tiny(evaluations.of_benchmark(name, tmp_path / 'data', size=16))
  if name == 'imagenet':  # three classes in place of a thousand
    jobs = [
      dataclasses.replace(job, task=dataclasses.replace(job.task, classes=())) for job in jobs
    ]
  assert {job.task.name for job in jobs} == {task.name for task in protocols.get(name).tasks}
  outcomes = suite.run(Stub(), jobs, cache=cache_lib.Cache(tmp_path / 'cache'), batch_size=2)
  for job, outcome in zip(jobs, outcomes, strict=True):
    assert (outcome.dataset, outcome.task, outcome.published) == (
      name,
      job.task.name,
      job.published,
    )
    assert set(job.task.metrics) <= set(outcome.metrics)
  if name in protocols.SUITES['tips'] and name != 'docci':
    published = {key.split('/')[0] for key in protocols.PUBLISHED}
    assert any(o.published.get(m) for o in outcomes for m in o.metrics) == (
      (protocols.get(name).group or name) in published
    )


def test_a_fingerprint_tells_contents_apart(tmp_path):
  for side in ('a', 'b'):
    fake.WRITE['voc'](tmp_path / side)
  open_voc = lambda side: sources.Benchmark('voc', tmp_path / side, ('train', 'test'))
  first = open_voc('a')
  assert (
    first.fingerprint('train') == open_voc('a').fingerprint('train') != first.fingerprint('test')
  )
  identity = first.identity('test')
  assert identity == open_voc('b').identity('test') != first.identity('train')  # wherever it lies
  image = next((tmp_path / 'a').rglob('*val*.jpg'))
  image.write_bytes(image.read_bytes() + b'x')
  assert open_voc('a').fingerprint('test') != first.fingerprint('test')
  assert open_voc('a').identity('test') != identity


def test_names():
  assert evaluations.dataset_names('quick,voc,uned')[:3] == ('quick', 'voc', 'uned_food2k')
  assert len(evaluations.dataset_names('tips')) == len(set(evaluations.dataset_names('tips,voc')))
  with pytest.raises(InputError, match="--suite: got 'quik'.*did you mean 'quick'"):
    evaluations.dataset_names('quik')
  assert evaluations.task_names('dpt_normals,instance_retrieval,knn') == (
    'dpt_normals',
    'instance_retrieval',
    'knn',
  )
  with pytest.raises(InputError, match="--task: got 'segmentatoin'.*did you mean 'segmentation'"):
    evaluations.task_names('segmentatoin')


# --- bad input: one clear line before any feature -----------------------------------------------


def spoilt(path, **changes):
  """Jobs on scenes whose data differ in what `changes` say; records(dict) -> dict changes each
  record.
  """
  change = changes.pop('records', None)
  kinds = changes.pop('kinds', ())
  jobs = evaluations.of_store(path, only=kinds, size=SIZE)
  data = jobs[0].data
  for name, value in changes.items():
    setattr(data, name, value)
  if change:
    original = data.source
    data.source = lambda split: Changed(original(split), change)
  return jobs


class Changed:
  def __init__(self, source, change):
    self._source, self._change = source, change

  def __len__(self):
    return len(self._source)

  def __getitem__(self, i):
    return self._change(dict(self._source[i]))


def without(*names):
  return lambda record: record | {name: [] if name == 'captions' else b'' for name in names}


@pytest.fixture(scope='module')
def larger(path, tmp_path_factory):
  """Annotations of images of another size."""
  other = scenes.build(tmp_path_factory.mktemp('larger') / 'scenes', train=1, test=1, size=2 * SIZE)
  return dict(store.open_store(other).source('test')[0])


@pytest.mark.parametrize('kind', ['mask', 'depth', 'normals'])
def test_annotations_of_another_size(path, larger, kind):
  task = {'mask': 'segmentation', 'normals': 'dpt_normals', 'depth': 'dpt_depth'}[kind]
  jobs = spoilt(path, kinds=(task,), records=lambda record: record | {kind: larger[kind]})
  refused(jobs, f'{kind}s? of another size than images: got 64x64, the image is 32x32')


@pytest.mark.parametrize(
  'changes,message',
  [
    (
      dict(kinds=('segmentation',), mask_classes=('sky', 'wall')),
      'wrong class count: got class .* below 2',
    ),
    (
      dict(kinds=('knn',), label_names=lambda split: ('ball',)),
      'wrong class count: got label .* below 1',
    ),
    (
      dict(kinds=('zeroshot',), label_names=lambda split: ()),
      "needs the names of the classes of 'label'",
    ),
    (
      dict(kinds=('knn',), counts={'test': TEST}),
      "missing split 'train': knn needs it, and there is only",
    ),
    (dict(kinds=('retrieval',), records=without('image')), 'captions without images: 12 of 12'),
    (
      dict(kinds=('retrieval',), records=without('captions', 'alt_text')),
      'images without captions: 12 of 12',
    ),
    (dict(kinds=('knn',), records=without('image')), 'images that cannot be read'),
    (
      dict(kinds=('segmentation',), features={'image', 'label'}),
      "needs the annotation 'mask', and there is only",
    ),
    (
      dict(kinds=('segmentation',), records=lambda r: r | {'mask': b'none'}),
      'record 0: mask cannot be decoded',
    ),
    (dict(kinds=('knn',), counts={'train': 0, 'test': TEST}), "split 'train' is empty"),
  ],
)
def test_bad_data(path, changes, message):
  jobs = spoilt(path, **changes)
  if 'counts' in changes:
    jobs = [
      dataclasses.replace(
        job, splits={r: s for r, s in job.splits.items() if s in changes['counts']}
      )
      for job in jobs
    ]
  refused(jobs, message)


def test_no_text_tower(path):
  message = "retrieval compares images with texts; got the checkpoint 'stub' without a text tower"
  refused(jobs_of(path, 'knn', 'retrieval'), message, encoder=Stub(has_text=False))


def test_a_store_without_a_test_split(path):
  jobs = [dataclasses.replace(job, splits={'train': 'train'}) for job in jobs_of(path, 'knn')]
  refused(jobs, "missing split 'test': knn needs it")


def test_nothing_asked_for():
  refused([], 'got no task')


def refused(jobs, message, encoder=None):
  encoder = encoder or Stub()
  with pytest.raises(InputError, match=message) as caught:
    suite.run(encoder, jobs, cache=None)
  assert encoder.images == 0 and '\n' not in str(caught.value)


def test_only_what_the_annotations_serve(path):
  data = sources.Store(store.open_store(path))
  data.features = {'image', 'mask'}
  serves = lambda texts: [
    name for name, kind in table.TASKS.items() if evaluations.serves(data, kind, texts)
  ]
  assert serves(True) == ['segmentation', 'zeroshot_segmentation'] and serves(False) == [
    'segmentation'
  ]


def test_tars_as_they_lie_are_refused(tmp_path):
  (tmp_path / 'a.tar').write_bytes(b'')
  with pytest.raises(InputError, match='tars or parquet as they lie.*tips_jax.prepare --input='):
    evaluations.of_store(tmp_path)

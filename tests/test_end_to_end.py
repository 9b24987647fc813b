"""The program as a user starts it: whole runs, stopped runs, and every kind of bad input."""

import json
import os
import random
import shutil
import signal
import sys
import time

import pytest

from benchmarks import kills
from tips_jax.data import tokenizer
from tips_jax.data.scenes import dataset as scenes
from tips_jax.runtime import lock
from tips_jax.runtime.peers import Peers
from tips_jax.runtime.signals import Preemption

STEPS = 6
FIELDS = {'schedule.total_steps': STEPS, 'checkpoint.every_steps': 2, 'evals.every_steps': 4}
EXIT = 75
LIMITED = (
  'import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv[1]),)); '
  'os.execv(sys.argv[2], sys.argv[2:])'
)


@pytest.fixture(scope='module')
def env(plain_xla, tmp_path_factory):
  env = kills.environment(tmp_path_factory.mktemp('compiled'))
  return {**env, 'XLA_FLAGS': f'{env["XLA_FLAGS"]} {plain_xla}'}


@pytest.fixture(scope='module')
def whole(env, tmp_path_factory):
  """(work folder, standard output) of an uninterrupted run; its scenes serve the other tests."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  code, out, err = kills.attempt(kills.command(workdir, **FIELDS), env)
  assert code == 0, err
  return workdir, out


@pytest.fixture
def refused(env):
  """Runs a command that must end with exit code 2 and one line, and returns the line."""

  def run(workdir, *, config=None, limit=None, **overrides):
    fields = {**FIELDS, 'evals.tasks': '()', **overrides}
    arguments = kills.command(workdir, **fields, **({'config': config} if config else {}))
    if limit:  # bytes of a file, as a full disk would set them
      arguments = [sys.executable, '-c', LIMITED, str(limit), *arguments]
    code, _, err = kills.attempt(arguments, env)
    lines = [line for line in err.splitlines() if line.startswith('error: ')]
    assert code == 2 and len(lines) == 1 and 'Traceback' not in err, err
    assert err.splitlines()[-1] == lines[0], err
    return lines[0]

  return run


@pytest.fixture
def no_device(env, monkeypatch):
  """Within it a command that touches a device ends with another error."""
  monkeypatch.setitem(env, 'JAX_PLATFORMS', 'none')


# --- whole runs ---------------------------------------------------------------------------------


def test_ends_with_a_report(whole):
  workdir, out = whole
  report = json.loads((workdir / 'report.json').read_text())
  names = {'retrieval/t2i_r1', 'retrieval/i2t_r5', 'knn/accuracy', 'segmentation/miou'}
  for part in ('before', 'after', 'chance', 'pixel_baseline'):
    assert names <= set(report[part]) and all(0 <= v <= 1 for v in report[part].values())
  assert 'segmentation' in out and 'mIoU' in out and '<img' in (workdir / 'index.html').read_text()
  assert json.loads((workdir / 'config.json').read_text())['schedule']['total_steps'] == STEPS
  assert sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir()) == [4, 6]


def test_one_line_of_metrics_a_step(whole):
  curve = kills.curve(whole[0])
  assert list(curve) == list(range(STEPS + 1))
  always = {'loss', 'contrastive_web', 'contrastive_synthetic', 'learning_rate'}
  late = {'distill', 'masked'}  # at weight 0 in the first steps, and not computed there
  assert always <= set(curve[1]) and not late & set(curve[1])
  assert always | late <= set(curve[STEPS])
  assert [s for s in curve if 'eval/knn/accuracy' in curve[s]] == [0, 4, 6]


@pytest.fixture
def hangup():
  """SIGHUP as in a terminal: whoever runs the tests may ignore it, which programs inherit."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield signal.SIGHUP
  signal.signal(signal.SIGHUP, before)


def test_stopped_at_any_moment_equals_uninterrupted(whole, env, tmp_path, hangup):
  """SIGTERM while compiling and evaluating, SIGHUP in a step; SIGKILL at two random moments."""
  workdir, rng = tmp_path / 'run', random.Random(0)
  metrics = workdir / 'metrics.jsonl'
  written = lambda text: metrics.exists() and text in metrics.read_text()

  def after(seconds, condition):
    begun = []

    def when(err):
      if condition(err):
        begun.append(time.monotonic())
      return bool(begun) and time.monotonic() - begun[0] >= seconds

    return when

  plan = [
    (signal.SIGTERM, after(0, lambda err: 'compiling the step' in err)),
    (signal.SIGKILL, after(rng.uniform(0, 1), lambda err: 'compiled in' in err)),
    (hangup, after(0, lambda err: written('"step": 3, "bad'))),
    (signal.SIGTERM, after(rng.uniform(0.1, 0.5), lambda err: written('"step": 4, "bad'))),
    (signal.SIGKILL, after(rng.uniform(0, 3), lambda err: 'resumed' in err)),
  ]
  for stop, when in plan:
    code, _, err = kills.attempt(kills.command(workdir, **FIELDS), env, stop=stop, when=when)
    assert code == (-stop if stop == signal.SIGKILL else EXIT), err
    assert 'Traceback' not in err
  code, _, err = kills.attempt(kills.command(workdir, **FIELDS), env)
  assert code == 0, err
  assert kills.curve(workdir) == kills.curve(whole[0])
  assert kills.same(kills.arrays(workdir), kills.arrays(whole[0]))
  report = lambda folder: json.loads((folder / 'report.json').read_text())
  assert report(workdir)['after'] == report(whole[0])['after']
  assert report(workdir)['before'] == report(whole[0])['before']


# --- bad input ----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def ruined_store(tmp_path_factory):
  """Scenes of which one training image is cut short."""
  path, example = tmp_path_factory.mktemp('ruined') / 'store', scenes.example

  def cut(index, *, split, **kwargs):
    record = example(index, split=split, **kwargs)
    return record | ({'image': record['image'][:200]} if (split, index) == ('train', 3) else {})

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scenes, 'example', cut)
    return scenes.build(str(path), train=24, test=12, size=48)


def test_corrupt_image_is_replaced_counted_and_listed(ruined_store, env, tmp_path):
  fields = {**FIELDS, 'data.store': ruined_store, 'evals.tasks': '()'}
  code, _, err = kills.attempt(kills.command(tmp_path, **fields), env)
  assert code == 0, err
  rows = [json.loads(line) for line in (tmp_path / 'quarantine.jsonl').read_text().splitlines()]
  assert (
    [r['id'] for r in rows] == ['train-0000003'] and rows[0]['record'] == 3 and rows[0]['reason']
  )
  assert (
    sum(line['bad_images'] for line in kills.curve(tmp_path).values()) >= 2
  )  # twice around the 24 images


def test_too_many_corrupt_images(ruined_store, refused, tmp_path):
  line = refused(tmp_path, **{'data.store': ruined_store, 'data.max_bad_fraction': 0.0})
  assert 'unreadable images' in line and 'train-0000003' in line and 'data.max_bad_fraction' in line


def test_misspelt_field(refused, tmp_path):
  assert 'learning_rat' in refused(tmp_path, **{'optimizer.learning_rat': 1})


def test_missing_store(refused, tmp_path, whole):
  store = whole[0] / 'scene'
  line = refused(tmp_path, **{'data.store': store})
  assert str(store) in line and "did you mean 'scenes'?" in line


def test_a_branch_of_the_contrast_without_any_text(refused, no_device, tmp_path, monkeypatch):
  example = scenes.example

  def without_captions(*args, **kwargs):
    return example(*args, **kwargs) | {'captions': []}

  monkeypatch.setattr(scenes, 'example', without_captions)
  store = scenes.build(str(tmp_path / 'store'), train=8, test=4, size=48)
  line = refused(tmp_path / 'run', **{'data.store': store})
  assert 'data.texts.synthetic: got no captions in any of 8 records' in line


def test_a_later_stage_without_the_run_before_it(refused, no_device, tmp_path):
  line = refused(tmp_path / 'run', config='configs/vits.py:hr')
  assert 'init_from: missing; expected the run of the stage before' in line
  assert not (tmp_path / 'run').exists()


def test_half_written_store(refused, tmp_path, whole):
  shutil.copytree(whole[0] / 'scenes', tmp_path / 'store')
  info = tmp_path / 'store' / 'store.json'
  info.write_text(info.read_text()[:50])
  assert 'half-written store' in refused(tmp_path / 'run', **{'data.store': tmp_path / 'store'})


def test_other_tokenizer_on_resume(refused, tmp_path, whole):
  shutil.copytree(whole[0], tmp_path / 'run')
  tokenizer.train(
    [f'word{i} of another language' for i in range(200)], tmp_path / 'other.model', vocab_size=400
  )
  before = kills.curve(tmp_path / 'run')
  line = refused(tmp_path / 'run', **{'data.tokenizer': tmp_path / 'other.model'})
  assert 'tokenizer_sha256 was' in line
  assert kills.curve(tmp_path / 'run') == before  # a refused run touches nothing


def test_checkpoint_of_another_model(refused, tmp_path, whole):
  shutil.copytree(whole[0], tmp_path / 'run')
  assert 'towers.image.mlp was 384, is 96' in refused(tmp_path / 'run', **{'towers.image.mlp': 96})
  line = refused(tmp_path / 'new', **{'towers.image.mlp': 96, 'init_from': whole[0]})
  assert 'params/image/encoder/blocks/mlp' in line and '384' in line and '96' in line


def test_a_second_run_at_once(refused, tmp_path):
  with lock.held(tmp_path, '--workdir', Peers(Preemption())):
    line = refused(tmp_path)
  assert 'another run is at work' in line and f'process {os.getpid()} on ' in line
  assert os.listdir(tmp_path) == [lock.FILE]


def test_unwritable_workdir(refused, tmp_path):
  (tmp_path / 'file').write_text('in the way')
  line = refused(tmp_path / 'file' / 'run')
  assert (
    '--workdir' in line
    and str(tmp_path / 'file') in line
    and (tmp_path / 'file').read_text() == 'in the way'
  )


@pytest.mark.once
def test_full_disk_while_saving(refused, env, tmp_path, whole):
  """A limit on the size of files stands for a full disk; the checkpoint that was there stays
  whole.
  """
  shutil.copytree(whole[0], tmp_path / 'run')
  largest = max(
    p.stat().st_size for p in (tmp_path / 'run' / 'checkpoints' / '4').rglob('*') if p.is_file()
  )
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '6')
  line = refused(tmp_path / 'run', limit=largest // 2)
  assert 'checkpoint: cannot save' in line and str(tmp_path / 'run') in line
  assert '6' not in os.listdir(tmp_path / 'run' / 'checkpoints')
  code, _, err = kills.attempt(
    kills.command(tmp_path / 'run', **{**FIELDS, 'evals.tasks': '()'}), env
  )
  assert code == 0, err
  assert kills.same(kills.arrays(tmp_path / 'run'), kills.arrays(whole[0]))

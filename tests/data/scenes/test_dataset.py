"""Records and the store of the drawn scenes."""

import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from tips_jax.core.errors import InputError, PassingError
from tips_jax.data import store
from tips_jax.data.scenes import dataset as scenes
from tips_jax.data.scenes import draw
from tips_jax.data.tokenizer import Tokenizer

GOLDEN = pathlib.Path(__file__).parents[2] / 'golden' / 'scenes.json'


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  path = str(tmp_path_factory.mktemp('scenes') / 'store')
  calls = []
  assert (
    scenes.build(path, train=60, test=8, size=48, seed=3, progress=lambda *a: calls.append(a))
    == path
  )
  assert calls == [(i, 68) for i in range(1, 69)]
  return path


def _same(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def _digest(record):
  pictures = b''.join(record[k] for k in ('image', 'mask', 'depth', 'normals'))
  texts = repr([record[k] for k in ('captions', 'alt_text', 'region_captions')])
  return hashlib.sha256(pictures + texts.encode()).hexdigest()


def test_a_record_depends_on_its_own_index_alone():
  first = scenes.example(5, size=64)
  scenes.example(4, size=64)
  assert _same(first, scenes.example(5, size=64))
  for other in (dict(index=6), dict(index=5, seed=1), dict(index=5, split='test')):
    assert scenes.example(**{'size': 64, **other})['image'] != first['image']


def test_a_fresh_process_draws_the_same_bytes_and_loads_no_framework():
  code = (
    'import sys; from tips_jax.data.scenes import dataset as scenes; '
    'from tests.data.scenes.test_dataset import _digest; '
    'print(_digest(scenes.example(7)), sorted({"tensorflow", "torch"} & set(sys.modules)))'
  )
  root = str(pathlib.Path(__file__).parents[3])
  out = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=True,
    cwd=root,
    env={**os.environ, 'PYTHONPATH': root, 'PYTHONHASHSEED': '11'},
  ).stdout
  assert out.split(maxsplit=1) == [_digest(scenes.example(7)), '[]\n']
  code = (
    'import sys, tips_jax.data.scenes.dataset; '
    'print(sorted({"tensorflow", "torch", "jax"} & set(sys.modules)))'
  )
  out = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=True,
    cwd=root,
    env={**os.environ, 'PYTHONPATH': root},
  ).stdout
  assert out == '[]\n'


def test_no_scene_has_more_objects_than_asked_for():
  for most in (1, 2):
    found = [len(scenes.example(i, size=48, objects=most)['tags']) for i in range(40)]
    assert max(found) == most


def test_the_store_opens_and_holds_the_records(built):
  source = tfds.builder_from_directory(built).as_data_source()
  assert {split: len(source[split]) for split in source} == {'train': 60, 'test': 8}
  record, expected = source['test'][5], scenes.example(5, split='test', size=48, seed=3)
  assert record['id'] == b'test-0000005' and record['alt_text'].decode() == expected['alt_text']
  assert [c.decode() for c in record['captions']] == expected['captions']
  np.testing.assert_array_equal(record['boxes'], expected['boxes'])
  assert [t.decode() for t in record['tags']] == expected['tags']
  assert len(record['region_captions']) == len(record['boxes']) == len(record['tags'])
  assert scenes.LABELS[record['label']] == expected['tags'][0]
  scene = draw.draw(2**31 + 5, size=48, seed=3)
  for name in ('mask', 'depth', 'normals'):
    np.testing.assert_array_equal(np.squeeze(record[name]), getattr(scene, name), err_msg=name)
  assert np.abs(record['image'].astype(int) - scene.image).mean() < 8
  assert np.array_equal(
    cv2.imdecode(np.frombuffer(expected['image'], np.uint8), 1)[..., ::-1], record['image']
  )


def test_the_store_carries_its_tokenizer_and_class_names(built):
  opened = store.open_store(built)
  assert opened.splits == {'train': 60, 'test': 8} and opened.label_names() == scenes.LABELS
  with open(os.path.join(built, 'annotations.json')) as file:
    assert tuple(json.load(file)['mask_classes']) == scenes.MASK_CLASSES
  tokenizer = Tokenizer(opened.tokenizer_path)
  text = next(
    r['captions'][1]
    for r in map(opened.source('train').__getitem__, range(60))
    if len(r['captions'])
  )
  assert 5 < np.count_nonzero(tokenizer.encode(text, 200)) <= 64


def test_build_reuses_its_own_store_and_overwrites_nothing(built, tmp_path):
  before = os.stat(os.path.join(built, 'store.json')).st_mtime_ns
  scenes.build(
    built, train=60, test=8, size=48, seed=3, progress=lambda *a: pytest.fail('drew again')
  )
  assert os.stat(os.path.join(built, 'store.json')).st_mtime_ns == before
  with pytest.raises(InputError, match='holds other data'):
    scenes.build(built, train=61, test=8, size=48, seed=3)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'notes.txt').write_text('keep')
  with pytest.raises(InputError):
    scenes.build(tmp_path / 'mine', train=2, test=0, size=32)
  assert (tmp_path / 'mine' / 'notes.txt').read_text() == 'keep'
  for bad in (
    dict(train=0),
    dict(test=-1),
    dict(size=8),
    dict(seed=-1),
    dict(train=2.5),
    dict(objects=0),
    dict(objects=6),
    dict(typical=1.5),
  ):
    with pytest.raises(InputError, match=f'scenes.{next(iter(bad))}: got'):
      scenes.build(tmp_path / 'new', **{'train': 2, 'test': 0, 'size': 32, **bad})


@pytest.mark.parametrize('revision', [2, None])
def test_a_store_of_another_revision_is_refused_with_the_remedy(built, revision):
  """It would be trained on as if it were today's."""
  file = pathlib.Path(built) / store.INFO_FILE
  text = file.read_text()
  content = json.loads(text)
  assert content['info']['scenes']['revision'] == scenes.REVISION
  content['info']['scenes']['revision'] = revision
  file.write_text(json.dumps(content))
  message = f'got revision {revision}; expected {scenes.REVISION}; remove it, and'
  try:
    with pytest.raises(InputError, match=message) as error:
      scenes.build(built, train=60, test=8, size=48, seed=3)
    assert '\n' not in str(error.value)
    with pytest.raises(InputError, match='holds other data'):
      scenes.build(built, train=60, test=8, size=48, seed=4)
  finally:
    file.write_text(text)


def test_the_golden_scenes_are_those_of_this_revision():
  """Where they are not, raise REVISION; then UPDATE_GOLDEN=1 python -m pytest, with -k golden."""
  found = {'revision': scenes.REVISION, 'texts': [], 'colors': []}
  for i in range(8):
    record = scenes.example(i, size=64)
    found['texts'].append([record['alt_text'], *record['captions'], *record['region_captions']])
    image = cv2.imdecode(np.frombuffer(record['image'], np.uint8), 1)
    found['colors'].append(image.mean((0, 1)).round(2).tolist())
  if 'UPDATE_GOLDEN' in os.environ:
    GOLDEN.write_text(json.dumps(found, indent=1) + '\n')
  known = json.loads(GOLDEN.read_text())
  assert (found['revision'], found['texts']) == (known['revision'], known['texts'])
  # Processors round differently: edges may move by a pixel.
  np.testing.assert_allclose(found['colors'], known['colors'], atol=0.5)


def test_an_interrupted_build_leaves_nothing(tmp_path):
  def stop(done, total):
    if done == 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    scenes.build(tmp_path / 'store', train=5, test=0, size=32, progress=stop)
  assert os.listdir(tmp_path) == []


@pytest.fixture
def several(monkeypatch):
  """Flags of a build that two processes draw."""
  monkeypatch.setattr(scenes, '_WORTH', 30)
  monkeypatch.setattr(scenes, '_CHUNK', 4)
  return dict(train=60, test=8, size=48, seed=3, processes=2)


def test_several_processes_draw_the_same_store(built, several, tmp_path):
  calls = []
  children = set()

  def progress(done, total):
    calls.append(done)
    children.update(child.pid for child in multiprocessing.active_children())

  scenes.build(tmp_path / 'store', **several, progress=progress)
  assert len(children) == 2 and calls == list(range(1, 69))
  for path in pathlib.Path(built).iterdir():
    assert (tmp_path / 'store' / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize('kind, said', [('killed', PassingError), ('stopped', KeyboardInterrupt)])
def test_several_processes_that_do_not_finish_leave_nothing(several, kind, said, tmp_path):
  def progress(done, total):
    if done == 3 and kind == 'stopped':
      raise KeyboardInterrupt
    if done == 3:
      for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)

  with pytest.raises(said):
    scenes.build(tmp_path / 'store', **several, progress=progress)
  assert os.listdir(tmp_path) == [] and not multiprocessing.active_children()

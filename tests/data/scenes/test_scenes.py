import hashlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from tips_jax.core.errors import InputError
from tips_jax.data import store
from tips_jax.data.scenes import dataset as scenes
from tips_jax.data.scenes import draw as scenes_draw
from tips_jax.data.scenes import words as scenes_words
from tips_jax.data.tokenizer import Tokenizer


@pytest.fixture(scope='module')
def drawn():
  return [scenes_draw.draw(i) for i in range(250)]


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
    'from tests.data.scenes.test_scenes import _digest; '
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
  code = 'import sys, tips_jax.data.scenes.dataset; print(sorted({"tensorflow", "torch", "jax"} & set(sys.modules)))'
  out = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=True,
    cwd=root,
    env={**os.environ, 'PYTHONPATH': root},
  ).stdout
  assert out == '[]\n'


@pytest.mark.parametrize('size', [32, 75, 160])
def test_any_size_shows_the_same_scene(size):
  scene, other = scenes_draw.draw(11, size=size), scenes_draw.draw(11)
  assert scene.image.shape == (size, size, 3) and scene.depth.shape == scene.mask.shape == (
    size,
    size,
  )
  assert {(i.shape, i.color, i.texture, i.size, i.x, i.z) for i in scene.items} == {
    (i.shape, i.color, i.texture, i.size, i.x, i.z) for i in other.items
  }


def test_boxes_and_mask_are_those_of_the_visible_pixels(drawn):
  for scene in drawn:
    assert 1 <= len(scene.items) <= 5
    areas = [np.count_nonzero(scene.owner == i) for i in range(len(scene.items))]
    assert areas == sorted(areas, reverse=True) == [item.pixels for item in scene.items]
    for i, item in enumerate(scene.items):
      y, x = np.nonzero(scene.owner == i)
      assert item.box == (y.min() / 96, x.min() / 96, (y.max() + 1) / 96, (x.max() + 1) / 96)
      assert set(scene.mask[y, x]) == {scenes.MASK_CLASSES.index(item.shape)}
    around = np.unique(scene.mask[scene.owner < 0])
    assert scenes.MASK_CLASSES[around[0]] in scenes_draw.STUFF
    assert len(set(scene.mask[[0, -1], [0, 0]]) | set(around)) >= 2


def _alone(item):
  """The depth in millimeters of one object drawn by itself; inf where it is not."""
  canvas = scenes_draw._Canvas(96)
  scenes_draw._paint(canvas, 0, item, np.float32([0, 0, 1]))
  return np.where(canvas.owner == 0, canvas.depth * 1000, np.inf)


def test_the_nearest_surface_is_the_visible_one(drawn):
  occlusions = 0
  for scene in drawn:
    depths = np.array([_alone(item) for item in scene.items])
    shown = scene.owner >= 0
    assert np.array_equal(depths.argmin(0)[shown], scene.owner[shown])
    np.testing.assert_allclose(scene.depth[shown], depths.min(0)[shown], atol=0.51)
    covered = np.isfinite(depths).sum(0)
    occlusions += bool((covered > 1).any())
  assert occlusions > len(drawn) / 3


def test_ground_recedes_upwards_and_objects_stand_on_it(drawn):
  for scene in drawn:
    ground = np.isin(
      scene.mask, [scenes.MASK_CLASSES.index(s) for s in ('ground', 'water', 'floor')]
    )
    assert ground.any() and scene.depth.min() > 500 and scene.depth.max() <= 12000
    by_row = np.array(
      [scene.depth[y][ground[y]].mean() if ground[y].any() else np.nan for y in range(96)]
    )
    assert (np.diff(by_row[np.isfinite(by_row)]) <= 0).all()
    normals = scene.normals / 127.5 - 1
    assert abs(normals[ground] - (0, 1, 0)).max() < 0.01
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=0.012)
    for item in scene.items:
      if item.on is None and not item.lifted and item.box[2] < 1 and item.pixels > 40:
        row = int(item.extent[2] * 96)
        assert abs(by_row[row] / 1000 - item.z) < 0.3 * item.z or np.isnan(by_row[row])


def _find(phrase, items):
  """Indices of the objects that a phrase fits, by its words alone."""
  fits = []
  for i, item in enumerate(items):
    words = {item.shape, item.color, item.size, scenes_words._TEXTURE[item.texture]}
    if phrase.split()[-1] == item.shape and set(phrase.split()) <= words:
      fits.append(i)
  return fits


def test_what_the_long_captions_say_is_true(drawn):
  pattern = re.compile(
    r'^The ([\w -]+) is (to the left of|to the right of|on|above|in front of|behind) the ([\w -]+)$'
  )
  seen = dict.fromkeys(
    ('to the left of', 'to the right of', 'on', 'above', 'in front of', 'behind'), 0
  )
  for n, scene in enumerate(drawn):
    text = scenes_words.captions(scene, np.random.default_rng(n))[1]
    for item in scene.items:
      assert (
        f'{item.size} {item.color} {scenes_words._TEXTURE[item.texture]} {item.shape}'
        in text.lower()
      )
    assert scene.far[2] in text.lower() and scene.near[2] in text.lower()
    for sentence in text.rstrip('.').split('. '):
      match = pattern.match(sentence)
      if not match or match[3] in ('left', 'right', 'middle'):
        continue
      (a,), (b,) = _find(match[1], scene.items), _find(match[3], scene.items)
      seen[match[2]] += 1
      (ya, xa), (yb, xb) = np.nonzero(scene.owner == a), np.nonzero(scene.owner == b)
      middle = (xa.min() + xa.max()) / 2 - (xb.min() + xb.max()) / 2
      nearer = np.median(scene.depth[yb, xb]) - np.median(scene.depth[ya, xa])
      assert {
        'to the left of': middle < -8,
        'to the right of': middle > 8,
        'on': ya.mean() < yb.mean()
        and yb.min() - 3 <= ya.max() <= yb.max()
        and abs(middle) < np.ptp(xb) + 2,
        'above': ya.max() < yb.min() and abs(middle) <= np.ptp(xb) / 2 + 1,
        'in front of': nearer > 0 and max(xa.min(), xb.min()) <= min(xa.max(), xb.max()),
        'behind': nearer < 0 and max(xa.min(), xb.min()) <= min(xa.max(), xb.max()),
      }[match[2]], text
  assert min(seen.values()) > 5, seen


def test_sides_in_region_captions_are_true(drawn):
  sides = {'left': 0, 'right': 0, 'middle': 0}
  for n, scene in enumerate(drawn):
    for i, text in enumerate(scenes_words.region_captions(scene, np.random.default_rng(n))):
      assert _find(re.match(r'an? (\w+ \w+ [\w-]+ \w+) ', text)[1], scene.items)
      side = re.search(r'(?:on the|in the) (left|right|middle)$', text)
      if side:
        x = np.nonzero((scene.owner == i).any(0))[0]
        center = (x[0] + x[-1] + 1) / 192
        assert side[1] == ('left' if center < 0.38 else 'right' if center > 0.62 else 'middle')
        sides[side[1]] += 1
  assert min(sides.values()) > 10


def test_color_and_texture_tell_nothing_about_the_class(drawn):
  items = [item for scene in drawn for item in scene.items]
  assert len({item.shape for item in items}) == 14
  for attribute, values in (
    ('color', list(scenes_draw.COLORS)),
    ('texture', list(scenes_draw.TEXTURES)),
  ):
    table = np.zeros((14, len(values)))
    for item in items:
      table[scenes.LABELS.index(item.shape), values.index(getattr(item, attribute))] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    freedom = 13 * (len(values) - 1)
    assert ((table - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_texts_are_as_noisy_and_as_varied_as_promised(drawn):
  rng = np.random.default_rng(0)
  alts = [
    scenes_words.alt_text(scene, rng) for scene in itertools.islice(itertools.cycle(drawn), 2000)
  ]
  empty = np.mean([text == '' for text in alts])
  named = np.mean([any(shape in text.lower() for shape in scenes.LABELS) for text in alts])
  assert 0.015 < empty < 0.045 and 0.78 < named < 0.86
  texts = [scenes_words.captions(scene, rng) for scene in drawn]
  assert len({long for _, long in texts}) == len(texts)
  assert len({short for short, _ in texts}) > 0.97 * len(texts)
  assert max(len(long.split()) for _, long in texts) <= 50


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
  scene = scenes_draw.draw(2**31 + 5, size=48, seed=3)
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


def test_typical_objects_look_as_their_kind():
  items = [item for i in range(60) for item in scenes_draw.draw(i, size=32, typical=0.75).items]
  textures = sum(item.texture == scenes_draw.LOOKS[item.shape][1] for item in items)
  colors = sum(item.color == scenes_draw.LOOKS[item.shape][0] for item in items)
  assert 0.7 < textures / len(items) < 0.9 and 0.5 < colors / len(items) < textures / len(items)


def test_no_scene_has_more_objects_than_asked_for():
  for most in (1, 2):
    found = [len(scenes.example(i, size=48, objects=most)['tags']) for i in range(40)]
    assert max(found) == most


def test_an_interrupted_build_leaves_nothing(tmp_path):
  def stop(done, total):
    if done == 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    scenes.build(tmp_path / 'store', train=5, test=0, size=32, progress=stop)
  assert os.listdir(tmp_path) == []

"""The texts: what they say of a picture is true."""

import itertools
import re

import numpy as np

from tips_jax.data.scenes import words
from tips_jax.data.scenes.solids import SHAPES

SENTENCES = ('to the left of', 'to the right of', 'on', 'above', 'in front of', 'behind')
PARTS = {'steps': 'step', 'wall': 'barrier', 'hill': 'hill', 'water': 'water'}


def _find(phrase, items):
  """Indices of the objects that a phrase fits, by its words alone."""
  fits = []
  for i, item in enumerate(items):
    known = {item.shape, item.color, item.size, words._TEXTURE[item.texture]}
    if phrase.split()[-1] == item.shape and set(phrase.split()) <= known:
      fits.append(i)
  return fits


def _sentences(drawn):
  for n, scene in enumerate(drawn):
    text = words.captions(scene, np.random.default_rng(n))[1]
    for sentence in text.rstrip('.').split('. '):
      yield scene, text, sentence


def test_long_captions_name_all_objects_and_their_surroundings(drawn):
  for n, scene in enumerate(drawn):
    text = words.captions(scene, np.random.default_rng(n))[1].lower()
    for item in scene.items:
      assert f'{item.size} {item.color} {words._TEXTURE[item.texture]} {item.shape}' in text
    assert scene.place.materials[0].color in text


def test_relations_in_long_captions_are_true(drawn):
  pattern = re.compile(rf'^The ([\w -]+) is ({"|".join(SENTENCES)}) the ([\w -]+)$')
  seen = dict.fromkeys(SENTENCES, 0)
  for scene, text, sentence in _sentences(drawn):
    match = pattern.match(sentence)
    if not match or match[3] in ('left', 'right', 'middle', 'air'):
      continue
    (a,), (b,) = _find(match[1], scene.items), _find(match[3], scene.items)
    seen[match[2]] += 1
    (ya, xa), (yb, xb) = np.nonzero(scene.owner == a), np.nonzero(scene.owner == b)
    middle = (xa.min() + xa.max()) / 2 - (xb.min() + xb.max()) / 2
    nearer = np.median(scene.depth[yb, xb]) - np.median(scene.depth[ya, xa])
    assert {
      'to the left of': middle < -8,
      'to the right of': middle > 8,
      'on': ya.mean() < yb.mean() and abs(middle) < np.ptp(xb) + 2,
      'above': ya.max() < yb.min() and abs(middle) <= np.ptp(xb) / 2 + 1,
      'in front of': nearer > 0 and max(xa.min(), xb.min()) <= min(xa.max(), xb.max()),
      'behind': nearer < 0 and max(xa.min(), xb.min()) <= min(xa.max(), xb.max()),
    }[match[2]], text
  assert min(seen.values()) > 5, seen


def test_how_objects_are_placed_is_true(drawn):
  pattern = re.compile(
    r'^The ([\w -]+) is (in the air|hanging on the wall|leaning against the wall|'
    r'(?:standing|lying) (?:on|in|near) [\w -]+)$'
  )
  seen = {}
  for scene, text, sentence in _sentences(drawn):
    match = pattern.match(sentence)
    if not match:
      continue
    (k,) = _find(match[1], scene.items)
    item, scale = scene.items[k], scene.place.scale
    corners = item.hull()
    enclosure = scene.place.enclosure
    gaps = enclosure.offsets - (enclosure.normals @ corners.T).max(1)
    lowest = corners[:, 1].min() - scene.place.floor
    seen[match[2]] = seen.get(match[2], 0) + 1
    if match[2].startswith('standing'):
      # The axis that is upright when it stands: within the fall of the ground or of a hill.
      assert item.rotation[1, 1] > 0.6 or SHAPES[item.shape].roll > 30, text
    where = match[2].split(' ', 1)[1]
    if match[2] == 'in the air':
      assert gaps[0] > 0.05 * scale, text
    elif where == 'on the wall' and item.pose != 'hang':
      assert lowest > 0.1 * scale, text
    elif where == 'on the mountain':
      assert abs(gaps[1:]).min() < 1e-3, text
    elif 'wall' in match[2]:
      assert scene.place.indoors or item.pose in ('hang', 'lean')
    elif where == 'in the corner':
      assert np.count_nonzero(gaps[1:5] < words._NEAR_WALL * scale + item.half) >= 2, text
    elif where == 'on the step':
      assert lowest > 0.03 * scale, text
    elif where in ('on the floor', 'on the ground'):
      assert gaps[0] < 1e-3, text
  assert min(seen.get(k, 0) for k in ('in the air', 'standing on the step')) > 3, seen
  assert min(seen.get(f'{v} on the floor', 0) for v in ('standing', 'lying')) > 1, seen
  assert min(seen.get(f'{v} the wall', 0) for v in ('leaning against', 'hanging on')) > 1, seen


def test_what_is_said_of_the_place_and_the_view_is_true(drawn):
  pattern = re.compile(r'^There (?:is|are) (?:a )?(?:low |free )?(\w+) (?:on|in) the (\w+)$')
  seen = {}
  for scene, text, sentence in _sentences(drawn):
    pitch, roll = np.rad2deg((scene.camera.pitch, scene.camera.roll))
    assert sentence != 'Seen from above' or pitch > 30, text
    assert sentence != 'Seen from the side' or pitch < 10, text
    assert sentence != 'The view is tilted' or abs(roll) > 9, text
    match = pattern.match(sentence)
    if not match or match[1] not in PARTS:
      continue
    seen[match[1]] = seen.get(match[1], 0) + 1
    names = np.array([*(m.name for m in scene.place.materials), 'sky'])
    x = np.nonzero((names[scene.face] == PARTS[match[1]]) & (scene.owner < 0))[1]
    assert len(x) >= 0.04 * 96 * 96, text
    center = x.mean() / 96
    side = 'left' if center < 0.38 else 'right' if center > 0.62 else 'middle'
    assert match[2] == side, text
  assert seen.keys() == PARTS.keys(), seen


def test_sides_in_region_captions_are_true(drawn):
  sides = {'left': 0, 'right': 0, 'middle': 0}
  for n, scene in enumerate(drawn):
    for i, text in enumerate(words.region_captions(scene, np.random.default_rng(n))):
      assert _find(re.match(r'an? (\w+ \w+ [\w-]+ \w+) ', text)[1], scene.items)
      side = re.search(r'(?:on the|in the) (left|right|middle)$', text)
      if side:
        x = np.nonzero((scene.owner == i).any(0))[0]
        center = (x[0] + x[-1] + 1) / 192
        assert side[1] == ('left' if center < 0.38 else 'right' if center > 0.62 else 'middle')
        sides[side[1]] += 1
  assert min(sides.values()) > 10


def test_texts_are_as_noisy_and_as_varied_as_promised(drawn):
  rng = np.random.default_rng(0)
  alts = [words.alt_text(scene, rng) for scene in itertools.islice(itertools.cycle(drawn), 2000)]
  empty = np.mean([text == '' for text in alts])
  also = [name for names in words._ALSO.values() for name in names]
  named = np.mean([any(name in text.lower() for name in (*SHAPES, *also)) for text in alts])
  plainly = np.mean([any(name in text.lower() for name in SHAPES) for text in alts])
  assert 0.015 < empty < 0.045 and 0.78 < named < 0.86 and named - 0.12 < plainly < named - 0.03
  texts = [words.captions(scene, rng) for scene in drawn]
  assert len({long for _, long in texts}) == len(texts)
  assert len({short for short, _ in texts}) > 0.97 * len(texts)
  for scene, (_, long) in zip(drawn, texts):
    assert len(long.split()) <= (28 if len(scene.items) == 1 else 50), long

"""The texts: what they say of a picture is true."""

import itertools
import re

import numpy as np

from tips_jax.data.scenes import draw, words


def _find(phrase, items):
  """Indices of the objects that a phrase fits, by its words alone."""
  fits = []
  for i, item in enumerate(items):
    known = {item.shape, item.color, item.size, words._TEXTURE[item.texture]}
    if phrase.split()[-1] == item.shape and set(phrase.split()) <= known:
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
    text = words.captions(scene, np.random.default_rng(n))[1]
    for item in scene.items:
      assert f'{item.size} {item.color} {words._TEXTURE[item.texture]} {item.shape}' in text.lower()
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
  named = np.mean([any(shape in text.lower() for shape in tuple(draw.SHAPES)) for text in alts])
  assert 0.015 < empty < 0.045 and 0.78 < named < 0.86
  texts = [words.captions(scene, rng) for scene in drawn]
  assert len({long for _, long in texts}) == len(texts)
  assert len({short for short, _ in texts}) > 0.97 * len(texts)
  assert max(len(long.split()) for _, long in texts) <= 50

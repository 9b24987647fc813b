"""The language half of the embedded data set: captions and alt text of a scene.

`relations` lists every spatial relation that holds with a clear margin; captions use nothing else,
so they are true.
"""

from collections.abc import Sequence

import numpy as np

from tips_jax.data.scenes.draw import Item, Scene, pick
from tips_jax.data.scenes.shapes import TEXTURES

# Words for textures and for the patterns of surroundings.

_TEXTURE = dict(zip(TEXTURES, TEXTURES)) | {'checked': 'checkered', 'gradient': 'two-tone'}
_FAR = {
  'clouds': '{} sky',
  'plain': 'plain {} wall',
  'bricks': '{} brick wall',
  'striped': 'striped {} wall',
  'gradient': 'smooth {} wall',
  'mountain': '{} mountain',
}
_NEAR_NOUN = {
  'grass': '{} field',
  'waves': '{} lake',
  'checked': 'checkered {} floor',
  'tiles': 'tiled {} floor',
  'planks': 'wooden {} floor',
  'plain': '{} floor',
}
_MARGIN = 0.12  # picture widths
_DEPTH_MARGIN = 0.3  # meters
_WORDS = 50  # of a long caption, which so fits the 64 tokens that the text tower reads
# Alt texts that have nothing to do with the picture, captions of the web, and file names.
_IRRELEVANT = (
  'IMG_{n}.jpg',
  'DSC0{n}',
  'image {n}',
  'Click here to enlarge',
  'Loading...',
  '10 tips for a better garden',
  'logo',
  'Free shipping on all orders',
  'Weekly newsletter, issue {n}',
  'Subscribe to our channel',
  'Photo by the author',
  'Best price guaranteed',
  'screenshot {n}',
  'Read more about our history',
  'Opening hours and directions',
  'untitled-{n}',
  'Recipe of the day: lentil soup',
  'Annual report {n}',
  'Share on social media',
  'Breaking news from the region',
)
_WEB = (
  '{color} {shape}',
  '{shape} and {other}',
  'Photo of {a_shape}',
  '{Color} {shape} | free stock image',
  'my {shape} {place}',
  'buy {color} {texture} {shape} online',
  '{shape} wallpaper {n}',
  '{a_color} {shape} {place}',
  '{texture} {shape}',
  '{Color} {shape} with {other} - vintage print',
  'How to draw {a_shape} (part {n})',
  '{color} {shape} {place}, HD',
  'SALE! {Color} {shape} from {n}',
  '{a_texture} {shape} next to {a_other}',
  '{shape}, {other}, {near}',
)
_FILES = (
  '{shape}_{color}_{n}.jpg',
  '{shape}-{other}-final({n}).png',
  '{n}-{texture}-{shape}-large.webp',
  '{color}{shape}{n}',
)


def relations(items: Sequence[Item]) -> list[tuple[int, str, int]]:
  """Every (i, relation, j) that holds between visible objects.

  'left of' and 'right of' compare the centers of the visible boxes; 'on': it stands on it; 'above':
  it hangs, or stands on something, entirely higher and over it; 'in front of' and 'behind': nearer
  or farther by 0.3 m, with overlapping columns.
  """
  pairs = []
  for i, a in enumerate(items):
    for j, b in enumerate(items):
      if i == j:
        continue
      (_, left, bottom, right), (top_b, left_b, _, right_b) = a.box, b.box
      apart = (left + right - left_b - right_b) / 2
      overlap = min(right, right_b) - max(left, left_b)
      if a.on is b:
        pairs.append((i, 'on', j))
      elif b.on is a:
        continue
      elif (a.lifted or a.on) and bottom <= top_b and abs(apart) < (right_b - left_b) / 2:
        pairs.append((i, 'above', j))
      elif apart < -_MARGIN:
        pairs.append((i, 'left of', j))
      elif apart > _MARGIN:
        pairs.append((i, 'right of', j))
      # The depth of what hangs in the air cannot be seen.
      if overlap > 0 and abs(a.z - b.z) > _DEPTH_MARGIN and not a.lifted and not b.lifted:
        pairs.append((i, 'in front of' if a.z < b.z else 'behind', j))
  return pairs


def names(items: Sequence[Item]) -> list[str | None]:
  """The shortest phrase that singles out each object among the others; None if there is none."""
  ladders = [_phrases(item) for item in items]
  # All phrases of one length, for each length.
  phrases = list(zip(*ladders))
  unique = []
  for ladder in ladders:
    alone = [phrase for phrase, of_all in zip(ladder, phrases) if of_all.count(phrase) == 1]
    unique.append(alone[0] if alone else None)
  return unique


def _phrases(item):
  """What an object may be called, from short to long."""
  return [
    item.shape,
    f'{item.color} {item.shape}',
    f'{item.color} {_TEXTURE[item.texture]} {item.shape}',
    _full(item),
  ]


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
  """A short caption in a COCO annotator's style, and a long one with attributes, surroundings and
  layout.
  """
  return [_short(scene, rng), _long(scene, rng)]


def region_captions(scene: Scene, rng: np.random.Generator) -> list[str]:
  """One phrase per object of scene.items: its full description, and where it is."""
  pairs = relations(scene.items)
  called = names(scene.items)
  phrases = []
  for i, item in enumerate(scene.items):
    places = [f'{relation} the {called[j]}' for k, relation, j in pairs if k == i and called[j]]
    place = pick(rng, places) if places and rng.random() < 0.7 else _side(item)
    phrases.append(f'{_a(_full(item))} {place}')
  return phrases


def alt_text(scene: Scene, rng: np.random.Generator) -> str:
  """Web-like alt text: 3 % empty, 15 % irrelevant; the rest mentions one or two salient objects."""
  chance = rng.random()
  n = int(rng.integers(1, 9999))
  if chance < 0.03:
    return ''
  if chance < 0.18:
    return pick(rng, _IRRELEVANT).format(n=n)
  salient = scene.items[:2]
  if rng.random() >= 0.8:
    salient = [scene.items[k] for k in rng.permutation(len(scene.items))[:2]]
  item = salient[0]
  near = _NEAR_NOUN[scene.near[1]].format('').replace('  ', ' ').strip()
  other = salient[-1].shape if len(salient) > 1 else near
  texture = _TEXTURE[item.texture]
  # A template uses some of these.
  return pick(rng, _FILES if chance < 0.3 else _WEB).format(
    shape=item.shape,
    color=item.color,
    Color=item.color.capitalize(),
    texture=texture,
    other=other,
    near=near,
    n=n,
    place=f'{_preposition(scene)} {_a(near)}',
    a_shape=_a(item.shape),
    a_color=_a(item.color),
    a_texture=_a(texture),
    a_other=_a(other),
  )


def _short(scene, rng):
  items = scene.items
  place = pick(rng, _places(scene))
  plain = []
  for item in items:
    size = f'{item.size} ' if rng.random() < 0.25 else ''
    plain.append(f'{size}{item.color} {item.shape}')
  pairs = [pair for pair in relations(items) if 0 in (pair[0], pair[2])]  # of the largest object
  if len(items) == 1:
    style = pick(rng, ('{0} {1}', 'there is {0} {1}', '{0} seen alone {1}'))
    text = style.format(_a(plain[0]), place)
  elif pairs and rng.random() < 0.6:
    i, relation, j = pick(rng, pairs)
    text = f'{_a(plain[i])} {_wordy(relation)} {_a(plain[j])} {place}'
  else:
    text = f'{_listed(plain[:3])} {place}'
  return f'{_capital(text)}.'


def _long(scene, rng):
  items = scene.items
  called = names(items)
  near, far = _places(scene)
  styles = (
    '{objects} {near} {far}',
    '{near} {far} there {be} {objects}',
    'there {be} {objects} {near} {far}',
  )
  be = 'is' if len(items) == 1 else 'are'
  objects = _listed([_full(item) for item in items])
  sentences = [pick(rng, styles).format(objects=objects, near=near, far=far, be=be)]
  if called[0]:
    sentences.append(f'the {called[0]} is {_side(items[0])}')
  pairs = [pair for pair in relations(items) if called[pair[0]] and called[pair[2]]]
  rng.shuffle(pairs)
  # The rarer relations first: they say more.
  pairs.sort(key=lambda pair: pair[1] in ('left of', 'right of'))
  used = set()  # no two sentences about the same two objects
  for i, relation, j in pairs:
    sentence = f'the {called[i]} is {_wordy(relation)} the {called[j]}'
    words = len(' '.join([*sentences, sentence]).split())
    if frozenset((i, j)) not in used and len(used) < 3 and words <= _WORDS:
      used.add(frozenset((i, j)))
      sentences.append(sentence)
  return '. '.join(map(_capital, sentences)) + '.'


def _places(scene):
  """(near, far): where objects stand, and what is behind them, as prepositional phrases."""
  stuff, pattern, color = scene.far
  far = _FAR['mountain' if stuff == 'mountain' else pattern].format(color)
  near = _NEAR_NOUN[scene.near[1]].format(scene.near[2])
  behind = {'mountain': f'before {far}s', 'sky': f'under {_a(far)}', 'wall': f'by {_a(far)}'}
  return f'{_preposition(scene)} {_a(near)}', behind[stuff]


def _preposition(scene):
  return 'in' if scene.near[1] == 'grass' else 'on'


def _full(item):
  return f'{item.size} {item.color} {_TEXTURE[item.texture]} {item.shape}'


def _side(item):
  center = (item.box[1] + item.box[3]) / 2
  if center < 0.38:
    side = 'on the left'
  elif center > 0.62:
    side = 'on the right'
  else:
    side = 'in the middle'
  return f'in the air {side}' if item.lifted else side


def _wordy(relation):
  return f'to the {relation}' if relation in ('left of', 'right of') else relation


def _capital(text):
  return text[0].upper() + text[1:]


def _a(phrase):
  return f'{"an" if phrase[0] in "aeiou" else "a"} {phrase}'


def _listed(phrases):
  """'a ball, a cube and an arrow', of phrases without articles."""
  *rest, last = map(_a, phrases)
  return f'{", ".join(rest)} and {last}' if rest else last

"""The language half of the embedded data set: captions and alt text of a scene.

`relations` lists every spatial relation that holds with a clear margin; captions use nothing else,
so they are true.
"""

from collections.abc import Sequence

import numpy as np

from tips_jax.data.scenes.draw import Item, Scene
from tips_jax.data.scenes.placing import pick
from tips_jax.data.scenes.textures import TEXTURES

# Words for textures and for the patterns of surroundings.
_TEXTURE = dict(zip(TEXTURES, TEXTURES)) | {'checked': 'checkered', 'gradient': 'two-tone'}
_PATTERN = {
  'plain': '{color} {noun}',
  'checked': 'checkered {color} {noun}',
  'tiles': 'tiled {color} {noun}',
  'planks': 'wooden {color} {noun}',
  'bricks': '{color} brick {noun}',
  'striped': 'striped {color} {noun}',
  'grass': '{color} meadow',
  'sand': '{color} sand',
  'rock': 'rocky {color} {noun}',
  'waves': '{color} water',
}
_PART = {'barrier': 'wall'}  # as parts of a place are called
_MASS = ('sand', 'water')  # have no article
_MARGIN = 0.12  # picture widths
_DEPTH_MARGIN = 0.15  # times the distance of the scene
_SEEN = 0.04  # share of the picture from which a part of the surroundings is spoken of
_NEAR_WALL = 0.3  # times the distance of the scene
# Of a long caption, which so fits the 64 tokens that the text tower reads; and of one object, 32.
_WORDS = 50
_WORDS_OF_ONE = 28
# What people also write in alt texts.
_ALSO = {
  'ball': ('sphere', 'globe'),
  'cube': ('box', 'block'),
  'cone': ('traffic cone', 'pylon'),
  'ring': ('hoop', 'donut'),
  'star': ('starfish', 'little star'),
  'tree': ('oak', 'plant'),
  'house': ('cottage', 'home'),
  'cross': ('plus sign', 'x mark'),
  'arrow': ('pointer', 'direction sign'),
  'cup': ('mug', 'coffee cup'),
  'fish': ('goldfish', 'toy fish'),
  'moon': ('crescent', 'half moon'),
  'heart': ('valentine', 'love heart'),
  'table': ('desk', 'side table'),
}
_OTHER_NAME = 0.15  # share of the alt texts that use one of these
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
  '{shape} {pose}',
  'top view of {a_color} {shape}',
  '{Color} {shape} {pose}, {place}',
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


def relations(scene: Scene) -> list[tuple[int, str, int]]:
  """Every (i, relation, j) that holds between visible objects.

  'left of' and 'right of' compare the centers of the visible boxes; 'on': it stands on it; 'above':
  it hangs, floats or stands on something, entirely higher in the picture and over it; 'in front of'
  and 'behind': clearly nearer or farther, with overlapping columns.
  """
  pairs = []
  if len(scene.items) == 1:
    return pairs
  depths = [np.median(scene.depth[scene.owner == i]) / 1000 for i in range(len(scene.items))]
  for i, a in enumerate(scene.items):
    for j, b in enumerate(scene.items):
      if i == j:
        continue
      (_, left, bottom, right), (top_b, left_b, _, right_b) = a.box, b.box
      apart = (left + right - left_b - right_b) / 2
      overlap = min(right, right_b) - max(left, left_b)
      if a.on is b:
        pairs.append((i, 'on', j))
      elif b.on is a:
        continue
      elif (_lifted(a) or a.on) and bottom <= top_b and abs(apart) < (right_b - left_b) / 2:
        pairs.append((i, 'above', j))
      elif apart < -_MARGIN:
        pairs.append((i, 'left of', j))
      elif apart > _MARGIN:
        pairs.append((i, 'right of', j))
      # The depth of what is in the air can hardly be seen.
      farther = min((a.z - b.z, depths[i] - depths[j]), key=abs) / scene.place.scale
      agree = (a.z > b.z) == (depths[i] > depths[j])
      if overlap > 0 and agree and abs(farther) > _DEPTH_MARGIN:
        if not _lifted(a) and not _lifted(b):
          pairs.append((i, 'in front of' if farther < 0 else 'behind', j))
  return pairs


def _lifted(item):
  return item.pose in ('float', 'hang')


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
  pairs = relations(scene)
  called = names(scene.items)
  phrases = []
  for i, item in enumerate(scene.items):
    places = [f'{relation} the {called[j]}' for k, relation, j in pairs if k == i and called[j]]
    chance = rng.random()
    if places and chance < 0.5:
      place = pick(rng, places)
    elif chance < 0.75:
      place = _pose(scene, item)
    else:
      place = _side(item)
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
  near = ' '.join(_called(scene.place.materials[0], color='').split())
  other = salient[-1].shape if len(salient) > 1 else near
  texture = _TEXTURE[item.texture]
  shape = item.shape
  if rng.random() < _OTHER_NAME:
    shape = pick(rng, _ALSO[shape])
  # A template uses some of these.
  return pick(rng, _FILES if chance < 0.3 else _WEB).format(
    shape=shape,
    color=item.color,
    Color=item.color.capitalize(),
    texture=texture,
    other=other,
    near=near,
    n=n,
    place=f'on {_a(near)}',
    pose=_pose(scene, item),
    a_shape=_a(shape),
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
  pairs = [pair for pair in relations(scene) if 0 in (pair[0], pair[2])]  # of the largest object
  if rng.random() < 0.3:
    place = pick(rng, [*_layout(scene), *_view(scene), place])
  if len(items) == 1 or rng.random() < 0.2:
    pose = _pose(scene, items[0])
    style = pick(rng, ('{0} {1}', 'there is {0} {1}', '{0} {2}', '{0} {2}, {1}'))
    text = style.format(_a(plain[0]), place, pose)
  elif pairs and rng.random() < 0.7:
    i, relation, j = pick(rng, pairs)
    text = f'{_a(plain[i])} {_wordy(relation)} {_a(plain[j])} {place}'
  else:
    text = f'{_listed(plain[:3])} {place}'
  return f'{_capital(text)}.'


def _long(scene, rng):
  items = scene.items
  called = names(items)
  near, far = _places(scene)
  facts = [*_layout(scene)[:1], *_view(scene)]
  if len(items) == 1:
    # In one sentence, which is as short as a text of 32 tokens.
    most = _WORDS_OF_ONE
    pose = _pose(scene, items[0])
    styles = (
      '{object} {pose} {side}, {near} {far}',
      '{near} {far} {object} {side}, {pose}',
      '{object} {side}, {pose}, {near} {far}',
    )
    side = _third((items[0].box[1] + items[0].box[3]) / 2)
    text = pick(rng, styles).format(
      object=_a(_full(items[0])), pose=pose, side=side, near=near, far=far
    )
    sentences = [text]
    related = []
  else:
    most = _WORDS
    styles = (
      '{objects} {near} {far}',
      '{near} {far} there are {objects}',
      'there are {objects} {near} {far}',
    )
    objects = _listed([_full(item) for item in items])
    sentences = [pick(rng, styles).format(objects=objects, near=near, far=far)]
    for item, name in zip(items, called):
      if name and not item.on:
        facts.append(f'the {name} is {_pose(scene, item)}')
    if called[0] and items[0].pose != 'float':
      facts.append(f'the {called[0]} is {_side(items[0])}')
    related = _related(scene, called, rng)
  rng.shuffle(facts)
  for sentence in [*related, *facts]:
    if sentence.startswith('with '):
      verb = 'are' if sentence.startswith('with steps') else 'is'
      sentence = f'there {verb} {sentence.removeprefix("with ")}'
    if len(' '.join([*sentences, sentence]).split()) <= most:
      sentences.append(sentence)
  return '. '.join(map(_capital, sentences)) + '.'


def _related(scene, called, rng):
  """At most two sentences on how objects are to each other."""
  pairs = [pair for pair in relations(scene) if called[pair[0]] and called[pair[2]]]
  rng.shuffle(pairs)
  # The rarer relations first: they say more.
  pairs.sort(key=lambda pair: pair[1] in ('left of', 'right of'))
  used = set()  # no two sentences about the same two objects
  sentences = []
  for i, relation, j in pairs:
    if frozenset((i, j)) not in used and len(used) < 2:
      used.add(frozenset((i, j)))
      sentences.append(f'the {called[i]} is {_wordy(relation)} the {called[j]}')
  return sentences


def _places(scene):
  """(near, far): what is below, and what is behind, as prepositional phrases."""
  place = scene.place
  near = f'on {_a(_called(place.materials[0]))}'
  shares = _shares(scene)
  background = {name: share for name, share in shares.items() if name in ('wall', 'mountain')}
  if not background:
    return near, 'in a room' if place.indoors else f'under {_a(place.sky)} sky'
  # The largest face of that name.
  name = max(background, key=background.get)
  faces = [k for k, material in enumerate(place.materials) if material.name == name]
  largest = _called(place.materials[max(faces, key=scene.shares.__getitem__)])
  return near, f'before {_a(largest)}' if name == 'mountain' else f'by {_a(largest)}'


def _called(material, color=None):
  """A surface in words, with its color or another one."""
  noun = {'mountain': 'mountain', 'wall': 'wall', 'ceiling': 'ceiling', 'barrier': 'wall'}
  noun = noun.get(material.name, material.stuff)
  if material.name == 'mountain' and material.pattern != 'rock':
    return f'{material.color if color is None else color} mountain'
  color = material.color if color is None else color
  return _PATTERN[material.pattern].format(color=color, noun=noun)


def _shares(scene):
  """Share of the picture of each part of the surroundings that is worth a word."""
  shares = {}
  for material, share in zip(scene.place.materials, scene.shares):
    shares[material.name] = shares.get(material.name, 0) + share
  return {name: share for name, share in shares.items() if share >= _SEEN}


def _layout(scene):
  """What is where in the surroundings: phrases that begin with 'with'."""
  place = scene.place
  shares = _shares(scene)
  said = {
    'step': 'steps',
    'barrier': f'a {"low" if place.indoors else "free"} wall',
    'hill': 'a hill',
    'water': 'water',
    'ceiling': 'a ceiling above',
  }
  phrases = []
  for name, phrase in said.items():
    if name not in shares:
      continue
    if name != 'ceiling':
      numbers = [k for k, material in enumerate(place.materials) if material.name == name]
      where = np.isin(scene.face, numbers) & (scene.owner < 0)
      phrase = f'{phrase} {_third(np.nonzero(where)[1].mean() / where.shape[1])}'
    phrases.append(f'with {phrase}')
  corner = _corner(scene)
  if corner is not None:
    phrases.append(f'with a corner {_third(corner)}')
  return phrases


def _corner(scene):
  """x in the picture of the corner of two walls, where one is in sight; None."""
  if not scene.place.indoors:
    return None
  # Along a row in the upper part of the picture.
  row = scene.face[scene.face.shape[0] // 6]
  names = [material.name for material in scene.place.materials]
  walls = np.array([names[k] == 'wall' for k in row])
  change = walls[1:] & walls[:-1] & (row[1:] != row[:-1])
  places = np.flatnonzero(change) + 1
  if len(places) != 1:
    return None
  return float(places[0]) / len(row)


def _view(scene):
  """How the camera looks at the scene."""
  pitch = np.rad2deg(scene.camera.pitch)
  phrases = []
  if pitch > 30:
    phrases.append('seen from above')
  elif pitch < 10:
    phrases.append('seen from the side')
  if abs(np.rad2deg(scene.camera.roll)) > 9:
    phrases.append('the view is tilted')
  return phrases


def _pose(scene, item):
  """How an object is placed."""
  place = scene.place
  if item.pose == 'float':
    return 'in the air'
  if item.pose == 'hang':
    return 'hanging on the wall'
  if item.pose == 'lean':
    return 'leaning against the wall'
  verb = 'lying' if item.pose == 'lie' else 'standing'
  if item.on:
    return f'{verb} on {_a(item.on.shape)}'
  if item.part != 'floor':
    return f'{verb} on the {_PART.get(item.part, item.part)}'
  if place.indoors and _walls_beside(scene, item) >= 2:
    return f'{verb} in the corner'
  if place.indoors and _walls_beside(scene, item) == 1:
    return f'{verb} near the wall'
  return f'{verb} on the {"floor" if place.indoors else "ground"}'


def _walls_beside(scene, item):
  """Number of the visible walls of the room that an object is close to."""
  enclosure = scene.place.enclosure
  margin = enclosure.offsets - enclosure.normals @ item.center - item.half
  close = 0
  for k in np.flatnonzero(margin < _NEAR_WALL * scene.place.scale):
    close += bool(scene.shares[k] >= _SEEN and scene.place.materials[k].name == 'wall')
  return close


def _full(item):
  return f'{item.size} {item.color} {_TEXTURE[item.texture]} {item.shape}'


def _side(item):
  side = _third((item.box[1] + item.box[3]) / 2)
  return f'in the air {side}' if item.pose == 'float' else side


def _third(x):
  """The third of the picture at x in [0, 1]."""
  if x < 0.38:
    return 'on the left'
  if x > 0.62:
    return 'on the right'
  return 'in the middle'


def _wordy(relation):
  return f'to the {relation}' if relation in ('left of', 'right of') else relation


def _capital(text):
  return text[0].upper() + text[1:]


def _a(phrase):
  if phrase.endswith(_MASS):
    return phrase
  return f'{"an" if phrase[0] in "aeiou" else "a"} {phrase}'


def _listed(phrases):
  """'a ball, a cube and an arrow', of phrases without articles."""
  *rest, last = map(_a, phrases)
  return f'{", ".join(rest)} and {last}' if rest else last

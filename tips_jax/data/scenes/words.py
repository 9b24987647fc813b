"""The language half of the embedded data set: what is true of a scene, and how the web and a
captioner would put it.

`relations` lists every spatial relation that holds with a clear margin; captions use nothing else,
so they are true.
"""

_TEXTURE = {
  'plain': 'plain',
  'striped': 'striped',
  'dotted': 'dotted',
  'checked': 'checkered',
  'gradient': 'two-tone',
  'speckled': 'speckled',
  'zigzag': 'zigzag',
  'ringed': 'ringed',
}
_FAR = {
  'clouds': '{} sky',
  'plain': 'plain {} wall',
  'bricks': '{} brick wall',
  'striped': 'striped {} wall',
  'gradient': 'smooth {} wall',
  'mountain': '{} mountain',
}
_NEAR = {
  'grass': 'in',
  'waves': 'on',
  'checked': 'on',
  'tiles': 'on',
  'planks': 'on',
  'plain': 'on',
}
_NEAR_NOUN = {
  'grass': '{} field',
  'waves': '{} lake',
  'checked': 'checkered {} floor',
  'tiles': 'tiled {} floor',
  'planks': 'wooden {} floor',
  'plain': '{} floor',
}
_MARGIN, _DEPTH_MARGIN = 0.12, 0.3  # picture widths, meters
_WORDS = 50  # of a long caption, which so fits the 64 tokens that the text tower reads
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


def relations(items):
  """Every (i, relation, j) that holds between visible objects.

  'left of' and 'right of' compare the centers of the visible boxes; 'on': it stands on it; 'above':
  it hangs, or stands on something, wholly higher and over it; 'in front of' and 'behind': nearer or
  farther by 0.3 m, with overlapping columns.
  """
  found = []
  for i, a in enumerate(items):
    for j, b in enumerate(items):
      if i == j:
        continue
      (_, left, bottom, right), (top_b, left_b, _, right_b) = a.box, b.box
      apart = (left + right - left_b - right_b) / 2
      overlap = min(right, right_b) - max(left, left_b)
      if a.on is b:
        found.append((i, 'on', j))
      elif b.on is a:
        continue
      elif (a.lifted or a.on) and bottom <= top_b and abs(apart) < (right_b - left_b) / 2:
        found.append((i, 'above', j))
      elif apart < -_MARGIN:
        found.append((i, 'left of', j))
      elif apart > _MARGIN:
        found.append((i, 'right of', j))
      if overlap > 0 and abs(a.z - b.z) > _DEPTH_MARGIN and not a.lifted and not b.lifted:
        found.append((i, 'in front of' if a.z < b.z else 'behind', j))
  return found


def names(items):
  """The shortest phrase that singles out each object among the others; None where there is no such
  phrase.
  """
  ladder = [
    [
      item.shape,
      f'{item.color} {item.shape}',
      f'{item.color} {_TEXTURE[item.texture]} {item.shape}',
      _full(item),
    ]
    for item in items
  ]
  return [
    next(
      (
        p
        for k, p in enumerate(rungs)
        if all(other[k] != p for other in ladder if other is not rungs)
      ),
      None,
    )
    for rungs in ladder
  ]


def captions(scene, rng):
  """A short caption in a COCO annotator's style, and a long one that tells attributes, surroundings
  and layout.
  """
  return [_short(scene, rng), _long(scene, rng)]


def region_captions(scene, rng):
  """One phrase per object of scene.items: its full description, and where it is."""
  known, called = relations(scene.items), names(scene.items)
  phrases = []
  for i, item in enumerate(scene.items):
    ways = [f'{relation} the {called[j]}' for k, relation, j in known if k == i and called[j]]
    phrases.append(
      f'{_a(_full(item))} {_pick(rng, ways) if ways and rng.random() < 0.7 else _side(item)}'
    )
  return phrases


def alt_text(scene, rng):
  """Web-like alt text: 3 % empty, 15 % irrelevant, the rest names only one or two salient objects,
  in passing.
  """
  chance, n = rng.random(), int(rng.integers(1, 9999))
  if chance < 0.03:
    return ''
  if chance < 0.18:
    return _pick(rng, _IRRELEVANT).format(n=n)
  salient = (
    scene.items[:2]
    if rng.random() < 0.8
    else [scene.items[k] for k in rng.permutation(len(scene.items))[:2]]
  )
  item, near = salient[0], _NEAR_NOUN[scene.near[1]].format('').replace('  ', ' ').strip()
  other = salient[-1].shape if len(salient) > 1 else near
  texture = _TEXTURE[item.texture]
  return _pick(rng, _FILES if chance < 0.3 else _WEB).format(
    shape=item.shape,
    color=item.color,
    Color=item.color.capitalize(),
    texture=texture,
    other=other,
    near=near,
    n=n,
    place=f'{_NEAR[scene.near[1]]} {_a(near)}',
    a_shape=_a(item.shape),
    a_color=_a(item.color),
    a_texture=_a(texture),
    a_other=_a(other),
  )


def _short(scene, rng):
  items, places = scene.items, _places(scene)
  place = _pick(rng, places)
  plain = [
    f'{f"{item.size} " if rng.random() < 0.25 else ""}{item.color} {item.shape}' for item in items
  ]
  pairs = [(i, relation, j) for i, relation, j in relations(items) if i == 0 or j == 0]
  if len(items) == 1:
    text = _pick(rng, ('{0} {1}', 'there is {0} {1}', '{0} seen alone {1}')).format(
      _a(plain[0]), place
    )
  elif pairs and rng.random() < 0.6:
    i, relation, j = _pick(rng, pairs)
    text = f'{_a(plain[i])} {_wordy(relation)} {_a(plain[j])} {place}'
  else:
    text = f'{_listed([_a(p) for p in plain[:3]])} {place}'
  return text[0].upper() + text[1:] + '.'


def _long(scene, rng):
  items, called = scene.items, names(scene.items)
  objects = _listed([_a(_full(item)) for item in items])
  far, near = _places(scene)[::-1]
  opening = _pick(
    rng,
    (
      '{objects} {near} {far}',
      '{near} {far} there {be} {objects}',
      'there {be} {objects} {near} {far}',
    ),
  )
  opening = opening.format(
    objects=objects, near=near, far=far, be='is' if len(items) == 1 else 'are'
  )
  clauses = [f'the {called[0]} is {_side(items[0])}'] if called[0] else []
  known = [r for r in relations(items) if called[r[0]] and called[r[2]]]
  rng.shuffle(known)
  known.sort(
    key=lambda r: r[1] in ('left of', 'right of')
  )  # the rarer relations first: they say more
  told = set()
  for i, relation, j in known:
    clause = f'the {called[i]} is {_wordy(relation)} the {called[j]}'
    words = len(' '.join([opening, *clauses, clause]).split())
    if frozenset((i, j)) not in told and len(told) < 3 and words <= _WORDS:
      told.add(frozenset((i, j)))
      clauses.append(clause)
  return '. '.join(s[0].upper() + s[1:] for s in [opening, *clauses]) + '.'


def _places(scene):
  """(near, far): where things stand, and what is behind them, as prepositional phrases."""
  far_stuff, far_pattern, far_color = scene.far
  far = _FAR['mountain' if far_stuff == 'mountain' else far_pattern].format(far_color)
  near = _NEAR_NOUN[scene.near[1]].format(scene.near[2])
  behind = (
    f'before {far}s'
    if far_stuff == 'mountain'
    else f'{"under" if far_stuff == "sky" else "by"} {_a(far)}'
  )
  return f'{_NEAR[scene.near[1]]} {_a(near)}', behind


def _full(item):
  return f'{item.size} {item.color} {_TEXTURE[item.texture]} {item.shape}'


def _side(item):
  center = (item.box[1] + item.box[3]) / 2
  side = 'on the left' if center < 0.38 else 'on the right' if center > 0.62 else 'in the middle'
  return f'in the air {side}' if item.lifted else side


def _wordy(relation):
  return f'to the {relation}' if relation in ('left of', 'right of') else relation


def _a(phrase):
  return f'{"an" if phrase[0] in "aeiou" else "a"} {phrase}'


def _listed(phrases):
  return phrases[0] if len(phrases) == 1 else f'{", ".join(phrases[:-1])} and {phrases[-1]}'


def _pick(rng, options):
  return options[int(rng.integers(len(options)))]

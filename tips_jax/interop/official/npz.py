"""The npz files that google-deepmind/tips reads and releases: two a model, for PyTorch or for JAX."""

import pathlib
import re

import numpy as np

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.interop import arrays
from tips_jax.interop.official import pytorch, scenic
from tips_jax.interop.weights import Weights, only_official

LAYOUTS = {'official_torch': pytorch, 'official_jax': scenic}
TEMPERATURES = ('temperature', scenic.TEMPERATURE)  # the official programs write and read both
# Released names disagree with each other: so14 and so400m14, with and without 'oss'; all that is
# told is kept here.
_NAME = re.compile(
  r'tips(?:_(?P<version>v1|v2))?(?:_oss)?_(?P<scale>s|b|l|so|so400m|g)14(?P<rest>(?:_[a-z0-9]+)*?)'
  r'_(?P<tower>vision|text)\.npz'
)
_WIDTHS = {'s': 384, 'b': 768, 'l': 1024, 'so400m': 1152, 'g': 1536}
TOWERS = ('vision', 'text')


def released(name):
  """{version, scale, low: low resolution, tower} of a released file's name, or None."""
  found = _NAME.fullmatch(pathlib.Path(name).name)
  if not found:
    return None
  return dict(
    version=found['version'] or 'v1',
    scale=found['scale'].replace('so400m', 'so').replace('so', 'so400m'),
    low='lowres' in found['rest'],
    tower=found['tower'],
  )


def pair(path):
  """(vision file or None, text file or None) of either file, or of a folder that holds one model."""
  path = pathlib.Path(path)
  if path.is_dir():
    models = {f for f in path.glob('*_vision.npz')} or {f for f in path.glob('*_text.npz')}
    if len(models) != 1:
      names = ', '.join(sorted(f.name for f in models))
      raise InputError(
        f'{str(path)!r}: got {len(models)} models ({names}); expected a folder with one NAME_vision.npz '
        'and NAME_text.npz, or one of the files'
      )
    path = models.pop()
  tower = next((t for t in TOWERS if path.stem.endswith(f'_{t}')), None)
  if tower is None:
    return path, None  # what it is, its arrays tell
  other = TOWERS[tower == 'vision']
  partner = path.with_name(path.name.removesuffix(f'{tower}.npz') + f'{other}.npz')
  if not partner.is_file() and released(path):
    alike = [
      f
      for f in path.parent.glob(f'*_{other}.npz')
      if released(f) == released(path) | {'tower': other}
    ]
    partner = alike[0] if len(alike) == 1 else partner
  partner = partner if partner.is_file() else None
  return (path, partner) if tower == 'vision' else (partner, path)


def read(path, *, towers=None):
  """Weights of a model's npz files, of either layout. towers: what a tips_jax.json beside them says
  of them.

  InputError where the name of a released file and its arrays disagree, and where the temperature is
  missing.
  """
  vision, text = pair(path)
  towers, known, params = dict(towers or {}), {}, {}
  for file in filter(None, (vision, text)):
    found = arrays.read_npz(file)
    layout, tower = _recognize(found, file)
    there = towers.get(tower)
    if tower == 'text':
      params['logit'] = _take_temperature(found, file)
    heads = there.heads if there else None
    if tower == 'image':
      there = layout.image_tower(
        found,
        heads=heads,
        cls=there and there.cls,
        mask_token=there and there.mask_token,
        where=str(file),
      )
      params[tower] = layout.image_in(found, there, str(file))
    else:
      there = layout.text_tower(found, heads=heads, where=str(file))
      params[tower] = layout.text_in(found, there, str(file))
    known[tower] = there
    _check_name(file, tower, there)
  if 'image' not in known:
    raise InputError(
      f'{str(path)!r}: got a text tower and no {path.stem.removesuffix("_text")}_vision.npz beside it; '
      'expected both files in one folder'
    )
  if 'text' in known:
    known['logit'] = towers.get('logit') or schema.Logit(kind='logit')
    if known['text'].width != known['image'].width:
      raise InputError(
        f'{str(path)!r}: got an image tower of width {known["image"].width} and a text tower of width '
        f'{known["text"].width}; expected files of one model'
      )
  name = released(vision)
  size = (
    224
    if name and name['low']
    else max(known['image'].grid * known['image'].patch, 448 if name else 0)
  )
  return Weights(name=vision.stem.removesuffix('_vision'), towers=known, params=params, size=size)


def write(weights, folder, *, format, dtype='float32'):
  """NAME_vision.npz and NAME_text.npz in the layout of the official PyTorch or JAX code."""
  only_official(weights, format)
  if dtype == 'bfloat16':
    raise InputError(
      f"--dtype: got 'bfloat16'; expected float32 or float16 for --to={format}: npz files have no "
      'bfloat16'
    )
  layout, folder = LAYOUTS[format], pathlib.Path(folder)
  image = layout.image_out(weights.params['image'], weights.image)
  arrays.write_npz(folder / f'{weights.name}_vision.npz', arrays.rounded(image, dtype))
  if weights.text:
    text = layout.text_out(weights.params['text'], weights.text)
    name = TEMPERATURES[layout is scenic]
    text = arrays.rounded(text, dtype) | {name: temperature(weights)}
    arrays.write_npz(folder / f'{weights.name}_text.npz', text)


def temperature(weights):
  """The divisor of the cosines, float32 []."""
  return np.exp(weights.params['logit']['log_temperature'].astype(np.float64)).astype(np.float32)


def log_temperature(value, where):
  """Parameters of a logit tower for a temperature."""
  value = np.asarray(value, np.float64)
  if value.size != 1 or not value.min() > 0:
    raise InputError(f'{where}: temperature: got {value}; expected one number above 0')
  return {'log_temperature': np.log(value.reshape(())).astype(np.float32)}


def _take_temperature(found, file):
  names = [n for n in TEMPERATURES if n in found]
  if not names:
    raise InputError(
      f'{str(file)!r}: got no temperature; expected one of {list(TEMPERATURES)} beside the text tower'
    )
  return log_temperature(found.pop(names[0]), str(file))


def _recognize(found, file):
  """(layout, 'image' or 'text') of named arrays."""
  marks = {
    'pos_embed': (pytorch, 'image'),
    'token_embedding.weight': (pytorch, 'text'),
    'encoder/ToTokenSequence_0/posembed_input': (scenic, 'image'),
    'token_emb/emb_var': (scenic, 'text'),
  }
  kinds = [kind for mark, kind in marks.items() if mark in found]
  if len(kinds) != 1:
    raise InputError(
      f'{str(file)!r}: got {len(found)} arrays such as {min(found, default="none")!r}; expected those '
      f'of one tower of TIPS, with one of {list(marks)}'
    )
  return kinds[0]


def _check_name(file, tower, found):
  name = released(file)
  if name and _WIDTHS[name['scale']] != found.width:
    raise InputError(
      f'{str(file)!r}: {tower} tower: got width {found.width}; expected {_WIDTHS[name["scale"]]}, as '
      f'the name says {name["scale"]}'
    )

"""The npz files that google-deepmind/tips reads and releases: two per model, for PyTorch or JAX."""

import os
import pathlib
import re
import types
from typing import Any

import numpy as np

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.interop import arrays
from tips_jax.interop.official import pytorch, scenic
from tips_jax.interop.weights import Weights, only_official

LAYOUTS = {'official_torch': pytorch, 'official_jax': scenic}
# The official programs write one each, and read both.
TEMPERATURES = {'official_torch': 'temperature', 'official_jax': scenic.TEMPERATURE}
# Released names vary: so14 and so400m14, with and without 'oss'.
_NAME = re.compile(
  r'tips(?:_(?P<version>v1|v2))?(?:_oss)?_(?P<scale>s|b|l|so|so400m|g)14(?P<rest>(?:_[a-z0-9]+)*?)'
  r'_(?P<tower>vision|text)\.npz'
)
_SCALES = {'so': 'so400m'}
_WIDTHS = {'s': 384, 'b': 768, 'l': 1024, 'so400m': 1152, 'g': 1536}
_DEPTHS = {'s': 12, 'b': 12, 'l': 24, 'so400m': 27, 'g': 40}
# The official program (scenic/run_tips_inference.py) takes a --variant of this list, and reads the
# files of that name; the variant says the side of the position table too.
_VARIANTS = {
  ('s', 16): 'tips_oss_s14_highres_distilled',
  ('b', 16): 'tips_oss_b14_highres_distilled',
  ('l', 16): 'tips_oss_l14_highres_distilled',
  ('so400m', 16): 'tips_oss_so400m14_highres_largetext_distilled',
  ('g', 16): 'tips_oss_g14_highres',
  ('b', 32): 'tips_v2_b14',
  ('l', 32): 'tips_v2_l14',
  ('so400m', 32): 'tips_v2_so14',
  ('g', 32): 'tips_v2_g14',
}
_OTHER_TOWER = {'vision': 'text', 'text': 'vision'}
# An array that only this layout and tower has.
_MARKS = {
  'pos_embed': (pytorch, 'image'),
  'token_embedding.weight': (pytorch, 'text'),
  'encoder/ToTokenSequence_0/posembed_input': (scenic, 'image'),
  'token_emb/emb_var': (scenic, 'text'),
}


def released(name: str | os.PathLike) -> dict[str, Any] | None:
  """{version, scale, low: low resolution, tower} of a released file's name, or None."""
  match = _NAME.fullmatch(pathlib.Path(name).name)
  if not match:
    return None
  return {
    'version': match['version'] or 'v1',
    'scale': _SCALES.get(match['scale'], match['scale']),
    'low': 'lowres' in match['rest'],
    'tower': match['tower'],
  }


def pair(path: str | os.PathLike) -> tuple[pathlib.Path | None, pathlib.Path | None]:
  """(vision file, text file), one of them perhaps None.

  path: either file, or a folder that holds one model.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    models = list(path.glob('*_vision.npz')) or list(path.glob('*_text.npz'))
    if len(models) != 1:
      names = ', '.join(sorted(file.name for file in models))
      raise InputError(
        f'{str(path)!r}: got {len(models)} models ({names}); expected a folder with one '
        'NAME_vision.npz and NAME_text.npz, or one of the files'
      )
    path = models[0]
  name, _, tower = path.stem.rpartition('_')
  if not name or tower not in _OTHER_TOWER:
    return path, None  # of any other name: the arrays show which tower it is
  partner = _partner(path, tower, _OTHER_TOWER[tower])
  if tower == 'vision':
    return path, partner
  return partner, path


def _partner(path: pathlib.Path, tower: str, other: str) -> pathlib.Path | None:
  """The file of the other tower beside a file."""
  partner = path.with_name(path.name.removesuffix(f'{tower}.npz') + f'{other}.npz')
  if partner.is_file():
    return partner
  release = released(path)
  if not release:
    return None
  # The two files of a release may spell its scale in different ways.
  alike = []
  for file in path.parent.glob(f'*_{other}.npz'):
    if released(file) == release | {'tower': other}:
      alike.append(file)
  if len(alike) == 1:
    return alike[0]
  return None


def read(path: str | os.PathLike, *, towers: dict[str, schema.Tower] | None = None) -> Weights:
  """Weights of a model's npz files, of either layout. towers: of a tips_jax.json beside them.

  InputError where the name of a released file disagrees with its arrays, and where the temperature
  is missing.
  """
  path = pathlib.Path(path)
  declared = towers or {}
  towers = {}
  params = {}
  vision, text = pair(path)
  for file in (vision, text):
    if file is None:
      continue
    tensors = arrays.read_npz(file)
    layout, name = _recognize(tensors, file)
    if name == 'text':
      params['logit'] = _take_temperature(tensors, file)
    towers[name], params[name] = read_tower(
      layout, name, tensors, declared=declared.get(name), where=str(file)
    )
    _check_name(file, name, towers[name])
  if 'image' not in towers:
    raise InputError(
      f'{str(path)!r}: got a text tower and no {path.stem.removesuffix("_text")}_vision.npz beside '
      'it; expected both files in one folder'
    )
  image = towers['image']
  if 'text' in towers:
    towers['logit'] = declared.get('logit') or schema.Logit(kind='logit')
    if towers['text'].width != image.width:
      raise InputError(
        f'{str(path)!r}: got an image tower of width {image.width} and a text tower of width '
        f'{towers["text"].width}; expected files of one model'
      )
  size = image.grid * image.patch
  release = released(vision)
  if release:
    # The files do not say at which resolution a released model was trained last.
    size = 224 if release['low'] else max(size, 448)
  return Weights(name=vision.stem.removesuffix('_vision'), towers=towers, params=params, size=size)


def read_tower(
  layout: types.ModuleType,
  name: str,
  tensors: dict[str, np.ndarray],
  *,
  declared: schema.Tower | None,
  heads: int | None = None,
  where: str,
) -> tuple[schema.Tower, dict[str, Any]]:
  """(tower, parameters) of the arrays of an 'image' or 'text' tower.

  declared: the tower in a tips_jax.json, which has what arrays do not show: heads, names of CLS
  tokens. heads: from another config.
  """
  if heads is None and declared:
    heads = declared.heads
  if name == 'text':
    tower = layout.text_tower(tensors, heads=heads, where=where)
    return tower, layout.text_in(tensors, tower, where)
  tower = layout.image_tower(
    tensors,
    heads=heads,
    cls=declared and declared.cls,
    mask_token=declared and declared.mask_token,
    where=where,
  )
  return tower, layout.image_in(tensors, tower, where)


def write(
  weights: Weights, folder: str | os.PathLike, *, format: str, dtype: str = 'float32'
) -> None:
  """NAME_vision.npz and NAME_text.npz in the layout of the official PyTorch or JAX code.

  NAME is that of the model; for JAX, of a model of a released size, that of the `variant`.
  """
  only_official(weights, format)
  if dtype == 'bfloat16':
    raise InputError(
      f"--dtype: got 'bfloat16'; expected float32 or float16 for --to={format}: npz files have no "
      'bfloat16'
    )
  layout = LAYOUTS[format]
  folder = pathlib.Path(folder)
  name = weights.name
  if format == 'official_jax':
    name = variant(weights.image) or name
  image = layout.image_out(weights.params['image'], weights.image)
  arrays.write_npz(folder / f'{name}_vision.npz', arrays.rounded(image, dtype))
  if weights.text:
    text = layout.text_out(weights.params['text'], weights.text)
    text = arrays.rounded(text, dtype) | {TEMPERATURES[format]: temperature(weights)}
    arrays.write_npz(folder / f'{name}_text.npz', text)


def variant(image: schema.ViT) -> str | None:
  """The --variant with which the official JAX program builds this image tower, or None."""
  for scale, width in _WIDTHS.items():
    sizes = (image.width, image.depth, image.heads, image.patch)
    if sizes == (width, _DEPTHS[scale], pytorch.HEADS[width], 14):
      return _VARIANTS.get((scale, image.grid))
  return None


def temperature(weights: Weights) -> np.ndarray:
  """The divisor of the cosines, float32 []."""
  return np.exp(weights.params['logit']['log_temperature'].astype(np.float64)).astype(np.float32)


def log_temperature(value: np.ndarray | float, where: str) -> dict[str, np.ndarray]:
  """Parameters of a logit tower for a temperature."""
  value = np.asarray(value, np.float64)
  if value.size != 1 or not 0 < value.min() < np.inf:
    raise InputError(f'{where}: temperature: got {value}; expected one number above 0')
  return {'log_temperature': np.log(value.reshape(())).astype(np.float32)}


def _take_temperature(tensors: dict[str, np.ndarray], file: pathlib.Path) -> dict[str, np.ndarray]:
  for name in TEMPERATURES.values():
    if name in tensors:
      return log_temperature(tensors.pop(name), str(file))
  raise InputError(
    f'{str(file)!r}: got no temperature; expected one of {list(TEMPERATURES.values())} beside the '
    'text tower'
  )


def _recognize(tensors: dict[str, np.ndarray], file: pathlib.Path) -> tuple[types.ModuleType, str]:
  """(layout, 'image' or 'text') of named arrays."""
  marks = _MARKS.keys() & tensors.keys()
  if len(marks) != 1:
    raise InputError(
      f'{str(file)!r}: got {len(tensors)} arrays such as {min(tensors, default="none")!r}; '
      f'expected those of one tower of TIPS, with one of {list(_MARKS)}'
    )
  return _MARKS[marks.pop()]


def _check_name(file: pathlib.Path, name: str, tower: schema.Tower) -> None:
  release = released(file)
  if release and _WIDTHS[release['scale']] != tower.width:
    raise InputError(
      f'{str(file)!r}: {name} tower: got width {tower.width}; expected '
      f'{_WIDTHS[release["scale"]]}, as the name says {release["scale"]}'
    )

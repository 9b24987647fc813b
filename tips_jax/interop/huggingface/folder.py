"""Hugging Face folders: writes transformers' TIPSv2 (5.14 and later), also reads google/tipsv2-*.

The tensors have the names of the official PyTorch code, after `vision_encoder.` and
`text_encoder.`; without prefixes where there is only an image tower. `config.json` asks for tanh
GELU and epsilon 1e-6, as the JAX towers compute.
"""

import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from tips_jax.core import schema, strict
from tips_jax.core.errors import InputError
from tips_jax.data.tokenizer import Tokenizer
from tips_jax.interop import arrays
from tips_jax.interop.huggingface import tokenizer
from tips_jax.interop.huggingface.card import card
from tips_jax.interop.official import npz, pytorch
from tips_jax.interop.weights import ReadLater, Weights, only_official

Json = dict[str, Any]
Tensors = dict[str, np.ndarray]
JOINT = 'tipsv2'
IMAGE_ONLY = 'tipsv2_vision_model'
DECODERS = 'tipsv2_dpt'  # an image tower with decoders for dense tasks
_PREFIXES = {'image': 'vision_encoder.', 'text': 'text_encoder.'}
# First parts of the names of arrays that are of no tower.
_OTHERS = {
  JOINT: {'temperature'},
  DECODERS: {'depth_head', 'normals_head', 'segmentation_head'},
}
_GELUS = ('gelu_pytorch_tanh', 'gelu_new')  # both the tanh form
_TEXT_EPS = (1e-6, 1e-5)
_TYPES = {
  'vision_config': dict,
  'backbone_config': dict,
  'text_config': dict,
  'image_processor': dict,
  'num_attention_heads': schema.Width,
  'embed_dim': schema.Width,
  'text_num_heads': schema.Width,
  'max_position_embeddings': schema.Count,
  'max_len': schema.Count,
  'model_max_length': float,
  'layer_norm_eps': float,
  'rescale_factor': float,
  'temperature': float,
  'temperature_init_value': float,
}
# google's flat config -> the names of the nested one.
_FLAT = {
  'vision_config': {
    'embed_dim': 'hidden_size',
    'patch_size': 'patch_size',
    'img_size': 'image_size',
    'num_register_tokens': 'num_register_tokens',
  },
  'text_config': {
    'text_hidden_size': 'hidden_size',
    'text_mlp_dim': 'intermediate_size',
    'text_num_heads': 'num_attention_heads',
    'text_num_layers': 'num_hidden_layers',
    'vocab_size': 'vocab_size',
    'max_len': 'max_position_embeddings',
  },
}


def write(weights: Weights, folder: str | os.PathLike, *, dtype: str = 'float32') -> None:
  """The files of a Hugging Face repository into an existing folder; plain transformers loads it.

  InputError where that layout cannot hold the model, or transformers would tokenize differently.
  """
  only_official(weights, 'hf')
  _check(weights)
  folder = pathlib.Path(folder)
  image = weights.image
  tensors = pytorch.image_out(weights.params['image'], image)
  if len(image.cls) == 1:
    # transformers has this parameter even where it is empty.
    tensors['register_tokens'] = np.zeros((1, 0, image.width), np.float32)
  config = _image_config(image)
  if weights.text:
    text = pytorch.text_out(weights.params['text'], weights.text)
    temperature = npz.temperature(weights)
    tensors = {_PREFIXES['image'] + name: x for name, x in tensors.items()}
    tensors |= {_PREFIXES['text'] + name: x for name, x in text.items()}
    tensors = arrays.rounded(tensors, dtype) | {'temperature': temperature}
    config = {
      'model_type': JOINT,
      'architectures': ['Tipsv2Model'],
      'temperature_init_value': float(temperature),
      'vision_config': config,
      'text_config': _text_config(weights.text, weights.text_length),
    }
  else:
    tensors = arrays.rounded(tensors, dtype)
    config = {'architectures': ['Tipsv2VisionModel']} | config
  _dump(folder / 'config.json', config | {'dtype': dtype})
  _dump(folder / 'preprocessor_config.json', _preprocessor(weights))
  if weights.tokenizer:
    _write_tokenizer(weights, folder)
  (folder / 'README.md').write_text(card(weights))
  arrays.write_safetensors(folder / 'model.safetensors', tensors, {'format': 'pt'})


def read(folder: str | os.PathLike, *, towers: dict[str, schema.Tower] | None = None) -> Weights:
  """Weights of a Hugging Face folder. towers: of a tips_jax.json in it.

  Where our towers compute slightly differently than the config asks for, `about['notes']` says so.
  InputError for what they cannot compute, and for an incomplete folder.
  """
  folder = pathlib.Path(folder)
  declared = towers or {}
  content = _load(folder / 'config.json')
  image_config, text_config, temperature = _native(content, folder)
  parts = {'image': arrays.open_safetensors(folder), 'text': {}, '': {}}
  decoders = content['model_type'] == DECODERS
  if text_config or decoders:
    parts = _split(parts['image'], folder, _OTHERS[content['model_type']])
  parts['image'] = {_official(name): x for name, x in parts['image'].items()}
  notes = []
  if decoders:
    notes.append('Only the image tower is read: its decoders are no part of an encoder.')

  configs = {'image': image_config}
  if text_config is not None:
    configs['text'] = text_config

  def where(name):
    return f'{str(folder)!r}: {name} tower'

  def read_tower(name):
    return npz.read_tower(
      pytorch,
      name,
      dict(parts[name]),
      declared=declared.get(name),
      heads=configs[name].get('num_attention_heads'),
      where=where(name),
    )

  # All arrays are checked now, and read again when a tower is first used: until then it takes no
  # memory.
  towers = {name: read_tower(name)[0] for name in configs}
  _check_image_config(image_config, towers['image'], where('image'), notes)
  if 'text' in towers:
    _check_text_config(text_config, towers['text'], where('text'), notes)
  rest = {}
  text_length = 64
  tokenizer_model = None
  if 'text' in towers:
    towers['logit'] = declared.get('logit') or schema.Logit(kind='logit')
    rest['logit'] = _temperature(parts[''], temperature, folder, notes)
    if towers['text'].width != towers['image'].width:
      raise InputError(
        f'{str(folder)!r}: got an image tower of width {towers["image"].width} and a text tower of '
        f'width {towers["text"].width}; expected one width'
      )
    text_length = _text_length(folder, text_config)
    file = folder / 'tokenizer.model'
    if file.is_file():
      tokenizer_model = file.read_bytes()
    else:
      notes.append('There is no tokenizer.model: texts need one from elsewhere.')
  return Weights(
    name=folder.resolve().name,
    towers=towers,
    params=ReadLater(rest, configs, lambda name: read_tower(name)[1]),
    size=_size(folder, towers['image']),
    tokenizer=tokenizer_model,
    text_length=text_length,
    about={'notes': notes} if notes else {},
  )


def has_decoders(path: str | os.PathLike) -> bool:
  """Whether a path is a folder of TIPSv2-DPT: an image tower with decoders for dense tasks."""
  config = pathlib.Path(path) / 'config.json'
  return config.is_file() and arrays.read_json(config).get('model_type') == DECODERS


def mlp_ratio(tower: schema.ViT) -> int | float:
  """The `mlp_ratio` from which transformers computes exactly the hidden width of an image tower."""
  hidden = tower.mlp
  if tower.ffn == 'swiglu':
    if tower.mlp % 8:
      raise InputError(
        f'--to=hf: got a SwiGLU of hidden width {tower.mlp}; expected a multiple of 8'
      )
    hidden = tower.mlp * 3 // 2  # of which transformers keeps two thirds
  if hidden % tower.width == 0:
    return hidden // tower.width
  ratio = hidden / tower.width
  while int(tower.width * ratio) < hidden:  # transformers rounds the product down
    ratio = math.nextafter(ratio, math.inf)
  return ratio


def _check(weights: Weights) -> None:
  image = weights.image
  text = weights.text
  if not text:
    return
  if text.width != image.width:
    raise InputError(
      f'--to=hf: got an image tower of width {image.width} and a text tower of width {text.width}; '
      'expected one width'
    )
  if 'logit' not in weights.params:
    raise InputError('--to=hf: got a text tower and no temperature; expected a model with a logit')
  if 'bias' in weights.params['logit']:
    raise InputError(
      '--to=hf: got a logit with a bias (SigLIP); expected a temperature alone; --to=safetensors '
      'holds it'
    )


def _image_config(tower: schema.ViT) -> Json:
  return {
    'model_type': IMAGE_ONLY,
    'hidden_size': tower.width,
    'num_hidden_layers': tower.depth,
    'num_attention_heads': tower.heads,
    'mlp_ratio': mlp_ratio(tower),
    'hidden_act': _GELUS[0],
    'use_swiglu_ffn': tower.ffn == 'swiglu',
    'image_size': tower.patch * tower.grid,
    'patch_size': tower.patch,
    'num_register_tokens': len(tower.cls) - 1,
    'layer_norm_eps': 1e-6,
  }


def _text_config(tower: schema.TextTower, length: int) -> Json:
  return {
    'model_type': 'tipsv2_text_model',
    'vocab_size': tower.vocab,
    'hidden_size': tower.width,
    'intermediate_size': tower.mlp,
    'num_hidden_layers': tower.depth,
    'num_attention_heads': tower.heads,
    'hidden_act': 'relu',
    'layer_norm_eps': 1e-6,
    'max_position_embeddings': length,
    'pad_token_id': 0,
  }


def _preprocessor(weights: Weights) -> Json:
  # Rounded up to whole patches: transformers cuts off the remainder.
  patch = weights.image.patch
  size = -(-weights.size // patch) * patch
  config = {
    'image_processor_type': 'Tipsv2ImageProcessor',
    'do_convert_rgb': True,
    'do_resize': True,
    'size': {'height': size, 'width': size},
    'resample': 2,
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': False,
  }
  if weights.text:
    config['processor_class'] = 'Tipsv2Processor'
  return config


def _write_tokenizer(weights: Weights, folder: pathlib.Path) -> None:
  (folder / 'tokenizer.model').write_bytes(weights.tokenizer)
  vocab = Tokenizer(folder / 'tokenizer.model').vocab_size
  if vocab > weights.text.vocab:
    raise InputError(
      f'--to=hf: got a tokenizer of {vocab} pieces; expected at most {weights.text.vocab}, the '
      'vocabulary of the text tower'
    )
  content = tokenizer.tokenizer_json(weights.tokenizer)
  (folder / 'tokenizer.json').write_text(json.dumps(content, ensure_ascii=False))
  pad, unknown = tokenizer.special_tokens(weights.tokenizer)
  # Tipsv2Tokenizer would build its own from the vocabulary; the generic class takes tokenizer.json
  # as it is.
  _dump(
    folder / 'tokenizer_config.json',
    {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'processor_class': 'Tipsv2Processor',
      'pad_token': pad,
      'unk_token': unknown,
      'model_max_length': weights.text_length,
      'max_length': weights.text_length,
      'padding_side': 'right',
      'truncation_side': 'right',
      'split_special_tokens': True,
      'clean_up_tokenization_spaces': False,
      'model_input_names': ['input_ids', 'attention_mask'],
    },
  )


def _native(config: Json, folder: pathlib.Path) -> tuple[Json, Json | None, float | None]:
  """(vision config, text config or None, temperature or None) by the names of the nested form."""
  kind = config.get('model_type')
  where = repr(str(folder / 'config.json'))
  if kind == IMAGE_ONLY:
    return config, None, None
  if kind == DECODERS:
    return config.get('backbone_config') or {}, None, None
  if kind != JOINT:
    raise InputError(
      f'{where}: model_type: got {kind!r}; expected {JOINT!r}, {IMAGE_ONLY!r} or {DECODERS!r}'
    )
  if 'vision_config' in config or 'text_config' in config:
    return (
      config.get('vision_config') or {},
      config.get('text_config') or {},
      config.get('temperature_init_value'),
    )
  if 'embed_dim' not in config:
    raise InputError(
      f'{where}: got neither vision_config and text_config nor embed_dim; expected the config of a '
      'TIPSv2 model'
    )
  vision = _renamed(config, _FLAT['vision_config'])
  text = _renamed(config, _FLAT['text_config'])
  vision['use_swiglu_ffn'] = str(config.get('ffn_layer', 'mlp')).startswith('swiglu')
  # The flat config lacks the heads of the image tower.
  vision['num_attention_heads'] = pytorch.HEADS.get(
    config['embed_dim'], text.get('num_attention_heads')
  )
  return vision, text, config.get('temperature')


def _renamed(config: Json, names: dict[str, str]) -> Json:
  return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def _split(tensors: Tensors, folder: pathlib.Path, others: set[str]) -> dict[str, Tensors]:
  """{'image', 'text', '': the rest, whose names begin with one of `others`} of prefixed names."""
  parts = {'image': {}, 'text': {}, '': {}}
  for name, x in tensors.items():
    for part, prefix in _PREFIXES.items():
      if name.startswith(prefix):
        parts[part][name.removeprefix(prefix)] = x
        break
    else:
      parts[''][name] = x
  unknown = [name for name in parts[''] if name.split('.')[0] not in others]
  if unknown:
    raise InputError(
      f'{str(folder)!r}: got {len(unknown)} arrays that no part of TIPSv2 is, such as '
      f'{min(unknown)!r}; expected names that start with {" or ".join(_PREFIXES.values())}'
    )
  return parts


def _official(name: str) -> str:
  """The official name: transformers names the image tower's MLP as that of the text tower."""
  return name.replace('.mlp.c_fc.', '.mlp.fc1.').replace('.mlp.c_proj.', '.mlp.fc2.')


def _temperature(
  rest: Tensors, fallback: float | None, folder: pathlib.Path, notes: list[str]
) -> Tensors:
  if 'temperature' in rest:
    return npz.log_temperature(rest['temperature'].read(), str(folder))
  if fallback is None:
    raise InputError(
      f'{str(folder)!r}: got no temperature; expected it among the arrays or in config.json'
    )
  notes.append('The temperature is that of config.json: there is none among the arrays.')
  return npz.log_temperature(fallback, str(folder))


def _check_image_config(config: Json, tower: schema.ViT, where: str, notes: list[str]) -> None:
  _compare(
    config,
    dict(
      hidden_size=tower.width,
      num_hidden_layers=tower.depth,
      patch_size=tower.patch,
      image_size=tower.patch * tower.grid,
      num_register_tokens=len(tower.cls) - 1,
      use_swiglu_ffn=tower.ffn == 'swiglu',
    ),
    where,
  )
  # The default of transformers is erf GELU, and SwiGLU ignores the field.
  activation = config.get('hidden_act', 'gelu')
  if tower.ffn == 'gelu' and activation not in _GELUS:
    if activation != 'gelu':
      raise InputError(f'{where}: hidden_act: got {activation!r}; expected {_GELUS[0]!r}')
    notes.append(
      'The config asks for erf GELU; the towers here compute tanh GELU, with which TIPS was '
      'trained: features differ by about 1e-3.'
    )
  _check_eps(config.get('layer_norm_eps') or 1e-6, (1e-6,), where)


def _check_text_config(config: Json, tower: schema.TextTower, where: str, notes: list[str]) -> None:
  _compare(
    config,
    dict(
      hidden_size=tower.width,
      num_hidden_layers=tower.depth,
      vocab_size=tower.vocab,
      intermediate_size=tower.mlp,
      hidden_act='relu',
      pad_token_id=0,
      scale_sqrt_depth=True,
    ),
    where,
  )
  eps = config.get('layer_norm_eps') or 1e-5
  _check_eps(eps, _TEXT_EPS, where)
  if eps != _TEXT_EPS[0]:
    notes.append(
      f'The config asks for epsilon {eps:g} in the text tower; the tower here has 1e-6: embeddings '
      'differ by about 1e-5.'
    )


def _compare(config: Json, expected: Json, where: str) -> None:
  for key, value in expected.items():
    got = config.get(key, value)
    if isinstance(got, list) and got and got == got[:1] * len(got):
      got = got[0]  # a size as [height, width]
    if got is not None and got != value:
      raise InputError(
        f'{where}: {key}: got {got!r} in config.json; expected {value!r}, as the arrays have'
      )


def _check_eps(eps: float, known: tuple[float, ...], where: str) -> None:
  if not any(math.isclose(eps, k, rel_tol=1e-3) for k in known):
    raise InputError(
      f'{where}: layer_norm_eps: got {eps!r}; expected {" or ".join(f"{k:g}" for k in known)}'
    )


def _size(folder: pathlib.Path, tower: schema.ViT) -> int:
  """Pixels to which the folder's preprocessing resizes images.

  InputError for preprocessing that differs from that of TIPS.
  """
  for name in ('processor_config.json', 'preprocessor_config.json'):
    if not (folder / name).is_file():
      continue
    config = _load(folder / name)
    config = config.get('image_processor', config)
    scale = config.get('rescale_factor') or 1 / 255
    if config.get('do_normalize') or not math.isclose(scale, 1 / 255, rel_tol=1e-6):
      raise InputError(
        f'{str(folder / name)!r}: got do_normalize={config.get("do_normalize")}, '
        f'rescale_factor={config.get("rescale_factor")}; expected false and 1/255: pixels in [0, 1]'
      )
    size = config.get('size')
    if isinstance(size, dict):
      size = size.get('height', size.get('shortest_edge'))
    if size is not None:
      return strict.value(schema.Pixels, size, f'{folder / name}: size')
  return tower.patch * tower.grid


def _text_length(folder: pathlib.Path, config: Json) -> int:
  longest = config.get('max_position_embeddings') or 64
  file = folder / 'tokenizer_config.json'
  if not file.is_file():
    return longest
  # transformers writes 1e30 for a tokenizer without a limit.
  return int(min(longest, _load(file).get('model_max_length') or longest))


def _load(path: pathlib.Path) -> Json:
  """A JSON object, with the types of what is read of it checked."""
  content = arrays.read_json(path)
  _check_types(content, str(path))
  return content


def _check_types(config: Json, where: str) -> None:
  for name, hint in _TYPES.items():
    value = config.get(name)
    if value is not None:  # transformers writes null for what a model does not have
      strict.value(hint, value, f'{where}: {name}')
      if hint is dict:
        _check_types(value, f'{where}: {name}')


def _dump(path: pathlib.Path, content: Json) -> None:
  path.write_text(json.dumps(content, indent=2) + '\n')

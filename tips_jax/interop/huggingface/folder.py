"""Hugging Face folders: transformers' own TIPSv2 (5.14 and later), and the flat config of
google/tipsv2-*, to read.

The tensors have the names of the official PyTorch code, after `vision_encoder.` and
`text_encoder.`; a folder with an image tower alone has the bare names. `config.json` asks for tanh
GELU and epsilon 1e-6: the numbers of the JAX towers.
"""

import json
import math
import pathlib

import numpy as np

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.data.tokenizer import Tokenizer
from tips_jax.interop import arrays
from tips_jax.interop.huggingface import tokenizer as huggingface_tokenizer
from tips_jax.interop.huggingface.card import card
from tips_jax.interop.official import npz as official
from tips_jax.interop.official import pytorch
from tips_jax.interop.weights import Weights, only_official

JOINT, IMAGE_ONLY = 'tipsv2', 'tipsv2_vision_model'
_PREFIXES = {'image': 'vision_encoder.', 'text': 'text_encoder.'}
_GELUS = ('gelu_pytorch_tanh', 'gelu_new')  # both the tanh form
_TEXT_EPS = (1e-6, 1e-5)
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


def write(weights, folder, *, dtype='float32'):
  """The files of a Hugging Face repository into an existing folder; plain transformers loads it.

  InputError where that layout cannot hold the model, or its tokenizer would be read as another one.
  """
  only_official(weights, 'hf')
  _check(weights)
  folder, image = pathlib.Path(folder), weights.image
  tensors = pytorch.image_out(weights.params['image'], image)
  if len(image.cls) == 1:
    tensors['register_tokens'] = np.zeros((1, 0, image.width), np.float32)
  config = _image_config(image)
  if weights.text:
    text = pytorch.text_out(weights.params['text'], weights.text)
    temperature = official.temperature(weights)
    tensors = {_PREFIXES['image'] + k: x for k, x in tensors.items()}
    tensors |= {_PREFIXES['text'] + k: x for k, x in text.items()}
    config = {
      'model_type': JOINT,
      'architectures': ['Tipsv2Model'],
      'temperature_init_value': float(temperature),
      'vision_config': config,
      'text_config': _text_config(weights.text, weights.text_length),
    }
  else:
    config = {'architectures': ['Tipsv2VisionModel']} | config
  tensors = arrays.rounded(tensors, dtype) | ({'temperature': temperature} if weights.text else {})
  _dump(folder / 'config.json', config | {'dtype': dtype})
  _dump(folder / 'preprocessor_config.json', _preprocessor(weights))
  if weights.tokenizer:
    _write_tokenizer(weights, folder)
  (folder / 'README.md').write_text(card(weights))
  arrays.write_safetensors(folder / 'model.safetensors', tensors, {'format': 'pt'})


def read(folder, *, towers=None):
  """Weights of a Hugging Face folder. towers: what a tips_jax.json in it says of them.

  What our towers compute a little differently than the config asks for stands in `about['notes']`;
  InputError for what they cannot compute, and for a folder that is not whole.
  """
  folder, towers = pathlib.Path(folder), towers or {}
  config = _load(folder / 'config.json')
  image_config, text_config, temperature = _native(config, folder)
  tensors, notes = arrays.read_safetensors(folder), []
  parts = _split(tensors, folder) if text_config else {'image': tensors, 'text': {}, '': {}}
  parts['image'] = {_official(k): x for k, x in parts['image'].items()}
  found, params = {}, {}
  for name, part in (('image', image_config), ('text', text_config)):
    if part is None:
      continue
    where, there, heads = (
      f'{str(folder)!r}: {name} tower',
      towers.get(name),
      part.get('num_attention_heads'),
    )
    if name == 'image':
      found[name] = pytorch.image_tower(
        parts[name],
        heads=heads,
        cls=there and there.cls,
        mask_token=there and there.mask_token,
        where=where,
      )
      params[name] = pytorch.image_in(parts[name], found[name], where)
      _check_image_config(part, found[name], where, notes)
    else:
      found[name] = pytorch.text_tower(parts[name], heads=heads, where=where)
      params[name] = pytorch.text_in(parts[name], found[name], where)
      _check_text_config(part, found[name], where, notes)
    if found[name].width % found[name].heads:
      raise InputError(
        f'{where}: num_attention_heads: got {found[name].heads}; expected a divisor of the width, '
        f'{found[name].width}'
      )
  if text_config:
    found['logit'] = towers.get('logit') or schema.Logit(kind='logit')
    params['logit'] = _temperature(parts[''], temperature, folder, notes)
    if found['text'].width != found['image'].width:
      raise InputError(
        f'{str(folder)!r}: got an image tower of width {found["image"].width} and a text tower of width '
        f'{found["text"].width}; expected one width'
      )
  tokenizer = folder / 'tokenizer.model'
  if text_config and not tokenizer.is_file():
    notes.append('There is no tokenizer.model: texts need one from elsewhere.')
  return Weights(
    name=folder.resolve().name,
    towers=found,
    params=params,
    size=_size(folder, found['image']),
    tokenizer=tokenizer.read_bytes() if text_config and tokenizer.is_file() else None,
    text_length=_text_length(folder, text_config or {}),
    about={'notes': notes} if notes else {},
  )


def mlp_ratio(tower):
  """The `mlp_ratio` from which transformers computes exactly the hidden width of an image tower."""
  wanted = tower.mlp
  if tower.ffn == 'swiglu':
    if tower.mlp % 8:
      raise InputError(
        f'--to=hf: got a SwiGLU of hidden width {tower.mlp}; expected a multiple of 8'
      )
    wanted = tower.mlp * 3 // 2  # of which transformers keeps two thirds
  if wanted % tower.width == 0:
    return wanted // tower.width
  ratio = wanted / tower.width
  while int(tower.width * ratio) < wanted:  # the product is rounded
    ratio = math.nextafter(ratio, math.inf)
  return ratio


def _check(weights):
  image, text = weights.image, weights.text
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
      '--to=hf: got a logit with a bias (SigLIP); expected a temperature alone; --to=safetensors holds '
      'it'
    )


def _image_config(tower):
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


def _text_config(tower, length):
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


def _preprocessor(weights):
  size = (
    -(-weights.size // weights.image.patch) * weights.image.patch
  )  # transformers cuts off what is over
  return {
    'image_processor_type': 'Tipsv2ImageProcessor',
    'do_convert_rgb': True,
    'do_resize': True,
    'size': {'height': size, 'width': size},
    'resample': 2,
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': False,
  } | ({'processor_class': 'Tipsv2Processor'} if weights.text else {})


def _write_tokenizer(weights, folder):
  (folder / 'tokenizer.model').write_bytes(weights.tokenizer)
  vocab = Tokenizer(folder / 'tokenizer.model').vocab_size
  if vocab > weights.text.vocab:
    raise InputError(
      f'--to=hf: got a tokenizer of {vocab} pieces; expected at most {weights.text.vocab}, the '
      'vocabulary of the text tower'
    )
  content = huggingface_tokenizer.tokenizer_json(weights.tokenizer)
  (folder / 'tokenizer.json').write_text(json.dumps(content, ensure_ascii=False))
  pad, unknown = huggingface_tokenizer.special_tokens(weights.tokenizer)
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


def _native(config, folder):
  """(vision config, text config or None, temperature or None) by the names of the nested form."""
  kind, where = config.get('model_type'), f'{str(folder / "config.json")!r}'
  if kind == IMAGE_ONLY:
    return config, None, None
  if kind != JOINT:
    raise InputError(f'{where}: model_type: got {kind!r}; expected {JOINT!r} or {IMAGE_ONLY!r}')
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
  vision, text = (
    {ours: config[theirs] for theirs, ours in table.items() if theirs in config}
    for table in _FLAT.values()
  )
  swiglu = str(config.get('ffn_layer', 'mlp')).startswith('swiglu')
  heads = pytorch.HEADS.get(config['embed_dim'], text.get('num_attention_heads'))
  return (
    vision | {'use_swiglu_ffn': swiglu, 'num_attention_heads': heads},
    text,
    config.get('temperature'),
  )


def _split(tensors, folder):
  """{'image', 'text', '': the rest} of prefixed names."""
  parts = {'image': {}, 'text': {}, '': {}}
  for key, x in tensors.items():
    part = next((p for p, prefix in _PREFIXES.items() if key.startswith(prefix)), '')
    parts[part][key.removeprefix(_PREFIXES.get(part, ''))] = x
  strange = [k for k in parts[''] if k != 'temperature']
  if strange:
    raise InputError(
      f'{str(folder)!r}: got {len(strange)} arrays that no part of TIPSv2 is, such as {min(strange)!r}; '
      f'expected names that start with {" or ".join(_PREFIXES.values())}'
    )
  return parts


def _official(name):
  """transformers writes the text tower's names of the feed-forward layer into the image tower, too."""
  return name.replace('.mlp.c_fc.', '.mlp.fc1.').replace('.mlp.c_proj.', '.mlp.fc2.')


def _temperature(rest, fallback, folder, notes):
  if 'temperature' in rest:
    return official.log_temperature(rest['temperature'], str(folder))
  if fallback is None:
    raise InputError(
      f'{str(folder)!r}: got no temperature; expected it among the arrays or in config.json'
    )
  notes.append('The temperature is that of config.json: there is none among the arrays.')
  return official.log_temperature(fallback, str(folder))


def _check_image_config(config, tower, where, notes):
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
  activation = config.get('hidden_act', 'gelu')
  if tower.ffn == 'gelu' and activation not in _GELUS:
    if activation != 'gelu':
      raise InputError(f'{where}: hidden_act: got {activation!r}; expected {_GELUS[0]!r}')
    notes.append(
      'The config asks for erf GELU; the towers here compute tanh GELU, with which TIPS was trained: '
      'features differ by about 1e-3.'
    )
  _check_eps(config.get('layer_norm_eps', 1e-6), (1e-6,), where)


def _check_text_config(config, tower, where, notes):
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
  eps = config.get('layer_norm_eps', 1e-5)
  _check_eps(eps, _TEXT_EPS, where)
  if eps != _TEXT_EPS[0]:
    notes.append(
      f'The config asks for epsilon {eps:g} in the text tower; the tower here has 1e-6: embeddings differ '
      'by about 1e-5.'
    )


def _compare(config, wanted, where):
  for key, value in wanted.items():
    got = config.get(key, value)
    got = got[0] if isinstance(got, list) and len(set(got)) == 1 else got
    if got is not None and got != value:
      raise InputError(
        f'{where}: {key}: got {got!r} in config.json; expected {value!r}, as the arrays have'
      )


def _check_eps(eps, known, where):
  if not any(math.isclose(eps, k, rel_tol=1e-3) for k in known):
    raise InputError(
      f'{where}: layer_norm_eps: got {eps!r}; expected {" or ".join(f"{k:g}" for k in known)}'
    )


def _size(folder, tower):
  """Pixels to which the folder's preprocessing resizes images; InputError where it does what TIPS
  does not.
  """
  for name in ('processor_config.json', 'preprocessor_config.json'):
    config = _load(folder / name) if (folder / name).is_file() else {}
    config = config.get('image_processor', config)
    if config.get('do_normalize') or not math.isclose(
      config.get('rescale_factor', 1 / 255), 1 / 255, rel_tol=1e-6
    ):
      raise InputError(
        f'{str(folder / name)!r}: got do_normalize={config.get("do_normalize")}, '
        f'rescale_factor={config.get("rescale_factor")}; expected false and 1/255: pixels in [0, 1]'
      )
    size = config.get('size')
    size = size.get('height', size.get('shortest_edge')) if isinstance(size, dict) else size
    if isinstance(size, int):
      return size
  return tower.patch * tower.grid


def _text_length(folder, config):
  longest = config.get('max_position_embeddings', 64)
  file = folder / 'tokenizer_config.json'
  return (
    int(min(longest, _load(file).get('model_max_length', longest))) if file.is_file() else longest
  )


def _load(path):
  try:
    content = json.loads(path.read_text())
  except OSError as error:
    raise InputError(
      f'{str(path)!r}: cannot be read ({error.strerror}); a half-written folder?'
    ) from None
  except ValueError as error:
    raise InputError(f'{str(path)!r}: got no JSON ({error}); fetch it again') from None
  if not isinstance(content, dict):
    raise InputError(f'{str(path)!r}: got {type(content).__name__}; expected a JSON object')
  return content


def _dump(path, content):
  path.write_text(json.dumps(content, indent=2) + '\n')

"""Hugging Face folders, against transformers' own TIPSv2 in both directions."""

import json
import pathlib

import jax
import numpy as np
import pytest

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.interop.huggingface import folder as huggingface
from tips_jax.interop.weights import flat
from tips_jax.models import towers

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers', minversion='5.14')
safetensors = pytest.importorskip('safetensors.torch')
pytest.importorskip('transformers.models.tipsv2')

TOLERANCE = 2e-5
NO_TOKENIZER = 'There is no tokenizer.model: texts need one from elsewhere.'
F32 = schema.Compute(dtype='float32')
SIZES = ((56, 56), (42, 84), (28, 28))  # of a grid of 4: its own, not square, smaller
IDS = np.array(
  [[5, 9, 200, 17, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0, 0, 0], [11, 12, 13, 14, 15, 16, 17, 299]]
)
apply = jax.jit(towers.apply, static_argnums=(1, 2))


@pytest.fixture(name='folder')
def _folder(tmp_path):
  (tmp_path / 'hf').mkdir()
  return tmp_path / 'hf'


def pixels(h, w):
  return np.random.default_rng(0).random((2, h, w, 3), np.float32)


def ours(weights, x, ids=IDS):
  """CLS tokens, patches, texts and logits of the JAX towers."""
  out = {
    k: np.asarray(v[:, 0])
    for k, v in apply(weights.params['image'], weights.image, F32, {'images': x[:, None]}).items()
  }
  if weights.text:
    out['text'] = np.asarray(apply(weights.params['text'], weights.text, F32, {'ids': ids})['text'])
    a, b = (
      y / np.linalg.norm(y, axis=1, keepdims=True) for y in (out[weights.image.cls[0]], out['text'])
    )
    out['logits'] = a @ b.T / np.exp(weights.params['logit']['log_temperature'])
  return out


def theirs(torch_model, weights, x, ids=IDS):
  x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    if weights.text:
      ids = torch.from_numpy(ids)
      out = torch_model(pixel_values=x, input_ids=ids, attention_mask=(ids != 0).long())
      image = out.vision_model_output.last_hidden_state.numpy()
    else:
      image = torch_model(pixel_values=x).last_hidden_state.numpy()
  n = len(weights.image.cls)
  result = {name: image[:, i] for i, name in enumerate(weights.image.cls)} | {'patch': image[:, n:]}
  if weights.text:
    result |= {
      'text': out.text_model_output.pooler_output.numpy(),
      'logits': out.logits_per_image.numpy(),
    }
  return result


def agree(weights, torch_model, sizes=SIZES[1:2]):
  for size in sizes:
    x = pixels(*size)
    a, b = ours(weights, x), theirs(torch_model, weights, x)
    assert set(a) == set(b)
    for name in a:
      np.testing.assert_allclose(
        a[name], b[name], rtol=0, atol=TOLERANCE, err_msg=f'{name} at {size}'
      )


def load(folder, kind='Tipsv2Model', **options):
  """A model of transformers; every name and shape fits."""
  found, info = getattr(transformers, kind).from_pretrained(
    folder, output_loading_info=True, **options
  )
  assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
  return found.eval()


IMAGES = {
  'gelu': {},
  'v2 grid': dict(grid=8),
  'swiglu': dict(ffn='swiglu', mlp=88),
  'odd ratio': dict(width=36, mlp=67),
  'one CLS': dict(cls=('cls',), mask_token=False),
  'three CLS': dict(cls=('a', 'b', 'c'), patch=8),
}
SEVERAL = ({}, IMAGES['v2 grid'])  # tried at several sizes


@pytest.mark.parametrize('image', IMAGES.values(), ids=IMAGES)
def test_our_export_in_transformers_and_back(model, folder, image):
  weights = model(**image)
  huggingface.write(weights, folder)
  patch = weights.image.patch
  sizes = [
    (h // 14 * patch, w // 14 * patch) for h, w in (SIZES if image in SEVERAL else SIZES[1:2])
  ]
  agree(weights, load(folder), sizes)
  again = huggingface.read(folder, towers=weights.towers)
  assert (
    again.towers == weights.towers
    and again.size == weights.size
    and again.about == {'notes': [NO_TOKENIZER]}
  )
  for tower in weights.towers:
    for name, x in flat(weights.params[tower]).items():
      np.testing.assert_array_equal(flat(again.params[tower])[name], x, err_msg=name)


def test_an_image_tower_alone(model, folder):
  weights = model(text=False)
  huggingface.write(weights, folder)
  agree(weights, load(folder, 'Tipsv2VisionModel'))
  assert isinstance(load(folder, 'AutoModel'), transformers.Tipsv2VisionModel)
  agree(huggingface.read(folder), load(folder, 'AutoModel'))


def test_the_backbone_of_our_export(model, folder):
  weights = model(text=False)
  huggingface.write(weights, folder)
  x = pixels(56, 84)
  with torch.no_grad():
    [maps] = load(folder, 'Tipsv2VisionBackbone')(
      torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    ).feature_maps
  want = ours(weights, x)['patch'].reshape(2, 4, 6, 32).transpose(0, 3, 1, 2)
  np.testing.assert_allclose(maps.numpy(), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_smaller_numbers(model, folder, dtype):
  weights = model()
  huggingface.write(weights, folder, dtype=dtype)
  assert load(folder).dtype == getattr(torch, dtype)
  agree(
    weights.cast(dtype).replace(
      params=weights.cast(dtype).params | {'logit': weights.params['logit']}
    ),
    load(folder, dtype=torch.float32),
  )
  again = huggingface.read(folder)
  assert (
    again.params['logit']['log_temperature'] == weights.params['logit']['log_temperature']
  )  # not rounded


VISION = dict(
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  mlp_ratio=2,
  image_size=56,
  hidden_act='gelu_pytorch_tanh',
  initializer_range=0.2,
)
TEXT = dict(
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  intermediate_size=64,
  vocab_size=300,
  layer_norm_eps=1e-6,
)


def random_model(seed=0, text=True, **vision):
  """A model of transformers in which every number counts: LayerScale, mask token and CLS position,
  too.
  """
  torch.manual_seed(seed)
  if text:
    made = transformers.Tipsv2Model(
      transformers.Tipsv2Config(
        vision_config=VISION | vision, text_config=TEXT, temperature_init_value=0.02
      )
    )
  else:
    made = transformers.Tipsv2VisionModel(transformers.Tipsv2VisionConfig(**VISION | vision))
  with torch.no_grad():
    for name, p in made.named_parameters():
      if name != 'temperature':
        p.copy_(0.1 * torch.randn_like(p) + (0.7 if 'lambda' in name else 0))
  return made.eval()


@pytest.mark.parametrize(
  'vision',
  [{}, dict(use_swiglu_ffn=True, image_size=112), dict(num_register_tokens=3)],
  ids=['gelu', 'swiglu', 'four CLS'],
)
def test_their_model_here(folder, vision):
  made = random_model(**vision)
  made.save_pretrained(folder)
  named = schema.ViT(
    kind='vit', width=32, depth=2, heads=4, mlp=64, cls=tuple('abcd'), mask_token=True
  )
  weights = huggingface.read(
    folder, towers={'image': named} if 'num_register_tokens' in vision else None
  )
  assert (
    weights.about == {'notes': [NO_TOKENIZER]} and weights.name == 'hf' and weights.image.mask_token
  )
  agree(weights, made, SIZES[:2])
  mask = np.random.default_rng(0).random((2, 16)) < 0.5
  x = pixels(56, 56)
  with torch.no_grad():
    want = made.vision_model(
      torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), bool_masked_pos=torch.from_numpy(mask)
    ).last_hidden_state
  got = apply(
    weights.params['image'], weights.image, F32, {'images': x[:, None], 'mask': mask[:, None]}
  )
  np.testing.assert_allclose(
    got['patch'][:, 0], want[:, len(weights.image.cls) :], rtol=0, atol=TOLERANCE
  )


def test_their_image_tower_here(folder):
  made = random_model(text=False)
  made.save_pretrained(folder)
  weights = huggingface.read(folder)
  assert set(weights.towers) == {'image'}
  agree(weights, made)


def test_their_image_tower_with_decoders_here(folder):
  backbone = VISION | dict(model_type='tipsv2_vision_model', out_indices=[1, 2])
  config = transformers.Tipsv2DptConfig(
    backbone_config=backbone, neck_hidden_sizes=[4, 8], fusion_hidden_size=8
  )
  made = transformers.Tipsv2DptForDensePrediction(config).eval()
  made.save_pretrained(folder)
  weights = huggingface.read(folder)
  assert set(weights.towers) == {'image'}
  assert weights.about['notes'] == [
    'Only the image tower is read: its decoders are no part of an encoder.'
  ]
  x = pixels(42, 84)
  with torch.no_grad():
    maps = made.backbone(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).feature_maps[-1]
  theirs = maps.numpy().transpose(0, 2, 3, 1).reshape(2, 18, 32)
  np.testing.assert_allclose(ours(weights, x)['patch'], theirs, rtol=0, atol=TOLERANCE)
  file = folder / 'model.safetensors'
  tensors = safetensors.load_file(file)
  safetensors.save_file(tensors | {'other_head.weight': torch.zeros(1)}, file)
  with pytest.raises(InputError, match="no part of TIPSv2 is, such as 'other_head.weight'"):
    huggingface.read(folder)


def test_shards(folder):
  made = random_model()
  made.save_pretrained(folder, max_shard_size='40KB')
  assert not (folder / 'model.safetensors').exists() and len(list(folder.glob('*.safetensors'))) > 2
  agree(huggingface.read(folder), made)
  missing = sorted(folder.glob('*.safetensors'))[1]
  missing.unlink()
  with pytest.raises(InputError, match=missing.name):
    huggingface.read(folder)


def edit(folder, **changes):
  """Changes fields of config.json, 'part__field' for one of a part; None takes one away."""
  path = folder / 'config.json'
  config = json.loads(path.read_text())
  for key, value in changes.items():
    *groups, leaf = key.split('__')
    place = config
    for group in groups:
      place = place[group]
    place.pop(leaf, None)
    if value is not None:
      place[leaf] = value
  path.write_text(json.dumps(config))


def test_numerics_that_differ_a_little_are_noted(folder):
  made = random_model()
  made.save_pretrained(folder)
  edit(folder, vision_config__hidden_act='gelu', text_config__layer_norm_eps=1e-5)
  weights = huggingface.read(folder)
  words = ('erf GELU', 'epsilon 1e-05', 'tokenizer')
  assert [word in note for word, note in zip(words, weights.about['notes'], strict=True)] == [
    True
  ] * 3
  x, there = pixels(56, 56), load(folder)
  a, b = ours(weights, x), theirs(there, weights, x)
  assert 0 < np.abs(a['patch'] - b['patch']).max() < 3e-3
  assert np.abs(a['text'] - b['text']).max() < 1e-3
  # Fields that are left out have transformers' own defaults, which are these.
  edit(folder, vision_config__hidden_act=None, text_config__layer_norm_eps=None)
  assert huggingface.read(folder).about == weights.about


FLAT = dict(
  model_type='tipsv2',
  architectures=['TIPSv2Model'],
  patch_size=14,
  img_size=56,
  init_values=1.0,
  num_register_tokens=1,
  vocab_size=300,
  max_len=64,
  vision_fn='vit_tiny',
  embed_dim=32,
  text_hidden_size=32,
  text_mlp_dim=64,
  text_num_heads=4,
  text_num_layers=2,
  temperature=0.03,
  auto_map={
    'AutoConfig': 'configuration_tips.TIPSv2Config',
    'AutoModel': 'modeling_tips.TIPSv2Model',
  },
)


@pytest.mark.parametrize('ffn', ['mlp', 'swiglu'])
def test_the_flat_config_of_older_repositories(folder, ffn):
  made = random_model(use_swiglu_ffn=ffn == 'swiglu')
  made.save_pretrained(folder)
  (folder / 'config.json').write_text(json.dumps(FLAT | {'ffn_layer': ffn}))
  weights = huggingface.read(folder)
  agree(weights, made)
  assert (
    weights.image.heads == 4
    and weights.text_length == 64
    and len(weights.about['notes']) == 3 - (ffn != 'mlp')
  )
  without_temperature(folder)
  weights = huggingface.read(folder)
  np.testing.assert_allclose(np.exp(weights.params['logit']['log_temperature']), 0.03, rtol=1e-6)
  assert any('temperature' in note for note in weights.about['notes'])
  (folder / 'config.json').write_text(
    json.dumps({k: v for k, v in FLAT.items() if k != 'temperature'} | {'ffn_layer': ffn})
  )
  with pytest.raises(InputError, match='no temperature'):
    huggingface.read(folder)


def without_temperature(folder):
  tensors = safetensors.load_file(folder / 'model.safetensors')
  del tensors['temperature']
  safetensors.save_file(tensors, folder / 'model.safetensors')


BAD_CONFIGS = {
  'another model': (dict(model_type='clip'), "model_type: got 'clip'; expected 'tipsv2'"),
  'a text tower alone': (dict(model_type='tipsv2_text_model'), 'model_type'),
  'activation': (dict(vision_config__hidden_act='relu'), "hidden_act: got 'relu'"),
  'epsilon of the image tower': (
    dict(vision_config__layer_norm_eps=1e-5),
    'layer_norm_eps: got 1e-05',
  ),
  'epsilon of the text tower': (
    dict(text_config__layer_norm_eps=1e-3),
    'layer_norm_eps: got 0.001',
  ),
  'text activation': (dict(text_config__hidden_act='gelu'), "hidden_act: got 'gelu'"),
  'unscaled embeddings': (dict(text_config__scale_sqrt_depth=False), 'scale_sqrt_depth: got False'),
  'another grid': (dict(vision_config__image_size=112), 'image_size: got 112'),
  'another depth': (dict(vision_config__num_hidden_layers=3), 'num_hidden_layers: got 3'),
  'heads that do not divide': (
    dict(vision_config__num_attention_heads=5),
    'heads: got 5; expected a divisor of the width 32',
  ),
  'no vision': (dict(vision_config=None, text_config=None), 'vision_config'),
}


@pytest.mark.parametrize('change, message', BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_configs_that_do_not_fit(model, folder, change, message):
  huggingface.write(model(), folder)
  edit(folder, **change)
  with pytest.raises(InputError, match=message):
    huggingface.read(folder)


def test_folders_that_are_not_whole(model, folder):
  huggingface.write(model(), folder)
  data = (folder / 'model.safetensors').read_bytes()

  def refused(message):
    with pytest.raises(InputError, match=message):
      huggingface.read(folder)

  (folder / 'model.safetensors').write_bytes(data[: len(data) // 2])
  refused('truncated')
  (folder / 'model.safetensors').unlink()
  refused('half-written')
  safetensors.save_file(
    {'vision_encoder.cls_token': torch.zeros(1, 1, 32)}, folder / 'model.safetensors'
  )
  refused('patch_embed')
  (folder / 'model.safetensors').write_bytes(data)
  tensors = safetensors.load_file(folder / 'model.safetensors') | {
    'classifier.weight': torch.zeros(3)
  }
  safetensors.save_file(tensors, folder / 'model.safetensors')
  refused('classifier.weight')
  (folder / 'config.json').write_text('{"model_type": ')
  refused('no JSON')


def test_preprocessing_of_another_kind_is_refused(model, folder):
  huggingface.write(model(), folder)
  path = folder / 'preprocessor_config.json'
  path.write_text(
    json.dumps(json.loads(path.read_text()) | {'do_normalize': True, 'image_mean': [0.5] * 3})
  )
  with pytest.raises(InputError, match='do_normalize'):
    huggingface.read(folder)


def test_what_the_layout_cannot_hold_is_refused(model, folder):
  full = model()
  bad = {
    'projections': model(heads=True),
    'width 48': full.replace(
      towers=full.towers
      | {'text': schema.TextTower(kind='text', width=48, depth=1, heads=2, mlp=8)}
    ),
    'no temperature': full.replace(params={k: v for k, v in full.params.items() if k != 'logit'}),
    'bias': full.replace(
      params=full.params | {'logit': full.params['logit'] | {'bias': np.float32(-10)}}
    ),
    'multiple of 8': model(ffn='swiglu', mlp=60),
  }
  for message, weights in bad.items():
    with pytest.raises(InputError, match=message):
      huggingface.write(weights, folder)
  assert not list(folder.iterdir())


@pytest.mark.parametrize(
  'width, mlp, ffn',
  [
    (1152, 4304, 'gelu'),
    (1536, 4096, 'swiglu'),
    (384, 1536, 'gelu'),
    (29, 101, 'gelu'),
    (49, 48, 'gelu'),
    (387, 1048, 'swiglu'),
  ],
)
def test_the_ratio_gives_the_hidden_width(width, mlp, ffn):
  tower = schema.ViT(kind='vit', width=width, depth=1, heads=1, mlp=mlp, ffn=ffn)
  hidden = int(width * huggingface.mlp_ratio(tower))
  assert ((int(hidden * 2 / 3) + 7) // 8 * 8 if ffn == 'swiglu' else hidden) == mlp


def test_every_small_ratio():
  for width in range(1, 200):
    for mlp in range(1, 400, 7):
      tower = schema.ViT(kind='vit', width=width, depth=1, heads=1, mlp=mlp)
      assert int(width * huggingface.mlp_ratio(tower)) == mlp


def test_the_card_says_what_is_known_and_no_more(model, folder):
  huggingface.write(model(), folder)
  text = (folder / 'README.md').read_text()
  head = text.split('---')[1]
  assert 'library_name: transformers' in head and 'license' not in head
  assert 'Evaluation' not in text and 'Training' not in text and "tips_jax.load('tiny')" in text
  about = {
    'config': {'seed': 7},
    'data_fingerprint': 'abc',
    'evaluation': {'knn/top1': 0.51234, 'steps': 100},
  }
  pathlib.Path(folder / 'README.md').unlink()
  huggingface.write(model().replace(about=about), folder)
  text = (folder / 'README.md').read_text()
  assert '| knn/top1 | 0.5123 |' in text and '| steps | 100 |' in text and '`abc`' in text
  assert json.loads(text.split('```json')[1].split('```')[0]) == {'seed': 7}

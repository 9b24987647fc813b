"""Image towers of four stages: torchvision's numbers with the same weights, sizes, counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.methods import clip
from tips_jax.core import schema, strict, tree
from tips_jax.core.errors import InputError
from tips_jax.models import stages, towers

FLOAT = schema.Compute(dtype='float32')
PLAIN = {
  'resnet18': dict(kind='resnet'),
  'mobilenetv2': dict(kind='mobilenetv2'),
  'swin_nano': dict(kind='swin'),
}


def tower_of(fields):
  return strict.value(schema.Tower, fields, 'tower')


def count(tower):
  """Parameters that are trained: without running statistics, as torch counts."""
  shapes = jax.eval_shape(lambda: towers.init('image', tower, seed=0))
  named = tree.named_leaves(shapes)
  return sum(x.size for name, x in named if not name.endswith(('norm/mean', 'norm/var')))


@pytest.mark.parametrize(
  'name, plain, millions',
  [
    ('resnet18', 11_176_512, '12.51'),
    ('mobilenetv2', 2_223_872, '2.45'),
    ('swin_nano', 6_914_634, '7.11'),
  ],
)
def test_parameters_are_as_many_as_published(name, plain, millions):
  """Plain: torchvision's models without their classifiers. Published: with CLIP's projection."""
  assert count(tower_of(PLAIN[name])) == plain
  recipe = clip.light(clip.method(), name)['towers']
  total = sum(count(tower_of(recipe[part])) for part in ('image', 'image_projection'))
  assert f'{total / 1e6:.2f}' == millions


TINY = {
  'resnet18': dict(kind='resnet', widths=(4, 4, 6, 8), depths=(1, 2, 1, 1), pool='attention'),
  'mobilenetv2': dict(
    kind='mobilenetv2', stem=4, widths=(4, 4, 4, 4, 6, 6, 8), depths=(1, 2, 1, 1, 1, 1, 1), last=12
  ),
  'swin_nano': dict(kind='swin', embedding=4, head_width=2, depths=(2, 1, 2, 2), window=3),
}


def pixels(*shape):
  return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


@pytest.mark.parametrize('name', TINY)
def test_outputs_are_those_that_it_says_for_any_size(name):
  tower = tower_of(TINY[name])
  images = pixels(2, 2, 40, 70)
  params = towers.init('image', tower, seed=0)
  run = jax.jit(lambda images: towers.apply(params, tower, FLOAT, {'images': images}))
  out = run(images)
  said = towers.module(tower).outputs(tower, {'images': images.shape[1:]})
  assert {n: x.shape[1:] for n, x in out.items()} == said
  assert said['patch'][1] == 2 * 3 and said['pooled'] == (2, tower.width)
  assert towers.module(tower).flops(tower, {'images': images.shape[1:]}) > 0
  # As bytes or as shares, padded here or there.
  wide = np.pad(images, ((0, 0), (0, 0), (12, 12), (13, 13), (0, 0))).astype(np.float32) / 255
  for key, x in run(wide).items():
    np.testing.assert_allclose(x, out[key], rtol=1e-4, atol=1e-5)


def test_there_is_nothing_inside_to_evaluate():
  tower = tower_of(TINY['swin_nano'])
  module = towers.module(tower)(tower, FLOAT)
  with pytest.raises(InputError, match="values: got an image tower of kind 'swin'; expected a vit"):
    stages.inspect(module, {}, pixels(1, 1, 32, 32), values=True)


# --- the same as torchvision ---------------------------------------------------------------------


def theirs(name):
  """torchvision's model with weights that are not those of the start."""
  torchvision = pytest.importorskip('torchvision')
  import torch

  torch.manual_seed(0)
  if name == 'resnet18':
    model = torchvision.models.resnet18()
  elif name == 'mobilenetv2':
    model = torchvision.models.mobilenet_v2()
  else:
    model = torchvision.models.SwinTransformer(
      [4, 4], 48, [2, 2, 6, 2], [3, 6, 12, 24], [7, 7], stochastic_depth_prob=0.0
    )
  with torch.no_grad():
    for key, x in model.named_parameters():
      if x.ndim < 2 or 'relative' in key:
        x += 0.1 * torch.randn(x.shape)
  return model


def converted(name, model):
  """Their parameters in our tree."""
  state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
  take = lambda key: state[key]
  kernel = lambda key: take(key).transpose(2, 3, 1, 0)
  norm = lambda key: {'scale': take(f'{key}.weight'), 'bias': take(f'{key}.bias')}
  batch_norm = lambda key: (
    norm(key)
    | {
      'mean': take(f'{key}.running_mean'),
      'var': take(f'{key}.running_var'),
    }
  )
  both = lambda conv, bn: {'conv': {'kernel': kernel(f'{conv}.weight')}, 'norm': batch_norm(bn)}
  dense = lambda key: {'kernel': take(f'{key}.weight').T, 'bias': take(f'{key}.bias')}
  if name == 'resnet18':
    ours = {'stem': both('conv1', 'bn1')}
    for i in range(4):
      for j in range(2):
        at = f'layer{i + 1}.{j}'
        block = {f'conv{k}': both(f'{at}.conv{k}', f'{at}.bn{k}') for k in (1, 2)}
        if i and not j:
          block['shortcut'] = both(f'{at}.downsample.0', f'{at}.downsample.1')
        ours[f'stage{i + 1}_{j}'] = block
    return ours
  if name == 'mobilenetv2':
    ours = {'stem': both('features.0.0', 'features.0.1')}
    for i in range(17):
      at, parts = f'features.{i + 1}.conv', ['widen', 'depthwise'] if i else ['depthwise']
      block = {part: both(f'{at}.{k}.0', f'{at}.{k}.1') for k, part in enumerate(parts)}
      k = len(parts)
      ours[f'block{i}'] = block | {'narrow': both(f'{at}.{k}', f'{at}.{k + 1}')}
    return ours | {'head': both('features.18.0', 'features.18.1')}
  patch = take('features.0.0.weight').transpose(2, 3, 1, 0).reshape(48, 48)
  ours = {
    'embedding': {'kernel': patch, 'bias': take('features.0.0.bias')},
    'embedded': norm('features.0.2'),
    'norm': norm('norm'),
  }
  for i, depth in enumerate((2, 2, 6, 2)):
    if i:
      at = f'features.{2 * i}'
      ours[f'merge{i}'] = {'norm': norm(f'{at}.norm'), 'kernel': take(f'{at}.reduction.weight').T}
    for j in range(depth):
      at = f'features.{2 * i + 1}.{j}'
      qkv, bias = dense(f'{at}.attn.qkv').values()
      block = {'out': dense(f'{at}.attn.proj'), 'up': dense(f'{at}.mlp.0')}
      block |= {'down': dense(f'{at}.mlp.3'), 'norm1': norm(f'{at}.norm1')}
      block |= {'norm2': norm(f'{at}.norm2')}
      block['relative'] = take(f'{at}.attn.relative_position_bias_table').T
      for k, part in enumerate(('query', 'key', 'value')):
        width = len(bias) // 3
        rows = slice(k * width, (k + 1) * width)
        block[part] = {'kernel': qkv[:, rows], 'bias': bias[rows]}
      ours[f'stage{i + 1}_{j}'] = block
  return ours


def their_features(name, model, images):
  """(patches [N, h, w, D], pooled [N, D])."""
  import torch

  x = torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2)
  if name == 'resnet18':
    for layer in list(model.children())[:-2]:
      x = layer(x)
  elif name == 'mobilenetv2':
    x = model.features(x)
  else:
    x = model.norm(model.features(x)).permute(0, 3, 1, 2)
  return x.permute(0, 2, 3, 1).detach().numpy(), x.mean((2, 3)).detach().numpy()


def near(ours, theirs):
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize('name', PLAIN)
def test_equals_torchvision(name):
  tower, model = tower_of(PLAIN[name]), theirs(name).eval()
  params = converted(name, model)
  wanted = jax.eval_shape(lambda: towers.init('image', tower, seed=0))
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, wanted)
  images = pixels(2, 96, 160)
  out = jax.jit(lambda x: towers.apply(params, tower, FLOAT, {'images': x}))(images[:, None])
  patch, pooled = their_features(name, model, images)
  near(out['patch'][:, 0], patch.reshape(2, 15, -1))
  near(out['pooled'][:, 0], pooled)


def test_batch_statistics_equal_those_of_torch():
  model = theirs('mobilenetv2').train()
  for module in model.modules():
    module.p = 0.0  # no dropout
  tower = tower_of(PLAIN['mobilenetv2'])
  params, images = converted('mobilenetv2', model), pixels(4, 64, 64)
  params = jax.tree.map(np.copy, params)
  run = jax.jit(lambda x: towers.apply(params, tower, FLOAT, {'images': x}, rng=jax.random.key(0)))
  out = run(images[:, None])
  near(out['pooled'][:, 0], their_features('mobilenetv2', model, images)[1])
  after = dict(tree.named_leaves(converted('mobilenetv2', model)))
  seen = dict(tree.named_leaves(out['statistics']))
  assert seen.keys() == {n for n in after if n.endswith(('norm/mean', 'norm/var'))}
  for key, x in seen.items():
    np.testing.assert_allclose(x[0], after[key], rtol=1e-3, atol=1e-5, err_msg=key)


def test_attention_pooling_equals_the_formula():
  rng = np.random.default_rng(0)
  module = stages.AttentionPool(128, 3, jnp.dtype('float32'))
  x = rng.normal(size=(2, 3, 3, 128)).astype(np.float32)
  params = module.init(jax.random.key(0), x)['params']
  params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32) / 8, params)
  got = module.apply({'params': params}, x)
  dense = lambda name, y: y @ params[name]['kernel'] + params[name]['bias']
  mean = x.mean((1, 2))[:, None] + params['position']
  tokens = np.concatenate([mean, (x + params['posembed']).reshape(2, 9, 128)], axis=1)
  parts = []
  for head in (slice(0, 64), slice(64, 128)):
    q, k, v = (
      dense(n, y)[..., head] for n, y in (('query', mean), ('key', tokens), ('value', tokens))
    )
    parts.append(jax.nn.softmax(q @ k.swapaxes(1, 2) / 8) @ v)
  np.testing.assert_allclose(
    got, dense('out', np.concatenate(parts, -1))[:, 0], rtol=1e-4, atol=1e-5
  )

"""The layout of the official PyTorch code, which transformers (Tipsv2) and timm read too: names <->
parameters.

Tensor tables and gauges: google-deepmind/tips, pytorch/{image,text}_encoder.py. Ours has no
LayerScale and no position
of the CLS token: they are written as ones and zeros, and folded into what they multiply or add to
when they are read.
"""

import math

import numpy as np

from tips_jax.core import schema, tree
from tips_jax.core.errors import InputError
from tips_jax.interop import arrays as files
from tips_jax.interop.weights import OFFICIAL_CLS, flat

HEADS = {
  384: 6,
  768: 12,
  1024: 16,
  1152: 16,
  1536: 24,
}  # by width, of the released models; the files do not say
# Their layer -> ours, several of which lie side by side; '{}' is weight or bias.
_ATTENTION = ('attention/query', 'attention/key', 'attention/value')
_IMAGE = {
  'norm1.{}': ('norm1',),
  'attn.qkv.{}': _ATTENTION,
  'attn.proj.{}': ('attention/out',),
  'norm2.{}': ('norm2',),
}
_FFN = {
  'gelu': {'mlp.fc1.{}': ('mlp/up',), 'mlp.fc2.{}': ('mlp/down',)},
  'swiglu': {'mlp.w12.{}': ('mlp/gate', 'mlp/up'), 'mlp.w3.{}': ('mlp/down',)},
}
_TEXT = {
  'ln_1.{}': ('norm1',),
  'attn.in_proj_{}': _ATTENTION,
  'attn.out_proj.{}': ('attention/out',),
  'ln_2.{}': ('norm2',),
  'mlp.c_fc.{}': ('mlp/up',),
  'mlp.c_proj.{}': ('mlp/down',),
}


def image_out(params, tower):
  """{name: array} of an image tower."""
  p, d = flat(params), tower.width
  out = {
    'cls_token': p['cls'][:, :1],
    'pos_embed': np.concatenate(
      [np.zeros((1, 1, d), np.float32), p['posembed'].reshape(1, -1, d)], axis=1
    ),
  }
  if len(tower.cls) > 1:
    out['register_tokens'] = p['cls'][:, 1:]
  out['mask_token'] = p['mask_token'] if tower.mask_token else np.zeros((1, d), np.float32)
  out |= {
    'patch_embed.proj.weight': p['embedding/kernel'].transpose(3, 2, 0, 1),
    'patch_embed.proj.bias': p['embedding/bias'],
  }
  for i in range(tower.depth):
    out |= _block_out(p, i, f'blocks.{i}.', _IMAGE | _FFN[tower.ffn])
    out |= {f'blocks.{i}.ls{n}.gamma': np.ones(d, np.float32) for n in (1, 2)}
  return out | {'norm.weight': p['norm/scale'], 'norm.bias': p['norm/bias']}


def image_in(arrays, tower, where='image tower'):
  """Parameters of an image tower; InputError for a name or a shape that does not fit."""
  r, d, g = files.Reader(arrays, where), tower.width, tower.grid
  position = r.take('pos_embed', 1, g * g + 1, d)
  cls = [r.take('cls_token', 1, 1, d) + position[:, :1]]
  if 'register_tokens' in r:
    cls.append(r.take('register_tokens', 1, len(tower.cls) - 1, d))
  mask_token = r.take('mask_token', 1, d) if 'mask_token' in r else np.zeros((1, d), np.float32)
  out = {
    'embedding/kernel': r.take('patch_embed.proj.weight', d, 3, tower.patch, tower.patch).transpose(
      2, 3, 1, 0
    ),
    'embedding/bias': r.take('patch_embed.proj.bias', d),
    'posembed': position[:, 1:].reshape(1, g, g, d),
    'cls': np.concatenate(cls, axis=1),
  } | ({'mask_token': mask_token} if tower.mask_token else {})
  blocks = [
    _block_in(r, f'blocks.{i}.', _IMAGE | _FFN[tower.ffn], tower) for i in range(tower.depth)
  ]
  for i, block in enumerate(blocks):
    for n, layer in ((1, 'attention/out'), (2, 'mlp/down')):
      if f'blocks.{i}.ls{n}.gamma' in r:
        gamma = r.take(f'blocks.{i}.ls{n}.gamma', d)
        for leaf in ('kernel', 'bias'):
          block[f'{layer}/{leaf}'] = block[f'{layer}/{leaf}'] * gamma
  out |= _stack(blocks) | {
    'norm/scale': r.take('norm.weight', d),
    'norm/bias': r.take('norm.bias', d),
  }
  r.done()
  return tree.nested(out)


def image_tower(arrays, *, heads=None, cls=None, mask_token=None, where='image tower'):
  """What image tower the arrays are of. heads: where the width does not tell; cls: names of the CLS
  tokens.
  """
  r = files.Reader(arrays, where)
  width, _, patch, _ = _dims(r, 'patch_embed.proj.weight', 4)
  grid = math.isqrt(max(_dims(r, 'pos_embed', 3)[1] - 1, 0))
  ffn = 'swiglu' if 'blocks.0.mlp.w12.weight' in r else 'gelu'
  mlp = (
    r.shape('blocks.0.mlp.w3.weight')[1]
    if ffn == 'swiglu'
    else r.shape('blocks.0.mlp.fc1.weight')[0]
  )
  count = 1 + (_dims(r, 'register_tokens', 3)[1] if 'register_tokens' in r else 0)
  if mask_token is None:
    mask_token = bool('mask_token' in r and np.any(r.peek('mask_token')))
  return schema.ViT(
    kind='vit',
    width=width,
    depth=r.count('blocks.{}.norm1.weight'),
    mlp=mlp,
    ffn=ffn,
    patch=patch,
    heads=heads_of(width, heads, where),
    grid=grid,
    cls=cls_names(count, cls, where),
    mask_token=mask_token,
  )


def text_out(params, tower):
  """{name: array} of a text tower."""
  p = flat(params)
  out = {'token_embedding.weight': p['embedding']}
  for i in range(tower.depth):
    out |= _block_out(p, i, f'transformer.resblocks.{i}.', _TEXT)
  return out | {'ln_final.weight': p['norm/scale'], 'ln_final.bias': p['norm/bias']}


def text_in(arrays, tower, where='text tower'):
  """Parameters of a text tower; InputError for a name or a shape that does not fit."""
  r = files.Reader(arrays, where)
  out = {'embedding': r.take('token_embedding.weight', tower.vocab, tower.width)}
  out |= _stack(
    [_block_in(r, f'transformer.resblocks.{i}.', _TEXT, tower) for i in range(tower.depth)]
  )
  out |= {
    'norm/scale': r.take('ln_final.weight', tower.width),
    'norm/bias': r.take('ln_final.bias', tower.width),
  }
  r.done()
  return tree.nested(out)


def text_tower(arrays, *, heads=None, where='text tower'):
  """What text tower the arrays are of."""
  r = files.Reader(arrays, where)
  vocab, width = _dims(r, 'token_embedding.weight', 2)
  return schema.TextTower(
    kind='text',
    width=width,
    depth=r.count('transformer.resblocks.{}.ln_1.weight'),
    heads=heads_of(width, heads, where),
    vocab=vocab,
    mlp=_dims(r, 'transformer.resblocks.0.mlp.c_fc.weight', 2)[0],
  )


def heads_of(width, heads, where):
  """The number of attention heads, from elsewhere or as in the released model of this width."""
  if not heads and width not in HEADS:
    raise InputError(
      f'{where}: got width {width}, of which no released model is; expected one of {sorted(HEADS)}, or '
      'a folder with a config.json or tips_jax.json that tells the number of heads'
    )
  return heads or HEADS[width]


def cls_names(count, names, where):
  """Names of the CLS tokens: given, or those of TIPS; a lone one is 'cls'."""
  names = tuple(names or (OFFICIAL_CLS if count == 2 else ('cls',)))
  if len(names) != count:
    raise InputError(f'{where}: got {count} CLS tokens; expected {len(names)}: {", ".join(names)}')
  return names


def _dims(r, name, rank):
  shape = r.shape(name)
  if len(shape) != rank:
    raise InputError(f'{r.where}: {name}: got shape {shape}; expected {rank} dimensions')
  return shape


def _leaves(layer):
  return ('scale', 'bias') if layer.startswith('norm') else ('kernel', 'bias')


def _block_out(p, i, prefix, table):
  out = {}
  for theirs, ours in table.items():
    for word, leaf in zip(('weight', 'bias'), _leaves(ours[0])):
      parts = [p[f'encoder/blocks/{layer}/{leaf}'][i].T for layer in ours]
      out[prefix + theirs.format(word)] = parts[0] if len(parts) == 1 else np.concatenate(parts)
  return out


def _block_in(r, prefix, table, tower):
  d, hidden, block = tower.width, tower.mlp, {}
  for theirs, ours in table.items():
    there = d if not ours[0].startswith('mlp') or ours == ('mlp/down',) else hidden
    here = hidden if ours == ('mlp/down',) else d
    norm, n = ours[0].startswith('norm'), len(ours)
    for word, leaf in zip(('weight', 'bias'), _leaves(ours[0])):
      shape = (n * there,) if norm or word == 'bias' else (n * there, here)
      parts = np.split(r.take(prefix + theirs.format(word), *shape), n)
      block |= {f'{layer}/{leaf}': part.T for layer, part in zip(ours, parts)}
  return block


def _stack(blocks):
  return {f'encoder/blocks/{name}': np.stack([b[name] for b in blocks]) for name in blocks[0]}

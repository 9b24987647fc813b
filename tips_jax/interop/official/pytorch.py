"""The layout of the official PyTorch code, also of transformers (Tipsv2) and timm.

Names of tensors: google-deepmind/tips, pytorch/{image,text}_encoder.py. Our towers have no
LayerScale and no position of the CLS token: they are written as ones and zeros, and on reading
folded into the weights that they multiply or are added to.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tips_jax.core import schema, strict, tree
from tips_jax.core.errors import InputError
from tips_jax.interop import arrays as files
from tips_jax.interop.weights import OFFICIAL_CLS, flat

Table = dict[str, tuple[str, ...]]
# Attention heads of the released models by width: the files do not say.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24}
# Their layer -> ours, concatenated where there are several; '{}' is weight or bias.
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


def image_out(params: dict[str, Any], tower: schema.ViT) -> dict[str, np.ndarray]:
  """{name: array} of an image tower."""
  p = flat(params)
  d = tower.width
  # The CLS token's position comes first in their table, and the first CLS token is separate.
  cls_position = np.zeros((1, 1, d), np.float32)
  patch_positions = p['posembed'].reshape(1, -1, d)
  out = {
    'cls_token': p['cls'][:, :1],
    'pos_embed': np.concatenate([cls_position, patch_positions], axis=1),
  }
  if len(tower.cls) > 1:
    out['register_tokens'] = p['cls'][:, 1:]
  out['mask_token'] = np.zeros((1, d), np.float32)
  if tower.mask_token:
    out['mask_token'] = p['mask_token']
  out['patch_embed.proj.weight'] = p['embedding/kernel'].transpose(3, 2, 0, 1)
  out['patch_embed.proj.bias'] = p['embedding/bias']
  for i in range(tower.depth):
    out |= _block_out(p, i, f'blocks.{i}.', _IMAGE | _FFN[tower.ffn])
    # Layer scale, which ours has in the weights already.
    out[f'blocks.{i}.ls1.gamma'] = np.ones(d, np.float32)
    out[f'blocks.{i}.ls2.gamma'] = np.ones(d, np.float32)
  return out | {'norm.weight': p['norm/scale'], 'norm.bias': p['norm/bias']}


def image_in(
  arrays: dict[str, np.ndarray], tower: schema.ViT, where: str = 'image tower'
) -> dict[str, Any]:
  """Parameters of an image tower, taken out of `arrays`; InputError for a name or a shape that does
  not fit.
  """
  r = files.Reader(arrays, where)
  d = tower.width
  grid = tower.grid
  position = r.take('pos_embed', 1, grid * grid + 1, d)
  # Their model adds the first position to the first CLS token alone, registers get none.
  cls = [r.take('cls_token', 1, 1, d) + position[:, :1]]
  if 'register_tokens' in r:
    cls.append(r.take('register_tokens', 1, len(tower.cls) - 1, d))
  kernel = r.take('patch_embed.proj.weight', d, 3, tower.patch, tower.patch)
  out = {
    'embedding/kernel': kernel.transpose(2, 3, 1, 0),
    'embedding/bias': r.take('patch_embed.proj.bias', d),
    'posembed': position[:, 1:].reshape(1, grid, grid, d),
    'cls': np.concatenate(cls, axis=1),
  }
  mask_token = np.zeros((1, d), np.float32)
  if 'mask_token' in r:  # taken even if the tower has no use for it: no array may be left
    mask_token = r.take('mask_token', 1, d)
  if tower.mask_token:
    out['mask_token'] = mask_token

  def block(i):
    result = _block_in(r, f'blocks.{i}.', _IMAGE | _FFN[tower.ffn], tower)
    _fold_layer_scale(r, f'blocks.{i}.ls1.gamma', result, 'attention/out', d)
    _fold_layer_scale(r, f'blocks.{i}.ls2.gamma', result, 'mlp/down', d)
    return result

  out |= _stack(map(block, range(tower.depth)), tower.depth)
  out['norm/scale'] = r.take('norm.weight', d)
  out['norm/bias'] = r.take('norm.bias', d)
  r.done()
  return tree.nested(out)


def _fold_layer_scale(
  r: files.Reader, name: str, block: dict[str, np.ndarray], layer: str, width: int
) -> None:
  if name not in r:
    return
  gamma = r.take(name, width)
  # gamma (x W + b) = x (gamma W) + gamma b: the same function without a parameter of its own.
  for leaf in ('kernel', 'bias'):
    block[f'{layer}/{leaf}'] = block[f'{layer}/{leaf}'] * gamma


def image_tower(
  arrays: dict[str, np.ndarray],
  *,
  heads: int | None = None,
  cls: Sequence[str] | None = None,
  mask_token: bool | None = None,
  where: str = 'image tower',
) -> schema.ViT:
  """The config of an image tower, from its arrays.

  What the arrays do not show is given: the number of heads (else that of the released model of this
  width), names of the CLS tokens, and whether a mask token of zeros is one.
  """
  r = files.Reader(arrays, where)
  width, _, patch, _ = r.shape('patch_embed.proj.weight', 4)
  grid = math.isqrt(max(r.shape('pos_embed', 3)[1] - 1, 0))
  if 'blocks.0.mlp.w12.weight' in r:
    ffn = 'swiglu'
    mlp = r.shape('blocks.0.mlp.w3.weight', 2)[1]
  else:
    ffn = 'gelu'
    mlp = r.shape('blocks.0.mlp.fc1.weight', 2)[0]
  count = 1
  if 'register_tokens' in r:
    count += r.shape('register_tokens', 3)[1]
  if mask_token is None:
    mask_token = bool('mask_token' in r and np.any(r.peek('mask_token')))
  fields = dict(
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
  return strict.build(schema.ViT, fields, where)


def text_out(params: dict[str, Any], tower: schema.TextTower) -> dict[str, np.ndarray]:
  """{name: array} of a text tower."""
  p = flat(params)
  out = {'token_embedding.weight': p['embedding']}
  for i in range(tower.depth):
    out |= _block_out(p, i, f'transformer.resblocks.{i}.', _TEXT)
  return out | {'ln_final.weight': p['norm/scale'], 'ln_final.bias': p['norm/bias']}


def text_in(
  arrays: dict[str, np.ndarray], tower: schema.TextTower, where: str = 'text tower'
) -> dict[str, Any]:
  """Parameters of a text tower, taken out of `arrays`; InputError for a name or a shape that does
  not fit.
  """
  r = files.Reader(arrays, where)
  out = {'embedding': r.take('token_embedding.weight', tower.vocab, tower.width)}

  def block(i):
    return _block_in(r, f'transformer.resblocks.{i}.', _TEXT, tower)

  out |= _stack(map(block, range(tower.depth)), tower.depth)
  out['norm/scale'] = r.take('ln_final.weight', tower.width)
  out['norm/bias'] = r.take('ln_final.bias', tower.width)
  r.done()
  return tree.nested(out)


def text_tower(
  arrays: dict[str, np.ndarray], *, heads: int | None = None, where: str = 'text tower'
) -> schema.TextTower:
  """The config of a text tower, from its arrays."""
  r = files.Reader(arrays, where)
  vocab, width = r.shape('token_embedding.weight', 2)
  fields = dict(
    kind='text',
    width=width,
    depth=r.count('transformer.resblocks.{}.ln_1.weight'),
    heads=heads_of(width, heads, where),
    vocab=vocab,
    mlp=r.shape('transformer.resblocks.0.mlp.c_fc.weight', 2)[0],
  )
  return strict.build(schema.TextTower, fields, where)


def heads_of(width: int, heads: int | None, where: str) -> int:
  """The number of attention heads: as given, or as in the released model of this width."""
  # Arrays do not show it: the heads' projections are side by side in one matrix.
  if heads:
    return heads
  if width not in HEADS:
    raise InputError(
      f'{where}: got width {width}, of which no released model is; expected one of '
      f'{sorted(HEADS)}, or a folder with a config.json or tips_jax.json that tells the number of '
      'heads'
    )
  return HEADS[width]


def cls_names(count: int, names: Sequence[str] | None, where: str) -> tuple[str, ...]:
  """Names of the CLS tokens: as given, or those of TIPS; a single one is 'cls'."""
  if not names:
    names = {2: OFFICIAL_CLS}.get(count, ('cls',))
  names = tuple(names)
  if len(names) != count:
    raise InputError(f'{where}: got {count} CLS tokens; expected {len(names)}: {", ".join(names)}')
  return names


def _leaves(layer: str) -> dict[str, str]:
  """Their leaf of a layer -> ours."""
  if layer.startswith('norm'):
    return {'weight': 'scale', 'bias': 'bias'}
  return {'weight': 'kernel', 'bias': 'bias'}


def _block_out(
  p: dict[str, np.ndarray], i: int, prefix: str, table: Table
) -> dict[str, np.ndarray]:
  """Arrays of layer i. Kernels are [in, out] here and [out, in] in torch."""
  out = {}
  for theirs, ours in table.items():
    for their_leaf, leaf in _leaves(ours[0]).items():
      parts = [p[f'encoder/blocks/{layer}/{leaf}'][i].T for layer in ours]
      # A single layer stays a view: no copy of a large model.
      out[prefix + theirs.format(their_leaf)] = (
        parts[0] if len(parts) == 1 else np.concatenate(parts)
      )
  return out


def _block_in(
  r: files.Reader, prefix: str, table: Table, tower: schema.ViT | schema.TextTower
) -> dict[str, np.ndarray]:
  block = {}
  for theirs, ours in table.items():
    in_width = tower.width
    out_width = tower.width
    if ours == ('mlp/down',):
      in_width = tower.mlp
    elif ours[0].startswith('mlp'):
      out_width = tower.mlp
    for their_leaf, leaf in _leaves(ours[0]).items():
      # Query, key and value, or gate and up, are one matrix there.
      shape = (len(ours) * out_width,)
      if leaf == 'kernel':
        shape += (in_width,)
      stacked = r.take(prefix + theirs.format(their_leaf), *shape)
      for layer, part in zip(ours, np.split(stacked, len(ours))):
        block[f'{layer}/{leaf}'] = part.T
  return block


def _stack(blocks: Iterable[dict[str, np.ndarray]], depth: int) -> dict[str, np.ndarray]:
  """Layers on a leading axis, as nn.scan holds them; blocks: in order, each read when it is asked
  for, so that a tower is never in memory twice.
  """
  result = {}
  for i, block in enumerate(blocks):
    for name, x in block.items():
      if not i:
        result[name] = np.empty((depth, *x.shape), np.float32)
      result[name][i] = x
  return {f'encoder/blocks/{name}': x for name, x in result.items()}

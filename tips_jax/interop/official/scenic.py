"""The layout of the official JAX code (Scenic): names <-> parameters.

Names of tensors: google-deepmind/tips, scenic/models/{vit,text}.py. So400m's text tower has the 27
layers of the paper and of the PyTorch weights; the official JAX code builds 12, a bug.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tips_jax.core import schema, strict, tree
from tips_jax.interop import arrays as files
from tips_jax.interop.official.pytorch import cls_names
from tips_jax.interop.weights import flat

TEMPERATURE = 'temperature_contrastive'
_ATTENTION = 'MultiHeadDotProductAttention_0/'
_BLOCK = {
  'LayerNorm_0': 'norm1',
  'LayerNorm_1': 'norm2',
  _ATTENTION + 'query': 'attention/query',
  _ATTENTION + 'key': 'attention/key',
  _ATTENTION + 'value': 'attention/value',
  _ATTENTION + 'out': 'attention/out',
}
_MLP = {'MlpBlock_0/Dense_0': 'mlp/up', 'MlpBlock_0/Dense_1': 'mlp/down'}
_SWIGLU = {
  'FFNSwiGluFused_0/Dense_0': 'mlp/gate',
  'FFNSwiGluFused_0/Dense_1': 'mlp/up',
  'FFNSwiGluFused_0/Dense_2': 'mlp/down',
}
_TOKENS = 'encoder/ToTokenSequence_0/'
_IMAGE = {
  _TOKENS + 'embedding/kernel': 'embedding/kernel',
  _TOKENS + 'embedding/bias': 'embedding/bias',
  _TOKENS + 'posembed_input': 'posembed',
  _TOKENS + 'cls': 'cls',
  'encoder/encoder_norm/scale': 'norm/scale',
  'encoder/encoder_norm/bias': 'norm/bias',
}
_TEXT = {
  'token_emb/emb_var': 'embedding',
  'text_encoder_norm/scale': 'norm/scale',
  'text_encoder_norm/bias': 'norm/bias',
}
_IMAGE_BLOCK = 'encoder/transformer/encoderblock_{}/'
_TEXT_BLOCK = 'transformer/encoderblock_{}/'


def image_out(params: dict[str, Any], tower: schema.ViT) -> dict[str, np.ndarray]:
  """{name: array} of an image tower. The layout has no mask token."""
  p = flat(params)
  return {theirs: p[ours] for theirs, ours in _IMAGE.items()} | _blocks_out(p, tower, _IMAGE_BLOCK)


def text_out(params: dict[str, Any], tower: schema.TextTower) -> dict[str, np.ndarray]:
  """{name: array} of a text tower."""
  p = flat(params)
  return {theirs: p[ours] for theirs, ours in _TEXT.items()} | _blocks_out(p, tower, _TEXT_BLOCK)


def image_in(
  arrays: dict[str, np.ndarray], tower: schema.ViT, where: str = 'image tower'
) -> dict[str, Any]:
  """Parameters of an image tower, taken out of `arrays`; InputError for a name or a shape that does
  not fit.
  """
  r = files.Reader(arrays, where)
  d = tower.width
  shapes = {
    'embedding/kernel': (tower.patch, tower.patch, 3, d),
    'posembed': (1, tower.grid, tower.grid, d),
    'cls': (1, len(tower.cls), d),
  }
  out = {ours: r.take(theirs, *shapes.get(ours, (d,))) for theirs, ours in _IMAGE.items()}
  if tower.mask_token:  # which this layout cannot hold
    out['mask_token'] = np.zeros((1, d), np.float32)
  out |= _blocks_in(r, tower, _IMAGE_BLOCK)
  r.done()
  return tree.nested(out)


def text_in(
  arrays: dict[str, np.ndarray], tower: schema.TextTower, where: str = 'text tower'
) -> dict[str, Any]:
  """Parameters of a text tower, taken out of `arrays`; InputError for a name or a shape that does
  not fit.
  """
  r = files.Reader(arrays, where)
  d = tower.width
  shapes = {'embedding': (tower.vocab, d)}
  out = {ours: r.take(theirs, *shapes.get(ours, (d,))) for theirs, ours in _TEXT.items()}
  out |= _blocks_in(r, tower, _TEXT_BLOCK)
  r.done()
  return tree.nested(out)


def image_tower(
  arrays: dict[str, np.ndarray],
  *,
  heads: int | None = None,
  cls: Sequence[str] | None = None,
  mask_token: bool | None = None,
  where: str = 'image tower',
) -> schema.ViT:
  """The config of an image tower, from its arrays, which show `heads` too."""
  r = files.Reader(arrays, where)
  patch, _, _, width = r.shape(_TOKENS + 'embedding/kernel', 4)
  first = _IMAGE_BLOCK.format(0)
  ffn = 'gelu'
  if first + 'FFNSwiGluFused_0/Dense_0/kernel' in r:
    ffn = 'swiglu'
  fields = dict(
    kind='vit',
    width=width,
    depth=r.count(_IMAGE_BLOCK + 'LayerNorm_0/scale'),
    heads=r.shape(f'{first}{_ATTENTION}query/kernel', 3)[1],
    mlp=r.shape(first + next(iter(_ffn(ffn))) + '/kernel', 2)[1],
    ffn=ffn,
    patch=patch,
    grid=r.shape(_TOKENS + 'posembed_input', 4)[1],
    mask_token=bool(mask_token),
    cls=cls_names(r.shape(_TOKENS + 'cls', 3)[1], cls, where),
  )
  return strict.build(schema.ViT, fields, where)


def text_tower(
  arrays: dict[str, np.ndarray], *, heads: int | None = None, where: str = 'text tower'
) -> schema.TextTower:
  """The config of a text tower, from its arrays, which show `heads` too."""
  r = files.Reader(arrays, where)
  vocab, width = r.shape('token_emb/emb_var', 2)
  first = _TEXT_BLOCK.format(0)
  fields = dict(
    kind='text',
    width=width,
    depth=r.count(_TEXT_BLOCK + 'LayerNorm_0/scale'),
    heads=r.shape(f'{first}{_ATTENTION}query/kernel', 3)[1],
    vocab=vocab,
    mlp=r.shape(first + 'MlpBlock_0/Dense_0/kernel', 2)[1],
  )
  return strict.build(schema.TextTower, fields, where)


def _ffn(kind: str) -> dict[str, str]:
  return {'swiglu': _SWIGLU}.get(kind, _MLP)


class _Entry(NamedTuple):
  """An array of a block."""

  theirs: str  # name
  ours: str
  their_shape: tuple[int, ...]  # attention has the axis of heads apart
  our_shape: tuple[int, ...]


def _entries(tower: schema.ViT | schema.TextTower) -> Iterator[_Entry]:
  """Every array of a block."""
  d = tower.width
  heads = (tower.heads, d // tower.heads)
  # Of each layer: the shape of their kernel and of their bias, and of our kernel.
  shapes = {
    'attention/query': ((d, *heads), heads, (d, d)),
    'attention/key': ((d, *heads), heads, (d, d)),
    'attention/value': ((d, *heads), heads, (d, d)),
    'attention/out': ((*heads, d), (d,), (d, d)),
    'mlp/gate': ((d, tower.mlp), (tower.mlp,), (d, tower.mlp)),
    'mlp/up': ((d, tower.mlp), (tower.mlp,), (d, tower.mlp)),
    'mlp/down': ((tower.mlp, d), (d,), (tower.mlp, d)),
  }
  for theirs, ours in (_BLOCK | _ffn(getattr(tower, 'ffn', 'relu'))).items():
    if ours.startswith('norm'):
      yield _Entry(f'{theirs}/scale', f'{ours}/scale', (d,), (d,))
      yield _Entry(f'{theirs}/bias', f'{ours}/bias', (d,), (d,))
    else:
      kernel, bias, our_kernel = shapes[ours]
      yield _Entry(f'{theirs}/kernel', f'{ours}/kernel', kernel, our_kernel)
      yield _Entry(f'{theirs}/bias', f'{ours}/bias', bias, our_kernel[1:])


def _blocks_out(
  p: dict[str, np.ndarray], tower: schema.ViT | schema.TextTower, block: str
) -> dict[str, np.ndarray]:
  out = {}
  for i in range(tower.depth):
    for entry in _entries(tower):
      x = p[f'encoder/blocks/{entry.ours}'][i]
      # The same numbers in the same order: ours have the heads side by side.
      out[block.format(i) + entry.theirs] = x.reshape(entry.their_shape)
  return out


def _blocks_in(
  r: files.Reader, tower: schema.ViT | schema.TextTower, block: str
) -> dict[str, np.ndarray]:
  # Layers on a leading axis, as nn.scan holds them; theirs have an array for each.
  out = {}
  for entry in _entries(tower):
    layers = []
    for i in range(tower.depth):
      x = r.take(block.format(i) + entry.theirs, *entry.their_shape)
      layers.append(x.reshape(entry.our_shape))
    out[f'encoder/blocks/{entry.ours}'] = np.stack(layers)
  return out

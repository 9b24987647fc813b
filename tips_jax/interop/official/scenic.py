"""The layout of the official JAX code (Scenic): names <-> parameters.

Tensor tables: google-deepmind/tips, scenic/models/{vit,text}.py. So400m's text tower has the 27
layers of the paper and of the PyTorch weights; the official JAX code builds 12, a fault of its own.
"""

import numpy as np

from tips_jax.core import schema, tree
from tips_jax.interop import arrays as files
from tips_jax.interop.official.pytorch import cls_names
from tips_jax.interop.weights import flat

TEMPERATURE = 'temperature_contrastive'
_ATTENTION = 'MultiHeadDotProductAttention_0/'
_BLOCK = {
  'LayerNorm_0': 'norm1',
  'LayerNorm_1': 'norm2',
  **{_ATTENTION + n: f'attention/{n}' for n in ('query', 'key', 'value', 'out')},
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
_IMAGE_BLOCK, _TEXT_BLOCK = 'encoder/transformer/encoderblock_{}/', 'transformer/encoderblock_{}/'


def image_out(params, tower):
  """{name: array} of an image tower. The layout has no mask token."""
  p = flat(params)
  return {theirs: p[ours] for theirs, ours in _IMAGE.items()} | _blocks_out(p, tower, _IMAGE_BLOCK)


def text_out(params, tower):
  """{name: array} of a text tower."""
  p = flat(params)
  return {theirs: p[ours] for theirs, ours in _TEXT.items()} | _blocks_out(p, tower, _TEXT_BLOCK)


def image_in(arrays, tower, where='image tower'):
  """Parameters of an image tower; InputError for a name or a shape that does not fit."""
  r, d = files.Reader(arrays, where), tower.width
  shapes = {
    'embedding/kernel': (tower.patch, tower.patch, 3, d),
    'posembed': (1, tower.grid, tower.grid, d),
    'cls': (1, len(tower.cls), d),
  }
  out = {ours: r.take(theirs, *shapes.get(ours, (d,))) for theirs, ours in _IMAGE.items()}
  if tower.mask_token:
    out['mask_token'] = np.zeros((1, d), np.float32)
  out |= _blocks_in(r, tower, _IMAGE_BLOCK)
  r.done()
  return tree.nested(out)


def text_in(arrays, tower, where='text tower'):
  """Parameters of a text tower; InputError for a name or a shape that does not fit."""
  r, d = files.Reader(arrays, where), tower.width
  out = {
    ours: r.take(theirs, *({'embedding': (tower.vocab, d)}.get(ours, (d,))))
    for theirs, ours in _TEXT.items()
  }
  out |= _blocks_in(r, tower, _TEXT_BLOCK)
  r.done()
  return tree.nested(out)


def image_tower(arrays, *, heads=None, cls=None, mask_token=None, where='image tower'):
  """What image tower the arrays are of; `heads` is not needed, the arrays tell."""
  r = files.Reader(arrays, where)
  patch, _, _, width = r.shape(_TOKENS + 'embedding/kernel')
  first, ffn = _IMAGE_BLOCK.format(0), 'gelu'
  if first + 'FFNSwiGluFused_0/Dense_0/kernel' in r:
    ffn = 'swiglu'
  return schema.ViT(
    kind='vit',
    width=width,
    depth=r.count(_IMAGE_BLOCK + 'LayerNorm_0/scale'),
    heads=r.shape(f'{first}{_ATTENTION}query/kernel')[1],
    mlp=r.shape(first + next(iter(_ffn(ffn))) + '/kernel')[1],
    ffn=ffn,
    patch=patch,
    grid=r.shape(_TOKENS + 'posembed_input')[1],
    mask_token=bool(mask_token),
    cls=cls_names(r.shape(_TOKENS + 'cls')[1], cls, where),
  )


def text_tower(arrays, *, heads=None, where='text tower'):
  """What text tower the arrays are of."""
  r = files.Reader(arrays, where)
  vocab, width = r.shape('token_emb/emb_var')
  first = _TEXT_BLOCK.format(0)
  return schema.TextTower(
    kind='text',
    width=width,
    depth=r.count(_TEXT_BLOCK + 'LayerNorm_0/scale'),
    heads=r.shape(f'{first}{_ATTENTION}query/kernel')[1],
    vocab=vocab,
    mlp=r.shape(first + 'MlpBlock_0/Dense_0/kernel')[1],
  )


def _ffn(kind):
  return _SWIGLU if kind == 'swiglu' else _MLP


def _entries(tower):
  """(their name, ours, shape there, shape here) of every array of a block."""
  d, h, f = tower.width, tower.heads, tower.mlp
  for theirs, ours in (_BLOCK | _ffn(getattr(tower, 'ffn', 'relu'))).items():
    if ours.startswith('norm'):
      yield from ((f'{theirs}/{leaf}', f'{ours}/{leaf}', (d,), (d,)) for leaf in ('scale', 'bias'))
      continue
    kernel = {'attention/out': (h, d // h, d), 'mlp/down': (f, d)}.get(
      ours, (d, h, d // h) if ours.startswith('attention') else (d, f)
    )
    bias = (h, d // h) if kernel[1:] == (h, d // h) else kernel[-1:]
    flat_kernel = (d, d) if ours.startswith('attention') else kernel
    yield f'{theirs}/kernel', f'{ours}/kernel', kernel, flat_kernel
    yield f'{theirs}/bias', f'{ours}/bias', bias, flat_kernel[1:]


def _blocks_out(p, tower, block):
  return {
    block.format(i) + theirs: p[f'encoder/blocks/{ours}'][i].reshape(there)
    for i in range(tower.depth)
    for theirs, ours, there, _ in _entries(tower)
  }


def _blocks_in(r, tower, block):
  return {
    f'encoder/blocks/{ours}': np.stack(
      [r.take(block.format(i) + theirs, *there).reshape(here) for i in range(tower.depth)]
    )
    for theirs, ours, there, here in _entries(tower)
  }

"""Name -> module: builds, initializes and applies any tower of the schema."""

import zlib

import jax
import jax.numpy as jnp

from tips_jax.core import schema
from tips_jax.models import heads, text, vit

_MODULES = {
  'vit': vit.ViT,
  'pixel_decoder': vit.PixelDecoder,
  'text': text.TextTower,
  'dino_head': heads.DINOHead,
  'projection': heads.ProjectionHead,
  'logit': heads.Logit,
}


def inputs(tower):
  """{input name: example array} of the smallest call; the names are those that a pass may give."""
  i = lambda *shape: jnp.zeros(shape, jnp.int32)
  f = lambda *shape: jnp.zeros(shape, jnp.float32)
  b = lambda *shape: jnp.zeros(shape, bool)
  match tower:
    case schema.ViT():
      images = jnp.zeros((1, 1, tower.patch, tower.patch, 3), jnp.uint8)
      return {'images': images, 'visible': i(1, 1, 1)} | (
        {'mask': b(1, 1, 1)} if tower.mask_token else {}
      )
    case schema.TextTower():
      return {'ids': i(1, 2)}
    case schema.DINOHead():
      return {'tokens': f(1, 1, 1, tower.width), 'masked_indices': i(1, 1, 1)}
    case schema.ProjectionHead():
      return {'x': f(1, tower.width)}
    case schema.PixelDecoder():
      return {'patch': f(1, 1, 1, tower.width), 'visible': i(1, 1, 1), 'mask': b(1, 1, 1)}
    case schema.Logit():
      return {}


OPTIONAL = {'vit': {'mask', 'visible'}, 'dino_head': {'masked_indices'}}


def outputs(tower):
  """Names that a pass of this tower adds to the features."""
  match tower:
    case schema.ViT():
      return {*tower.cls, 'patch'}
    case schema.TextTower():
      return {'text'}
    case schema.DINOHead():
      return {'z'}
    case schema.ProjectionHead():
      return {'embedding'}
    case schema.PixelDecoder():
      return {'pixels'}
    case schema.Logit():
      return set()


def inspect(
  params, tower, compute, images_BHWC, *, cls, project, intermediate_layers=(), values=False
):
  """What evaluators read of an image tower, float32: each CLS token [B, D], 'patch' [B, h, w, D],
  'embedding' [B, E].

  cls: token of the joint space; project: [..., D] -> [..., E], into it. intermediate_layers:
  numbers of blocks; they add 'intermediate_layers', a tuple of (patch [B, h, w, D], first CLS [B,
  D]) after each. values: adds 'value_patch' [B, h, w, E], as in `vit.inspect`, in the joint space.
  """
  h, w = (-(-s // tower.patch) for s in images_BHWC.shape[1:3])
  token = lambda x: x[:, 0].astype(jnp.float32)
  grid = lambda x: token(x).reshape(len(images_BHWC), h, w, -1)
  out = vit.inspect(
    params,
    tower,
    compute,
    images_BHWC[:, None],
    intermediate_layers=intermediate_layers,
    values=values,
  )
  found = {name: token(out[name]) for name in tower.cls}
  found |= {'patch': grid(out['patch']), 'embedding': project(found[cls])}
  if intermediate_layers:
    found['intermediate_layers'] = tuple(
      (grid(t['patch']), token(t[tower.cls[0]])) for t in out['intermediate_layers']
    )
  return found | ({'value_patch': project(grid(out['value_patch']))} if values else {})


TOGETHER = (
  'vit',
  'text',
)  # kinds of which one call takes several inputs, and gathers the weights once


def init(name, tower, *, seed):
  """Float32 parameters of one tower; the same for a name and seed whatever other towers there
  are.
  """
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
  module, example = _MODULES[tower.kind](tower, schema.Compute(dtype='float32')), inputs(tower)
  if tower.kind in TOGETHER:
    return module.init(key, example)['params']
  return module.init(key, **example)['params']


def apply(params, tower, compute, arrays, *, rng=None, rows=None):
  """Output dict of one tower. rng, rows: key and global row numbers for dropout; without them there
  is none.
  """
  return apply_all(params, tower, compute, [arrays], rng=rng, rows=rows)[0]


def apply_all(params, tower, compute, inputs, *, rng=None, rows=None):
  """Output dicts of one tower for several dicts of inputs, each on the same rows."""
  module, rngs = _MODULES[tower.kind](tower, compute), {}
  if tower.kind not in TOGETHER:
    return [module.apply({'params': params}, **one) for one in inputs]
  if rng is not None and getattr(tower, 'dropout', 0.0):
    rngs = {'dropout': rng}
    inputs = [one | {'rows': rows * len(inputs) + i} for i, one in enumerate(inputs)]
  return module.apply({'params': params}, *inputs, rngs=rngs)

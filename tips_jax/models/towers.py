"""Name -> module: builds, initializes and applies any tower of the schema."""

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tips_jax.core import schema
from tips_jax.models import convolution, heads, stages, swin, text, vit

# A tower's module says of itself, from its config:
#   inputs(config)            {name: example array} of the smallest call
#   OPTIONAL                  names of inputs that a pass may leave out
#   outputs(config, shapes)   {name: shape} of what a pass adds to the features
#   flops(config, shapes)     forward FLOPs of one image or text
#   ANY_AXES                  (if it has it) names of integers that may have axes before the last
#   TOGETHER                  whether one call takes several inputs, and gathers the weights once
#   STATISTICS                whether a training step changes some of its parameters (stages.py);
#                             where it does not say, it does not
MODULES = {
  'vit': vit.ViT,
  'resnet': convolution.ResNet,
  'mobilenetv2': convolution.MobileNetV2,
  'swin': swin.Swin,
  'pixel_decoder': vit.PixelDecoder,
  'text': text.TextTower,
  'dino_head': heads.DINOHead,
  'projection': heads.ProjectionHead,
  'region_head': heads.RegionHead,
  'fusion': heads.Fusion,
  'word_head': heads.WordHead,
  'logit': heads.Logit,
}


def module(tower: schema.Tower) -> type[nn.Module]:
  """The module of a tower; its static methods describe it."""
  return MODULES[tower.kind]


def inputs(tower: schema.Tower) -> dict[str, jax.Array]:
  """{input name: example array} of the smallest call; the names are those that a pass may give."""
  return module(tower).inputs(tower)


def outputs(tower: schema.Tower) -> set[str]:
  """Names that a pass of this tower adds to the features."""
  shapes = {name: x.shape[1:] for name, x in inputs(tower).items()}
  return set(module(tower).outputs(tower, shapes))


def has_statistics(tower: schema.Tower) -> bool:
  """Whether passes of the student tell what some of the tower's parameters should be next, in the
  output `statistics`: the running averages of batch norms.
  """
  return getattr(module(tower), 'STATISTICS', False)


def inspect(
  params: Mapping[str, Any],
  tower: schema.Tower,
  compute: schema.Compute,
  images_BHWC: jax.Array,
  *,
  cls: str,
  project: Callable[[jax.Array], jax.Array],
  intermediate_layers: Sequence[int] = (),
  values: bool = False,
) -> dict[str, Any]:
  """What evaluators read of an image tower, float32: each CLS token [B, D], 'patch' [B, h, w, D],
  'embedding' [B, E].

  cls: token of the joint space; project: [..., D] -> [..., E], into it. intermediate_layers:
  numbers of blocks; they add 'intermediate_layers', a tuple of (patch [B, h, w, D], first CLS [B,
  D]) after each. values: adds 'value_patch' [B, h, w, E], as in `vit.inspect`, in the joint space.
  """
  images, height, width, _ = images_BHWC.shape
  h = math.ceil(height / tower.patch)
  w = math.ceil(width / tower.patch)

  def token(x):
    return x[:, 0].astype(jnp.float32)  # of the one view

  def grid(x):
    return token(x).reshape(images, h, w, -1)

  reads = dict(intermediate_layers=intermediate_layers, values=values)
  if isinstance(tower, schema.ViT):
    out = vit.inspect(params, tower, compute, images_BHWC[:, None], **reads)
  else:
    out = stages.inspect(module(tower)(tower, compute), params, images_BHWC[:, None], **reads)
  features = {name: token(out[name]) for name in tower.cls}
  features['patch'] = grid(out['patch'])
  features['embedding'] = project(features[cls])
  if intermediate_layers:
    features['intermediate_layers'] = tuple(
      (grid(layer['patch']), token(layer[tower.cls[0]])) for layer in out['intermediate_layers']
    )
  if values:
    features['value_patch'] = project(grid(out['value_patch']))
  return features


def init(name: str, tower: schema.Tower, *, seed: int) -> dict[str, Any]:
  """Float32 parameters of one tower; the same for a name and seed whatever other towers there
  are.
  """
  # A checksum is the same in every process; Python's hash is not.
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
  kind = module(tower)
  initialize = kind(tower, schema.Compute(dtype='float32')).init
  example = inputs(tower)
  if kind.TOGETHER:
    params = initialize(key, example)['params']
  else:
    params = initialize(key, **example)['params']
  if isinstance(tower, schema.ViT) and tower.last_layer_scale:
    params = vit.with_last_scale(tower, params)
  return params


def apply(
  params: Mapping[str, Any],
  tower: schema.Tower,
  compute: schema.Compute,
  arrays: dict[str, jax.Array],
  *,
  rng: jax.Array | None = None,
  rows: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """Output dict of one tower. rng, rows: key and global row numbers for dropout and drop path;
  without them there is none, and batch norms use their running statistics.
  """
  return apply_all(params, tower, compute, [arrays], rng=rng, rows=rows)[0]


def apply_all(
  params: Mapping[str, Any],
  tower: schema.Tower,
  compute: schema.Compute,
  inputs: list[dict[str, jax.Array]],
  *,
  rng: jax.Array | None = None,
  rows: jax.Array | None = None,
) -> list[dict[str, jax.Array]]:
  """Output dicts of one tower for several dicts of inputs, each on the same rows."""
  kind = module(tower)
  call = functools.partial(kind(tower, compute).apply, {'params': params})
  if rng is not None and has_statistics(tower):
    result = []
    for one in inputs:
      out, changed = call(**one, mutable=stages.STATISTICS)
      result.append(out | changed)
    return result
  if not kind.TOGETHER:
    return [call(**one) for one in inputs]
  rngs = {}
  if rng is not None and drops(tower):
    rngs = {'dropout': rng}
    # Numbers that no other row of any of the inputs has: two texts of an image drop other units.
    inputs = [one | {'rows': rows * len(inputs) + i} for i, one in enumerate(inputs)]
  return call(*inputs, rngs=rngs)


def drops(tower: schema.Tower) -> bool:
  """Whether passes of the student drop something at random."""
  if isinstance(tower, schema.ViT) and tower.adapters.width and tower.adapters.dropout:
    return True
  return bool(getattr(tower, 'dropout', 0.0) or getattr(tower, 'drop_path', 0.0))

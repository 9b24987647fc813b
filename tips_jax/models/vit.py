"""The image tower: a ViT with named CLS tokens, and the pixel decoder of MAE."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tips_jax.core import schema
from tips_jax.core.types import Shapes
from tips_jax.models import adapters, clusters, layers, sines


def patches(images_BHWC: jax.Array, patch: int) -> jax.Array:
  """[B, h, w, patch, patch, 3] of images that are center-padded with zeros to multiples of
  `patch`.
  """
  x = padded(images_BHWC, patch)
  b, h, w, c = x.shape
  return x.reshape(b, h // patch, patch, w // patch, patch, c).swapaxes(2, 3)


def padded(images_BHWC: jax.Array, patch: int) -> jax.Array:
  """Images with zeros around their center, whose sides are multiples of `patch`."""
  pads = [-s % patch for s in images_BHWC.shape[1:3]]
  return jnp.pad(images_BHWC, [(0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)])


def positions(table_1GGD: jax.Array, h: int, w: int) -> jax.Array:
  """[1, h, w, D]: the table, resized (bilinear, antialiased) where the grid differs from it."""
  _, gh, gw, d = table_1GGD.shape
  if (gh, gw) == (h, w):
    return table_1GGD
  return jax.image.resize(table_1GGD, (1, h, w, d), 'bilinear')


def init_positions(kind: str) -> nn.initializers.Initializer:
  """Initializer of a position table [1, G, G, D]."""

  def init(key, shape):
    if kind == 'sincos':
      return sines.grid(shape[1], shape[-1])
    return nn.initializers.normal(1 / math.sqrt(shape[-1]))(key, shape)

  return init


class ViT(nn.Module):
  """ViT of TIPS (arXiv 2410.16512, section 3), of one or several batches of images.

  Each input: images [B, V, H, W, 3], uint8 or floats in [0, 1], not normalized further; mask [B, V,
  P] bool: patches replaced by the mask token, before positions are added; visible [B, V, M] int:
  only these patches are computed; rows [B], their global numbers, for drop path; without them there
  is none.
  Each output: for every CLS name [B, V, D], and `patch` [B, V, P or M, D].

  `config.reduce`: the later blocks see clusters of the patches, whatever these are (pixels, mask
  tokens, or the visible ones alone), and a patch's output is that of its cluster. CLS tokens stay.
  """

  config: schema.ViT
  compute: schema.Compute

  OPTIONAL = frozenset({'mask', 'visible'})
  TOGETHER = True

  @staticmethod
  def inputs(config: schema.ViT) -> dict[str, jax.Array]:
    images = jnp.zeros((1, 1, config.patch, config.patch, 3), jnp.uint8)
    inputs = {'images': images}
    if not config.adapters.width:  # which convolve the whole grid
      inputs['visible'] = jnp.zeros((1, 1, 1), jnp.int32)
    if config.mask_token:
      inputs['mask'] = jnp.zeros((1, 1, 1), bool)
    return inputs

  @staticmethod
  def outputs(config: schema.ViT, inputs: Shapes) -> Shapes:
    views, height, width, _ = inputs['images']
    patches = math.ceil(height / config.patch) * math.ceil(width / config.patch)
    if 'visible' in inputs:
      patches = inputs['visible'][-1]
    tokens = dict.fromkeys(config.cls, (views, config.width))
    return tokens | {'patch': (views, patches, config.width)}

  @staticmethod
  def flops(config: schema.ViT, inputs: Shapes) -> float:
    views, patches, width = ViT.outputs(config, inputs)['patch']
    tokens = patches + len(config.cls)
    stack = functools.partial(layers.stack_flops, width, mlp=config.mlp, ffn=config.ffn)
    if config.reduce.keep == 1:
      blocks = stack(config.depth, tokens=tokens)
      blocks += adapters.flops(config.adapters, width, config.depth, tokens)
    else:
      before = config.reduce.after
      fewer = clusters.count(config.reduce, patches) + len(config.cls)
      blocks = stack(before, tokens=tokens) + stack(config.depth - before, tokens=fewer)
      blocks += clusters.flops(config.reduce, patches, width)
    return views * blocks + ViT.embedding_flops(config, inputs)

  @staticmethod
  def embedding_flops(config: schema.ViT, inputs: Shapes) -> float:
    views, patches, width = ViT.outputs(config, inputs)['patch']
    return 2 * 3 * config.patch**2 * width * views * patches

  def setup(self) -> None:
    c = self.config
    d = c.width
    dtype = jnp.dtype(self.compute.dtype)
    zeros = nn.initializers.zeros
    self.embedding = PatchEmbedding(c, dtype)
    if c.mask_token:
      self.mask_token = layers.weight(self, 'mask_token', zeros, (1, d), dtype)
    # float32 until it is resized: rounding first would be resized too.
    init = init_positions(c.positions)
    self.posembed = layers.weight(self, 'posembed', init, (1, c.grid, c.grid, d), jnp.float32)
    self.cls = layers.weight(self, 'cls', zeros, (1, len(c.cls), d), dtype)
    self.encoder = _blocks(c, self.compute, c.depth)
    self.norm = layers.Norm(d)

  def __call__(self, *inputs):
    xs = [self.tokens(**one) for one in inputs]
    rows = None
    if 'rows' in inputs[0]:
      views = max(one['images'].shape[1] for one in inputs)
      rows = [_crop_numbers(one['rows'], one['images'].shape[1], views) for one in inputs]
    if self.config.reduce.keep == 1 or self.is_initializing():
      xs = self.encoder(xs, None, rows, grids=grids(self.config, inputs), crops=_views(inputs))
    else:
      xs = self.reduced(inputs, xs, rows)
    return [self.split(x, one['images'].shape[:2]) for one, x in zip(inputs, xs)]

  def tokens(
    self,
    images: jax.Array,
    mask: jax.Array | None = None,
    visible: jax.Array | None = None,
    rows: jax.Array | None = None,  # for the blocks
  ) -> jax.Array:
    """What the first block reads: [B * V, N + (P or M), D]."""
    x = self.embedding(layers.merge_views(images))
    n, h, w, d = x.shape
    if mask is not None:
      x = jnp.where(layers.merge_views(mask).reshape(n, h, w, 1), self.mask_token, x)
    x = (x + positions(self.posembed, h, w).astype(x.dtype)).reshape(n, h * w, d)
    # After the positions: a patch that is left must still know where it is.
    if visible is not None:
      x = layers.gather_tokens(x, layers.merge_views(visible))
    # CLS tokens have no place in the image, so they get no position.
    return jnp.concatenate([jnp.tile(self.cls, (n, 1, 1)), x], axis=1)

  def reduced(
    self, inputs: Sequence[Mapping[str, jax.Array]], xs: list[jax.Array], rows: list | None
  ) -> list[jax.Array]:
    """The blocks in two stacks: all patches, then their clusters; all patches again."""
    c = self.config
    before = c.reduce.after
    params = self.variables['params']
    parts = ((slice(before), before), (slice(before, None), c.depth - before))
    for part, depth in parts:
      if part.start:
        found = [reduction(c, one, x) for one, x in zip(inputs, xs)]
        xs = [merged(c, x, of_x) for x, of_x in zip(xs, found)]
      rngs = {}
      if rows and c.drop_path:
        rngs['dropout'] = self.make_rng('dropout')
      # Not a submodule: the parameters are those of one stack, as without clusters.
      stack = _blocks(c, self.compute, depth, parent=None)
      params_of = {'params': _layers(params, part)}
      xs = stack.apply(params_of, xs, None, rows, crops=_views(inputs), rngs=rngs)
    return [unfolded(c, x, of_x) for x, of_x in zip(xs, found)]

  def split(self, x: jax.Array, lead: tuple[int, int]) -> dict[str, jax.Array]:
    """Tokens after a block -> an output; lead: (B, V)."""
    x = self.norm(x).reshape(*lead, *x.shape[1:])
    names = self.config.cls
    tokens = {name: x[:, :, i] for i, name in enumerate(names)}
    return tokens | {'patch': x[:, :, len(names) :]}


def grids(
  config: schema.ViT, inputs: Sequence[Mapping[str, jax.Array]]
) -> tuple[layers.Grid, ...] | None:
  """Where the patches of each input are among its tokens; only adapters ask."""
  if not config.adapters.width:
    return None
  names = len(config.cls)
  return tuple((names, *_grid(config, one['images'])) for one in inputs)


def _grid(config, images):
  """Rows and columns of the patches of images [B, V, H, W, 3]."""
  return tuple(math.ceil(side / config.patch) for side in images.shape[2:4])


def _views(inputs):
  """How many crops of an image each input has."""
  return [one['images'].shape[1] for one in inputs]


def reduction(config: schema.ViT, inputs: Mapping[str, jax.Array], tokens: jax.Array) -> jax.Array:
  """Clusters [B * V, P, K] of the patches among the tokens [B * V, N + P, D] of an input."""
  h, w = _grid(config, inputs['images'])
  places = jnp.stack(jnp.divmod(jnp.arange(h * w), w), -1)[None]
  if inputs.get('visible') is not None:
    index = layers.merge_views(inputs['visible'])
    places = layers.gather_tokens(jnp.tile(places, (len(index), 1, 1)), index)
  return clusters.assign(tokens[:, len(config.cls) :], places, config.reduce)


def merged(config: schema.ViT, tokens: jax.Array, of_patches: jax.Array) -> jax.Array:
  """The CLS tokens, and the clusters of the others: [B * V, N + K, D]."""
  names = len(config.cls)
  fewer = clusters.merge(tokens[:, names:], of_patches)
  return jnp.concatenate([tokens[:, :names], fewer], axis=1)


def unfolded(config: schema.ViT, tokens: jax.Array, of_patches: jax.Array) -> jax.Array:
  """The CLS tokens, and for each patch its cluster: [B * V, N + P, D]."""
  names = len(config.cls)
  patches = clusters.unfold(tokens[:, names:], of_patches)
  return jnp.concatenate([tokens[:, :names], patches], axis=1)


def _blocks(c, compute, depth, **options):
  return layers.Blocks(
    c.width,
    depth,
    c.heads,
    c.mlp,
    c.ffn,
    0.0,
    compute,
    c.layer_scale,
    c.drop_path,
    _adapter(c, compute),
    **options,
  )


def _adapter(c, compute):
  if not c.adapters.width:
    return None
  return functools.partial(adapters.Convpass, c.adapters, c.width, jnp.dtype(compute.dtype))


def _crop_numbers(rows_B, views, most):
  """A number for each crop that no other of the batch has, nor one of another input: [B * V]."""
  return (rows_B[:, None] * most + jnp.arange(views)).reshape(-1)


def with_last_scale(config: schema.ViT, params: dict[str, Any]) -> dict[str, Any]:
  """The initial parameters with `last_layer_scale` in the last block: the layers of a stack are
  initialized alike.
  """

  def change(path, leaf):
    if path[-1].key == 'gamma':
      return leaf.at[-1].set(config.last_layer_scale)
    return leaf

  encoder = jax.tree_util.tree_map_with_path(change, params['encoder'])
  return params | {'encoder': encoder}


def inspect(
  params: Mapping[str, Any],
  tower: schema.ViT,
  compute: schema.Compute,
  images: jax.Array,
  *,
  intermediate_layers: Sequence[int] = (),
  values: bool = False,
) -> dict[str, Any]:
  """The output of a ViT for images [B, V, H, W, 3], as `towers.apply` gives it, and what some
  evaluators read inside.

  intermediate_layers: numbers of blocks (the first is 0); they add 'intermediate_layers', a tuple,
  in their order, of the output that each would give were it the last (DINOv2's
  get_intermediate_layers(norm=True)). values: adds 'value_patch' [B, V, P, D]: the patches of a
  last block that mixes no tokens, where each token's attention is its own value (MaskCLIP, arXiv
  2112.01071, section 3.2). Raises ValueError for a layer that there is not.
  """
  depth = tower.depth
  if not all(0 <= layer < depth for layer in intermediate_layers):
    raise ValueError(
      f'intermediate_layers: got {tuple(intermediate_layers)}; expected numbers of blocks from 0 '
      f'to {depth - 1}'
    )

  def run(method, *args):
    return ViT(tower, compute).apply({'params': params}, *args, method=method)

  def output(tokens, blocks):
    if reduces and blocks > tower.reduce.after:
      tokens = unfolded(tower, tokens, of_patches)
    return run('split', tokens, images.shape[:2])

  reduces = tower.reduce.keep < 1
  # The stack is cut where something is read, so that no block is computed twice.
  stops = {layer + 1 for layer in intermediate_layers} | {depth}
  if values:
    stops.add(depth - 1)
  if reduces:
    stops.add(tower.reduce.after)
  after = {0: run('tokens', images)}  # number of blocks done -> tokens
  done = 0
  places = grids(tower, [{'images': images}])
  for stop in sorted(stops - {0}):
    part = _layers(params, slice(done, stop))
    tokens = after[done]
    if reduces and done == tower.reduce.after:
      of_patches = reduction(tower, {'images': images}, tokens)
      tokens = merged(tower, tokens, of_patches)
    stack = _blocks(tower, compute, stop - done)
    [after[stop]] = stack.apply({'params': part}, [tokens], grids=places)
    done = stop
  out = output(after[depth], depth)
  if intermediate_layers:
    out['intermediate_layers'] = tuple(
      output(after[layer + 1], layer + 1) for layer in intermediate_layers
    )
  if values:
    block = layers.Block(
      tower.width,
      tower.heads,
      tower.mlp,
      tower.ffn,
      0.0,
      compute,
      tower.layer_scale,
      adapter=_adapter(tower, compute),
      grids=places,
    )
    last = _layers(params, -1)['blocks']
    tokens = after[depth - 1]
    if reduces and depth - 1 == tower.reduce.after:
      tokens = merged(tower, tokens, of_patches)
    tokens = block.apply({'params': last}, tokens, method='values')
    out['value_patch'] = output(tokens, depth)['patch']
  return out


def _layers(params, part):
  """Parameters of some blocks: the first axis of each is the layer."""
  return jax.tree.map(lambda p: p[part], params['encoder'])


class PatchEmbedding(nn.Module):
  """Linear embedding of patches [B, h, w, D] of images [B, H, W, 3]."""

  config: schema.ViT
  dtype: jnp.dtype

  def setup(self) -> None:
    p = self.config.patch
    d = self.config.width
    self.kernel = layers.weight(self, 'kernel', self._init_kernel, (p, p, 3, d), self.dtype)
    self.bias = layers.weight(self, 'bias', self._init_bias, (d,), self.dtype)

  # `centered`: initial weights that read x in [0, 1] as 4 x - 2, by the kernel and the bias.

  def _init_kernel(self, key, shape):
    kernel = nn.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)(key, shape)
    if self.config.centered:
      return kernel * 4
    return kernel

  def _init_bias(self, key, shape):
    if self.config.centered:
      return -self.kernel.sum((0, 1, 2)) / 2
    return jnp.zeros(shape)

  def __call__(self, images_BHWC):
    x = patches(images_BHWC, self.config.patch).astype(self.dtype)
    x = jnp.einsum('bhwpqc,pqcd->bhwd', x, self.kernel)
    # 0..255 is exact in bfloat16, n / 255 is not: the scale comes after the sum.
    if images_BHWC.dtype == jnp.uint8:
      x = x / 255
    return x + self.bias


class PixelDecoder(nn.Module):
  """MAE decoder (arXiv 2111.06377, section 3).

  Input: patch [B, V, M, D] of the visible patches, visible [B, V, M], mask [B, V, P]; cls [B, V,
  D], which gets no position.
  Output: pixels [B, V, P, patch * patch * 3].
  """

  config: schema.PixelDecoder
  compute: schema.Compute

  OPTIONAL = frozenset({'cls'})
  TOGETHER = False

  @staticmethod
  def inputs(config: schema.PixelDecoder) -> dict[str, jax.Array]:
    return {
      'patch': jnp.zeros((1, 1, 1, config.width)),
      'visible': jnp.zeros((1, 1, 1), jnp.int32),
      'mask': jnp.zeros((1, 1, 1), bool),
      'cls': jnp.zeros((1, 1, config.width)),
    }

  @staticmethod
  def outputs(config: schema.PixelDecoder, inputs: Shapes) -> Shapes:
    return {'pixels': (*inputs['mask'], 3 * config.patch**2)}

  @staticmethod
  def flops(config: schema.PixelDecoder, inputs: Shapes) -> float:
    views, patches = inputs['mask']
    width = config.decoder_width
    tokens = patches + ('cls' in inputs)
    blocks = layers.stack_flops(width, config.depth, config.mlp, 'gelu', tokens)
    return views * (blocks + 2 * patches * width * (config.width + 3 * config.patch**2))

  @nn.compact
  def __call__(self, patch, visible, mask, cls=None):
    c = self.config
    dtype = jnp.dtype(self.compute.dtype)
    width = c.decoder_width
    index = layers.merge_views(visible)
    hidden = layers.merge_views(mask)
    embed = layers.Dense((c.width, width), dtype, name='embed')
    x = embed(layers.merge_views(patch).astype(dtype))
    token = layers.weight(self, 'mask_token', nn.initializers.normal(0.02), (1, 1, width), dtype)
    # Visible patches come sorted, so that a patch's place among them is a count. That of a hidden
    # one means nothing; it is clipped to be in range, and not used.
    place = jnp.clip(jnp.cumsum(~hidden, axis=1) - 1, 0, index.shape[1] - 1)
    x = jnp.where(hidden[..., None], token, layers.gather_tokens(x, place))
    side = math.isqrt(hidden.shape[1])
    init = init_positions(c.positions)
    table = layers.weight(self, 'posembed', init, (1, c.grid, c.grid, width), jnp.float32)
    x = x + positions(table, side, side).reshape(1, -1, width).astype(dtype)
    if cls is not None:
      x = jnp.concatenate([embed(cls.reshape(-1, 1, c.width).astype(dtype)), x], axis=1)
    decoder = layers.Blocks(
      width, c.depth, c.heads, c.mlp, 'gelu', 0.0, self.compute, name='decoder'
    )
    [x] = decoder([x])
    if cls is not None:
      x = x[:, 1:]
    x = layers.Norm(width, name='norm')(x)
    x = layers.Dense((width, c.patch**2 * 3), dtype, name='pixels')(x)
    return {'pixels': x.reshape(*patch.shape[:2], *x.shape[1:])}

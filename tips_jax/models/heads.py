"""Heads: small towers over another tower's tokens."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from tips_jax.core import schema, vectors
from tips_jax.core.types import Shapes
from tips_jax.models import layers

_init = nn.initializers.truncated_normal(0.02)
_HIDDEN = 2048  # hidden units of the published head, which the deviation above is meant for


class DINOHead(nn.Module):
  """DINO head (arXiv 2104.14294, appendix C): MLP to a bottleneck on the unit sphere.

  Input: tokens [B, V, D] or [B, V, P, D]; masked_indices [B, V, M]: only these of the P. Output:
  `z`, unit vectors in float32. The logits are z @ prototypes with normalized columns; the loss
  forms them in chunks, never here.
  """

  config: schema.DINOHead
  compute: schema.Compute

  OPTIONAL = frozenset({'masked_indices'})
  TOGETHER = False

  @staticmethod
  def inputs(config: schema.DINOHead) -> dict[str, jax.Array]:
    tokens = jnp.zeros((1, 1, 1, config.width))
    return {'tokens': tokens, 'masked_indices': jnp.zeros((1, 1, 1), jnp.int32)}

  @staticmethod
  def outputs(config: schema.DINOHead, inputs: Shapes) -> Shapes:
    rows = inputs.get('masked_indices', inputs['tokens'][:-1])
    return {'z': (*rows, config.bottleneck)}

  @staticmethod
  def flops(config: schema.DINOHead, inputs: Shapes) -> float:
    """With the logits, which the loss forms."""
    rows = math.prod(DINOHead.outputs(config, inputs)['z'][:-1])
    weights = config.bottleneck * config.prototypes
    for width_in, width_out in DINOHead._shapes(config):
      weights += width_in * width_out
    return 2 * rows * weights

  @staticmethod
  def _shapes(config):
    """[(width in, width out)] of the layers."""
    widths = [config.width] + [config.hidden] * (config.layers - 1) + [config.bottleneck]
    return list(zip(widths, widths[1:]))

  @staticmethod
  def _kernel_init(config):
    """The published deviation; in smaller heads by fan-in. The bottleneck is then of norm about
    one: the gradient through the unit sphere grows by its inverse.
    """
    if config.hidden < _HIDDEN:
      return nn.initializers.lecun_normal()
    return _init

  @nn.compact
  def __call__(self, tokens, masked_indices=None):
    c = self.config
    # The head owns the prototypes, but only the loss reads them: no logits are formed here.
    if self.is_initializing():
      self.param('prototypes', _init, (c.bottleneck, c.prototypes))
    x = tokens.astype(self.compute.dtype)
    if masked_indices is not None:
      # Before the MLP, so that it computes nothing for patches without a loss.
      index = layers.merge_views(masked_indices)
      x = layers.gather_tokens(layers.merge_views(x), index).reshape(*masked_indices.shape, -1)
    for i, shape in enumerate(self._shapes(c)):
      if i:
        x = layers.gelu(x)
      x = layers.Dense(shape, x.dtype, self._kernel_init(c), name=f'layer{i}')(x)
    return {'z': vectors.traced_unit(x)}


class ProjectionHead(nn.Module):
  """Linear projection to a joint space (CLIP, arXiv 2103.00020, section 2.3), no bias.

  Input: x [..., D]. Output: `embedding` [..., E].
  """

  config: schema.ProjectionHead
  compute: schema.Compute

  OPTIONAL = frozenset()
  TOGETHER = False

  @staticmethod
  def inputs(config: schema.ProjectionHead) -> dict[str, jax.Array]:
    return {'x': jnp.zeros((1, config.width))}

  @staticmethod
  def outputs(config: schema.ProjectionHead, inputs: Shapes) -> Shapes:
    return {'embedding': (*inputs['x'][:-1], config.output)}

  @staticmethod
  def flops(config: schema.ProjectionHead, inputs: Shapes) -> float:
    return 2 * math.prod(inputs['x']) * config.output

  @nn.compact
  def __call__(self, x):
    c = self.config
    init = nn.initializers.normal(1 / math.sqrt(c.width))
    # float32, whatever the towers compute in: the cosine is divided by a small temperature.
    kernel = layers.weight(self, 'kernel', init, (c.width, c.output), jnp.float32)
    return {'embedding': x.astype(jnp.float32) @ kernel}


class RegionHead(nn.Module):
  """RoIAlign (Mask R-CNN, arXiv 1703.06870, section 3), the mean of a box's points, and a linear
  projection; for UMG-CLIP (arXiv 2401.06397), which names no size of the pooled grid.

  Input: patch [B, V, P, D] of square crops, of which the first is read; boxes [B, R, 4], (ymin,
  xmin, ymax, xmax) in [0, 1]. Output: `embedding` [B, R, E]; of a box without area, what lies at
  its point.
  """

  config: schema.RegionHead
  compute: schema.Compute

  OPTIONAL = frozenset()
  TOGETHER = False

  @staticmethod
  def inputs(config: schema.RegionHead) -> dict[str, jax.Array]:
    return {'patch': jnp.zeros((1, 1, 1, config.width)), 'boxes': jnp.zeros((1, 1, 4))}

  @staticmethod
  def outputs(config: schema.RegionHead, inputs: Shapes) -> Shapes:
    return {'embedding': (inputs['boxes'][0], config.output)}

  @staticmethod
  def flops(config: schema.RegionHead, inputs: Shapes) -> float:
    patches = inputs['patch'][1]
    return 2 * inputs['boxes'][0] * config.width * (patches + config.output)

  @nn.compact
  def __call__(self, patch, boxes):
    c = self.config
    first = patch[:, 0]
    side = math.isqrt(first.shape[1])
    pooled = region_means(first.reshape(len(first), side, side, -1), boxes, samples=c.samples)
    init = nn.initializers.normal(1 / math.sqrt(c.width))
    # float32, as in ProjectionHead.
    kernel = layers.weight(self, 'kernel', init, (c.width, c.output), jnp.float32)
    return {'embedding': pooled @ kernel}


def region_means(grid_BhwD: jax.Array, boxes_BR4: jax.Array, *, samples: int) -> jax.Array:
  """RoIAlign and the mean of its points, `samples` a side: float32 [B, R, D].

  boxes: (ymin, xmin, ymax, xmax) in [0, 1] of the image that the grid covers.
  """
  h, w = grid_BhwD.shape[1:3]
  # The mean of bilinear samples on a regular grid is a product of one weight for each row and one
  # for each column: two small matrix products instead of gathers.
  rows = _mean_of_samples(boxes_BR4[..., 0], boxes_BR4[..., 2], h, samples)
  columns = _mean_of_samples(boxes_BR4[..., 1], boxes_BR4[..., 3], w, samples)
  weights = jnp.einsum('brh,brw->brhw', rows, columns).astype(grid_BhwD.dtype)
  return jnp.einsum('brhw,bhwd->brd', weights, grid_BhwD, preferred_element_type=jnp.float32)


def _mean_of_samples(start, end, side, samples):
  """[B, R, side]: weights of a row's patches in the mean of linear samples from start to end, which
  are [B, R] in [0, 1]. Beyond the middle of the outermost patch a sample is that patch.
  """
  steps = (jnp.arange(samples) + 0.5) / samples
  at = (start[..., None] + (end - start)[..., None] * steps) * side - 0.5
  at = at.clip(0, side - 1)
  away = jnp.abs(at[..., None] - jnp.arange(side))
  return jnp.maximum(1 - away, 0).mean(-2)


class Fusion(nn.Module):
  """An image for the words of a text (after LightCLIP, arXiv 2312.00674, section 3.3, whose
  convolutions are not described): each stage through a 1 x 1 convolution, and its places, row by
  row, resized to the length of the text.

  Input: stage2, stage3 [B, V, P, C] of an image tower, views are averaged; ids [B, T], for their
  length. Output: `fused2`, `fused3` [B, T, D].
  """

  config: schema.Fusion
  compute: schema.Compute

  OPTIONAL = frozenset()
  TOGETHER = False

  @staticmethod
  def inputs(config: schema.Fusion) -> dict[str, jax.Array]:
    stages = [jnp.zeros((1, 1, 1, width)) for width in config.widths]
    return {'stage2': stages[0], 'stage3': stages[1], 'ids': jnp.zeros((1, 1), jnp.int32)}

  @staticmethod
  def outputs(config: schema.Fusion, inputs: Shapes) -> Shapes:
    shape = (*inputs['ids'], config.output)
    return {'fused2': shape, 'fused3': shape}

  @staticmethod
  def flops(config: schema.Fusion, inputs: Shapes) -> float:
    return 2 * inputs['ids'][0] * sum(config.widths) * config.output

  @nn.compact
  def __call__(self, stage2, stage3, ids):
    out = {}
    for number, x, width in zip((2, 3), (stage2, stage3), self.config.widths):
      x = x.mean(axis=1)
      # Resized first: there are fewer words than places, and the two commute.
      x = jax.image.resize(x, (x.shape[0], ids.shape[1], width), 'linear')
      shape = (width, self.config.output)
      dtype = jnp.dtype(self.compute.dtype)
      out[f'fused{number}'] = layers.Dense(shape, dtype, name=f'conv{number}')(x.astype(dtype))
    return out


class WordHead(nn.Module):
  """A linear layer over the vocabulary, read by the loss, for the masked words of a text.

  Input: words [B, T, D], masked_indices [B, M]. Output: `tokens` [B, M, D], the masked ones.
  """

  config: schema.WordHead
  compute: schema.Compute

  OPTIONAL = frozenset()
  TOGETHER = False

  @staticmethod
  def inputs(config: schema.WordHead) -> dict[str, jax.Array]:
    words = jnp.zeros((1, 1, config.width))
    return {'words': words, 'masked_indices': jnp.zeros((1, 1), jnp.int32)}

  @staticmethod
  def outputs(config: schema.WordHead, inputs: Shapes) -> Shapes:
    return {'tokens': (*inputs['masked_indices'], config.width)}

  @staticmethod
  def flops(config: schema.WordHead, inputs: Shapes) -> float:
    """Of the logits, which the loss forms."""
    return 2 * math.prod(inputs['masked_indices']) * config.width * config.vocab

  @nn.compact
  def __call__(self, words, masked_indices):
    c = self.config
    if self.is_initializing():
      self.param('kernel', nn.initializers.normal(1 / math.sqrt(c.width)), (c.width, c.vocab))
      self.param('bias', nn.initializers.zeros, (c.vocab,))
    return {'tokens': layers.gather_tokens(words.astype(self.compute.dtype), masked_indices)}


class Logit(nn.Module):
  """Learned scale and bias of a contrastive loss; read as parameters."""

  config: schema.Logit
  compute: schema.Compute

  OPTIONAL = frozenset()
  TOGETHER = False

  @staticmethod
  def inputs(config: schema.Logit) -> dict[str, jax.Array]:
    return {}

  @staticmethod
  def outputs(config: schema.Logit, inputs: Shapes) -> Shapes:
    return {}

  @staticmethod
  def flops(config: schema.Logit, inputs: Shapes) -> float:
    return 0.0  # two scalars

  @nn.compact
  def __call__(self):
    # The logarithm, so that no update can make the temperature negative.
    self.param('log_temperature', nn.initializers.constant(math.log(self.config.temperature)), ())
    if self.config.bias is not None:
      self.param('bias', nn.initializers.constant(self.config.bias), ())
    return {}

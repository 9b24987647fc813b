"""Heads: small towers over another tower's tokens."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from tips_jax.core import schema
from tips_jax.core.types import Shapes
from tips_jax.models import layers

_init = nn.initializers.truncated_normal(0.02)


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
    widths = [*DINOHead._widths(config), config.prototypes]
    return 2 * rows * sum(a * b for a, b in zip(widths, widths[1:]))

  @staticmethod
  def _widths(config):
    return [config.width] + [config.hidden] * (config.layers - 1) + [config.bottleneck]

  @nn.compact
  def __call__(self, tokens, masked_indices=None):
    c = self.config
    if self.is_initializing():  # the loss reads them
      self.param('prototypes', _init, (c.bottleneck, c.prototypes))
    x = tokens.astype(self.compute.dtype)
    if masked_indices is not None:
      x = layers.gather_tokens(layers.merge_views(x), layers.merge_views(masked_indices)).reshape(
        *masked_indices.shape, -1
      )
    widths = self._widths(c)
    for i, shape in enumerate(zip(widths, widths[1:])):
      x = layers.Dense(shape, x.dtype, _init, name=f'layer{i}')(nn.gelu(x) if i else x)
    return {'z': unit(x)}


class ProjectionHead(nn.Module):
  """Linear projection to a joint space, no bias. Input: x [..., D]. Output: `embedding` [...,
  E].
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
    init = nn.initializers.normal(1 / math.sqrt(self.config.width))
    kernel = layers.weight(
      self, 'kernel', init, (self.config.width, self.config.output), jnp.float32
    )
    return {'embedding': x.astype(jnp.float32) @ kernel}


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
    self.param('log_temperature', nn.initializers.constant(math.log(self.config.temperature)), ())
    if self.config.bias is not None:
      self.param('bias', nn.initializers.constant(self.config.bias), ())
    return {}


def unit(x: jax.Array) -> jax.Array:
  """x / |x| over the last axis, in float32; the zero vector stays zero, with a finite gradient."""
  x = x.astype(jnp.float32)
  return x * jnp.reciprocal(jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12)))

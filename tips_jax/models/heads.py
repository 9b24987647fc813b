"""Heads: small towers over another tower's tokens."""

import math

import flax.linen as nn
import jax.numpy as jnp

from tips_jax.core import schema
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
    widths = [c.width] + [c.hidden] * (c.layers - 1) + [c.bottleneck]
    for i, shape in enumerate(zip(widths, widths[1:])):
      x = layers.Dense(shape, x.dtype, _init, name=f'layer{i}')(nn.gelu(x) if i else x)
    return {'z': unit(x)}


class ProjectionHead(nn.Module):
  """Linear projection to a joint space, no bias. Input: x [..., D]. Output: `embedding` [...,
  E].
  """

  config: schema.ProjectionHead
  compute: schema.Compute

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

  @nn.compact
  def __call__(self):
    self.param('log_temperature', nn.initializers.constant(math.log(self.config.temperature)), ())
    if self.config.bias is not None:
      self.param('bias', nn.initializers.constant(self.config.bias), ())
    return {}


def unit(x):
  """x / |x| over the last axis, in float32; the zero vector stays zero, with a finite gradient."""
  x = x.astype(jnp.float32)
  return x * jnp.reciprocal(jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12)))

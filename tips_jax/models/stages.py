"""What image towers of four stages share: padding, outputs, batch statistics, attention pooling."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from tips_jax.core import parallel, schema
from tips_jax.core.errors import InputError
from tips_jax.core.types import Shapes
from tips_jax.models import layers, vit

# The collection of what batch norms see of a batch. What they read is among the parameters, so that
# it is saved, averaged by teachers and exported as these are; the step writes it there.
STATISTICS = 'statistics'


class Stages(nn.Module):
  """Base class of image towers of four stages, the first at stride 4, the last at 32.

  Input: images [B, V, H, W, 3], uint8 or floats in [0, 1], padded with zeros around their center to
  multiples of 32.
  Output: `stage1` to `stage3` and `patch`, the last stage, [B, V, P, D]; `pooled` [B, V, D].
  A subclass has `widths`, and in `run` gives the four stages [N, h, w, D] of images [N, H, W, 3].
  """

  config: schema.ImageTower
  compute: schema.Compute

  OPTIONAL = frozenset()
  TOGETHER = False

  @staticmethod
  def inputs(config: schema.ImageTower) -> dict[str, jax.Array]:
    return {'images': jnp.zeros((1, 1, config.patch, config.patch, 3), jnp.uint8)}

  @classmethod
  def outputs(cls, config: schema.ImageTower, inputs: Shapes) -> Shapes:
    views, height, width, _ = inputs['images']
    patches = math.ceil(height / config.patch) * math.ceil(width / config.patch)
    shapes = {}
    names = ('stage1', 'stage2', 'stage3', 'patch')
    for i, (name, channels) in enumerate(zip(names, cls.widths(config))):
      shapes[name] = (views, patches * 4 ** (3 - i), channels)
    return shapes | {'pooled': (views, config.width)}

  @classmethod
  def flops(cls, config: schema.ImageTower, inputs: Shapes) -> float:
    views, patches, _ = cls.outputs(config, inputs)['patch']
    return views * cls.flops_of(config, patches)

  @staticmethod
  def widths(config: schema.ImageTower) -> Sequence[int]:
    """Channels of the four stages."""
    raise NotImplementedError

  @staticmethod
  def flops_of(config: schema.ImageTower, patches: int) -> float:
    """Forward FLOPs of an image of so many patches of the last stage."""
    raise NotImplementedError

  def run(self, images_NHWC: jax.Array) -> list[jax.Array]:
    raise NotImplementedError

  def pool(self, x_NHWD: jax.Array) -> jax.Array:
    """[N, D] of the last stage."""
    return x_NHWD.mean((1, 2))

  def __call__(self, images):
    lead = images.shape[:2]
    x = vit.padded(layers.merge_views(images), self.config.patch)
    scale = 1.0
    if images.dtype == jnp.uint8:
      scale = 255.0
    # Divided in float32: a batch norm hides the scale of what is before it, a layer norm not.
    x = (x.astype(jnp.float32) / scale).astype(self.compute.dtype)
    stages = self.run(x)
    out = {'pooled': self.pool(stages[-1]).reshape(*lead, -1)}
    for name, stage in zip(('stage1', 'stage2', 'stage3', 'patch'), stages):
      out[name] = stage.reshape(*lead, -1, stage.shape[-1])
    return out


def inspect(
  module: nn.Module,
  params: Any,
  images: jax.Array,
  *,
  intermediate_layers: Sequence[int] = (),
  values: bool = False,
) -> dict[str, Any]:
  """As `vit.inspect`, of a tower of stages: it has no blocks that evaluators could look into."""
  asked = {'intermediate_layers': bool(intermediate_layers), 'values': values}
  for name, wanted in asked.items():
    if wanted:
      raise InputError(
        f'{name}: got an image tower of kind {module.config.kind!r}; expected a vit, whose blocks '
        'have them'
      )
  return module.apply({'params': params}, images)


class BatchNorm(nn.Module):
  """Batch normalization (arXiv 1502.03167), eps 1e-5, as PyTorch.

  Where the collection 'statistics' may change, a training step runs: moments are those of the
  batch, over all devices, and the new running ones [1, D] go there. Elsewhere the running ones are
  used: by teachers, evaluations and exports. With `accumulate` a batch is each of its parts.
  """

  width: int
  momentum: float

  def setup(self) -> None:
    ones = nn.initializers.ones
    zeros = nn.initializers.zeros
    shape = (self.width,)
    self.scale = layers.weight(self, 'scale', ones, shape, jnp.float32)
    self.bias = layers.weight(self, 'bias', zeros, shape, jnp.float32)
    self.mean = layers.weight(self, 'mean', zeros, shape, jnp.float32)
    self.var = layers.weight(self, 'var', ones, shape, jnp.float32)

  def __call__(self, x):
    mean = self.mean
    var = self.var
    if self.is_mutable_collection(STATISTICS) and not self.is_initializing():
      mean, var, count = _moments(x)
      # The unbiased variance goes on, as in PyTorch; the batch is divided by its own.
      self._keep('mean', self.mean, mean)
      self._keep('var', self.var, var * (count / max(count - 1, 1)))
    y = x.astype(jnp.float32) - mean
    y = y * (lax.rsqrt(var + 1e-5) * self.scale) + self.bias
    return y.astype(x.dtype)

  def _keep(self, name, old, new):
    moved = old + (1 - self.momentum) * (lax.stop_gradient(new) - old)
    # One row for each device, as all that a pass gives.
    self.put_variable(STATISTICS, name, moved[None])


def _moments(x):
  """(mean, biased variance, count) of each channel over the batch of all devices."""
  y = x.astype(jnp.float32)
  rows = tuple(range(y.ndim - 1))
  mean = y.mean(rows)
  square = (y * y).mean(rows)
  count = math.prod(y.shape[:-1])
  axes = parallel.batch_axes()
  if axes:  # each device has as many rows
    mean, square = lax.pmean((mean, square), axes)
    count *= math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
  return mean, jnp.maximum(0.0, square - mean * mean), count


class Convolution(nn.Module):
  """Convolution without bias, padded by half of its kernel on each side."""

  shape: tuple[int, int, int, int]  # rows, columns, inputs of a group, outputs
  stride: int = 1
  groups: int = 1

  def setup(self) -> None:
    init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
    self.kernel = layers.weight(self, 'kernel', init, self.shape, jnp.float32)

  def __call__(self, x_NHWD):
    pad = self.shape[0] // 2
    return lax.conv_general_dilated(
      x_NHWD,
      self.kernel.astype(x_NHWD.dtype),
      (self.stride,) * 2,
      ((pad, pad),) * 2,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=self.groups,
    )


class ConvNorm(nn.Module):
  """A convolution and its batch norm, without what comes after."""

  shape: tuple[int, int, int, int]
  momentum: float
  stride: int = 1
  groups: int = 1

  def setup(self) -> None:
    self.conv = Convolution(self.shape, self.stride, self.groups)
    self.norm = BatchNorm(self.shape[-1], self.momentum)

  def __call__(self, x):
    return self.norm(self.conv(x))


class AttentionPool(nn.Module):
  """One attention over the patches and their mean, which is also the only query (CLIP, model.py,
  AttentionPool2d): [N, h, w, D] -> [N, D], heads of 64.
  """

  width: int
  grid: int
  dtype: jnp.dtype

  def setup(self) -> None:
    d = self.width
    init = nn.initializers.normal(1 / math.sqrt(d))
    self.posembed = layers.weight(self, 'posembed', init, (1, self.grid, self.grid, d), jnp.float32)
    self.position = layers.weight(self, 'position', init, (1, d), jnp.float32)
    self.query = layers.Dense((d, d), self.dtype)
    self.key = layers.Dense((d, d), self.dtype)
    self.value = layers.Dense((d, d), self.dtype)
    self.out = layers.Dense((d, d), self.dtype)

  def __call__(self, x_NHWD):
    n, h, w, d = x_NHWD.shape
    heads = max(1, d // 64)
    mean = x_NHWD.mean((1, 2)) + self.position.astype(x_NHWD.dtype)
    x = (x_NHWD + vit.positions(self.posembed, h, w).astype(x_NHWD.dtype)).reshape(n, h * w, d)
    x = jnp.concatenate([mean[:, None], x], axis=1)
    q = self.query(mean).reshape(n, heads, -1) * (d // heads) ** -0.5
    k = self.key(x).reshape(n, -1, heads, d // heads)
    v = self.value(x).reshape(n, -1, heads, d // heads)
    logits = jnp.einsum('nhd,nthd->nht', q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return self.out(jnp.einsum('nht,nthd->nhd', weights, v).reshape(n, d))


def convolution_flops(shape: Sequence[int], pixels: float) -> float:
  """Of a kernel [rows, columns, inputs of a group, outputs], at so many places."""
  return 2 * math.prod(shape) * pixels

"""Convolutional image towers: ResNet and MobileNetV2, as torchvision builds them."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from tips_jax.core import schema
from tips_jax.models import layers, stages


class ResNet(stages.Stages):
  """ResNet of basic blocks; torchvision's resnet18 for the defaults, without its classifier."""

  STATISTICS = True

  @staticmethod
  def widths(config: schema.ResNet) -> Sequence[int]:
    return config.widths

  @staticmethod
  def flops_of(config: schema.ResNet, patches: int) -> float:
    total = stages.convolution_flops((7, 7, 3, config.widths[0]), patches * 16**2)
    for i, (before, width, depth) in enumerate(_pairs(config)):
      pixels = patches * 4 ** (3 - i)
      kernels = (2 * depth - 1) * 9 * width**2 + 9 * before * width
      if before != width:
        kernels += before * width
      total += 2 * kernels * pixels
    if config.pool == 'attention':
      total += 4 * (patches + 2) * config.width**2
    return total

  def setup(self) -> None:
    c = self.config
    block = layers.rematerialized(Residual, self.compute, looped=False)
    self.stem = stages.ConvNorm((7, 7, 3, c.widths[0]), c.momentum, 2)
    for i, (before, width, depth) in enumerate(_pairs(c)):
      for j in range(depth):
        stride = 2 if i and not j else 1
        made = block(width if j else before, width, stride, c.momentum)
        setattr(self, f'stage{i + 1}_{j}', made)
    if c.pool == 'attention':
      self.attention = stages.AttentionPool(c.width, c.grid, jnp.dtype(self.compute.dtype))

  def run(self, images_NHWC):
    x = nn.relu(self.stem(images_NHWC))
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    result = []
    for i, depth in enumerate(self.config.depths):
      for j in range(depth):
        x = getattr(self, f'stage{i + 1}_{j}')(x)
      result.append(x)
    return result

  def pool(self, x_NHWD: jax.Array) -> jax.Array:
    if self.config.pool == 'mean':
      return x_NHWD.mean((1, 2))
    return self.attention(x_NHWD)


def _pairs(config):
  """(channels before, channels, blocks) of each stage."""
  return zip((config.widths[0], *config.widths), config.widths, config.depths)


class Residual(nn.Module):
  """A basic block of ResNet: two 3 x 3 convolutions, and the input beside them."""

  before: int
  width: int
  stride: int
  momentum: float

  def setup(self) -> None:
    self.conv1 = stages.ConvNorm((3, 3, self.before, self.width), self.momentum, self.stride)
    self.conv2 = stages.ConvNorm((3, 3, self.width, self.width), self.momentum)
    self.resized = self.stride > 1 or self.before != self.width
    if self.resized:
      self.shortcut = stages.ConvNorm((1, 1, self.before, self.width), self.momentum, self.stride)

  def __call__(self, x):
    y = self.conv2(nn.relu(self.conv1(x)))
    if self.resized:
      x = self.shortcut(x)
    return nn.relu(layers.keep(x + y))


# --- MobileNetV2 --------------------------------------------------------------------------------

_STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of the seven widths
_ENDS = (1, 2, 4, 6)  # the last width of each stage


def inverted_blocks(config: schema.MobileNetV2) -> list[tuple[int, int, int, int, bool]]:
  """(channels in, hidden, out, stride, does a stage end here) of each block."""
  blocks = []
  before = config.stem
  for i, (width, depth) in enumerate(zip(config.widths, config.depths)):
    for j in range(depth):
      stride = 1 if j else _STRIDES[i]
      # The first width has no expansion.
      hidden = before * (config.expansion if i else 1)
      blocks.append((before, hidden, width, stride, i in _ENDS and j == depth - 1))
      before = width
  return blocks


class MobileNetV2(stages.Stages):
  """torchvision's mobilenet_v2 for the defaults, without its classifier. The last stage's patches
  come from the last convolution.
  """

  STATISTICS = True

  @staticmethod
  def widths(config: schema.MobileNetV2) -> Sequence[int]:
    return (*(config.widths[i] for i in _ENDS[:3]), config.last)

  @staticmethod
  def flops_of(config: schema.MobileNetV2, patches: int) -> float:
    pixels = patches * 16**2
    total = stages.convolution_flops((3, 3, 3, config.stem), pixels)
    for before, hidden, width, stride, _ in inverted_blocks(config):
      if hidden != before:
        total += 2 * before * hidden * pixels
      pixels /= stride**2
      total += 2 * (9 * hidden + hidden * width) * pixels
    return total + 2 * config.widths[-1] * config.last * pixels

  def setup(self) -> None:
    c = self.config
    block = layers.rematerialized(InvertedResidual, self.compute, looped=False)
    self.stem = stages.ConvNorm((3, 3, 3, c.stem), c.momentum, 2)
    for i, (before, hidden, width, stride, _) in enumerate(inverted_blocks(c)):
      setattr(self, f'block{i}', block(before, hidden, width, stride, c.momentum))
    self.head = stages.ConvNorm((1, 1, c.widths[-1], c.last), c.momentum)

  def run(self, images_NHWC):
    x = nn.relu6(self.stem(images_NHWC))
    result = []
    for i, (*_, ends) in enumerate(inverted_blocks(self.config)):
      x = getattr(self, f'block{i}')(x)
      if ends:
        result.append(x)
    return [*result[:3], nn.relu6(self.head(x))]


class InvertedResidual(nn.Module):
  """Channels are widened, convolved one by one, and narrowed again (section 3.3)."""

  before: int
  hidden: int
  width: int
  stride: int
  momentum: float

  def setup(self) -> None:
    if self.hidden != self.before:
      self.widen = stages.ConvNorm((1, 1, self.before, self.hidden), self.momentum)
    self.depthwise = stages.ConvNorm(
      (3, 3, 1, self.hidden), self.momentum, self.stride, groups=self.hidden
    )
    self.narrow = stages.ConvNorm((1, 1, self.hidden, self.width), self.momentum)

  def __call__(self, x):
    y = x
    if self.hidden != self.before:
      y = nn.relu6(self.widen(y))
    y = self.narrow(nn.relu6(self.depthwise(y)))
    if self.stride == 1 and self.before == self.width:
      y = y + x
    return layers.keep(y)

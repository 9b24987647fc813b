"""Swin: an image tower of attention in shifted windows."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tips_jax.core import schema
from tips_jax.models import layers, stages

_init = nn.initializers.truncated_normal(0.02)
PATCH = 4  # pixels of a patch of the first stage


class Swin(stages.Stages):
  """Swin (arXiv 2103.14030), as torchvision's SwinTransformer without its classifier."""

  STATISTICS = False

  @staticmethod
  def widths(config: schema.Swin) -> Sequence[int]:
    return [config.embedding * 2**i for i in range(4)]

  @staticmethod
  def flops_of(config: schema.Swin, patches: int) -> float:
    first = patches * 64
    total = stages.convolution_flops((PATCH, PATCH, 3, config.embedding), first)
    for i, (width, depth) in enumerate(zip(Swin.widths(config), config.depths)):
      tokens = first / 4**i
      weights = (4 + 2 * config.mlp_ratio) * width**2
      total += depth * tokens * (2 * weights + 4 * config.window**2 * width)
      if i:
        total += 2 * tokens * 2 * width**2  # the merging before this stage
    return total

  def setup(self) -> None:
    c = self.config
    dtype = jnp.dtype(self.compute.dtype)
    block = layers.rematerialized(Block, self.compute, looped=False)
    widths = self.widths(c)
    self.embedding = layers.Dense((3 * PATCH**2, widths[0]), dtype, _init)
    self.embedded = layers.Norm(widths[0])
    for i, (width, depth) in enumerate(zip(widths, c.depths)):
      if i:
        setattr(self, f'merge{i}', Merge(width, dtype))
      for j in range(depth):
        shift = c.window // 2 * (j % 2)
        made = block(width, width // c.head_width, c.mlp_ratio, c.window, shift, dtype)
        setattr(self, f'stage{i + 1}_{j}', made)
    self.norm = layers.Norm(widths[-1])

  def run(self, images_NHWC):
    x = self.embedded(self.embedding(_blocks_of(images_NHWC, PATCH)))
    result = []
    for i, depth in enumerate(self.config.depths):
      if i:
        x = getattr(self, f'merge{i}')(x)
      for j in range(depth):
        x = getattr(self, f'stage{i + 1}_{j}')(x)
      result.append(x)
    return [*result[:3], self.norm(result[3])]


def _blocks_of(x_NHWD, side):
  """[N, H / side, W / side, side * side * D]."""
  n, h, w, d = x_NHWD.shape
  x = x_NHWD.reshape(n, h // side, side, w // side, side, d).swapaxes(2, 3)
  return x.reshape(n, h // side, w // side, -1)


class Merge(nn.Module):
  """Each 2 x 2 tokens to one of twice the width."""

  width: int  # after
  dtype: jnp.dtype

  def setup(self) -> None:
    self.norm = layers.Norm(2 * self.width)
    shape = (2 * self.width, self.width)
    self.kernel = layers.weight(self, 'kernel', _init, shape, self.dtype)

  def __call__(self, x_NHWD):
    n, h, w, d = x_NHWD.shape
    # Columns after rows, as in Swin's code.
    x = x_NHWD.reshape(n, h // 2, 2, w // 2, 2, d).transpose(0, 1, 3, 4, 2, 5)
    return self.norm(x.reshape(n, h // 2, w // 2, 4 * d)) @ self.kernel


class Block(nn.Module):
  """Pre-norm block whose attention stays within windows, shifted in every other block."""

  width: int
  heads: int
  mlp_ratio: int
  window: int
  shift: int
  dtype: jnp.dtype

  def setup(self) -> None:
    d = self.width
    hidden = d * self.mlp_ratio
    self.norm1 = layers.Norm(d)
    self.norm2 = layers.Norm(d)
    for name in ('query', 'key', 'value', 'out'):
      setattr(self, name, layers.Dense((d, d), self.dtype, _init))
    self.up = layers.Dense((d, hidden), self.dtype, _init)
    self.down = layers.Dense((hidden, d), self.dtype, _init)
    shape = (self.heads, (2 * self.window - 1) ** 2)
    self.relative = layers.weight(self, 'relative', _init, shape, jnp.float32)

  def __call__(self, x_NHWD):
    x = layers.keep(x_NHWD + self.attention(self.norm1(x_NHWD)))
    return x + self.down(_gelu(self.up(self.norm2(x))))

  def attention(self, x_NHWD: jax.Array) -> jax.Array:
    """Within windows of the image, padded with zeros at its right and lower edges."""
    n, h, w, d = x_NHWD.shape
    side = self.window
    x = jnp.pad(x_NHWD, ((0, 0), (0, -h % side), (0, -w % side), (0, 0)))
    shifts = [self.shift if size > side else 0 for size in x.shape[1:3]]
    x = jnp.roll(x, [-s for s in shifts], (1, 2))
    rows, columns = (size // side for size in x.shape[1:3])
    x = _blocks_of(x, side).reshape(n * rows * columns, side * side, d)

    def by_head(y):
      return y.reshape(*y.shape[:2], self.heads, -1)

    q = by_head(self.query(x)) * (d // self.heads) ** -0.5
    logits = jnp.einsum('nthd,nshd->nhts', q, by_head(self.key(x)))
    logits = logits.astype(jnp.float32) + self.relative[:, relative_index(side)]
    if any(shifts):
      mask = jnp.asarray(shifted_mask((rows * side, columns * side), side, shifts))
      logits = logits.reshape(n, rows * columns, self.heads, side**2, side**2)
      logits = (logits + mask[:, None]).reshape(-1, self.heads, side**2, side**2)
    weights = jax.nn.softmax(logits).astype(x.dtype)
    y = jnp.einsum('nhts,nshd->nthd', weights, by_head(self.value(x)))
    y = self.out(y.reshape(x.shape)).reshape(n, rows, columns, side, side, d)
    y = y.swapaxes(2, 3).reshape(n, rows * side, columns * side, d)
    return jnp.roll(y, shifts, (1, 2))[:, :h, :w]


@jax.custom_jvp
def _erfc(x):
  return lax.erfc(x)


# jax 0.12's own derivative cannot be traced under shard_map: its constants do not vary there.
_erfc.defjvps(lambda tangent, _, x: tangent * (-2 / np.sqrt(np.pi)) * jnp.exp(-jnp.square(x)))


def _gelu(x):
  """The exact form (with erf), as torchvision and timm compute it."""
  half = np.sqrt(0.5).astype(x.dtype)
  return 0.5 * x * _erfc(-x * half)


def relative_index(side: int) -> np.ndarray:
  """[side^2, side^2]: where the bias of two places of a window is in the table of a head."""
  place = np.stack(np.unravel_index(np.arange(side**2), (side, side)), axis=-1)
  offset = place[:, None] - place[None] + side - 1
  return offset[..., 0] * (2 * side - 1) + offset[..., 1]


def shifted_mask(size: tuple[int, int], side: int, shifts: Sequence[int]) -> np.ndarray:
  """[windows, side^2, side^2] float32: -100 between places that were not neighbors before the
  image was shifted, else 0.
  """
  region = np.zeros(size, np.int32)
  for axis, (length, shift) in enumerate(zip(size, shifts)):
    place = np.arange(length)
    part = (place >= length - side).astype(np.int32) + (place >= length - shift)
    region = 3 * region + np.expand_dims(part, 1 - axis)
  rows, columns = (length // side for length in size)
  windows = region.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side**2)
  return np.where(windows[:, :, None] == windows[:, None], 0, -100).astype(np.float32)

"""A device's tokens a chunk at a time, so that no more than a chunk's logits are held at once.

Chunks are whole images, as they lie in memory, before they are parts of each view's tokens. Packed,
the tokens that count lie first, and chunks without any are skipped.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

# Of packed tokens: chunks that may be skipped.
PARTS = 8


@dataclasses.dataclass(frozen=True)
class Chunks:
  """How tokens [B, V, P, ...] are divided; with views or not, all arrays have the same B and P.

  `images`, `tokens`: of a chunk, the latter of each view. `order`: of packed tokens [B * V * P],
  those that count first; else None.
  """

  images: int
  tokens: int
  order: jax.Array | None = None

  @classmethod
  def of(cls, images: int, views: int, tokens: int, most: int) -> Self:
    """Equal chunks of at most `most` tokens of all views, where that is possible."""
    of_chunk = _divisor(images, most // (views * tokens))
    return cls(of_chunk, _divisor(tokens, most // (views * of_chunk)))

  @classmethod
  def packed(cls, counts: jax.Array, most: int) -> Self:
    """Of tokens [B, V, P, 1] those that count (1, not 0) first, as of one image with one view."""
    order = jnp.argsort(-counts.reshape(-1))
    whole = cls.of(1, 1, order.size, min(most, max(1, order.size // PARTS)))
    return dataclasses.replace(whole, order=order)

  def split(self, x: jax.Array) -> jax.Array:
    """[chunks, images, V, tokens, D] of [B, V, P, D]."""
    if self.order is not None:
      x = jnp.take(x.reshape(-1, x.shape[-1]), self.order, 0)[None, None]
    b, v, p, d = x.shape
    parts = x.reshape(b // self.images, self.images, v, p // self.tokens, self.tokens, d)
    return jnp.moveaxis(parts, 3, 1).reshape(-1, self.images, v, self.tokens, d)

  def join(self, chunks: jax.Array, shape: tuple[int, int, int, int]) -> jax.Array:
    """The array of `shape` [B, V, P, D] whose `split` these are."""
    b, v, p, d = shape
    if self.order is not None:
      return jnp.take(chunks.reshape(-1, d), jnp.argsort(self.order), 0).reshape(shape)
    parts = chunks.reshape(b // self.images, p // self.tokens, self.images, v, self.tokens, d)
    return jnp.moveaxis(parts, 1, 3).reshape(shape)

  def scan(
    self,
    add: Callable[[Any, Any], tuple[Any, Any]],
    skip: Callable[[Any], tuple[Any, Any]],
    total: Any,
    parts: Any,
    counts: jax.Array,
  ) -> tuple[Any, Any]:
    """`lax.scan` of add(total, chunk) -> (total, result) over the chunks of `parts`, a tree of
    arrays that were `split`.

    skip(total) -> (total, result) stands in where the tokens are packed and of a chunk none
    `counts`.
    """
    if self.order is None:
      return lax.scan(add, total, parts)

    def step(total, chunk):
      i, any_counts = chunk
      # Taken out in the branch: what is skipped is not even copied.
      take = lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False)
      return lax.cond(any_counts, lambda total: add(total, jax.tree.map(take, parts)), skip, total)

    any_counts = counts.reshape(len(counts), -1).any(-1)
    return lax.scan(step, total, (jnp.arange(len(counts)), any_counts))


def _divisor(n, most):
  """The largest divisor of n that is at most `most`, and at least 1."""
  return max(i for i in range(1, n + 1) if n % i == 0 and i <= max(most, 1))

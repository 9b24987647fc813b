"""Exact nearest neighbors by cosine, in blocks on the devices."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tips_jax.core.errors import InputError

# A tree of arrays.
Tree = Any

# Queries of one device, and rows of the index, whose similarities are held at once.
_BLOCK = 512
_ROWS = 32_768


def nearest(
  index: np.ndarray | Sequence[np.ndarray],
  queries: np.ndarray | Sequence[np.ndarray],
  *,
  k: int,
  groups: np.ndarray | None = None,
  query_groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """(cosines float32 [M, k], rows int [M, k]) of the k nearest of index [N, D] to queries [M, D].

  The nearest comes first; of equally near rows the first in the index. Where there are fewer than k
  candidates: cosine -inf and row -1. groups [N], query_groups [M]: see `sweep`.
  """
  start = np.full(k, -np.inf, np.float32), np.full(k, -1, np.int32)
  return sweep(_keep, start, index, queries, groups=groups, query_groups=query_groups)


def sweep(
  merge: Callable[..., Tree],
  start: Tree,
  index: np.ndarray | Sequence[np.ndarray],
  queries: np.ndarray | Sequence[np.ndarray],
  *,
  groups: np.ndarray | None = None,
  query_groups: np.ndarray | None = None,
  columns: Tree = (),
  query_columns: Tree = (),
) -> Tree:
  """Compares every row of the index with every query, in blocks of both: no [M, N] ever exists.

  index, queries: [N, D] and [M, D], or lists of arrays that follow one another; they may be memory
  maps. The index is read once; the queries are held on the devices, split over them. Rows that are
  not finite count as zero. groups [N]: a row is no candidate of queries of its group (query_groups
  [M]; default: none), or of any where its group is negative.

  merge(state, cosines [m, n], rows int32 [n], columns of them, columns of the queries) -> state: a
  module-level function (it is compiled once); cosines are -inf where a row is no candidate; blocks
  come in the order of the index. The state is a tree of arrays [m, ...]; `start`, its first value,
  lacks the axis m. Columns are trees of [N, ...] and [M, ...] arrays. Returns the state of all
  queries, as NumPy arrays [M, ...]. Blocks have the same shapes on any number of devices, so that
  the numbers are the same.
  """
  index = _as_list(index)
  queries = _as_list(queries)
  n = sum(map(len, index))
  m = sum(map(len, queries))
  index_shapes = list(map(np.shape, index))
  query_shapes = list(map(np.shape, queries))
  shapes = index_shapes + query_shapes
  if not n or any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
    raise InputError(
      f'nearest neighbors: got an index of {index_shapes} and queries of {query_shapes}; expected '
      '[N, D] and [M, D], N at least 1'
    )
  index_columns = _groups(groups, 0, n), np.arange(n, dtype=np.int32), columns
  query_columns = _groups(query_groups, -1, m), query_columns
  if not m:
    return jax.tree.map(lambda x: np.zeros((0, *np.shape(x)), np.asarray(x).dtype), start)
  per_device = _bucket(m, _BLOCK)
  devices = np.array(jax.local_devices()[: -(-m // per_device)])
  size = per_device * len(devices)
  mesh = jax.sharding.Mesh(devices, ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  split = NamedSharding(mesh, P('data'))
  everywhere = NamedSharding(mesh, P())
  # Copied to the devices for each block of queries; on the host it takes no memory.
  first_state = jax.tree.map(lambda x: np.broadcast_to(x, (size, *np.shape(x))), start)
  blocks, states, counts = [], [], []
  with jax.set_mesh(mesh):
    for block in _blocks(queries, query_columns, size):
      states.append(jax.device_put(first_state, split))
      blocks.append(jax.device_put(_padded(block, size), split))
      counts.append(len(block[0]))
    for block in _blocks(index, index_columns, _ROWS):
      # The devices worked while this block was read; waiting keeps at most two of them in memory.
      jax.block_until_ready(states)
      rows = jax.device_put(_padded(block, _bucket(len(block[0]), _ROWS)), everywhere)
      states = [_step(merge, state, query, rows) for state, query in zip(states, blocks)]
    parts = [_rows(state, slice(count)) for state, count in zip(states, counts)]
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _as_list(arrays):
  if isinstance(arrays, (list, tuple)):
    return list(arrays)
  return [arrays]


def _blocks(parts, columns, size):
  """Yields (rows float32 [n, D], their columns), n <= size, of arrays that follow one another."""
  first = 0
  for part in parts:
    for begin in range(0, len(part), size):
      rows = np.asarray(part[begin : begin + size], np.float32)
      yield rows, _rows(columns, slice(first, first + len(rows)))
      first += len(rows)


def _rows(arrays, place):
  return jax.tree.map(lambda x: np.asarray(x)[place], arrays)


def _padded(block, size):
  """A block of `size` rows; the new ones have group -1: no candidates."""

  def pad(x, value=0):
    widths = [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1)
    return np.pad(x, widths, constant_values=value)

  rows, (groups, *others) = block
  return pad(rows), (pad(groups, -1), *jax.tree.map(pad, others))


def _bucket(count, most):
  """The power of two that holds `count`, at least 16, at most `most`: few shapes are compiled."""
  return min(most, max(16, 1 << (count - 1).bit_length()))


def _groups(groups, default, count):
  if groups is None:
    return np.full(count, default, np.int32)
  groups = np.asarray(groups).astype(np.int32)
  if groups.shape != (count,):
    raise InputError(
      f'nearest neighbors: got groups {groups.shape}; expected one for each of {count} rows'
    )
  return groups


@functools.partial(jax.jit, static_argnums=0)
def _step(merge, state, queries, index):
  def local(state, queries, index):  # on each device its share of the queries
    x, (query_group, query_columns) = queries
    y, (group, rows, columns) = index
    scores = jnp.dot(unit(x), unit(y).T, precision='highest')
    scores = jnp.where(scores == 0, 0.0, scores)  # -0 would sort below 0
    candidate = (group >= 0) & (group != query_group[:, None])
    scores = jnp.where(candidate, scores, -jnp.inf)
    return merge(state, scores, rows, columns, query_columns)

  specs = (P('data'), P('data'), P())
  return jax.shard_map(local, in_specs=specs, out_specs=P('data'))(state, queries, index)


def unit(x: jax.Array) -> jax.Array:
  """Rows of unit length; rows that are zero or not finite become zero."""
  # Not as core/vectors.py has it: ranks are decided by the last digits, of small rows too.
  x = jnp.where(jnp.isfinite(x).all(-1, keepdims=True), x, 0)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _keep(state, scores, rows, *_):
  """The k best of the state and of a block; top_k takes the first of equals."""
  k = state[0].shape[1]
  best, place = jax.lax.top_k(scores, min(k, scores.shape[1]))
  # The earlier rows go first: they win a tie.
  best = jnp.concatenate([state[0], best], 1)
  place = jnp.concatenate([state[1], rows[place]], 1)
  best, order = jax.lax.top_k(best, k)
  place = jnp.take_along_axis(place, order, 1)
  # Where there are fewer than k candidates, the others are rows of the block, or none.
  return best, jnp.where(jnp.isneginf(best), -1, place)

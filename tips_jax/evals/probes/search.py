"""Exact nearest neighbors by cosine, in blocks on the devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tips_jax.core.errors import InputError

_BLOCK = 512  # queries of one device whose similarities are held at once
_ROWS = 32_768  # rows of the index, likewise


def nearest(
  index, queries, *, k: int, groups=None, query_groups=None
) -> tuple[np.ndarray, np.ndarray]:
  """(cosines float32 [M, k], rows int [M, k]) of the k nearest of index [N, D] to queries [M, D],
  the nearest first.

  Of equally near rows the first in the index; where there are fewer than k candidates, cosine -inf
  and row -1. groups [N], query_groups [M]: see `sweep`.
  """
  start = np.full(k, -np.inf, np.float32), np.full(k, -1, np.int32)
  return sweep(_keep, start, index, queries, groups=groups, query_groups=query_groups)


def sweep(
  merge, start, index, queries, *, groups=None, query_groups=None, columns=(), query_columns=()
):
  """Shows every row of the index to every query, in blocks of both, so that no [M, N] ever exists.

  index, queries: [N, D] and [M, D], or lists of arrays that follow one another; they may lie on
  disk: the index is read once, the queries are held on the devices, split over them. Rows that are
  not finite count as zero. groups [N]: a row is no candidate of queries of its own group, or of any
  where its group is negative. query_groups [M]; default: none.

  merge(found, cosines [m, n], rows int32 [n], columns of them, columns of the queries) -> found: a
  function of a module (it is compiled once); cosines are -inf where a row is no candidate; blocks
  come in the order of the index. `found` is a tree of arrays [m, ...], at first `start`, which
  lacks the axis m; columns are trees of [N, ...] arrays. Returns `found` of all queries, as NumPy
  arrays [M, ...]. Blocks have the same shapes on any number of devices, so that the numbers are the
  same.
  """
  index, queries = (list(x) if isinstance(x, (list, tuple)) else [x] for x in (index, queries))
  n, m = sum(map(len, index)), sum(map(len, queries))
  shapes = [np.shape(x) for x in index + queries]
  if not n or {len(s) for s in shapes} != {2} or len({s[1] for s in shapes}) != 1:
    raise InputError(
      f'nearest neighbors: got an index of {shapes[: len(index)]} and queries of '
      f'{shapes[len(index) :]}; expected [N, D] and [M, D], N at least 1'
    )
  theirs = _numbers(groups, 0, n), np.arange(n, dtype=np.int32), columns
  mine = _numbers(query_groups, -1, m), query_columns
  each = _bucket(m, _BLOCK)
  devices = np.array(jax.local_devices()[: max(-(-m // each), 1)])
  mesh = jax.sharding.Mesh(devices, ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  split, everywhere = NamedSharding(mesh, P('data')), NamedSharding(mesh, P())
  asked, found, counts = [], [], []
  with jax.set_mesh(mesh):
    for block in _blocks(queries, mine, each * len(devices)):
      begin = jax.tree.map(lambda s: np.broadcast_to(s, (each * len(devices), *np.shape(s))), start)
      found.append(jax.device_put(begin, split))
      asked.append(jax.device_put(_padded(block, each * len(devices)), split))
      counts.append(len(block[0]))
    for block in _blocks(index, theirs, _ROWS):
      jax.block_until_ready(
        found
      )  # the devices were busy while this block was read; no more than two are held
      rows = jax.device_put(_padded(block, _bucket(len(block[0]), _ROWS)), everywhere)
      found = [_step(merge, f, query, rows) for f, query in zip(found, asked)]
    parts = [jax.tree.map(lambda x, c=c: np.asarray(x)[:c], f) for f, c in zip(found, counts)]
  if not parts:
    return jax.tree.map(lambda s: np.zeros((0, *np.shape(s)), np.asarray(s).dtype), start)
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _blocks(parts, columns, size):
  """Yields (rows float32 [n, D], 0 < n <= size, their rows of the columns) of arrays that follow
  one another.
  """
  first = 0
  for part in parts:
    for begin in range(0, len(part), size):
      rows = np.asarray(part[begin : begin + size], np.float32)
      own = slice(first, first + len(rows))
      yield rows, jax.tree.map(lambda c, own=own: np.asarray(c)[own], columns)
      first += len(rows)


def _padded(block, size):
  """Rows up to `size`, the group of the new ones -1: no candidates."""
  rows, (groups, *others) = block
  pad = lambda x, value: np.pad(
    x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1), constant_values=value
  )
  return pad(rows, 0), (pad(groups, -1), *jax.tree.map(lambda x: pad(x, 0), others))


def _bucket(count, most):
  """The power of two that holds `count`, at least 16, at most `most`: few shapes are compiled."""
  return min(most, max(16, 1 << (count - 1).bit_length()))


def _numbers(groups, default, count):
  groups = (
    np.full(count, default, np.int32) if groups is None else np.asarray(groups).astype(np.int32)
  )
  if groups.shape != (count,):
    raise InputError(
      f'nearest neighbors: got groups {groups.shape}; expected one for each of {count} rows'
    )
  return groups


@functools.partial(jax.jit, static_argnums=0)
def _step(merge, found, queries, index):
  def local(found, queries, index):  # on each device its own queries
    (x, (group, columns)), (y, (own, rows, their_columns)) = queries, index
    scores = jnp.dot(_unit(x), _unit(y).T, precision='highest')
    scores = jnp.where(scores == 0, 0.0, scores)  # -0 would sort below 0
    scores = jnp.where((own >= 0) & (own != group[:, None]), scores, -jnp.inf)
    return merge(found, scores, rows, their_columns, columns)

  return jax.shard_map(local, in_specs=(P('data'), P('data'), P()), out_specs=P('data'))(
    found, queries, index
  )


def _unit(x):
  x = jnp.where(jnp.isfinite(x).all(-1, keepdims=True), x, 0)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _keep(found, scores, rows, *_):
  """The k largest of those that were found before and of a block; top_k takes the first of equals."""
  k = found[0].shape[1]
  best, place = jax.lax.top_k(scores, min(k, scores.shape[1]))
  best, place = jnp.concatenate([found[0], best], 1), jnp.concatenate([found[1], rows[place]], 1)
  best, order = jax.lax.top_k(best, k)
  place = jnp.take_along_axis(place, order, 1)
  return best, jnp.where(jnp.isneginf(best), -1, place)

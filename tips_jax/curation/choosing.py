"""What the steps say that look at all records: repeated texts, duplicates, evaluation sets, the
best share, retrieval and balance.

Each is a function of what was measured; it yields the rows that it drops. What it holds in memory
are a few numbers for each record.
"""

import collections
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.curation import encoders, looks, neighbors, schema
from tips_jax.curation.measuring import Table
from tips_jax.curation.records import Pictures

_BLOCK = 1024  # rows that are compared with the kept ones together
_CLUSTER = 50_000  # records of a cluster in which features are compared, about


class Dropped(NamedTuple):
  """A row that a step drops, and why; `row_of` or `picture_of` is what it is like."""

  row: int
  reason: str
  row_of: int | None = None
  picture_of: tuple[str, int] | None = None  # name of a set, and number in it


class Asked(NamedTuple):
  """A step and what it is about."""

  step: Any
  number: int
  table: Table
  rows: np.ndarray  # those that are left, ascending
  seed: int
  values: np.ndarray  # float32 [all rows], for the histogram; a step may add some


def choose(asked: Asked) -> Iterator[Dropped]:
  """The rows that a step drops, of those that are left; in no order."""
  function = _CHOOSERS.get(type(asked.step))
  if function:
    yield from function(asked)


def check(curation: schema.Curation) -> None:
  """InputError for sets of images and libraries that are not there."""
  for number, step in enumerate(curation.steps):
    where = f'config.steps[{number}]'
    if isinstance(
      step, (schema.NearDuplicates, schema.Decontaminate, schema.Retrieve, schema.Balance)
    ):
      neighbors.library()
    for field in ('evaluations', 'queries'):
      names = getattr(step, field, None)
      if names == ():
        raise InputError(f'{where}.{field}: got none; expected at least one set of images')
      for name in names or ():
        Pictures(name, f'{where}.{field}')


# --- texts --------------------------------------------------------------------------------------


def _repeated_text(asked):
  templates = asked.table.column('template')[asked.rows]
  order = np.argsort(templates, kind='stable')
  ordered = templates[order]
  starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
  stops = np.r_[starts[1:], len(ordered)]
  for start, stop in zip(starts.tolist(), stops.tolist()):
    count = stop - start
    if not ordered[start] or count <= asked.step.most:  # 0: no text
      continue
    of_text = np.sort(asked.rows[order[start:stop]])
    for row in of_text[asked.step.keep :].tolist():
      yield Dropped(row, f'{count} records have this text', int(of_text[0]))


# --- similarity ---------------------------------------------------------------------------------


def _best_share(asked):
  if asked.step.best is None:
    return
  values = asked.table.column(f'value-{asked.number}')[asked.rows]
  judged = np.flatnonzero(np.isfinite(values))
  order = judged[np.argsort(-values[judged], kind='stable')]
  for i in order[round(asked.step.best * len(order)) :].tolist():
    share = 100 * asked.step.best
    yield Dropped(
      int(asked.rows[i]), f'similarity {values[i]:.3f} is not among the best {share:g} %'
    )


# --- duplicates ---------------------------------------------------------------------------------


def _exact_duplicates(asked):
  digests = asked.table.column('digest')[asked.rows]
  order = np.lexsort((asked.rows, digests['low'], digests['high']))
  first = None
  for i in order.tolist():
    digest = (int(digests[i]['high']), int(digests[i]['low']))
    if first is None or digest != first[0]:
      first = (digest, int(asked.rows[i]))
    else:
      yield Dropped(int(asked.rows[i]), 'the same bytes', first[1])


def _near_duplicates(asked):
  # The image of most pixels comes first, and stays.
  pixels = asked.table.column('pixels')[asked.rows].astype(np.int64)
  rows = asked.rows[np.argsort(-pixels, kind='stable')]
  left = []
  for found in _alike_by_hash(asked, rows):
    if isinstance(found, Dropped):
      yield found
    else:
      left.append(found)
  if asked.step.encoder:
    yield from _alike_by_features(asked, np.array(left, np.int64))


def _alike_by_hash(asked, rows) -> Iterator[Dropped | int]:
  """Each row: dropped, as it looks like one before that stays; or itself."""
  hashes = asked.table.column('hash')
  small = functools.lru_cache(maxsize=8192)(lambda row: looks.small(asked.table.record(row).pixels))
  index = neighbors.Hashes(asked.step.bits)
  enough = (asked.step.alike, asked.step.color)
  for first in range(0, len(rows), _BLOCK):
    block = rows[first : first + _BLOCK]
    stay = []
    for row, before in zip(block.tolist(), index.near(hashes[block])):
      near = np.bitwise_count(hashes[stay] ^ hashes[row]) <= asked.step.bits
      like = None
      for other in [*before.tolist(), *np.array(stay, np.int64)[near].tolist()]:
        correlation, color = looks.alike(small(other), small(row), *enough)
        asked.values[row] = np.fmax(asked.values[row], correlation)
        if correlation >= enough[0] and color <= enough[1]:
          like = Dropped(row, f'looks the same (correlation {correlation:.2f})', other)
          break
      if like:
        yield like
        continue
      stay.append(row)
      yield row
    index.add(hashes[stay], np.array(stay, np.int64))


def _alike_by_features(asked, rows):
  """Within clusters of features, as SemDeDup (arXiv 2303.09540)."""
  features = functools.partial(asked.table.features, asked.step.encoder)
  groups = [rows]
  if len(rows) > _CLUSTER:
    numbers, _ = neighbors.clusters(features, rows, -(-len(rows) // _CLUSTER), asked.seed)
    groups = [rows[numbers == number] for number in range(numbers.max() + 1)]
  for group in groups:
    kept = np.zeros((0, 0), np.float32)  # features of those that stay, and their rows
    kept_rows = []
    for first in range(0, len(group), _BLOCK):
      block = group[first : first + _BLOCK]
      x = features(block)
      before = x @ kept.T if len(kept_rows) else np.zeros((len(block), 0), np.float32)
      inside = x @ x.T
      stay = []
      for i, row in enumerate(block.tolist()):
        cosines = np.concatenate([before[i], inside[i, stay]])
        others = [*kept_rows, *block[stay].tolist()]
        best = int(np.argmax(cosines)) if len(cosines) else -1
        if best >= 0 and cosines[best] >= asked.step.cosine:
          reason = f'features are the same (cosine {cosines[best]:.2f})'
          yield Dropped(row, reason, others[best])
        else:
          stay.append(i)
      kept = np.concatenate([kept.reshape(-1, x.shape[1]), x[stay]])
      kept_rows += block[stay].tolist()


# --- other sets of images -----------------------------------------------------------------------


def _decontaminate(asked):
  left = set(asked.rows.tolist())
  for name in asked.step.evaluations:
    pictures = Pictures(name, 'evaluations')
    rows = np.array(sorted(left), np.int64)
    for dropped in _contaminated(asked, name, pictures, rows):
      left.discard(dropped.row)
      yield dropped


def _contaminated(asked, name, pictures, rows):
  index = neighbors.Hashes(asked.step.bits)
  unreadable = 0
  for number, picture in enumerate(pictures):
    try:
      of_picture = looks.hashes_of_crops(picture.pixels())
    except ValueError:
      unreadable += 1
      continue
    index.add(np.array(of_picture, np.uint64), np.full(len(of_picture), number))
  if unreadable:
    print(f'{name}: {unreadable} images cannot be read and are not compared')
  small = functools.lru_cache(maxsize=4096)(lambda number: looks.small(pictures[number].pixels()))
  hashes = asked.table.column('hash')
  enough = (asked.step.alike, asked.step.color)
  left = []
  for first in range(0, len(rows), neighbors.BLOCK):
    block = rows[first : first + neighbors.BLOCK]
    for row, near in zip(block.tolist(), index.near(hashes[block])):
      like = None
      own = looks.small(asked.table.record(row).pixels) if len(near) else None
      for number in near.tolist():
        correlation, color = looks.alike(small(number), own, *enough)
        asked.values[row] = np.fmax(asked.values[row], correlation)
        if correlation >= enough[0] and color <= enough[1]:
          reason = f'is {pictures[number].name} (correlation {correlation:.2f})'
          like = Dropped(row, reason, picture_of=(name, number))
          break
      if like:
        yield like
      else:
        left.append(row)
  if asked.step.encoder and left:
    rows = np.array(left, np.int64)
    queries, numbers = _encoded(asked.step.encoder, pictures)
    features = functools.partial(asked.table.features, asked.step.encoder)
    cosines, found = neighbors.nearest(features, rows, queries, 1)
    for i in np.flatnonzero(cosines[:, 0] >= asked.step.cosine).tolist():
      number = int(numbers[found[i, 0]])
      reason = f'is {pictures[number].name} (cosine {cosines[i, 0]:.2f})'
      yield Dropped(int(rows[i]), reason, picture_of=(name, number))


def _encoded(encoder, pictures):
  """(features float32 [Q, E], numbers [Q]) of the readable images of a set."""
  features = []
  numbers = []
  batch = []
  for number, picture in enumerate(pictures):
    try:
      batch.append(encoders.prepare(encoder, picture.pixels()))
      numbers.append(number)
    except ValueError:
      pass
    if len(batch) == encoders.BATCH or number == len(pictures) - 1:
      if batch:
        features.append(encoders.image_features(encoder, batch))
      batch = []
  if not features:
    raise InputError(f'{pictures.name}: none of {len(pictures)} images can be read; expected some')
  return np.concatenate(features), np.array(numbers)


def _retrieve(asked):
  step = asked.step
  features = functools.partial(asked.table.features, step.encoder)
  queries = []
  for name in step.queries:
    found, _ = _encoded(step.encoder, Pictures(name, 'queries'))
    queries.append(found)
  queries = np.concatenate(queries)
  cosines, _ = neighbors.nearest(features, asked.rows, queries, 1)
  asked.values[asked.rows] = cosines[:, 0]
  if step.least is not None:
    for i in np.flatnonzero(cosines[:, 0] < step.least).tolist():
      yield Dropped(int(asked.rows[i]), f'cosine {cosines[i, 0]:.2f} to the nearest query')
    return
  near = neighbors.nearest_rows(features, asked.rows, queries, step.nearest)
  for i in np.flatnonzero(~np.isin(asked.rows, near)).tolist():
    reason = f'not among the {step.nearest} nearest of a query (cosine {cosines[i, 0]:.2f})'
    yield Dropped(int(asked.rows[i]), reason)


def _balance(asked):
  step = asked.step
  features = functools.partial(asked.table.features, step.encoder)
  numbers, cosines = neighbors.clusters(features, asked.rows, step.clusters, asked.seed)
  asked.values[asked.rows] = cosines
  sizes = collections.Counter(numbers.tolist())
  # By lot: the hash of its bytes, whatever else there is.
  digests = asked.table.column('digest')[asked.rows]['high'].tolist()
  lots = []
  for digest in digests:
    lot = hashlib.sha256(f'{asked.seed} {digest}'.encode()).digest()[:8]
    lots.append(int.from_bytes(lot, 'big'))
  order = np.lexsort((asked.rows, np.array(lots, np.uint64), numbers))
  taken = collections.Counter()
  for i in order.tolist():
    cluster = int(numbers[i])
    taken[cluster] += 1
    if taken[cluster] > step.each:
      reason = f'cluster {cluster} has {sizes[cluster]} images, of which {step.each} are drawn'
      yield Dropped(int(asked.rows[i]), reason)


_CHOOSERS: dict[type, Callable[[Asked], Iterator[Dropped]]] = {
  schema.RepeatedText: _repeated_text,
  schema.Similarity: _best_share,
  schema.ExactDuplicates: _exact_duplicates,
  schema.NearDuplicates: _near_duplicates,
  schema.Decontaminate: _decontaminate,
  schema.Retrieve: _retrieve,
  schema.Balance: _balance,
}

"""The training input: stores -> shuffled, mixed, decoded, cropped, tokenized batches of NumPy
arrays.

Everything about an example is a function of (seed, global example index): which record, which
crops, which caption. So the whole state is one integer, and any number of hosts, processes and
threads yields the same global batches. Grain gives the order (shuffle, repeat, mix), the read-ahead
and the worker processes. No jax in here.
"""

import bisect
import concurrent.futures
import hashlib
import json
import math
import weakref

import grain
import numpy as np
from absl import flags
from numpy.random.bit_generator import ISeedSequence
from tensorflow_datasets.proto import tf_example_pb2

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Data
from tips_jax.core.strict import unknown
from tips_jax.data import store as stores
from tips_jax.data import views
from tips_jax.data.tokenizer import Tokenizer

_RESERVED = ('index', 'bad')
_TRIES = 20  # unreadable records in a row
_ROWS = 32  # images per task of the thread pool, at most
_FEW = 1000  # examples below which max_bad_fraction is not yet a rate


class Pipeline:
  """An endless iterator over this host's part of the global batches.

  A batch is a dict: uint8 [B, V, size, size, 3] per view, int32 [B, T] and '<name>_valid' bool [B]
  per text, 'index' int64 [B] (record number in the concatenated stores) and 'bad' int64 [B] (the
  unreadable record that was replaced by 'index', else -1). Host p of n holds the p-th of n equal
  parts of each global batch, as the rows of a global array lie over hosts. `next_index` is the
  state: pass it as `start` to go on. Raises InputError for a config or a store that cannot work,
  before any thread starts, and while iterating when more than `max_bad_fraction` of the images are
  unreadable.

  Attributes: `next_index` (global index of the next example), `size` (records), `fingerprint`
  (sha256 hex of the mixture), `tokenizer` (None without texts).
  """

  def __init__(self, config, *, batch_size, seed, process_index=0, process_count=1, start=0):
    check(config)
    _check_share(batch_size, seed, process_index, process_count, start)
    opened = [stores.open_store(path) for path in (config.store, *config.extra_stores)]
    sources = [opening.source(config.split) for opening in opened]
    _check_stores(config, opened, sources)
    sizes = [len(source) for source in sources]
    self.size = sum(sizes)
    self.next_index = start
    self.tokenizer = _tokenizer(config, opened[0])
    self.fingerprint = _fingerprint(config, opened, sizes)
    self._batch_size = batch_size
    self._max_bad_fraction = config.max_bad_fraction
    self._seen = self._bad = 0
    share = batch_size // process_count
    mine = _order(sizes, config.mixture, seed)[start:].batch(share, drop_remainder=True)[
      process_index::process_count
    ]
    threads = max(1, config.threads // max(1, config.workers))
    self._load = _Load(
      config,
      _Records(sources),
      self.tokenizer,
      seed,
      threads,
      first=start + process_index * share,
      stride=batch_size,
    )
    batches = mine.map_with_index(self._load)
    ahead = 1 if config.workers else config.prefetch
    batches = batches.to_iter_dataset(
      grain.ReadOptions(num_threads=min(2, ahead), prefetch_buffer_size=ahead)
    )
    if config.workers:
      if not flags.FLAGS.is_parsed():  # grain's workers read a flag of its own
        flags.FLAGS.mark_as_parsed()
      batches = batches.mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=config.workers,
          per_worker_buffer_size=math.ceil(config.prefetch / config.workers),
        )
      )
      batches = grain.experimental.ThreadPrefetchIterDataset(
        batches.map(_own), prefetch_buffer_size=1
      )
    self._running = [iter(batches)]
    self._stop = weakref.finalize(
      self, _stop, self._load, self._running
    )  # at exit too, should nobody call close

  def __iter__(self):
    return self

  def __next__(self):
    if not self._running:
      raise ValueError('this pipeline is closed')
    batch = next(self._running[0])
    self.next_index += self._batch_size
    self._seen += len(batch['bad'])
    self._bad += int((batch['bad'] >= 0).sum())
    if self._bad > self._max_bad_fraction * max(self._seen, _FEW):
      record = batch['bad'].max()
      last = ' ({}: {})'.format(*self.explain(record)) if record >= 0 else ''
      raise InputError(
        f'data: got {self._bad} unreadable images among {self._seen}{last}; expected at most '
        f'data.max_bad_fraction={self._max_bad_fraction:g} of them'
      )
    return batch

  def explain(self, record):
    """(id, reason) of a record number from batch['bad'], for the quarantine file; reason '' when it
    is readable.
    """
    example = self._load.records[int(record)]
    try:
      views.crops(_bytes(example, 'image'), self._load.config.views, np.random.default_rng(0))
      reason = ''
    except ValueError as error:
      reason = str(error)
    return _bytes(example, 'id').decode('utf-8', 'replace') or str(record), reason

  def close(self):
    """Stops the threads and processes; the pipeline cannot be read any more."""
    self._stop()


def _stop(load, running):
  load.close()
  running.pop().close()


# --- checks -------------------------------------------------------------------------------------


def check(config: Data):
  """Raises InputError for the first field of a Data config that cannot work; opens nothing."""
  if not config.views and not config.texts:
    raise InputError('data.views: got none; expected at least one view')
  for name, view in config.views.items():
    where = f'data.views.{name}'
    _require(
      view.size > 0 and view.count > 0,
      f'{where}: size, count',
      (view.size, view.count),
      'positive numbers',
    )
    _require(
      0 < view.scale[0] <= view.scale[1] <= 1,
      f'{where}.scale',
      view.scale,
      '0 < least <= most <= 1',
    )
    _require(0 < view.ratio[0] <= view.ratio[1], f'{where}.ratio', view.ratio, '0 < least <= most')
    _require(0 <= view.flip <= 1, f'{where}.flip', view.flip, 'a probability')
  names = [*config.views, *config.texts]
  for name in names:
    taken = name in _RESERVED or name.endswith('_valid') or names.count(name) > 1
    _require(
      not taken, 'data: name of a view or text', name, 'one that no other entry of the batch has'
    )
  for field, least in (('threads', 1), ('workers', 0), ('prefetch', 1), ('text_length', 1)):
    value = getattr(config, field)
    _require(value >= least, f'data.{field}', value, f'at least {least}')
  _require(
    0 <= config.max_bad_fraction <= 1,
    'data.max_bad_fraction',
    config.max_bad_fraction,
    'a fraction',
  )
  count = 1 + len(config.extra_stores)
  fitting = not config.mixture or len(config.mixture) == count and min(config.mixture) > 0
  _require(
    fitting, 'data.mixture', config.mixture, f'{count} positive numbers, one per store, or ()'
  )


def _require(good, what, x, expected):
  if not good:
    raise InputError(f'{what}: got {x!r}; expected {expected}')


def _check_share(batch_size, seed, process_index, process_count, start):
  _require(
    batch_size > 0 and batch_size % process_count == 0,
    'batch_size',
    batch_size,
    f'a positive multiple of the {process_count} processes',
  )
  _require(
    0 <= process_index < process_count, 'process_index', process_index, f'0 to {process_count - 1}'
  )
  _require(0 <= seed < 2**64, 'seed', seed, 'a number from 0 to 2**64 - 1')
  _require(start >= 0, 'start', start, 'at least 0')


def _check_stores(config, opened, sources):
  for opening, source in zip(opened, sources):
    _require(len(source), f'records in split {config.split!r} of {opening.path}', 0, 'at least one')
    if config.views and 'image' not in opening.features:
      raise unknown(f'store {opening.path}: image feature', 'image', opening.features)
  known = {feature for opening in opened for feature in opening.features}
  for name, text in config.texts.items():
    if text.field not in known and text.fallback not in known:
      raise unknown(f'data.texts.{name}: feature of the store', text.field, known)


def _tokenizer(config, first):
  if not config.texts:
    return None
  path = config.tokenizer or first.tokenizer_path
  if not path:
    raise InputError(
      f'data.tokenizer: got {config.tokenizer!r}, and the store {first.path} has none; expected a '
      f'SentencePiece model, or a store made with --tokenizer'
    )
  return Tokenizer(path)


def _fingerprint(config, opened, sizes):
  weights = config.mixture or sizes
  parts = [config.split, *([s.fingerprint, float(w)] for s, w in zip(opened, weights))]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --- order and loading --------------------------------------------------------------------------


def _order(sizes, weights, seed):
  """Global example index -> record number, as an endless MapDataset.

  Without weights one shuffle covers all stores, so every epoch sees each record once. Weighted
  stores interleave in fixed proportions (grain rounds them by less than 1 %), each shuffled anew in
  each of its own epochs.
  """
  if not weights or len(sizes) == 1:
    sizes, weights = [sum(sizes)], ()
  keys = [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(len(sizes))]
  ends = np.cumsum(sizes).tolist()
  parts = [
    grain.MapDataset.range(end - size, end).shuffle(seed=key).repeat()
    for end, size, key in zip(ends, sizes, keys)
  ]
  return grain.MapDataset.mix(parts, list(weights)) if weights else parts[0]


def _own(batch):
  """The batch in memory of its own: grain's shared memory outlives the process where a batch is
  still held at exit.
  """
  return {name: np.array(x) for name, x in batch.items()}


class _Records:
  """Stores end to end as one sequence of tf.train.Example feature maps (five times faster than
  TFDS's own parser).
  """

  def __init__(self, sources):
    self._raw = [source.data_source for source in sources]
    self._starts = [0, *np.cumsum([len(source) for source in sources]).tolist()]

  def __len__(self):
    return self._starts[-1]

  def __getitem__(self, record):
    part = bisect.bisect_right(self._starts, record) - 1
    raw = self._raw[part][record - self._starts[part]]
    return tf_example_pb2.Example.FromString(raw).features.feature


def _values(example, name):
  return example[name].bytes_list.value if name in example else ()


def _bytes(example, name):
  values = _values(example, name)
  return values[0] if values else b''


class _Key(ISeedSequence):
  """Philox's own key, (seed, example index); NumPy's way to pass one also reads the system's
  entropy, each time.
  """

  def __init__(self, *words):
    self._words = words

  def generate_state(self, n_words, dtype=np.uint32):
    return np.array(self._words[:n_words], dtype)


class _Load:
  """(batch number of this host, record numbers [B]) -> batch. Picklable; each process has its own
  thread pool.
  """

  def __init__(self, config, records, tokenizer, seed, threads, *, first, stride):
    # Global index of this host's first example, and from one of its batches to the next.
    self.config, self.records = config, records
    self._tokenizer, self._seed, self._threads = tokenizer, seed, threads
    self._first, self._stride = first, stride
    self._pool = self._new_pool()

  def __getstate__(self):
    return {**self.__dict__, '_pool': None}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._pool = self._new_pool()

  def _new_pool(self):
    return concurrent.futures.ThreadPoolExecutor(
      self._threads, thread_name_prefix='data'
    )  # starts none yet

  def close(self):
    self._pool.shutdown(wait=True, cancel_futures=True)

  def __call__(self, number, records):
    size, c = len(records), self.config
    batch = {
      name: np.empty((size, v.count, v.size, v.size, 3), np.uint8) for name, v in c.views.items()
    }
    for name in c.texts:
      batch[name] = np.zeros((size, c.text_length), np.int32)
      batch[f'{name}_valid'] = np.zeros(size, bool)
    batch['index'] = np.asarray(records, np.int64)
    batch['bad'] = np.full(size, -1, np.int64)
    start = self._first + self._stride * number
    step = max(1, min(_ROWS, size // self._threads))
    tasks = [
      self._pool.submit(self._fill, batch, range(row, min(row + step, size)), start)
      for row in range(0, size, step)
    ]
    for task in tasks:
      task.result()
    return batch

  def _fill(self, batch, rows, start):
    """Fills some rows of a batch, stage by stage: each stage finds its own tables in the
    processor's cache.
    """
    examples = [self.records[record] for record in batch['index'][rows.start : rows.stop].tolist()]
    luck = []
    for i, row in enumerate(rows):
      rng = np.random.Generator(np.random.Philox(_Key(self._seed, start + row)))
      examples[i] = self._images(batch, row, examples[i], rng)
      luck.append(rng.random(len(self.config.texts)).tolist())
    for row, example, draws in zip(rows, examples, luck):
      for (name, text), draw in zip(self.config.texts.items(), draws):
        self._text(batch, name, row, self._pick(example, text, draw))

  def _images(self, batch, row, example, rng):
    """Fills the views of a row; returns its example, or the random other one that had to stand in
    for it.
    """
    out = {name: batch[name][row] for name in self.config.views}
    for _ in range(_TRIES):
      try:
        if out:
          views.crops(_bytes(example, 'image'), self.config.views, rng, out)
        return example
      except ValueError as error:
        reason = error
        if batch['bad'][row] < 0:
          batch['bad'][row] = batch['index'][row]
        batch['index'][row] = rng.integers(len(self.records))
        example = self.records[int(batch['index'][row])]
    raise InputError(
      f'data: got {_TRIES} unreadable images in a row (the last one: {reason}); expected images'
    )

  def _pick(self, example, text, luck):
    for field in (text.field, text.fallback):
      found = [value for value in _values(example, field) if value.strip()]
      if found:
        return found[int(luck * len(found))] if text.pick == 'random' else found[0]
    return b''

  def _text(self, batch, name, row, text):
    if text:
      batch[name][row] = self._tokenizer.encode(text, self.config.text_length)
      batch[f'{name}_valid'][row] = batch[name][row].any()

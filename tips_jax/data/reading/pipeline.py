"""The training input: stores -> shuffled, mixed, decoded, cropped, tokenized batches of NumPy
arrays.

Everything about an example is a function of (seed, global example index): which record, which
crops, which caption. So the whole state is one integer, and any number of hosts, processes and
threads yields the same global batches. Grain gives the order (shuffle, repeat, mix), the read-ahead
and the worker processes. It imports no jax: worker processes must not touch a device.
"""

import bisect
import concurrent.futures
import hashlib
import itertools
import json
import math
import typing
import weakref
from collections.abc import Sequence

import grain
import numpy as np
from numpy.random.bit_generator import ISeedSequence

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Data, Text
from tips_jax.core.strict import unknown
from tips_jax.data.pixels import views
from tips_jax.data.reading import regions, wording, workers
from tips_jax.data.reading.batch import Batch, check, empty, valid
from tips_jax.data.reading.in_place import open_data
from tips_jax.data.reading.order import example_order
from tips_jax.data.reading.records import Records, first, values
from tips_jax.data.tokenizer import Tokenizer

_TRIES = 20  # unreadable records in a row, before giving up
_ROWS = 32  # images per task of the thread pool, at most
_FEW = 1000  # examples below which max_bad_fraction is not yet a rate
_OTHER = {'alt_text': 'captions', 'captions': 'alt_text'}


class Pipeline:
  """An endless iterator over this host's rows of the global batches.

  data/reading/batch.py says what a batch holds. Row r of a global batch is the example
  `next_index` + r on any number of hosts, however the rows of a global array lie on them: on a
  torus of TPUs those of a host need not follow each other. Raises InputError for a config or a
  store that cannot work, before any thread starts, and while iterating when more than
  `max_bad_fraction` of the images are unreadable.
  """

  next_index: int  # global index of the next example: the state; pass it as `start` to go on
  size: int  # number of records
  fingerprint: str  # SHA-256 of the mixture
  tokenizer: Tokenizer | None  # None without texts

  def __init__(
    self,
    config: Data,
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    start: int = 0,
    check_shards: bool = True,
  ):
    """rows: this host's rows of a global batch; None: all. check_shards: as in store.open_store."""
    check(config)
    _require(batch_size > 0, 'batch_size', batch_size, 'at least 1')
    _require(0 <= seed < 2**64, 'seed', seed, 'a number from 0 to 2**64 - 1')
    _require(start >= 0, 'start', start, 'at least 0')
    opened = _open(config, check_shards)
    sources = [store.source(config.split) for store in opened]
    _check_stores(config, opened, sources)
    records = Records(sources)
    sizes = [len(source) for source in sources]
    self.size = sum(sizes)
    self.next_index = start
    self.tokenizer = _tokenizer(config, opened[0])
    self.fingerprint = _fingerprint(config, opened, sizes)
    self._batch_size = batch_size
    self._max_bad_fraction = config.max_bad_fraction
    self._seen = 0
    self._bad = 0
    if rows is None:
      rows = range(batch_size)
    workers.check_shared_memory(config, len(rows))
    self._load = _Load(
      config,
      records,
      self.tokenizer,
      seed,
      example_order(
        sizes,
        config.mixture,
        seed,
        config.neighbors,
        groups=[source.raw.groups for source in sources],
        schedule=config.mixture_schedule,
        batch_size=batch_size,
      ),
      threads=max(1, config.threads // max(1, config.workers)),
      first=start + np.array(rows, np.int64),
      stride=batch_size,
    )
    batches = grain.MapDataset.range(1).repeat().map_with_index(self._load)
    self._running = [_read_ahead(batches, config)]
    # At exit too, should nobody call close.
    self._stop = weakref.finalize(self, _stop, self._load, self._running)

  def __iter__(self) -> typing.Self:
    return self

  def __next__(self) -> Batch:
    if not self._running:
      raise ValueError('this pipeline is closed')
    with workers.one_error():
      batch = next(self._running[0])
    self.next_index += self._batch_size
    self._seen += len(batch['bad'])
    self._bad += int((batch['bad'] >= 0).sum())
    # The first few examples are too few for a rate: they count as _FEW.
    if self._bad > self._max_bad_fraction * max(self._seen, _FEW):
      record = batch['bad'].max()
      last = ' ({}: {})'.format(*self.explain(record)) if record >= 0 else ''
      raise InputError(
        f'data: got {self._bad} unreadable images among {self._seen}{last}; expected at most '
        f'data.max_bad_fraction={self._max_bad_fraction:g} of them'
      )
    return batch

  def explain(self, record: int) -> tuple[str, str]:
    """(id, reason) of a record of batch['bad'], for the quarantine file; '' if it is readable."""
    name = str(record)
    reason = ''
    try:
      example = self._load.records[int(record)]
      name = first(example, 'id').decode('utf-8', 'replace') or name
      views.crops(first(example, 'image'), self._load.config.views, np.random.default_rng(0))
    except ValueError as error:
      reason = str(error)
    return name, reason

  def close(self) -> None:
    """Stops the threads and processes; the pipeline cannot be read any more."""
    self._stop()


def _read_ahead(batches, config):
  """Loads batches before they are needed: in threads, or in worker processes if there are any."""
  ahead = 1 if config.workers else config.prefetch
  batches = batches.to_iter_dataset(
    grain.ReadOptions(num_threads=min(2, ahead), prefetch_buffer_size=ahead)
  )
  if config.workers:
    return workers.start(batches, config)
  return iter(batches)


def _stop(load, running):
  load.close()
  running.pop().close()


# --- checks -------------------------------------------------------------------------------------


def _require(good, what, value, expected):
  if not good:
    raise InputError(f'{what}: got {value!r}; expected {expected}')


def _check_stores(config, opened, sources):
  known = set()
  for store, source in zip(opened, sources):
    _require(len(source), f'records in split {config.split!r} of {store.path}', 0, 'at least one')
    if config.views and 'image' not in store.features:
      raise unknown(f'store {store.path}: image feature', 'image', store.features)
    known.update(store.features)
  for name, text in config.texts.items():
    wording.synonyms(text.synonyms)  # a bad file is an error now, not in a worker
    if text.field not in known and text.fallback not in known:
      raise unknown(f'data.texts.{name}: feature of the store', text.field, known)
  needed = {f'data.tags.{name}': tags.field for name, tags in config.tags.items()}
  if config.regions.texts:
    needed['data.regions'] = 'boxes'
  for name, text in config.regions.texts.items():
    needed[f'data.regions.texts.{name}'] = text.field
  for where, field in needed.items():
    if field not in known:
      raise unknown(f'{where}: feature of the store', field, known)


def require_texts(config: Data, names: Sequence[str]) -> None:
  """InputError where one of the named texts, tags or texts of regions is in no record: its loss
  would be zero, and say nothing. A look at about a thousand records, spread evenly, which ends when
  each has been seen.
  """
  missing = dict.fromkeys(names)
  if not missing:
    return
  opened = _open(config, check_shards=False)
  records = Records([store.source(config.split) for store in opened])
  looked = range(0, len(records), max(1, len(records) // _FEW))
  for record in looked:
    try:
      example = records[record]
    except ValueError:  # damaged: counted when it is trained on
      continue
    for name in list(missing):
      if _has(example, name, config):
        del missing[name]
    if not missing:
      return
  name = next(iter(missing))
  where, fields, instead = _lacking(name, config)
  raise InputError(
    f'{where}.{name}: got no {fields} in any of {len(looked):,} records of split '
    f'{config.split!r}; expected some, or {instead}weight 0 for the losses of {name!r}'
  )


def _has(example, name, config):
  """Whether an example has some of the texts of this name."""
  if name in config.texts:
    return bool(_pick(example, config.texts[name], 0.0))
  of_parts = config.tags | config.regions.texts
  return any(text.strip() for text in values(example, of_parts[name].field))


def _lacking(name, config):
  """(where the config has texts of a name, the fields they come from, what else there is)."""
  if name in config.tags:
    return 'data.tags', config.tags[name].field, ''
  if name in config.regions.texts:
    return 'data.regions.texts', config.regions.texts[name].field, ''
  text = config.texts[name]
  if text.fallback:
    return 'data.texts', f'{text.field} or {text.fallback}', 'a method without texts, or '
  instead = f'data.texts.{name}.fallback={_OTHER[text.field]}, or '
  return 'data.texts', text.field, instead


def _open(config, check_shards):
  """All stores, or what is read in their place."""
  paths = (config.store, *config.extra_stores)
  return [open_data(path, config, check_shards=check_shards) for path in paths]


def _tokenizer(config, first):
  if not (config.texts or config.tags or config.regions.texts):
    return None
  path = config.tokenizer or first.tokenizer_path
  if not path:
    raise InputError(
      f'data.tokenizer: got {config.tokenizer!r}, and the store {first.path} has none; expected a '
      f'SentencePiece model, or a store made with --tokenizer'
    )
  return Tokenizer(path)


def _fingerprint(config, opened, sizes):
  weights = map(float, config.mixture or sizes)
  parts = [config.split, *zip([store.fingerprint for store in opened], weights)]
  if config.mixture_schedule:  # without one it is as ever
    parts.append(config.mixture_schedule)
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --- loading ------------------------------------------------------------------------------------


class _Key(ISeedSequence):
  """Philox's key: (seed, example index).

  NumPy's usual way to pass one also reads the system's entropy, each time.
  """

  def __init__(self, *words):
    self._words = words

  def generate_state(self, n_words, dtype=np.uint32):
    return np.array(self._words[:n_words], dtype)


class _Load:
  """Number of a batch -> this host's rows of it.

  Picklable; each process has its own thread pool.
  """

  def __init__(
    self,
    config: Data,
    records: Records,
    tokenizer: Tokenizer | None,
    seed: int,
    order: grain.MapDataset,
    *,
    threads: int,
    first: np.ndarray,  # int64 [B], global indexes of the examples of the first batch
    stride: int,  # from one batch to the next
  ):
    self.config = config
    self.records = records
    self._tokenizer = tokenizer
    self._seed = seed
    self._order = order
    self._threads = threads
    self._first = first
    self._stride = stride
    self._pool = self._new_pool()

  def __getstate__(self):
    return {**self.__dict__, '_pool': None}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._pool = self._new_pool()

  def _new_pool(self):
    # Threads start with the first task, so an unused pool costs nothing.
    return concurrent.futures.ThreadPoolExecutor(self._threads, thread_name_prefix='data')

  def close(self) -> None:
    self._pool.shutdown(wait=True, cancel_futures=True)

  def __call__(self, number: int, _: int) -> Batch:
    self.records.open()
    indexes = (self._first + self._stride * number).tolist()
    size = len(indexes)
    batch = empty(self.config, size)
    batch['index'][:] = [self._order[index] for index in indexes]
    step = max(1, min(_ROWS, size // self._threads))
    # A run is read by one task.
    step = self.config.neighbors * math.ceil(step / self.config.neighbors)
    tasks = []
    for row in range(0, size, step):
      rows = range(row, min(row + step, size))
      tasks.append(self._pool.submit(self._fill, batch, rows, indexes))
    for task in tasks:
      task.result()
    return batch

  def _fill(self, batch, rows, indexes):
    """Fills some rows of a batch, which are the examples of these global indexes."""
    # Stage by stage, not row by row: each stage finds its own tables in the processor's cache.
    examples = self.records.read(batch['index'][rows.start : rows.stop].tolist())
    luck = []
    for i, row in enumerate(rows):
      rng = np.random.Generator(np.random.Philox(_Key(self._seed, indexes[row])))
      places = {}
      examples[i] = self._images(batch, row, examples[i], rng, places)
      luck.append((rng.random(len(self.config.texts)).tolist(), rng))
      regions.fill(batch, row, examples[i], places, rng, self.config, self._tokenizer)
    for row, example, (draws, rng) in zip(rows, examples, luck):
      for (name, text), draw in zip(self.config.texts.items(), draws):
        picked = _pick(example, text, draw)
        if text.augment:
          picked = wording.change(picked, text, rng)
        self._text(batch, name, row, picked)

  def _images(self, batch, row, example, rng, places):
    """Fills the views of a row, and the places of their crops; returns its example, or the random
    one that replaces it.
    """
    out = {name: batch[name][row] for name in self.config.views}
    for _ in range(_TRIES):
      try:
        if isinstance(example, ValueError):
          raise example
        if out:
          views.crops(first(example, 'image'), self.config.views, rng, out, places)
        return example
      except ValueError as error:
        reason = error
        if batch['bad'][row] < 0:  # the first one is reported
          batch['bad'][row] = batch['index'][row]
        # Drawn from the example's generator, so it too depends on the example index alone.
        batch['index'][row] = rng.integers(len(self.records))
        [example] = self.records.read([int(batch['index'][row])])
    raise InputError(
      f'data: got {_TRIES} unreadable images in a row (the last one: {reason}); expected images'
    )

  def _text(self, batch, name, row, text):
    if text:
      batch[name][row] = self._tokenizer.encode(text, self.config.text_length)
      batch[valid(name)][row] = batch[name][row].any()


def _pick(example, text: Text, luck: float) -> bytes:
  """The text of an example: from the field, else from the fallback, else b''; `mix` of the examples
  ask the fallback first. luck: uniform from 0 to 1, all that is random.
  """
  fields = (text.field, text.fallback)
  if luck < text.mix:
    fields = (text.fallback, text.field)
    luck = luck / text.mix
  else:
    luck = (luck - text.mix) / (1 - text.mix)
  for field in fields:
    texts = values(example, field)
    places = [i for i, value in enumerate(texts) if value.strip()]
    if places:
      return texts[_place(places, text, field, luck)]
  return b''


def _place(places, text, field, luck):
  """Which of the places that have a text is taken."""
  if text.pick == 'first':
    return places[0]
  if not text.weights or field != 'captions':
    return places[int(luck * len(places))]
  if places[-1] >= len(text.weights):
    raise InputError(
      f'data.texts: got an image of {places[-1] + 1} captions with {len(text.weights)} weights; '
      'expected a weight for each'
    )
  ends = list(itertools.accumulate(text.weights[i] for i in places))
  if not ends[-1]:  # only captions that weigh nothing
    return places[0]
  return places[bisect.bisect_right(ends, luck * ends[-1])]

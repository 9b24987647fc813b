import dataclasses
import os
import shutil
import threading
import time

import numpy as np
import pytest
import simplejpeg

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Data, Text, View
from tips_jax.data import store, tokenizer
from tips_jax.data.reading.pipeline import Pipeline, _Key, require_texts

COUNT, EXTRA = 40, 12
BAD = 7
LONG = 'zebra ' * 300
VIEWS = {'global': View(size=16), 'local': View(size=8, count=3, scale=(0.05, 0.4), flip=0.0)}
TEXTS = {
  'web': Text(field='alt_text', pick='first', fallback='captions'),
  'synthetic': Text(field='captions'),
}


def alt_text(i):
  return '' if i % 5 == 0 else LONG if i == 3 else f'Web text {i}'


def captions(i):
  return [] if i == 11 else ['  '] if i == 12 else [f'caption {i} {c}' for c in 'abc']


def write_store(path, first, count, *, with_tokenizer=True, bad=(), features=None):
  folder = store.temporary_folder(path)
  writer = store.Writer(folder, features or store.features())
  rng = np.random.default_rng(first)
  for i in range(first, first + count):
    image = np.full((24, 32, 3), (i * 5, 255 - i * 5, i * 3), np.uint8)
    image = np.clip(image.astype(int) + rng.integers(-9, 10, image.shape), 0, 255).astype(np.uint8)
    data = simplejpeg.encode_jpeg(image, quality=95)
    writer.add(
      'train',
      {
        'image': data[: len(data) // 2] if i in bad else data,
        'id': f'id{i}',
        'alt_text': alt_text(i),
        'captions': captions(i),
      },
    )
  writer.close()
  if with_tokenizer:
    texts = [t for i in range(COUNT) for t in (alt_text(i), *captions(i)) if t]
    tokenizer.train(texts, os.path.join(folder, 'tokenizer.model'), vocab_size=330)
  return store.finish(folder, str(path), {})


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp('stores')
  return {
    'main': write_store(root / 'main', 0, COUNT, bad=(BAD,)),
    'extra': write_store(root / 'extra', COUNT, EXTRA, with_tokenizer=False),
    'ruined': write_store(root / 'ruined', 0, 8, bad=range(8)),
    'clean': write_store(root / 'clean', 0, COUNT),
  }


@pytest.fixture
def opened():
  """Makes pipelines and closes them after the test."""
  made = []

  def make(config, **kwargs):
    made.append(Pipeline(config, **{'batch_size': 8, 'seed': 3, **kwargs}))
    return made[-1]

  yield make
  for pipeline in made:
    pipeline.close()


def config(folders, **kwargs):
  return Data(
    **{
      'store': folders['main'],
      'views': VIEWS,
      'texts': TEXTS,
      'text_length': 12,
      'threads': 3,
      **kwargs,
    }
  )


def read(pipeline, count):
  return [next(pipeline) for _ in range(count)]


def assert_equal(got, want):
  assert len(got) == len(want)
  for a, b in zip(got, want):
    assert sorted(a) == sorted(b)
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_batches_have_the_promised_shapes(folders, opened):
  batch = next(opened(config(folders)))
  assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
    'global': ((8, 1, 16, 16, 3), 'uint8'),
    'local': ((8, 3, 8, 8, 3), 'uint8'),
    'web': ((8, 12), 'int32'),
    'web_valid': ((8,), 'bool'),
    'synthetic': ((8, 12), 'int32'),
    'synthetic_valid': ((8,), 'bool'),
    'index': ((8,), 'int64'),
    'bad': ((8,), 'int64'),
  }


def test_views_and_texts_are_those_of_the_record(folders, opened):
  pipeline = opened(config(folders))
  for batch in read(pipeline, 5):
    for row, i in enumerate(batch['index']):
      color = np.array((i * 5, 255 - i * 5, i * 3))
      assert np.abs(batch['global'][row].mean((0, 1, 2)) - color).max() < 12
      assert np.abs(batch['local'][row].mean((0, 1, 2)) - color).max() < 12
      own = alt_text(i) or (captions(i) or [''])
      allowed = [own] if isinstance(own, str) else own[:1]
      assert any(
        (batch['web'][row] == pipeline.tokenizer.encode(text, 12)).all() for text in allowed
      )


def test_every_epoch_holds_each_record_once_in_another_order(folders, opened):
  pipeline = opened(config(folders, store=folders['clean']))
  records = np.concatenate([b['index'] for b in read(pipeline, 3 * COUNT // 8)]).reshape(3, COUNT)
  for epoch in records:
    assert sorted(epoch) == list(range(COUNT))
  assert (records[0] != records[1]).any() and (records[1] != records[2]).any()
  other = opened(config(folders, store=folders['clean']), seed=4)
  assert (np.concatenate([b['index'] for b in read(other, COUNT // 8)]) != records[0]).any()


@pytest.mark.parametrize('workers', [0, 2])
def test_neighbors_are_read_together_on_any_number_of_hosts(folders, opened, workers):
  data = config(folders, neighbors=4, extra_stores=(folders['extra'],), workers=workers)
  whole = read(opened(data), 9)
  runs = np.concatenate([batch['index'] for batch in whole])[:52].reshape(-1, 4)
  assert ((np.diff(runs) - 1) % 52 == 0).mean() > 0.9  # a damaged image is replaced by another
  for rows in ([0, 1, 2, 3], [4, 5, 6, 7]):
    own = [{name: x[rows] for name, x in batch.items()} for batch in whole]
    assert_equal(read(opened(data, rows=rows), 9), own)
  again = opened(data, start=5 * 8)
  assert_equal(read(again, 4), whole[5:])


def test_crops_differ_between_epochs(folders, opened):
  batches = read(opened(config(folders, store=folders['clean'])), 2 * COUNT // 8)
  seen = {}
  for batch in batches:
    for i, crop in zip(batch['index'], batch['local']):
      seen.setdefault(int(i), []).append(crop)
  assert all(len(pair) == 2 and (pair[0] != pair[1]).any() for pair in seen.values())


@pytest.mark.parametrize('start', [8, 24, 13])
def test_a_pipeline_goes_on_at_any_index(folders, opened, start):
  whole = read(opened(config(folders)), 12)
  rows = {name: np.concatenate([b[name] for b in whole]) for name in whole[0]}
  resumed = opened(config(folders), start=start)
  assert resumed.next_index == start
  for k, batch in enumerate(read(resumed, 3)):
    for name, x in batch.items():
      np.testing.assert_array_equal(x, rows[name][start + 8 * k : start + 8 * k + 8])
  assert resumed.next_index == start + 24


@pytest.mark.parametrize(
  'parts',
  [
    [[0, 1, 2, 3], [4, 5, 6, 7]],
    [[2, 3, 6, 7], [0, 1, 4, 5]],  # as a torus may lie
    [[0, 4], [1, 5], [2, 6], [3, 7]],
  ],
)
def test_a_row_of_the_global_batch_is_one_example_wherever_it_lies(folders, opened, parts):
  whole = read(opened(config(folders)), 4)
  for rows in parts:
    own = [{name: x[rows] for name, x in batch.items()} for batch in whole]
    assert_equal(read(opened(config(folders), rows=rows), 4), own)


def test_the_number_of_threads_and_batches_ahead_changes_nothing(folders, opened):
  assert_equal(
    read(opened(config(folders, threads=1, prefetch=1)), 6),
    read(opened(config(folders, threads=7)), 6),
  )


def test_worker_processes_change_nothing(folders, opened):
  want = read(opened(config(folders), start=5), 5)
  workers = opened(config(folders, workers=2, threads=2, prefetch=2), start=5)
  assert_equal(read(workers, 5), want)
  assert workers.next_index == 45


def test_the_key_of_an_example_is_philox_own_key():
  keyed = np.random.Philox(key=np.array([5, 2**40 + 1], np.uint64))
  ours = np.random.Philox(_Key(5, 2**40 + 1))
  assert keyed.random_raw(3).tolist() == ours.random_raw(3).tolist()


# --- unreadable records -------------------------------------------------------------------------


def test_an_unreadable_record_is_replaced_and_reported(folders, opened):
  first, again = (opened(config(folders)) for _ in range(2))
  batches = read(first, 2 * COUNT // 8)
  assert_equal(read(again, 2 * COUNT // 8), batches)
  index, bad = (np.concatenate([b[name] for b in batches]) for name in ('index', 'bad'))
  assert (bad == BAD).sum() == 2 and (bad[bad != BAD] == -1).all()
  assert BAD not in index
  for batch in batches:
    for row in np.flatnonzero(batch['bad'] >= 0):
      i = batch['index'][row]
      assert np.abs(batch['global'][row].mean((0, 1, 2)) - (i * 5, 255 - i * 5, i * 3)).max() < 12
  key, reason = first.explain(BAD)
  assert key == f'id{BAD}' and 'truncated' in reason.lower()
  assert first.explain(BAD + 1) == (f'id{BAD + 1}', '')


def test_too_many_unreadable_records_stop_the_run(folders, opened):
  pipeline = opened(
    config(folders, extra_stores=(folders['ruined'],), mixture=(1.0, 1.0), max_bad_fraction=0.02)
  )
  with pytest.raises(InputError, match=r'unreadable images among .*id\d: .*max_bad_fraction=0.02'):
    read(pipeline, 300)
  with pytest.raises(InputError, match='unreadable images in a row'):
    next(opened(config(folders, store=folders['ruined'])))


def test_a_flipped_byte_in_a_shard_costs_one_record(folders, opened, tmp_path):
  path = tmp_path / 'flipped'
  shutil.copytree(folders['clean'], path)
  shard = next(path.glob('*.array_record*'))
  data = bytearray(shard.read_bytes())
  data[data.index(b'id20')] ^= 1
  shard.write_bytes(data)
  pipeline = opened(config(folders, store=str(path)))
  batches = read(pipeline, COUNT // 8)
  bad = np.concatenate([batch['bad'] for batch in batches])
  assert sorted(bad)[-2:] == [-1, 20]
  assert 20 not in np.concatenate([batch['index'] for batch in batches])
  name, reason = pipeline.explain(20)
  assert name == '20' and 'damaged record' in reason and 'hash mismatch' in reason
  alone = opened(config(folders, store=str(path), views={}))
  bad = np.concatenate([batch['bad'] for batch in read(alone, COUNT // 8)])
  assert sorted(bad)[-2:] == [-1, 20]


def test_more_damaged_records_than_allowed_stop_the_run_with_one_line(folders, opened, tmp_path):
  path = tmp_path / 'flipped'
  shutil.copytree(folders['clean'], path)
  shard = next(path.glob('*.array_record*'))
  data = bytearray(shard.read_bytes())
  for i in range(10):
    data[data.index(b'id%d' % (20 + i))] ^= 1
  shard.write_bytes(data)
  pipeline = opened(config(folders, store=str(path), max_bad_fraction=0.02))
  with pytest.raises(InputError, match=r'among .*damaged record.*max_bad_fraction=0.02') as error:
    read(pipeline, 300)
  assert '\n' not in str(error.value)


def test_colors_are_those_of_the_example_after_a_resume(folders, opened):
  color = dict(jitter=0.8, gray=0.2, blur=0.5, solarize=0.2)
  colored = {'global': View(size=16, count=2, **color)}
  whole = read(opened(config(folders, views=colored, threads=1)), 4)
  rest = read(opened(config(folders, views=colored, threads=3), start=16), 2)
  assert_equal(rest, whole[2:])
  plain = read(opened(config(folders, views={'global': View(size=16, count=2)})), 1)
  assert not np.array_equal(plain[0]['global'], whole[0]['global'])
  np.testing.assert_array_equal(plain[0]['index'], whole[0]['index'])


# --- mixtures -----------------------------------------------------------------------------------


def test_stores_without_weights_are_one_data_set(folders, opened):
  pipeline = opened(
    config(folders, store=folders['clean'], extra_stores=(folders['extra'],)),
    batch_size=COUNT + EXTRA,
  )
  assert pipeline.size == COUNT + EXTRA
  assert sorted(next(pipeline)['index']) == list(range(COUNT + EXTRA))


@pytest.mark.parametrize('weights', [(3.0, 1.0), (0.2, 0.8)])
def test_weights_set_the_shares_of_the_stores(folders, opened, weights):
  pipeline = opened(
    config(folders, store=folders['clean'], extra_stores=(folders['extra'],), mixture=weights)
  )
  records = np.concatenate([b['index'] for b in read(pipeline, 50)])
  assert abs((records < COUNT).mean() - weights[0] / sum(weights)) < 0.01
  extra = records[records >= COUNT]
  epochs = extra[: len(extra) // EXTRA * EXTRA].reshape(-1, EXTRA)
  assert all(sorted(epoch) == list(range(COUNT, COUNT + EXTRA)) for epoch in epochs)


def test_the_fingerprint_is_that_of_the_mixture(folders, opened):
  def fingerprint(**kwargs):
    return opened(config(folders, **kwargs)).fingerprint

  extra = (folders['extra'],)
  different = {
    fingerprint(),
    fingerprint(extra_stores=extra),
    fingerprint(extra_stores=extra, mixture=(1.0, 2.0)),
    fingerprint(store=folders['clean']),
  }
  assert len(different) == 4 and fingerprint() == fingerprint(threads=1, views={'v': View(size=8)})


# --- texts --------------------------------------------------------------------------------------


def rows(pipeline, count=30):
  """{record: [batch row as a dict, ...]} of some epochs."""
  out = {}
  for batch in read(pipeline, count):
    for k, i in enumerate(batch['index']):
      out.setdefault(int(i), []).append({name: x[k] for name, x in batch.items()})
  return out


def test_empty_texts_fall_back_or_are_not_valid(folders, opened):
  pipeline = opened(config(folders, store=folders['clean']))
  seen = rows(pipeline)
  for i, examples in seen.items():
    for row in examples:
      assert row['synthetic_valid'] == (i not in (11, 12))
      assert row['web_valid']
      assert row['synthetic'].any() == row['synthetic_valid']
  expected = pipeline.tokenizer.encode(captions(5)[0], 12)
  assert all((row['web'] == expected).all() for row in seen[5])
  lonely = opened(config(folders, store=folders['clean'], texts={'web': Text(field='alt_text')}))
  for i, examples in rows(lonely).items():
    assert all(row['web_valid'] == bool(alt_text(i)) for row in examples)


def shares(folders, opened, text):
  """{text: share of the examples of image 1 that have it}."""
  pipeline = opened(config(folders, store=folders['clean'], texts={'t': text}), batch_size=COUNT)
  names = {tuple(pipeline.tokenizer.encode(t, 12)): t for t in (alt_text(1), *captions(1))}
  found = []
  for batch in read(pipeline, 150):
    found += [names[tuple(batch['t'][k])] for k in np.flatnonzero(batch['index'] == 1)]
  return {t: found.count(t) / len(found) for t in names.values()}


def test_captions_have_their_weights(folders, opened):
  got = shares(folders, opened, Text(field='captions', weights=(3.0, 0.0, 1.0)))
  assert got['caption 1 b'] == got['Web text 1'] == 0
  assert abs(got['caption 1 a'] - 0.75) < 0.1  # 4 standard deviations


def test_a_share_of_the_images_takes_the_fallback(folders, opened):
  sampled = Text(field='alt_text', fallback='captions', mix=0.5)
  got = shares(folders, opened, sampled)
  assert abs(got['Web text 1'] - 0.5) < 0.12
  for c in captions(1):
    assert abs(got[c] - 1 / 6) < 0.09
  always = dict(field='alt_text', fallback='captions', mix=1.0, pick='first')
  assert shares(folders, opened, Text(**always))['caption 1 a'] == 1
  # An empty fallback leaves the field.
  lonely = Text(field='captions', fallback='alt_text', mix=1.0)
  pipeline = opened(config(folders, store=folders['clean'], texts={'t': lonely}))
  for i, examples in rows(pipeline).items():
    assert all(row['t_valid'] == bool(alt_text(i) or i not in (11, 12)) for row in examples)


def test_more_captions_than_weights_are_an_error(folders, opened):
  text = Text(field='captions', weights=(1.0, 1.0))
  pipeline = opened(config(folders, store=folders['clean'], texts={'t': text}))
  with pytest.raises(InputError, match='an image of 3 captions with 2 weights; expected a weight'):
    read(pipeline, 1)


def test_random_picks_use_every_caption_and_first_picks_the_first(folders, opened):
  texts = {'first': Text(field='captions', pick='first'), 'random': Text(field='captions')}
  pipeline = opened(config(folders, store=folders['clean'], texts=texts))
  picked = []
  for i, examples in rows(pipeline, 60).items():
    known = [tuple(pipeline.tokenizer.encode(c, 12)) for c in captions(i) if c.strip()]
    for row in examples:
      if known:
        assert tuple(row['first']) == known[0]
        picked.append(known.index(tuple(row['random'])))
  shares = np.bincount(picked, minlength=3) / len(picked)
  assert np.abs(shares - 1 / 3).max() < 0.1


def test_an_over_long_text_fills_its_row_and_no_other(folders, opened):
  pipeline = opened(config(folders, store=folders['clean']))
  for i, examples in rows(pipeline, 10).items():
    for row in examples:
      if i == 3:
        assert row['web'].all() and (row['web'] == pipeline.tokenizer.encode(LONG, 500)[:12]).all()
      elif alt_text(i):
        np.testing.assert_array_equal(row['web'], pipeline.tokenizer.encode(alt_text(i), 12))


def test_images_alone_need_no_tokenizer(folders, opened):
  pipeline = opened(config(folders, store=folders['extra'], texts={}))
  assert pipeline.tokenizer is None and sorted(next(pipeline)) == [
    'bad',
    'global',
    'index',
    'local',
  ]


def test_a_tokenizer_can_be_named(folders, opened):
  path = os.path.join(folders['main'], 'tokenizer.model')
  pipeline = opened(config(folders, store=folders['extra'], tokenizer=path))
  assert next(pipeline)['web_valid'].all()
  assert pipeline.tokenizer.sha256 == opened(config(folders)).tokenizer.sha256


# --- errors and leaving -------------------------------------------------------------------------


@pytest.mark.parametrize(
  'fields, arguments, message',
  [
    ({'store': ''}, {}, 'store'),
    ({'split': 'tarin'}, {}, 'train'),
    ({'views': {}, 'texts': {}}, {}, 'data.views'),
    ({'views': {'index': View(size=8)}}, {}, "got 'index'"),
    ({'views': {'web': View(size=8)}}, {}, "got 'web'"),
    ({'tokenizer': 'nowhere.model'}, {}, 'nowhere.model'),
    ({}, {'batch_size': 0}, 'batch_size: got 0'),
    ({}, {'seed': -1}, 'seed'),
  ],
)
def test_what_cannot_work_is_refused_before_any_thread_starts(folders, fields, arguments, message):
  before = threading.active_count()
  with pytest.raises(InputError, match=message):
    Pipeline(config(folders, **fields), **{'batch_size': 8, 'seed': 0, **arguments})
  assert threading.active_count() <= before  # those of earlier tests may still be leaving


def test_texts_without_a_tokenizer_are_refused(folders):
  with pytest.raises(InputError, match='data.tokenizer'):
    Pipeline(config(folders, store=folders['extra']), batch_size=8, seed=0)


def test_close_leaves_no_thread(folders):
  def ours():
    return [t.name for t in threading.enumerate() if t.name.startswith(('data', 'grain'))]

  pipeline = Pipeline(config(folders, prefetch=8), batch_size=16, seed=0)
  next(pipeline)
  assert ours()
  pipeline.close()
  deadline = time.monotonic() + 5
  while ours() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not ours()
  pipeline.close()
  with pytest.raises(ValueError, match='closed'):
    next(pipeline)


def test_a_text_that_no_record_has_is_an_error_of_its_branch(folders, monkeypatch, tmp_path):
  monkeypatch.setitem(globals(), 'captions', lambda i: [' '])
  data = config(folders, store=write_store(tmp_path / 'store', 0, 8, with_tokenizer=False))
  with pytest.raises(
    InputError,
    match='^data.texts.synthetic: got no captions in any of 8 records of split .train.; expected '
    "some, or data.texts.synthetic.fallback=alt_text, or weight 0 for the losses of 'synthetic'$",
  ):
    require_texts(data, ['web', 'synthetic'])
  require_texts(data, ['web'])
  both = TEXTS | {'synthetic': Text(field='captions', fallback='alt_text')}
  require_texts(dataclasses.replace(data, texts=both), ['web', 'synthetic'])
  require_texts(config(folders), ['web', 'synthetic'])  # a few records without one are no error

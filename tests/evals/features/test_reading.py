"""Reading a split: order, batches of one shape, broken images, equal texts, numbers that are not
finite.
"""

import dataclasses

import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.data import views
from tips_jax.evals.features import reading as features


def test_features_labels_and_texts_follow_the_store(
  store, tokenizer, config, encoder, make_encoder
):
  found = features.extract(
    encoder,
    store,
    'test',
    config=config,
    names=('web', 'embedding'),
    tokenizer=tokenizer,
    text_length=8,
  )
  source = store.source('test')
  rows = [source[i] for i in range(20)]
  alone = make_encoder()
  for i, row in enumerate(rows):
    image = views.evaluation(row['image'], config.size)
    np.testing.assert_array_equal(found.image['web'][i], alone.image(image[None])['web'][0])
  assert found.label.tolist() == [row['label'] for row in rows]
  expected = [(i, c.decode()) for i, row in enumerate(rows) for c in row['captions']]
  assert list(zip(found.owner.tolist(), found.captions)) == expected
  for embedding, caption in zip(found.text, found.captions):
    np.testing.assert_array_equal(embedding, alone.text(tokenizer.encode(caption, 8)[None])[0])


def test_every_batch_has_one_shape_and_the_visitor_sees_no_padding(
  store, tokenizer, config, encoder
):
  seen = []
  found = features.extract(
    encoder,
    store,
    'test',
    config=config,
    names=('web',),
    tokenizer=tokenizer,
    text_length=8,
    visit=lambda patch, records: seen.append((len(patch), len(records))),
  )
  assert {x.shape for x in encoder.images} == {(7, config.size, config.size, 3)}
  assert {x.shape for x in encoder.texts} == {(7, 8)}
  assert seen == [(7, 7), (7, 7), (6, 6)] and len(found.label) == 20


def test_equal_texts_are_encoded_once(tokenizer, encoder):
  encoder.noise = 1.0  # every call of the tower differs
  texts = [
    'red red blue blue',
    'corner red',
    'RED red blue blue',
    'corner red',
    'blue green red red',
  ]
  found = features.encode_texts(encoder, texts, tokenizer, 8, 4)
  assert (
    (found[0] == found[2]).all() and (found[1] == found[3]).all() and (found[0] != found[1]).any()
  )
  assert len(encoder.texts) == 1


def test_alt_text_is_used_when_asked_for_and_empty_ones_are_left_out(
  store, tokenizer, config, encoder
):
  config = dataclasses.replace(config, retrieval_text='alt_text')
  found = features.extract(
    encoder, store, 'test', config=config, names=(), tokenizer=tokenizer, text_length=8
  )
  assert found.owner.tolist() == [i for i in range(20) if i % 4]


def test_a_limit_takes_evenly_spaced_records(store, config, encoder):
  found = features.extract(
    encoder, store, 'train', config=dataclasses.replace(config, limit=8), names=()
  )
  assert found.record.tolist() == [0, 5, 10, 15, 20, 25, 30, 35]
  assert features.records(range(3), 10).tolist() == [0, 1, 2]


def test_unreadable_images_are_left_out(tmp_path, write_store, config, tokenizer, encoder, caplog):
  broken = {('test', i) for i in (0, 5, 7, 8, 9, 10, 11, 12, 13)}  # the second batch wholly
  store = write_store(tmp_path / 'store', broken=broken)
  found = features.extract(
    encoder, store, 'test', config=config, names=('web',), tokenizer=tokenizer, text_length=8
  )
  kept = [1, 2, 3, 4, 6, 14, 15, 16, 17, 18, 19]
  assert found.record.tolist() == kept and found.image['web'].shape == (11, 3)
  source = store.source('test')
  assert found.owner.tolist() == [i for i, n in enumerate(kept) for _ in source[n]['captions']]
  assert 'record 5' in caplog.text
  broken = write_store(tmp_path / 'broken', test=3, broken={('test', i) for i in range(3)})
  with pytest.raises(InputError, match='no readable image'):
    features.extract(encoder, broken, 'test', config=config, names=())


def test_rows_that_are_not_finite_become_zero():
  x = np.array([[1.0, 2.0], [np.nan, 1.0], [np.inf, 0.0], [-1.0, 0.0]])
  assert features.finite(x).tolist() == [[1, 2], [0, 0], [0, 0], [-1, 0]]


def test_an_output_that_the_encoder_lacks_is_named(store, config, encoder):
  with pytest.raises(InputError, match="'wbe'.*web"):
    features.extract(encoder, store, 'test', config=config, names=('wbe',))

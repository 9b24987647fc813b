"""All the tasks together: an encoder that knows everything, one that knows nothing, and stores that
lack something.
"""

import dataclasses

import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.evals import during_training as run

NAMES = {f'retrieval/{way}_r{k}' for way in ('t2i', 'i2t') for k in (1, 5, 10)} | {
  'knn/accuracy',
  'segmentation/miou',
}


def test_an_encoder_that_sees_scores_high_and_keeps_its_probe(
  store, tokenizer, config, encoder, make_encoder
):
  keep = {}
  found = run.evaluate(encoder, store, tokenizer=tokenizer, config=config, text_length=8, keep=keep)
  assert set(found) == NAMES and all(type(v) is float for v in found.values())
  assert found['knn/accuracy'] == 1.0 and found['segmentation/miou'] > 0.8
  assert found['retrieval/t2i_r5'] > 0.5 and found['retrieval/t2i_r1'] <= found['retrieval/t2i_r5']
  assert keep['probe'].kernel.shape == (3, 3)
  again = run.evaluate(make_encoder(), store, tokenizer=tokenizer, config=config, text_length=8)
  assert again == found


def test_noise_scores_about_chance(store, tokenizer, config, make_encoder):
  found = run.evaluate(
    make_encoder(noise=1e4), store, tokenizer=tokenizer, config=config, text_length=8
  )
  chance, _ = run.baselines(store, config, patch=8, tokenizer=tokenizer, text_length=8)
  assert found['knn/accuracy'] < 0.75 and found['segmentation/miou'] < 0.4
  assert found['retrieval/t2i_r1'] < chance['retrieval/t2i_r1'] + 0.25


def test_a_diverged_model_scores_no_retrieval(store, tokenizer, config, make_encoder):
  found = run.evaluate(
    make_encoder(noise=np.nan), store, tokenizer=tokenizer, config=config, text_length=8
  )
  assert all(v == 0 for k, v in found.items() if k.startswith('retrieval/'))
  assert np.isfinite(list(found.values())).all()


def test_baselines_have_the_same_names(store, tokenizer, config):
  chance, baseline = run.baselines(store, config, patch=8, tokenizer=tokenizer, text_length=8)
  assert set(chance) == set(baseline) == NAMES
  assert all(0 <= v <= 1 for v in (*chance.values(), *baseline.values()))
  assert baseline['knn/accuracy'] > chance['knn/accuracy']  # colors are all there is to see


@pytest.mark.parametrize('task', ['retrieval', 'knn', 'segmentation'])
def test_tasks_run_alone(store, tokenizer, config, encoder, task):
  config = dataclasses.replace(config, tasks=(task,))
  expected = {name for name in NAMES if name.startswith(task)}
  assert (
    set(run.evaluate(encoder, store, tokenizer=tokenizer, config=config, text_length=8)) == expected
  )
  chance, baseline = run.baselines(store, config, patch=8, tokenizer=tokenizer, text_length=8)
  assert set(chance) == set(baseline) == expected


def test_no_task_reads_nothing(store, config, encoder):
  assert run.evaluate(encoder, store, config=dataclasses.replace(config, tasks=())) == {}
  assert encoder.images == []


def test_missing_annotations_are_named_before_anything_is_read(
  tmp_path, write_store, tokenizer, config, encoder
):
  bare = write_store(tmp_path / 'bare', annotations=())
  for task, feature in (('knn', 'label'), ('segmentation', 'mask')):
    with pytest.raises(InputError, match=f"'{task}' needs the feature '{feature}'"):
      run.evaluate(
        encoder, bare, tokenizer=tokenizer, config=dataclasses.replace(config, tasks=(task,))
      )
  assert encoder.images == []


def test_missing_split_tokenizer_and_text(store, tmp_path, write_store, tokenizer, config, encoder):
  with pytest.raises(InputError, match="got 'tset'.*did you mean 'test'"):
    run.check(store, dataclasses.replace(config, split='tset'), tokenizer=tokenizer)
  with pytest.raises(InputError, match='needs a tokenizer'):
    run.check(store, config)
  mute = write_store(tmp_path / 'mute', captions=False)
  with pytest.raises(InputError, match="needs a text tower, and 'captions'"):
    run.evaluate(encoder, mute, tokenizer=tokenizer, config=config, text_length=8)


def test_an_encoder_without_text_tower_is_refused_for_retrieval(store, tokenizer, config, encoder):
  encoder.text = lambda ids: None
  with pytest.raises(InputError, match='needs a text tower'):
    run.evaluate(encoder, store, tokenizer=tokenizer, config=config, text_length=8)


def test_without_training_texts_there_is_no_pixel_baseline_of_retrieval(
  tmp_path, write_store, tokenizer, config
):
  store = write_store(tmp_path / 'store', train=0)
  config = dataclasses.replace(config, tasks=('retrieval',))
  chance, baseline = run.baselines(store, config, patch=8, tokenizer=tokenizer, text_length=8)
  assert baseline == {} and chance['retrieval/t2i_r1'] == 1 / 20

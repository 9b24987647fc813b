"""Raw files -> prepare -> caption -> train -> curate -> train -> evaluate, each by its command."""

import json

import pytest

from benchmarks import end_to_end
from tips_jax.data import store

IMAGES = 160


@pytest.mark.once
def test_from_raw_files_to_measured_models(tmp_path):
  """Whether the curated half is learned better takes longer: benchmarks/end_to_end.py."""
  flags = [f'--folder={tmp_path}', f'--images={IMAGES}', '--test=40', '--steps=4', '--seeds=1']
  flags.append('--row=both,runlocal')
  everything, curated = end_to_end.main(flags)
  assert everything['images'] == IMAGES and everything['wrong'] == 0.5
  for line in (everything, curated):
    assert line['steps'] == 4 and 0 <= line['retrieval/synthetic/t2i_r1'] <= 100
    assert 0 < line['knn/accuracy'] <= 100
  before = list(store.open_store(tmp_path / 'captioned').source('train'))
  after = list(store.open_store(tmp_path / 'curated-0').source('train'))
  silent = sum(not len(record['captions']) for record in before)
  # Half of those with captions, and those without, which cannot be judged.
  assert len(after) == curated['images'] == silent + round((IMAGES - silent) / 2)
  wrong = set(json.loads((tmp_path / 'raw/wrong.json').read_text()))
  assert len(wrong) == IMAGES // 2
  assert curated['wrong'] == sum(record['id'].decode() in wrong for record in after) / len(after)
  # The texts of the wrong ones are those of another image, whose own texts are another's, too.
  scenes = list(store.open_store(tmp_path / 'scenes').source('train'))
  for scene, record in zip(scenes, before, strict=True):
    assert scene['image'] == record['image']
    same = scene['alt_text'] == record['alt_text']
    assert same or record['id'].decode() in wrong
  made = store.open_store(tmp_path / 'curated-0').info
  assert [*made['captions']][0]['captioner'].startswith('table:') and len(made['curation']) == 1
  assert end_to_end.main(flags) == [everything, curated]  # nothing is made again

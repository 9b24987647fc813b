"""The report: whole files, valid JSON, links that resolve, pictures that show something."""

import dataclasses
import html.parser
import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.evals import during_training as run
from tips_jax.evals.report import training as report
from tips_jax.evals.report import training_plotting as pictures

CHANCE = {'retrieval/t2i_r1': 0.05, 'knn/accuracy': 0.4, 'segmentation/miou': 0.1}
AFTER = {'retrieval/t2i_r1': 0.5, 'knn/accuracy': 1.0, 'segmentation/miou': float('nan')}


@pytest.fixture
def lines(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  rows = [
    {'step': i, 'loss': 3.0 - i / 50, 'loss/a': None if i == 4 else 1.0, 'rate': 5}
    for i in range(30)
  ]
  rows += [{'step': i, 'knn/accuracy': i / 30} for i in (0, 10, 20)]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def links(page):
  found = []

  class Parser(html.parser.HTMLParser):
    def handle_starttag(self, tag, attributes):
      assert tag != 'script'
      found.extend(value for name, value in attributes if name in ('src', 'href'))

  Parser().feed(page)
  return found


def test_a_whole_report(tmp_path, store, tokenizer, config, encoder, lines):
  keep = {}
  run.evaluate(encoder, store, tokenizer=tokenizer, config=config, text_length=8, keep=keep)
  table = report.write(
    tmp_path,
    before={},
    after=AFTER,
    chance=CHANCE,
    baseline=CHANCE,
    encoder=encoder,
    store=store,
    config=config,
    tokenizer=tokenizer,
    text_length=8,
    probe=keep['probe'],
    title='a < b',
    facts={'steps': '30 & more'},
    metrics_path=lines,
  )
  content = json.loads((tmp_path / 'report.json').read_text())
  assert content['before'] == {} and content['chance'] == CHANCE
  assert content['after'] == {**AFTER, 'segmentation/miou': None}
  page = (tmp_path / 'index.html').read_text()
  assert 'a &lt; b' in page and '30 &amp; more' in page and '50.0 %' in page
  pictures_shown = [link for link in links(page) if link.endswith('.png')]
  assert pictures_shown == [
    f'report/{n}.png' for n in ('bars', 'features', 'retrieval', 'losses', 'progress')
  ]
  for link in links(page):
    assert '://' not in link and (tmp_path / link).is_file(), link
  for link in pictures_shown:
    image = cv2.imread(str(tmp_path / link))
    assert min(image.shape[:2]) > 150 and image.std() > 5, link
  assert not list(tmp_path.glob('*.tmp'))
  assert [line.split()[0] for line in table.splitlines()[1:]] == list(AFTER)


def test_what_has_no_material_is_left_out_and_old_pictures_go(tmp_path, store, config, encoder):
  (tmp_path / 'report').mkdir()
  (tmp_path / 'report' / 'retrieval.png').write_text('old')
  report.write(
    tmp_path,
    before={},
    after={},
    chance={},
    baseline={},
    encoder=encoder,
    store=store,
    config=dataclasses.replace(config, tasks=('knn',)),
    metrics_path=tmp_path / 'none.jsonl',
  )
  assert [p.name for p in (tmp_path / 'report').iterdir()] == ['features.png']
  assert links((tmp_path / 'index.html').read_text()) == [
    'report/features.png',
    'report.json',
    'metrics.jsonl',
  ]


def test_table():
  rows = report.table(
    before={}, after=AFTER, chance=CHANCE, baseline={'knn/accuracy': 0.123}
  ).splitlines()
  assert rows[0].split() == ['before', 'after', 'chance', 'pixels']
  assert rows[1].split() == ['retrieval/t2i_r1', '-', '50.0', '%', '5.0', '%', '-']
  assert rows[2].split() == ['knn/accuracy', '-', '100.0', '%', '40.0', '%', '12.3', '%']
  assert len({len(row) for row in rows}) == 1


def test_errors_have_their_units_and_null_is_no_number(tmp_path, store, config, encoder, lines):
  after = {
    'depth/rmse': 0.4567,
    'dpt_normals/mean': 31.26,
    'depth/abs_rel': 0.25,
    'zeroshot/accuracy': None,
  }
  found = report.write(
    tmp_path,
    before={},
    after=after,
    chance={'depth/rmse': 1.5},
    baseline={},
    encoder=encoder,
    store=store,
    config=dataclasses.replace(config, tasks=('depth',)),
    metrics_path=lines,
  )
  rows = [line.split() for line in found.splitlines()[1:]]
  assert rows == [
    ['depth/rmse', '-', '0.457', 'm', '1.500', 'm', '-'],
    ['dpt_normals/mean', '-', '31.3', '°', '-', '-'],
    ['depth/abs_rel', '-', '25.0', '%', '-', '-'],
    ['zeroshot/accuracy', '-', '-', '-', '-'],
  ]
  assert json.loads((tmp_path / 'report.json').read_text())['after']['zeroshot/accuracy'] is None
  assert 'linear depth, RMSE' in (tmp_path / 'index.html').read_text()


def test_benchmarks_alone_draw_no_patches_of_a_split_that_is_not_there(store, config, encoder):
  assert (
    pictures.patch_features(
      encoder, store, dataclasses.replace(config, tasks=(), split='none'), None
    )
    is None
  )


def test_unwritable_folder(tmp_path, store, config, encoder):
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='cannot write the report'):
    report.write(
      tmp_path / 'file',
      before={},
      after={},
      chance={},
      baseline={},
      encoder=encoder,
      store=store,
      config=config,
    )


def test_components_are_the_principal_ones():
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(8, 8)))[0]
  scores = rng.normal(size=(6 * 25, 8)) * np.array([9, 5, 3, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2])
  found = pictures.components((scores @ basis).reshape(6, 5, 5, 8)).reshape(-1, 3)
  assert found.min() == 0 and found.max() == 1
  for k in range(3):
    inside = (found[:, k] > 0) & (found[:, k] < 1)
    assert abs(np.corrcoef(found[inside, k], scores[inside, k])[0, 1]) > 0.99
  assert pictures.components(np.ones((2, 3, 3, 2))).shape == (2, 3, 3, 3)  # narrow and constant


def test_smoothing_keeps_lines_straight_and_means_right():
  y = np.random.default_rng(0).normal(size=40)
  found = pictures._smooth(y, 5)
  assert found[20] == pytest.approx(y[15:26].mean()) and found[0] == pytest.approx(y[0])
  assert found[-1] == pytest.approx(y[-6:].mean())
  np.testing.assert_allclose(pictures._smooth(np.arange(20.0), 3)[:17], np.arange(17.0))


def test_importing_the_report_does_not_import_matplotlib():
  code = 'import sys, tips_jax.evals.during_training, tips_jax.evals.report.training; sys.exit("matplotlib" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0

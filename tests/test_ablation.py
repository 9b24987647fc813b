"""benchmarks/ablation.py: what its tables say, and that a table is made, once."""

import io
import json
import math
import os
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from benchmarks import ablation, ablation_protocol, ablation_report
from configs import ablation as config
from tips_jax.core.errors import InputError

pytestmark = pytest.mark.once

COLUMN = ablation_protocol.Column(
  'segmentation mIoU, %', (('alt', 'retrieval', ('web/t2i_r1', 't2i_r1')),)
)


def record(row, seed, value, budget='a'):
  return {
    'row': row,
    'seed': seed,
    'images': 640,
    'budget': budget,
    'flags': [],
    'commit': 'abc',
    'measures': {COLUMN.title: value},
    'random': {COLUMN.title: 1.0} if row == 'masked' else None,
    'signs': {'spread/rank': value},
  }


@pytest.fixture
def one_column(monkeypatch):
  monkeypatch.setitem(ablation_protocol.COLUMNS, 'scenes', (COLUMN,))


def test_the_standard_error_is_that_of_the_mean_over_seeds():
  assert ablation_report.mean_and_error([1.0, 2.0, 3.0]) == (2.0, 1 / math.sqrt(3))
  mean, error = ablation_report.mean_and_error([5.0])
  assert mean == 5.0 and math.isnan(error)


@pytest.mark.parametrize(
  'values, lower, said',
  [
    ([1.0, 2.0, 3.0], False, 'shown'),  # 2 with an error of 0.58
    ([1.0, 2.0, 3.0], True, 'the opposite'),
    ([-1.0, -2.0, -3.0], True, 'shown'),
    ([0.0, 1.0, 2.0], False, 'not shown'),  # 1 with an error of 0.58
    ([9.0], False, 'one seed'),
  ],
)
def test_an_ordering_is_shown_beyond_two_standard_errors(values, lower, said):
  assert ablation_report.verdict(values, lower) == said


def test_differences_are_paired_by_seed_and_budget():
  records = [record('both', 0, 1.0), record('both', 1, 5.0), record('masked', 1, 7.0)]
  records += [record('masked', 0, 2.0), record('masked', 2, 9.0), record('masked', 0, 9.0, 'b')]
  found = ablation_report.differences(records, 'both', 'masked', COLUMN.title)
  assert {budget: sorted(values) for budget, values in found.items()} == {'a': [1.0, 2.0]}


def test_the_page_has_means_orderings_and_signs(one_column, tmp_path):
  records = []
  for seed in range(3):
    records += [record('both', seed, 10.0 + seed), record('masked', seed, 14.0 + 2 * seed)]
  ablation_report.write(tmp_path / 'table', records, data='scenes', planned=8)
  text = (tmp_path / 'table.md').read_text()
  assert '6 of 8 runs' in text
  assert '| random weights | 0 |  | 1.0 |' in text
  assert '| both | 640 | 3 | 11.0 ± 0.6 |' in text
  assert '| masked over both | segmentation mIoU, % | a | 5.0 ± 0.6 | shown |' in text
  assert json.loads((tmp_path / 'table.json').read_text()) == records
  assert Image.open(tmp_path / 'table.webp').width > 100


def test_a_caption_is_looked_up_with_the_token_of_its_own_where_there_is_one():
  def results(**metrics):
    values = {name.replace('_of_', '/'): {'value': value} for name, value in metrics.items()}
    return {'results': [{'task': 'retrieval', 'metrics': values}]}

  others = {'miou': {'value': 1.0}}
  camvid = {'results': [{'task': 'segmentation', 'metrics': others}]}
  rgbd = {'results': [{'task': 'depth', 'metrics': {'rmse': {'value': 1.0}}}]}
  one = results(t2i_r1=1.0, i2t_r1=2.0)
  two = results(t2i_r1=1.0, i2t_r1=2.0, synthetic_of_t2i_r1=5.0, synthetic_of_i2t_r1=6.0)
  for flickr8k, mean in ((one, 1.5), (two, 5.5)):
    found = ablation_protocol.measures(
      'flickr8k', {'flickr8k': flickr8k, 'camvid': camvid, 'rgbd': rgbd}
    )
    assert found['retrieval, %'] == mean


def test_every_ordering_names_rows_and_a_column():
  titles = {column.title for columns in ablation_protocol.COLUMNS.values() for column in columns}
  assert set(ablation_protocol.COLUMNS) == set(config.DATA)
  for worse, better, title in ablation_protocol.ORDERINGS:
    assert worse in config.ROWS and better in config.ROWS and title in titles


def test_folds_hold_every_photo_once_and_null_is_void(tmp_path):
  pack = tmp_path / 'ccp'
  pack.mkdir()
  rows = []
  with zipfile.ZipFile(pack / 'images.zip', 'w') as archive:
    for number in range(7):
      mask = io.BytesIO()
      Image.fromarray(np.array([[0, 1, 58]], np.uint8)).save(mask, 'PNG')
      archive.writestr(f'{number}.jpg', b'image')
      archive.writestr(f'{number}.png', mask.getvalue())
      rows.append({'image': f'{number}.jpg', 'mask': f'{number}.png'})
  (pack / 'train.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  folder = tmp_path / 'tables'
  ablation_protocol.write_folds(pack, folder)
  tested = []
  for fold in range(5):
    split = {}
    for name in ('train', 'test'):
      lines = (folder / f'{name}{fold}.jsonl').read_text().splitlines()
      split[name] = [json.loads(line)['image'] for line in lines]
    assert not set(split['train']) & set(split['test'])
    assert len(split['train']) + len(split['test']) == 7
    tested += split['test']
  assert sorted(tested) == [row['image'] for row in rows]
  with zipfile.ZipFile(folder / 'images.zip') as archive:
    mask = Image.open(io.BytesIO(archive.read('3.png')))
  assert np.asarray(mask).tolist() == [[255, 0, 57]]


@pytest.mark.parametrize(
  'flags, said',
  [
    (['--rows=web,mask'], "--rows: got 'mask'.*did you mean 'masked'"),
    (['--seeds=0'], '--seeds: got 0; expected at least 1'),
    (['--data=fashion'], "--packs: got 'None'; expected a folder that holds 'fashion'"),
    (['--equal=time', '--scaling=1,2'], '--scaling: got it with --equal=time'),
  ],
)
def test_a_mistake_is_one_line(flags, said, tmp_path):
  with pytest.raises(InputError, match=said):
    ablation.options([f'--folder={tmp_path}', *flags])


def table(folder, *flags):
  core = min(os.sched_getaffinity(0))  # that of the tests
  return ablation.Table(
    ablation.options(
      [
        f'--folder={folder}',
        f'--cores={core}',
        '--rows=web,both',
        '--seeds=1',
        '--images=16',
        '--runlocal',
        *flags,
      ]
    )
  )


def test_rows_get_equal_images_or_equal_time(tmp_path):
  (tmp_path / 'speed-scenes.json').write_text(json.dumps({'web': 30.0, 'both': 20.0, 'all': 10.0}))
  steps = {}
  for equal in ('images', 'time'):
    planned = table(tmp_path, f'--equal={equal}', '--images=800').runs()
    steps[equal] = {run.row: run.images for run in planned}
  assert steps['images'] == {'web': 800, 'both': 800}
  assert steps['time'] == {'web': 2400, 'both': 1600}


def test_a_table_is_made_once_and_what_is_missing_is_made_again(
  tmp_path, monkeypatch, plain_xla, one_column, capsys
):
  monkeypatch.setenv('XLA_FLAGS', plain_xla)
  monkeypatch.setattr(
    ablation_protocol,
    'evaluations',
    lambda data, stores, packs: {
      'alt': [f'--store={stores}/scenes_alt', '--task=retrieval', '--size=56', '--limit=16']
    },
  )
  assert table(tmp_path).go() == 0
  first = capsys.readouterr().out
  assert '2 of 2 runs' in first and '| both | 16 | 1 |' in first and 'random weights' in first
  folder = tmp_path / 'scenes-images-16'
  assert json.loads((folder / 'both-0/ablation.json').read_text())['images'] == 16
  # Nothing is left to do: no program is started, and the table is the same.
  monkeypatch.setattr(ablation.Programs, 'run', None)
  assert table(tmp_path).go() == 0
  assert capsys.readouterr().out == first
  # On another machine the written table has them; but not those of another config.
  (tmp_path / 'other/stores/scenes').mkdir(parents=True)
  (tmp_path / 'other/stores/scenes_alt').mkdir()
  assert table(tmp_path / 'other', f'--output={tmp_path}').go() == 0
  assert capsys.readouterr().out == first
  longer = table(tmp_path / 'other', f'--output={tmp_path}', '--images=32')
  longer.take_known(longer.runs())
  assert not list(tmp_path.glob('other/scenes-images-32/*'))
  assert len(longer.others) == 2  # they stay in the table
  changed = table(tmp_path / 'other', f'--output={tmp_path}', '--', '--config.seed=5')
  with pytest.raises(InputError, match='whose table has web-0 by another recipe'):
    changed.take_known(changed.runs())
  # A run that fails is named, and the others are in the table.
  shutil.rmtree(folder / 'web-0')

  def fail(self, core, module, flags, said):
    raise ablation.Failed(f'{module} on core {core}')

  monkeypatch.setattr(ablation.Programs, 'run', fail)
  assert table(tmp_path).go() == 1
  out, err = capsys.readouterr()
  assert '1 of 2 runs' in out and 'failed: web-0: main on core' in err


def test_runs_of_other_flags_are_not_mixed(tmp_path):
  table(tmp_path).claim()
  table(tmp_path).claim()
  with pytest.raises(InputError, match='expected another folder'):
    table(tmp_path, '--', '--config.schedule.batch_size=4').claim()

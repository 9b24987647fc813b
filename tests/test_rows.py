"""benchmarks/rows.py: what its table says, and that a run is made once."""

import json

import pytest

from benchmarks import ablation, rows

FLAGS = ['--config=configs/regions.py', '--task=retrieval', '--rows', 'clip', 'all', '--seeds=2']


@pytest.fixture
def programs(monkeypatch):
  """[(program, flags)] that were started: `evaluate` finds 10 (clip) or 12 + 4 x seed (all)."""
  started = []

  def run(self, core, module, flags, said):
    given = dict(flag.removeprefix('--').split('=', 1) for flag in flags if '=' in flag)
    started.append((module, given))
    if module == 'main':
      return
    row, seed = given['checkpoint'].rpartition('/')[2].split('-')
    if row == 'broken':
      raise ablation.Failed('exit code 2: no')
    value = 10.0 if row == 'clip' else 12.0 + 4 * int(seed)
    metrics = {'t2i_r1': {'value': value}, 't2i_r5': {'value': 99.0}}
    folder = rows.pathlib.Path(given['output'])
    folder.mkdir(parents=True)
    content = {'results': [{'task': 'retrieval', 'metrics': metrics}]}
    (folder / 'results.json').write_text(json.dumps(content))

  monkeypatch.setattr(ablation.Programs, 'run', run)
  return started


def test_a_table_is_made_once_seed_by_seed(programs, tmp_path, capsys):
  flags = [*FLAGS, f'--folder={tmp_path}', '--', '--config.schedule.total_steps=3']
  assert rows.main(flags) == 0
  assert capsys.readouterr().out.splitlines() == [
    '| row | seeds | retrieval t2i_r1 |',
    '| --- | --- | --- |',
    '| `clip` | 2 | 10.0 ± 0.0 |',
    '| `all` | 2 | 14.0 ± 2.0 |',
    '| `all` - `clip` | 2 | +4.0 ± 2.0 |',
  ]
  trained = [given for module, given in programs if module == 'main']
  assert [given['config'].partition(':')[2] for given in trained] == ['clip', 'all'] * 2
  assert [given['config.seed'] for given in trained] == ['0', '0', '1', '1']
  assert {given['config.schedule.total_steps'] for given in trained} == {'3'}
  # The first draws the scenes that all others read, and that all are measured on.
  scenes = str(tmp_path / 'clip-0' / 'scenes')
  assert [given.get('config.data.store') for given in trained] == [None, *[scenes] * 3]
  measured = [given for module, given in programs if module == 'evaluate']
  assert {given['store'] for given in measured} == {scenes} and len(measured) == 4
  programs.clear()
  assert rows.main(flags) == 0 and not programs


def test_a_run_that_fails_is_named_beside_those_before_it(programs, tmp_path, capsys):
  flags = ['--config=c.py', '--task=retrieval', '--rows', 'clip', 'broken', '--seeds=1']
  assert rows.main([*flags, f'--folder={tmp_path}']) == 1
  said = capsys.readouterr()
  assert '| `clip` | 1 | 10.0 |' in said.out
  assert said.err == 'error: broken-0: exit code 2: no\n'


@pytest.mark.parametrize('other', ['--size=96', '--task=tagging', '--config.seed=7'])
def test_runs_with_other_flags_are_not_taken_for_these(programs, tmp_path, capsys, other):
  place = f'--folder={tmp_path}'
  assert rows.main([*FLAGS, place]) == 0
  programs.clear()
  given = ['--', other] if other.startswith('--config.') else [other]
  assert rows.main([*FLAGS, place, *given]) == 2 and not programs
  assert 'expected another folder' in capsys.readouterr().err

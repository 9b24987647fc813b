"""A work folder is one that checkpoints can be written to and read back from."""

import os

import pytest

from tips_jax.core.errors import InputError
from tips_jax.runtime.peers import Peers
from tips_jax.runtime.signals import Preemption
from tips_jax.train import workdir


def open_workdir(path):
  return workdir.open_workdir(os.fspath(path), '--workdir', Peers(Preemption()))


def test_a_new_folder_is_made_with_those_above_it(tmp_path):
  assert open_workdir(tmp_path / 'a' / 'b c@2').is_dir()
  assert list((tmp_path / 'a' / 'b c@2').iterdir()) == []


@pytest.mark.parametrize(
  'name',
  [
    'a[1]',
    'a[!x]',
    'a[',
    'a]',
    'a*',
    'a?',
    'a\\b',
    'gs:',
    'a[1]/b',
    b'a\xff'.decode('utf-8', 'surrogateescape'),
  ],
)
def test_names_that_orbax_cannot_read_back_are_refused(tmp_path, name):
  with pytest.raises(InputError, match='--workdir: got .*no checkpoint could be read back'):
    open_workdir(tmp_path / name)
  assert list(tmp_path.iterdir()) == []


def test_a_folder_inside_of_such_a_name_is_refused(tmp_path, monkeypatch):
  (tmp_path / 'a[1]').mkdir()
  monkeypatch.chdir(tmp_path / 'a[1]')
  with pytest.raises(InputError, match="which has '\\['"):
    open_workdir('run')


@pytest.mark.parametrize('path', ['/proc/run', 'a\0b', 'gs://bucket/run', ''])
def test_a_place_where_nothing_can_be_written(path):
  with pytest.raises(InputError, match='--workdir: '):
    open_workdir(path)

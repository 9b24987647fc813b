"""Files are whole or absent, and leave nothing beside them."""

import os
import stat

import numpy as np
import pytest

from tips_jax.core import files


def test_text_bytes_and_a_function(tmp_path):
  files.write(tmp_path / 'text', 'smörgås\n')
  files.write(tmp_path / 'bytes', b'\x00\xff')
  files.write(str(tmp_path / 'a.npz'), lambda file: np.savez(file, x=np.arange(3)))
  assert (tmp_path / 'text').read_bytes() == 'smörgås\n'.encode()
  assert (tmp_path / 'bytes').read_bytes() == b'\x00\xff'
  np.testing.assert_array_equal(np.load(tmp_path / 'a.npz')['x'], np.arange(3))
  assert sorted(os.listdir(tmp_path)) == ['a.npz', 'bytes', 'text']


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
  path = tmp_path / 'file'
  files.write(path, 'old')

  def fails(file):
    file.write(b'half of it')
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    files.write(path, fails)
  assert path.read_text() == 'old' and os.listdir(tmp_path) == ['file']


def test_others_may_read_it_as_any_file(tmp_path):
  files.write(tmp_path / 'ours', '')
  (tmp_path / 'plain').write_text('')
  modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ('ours', 'plain')]
  assert modes[0] == modes[1]


@pytest.mark.parametrize('links', [True, False])
def test_without_replace_an_existing_file_stays(tmp_path, monkeypatch, links):
  if not links:

    def link(*_):
      raise OSError('no links here')

    monkeypatch.setattr(files.os, 'link', link)
  path = tmp_path / 'file'
  files.write(path, 'first', replace=False)
  with pytest.raises(FileExistsError):
    files.write(path, 'second', replace=False)
  assert path.read_text() == 'first' and os.listdir(tmp_path) == ['file']


def test_where_files_can_be_written_nothing_stays(tmp_path):
  files.require_writable(tmp_path / 'new' / 'folder', '--output')
  files.require_writable(tmp_path, '--output')
  (tmp_path / 'target').mkdir()
  os.symlink('target', tmp_path / 'link')
  files.require_writable(tmp_path / 'link' / 'x', '--output')
  assert sorted(os.listdir(tmp_path)) == ['link', 'target']

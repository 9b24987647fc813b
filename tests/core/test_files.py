"""Files are whole or absent, and leave nothing beside them."""

import errno
import os
import stat

import numpy as np
import pytest

from tips_jax.core import files
from tips_jax.core.errors import InputError, PassingError


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


@pytest.mark.parametrize(
  'error, kind',
  [
    (OSError(errno.ENOSPC, 'No space left on device'), InputError),
    (OSError('9240 requested and 4096 written'), InputError),  # NumPy's
    (
      RuntimeError('I/O error: No space left on device (os error 28)'),
      InputError,
    ),  # a library's
    (OSError(errno.ESTALE, 'Stale file handle'), PassingError),
  ],
)
def test_an_error_of_the_disk_is_one_line_that_says_where(tmp_path, error, kind):
  path = tmp_path / 'file'
  files.write(path, 'old')

  def fails(file):
    raise error

  with pytest.raises(InputError, match='^cannot write .*file. .*(No space|Stale|4096)') as raised:
    files.write(path, fails)
  assert type(raised.value) is kind
  assert path.read_text() == 'old' and os.listdir(tmp_path) == ['file']


def test_other_errors_keep_their_traceback():
  for error in (KeyError('ours'), RuntimeError('Device or resource busy (os error 16)')):
    with pytest.raises(type(error)), files.writing('cannot write'):
      raise error


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_full_disk_is_known_before_any_work(tmp_path, monkeypatch):
  monkeypatch.setattr(files.tempfile, 'TemporaryFile', lambda dir: open('/dev/full', 'wb'))
  with pytest.raises(InputError, match='--workdir: got .*new.* folder .No space left on device'):
    files.require_writable(tmp_path / 'new', '--workdir')


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

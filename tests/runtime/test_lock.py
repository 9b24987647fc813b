"""Two runs in one work folder: on one host, and on two whose locks do not see each other."""

import errno
import fcntl
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from tips_jax.core.errors import InputError, PassingError
from tips_jax.runtime import lock
from tips_jax.runtime.peers import Peers
from tips_jax.runtime.signals import Preemption


def held(path):
  return lock.held(path, '--workdir', Peers(Preemption()))


@pytest.fixture
def on(monkeypatch):
  """A function after which this process is on another host, whose locks are its own."""

  def other(host):
    monkeypatch.setattr(socket, 'gethostname', lambda: host)
    monkeypatch.setattr(fcntl, 'flock', lambda file, operation: None)

  monkeypatch.setattr(lock, '_BEAT_S', 0.2)
  monkeypatch.setattr(lock, '_LOOK_S', 0.02)
  return other


def test_a_second_run_in_a_folder_is_refused(tmp_path):
  with held(tmp_path):
    with pytest.raises(InputError, match=f'--workdir: got .* at work .process {os.getpid()} on '):
      with held(tmp_path):
        pass
  with held(tmp_path):
    pass


def test_a_killed_run_leaves_no_lock_on_its_host(tmp_path):
  code = (
    'import pathlib, sys, time; from tests.runtime.test_lock import held\n'
    'with held(pathlib.Path(sys.argv[1])):\n  print("held", flush=True); time.sleep(600)'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', code, tmp_path],
    stdout=subprocess.PIPE,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert process.stdout.readline() == b'held\n'
  with pytest.raises(InputError, match=f'process {process.pid} on'):
    with held(tmp_path):
      pass
  process.kill()
  process.communicate()
  begin = time.monotonic()
  with held(tmp_path):
    pass
  assert time.monotonic() - begin < 5


def test_a_run_on_another_host_is_known_by_its_signs_of_life(tmp_path, on, monkeypatch):
  monkeypatch.setattr(lock, '_SILENT_S', 60)
  on('one')
  with held(tmp_path):
    on('two')
    begin = time.monotonic()
    with pytest.raises(PassingError, match=f'at work .process {os.getpid()} on one.; .* or 60 s'):
      with held(tmp_path):
        pass
    # Signs carry whole seconds: the next one that differs.
    assert time.monotonic() - begin < 5
  with held(tmp_path):  # it ended, and said so
    assert (tmp_path / lock.FILE).read_text().startswith(f'process {os.getpid()} on two at ')


@pytest.mark.parametrize('age, waits', [(0, True), (1000, False), (-1000, True)])
def test_a_run_that_was_killed_on_another_host_is_over_when_it_is_silent(
  tmp_path, on, monkeypatch, capsys, age, waits
):
  monkeypatch.setattr(lock, '_SILENT_S', 1.5)
  (tmp_path / lock.FILE).write_text(f'process 7 on one at {time.time() - age:.0f}\n')
  on('two')
  begin = time.monotonic()
  with held(tmp_path):
    passed = time.monotonic() - begin
  err = capsys.readouterr().err
  if waits:
    assert 0.4 < passed < 5
    assert 'process 7 on one' in err and err.count('\n') == 1
  else:
    assert passed < 0.4 and err == ''


def test_a_run_that_ends_while_another_waits_makes_room(tmp_path, on, monkeypatch):
  monkeypatch.setattr(lock, '_SILENT_S', 60)
  path = tmp_path / lock.FILE
  path.write_text(f'process 7 on one at {time.time():.0f}\n')
  on('two')
  threading.Timer(0.3, path.write_text, ['']).start()
  begin = time.monotonic()
  with held(tmp_path):
    assert 0.2 < time.monotonic() - begin < 5


def test_a_file_system_without_locks_goes_by_the_signs_of_life(tmp_path, on, monkeypatch):
  def flock(file, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, 'flock', flock)
  monkeypatch.setattr(lock, '_SILENT_S', 60)
  with held(tmp_path):
    with pytest.raises(PassingError, match='another run is at work'):
      with held(tmp_path):
        pass
  with held(tmp_path):
    pass

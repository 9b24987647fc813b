"""metrics.jsonl survives kills and resumes; the progress line fits."""

import errno
import io
import json
import math
import os
import pathlib

import numpy as np
import pytest

from tips_jax.core import log
from tips_jax.core.errors import InputError, PassingError
from tips_jax.core.schema import Log

QUIET = Log(tensorboard=False)


class Terminal(io.StringIO):
  encoding = 'utf-8'

  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(log.time, 'monotonic', lambda: now[0])
  return now


def steps(path):
  return [json.loads(line)['step'] for line in pathlib.Path(path).read_text().splitlines()]


def test_lines_are_valid_json_with_null_for_non_finite(tmp_path):
  metrics = log.Metrics(tmp_path / 'new', config=QUIET)
  metrics.write(
    np.int64(3),
    {'loss': np.float32(0.5), 'a/b': float('nan'), 'c': np.float32('inf'), 'n': 7, 's': 'x'},
  )
  metrics.close()
  text = metrics.path.read_text()

  def refuse(constant):
    raise AssertionError(f'{constant} is not JSON')

  line = json.loads(text, parse_constant=refuse)
  assert line == {'step': 3, 'loss': 0.5, 'a/b': None, 'c': None, 'n': 7, 's': 'x'}
  assert text.endswith('\n') and text.count('\n') == 1


def test_a_line_is_on_disk_as_soon_as_written(tmp_path):
  metrics = log.Metrics(tmp_path, config=QUIET)
  metrics.write(1, {'loss': 1.0})
  assert steps(metrics.path) == [1]
  metrics.close()


@pytest.mark.parametrize(
  'resume, kept', [(-1, []), (0, [0]), (20, [0, 10, 20]), (25, [0, 10, 20]), (99, [0, 10, 20, 30])]
)
def test_resume_drops_later_lines(tmp_path, resume, kept):
  metrics = log.Metrics(tmp_path, config=QUIET)
  for step in (0, 10, 20, 30):
    metrics.write(step, {'loss': step / 3})
  metrics.close()
  before = metrics.path.read_text().splitlines()
  metrics = log.Metrics(tmp_path, config=QUIET, resume_step=resume)
  assert (
    metrics.path.read_text().splitlines() == before[: len(kept)]
  )  # what stays, stays to the byte
  metrics.write(40, {'loss': 1.0})
  metrics.close()
  assert steps(metrics.path) == kept + [40]
  assert sorted(os.listdir(tmp_path)) == ['metrics.jsonl']


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
  metrics = log.Metrics(tmp_path, config=QUIET, resume_step=5)
  metrics.write(3, {})
  metrics.close()
  assert log.read(metrics.path) == [{'step': 1, 'loss': 2.0}, {'step': 3}]


def test_a_foreign_file_is_named_and_left_alone(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('hello\nworld\n')
  with pytest.raises(InputError, match='metrics.jsonl.*not JSON'):
    log.Metrics(tmp_path, config=QUIET)
  assert (tmp_path / 'metrics.jsonl').read_text() == 'hello\nworld\n'


DAMAGED = [b'{"step": 2, "loss": \xff}', b'[2]', b'{"loss": 1}', b'{"step": 2, "eval/a": "x"}']


@pytest.mark.parametrize('line', [*DAMAGED, b'[' * 50_000])
def test_a_damaged_line_is_set_aside_and_the_run_goes_on(tmp_path, line, capsys):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + line + b'\n{"step": 3, "loss": 1.0}\n')
  assert [row['step'] for row in log.read(path)] == [1, 3]
  log.Metrics(tmp_path, config=QUIET, resume_step=3).close()
  assert steps(path) == [1, 3]
  assert (tmp_path / 'metrics.damaged').read_bytes() == line + b'\n'
  assert 'metrics.jsonl: damaged lines, now in metrics.damaged: 1' in capsys.readouterr().err


def test_unwritable_workdir(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='workdir: cannot write metrics in .*file.*File exists'):
    log.Metrics(tmp_path / 'file', config=QUIET)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_full_disk_is_one_clear_error(tmp_path):
  metrics = log.Metrics(tmp_path, config=QUIET)
  metrics._file = open('/dev/full', 'ab')
  for call in (lambda: metrics.write(1, {'loss': 1.0}), metrics.close):
    with pytest.raises(InputError, match='workdir: cannot write metrics in .*No space') as error:
      call()
    assert error.value.code == 2


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_full_disk_under_the_events_is_one_clear_error_and_no_wait(tmp_path):
  metrics = log.Metrics(tmp_path, config=Log(tensorboard=True))
  metrics.write(1, {'loss': 1.0})
  events = next((tmp_path / 'tensorboard').iterdir())
  metrics._events._writer._py_recordio_writer._writer = open('/dev/full', 'wb')
  for step in range(2, 40):  # more than a queue holds
    with pytest.raises(InputError, match='workdir: cannot write metrics in .*No space'):
      metrics.write(step, {'loss': 1.0})
  assert steps(metrics.path) == list(range(1, 40)) and b'loss' in events.read_bytes()


class Busy(io.BytesIO):
  """A file on a disk that takes nothing for a while."""

  failures = 0

  def flush(self):
    if self.failures:
      self.failures -= 1
      raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def test_lines_wait_for_a_busy_disk_until_the_next_save(tmp_path):
  metrics = log.Metrics(tmp_path, config=QUIET)
  metrics._file = Busy()
  metrics._file.failures = 3
  metrics.write(1, {'loss': 2.0})
  metrics.write(2, {'loss': 1.0})
  with pytest.raises(PassingError, match='Device or resource busy') as error:
    metrics.flush()
  assert error.value.code == 75
  metrics.flush()
  assert metrics._file.getvalue().count(b'"step"') == 2


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_full_disk_under_a_list_of_rows_is_one_clear_error(tmp_path):
  (tmp_path / 'rows.jsonl').symlink_to('/dev/full')
  rows = log.UniqueLines(tmp_path / 'new.jsonl')
  rows._path = tmp_path / 'rows.jsonl'
  with pytest.raises(InputError, match='cannot write .*rows.jsonl.*No space'):
    rows.add({'record': 1})


def test_tensorboard_gets_the_same_scalars(tmp_path):
  metrics = log.Metrics(tmp_path, config=Log(tensorboard=True))
  metrics.write(1, {'loss': 2.5, 'note': 'text'})
  metrics.close()
  event = next((tmp_path / 'tensorboard').iterdir()).read_bytes()
  assert b'loss' in event and np.float32(2.5).tobytes() in event and b'note' not in event


def test_the_terminal_line_is_rewritten_and_fits(clock, monkeypatch):
  for width in (10, 20, 40, 80, 200):
    monkeypatch.setattr(
      log.shutil, 'get_terminal_size', lambda width=width, **_: os.terminal_size((width, 24))
    )
    stream = Terminal()
    progress = log.Progress(3000, stream=stream)
    for step in (1, 1500, 3000):
      clock[0] += 75.0
      progress.update(step, losses={'loss': math.nan}, images_per_s=12345.6)
    progress.close()
    shown = stream.getvalue()
    assert shown.endswith('\n') and shown.count('\n') == 1
    lines = shown.rstrip('\n').split('\r\x1b[2K')[1:]
    assert len(lines) == 3 and all(len(line) < width for line in lines)
    if width >= 80:
      assert 'step 1,500/3,000  50 %  loss nan  ETA 1:15  12,346 img/s' in lines[1]


TIPS = {'contrastive_web': 3.4211, 'contrastive_synthetic': 3.3, 'distill': 10.13, 'masked': 5.2}


@pytest.mark.parametrize('terminal', [False, True])
@pytest.mark.parametrize('total, rate', [(1000, 45.1), (270_000, 16_384.0)])
def test_the_losses_of_tips_fit_100_columns_by_name(clock, monkeypatch, terminal, total, rate):
  monkeypatch.setattr(log.shutil, 'get_terminal_size', lambda **_: os.terminal_size((101, 24)))
  stream = Terminal() if terminal else io.StringIO()
  progress = log.Progress(total, stream=stream, every_s=0)
  for step in (total // 2, total // 2 + 1):
    clock[0] += 0.33
    progress.update(step, losses=TIPS, images_per_s=rate)
  line = stream.getvalue().removesuffix('\n').split('\r\x1b[2K' if terminal else '\n')[-1]
  assert len(line) <= 100
  assert 'web 3.42  synthetic 3.3  distill 10.1  masked 5.2  ETA ' in line
  assert line.endswith(f'{rate:,.0f} img/s')


def test_names_of_losses_are_whole_where_they_fit(clock):
  stream = io.StringIO()
  progress = log.Progress(1000, stream=stream, every_s=0)
  progress.update(10, losses={'contrastive_web': 3.4211, 'masked_patches': 5.0})
  assert stream.getvalue() == 'step 10/1,000  1 %  contrastive_web 3.42  masked_patches 5  ETA -\n'


def test_unique_lines_are_read_once_and_written_once(tmp_path, monkeypatch):
  path = tmp_path / 'quarantine.jsonl'
  path.write_text('{"record": 1, "id": "a"}\n{"record": 11')  # cut short by a kill
  lines = log.UniqueLines(path)

  def refuse(*_):
    raise AssertionError('the file is read again')

  monkeypatch.setattr(pathlib.Path, 'read_bytes', refuse)
  for record, name in ((1, 'a'), (11, 'a'), (1, 'a'), (11, 'b'), (11, 'a')):
    lines.add({'record': record, 'id': name})
  monkeypatch.undo()
  assert path.read_bytes().decode().splitlines() == [
    '{"record": 1, "id": "a"}',
    '{"record": 11, "id": "a"}',
    '{"record": 11, "id": "b"}',
  ]


def test_unique_lines_go_on_behind_a_line_that_is_no_text(tmp_path):
  path = tmp_path / 'quarantine.jsonl'
  path.write_bytes(b'{"record": \xff}\n{"record": 1}\n')
  lines = log.UniqueLines(path)
  for record in (1, 2):
    lines.add({'record': record})
  assert path.read_bytes() == b'{"record": \xff}\n{"record": 1}\n{"record": 2}\n'


def test_plain_lines_come_at_intervals_and_at_the_end(clock):
  stream = io.StringIO()
  progress = log.Progress(100, stream=stream, every_s=10)
  for step in range(1, 101):
    clock[0] += 1.0
    progress.update(step, losses={'loss': 1.0})
  progress.close()
  lines = stream.getvalue().splitlines()
  assert [int(line.split('/')[0].split()[1]) for line in lines] == [
    1,
    11,
    21,
    31,
    41,
    51,
    61,
    71,
    81,
    91,
    100,
  ]
  assert '\r' not in stream.getvalue() and 'ETA 1:29' in lines[1]  # 89 steps of a second are left


def test_eta_of_a_resumed_run_counts_its_own_steps(clock):
  stream = io.StringIO()
  progress = log.Progress(10_000, stream=stream, every_s=0)
  progress.update(9_000)
  clock[0] += 5
  progress.update(9_010)
  assert 'ETA 8:15' in stream.getvalue()  # 990 steps of half a second


def test_messages_do_not_break_the_line(clock):
  stream = Terminal()
  progress = log.Progress(10, stream=stream)
  progress.update(1)
  progress.message('saved')
  progress.update(2)
  progress.close()
  assert '\r\x1b[2Ksaved\n\r\x1b[2K' in stream.getvalue()


def test_a_silent_progress_says_nothing(capfd):
  progress = log.Progress(2, silent=True)
  progress.message('hello')
  progress.update(2)
  progress.close()
  assert capfd.readouterr() == ('', '')

"""Work folders in a bucket (memory://): what goes up when, and what a start takes from it. Machines
are folders for copies; tests/train/test_bucket_run.py has real processes.
"""

import threading
import time

import pytest

from tests import bucket_server
from tests.runs.test_checkpoint import assert_equal, tiny
from tips_jax.core import buckets, schema
from tips_jax.core.errors import InputError, PassingError
from tips_jax.runs import bucket as bucket_lib
from tips_jax.runs import checkpoint, digests
from tips_jax.runs import folder as runs
from tips_jax.runs.bucket import Bucket

KEEP_2 = schema.Checkpoint(keep_last=2)


@pytest.fixture
def url():
  with bucket_server.bucket('memory') as path:
    yield f'{path}/runs/a'


@pytest.fixture
def machine(tmp_path, monkeypatch):
  """machine(name): from now on this is another machine, with a disk of its own."""

  def use(name):
    monkeypatch.setenv('TIPS_JAX_CACHE', str(tmp_path / name))

  use('first')
  monkeypatch.setattr(bucket_lib, '_POLL_S', 0.01)
  return use


def until(condition):
  end = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def train(url, *steps, say=print):
  """A start of a run that saves at the steps; returns (where it began, its state)."""
  bucket = Bucket(url)
  with bucket.mirrored():
    bucket.settle(say)
    saver = checkpoint.Checkpoints(bucket.folder, KEEP_2, bucket=bucket)
    latest = saver.latest
    state = None
    if latest is not None:
      state, _ = saver.restore(latest, tiny(0))
    for step in steps:
      saver.save(step, tiny(step, float(step)), next_index=8 * step, contract={'of': step})
      saver.wait()
    saver.close()
  return latest, state


# --- small files --------------------------------------------------------------------------------


def test_small_files_go_up_while_the_run_lives(url, machine, monkeypatch):
  monkeypatch.setattr(bucket_lib, '_EVERY_S', 0.02)
  bucket = Bucket(url)
  with bucket.mirrored():
    for name in ('metrics.jsonl', 'tensorboard/events.0', 'scenes/x', '.hidden', 'a/.part'):
      (bucket.folder / name).parent.mkdir(exist_ok=True)
      (bucket.folder / name).write_text('1')
    until(lambda: len(buckets.names(url, 'test')) == 2)
    (bucket.folder / 'metrics.jsonl').write_text('12')
    until(lambda: buckets.read(f'{url}/metrics.jsonl', 'test') == b'12')
    monkeypatch.setattr(bucket_lib, '_EVERY_S', 60)
    (bucket.folder / 'index.html').write_text('last')
  assert buckets.names(url, 'test').keys() == {
    'metrics.jsonl',
    'tensorboard/events.0',
    'index.html',
  }


def test_they_go_up_however_the_run_ends(url, machine):
  bucket = Bucket(url)
  with pytest.raises(KeyError), bucket.mirrored():
    (bucket.folder / 'metrics.jsonl').write_text('1')
    raise KeyError
  assert buckets.read(f'{url}/metrics.jsonl', 'test') == b'1'


def test_only_what_has_changed_goes_up(url, machine, monkeypatch):
  bucket = Bucket(url)
  sent = []
  write = buckets.write
  monkeypatch.setattr(buckets, 'write', lambda *args: sent.append(args[0]) or write(*args))
  with bucket.mirrored():
    (bucket.folder / 'a').write_text('1')
    bucket.send()
    bucket.send()
  assert sent == [f'{url}/a']
  with Bucket(url).mirrored():
    pass
  assert sent == [f'{url}/a']


def test_a_start_takes_the_buckets_word_over_the_disks(url, machine):
  bucket = Bucket(url)
  with bucket.mirrored():
    (bucket.folder / 'metrics.jsonl').write_text('1')
  for name in ('metrics.jsonl', 'stray', 'scenes/kept', 'checkpoints/4/params', '.lock'):
    (bucket.folder / name).parent.mkdir(parents=True, exist_ok=True)
    (bucket.folder / name).write_text('later')
  with bucket.mirrored():
    assert buckets.files_below(bucket.folder) == ['.lock', 'metrics.jsonl', 'scenes/kept']
    assert (bucket.folder / 'metrics.jsonl').read_text() == '1'


def test_a_bucket_that_is_away_is_told_once_and_tried_again(url, machine, monkeypatch, capsys):
  monkeypatch.setattr(bucket_lib, '_EVERY_S', 0.02)
  bucket = Bucket(url)
  tries = []
  write = buckets.write

  def away(*args):
    tries.append(args)
    raise PassingError('workdir: cannot write it (away)')

  with bucket.mirrored():
    monkeypatch.setattr(buckets, 'write', away)
    (bucket.folder / 'metrics.jsonl').write_text('1')
    until(lambda: len(tries) > 3)
    monkeypatch.setattr(buckets, 'write', write)
    until(lambda: buckets.names(url, 'test'))
  assert capsys.readouterr().err == 'workdir: cannot write it (away): it will be sent later\n'


# --- checkpoints --------------------------------------------------------------------------------


def test_a_machine_with_an_empty_disk_goes_on(url, machine):
  assert train(url, 2, 4, 6) == (None, None)
  assert runs.in_bucket(url, 'test') == [4, 6]
  machine('second')
  latest, state = train(url, 8)
  assert latest == 6
  assert_equal(state.params, tiny(6, 6.0).params)
  # Kept by the rules, although the second machine never had the arrays of 4.
  assert runs.in_bucket(url, 'test') == [6, 8]
  machine('third')
  assert runs.contract(runs.find(f'{url}@6', 'test')) == {'of': 6}


def test_here_only_the_newest_keeps_its_arrays(url, machine):
  bucket = Bucket(url)
  with bucket.mirrored():
    saver = checkpoint.Checkpoints(bucket.folder, schema.Checkpoint(keep_last=3), bucket=bucket)
    for step in (2, 4, 6):
      saver.save(step, tiny(step), next_index=0, contract={})
    saver.close()
    have = [(path / 'params').exists() for path in runs.numbered(bucket.folder / 'checkpoints')]
    assert have == [True, False, False]
  assert not (bucket.folder / 'checkpoints').exists()


@pytest.mark.parametrize('sent', [0, 1, 3])
def test_a_save_that_is_cut_off_does_not_count(url, machine, monkeypatch, sent):
  train(url, 2)
  put = buckets._put
  names = []

  def cut(system, path, folder, name):
    if '/6' in path and len(names) >= sent:
      raise SystemExit('killed')
    names.append(name)
    put(system, path, folder, name)

  monkeypatch.setattr(buckets, '_put', cut)
  names.clear()
  with pytest.raises(SystemExit):
    train(url, 6)
  assert runs.in_bucket(url, 'test') == [2]
  monkeypatch.setattr(buckets, '_put', put)
  buckets.write(f'{url}/checkpoints/6/params/of_the_first_try', b'x', 'test')
  machine('second')
  assert train(url, 6)[0] == 2
  assert runs.in_bucket(url, 'test') == [2, 6]
  assert 'params/of_the_first_try' not in buckets.names(f'{url}/checkpoints/6', 'test')
  machine('third')
  assert train(url)[0] == 6


def test_a_bucket_that_is_away_for_a_save_is_another_try(url, machine, monkeypatch):
  upload = buckets.upload

  def away(*args, **kwargs):
    monkeypatch.setattr(buckets, 'upload', upload)
    raise PassingError('workdir: cannot write it (away)')

  bucket = Bucket(url)
  with bucket.mirrored():
    saver = checkpoint.Checkpoints(bucket.folder, KEEP_2, bucket=bucket)
    monkeypatch.setattr(buckets, 'upload', away)
    saver.save(2, tiny(2), next_index=0, contract={})
    with pytest.raises(PassingError):
      saver.wait()
    saver.save(2, tiny(2), next_index=0, contract={})
    saver.close()
  assert runs.in_bucket(url, 'test') == [2]


def damage(url, step):
  path = f'{url}/checkpoints/{step}'
  name = next(name for name in buckets.names(path, 'test') if name.startswith('params/d/'))
  content = bytearray(buckets.read(f'{path}/{name}', 'test'))
  content[len(content) // 2] ^= 1
  buckets.write(f'{path}/{name}', bytes(content), 'test')


def test_a_damaged_newest_one_is_set_aside(url, machine):
  train(url, 2, 4)
  damage(url, 4)
  machine('second')
  said = []
  assert train(url, say=said.append)[0] == 2
  assert said[0].startswith('checkpoint 4 is damaged: params/d/')
  assert said[0].endswith('; it is now damaged-4')
  assert said[1] == 'going on from the one before, step 2'
  assert runs.in_bucket(url, 'test') == [2]
  assert buckets.exists(f'{url}/checkpoints/damaged-4/digests.json', 'test')


def test_where_all_are_damaged_nothing_is_moved(url, machine):
  train(url, 2, 4)
  for step in (2, 4):
    damage(url, step)
  before = buckets.names(url, 'test').keys()
  machine('second')
  with pytest.raises(InputError, match='checkpoint: got only damaged ones in .*4: params.*2: par'):
    train(url)
  assert buckets.names(url, 'test').keys() == before


# --- several processes --------------------------------------------------------------------------


def in_threads(*functions):
  threads = [threading.Thread(target=function) for function in functions]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize('stale', [False, True])
def test_each_process_sends_its_part_and_nothing_twice(url, machine, monkeypatch, stale):
  pair = []
  for index in range(2):
    pair.append(Bucket(url, index=index, count=2, token='this'))
    parts = {'params/_METADATA': 'both', 'params/b/0': 'both', f'params/a/{index}': f'{index}'}
    for name, text in parts.items():
      path = pair[index].folder / 'checkpoints/8' / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
  if stale:  # of a start that was killed at this step: of other words, and an object of its own
    for name in ('.words/old/8/files/1', 'checkpoints/8/params/a/9'):
      buckets.write(f'{url}/{name}', b'{}', 'test')
  puts = []
  put = buckets._put
  monkeypatch.setattr(buckets, '_put', lambda *args: puts.append(args[-1]) or put(*args))
  in_threads(*[lambda bucket=bucket: bucket.send_checkpoint(8) for bucket in pair])
  files = ['params/_METADATA', 'params/a/0', 'params/a/1', 'params/b/0']
  assert sorted(puts) == sorted([*files, digests.FILE]) and puts[-1] == digests.FILE
  assert buckets.names(f'{url}/checkpoints/8', 'test').keys() == {*files, digests.FILE}
  machine('third')
  last = Bucket(url)
  last.settle(print)
  assert digests.problem(last.folder / 'checkpoints/8') == ''
  assert buckets.files_below(last.folder / 'checkpoints/8') == [digests.FILE, *files]


def test_without_all_processes_there_is_no_checkpoint(url, machine, monkeypatch):
  monkeypatch.setattr(bucket_lib, '_PATIENCE_S', 0.1)
  alone = Bucket(url, index=0, count=2, token='this')
  path = alone.folder / 'checkpoints/8/params'
  path.parent.mkdir(parents=True)
  path.write_text('mine')
  with pytest.raises(PassingError, match='not all processes have saved step 8'):
    alone.send_checkpoint(8)
  assert runs.in_bucket(url, 'test') == []


def test_processes_on_one_machine_have_folders_of_their_own(url, machine):
  folders = {Bucket(url, index=index, count=3).folder for index in range(3)}
  assert len(folders) == 3 and Bucket(url).folder in folders

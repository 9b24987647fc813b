import contextlib
import dataclasses
import errno
import functools
import json
import os
import shutil
import types
from collections.abc import Callable

import jax
import numpy as np
import pytest

from tips_jax.core import log
from tips_jax.core.errors import InputError, PassingError
from tips_jax.runs import digests, folder
from tips_jax.runtime import signals
from tips_jax.train import feed, loop, lowering, sharding

TOTAL = 4


@pytest.fixture(scope='module', autouse=True)
def compiled_once(tmp_path_factory):
  """Programs that occur again are read from a cache."""
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  before = {n: getattr(jax.config, n) for n in names}
  for n, value in zip(names, (str(tmp_path_factory.mktemp('compiled')), 0)):
    jax.config.update(n, value)
  yield
  for n, value in before.items():
    jax.config.update(n, value)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What main hands to the loop, by a function."""

  measure: Callable[[object], dict[str, float]]
  lower_is_better: bool = False

  def __call__(self, encoder):
    return self.measure(encoder)


@pytest.fixture(scope='module')
def train(small, scenes_store):
  """Runs a method in a work folder on some devices; returns the batches it saw. `stop`: asked to
  after that step.
  """

  def run(workdir, name='tips_v2', *, devices=8, stop=None, evaluation=None, asked=None, **changes):
    data = dict(store=scenes_store, scenes=dict(train=0), threads=2)
    schedule = dict(total_steps=TOTAL, batch_size=8, warmup_steps=2)
    changes = {
      'data': data,
      'schedule': schedule,
      'log': dict(every_steps=1, tensorboard=False),
      'checkpoint': dict(every_steps=10),
      'evals': dict(tasks=()),
      **changes,
    }
    asked = asked or signals.Preemption()
    seen, following = [], feed.Prefetch.next
    make_mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:devices])

    def recorded(self):
      batch, host = following(self)
      seen.append(jax.tree.map(np.asarray, batch | host))
      asked.requested |= len(seen) == stop
      return batch, host

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(feed.Prefetch, 'next', recorded)
      patch.setattr(sharding, 'make_mesh', make_mesh)
      loop.train(small.method(name, **changes), workdir, asked, evaluation=evaluation)
    return seen

  return run


def lines(workdir):
  return log.read(workdir / log.FILE)


def losses(workdir):
  return [(line['step'], line['loss']) for line in lines(workdir) if 'loss' in line]


def steps(workdir):
  return sorted(int(p.name) for p in (workdir / folder.FOLDER).iterdir())


def saved(workdir, step):
  """Every array of a checkpoint, by name."""
  from orbax.checkpoint import v1 as ocp

  out = ocp.load_checkpointables(workdir.absolute() / folder.FOLDER / str(step))
  return {
    f'{part}/{jax.tree_util.keystr(path)}': np.asarray(x)
    for part in ('params', 'teachers', 'train', 'data')
    for path, x in jax.tree_util.tree_flatten_with_path(out[part])[0]
  }


def assert_equal(a, b):
  assert sorted(a) == sorted(b)
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope='module')
def whole(train, tmp_path_factory):
  """(work folder, batches) of an uninterrupted run on eight devices."""
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, train(workdir)


@pytest.fixture(scope='module')
def half(train, tmp_path_factory):
  """The same run, stopped by a signal during its second step."""
  workdir = tmp_path_factory.mktemp('half')
  with pytest.raises(signals.Stopped):
    train(workdir, stop=2)
  assert steps(workdir) == [2] and [s for s, _ in losses(workdir)] == [1, 2]
  return workdir


def test_a_checkpoint_is_saved_when_its_minutes_are_over_beside_those_by_step(train, tmp_path):
  train(tmp_path / 'soon', checkpoint=dict(every_steps=10, every_minutes=1e-9))
  assert steps(tmp_path / 'soon') == [TOTAL - 1, TOTAL]  # the last two of one after each step
  train(tmp_path / 'late', checkpoint=dict(every_steps=3, every_minutes=1e4))
  assert steps(tmp_path / 'late') == [3, TOTAL]


def test_a_step_that_the_compiler_cannot_place_is_bad_input(train, tmp_path, monkeypatch):
  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Used 102.1G of 15.75G hbm.')

  monkeypatch.setattr(lowering, 'lower', lambda method, mesh, losses: Lowered())
  with pytest.raises(InputError, match='does not fit .* Used 102.1G of 15.75G hbm'):
    train(tmp_path)


def test_an_option_that_the_compiler_does_not_know_is_bad_input(train, tmp_path):
  with pytest.raises(InputError, match="compute.options: .*No such compile option: 'xla_no_such'"):
    train(tmp_path, compute=dict(options=('xla_no_such=1',)))


def test_who_waits_for_the_evaluation_of_the_first_process_is_not_watched():
  events = []

  @contextlib.contextmanager
  def paused():
    events.append('paused')
    yield
    events.append('watched')

  peers = types.SimpleNamespace(count=2, lead=False, share=lambda name, _: events.append(name))
  watchdog = types.SimpleNamespace(paused=paused)
  encoder = types.SimpleNamespace(of=lambda state: None)
  run = types.SimpleNamespace(peers=peers, watchdog=watchdog, encoder=encoder)
  loop.evaluate(run, types.SimpleNamespace(state=None, step=5))
  assert events == ['paused', 'evaluated/5', 'watched']


# --- exact resume -------------------------------------------------------------------------------


def test_stopped_and_resumed_equals_uninterrupted(whole, half, train, tmp_path):
  workdir, batches = whole
  shutil.copytree(half, tmp_path, dirs_exist_ok=True)
  again = train(tmp_path)
  assert len(again) == TOTAL - 2
  for got, want in zip(again, batches[2:]):
    assert_equal(got, want)
  assert losses(tmp_path) == losses(workdir) and len(losses(workdir)) == TOTAL
  # Time goes on from the first start: the one that was stopped is in it.
  times = [line['run_seconds'] for line in lines(tmp_path)]
  assert times == sorted(times) and lines(tmp_path)[:2] == lines(half)
  trained = [line['goodput'] * line['run_seconds'] for line in lines(tmp_path)]
  assert trained == sorted(trained) and 0 < trained[-1] < times[-1]
  assert_equal(saved(tmp_path, TOTAL), saved(workdir, TOTAL))


def test_resumed_on_fewer_devices_sees_the_same(whole, half, train, tmp_path):
  workdir, batches = whole
  shutil.copytree(half, tmp_path, dirs_exist_ok=True)
  again = train(tmp_path, devices=4)
  for got, want in zip(again, batches[2:]):
    assert_equal(
      got, want
    )  # examples, crops and captions; the masks follow from seed and step (test_step.py)
  got, want = losses(tmp_path), losses(workdir)
  assert [s for s, _ in got] == [s for s, _ in want]
  np.testing.assert_allclose([x for _, x in got], [x for _, x in want], rtol=1e-5)


@pytest.mark.once
def test_losses_that_are_raised_late_cost_nothing_before_and_resume_alike(train, tmp_path):
  late = dict(weight=dict(start=0.0, end=1.0, begin=0.5, until=1.0))
  changes = dict(losses=dict(distill=late, masked=late))
  train(tmp_path / 'whole', devices=1, **changes)
  there = {line['step']: 'masked/agreement' in line for line in lines(tmp_path / 'whole')}
  assert there == {1: False, 2: False, 3: True, 4: True}
  # Stopped before the losses wake, and once more behind.
  for stop in (1, 2):
    with pytest.raises(signals.Stopped):
      train(tmp_path / 'half', devices=1, stop=stop, **changes)
  assert steps(tmp_path / 'half')[-1] == 3
  train(tmp_path / 'half', devices=1, **changes)
  assert losses(tmp_path / 'half') == losses(tmp_path / 'whole')
  assert_equal(saved(tmp_path / 'half', TOTAL), saved(tmp_path / 'whole', TOTAL))


def test_a_finished_run_does_nothing(whole, train):
  workdir, _ = whole
  before = losses(workdir)
  assert train(workdir) == [] and losses(workdir) == before and steps(workdir) == [TOTAL]


def test_lines_after_the_checkpoint_are_written_anew(whole, half, train, tmp_path):
  shutil.copytree(half, tmp_path, dirs_exist_ok=True)
  with open(tmp_path / log.FILE, 'a') as f:  # a kill, after three more steps
    f.write('{"step": 3, "loss": 9.0}\n{"step": 4, "lo')
  train(tmp_path)
  assert losses(tmp_path) == losses(whole[0])


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(whole, train, tmp_path):
  with pytest.raises(signals.Stopped):
    train(tmp_path, stop=3, checkpoint=dict(every_steps=2))
  assert steps(tmp_path) == [2, 3]
  for path in (tmp_path / folder.FOLDER / '3' / 'params').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:-1] + b'x')
  train(tmp_path)
  assert (tmp_path / folder.FOLDER / 'damaged-3').is_dir()
  assert losses(tmp_path) == losses(whole[0])
  assert_equal(saved(tmp_path, TOTAL), saved(whole[0], TOTAL))


@pytest.fixture
def busy(monkeypatch):
  """Makes so many saves fail as on a network disk that is busy."""
  write = digests.write
  left = []

  def fails(path):
    if left:
      left.pop()
      raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
    write(path)

  monkeypatch.setattr(digests, 'write', fails)
  monkeypatch.setattr(loop, '_PAUSES_S', (0.01, 0.01))
  return left.extend


@pytest.mark.parametrize('every', [1, 10])
def test_a_save_that_fails_for_a_while_is_tried_again(whole, train, tmp_path, busy, capsys, every):
  busy(range(2))
  train(tmp_path, checkpoint=dict(every_steps=every))
  assert capsys.readouterr().err.count('another try') == 2
  assert losses(tmp_path) == losses(whole[0])
  assert_equal(saved(tmp_path, TOTAL), saved(whole[0], TOTAL))


def test_a_save_that_keeps_failing_ends_with_the_code_for_another_start(train, tmp_path, busy):
  busy(range(3))
  with pytest.raises(PassingError, match='cannot save .*Device or resource busy') as error:
    train(tmp_path)
  assert error.value.code == 75


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
@pytest.mark.once
def test_full_disk_under_the_metrics_costs_the_steps_since_the_last_save(
  whole, train, tmp_path, monkeypatch
):
  write = log.Metrics.write

  def full(self, step, values):
    if step == 3:
      self._file = open('/dev/full', 'ab')
    write(self, step, values)

  monkeypatch.setattr(log.Metrics, 'write', full)
  with pytest.raises(InputError, match='cannot write metrics in .* .No space left') as error:
    train(tmp_path, checkpoint=dict(every_steps=2))
  assert error.value.code == 2 and steps(tmp_path) == [2]
  monkeypatch.undo()
  train(tmp_path)
  assert losses(tmp_path) == losses(whole[0])
  assert_equal(saved(tmp_path, TOTAL), saved(whole[0], TOTAL))


def test_metrics_on_a_busy_disk_are_written_before_the_next_save(
  whole, train, tmp_path, monkeypatch, capsys
):
  flush = log.Metrics.flush
  left = list(range(TOTAL + 2))  # one for each line, and two tries to save

  def busy(self):
    if left:
      left.pop()
      raise PassingError('busy')
    flush(self)

  monkeypatch.setattr(log.Metrics, 'flush', busy)
  monkeypatch.setattr(loop, '_PAUSES_S', (0.01, 0.01))
  train(tmp_path)
  assert capsys.readouterr().err.count('another try') == 2
  assert losses(tmp_path) == losses(whole[0])
  assert steps(tmp_path) == [TOTAL]


# --- precedence and refusals --------------------------------------------------------------------


@pytest.mark.once
def test_own_run_before_given_run_before_initial_weights(half, train, small, tmp_path):
  with pytest.raises(signals.Stopped):
    train(tmp_path / 'a', init_from=str(half), stop=1)
  assert steps(tmp_path / 'a') == [1]
  initial = small.host_state('tips_v2').params['image']['posembed']
  given = saved(half, 2)["params/['image']['posembed']"]
  got = saved(tmp_path / 'a', 1)["params/['image']['posembed']"]
  assert np.abs(got - given).max() < np.abs(got - initial).max()
  (tmp_path / 'missing').mkdir()
  # Not even opened: the own run comes first.
  assert len(train(tmp_path / 'a', init_from=str(tmp_path / 'missing'))) == TOTAL - 1
  with pytest.raises(InputError, match='init_from'):
    train(tmp_path / 'b', init_from=str(tmp_path / 'missing'))


def test_contract_is_checked_on_resume(half, train, tmp_path):
  shutil.copytree(half, tmp_path, dirs_exist_ok=True)
  for changes, named in (
    (dict(towers=dict(image=dict(mlp=128))), 'towers.image.mlp was 64, is 128'),
    (dict(schedule=dict(total_steps=1, batch_size=8, warmup_steps=0)), 'schedule.total_steps'),
  ):
    with pytest.raises(InputError, match=named):
      train(tmp_path, **changes)
  assert steps(tmp_path) == [2] and len(losses(tmp_path)) == 2


def test_batch_must_divide_over_the_devices(train, tmp_path):
  with pytest.raises(
    InputError, match='schedule.batch_size: got 6; expected a multiple of the 8 devices'
  ):
    train(tmp_path, schedule=dict(total_steps=4, batch_size=6))


# --- evaluation, saving, divergence --------------------------------------------------------------


def test_evaluates_saves_and_keeps_the_best(train, tmp_path):
  asked, values = signals.Preemption(), [0.1, 0.9, 0.5]

  def evaluate(encoder):
    assert len(jax.jit(abs)(-1.0).devices()) == 1  # evaluators disturb no other process
    if len(values) == 2 and not asked.requested:  # a signal during the evaluation of step 2
      asked._handle(15, None)
    return {'knn/accuracy': values.pop(0)}

  options = dict(
    evals=dict(tasks=(), every_steps=2),
    checkpoint=dict(every_steps=1, keep_last=1, best_metric='knn/accuracy'),
  )
  with pytest.raises(signals.Stopped):
    train(tmp_path, 'clip', evaluation=Evaluation(evaluate), asked=asked, **options)
  assert steps(tmp_path) == [2] and len(values) == 2
  train(tmp_path, 'clip', evaluation=Evaluation(evaluate), **options)
  scores = {
    line['step']: line['eval/knn/accuracy']
    for line in lines(tmp_path)
    if 'eval/knn/accuracy' in line
  }
  assert scores == {0: 0.1, 2: 0.9, 4: 0.5}
  assert [s for s, _ in losses(tmp_path)] == [1, 2, 3, 4]
  assert steps(tmp_path) == [2, 4]


def test_unknown_best_metric(train, tmp_path):
  with pytest.raises(InputError, match="best_metric.*did you mean 'knn/accuracy'"):
    train(
      tmp_path,
      'clip',
      evaluation=Evaluation(lambda encoder: {'knn/accuracy': 0.1}),
      checkpoint=dict(best_metric='knn/acc'),
    )


def test_stops_after_too_many_bad_steps(train, tmp_path):
  with pytest.raises(loop.Diverged, match='2 updates in a row'):
    train(tmp_path, 'clip', unchecked=dict(learning_rate=1e38), max_bad_steps=2)
  rows = [json.loads(line) for line in (tmp_path / 'nonfinite.jsonl').read_text().splitlines()]
  assert [r['step'] for r in rows] == [2, 3] and all(len(r['ids']) == 8 for r in rows)
  assert rows[0]['ids'][0].startswith('train-')
  assert [line['skipped_steps'] for line in lines(tmp_path)] == [0, 1, 2]


@pytest.mark.once
def test_a_run_without_any_finite_update_does_not_end_as_if_it_had_trained(train, tmp_path):
  with pytest.raises(loop.Diverged, match=f'{TOTAL} updates in a row .* last good .* step None'):
    train(tmp_path, 'clip', unchecked=dict(eps=0.0))
  assert not steps(tmp_path)


def test_the_rate_counts_steps_that_are_finished(train, tmp_path):
  """A save reads the newest step at once: no step is then left for the next rate, nor lost."""
  train(tmp_path, 'clip', checkpoint=dict(every_steps=1))
  rates = [line['images_per_s'] for line in lines(tmp_path) if 'loss' in line]
  assert len(rates) == TOTAL and min(rates) > 0


def test_signals_are_noted_or_raised_once():
  asked = signals.Preemption()
  with pytest.raises(signals.Stopped):
    with asked.interruptible():
      try:
        asked._handle(15, None)
      finally:
        asked._handle(15, None)  # while leaving, and saving: noted only
  later = signals.Preemption()
  later._handle(15, None)
  with pytest.raises(signals.Stopped), later.interruptible():
    pytest.fail('a signal that came before is honored')


# --- order of operations, quarantine ------------------------------------------------------------


def test_order_of_operations(train, tmp_path, monkeypatch):
  """The order that the head of loop.py states."""
  calls = []

  def record(name):
    function = getattr(loop, name)

    def recorded(run, at, *args):
      if name != 'read' or at.unread is not None:
        calls.append(f'{name} {at.unread.step if name == "read" else at.step}')
      return function(run, at, *args)

    monkeypatch.setattr(loop, name, recorded)

  for name in ('evaluate', 'save', 'read'):
    record(name)
  check = loop.Peers.check

  def checked(self, point):
    step, place = divmod(point, 2)
    calls.append(f'check {step} {("before evaluation", "before step")[place]}')
    check(self, point)

  monkeypatch.setattr(loop.Peers, 'check', checked)
  train(
    tmp_path,
    'clip',
    evaluation=Evaluation(lambda encoder: {'knn/accuracy': 0.1}),
    evals=dict(tasks=(), every_steps=1, at_start=False),
    checkpoint=dict(every_steps=1),
    schedule=dict(total_steps=2, batch_size=8, warmup_steps=1),
  )
  assert calls == [
    'check 0 before evaluation',
    'check 0 before step',
    'check 1 before evaluation',
    'read 1',
    'evaluate 1',
    'save 1',
    'check 1 before step',
    'check 2 before evaluation',
    'read 2',
    'evaluate 2',
    'save 2',
  ]


def test_a_bad_image_is_explained_and_listed_once(tmp_path):
  class Pipeline:
    explained = []

    def explain(self, record):
      self.explained.append(record)
      return f'image-{record}', 'cut short'

  path = tmp_path / 'quarantine.jsonl'
  for epochs in (2, 1):  # the second: after a restart
    quarantine = feed.Quarantine(Pipeline(), log.UniqueLines(path))
    for record in (1, 11) * epochs:
      quarantine.add(record)
  assert Pipeline.explained == [1, 11, 1, 11]
  assert [json.loads(line)['record'] for line in path.read_text().splitlines()] == [1, 11]

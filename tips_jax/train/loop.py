"""The training loop. Order of operations, which a test guards:

    open     checkpoints and data, which check themselves; all processes agree on what they opened
    restore  the run's own checkpoint, else init_from, else initial weights
    compile  the step; twice where losses are raised late (train/programs.py)
    repeat   evaluate if due -> save if due -> stop if asked -> next batch -> dispatch the step
             -> read the metrics of the step before
    end      last checkpoint, files closed

Nothing in `repeat` waits for the device but reading metrics one step late, evaluating, and saving.
Of several processes the first one evaluates, and writes metrics.jsonl and config.json; its numbers
count for all (`bad_images` is of its part of the batch). Every process has its own quarantine,
nonfinite and stall file.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Any, Protocol

import jax
import numpy as np

from tips_jax.core import files, log, strict
from tips_jax.core.errors import InputError, PassingError
from tips_jax.data.reading.pipeline import Pipeline
from tips_jax.interop.encoder import Encoder
from tips_jax.runs import folder
from tips_jax.runs.bucket import Bucket
from tips_jax.runs.checkpoint import Checkpoints, check_contract
from tips_jax.runtime import memory
from tips_jax.runtime.peers import Peers, rows
from tips_jax.runtime.signals import Preemption, Stopped
from tips_jax.runtime.watchdog import Watchdog
from tips_jax.train import initialization, lowering, programs, sharding
from tips_jax.train.clock import Clock
from tips_jax.train.encoder import RunEncoder
from tips_jax.train.feed import Prefetch, Quarantine
from tips_jax.train.method import Method, awake
from tips_jax.train.state import State

_PAUSES_S = (1, 5, 25)  # before another try to save
_ASK = 10  # steps between two looks at the first process's clock, where there are several
# Where all processes may stop, in every step: what is between two of these, all do together.
_POINTS = ('before evaluation', 'before step')


class Diverged(RuntimeError):
  """Too many non-finite updates in a row."""


class Evaluation(Protocol):
  """What the loop calls before the first step, every `evals.every_steps`, and at the end."""

  # Of checkpoint.best_metric.
  lower_is_better: bool

  def __call__(self, encoder: Encoder) -> dict[str, float]: ...


def train(
  method: Method,
  workdir: str | pathlib.Path,
  signals: Preemption,
  *,
  evaluation: Evaluation | None = None,
  peers: Peers | None = None,
  bucket: Bucket | None = None,
) -> Encoder:
  """Trains to the last step and returns the final state's Encoder.

  peers: the other processes (runtime.peers.join). bucket: where the work folder is, if `workdir` is
  only that of this process. Raises InputError for anything the user can mend, Stopped after a
  signal (all saved), Diverged.
  """
  config = method.config
  total = config.schedule.total_steps
  mesh = sharding.make_mesh(config.mesh, config.schedule.batch_size)
  peers = peers or Peers(signals)
  at = None
  with jax.set_mesh(mesh), contextlib.ExitStack() as closing:
    try:
      with signals.interruptible(disposable=True), memory.must_fit():
        workdir = pathlib.Path(workdir)
        run = open_run(method, workdir, bucket, mesh, signals, peers, evaluation, closing)
        # The state comes last: once `at` is there, a signal saves it.
        at = restore(run, closing)
        if at.step < total:
          compile_step(run, at)
        peers.together()
      prefetch = Prefetch(run.pipeline, sharding.batch(mesh))
      closing.callback(prefetch.close)
      run.clock.restart()
      while True:
        peers.check(point(at.step, 'before evaluation'))
        run.watchdog.beat(f'at step {at.step:,}')
        if evaluation and due(config, at.step) and at.step not in at.evaluated:
          read(run, at)
          evaluate(run, at)
          run.clock.restart()
        if _save_is_due(run, at):
          save(run, at)
          run.clock.restart()
        if at.step == total:
          break
        peers.check(point(at.step, 'before step'))
        batch, host = run.clock.waiting(prefetch.next)
        program = at.compiled.at(at.step)
        at.state, metrics = program.step(at.state, batch)
        at.step += 1
        at.index += config.schedule.batch_size
        # One step late: the device works on this step while the host reads the one before.
        read(run, at)
        at.unread = Unread(at.step, metrics, host, program.flops)
      finish(run, at)
      return run.encoder.of(at.state)
    except Stopped:
      if at is not None and peers.can_save:
        finish(run, at)
      raise


@dataclasses.dataclass(frozen=True)
class Run:
  """What one process opens once and holds until the end."""

  method: Method
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  signals: Preemption
  peers: Peers
  evaluation: Evaluation | None
  checkpoints: Checkpoints
  pipeline: Pipeline
  encoder: RunEncoder
  # What the weights mean: see initialization.contract.
  contract: dict
  progress: log.Progress
  watchdog: Watchdog
  clock: Clock
  quarantine: Quarantine
  nonfinite: log.UniqueLines


@dataclasses.dataclass
class Position:
  """What moves: after `step` updates, at the next example `index`."""

  state: State
  step: int
  index: int
  # The newest step that is saved.
  saved: int | None
  # Steps whose evaluation is in metrics.jsonl.
  evaluated: set[int]
  # metrics.jsonl; the first process alone writes it.
  metrics: log.Metrics | None
  # The step, compiled; none for a run that is at its end.
  compiled: programs.Programs | None = None
  unread: 'Unread | None' = None
  # When the last save began, or the run; of time.monotonic().
  saved_at: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass(frozen=True)
class Unread:
  """The outcome of a step that nobody has waited for yet."""

  step: int
  metrics: dict[str, jax.Array]
  # What of its batch stays on the host: data/reading/batch.py.
  host: dict[str, np.ndarray]
  # Of one image.
  flops: float


def point(step: int, place: str) -> int:
  """The number of a point at which all processes may stop, for Peers.check."""
  return len(_POINTS) * step + _POINTS.index(place)


# --- open, restore, compile ---------------------------------------------------------------------


def open_run(
  method: Method,
  workdir: pathlib.Path,
  bucket: Bucket | None,
  mesh: jax.sharding.Mesh,
  signals: Preemption,
  peers: Peers,
  evaluation: Evaluation | None,
  closing: contextlib.ExitStack,
) -> Run:
  """Opens what a run needs, and registers in `closing` how it is closed."""
  config = method.config
  progress = log.Progress(config.schedule.total_steps, silent=not peers.lead)
  closing.callback(progress.close)
  if bucket and peers.lead:
    bucket.settle(progress.message)
  elif peers.lead:
    folder.settle(workdir, progress.message)
  peers.barrier('settled')
  if bucket and not peers.lead:
    bucket.settle(progress.message)
  lower = evaluation is not None and evaluation.lower_is_better
  checkpoints = Checkpoints(workdir, config.checkpoint, lower_is_better=lower, bucket=bucket)
  closing.callback(checkpoints.close)
  watchdog = Watchdog(workdir, seconds=config.log.stall_seconds, process=peers.index)
  closing.callback(watchdog.close)

  peers.agree('checkpoint', {'newest checkpoint': checkpoints.latest})
  start = 0
  if checkpoints.latest is not None:
    start = checkpoints.next_index(checkpoints.latest)
  pipeline = Pipeline(
    config.data,
    batch_size=config.schedule.batch_size,
    seed=config.seed,
    rows=rows(sharding.batch(mesh), config.schedule.batch_size),
    start=start,
    check_shards=peers.lead,
  )
  closing.callback(pipeline.close)
  contract = initialization.contract(config, pipeline)
  peers.agree(
    'start',
    {
      'data': contract['data_fingerprint'][:8],
      'tokenizer': str(contract['tokenizer_sha256'])[:8],
      'device': jax.devices()[0].device_kind,
    },
  )
  initialization.check_vocabulary(config, pipeline.tokenizer)
  encoder = RunEncoder(method, mesh)
  if pipeline.tokenizer:
    encoder.tokenizer = pathlib.Path(pipeline.tokenizer.path).read_bytes()
  return Run(
    method=method,
    workdir=workdir,
    mesh=mesh,
    signals=signals,
    peers=peers,
    evaluation=evaluation,
    checkpoints=checkpoints,
    pipeline=pipeline,
    encoder=encoder,
    contract=contract,
    progress=progress,
    watchdog=watchdog,
    clock=Clock(mesh),
    quarantine=Quarantine(pipeline, log.UniqueLines(_own_file(workdir, 'quarantine'))),
    nonfinite=log.UniqueLines(_own_file(workdir, 'nonfinite')),
  )


def _own_file(workdir, name):
  if jax.process_count() > 1:
    name = f'{name}-{jax.process_index()}'
  return workdir / f'{name}.jsonl'


def restore(run: Run, closing: contextlib.ExitStack) -> Position:
  """Where the run starts; writes config.json, and drops the metrics that will be written again."""
  config = run.method.config
  checkpoints = run.checkpoints
  abstract, shardings = lowering.abstract_state(run.method, run.mesh)
  latest = checkpoints.latest
  index = 0
  if latest is not None:
    saved_contract = checkpoints.contract(latest)
    for change in check_contract(saved_contract, run.contract, str(run.workdir)):
      run.progress.message(f'resumed with a change: {change}')
    state, index = checkpoints.restore(latest, abstract)
    run.progress.message(f'resumed from step {latest:,} of {run.workdir}')
  else:
    state = initialization.initial_state(
      run.method,
      shardings,
      abstract,
      run.progress.message,
      tokenizer_sha256=run.contract['tokenizer_sha256'],
    )
  step = int(state.step)
  if step > config.schedule.total_steps:
    raise InputError(
      f'schedule.total_steps: got {config.schedule.total_steps}; expected at least the {step} '
      f'steps that {str(run.workdir)!r} has made'
    )
  metrics = None
  scores = []
  if run.peers.lead:
    files.write(run.workdir / 'config.json', json.dumps(strict.plain(config), indent=1) + '\n')
    if run.pipeline.tokenizer:
      tokenizer = pathlib.Path(run.pipeline.tokenizer.path)
      files.write(run.workdir / folder.TOKENIZER, tokenizer.read_bytes())
    resume_step = -1
    if latest is not None:
      resume_step = step
    run.clock.resume(log.read(run.workdir / log.FILE), step)
    metrics = log.Metrics(run.workdir, config=config.log, resume_step=resume_step)
    closing.callback(metrics.close)
    best = config.checkpoint.best_metric
    for line in log.read(run.workdir / log.FILE):
      values = log.evaluation(line)
      if values:
        scores.append((line['step'], values.get(best)))
  # A checkpoint is kept or removed by every process, so all need the scores.
  scores = run.peers.share('evaluated', scores)
  evaluated = set()
  for evaluated_step, score in scores:
    evaluated.add(evaluated_step)
    if score is not None:
      checkpoints.scores[evaluated_step] = score
  return Position(
    state=state,
    step=step,
    index=index,
    saved=latest,
    evaluated=evaluated,
    metrics=metrics,
  )


def compile_step(run: Run, at: Position) -> None:
  """Compiles the step for this mesh, from here to the end of the run."""
  kind = jax.devices()[0].device_kind
  run.progress.message(f'compiling the step for {run.mesh.size} {kind} device(s) ...')
  run.watchdog.beat('compiling')
  at.compiled = programs.compile_all(run.method, run.mesh, at.step, run.progress.message)
  if at.step == 0 and run.method.config.losses:
    run.progress.message(
      f'losses below are unweighted: {", ".join(_shown(run.method.config))}; their weighted sum '
      f'and more are in {run.workdir / log.FILE}'
    )
  asleep = set(run.method.losses) - set(awake(run.method, at.step))
  if asleep:
    names = ', '.join(sorted(asleep))
    run.progress.message(f'not computed while their weight is zero: {names}')


# --- repeat -------------------------------------------------------------------------------------


def due(config: Any, step: int) -> bool:
  """Whether the schedule asks for an evaluation after `step` updates."""
  if step == config.schedule.total_steps:
    return True
  if step == 0:
    return config.evals.at_start
  return config.evals.every_steps > 0 and step % config.evals.every_steps == 0


def evaluate(run: Run, at: Position) -> None:
  """Evaluates and writes the result; the score decides whether this step's checkpoint is kept for
  good.
  """
  encoder = run.encoder.of(at.state)
  values = None
  # A signal here stops one process where it is, and several where all have come to: at the check
  # that follows.
  with contextlib.ExitStack() as stopping:
    if run.peers.count > 1:
      stopping.enter_context(contextlib.suppress(Stopped))
    if not run.peers.lead:
      stopping.enter_context(run.watchdog.paused())
    if run.peers.lead:
      begin = time.monotonic()
      # On one device alone: the others take no part in what an evaluation computes.
      with run.signals.interruptible(), jax.set_mesh(sharding.alone()):
        result = run.evaluation(encoder)
      values = {f'eval/{name}': value for name, value in result.items()}
      values['eval/seconds'] = time.monotonic() - begin
    values = run.peers.share(f'evaluated/{at.step}', values)
  if values is None:
    return
  if at.metrics:
    at.metrics.write(at.step, values)
  at.evaluated.add(at.step)
  best = run.method.config.checkpoint.best_metric
  if not best:
    return
  if f'eval/{best}' not in values:
    raise strict.unknown('checkpoint.best_metric', best, log.evaluation(values))
  run.checkpoints.scores[at.step] = values[f'eval/{best}']


def read(run: Run, at: Position) -> None:
  """Reads the metrics of the step before, writes them, and looks for what went wrong in it."""
  if at.unread is None:
    return
  unread = at.unread
  at.unread = None
  config = run.method.config
  step = unread.step
  metrics = {name: value.item() for name, value in jax.device_get(unread.metrics).items()}
  run.clock.finished(unread.flops)
  bad = [int(record) for record in unread.host['bad'] if record >= 0]
  if step % config.log.every_steps == 0 or step == config.schedule.total_steps:
    rates = run.clock.rates(config.schedule.batch_size)
    if at.metrics:
      counts = {'bad_images': len(bad), 'compile_seconds': at.compiled.compile_seconds}
      at.metrics.write(step, metrics | rates | run.clock.goodput() | counts)
    losses = {name: metrics[name] for name in _shown(config) if name in metrics}
    run.progress.update(step, losses=losses, images_per_s=rates['images_per_s'])
  for record in bad:
    run.quarantine.add(record)
  if metrics['bad_steps']:
    _report_nonfinite(run, at, unread, metrics)


def _shown(config):
  """Names of the losses that training minimizes; the others are only monitored."""
  return [name for name, loss in config.losses.items() if loss.weight]


def _report_nonfinite(run, at, unread, metrics):
  config = run.method.config
  # As text: JSON has no nan.
  loss = str(metrics['loss'])
  gradient = str(metrics['gradient_norm'])
  ids = [run.pipeline.explain(record)[0] for record in unread.host['index']]
  run.nonfinite.add({'step': unread.step, 'loss': loss, 'gradient_norm': gradient, 'ids': ids})
  run.progress.message(
    f'step {unread.step}: update not finite and skipped: loss {loss}, gradient {gradient} '
    '(examples in nonfinite.jsonl)'
  )
  # A run shorter than the bound must not end as if it had trained.
  if metrics['bad_steps'] >= min(config.max_bad_steps, config.schedule.total_steps):
    raise Diverged(
      f'{metrics["bad_steps"]} updates in a row were not finite, up to step {unread.step}; the '
      f'last good checkpoint is step {at.saved}. Try a lower optimizer.learning_rate or a longer '
      'warm-up'
    )


def _save_is_due(run, at):
  config = run.method.config
  if at.step == config.schedule.total_steps:
    return True
  # Of several processes one alone cannot save: all end, and start again from the last checkpoint.
  if run.checkpoints.failed and run.peers.count == 1:
    return True
  if at.step > 0 and at.step % config.checkpoint.every_steps == 0:
    return True
  return config.checkpoint.every_minutes > 0 and _minutes_are_over(run, at)


def _minutes_are_over(run, at):
  """Whether it is time to save, by the clock of the first process: clocks never agree, and all must
  save at one step.
  """
  if at.step == 0 or run.peers.count > 1 and at.step % _ASK:
    return False
  minutes = (time.monotonic() - at.saved_at) / 60
  return run.peers.share(f'save/{at.step}', minutes >= run.method.config.checkpoint.every_minutes)


def save(run: Run, at: Position) -> None:
  """Starts to save the state as it is, unless it is saved."""
  _save(run, at, complete=False)


def _save(run, at, *, complete):
  """What may pass (a busy network disk) is tried again. complete: returns when all is on disk."""
  # Before the save: a run that has diverged must not save what follows from it.
  read(run, at)
  for pause in (*_PAUSES_S, None):
    try:
      if at.metrics:
        at.metrics.flush()
      if at.saved != at.step or run.checkpoints.failed:
        run.checkpoints.save(at.step, at.state, next_index=at.index, contract=run.contract)
        at.saved = at.step
        at.saved_at = time.monotonic()
      if complete:
        run.checkpoints.wait()
      return
    except PassingError as error:
      if pause is None or run.peers.count > 1:
        raise
      run.progress.message(f'{error}: another try in {pause} s')
      time.sleep(pause)
    # To know whether this one is any better.
    complete = True
    at.saved = None


def finish(run: Run, at: Position) -> None:
  """Returns when all is saved, by all."""
  _save(run, at, complete=True)
  if at.compiled:
    run.progress.message(log.spent(run.clock.goodput()))
  run.peers.apart()

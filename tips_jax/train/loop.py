"""The training loop. Order of operations:

    open     checkpoints, data (both check themselves), contract of the run; all processes agree on
    them
    start    own checkpoint, else init_from, else initial weights
    compile  once, ahead of the first step
    repeat   evaluate if due -> save if due -> stop if asked -> next batch -> dispatch the step ->
    read the metrics of
             the step before
    end      last checkpoint, files closed

Nothing in `repeat` waits for the device but reading metrics one step late, evaluating, and saving.
Of several processes the first one evaluates, and writes metrics.jsonl and config.json; its numbers
count for all (`bad_images` is of its part of the batch). Every one has its own quarantine,
nonfinite and stall file.
"""

import collections
import concurrent.futures
import contextlib
import json
import pathlib
import shutil
import time

import jax

from tips_jax.core import chips, files, log, strict
from tips_jax.core.errors import InputError
from tips_jax.data.pipeline import Pipeline
from tips_jax.runs import checkpoint
from tips_jax.runs import folder as runs
from tips_jax.runtime import compile_cache as cache
from tips_jax.runtime import peers as multihost
from tips_jax.runtime.signals import Stopped
from tips_jax.runtime.watchdog import Watchdog
from tips_jax.train import initialization as start
from tips_jax.train import lowering, sharding, summary
from tips_jax.train.encoder import RunEncoder

_HOST = ('index', 'bad')  # entries of a batch that stay on the host
_AHEAD = 2  # batches on their way to the device


class Diverged(RuntimeError):
  """Too many non-finite updates in a row."""


def train(method, workdir, preemption, *, evaluation=None, peers=None):
  """Trains to the last step and returns the final state's Encoder.

  evaluation: encoder -> {metric: number}, called before the first step, every `evals.every_steps` and
  at the end; its `lower_is_better` is of checkpoint.best_metric.
  peers: the other processes (multihost.join). Raises InputError for anything the user can mend,
  Stopped after a signal (all saved), Diverged.
  """
  config, workdir = method.config, pathlib.Path(workdir)
  mesh = sharding.make_mesh(config.mesh, config.schedule.batch_size)
  run = Run(method, workdir, mesh, preemption, peers or multihost.Peers(preemption), evaluation)
  try:
    with jax.set_mesh(mesh):
      with preemption.interruptible(disposable=True):
        run.start()
        run.compile()
        run.peers.together()
      run.loop(evaluation)
    return run.encoder.of(run.state)
  except Stopped:
    if run.peers.can_save:
      run.save()
      run.finish()
    raise
  finally:
    run.close()


class Run:
  """One process's share of a run: what the loop holds between steps."""

  def __init__(self, method, workdir, mesh, preemption, peers, evaluation):
    c = method.config
    self.method, self.config, self.workdir, self.mesh = method, c, workdir, mesh
    self.preemption, self.peers, self.lead = preemption, peers, peers.lead
    self.watchdog = Watchdog(workdir, seconds=c.log.stall_seconds, process=peers.index)
    self.progress = log.Progress(c.schedule.total_steps, silent=not self.lead)
    self.encoder = RunEncoder(method, mesh)
    self.abstract, self.shardings = lowering.abstract_state(method, mesh)
    self.state = self.pipeline = self.metrics = self.saved = self.clock = None
    self.late, self.evaluated = None, {}
    self.checkpoints = checkpoint.Checkpoints(
      workdir, c.checkpoint, lower_is_better=bool(evaluation and evaluation.lower_is_better)
    )

  # --- start ---

  def start(self):
    c, latest = self.config, self.checkpoints.latest
    self.peers.agree('checkpoint', {'newest checkpoint': latest})
    self.index = self.checkpoints.next_index(latest) if latest is not None else 0
    part, parts = multihost.rows(sharding.batch(self.mesh), c.schedule.batch_size)
    self.pipeline = Pipeline(
      c.data,
      batch_size=c.schedule.batch_size,
      seed=c.seed,
      process_index=part,
      process_count=parts,
      start=self.index,
    )
    self.contract = start.contract(c, self.pipeline)
    if self.pipeline.tokenizer:
      self.encoder.tokenizer = pathlib.Path(self.pipeline.tokenizer.path).read_bytes()
    self.peers.agree(
      'start',
      {
        'data': self.contract['data_fingerprint'][:8],
        'tokenizer': str(self.contract['tokenizer_sha256'])[:8],
        'device': jax.devices()[0].device_kind,
      },
    )
    for name, tower in c.towers.items():
      if (
        tower.kind == 'text'
        and self.pipeline.tokenizer
        and self.pipeline.tokenizer.vocab_size > tower.vocab
      ):
        raise InputError(
          f"towers.{name}.vocab: got {tower.vocab}; expected at least the tokenizer's "
          f'{self.pipeline.tokenizer.vocab_size} pieces'
        )
    if latest is not None:
      for change in checkpoint.check_contract(
        self.checkpoints.contract(latest), self.contract, str(self.workdir)
      ):
        self.progress.message(f'resumed with a change: {change}')
      state, self.index = self.checkpoints.restore(latest, self.abstract)
      self.progress.message(f'resumed from step {latest:,} of {self.workdir}')
    else:
      state = start.initial_state(
        self.method,
        self.shardings,
        self.abstract,
        self.progress.message,
        tokenizer_sha256=self.contract['tokenizer_sha256'],
      )
    if int(state.step) > c.schedule.total_steps:
      raise InputError(
        f'schedule.total_steps: got {c.schedule.total_steps}; expected at least the '
        f'{int(state.step)} steps that {str(self.workdir)!r} has made'
      )
    # The state comes last: with it, a signal saves.
    self.step, self.saved = int(state.step), latest
    self.state = state
    if self.lead:
      files.write(self.workdir / 'config.json', json.dumps(strict.plain(c), indent=1) + '\n')
      if self.pipeline.tokenizer:
        shutil.copyfile(self.pipeline.tokenizer.path, self.workdir / runs.TOKENIZER)
      self.metrics = log.Metrics(
        self.workdir, config=c.log, resume_step=self.step if latest is not None else -1
      )
    lines = log.read(self.workdir / log.FILE) if self.lead and latest is not None else []
    best = f'eval/{c.checkpoint.best_metric}'
    evaluated = [(l['step'], l.get(best)) for l in lines if any(k.startswith('eval/') for k in l)]
    evaluated = self.peers.share('evaluated', evaluated)
    self.evaluated = {step for step, _ in evaluated}
    self.checkpoints.scores.update({step: score for step, score in evaluated if score is not None})

  def compile(self):
    """Ahead of time, in a thread, so that a signal is heard during it."""
    if self.step == self.config.schedule.total_steps:
      return
    self.progress.message(
      f'compiling the step for {self.mesh.size} {jax.devices()[0].device_kind} device(s) ...'
    )
    self.watchdog.beat('compiling')
    begin, found = time.monotonic(), cache.hits()
    lowered = lowering.lower(self.method, self.mesh)
    traced_s = time.monotonic() - begin
    # Its own pool, never shut down: leaving the process must not wait for the compiler.
    future = concurrent.futures.ThreadPoolExecutor(1, 'compile').submit(lowered.compile)
    while not future.done():
      concurrent.futures.wait([future], timeout=0.2)
    self.step_fn, self.compile_s = future.result(), time.monotonic() - begin
    how = 'read from the cache' if cache.hits() > found else 'compiled'
    self.progress.message(
      f'compiled in {self.compile_s:.1f} s: traced in {traced_s:.1f} s, then {how}'
    )

  # --- repeat ---

  def loop(self, evaluate):
    c, total = self.config, self.config.schedule.total_steps
    prefetch = Prefetch(self.pipeline, sharding.batch(self.mesh))
    clock = self.clock = Clock(self.method, self.mesh)
    try:
      while True:
        self.peers.check(2 * self.step)
        self.watchdog.beat(f'at step {self.step:,}')
        if evaluate and self.due(self.step) and self.step not in self.evaluated:
          self.read()
          self.evaluate(evaluate)
          clock.restart()
        if self.step == total or self.step and self.step % c.checkpoint.every_steps == 0:
          self.save()
        if self.step == total:
          break
        self.peers.check(2 * self.step + 1)
        batch, host = clock.waiting(prefetch.next)
        self.state, metrics = self.step_fn(self.state, batch)
        self.step, self.index = self.step + 1, self.index + c.schedule.batch_size
        self.read()
        self.late = (self.step, metrics, host)
      self.finish()
    finally:
      prefetch.close()

  def finish(self):
    """All is saved, by all."""
    self.checkpoints.wait()
    self.peers.apart()

  def due(self, step):
    e, total = self.config.evals, self.config.schedule.total_steps
    return step == total or (
      e.at_start if step == 0 else bool(e.every_steps) and step % e.every_steps == 0
    )

  def evaluate(self, evaluate):
    """Evaluates and writes the result; the score decides whether this step's checkpoint is kept for
    good.
    """
    encoder, values = self.encoder.of(self.state), None
    # A signal here stops one process where it is, and several where all have come to: at the check
    # that follows.
    with contextlib.suppress(Stopped) if self.peers.count > 1 else contextlib.nullcontext():
      if self.lead:
        begin = time.monotonic()
        with (
          self.preemption.interruptible(),
          jax.set_mesh(sharding.alone()),
        ):  # of what evaluators learn
          result = evaluate(encoder)
        values = {f'eval/{k}': v for k, v in result.items()} | {
          'eval/seconds': time.monotonic() - begin
        }
      values = self.peers.share(f'evaluated/{self.step}', values)
    if values is None:
      return
    if self.metrics:
      self.metrics.write(self.step, values)
    self.evaluated.add(self.step)
    best = self.config.checkpoint.best_metric
    if best and f'eval/{best}' not in values:
      raise strict.unknown(
        'checkpoint.best_metric', best, [k.removeprefix('eval/') for k in values]
      )
    if best:
      self.checkpoints.scores[self.step] = values[f'eval/{best}']

  def read(self):
    """Reads the metrics of the step before, writes them, and looks for what went wrong in it."""
    if self.late is None:
      return
    (step, metrics, host), self.late = self.late, None
    metrics = {k: v.item() for k, v in jax.device_get(metrics).items()}
    bad = [int(r) for r in host['bad'] if r >= 0]
    if step % self.config.log.every_steps == 0 or step == self.config.schedule.total_steps:
      rates = self.clock.rates(self.config.schedule.batch_size)
      if self.metrics:
        self.metrics.write(
          step, metrics | rates | {'bad_images': len(bad), 'compile_seconds': self.compile_s}
        )
      self.progress.update(step, loss=metrics['loss'], images_per_s=rates.get('images_per_s'))
    for record in bad:
      name, reason = self.pipeline.explain(record)
      self.append('quarantine', {'record': record, 'id': name, 'reason': reason})
    if metrics['bad_steps']:
      ids = [self.pipeline.explain(r)[0] for r in host['index']]
      self.append(
        'nonfinite',
        {
          'step': step,
          'loss': str(metrics['loss']),
          'gradient_norm': str(metrics['gradient_norm']),
          'ids': ids,
        },
      )
      self.progress.message(
        f'step {step}: loss {metrics["loss"]}, gradient {metrics["gradient_norm"]}: not finite, '
        'update skipped (examples in nonfinite.jsonl)'
      )
      if metrics['bad_steps'] >= self.config.max_bad_steps:
        raise Diverged(
          f'{metrics["bad_steps"]} updates in a row were not finite, up to step {step}; the last good '
          f'checkpoint is step {self.saved}. Try a lower optimizer.learning_rate or a longer warm-up'
        )

  def append(self, name, row):
    """One line to `<name>.jsonl` of the work folder, unless it stands there."""
    own = f'-{jax.process_index()}' if jax.process_count() > 1 else ''
    path = self.workdir / f'{name}{own}.jsonl'
    line = json.dumps(row) + '\n'
    if not path.exists() or line not in path.read_text():
      with open(path, 'a') as f:
        f.write(line)

  def save(self):
    """Saves the state as it is, unless it is saved."""
    if self.state is None or self.saved == self.step:
      return
    self.read()
    self.checkpoints.save(self.step, self.state, next_index=self.index, contract=self.contract)
    self.saved = self.step

  def close(self):
    self.watchdog.close()
    if self.pipeline:
      self.pipeline.close()
    if self.metrics:
      self.metrics.close()
    self.progress.close()
    self.checkpoints.close()


class Prefetch:
  """The next batches, on their way to the device while it works."""

  def __init__(self, pipeline, to):
    self._pipeline, self._to = pipeline, to
    self._pool = concurrent.futures.ThreadPoolExecutor(1, 'to-device')
    self._queue = collections.deque(self._pool.submit(self._load) for _ in range(_AHEAD))

  def _load(self):
    batch = next(self._pipeline)
    host = {k: batch.pop(k) for k in _HOST}
    return {k: jax.make_array_from_process_local_data(self._to, x) for k, x in batch.items()}, host

  def next(self):
    self._queue.append(self._pool.submit(self._load))
    return self._queue.popleft().result()

  def close(self):
    self._pool.shutdown(wait=True, cancel_futures=True)


class Clock:
  """Rates since the last time they were asked for."""

  def __init__(self, method, mesh):
    peak = chips.peak(jax.devices()[0].device_kind)
    self._flops = sum(summary.flops(method).values())
    self._peak = peak and peak * mesh.size
    self.restart()

  def restart(self):
    self._begin, self._waited, self._steps = time.monotonic(), 0.0, 0

  def waiting(self, fn):
    begin = time.monotonic()
    result = fn()
    self._waited += time.monotonic() - begin
    self._steps += 1
    return result

  def rates(self, batch_size):
    passed = max(time.monotonic() - self._begin, 1e-9)
    speed = self._steps * batch_size / passed
    out = {'images_per_s': speed, 'data_wait': self._waited / passed}
    if self._peak:
      out['model_flop_utilization'] = speed * self._flops / self._peak
    self.restart()
    return out

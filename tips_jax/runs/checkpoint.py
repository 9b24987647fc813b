"""Checkpoints of a run, through orbax: asynchronous, complete or absent, readable on another mesh.

Each step holds `params`, `teachers` (if any), `train` (optimizer, states of the losses, counters),
`data` (one integer) and, as metadata, the contract: the config, the tokenizer's hash, the
preprocessing and the data's fingerprint. Precedence at start-up: the run's own checkpoint in
--workdir, then `init_from`, then initial weights.
"""

import concurrent.futures
import contextlib
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from tips_jax.core import schema, strict
from tips_jax.core.errors import InputError, PassingError, may_pass
from tips_jax.core.schema import Checkpoint
from tips_jax.runs import digests, folder
from tips_jax.runs.bucket import Bucket

_POLICY = ocp.training.preservation_policies
# A run that changes one of these would have other weights, or other inputs to the same weights.
_FIXED = ('towers', 'tokenizer_sha256', 'text_length', 'preprocessing')
# Fields of train.state.State that are saved as the part `train`.
_TRAIN = ('loss_state', 'optimizer', 'step', 'bad_steps', 'skipped')


class Checkpoints:
  """The checkpoints of one work folder."""

  def __init__(
    self,
    workdir: str | pathlib.Path,
    config: Checkpoint,
    *,
    lower_is_better: bool = False,
    bucket: Bucket | None = None,
  ):
    """bucket: where the work folder is, if `workdir` is only that of this process."""
    # {step: value of checkpoint.best_metric}, filled by the loop after each evaluation.
    self.scores: dict[int, float] = {}
    keep = [_POLICY.LatestN(config.keep_last)]
    if config.keep_every:
      keep.append(_POLICY.EveryNSteps(config.keep_every))
    if config.best_metric:
      keep.append(_Best(self.scores, lower_is_better))
    self._path = pathlib.Path(workdir).absolute() / folder.FOLDER
    self._bucket = bucket
    context = ocp.Context()
    if bucket and bucket.count > 1:
      # Each process has a folder of its own, and saves in it what its devices hold. All arrays in
      # files of their own: OCDBT's would be merged at the end, which needs one folder.
      context.multiprocessing.primary_host = None
      context.array.saving.use_replica_parallel = False
      context.array.saving.use_ocdbt = False
    with folder.one_error(f'workdir: cannot open {str(self._path)!r}'):
      self._orbax = ocp.training.Checkpointer(
        self._path,
        context=context,
        preservation_policy=_POLICY.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
        # The loop decides when to save; orbax shall not skip any.
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      )
    # One thread: it waits for orbax, then reads what was written.
    self._pool = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
    self._pending = None
    self._last: int | None = None  # the step of the last save, however it ended
    self._read_back = False

  @property
  def latest(self) -> int | None:
    """The newest complete step, or None."""
    if self._orbax.latest is None:
      return None
    return self._orbax.latest.step

  @property
  def failed(self) -> bool:
    """Whether the last save has failed; `save` and `wait` raise why."""
    return bool(self._pending and self._pending.done() and self._pending.exception())

  def save(self, step: int, state: Any, *, next_index: int, contract: dict) -> None:
    """Starts to save; the state may be donated to the next step at once.

    Errors of the save before surface here: PassingError where another try may do.
    """
    parts = _parts(state)
    shapes = jax.tree.map(jax.typeof, parts)
    with self._saving():
      self._wait()
      pending = self._orbax.save_checkpointables_async(
        step,
        parts | {'data': {'next_index': next_index}},
        custom_metadata=contract,
        force=True,
        # Orbax may know a step whose save has failed.
        overwrite=step == self._last,
      )
    self._last = step
    self._pending = self._pool.submit(self._complete, pending, self._path / str(step), shapes)

  def wait(self) -> None:
    """Returns when the last save is complete on disk; errors as of `save`."""
    with self._saving():
      self._wait()

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    try:
      with folder.one_error(f'checkpoint: cannot save in {str(self._path)!r}'):
        yield
    except InputError as error:
      if may_pass(error.__cause__):
        raise PassingError(str(error)) from error
      raise

  def _complete(self, pending, path, shapes):
    """Runs in the thread: waits for orbax, adds the digests, sends it where the work folder is in a
    bucket, and reads the first one back.
    """
    pending.result()
    if self._bucket:
      self._bucket.send_checkpoint(int(path.name))
    if jax.process_index():  # one process is enough, and all have the same files
      return
    if not self._bucket:
      digests.write(path)
    if self._read_back:
      return
    for part, expected in shapes.items():
      folder.check(path, part, expected)
    self._read_back = True

  def _wait(self):
    if self._pending is not None:
      # Cleared first: a failed save is raised once, not at every later call.
      pending = self._pending
      self._pending = None
      pending.result()

  def contract(self, step: int) -> dict:
    """What the run that saved this step was: see train/initialization.py."""
    return folder.contract(self._path / str(step))

  def next_index(self, step: int) -> int:
    """The next global example of the data, without reading any weights."""
    path = self._path / str(step)
    with folder.one_error(f'checkpoint: cannot read {str(path)!r}'):
      data = ocp.load_checkpointables(path, {'data': {'next_index': 0}})['data']
    return int(data['next_index'])

  def restore(self, step: int, abstract: Any) -> tuple[Any, int]:
    """(state, next data index); `abstract`: a State of ShapeDtypeStructs with the shardings to
    restore to.
    """
    path = self._path / str(step)
    parts = _parts(abstract)
    # Before orbax: its errors fill pages, and it would cast another dtype in silence.
    for part, requested in parts.items():
      folder.check(path, part, requested)
    with folder.one_error(f'checkpoint: cannot read {str(path)!r}'):
      out = self._orbax.load_checkpointables(step, parts | {'data': {'next_index': 0}})
    state = abstract.replace(params=out['params'], teachers=out.get('teachers', {}), **out['train'])
    return state, int(out['data']['next_index'])

  def close(self) -> None:
    """Waits for the last save, and frees orbax's threads."""
    with self._saving():
      self._wait()
      self._pool.shutdown()
      self._orbax.close()  # raises the error of a failed save once more


class _Best:
  """Keeps the checkpoint with the best score, also where the score came after the save.

  A score that is not finite is none.
  """

  def __init__(self, scores, lower_is_better):
    self._scores = scores
    self._best = max
    if lower_is_better:
      self._best = min

  def should_preserve(self, checkpoints, *, context):
    scored = [c.step for c in checkpoints if math.isfinite(self._scores.get(c.step, math.nan))]
    best = self._best(scored, key=self._scores.get, default=None)
    return [c.step == best for c in checkpoints]


def _parts(state):
  """{part: its arrays}. Orbax cannot save an empty part, so `teachers` may be absent."""
  parts = {'params': state.params, 'train': {name: getattr(state, name) for name in _TRAIN}}
  if state.teachers:
    parts['teachers'] = state.teachers
  return parts


def check_contract(old: dict, new: dict, where: str) -> list[str]:
  """InputError for the first thing that weights and inputs cannot survive; returns other changed
  fields, named.
  """
  old, new = ({**c, 'towers': _with_defaults(c.get('towers'))} for c in (old, new))
  for key in _FIXED:
    if old.get(key) != new.get(key):
      changed = _changes(old.get(key), new.get(key), key)
      raise InputError(
        f'{where}: got a checkpoint of another run: {changed[0]}; expected the same, or another '
        '--workdir'
      )
  changed = _changes(old.get('config'), new.get('config'), 'config')
  return changed + _changes(old.get('data_fingerprint'), new.get('data_fingerprint'), 'data')


def _with_defaults(towers):
  """The saved towers with the fields that an older version did not know, at what they are without
  being named; as they are where this version cannot read them.
  """
  try:
    known = strict.value(dict[str, schema.Tower], towers, 'towers')
  except InputError:
    return towers
  return json.loads(json.dumps(strict.plain(known)))


def _changes(old, new, name):
  """Lines such as 'config.seed was 0, is 1', one for each leaf that differs."""
  if isinstance(old, dict) and isinstance(new, dict):
    lines = []
    # A field that only one of them has changed too: a newer version's, or a group of another kind.
    for key in sorted({*old, *new}):
      lines += _changes(old.get(key), new.get(key), f'{name}.{key}')
    return lines
  if old == new:
    return []
  return [f'{name} was {old!r}, is {new!r}']

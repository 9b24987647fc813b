"""Checkpoints of a run, through orbax: asynchronous, complete or absent, readable on another mesh.

Each step holds `params`, `teachers` (if any), `train` (optimizer, memory, counters), `data` (one
integer) and, as
metadata, the contract: the config, the tokenizer's hash, the preprocessing and the data's
fingerprint. Precedence at start-up: the own run in --workdir, then `init_from`, then initial
weights.
"""

import math
import pathlib

from orbax.checkpoint import v1 as ocp

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Checkpoint
from tips_jax.evals.datasets import protocols
from tips_jax.interop import run as own
from tips_jax.interop.run import FOLDER

_POLICY = ocp.training.preservation_policies
# Fields in which a run may not change its mind: other weights, or other inputs to the same weights.
_FIXED = ('towers', 'tokenizer_sha256', 'text_length', 'preprocessing')


class Checkpoints:
  """The checkpoints of one work folder. `scores`: {step: value of the best metric}, filled by the
  owner.
  """

  def __init__(self, workdir, config: Checkpoint):
    self.scores = {}
    keep = [_POLICY.LatestN(config.keep_last)]
    if config.keep_every:
      keep.append(_POLICY.EveryNSteps(config.keep_every))
    if config.best_metric:
      keep.append(
        _Best(self.scores, min if protocols.unit(config.best_metric)[1] == 'lower' else max)
      )
    self._path = pathlib.Path(workdir).absolute() / FOLDER
    with own.one_error(f'workdir: cannot open {str(self._path)!r}'):
      self._orbax = ocp.training.Checkpointer(
        self._path,
        preservation_policy=_POLICY.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      )
    self._pending = None

  @property
  def latest(self):
    """The newest complete step, or None."""
    return self._orbax.latest.step if self._orbax.latest else None

  def save(self, step, state, *, next_index, contract):
    """Starts to save; the state may be donated to the next step at once. Errors of the save before
    surface here.
    """
    with own.one_error(f'checkpoint: cannot save step {step} in {str(self._path)!r}'):
      self._wait()
      self._pending = self._orbax.save_checkpointables_async(
        step,
        _parts(state) | {'data': {'next_index': next_index}},
        custom_metadata=contract,
        force=True,
      )

  def wait(self):
    with own.one_error(f'checkpoint: cannot save in {str(self._path)!r}'):
      self._wait()

  def _wait(self):
    if self._pending is not None:
      self._pending, pending = None, self._pending
      pending.result()

  def contract(self, step):
    return own.contract(self._path / str(step))

  def next_index(self, step):
    with own.one_error(f'checkpoint: cannot read {str(self._path / str(step))!r}'):
      return int(
        ocp.load_checkpointables(self._path / str(step), {'data': {'next_index': 0}})['data'][
          'next_index'
        ]
      )

  def restore(self, step, abstract):
    """(state, next data index); `abstract`: a State of ShapeDtypeStructs with the shardings to
    restore to.
    """
    path = self._path / str(step)
    parts = _parts(abstract)
    for part, wanted in parts.items():
      own.check(path, part, wanted)
    with own.one_error(f'checkpoint: cannot read {str(path)!r}'):
      out = self._orbax.load_checkpointables(step, parts | {'data': {'next_index': 0}})
    state = abstract.replace(params=out['params'], teachers=out.get('teachers', {}), **out['train'])
    return state, int(out['data']['next_index'])

  def close(self):
    with own.one_error(f'checkpoint: cannot save in {str(self._path)!r}'):
      self._wait()
      self._orbax.close()  # raises the error of a failed save once more


class _Best:
  """Keeps the checkpoint with the best score, of numbers, also where the score came after the save."""

  def __init__(self, scores, best):
    self._scores, self._best = scores, best

  def should_preserve(self, checkpoints, *, context):
    scored = [c.step for c in checkpoints if math.isfinite(self._scores.get(c.step, math.nan))]
    best = self._best(scored, key=self._scores.get, default=None)
    return [c.step == best for c in checkpoints]


def _parts(state):
  train = {
    k: getattr(state, k) for k in ('loss_state', 'optimizer', 'step', 'bad_steps', 'skipped')
  }
  return {'params': state.params, 'train': train} | (
    {'teachers': state.teachers} if state.teachers else {}
  )


def check_contract(old, new, where):
  """InputError for the first thing that weights and inputs cannot survive; returns other changed
  fields, named.
  """
  for key in _FIXED:
    if old.get(key) != new.get(key):
      changed = _changes(old.get(key), new.get(key), key)
      raise InputError(
        f'{where}: got a checkpoint of another run: {changed[0]}; expected the same, or another '
        '--workdir'
      )
  changed = _changes(old.get('config'), new.get('config'), 'config')
  return changed + _changes(old.get('data_fingerprint'), new.get('data_fingerprint'), 'data')


def _changes(old, new, name):
  if isinstance(old, dict) and isinstance(new, dict):
    return [
      c for k in sorted({*old, *new}) for c in _changes(old.get(k), new.get(k), f'{name}.{k}')
    ]
  return [] if old == new else [f'{name} was {old!r}, is {new!r}']

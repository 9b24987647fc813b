"""What a run leaves on disk, read: work folders, their checkpoints, parts of a checkpoint."""

import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterator

import jax
from orbax.checkpoint import v1 as ocp

from tips_jax.core import buckets, log, tree
from tips_jax.core.errors import InputError
from tips_jax.core.strict import did_you_mean
from tips_jax.runs import digests

FOLDER = 'checkpoints'
TOKENIZER = 'tokenizer.model'
_METADATA = '_CHECKPOINT_METADATA'  # orbax writes it when all else is there
_METADATA_OF_PART = '_METADATA'


def is_run(path: str | pathlib.Path) -> bool:
  """Whether a path is a work folder, or one with @step behind it."""
  workdir = split(path)[0]
  if buckets.is_bucket(workdir):
    return buckets.exists(buckets.join(workdir, FOLDER), 'checkpoint')
  return (pathlib.Path(workdir) / FOLDER).is_dir()


def split(path: str | pathlib.Path) -> tuple[str, int | None]:
  """(work folder, step or None) of 'FOLDER' or 'FOLDER@step'; a folder of that very name is one."""
  match = re.fullmatch(r'(.+)@(\d+)', str(path))
  if not match:
    return str(path), None
  exists = os.path.exists(path)
  if buckets.is_bucket(path):
    exists = buckets.exists(path, 'checkpoint')
  if exists:
    return str(path), None
  return match[1], int(match[2])


def find(path: str | pathlib.Path, what: str, *, without: Collection[str] = ()) -> pathlib.Path:
  """Path of the newest complete checkpoint of a run, or of the step after '@'.

  InputError, which names `what` (a flag or a field), where the run has no such checkpoint. Of a run
  in a bucket it is that of a copy, `without` some parts.
  """
  workdir, step = split(path)
  if buckets.is_bucket(workdir):
    steps = in_bucket(workdir, what)
  else:
    folder = pathlib.Path(workdir).absolute() / FOLDER
    steps = [int(p.name) for p in numbered(folder) if (p / _METADATA).is_file()]
  if not steps:
    raise InputError(
      f'{what}: got {str(workdir)!r}; expected the work folder of a run that has saved a checkpoint'
    )
  if step is None:
    step = max(steps)
  if step not in steps:
    raise InputError(
      f'{what}: got step {step}; expected one that {str(workdir)!r} has: {sorted(steps)}'
    )
  if buckets.is_bucket(workdir):
    unwanted = tuple(f'{FOLDER}/{step}/{part}/' for part in without)

    def wanted(name):
      inside = name.startswith(f'{FOLDER}/{step}/') and not name.startswith(unwanted)
      return inside or name in (TOKENIZER, log.FILE)

    folder = pathlib.Path(buckets.local(workdir, what, wanted=wanted)) / FOLDER
  return folder / str(step)


def in_bucket(workdir: str, what: str) -> list[int]:
  """The steps of a run's complete checkpoints in a bucket: those that have their digests, which go
  up last. what: as in `find`.
  """
  steps = []
  for name in buckets.names(buckets.join(workdir, FOLDER), what):
    match = re.fullmatch(f'(0|[1-9][0-9]*)/{re.escape(digests.FILE)}', name)
    if match:
      steps.append(int(match[1]))
  return sorted(steps)


def numbered(folder: pathlib.Path) -> list[pathlib.Path]:
  """Files and folders that are named as a step, the newest first; only some may be checkpoints."""
  found = []
  if folder.is_dir():
    # Orbax writes into a folder with a suffix and renames it: a bare number is complete.
    found = [p for p in folder.iterdir() if re.fullmatch('0|[1-9][0-9]*', p.name)]
  return sorted(found, key=_step, reverse=True)


def _step(path):
  return int(path.name)


def settle(workdir: str | pathlib.Path, say: Callable[[str], None]) -> None:
  """Sets aside what a run cannot go on from: newest checkpoints that are damaged, and what is named
  as a step and is no checkpoint.

  InputError, and nothing moved, where all checkpoints are damaged: starting anew would lose the
  run. One process calls it, before any opens the checkpoints.
  """
  folder = pathlib.Path(workdir).absolute() / FOLDER
  stray = []
  damaged = {}
  whole = None
  for path in numbered(folder):
    if not any((path / name).exists() for name in (_METADATA, 'params', digests.FILE)):
      stray.append(path)
    elif whole is None:
      reason = _damage(path)
      if reason:
        damaged[path] = reason
      else:
        whole = path
  if damaged and whole is None:
    reasons = '; '.join(f'{path.name}: {reason}' for path, reason in damaged.items())
    raise InputError(
      f'checkpoint: got only damaged ones in {str(folder)!r} ({reasons}); expected a whole one; '
      'another --workdir starts anew'
    )
  for path, reason in damaged.items():
    aside = _set_aside(path, 'damaged')
    say(f'checkpoint {path.name} is damaged: {reason}; it is now {aside}')
  if damaged:
    say(f'going on from the one before, step {whole.name}')
  for path in stray:
    say(f'{path} is no checkpoint; it is now {_set_aside(path, "stray")}')


def _damage(path):
  """What is wrong with a checkpoint; '' where nothing is."""
  reason = digests.problem(path)
  if reason or (path / digests.FILE).exists():
    return reason
  # A kill came before the digests: what can be told without them.
  try:
    saved = ocp.checkpointables_metadata(path)
  except Exception as error:  # orbax and the storage raise their own
    return f'it cannot be read ({type(error).__name__})'
  if not saved.custom_metadata:
    return f'{_METADATA} is not complete'
  for part in ('params', 'train', 'data'):
    if not saved.metadata.get(part):
      return f'{part} is not complete'
  return ''


def _set_aside(path, kind):
  """Renames a file or folder so that nobody takes it for a checkpoint; returns its new path."""
  aside = path.with_name(f'{kind}-{path.name}')
  count = 1
  while os.path.lexists(aside):
    count += 1
    aside = path.with_name(f'{kind}-{path.name}-{count}')
  path.rename(aside)
  return aside


def _require_whole(path, within):
  """InputError where a file or folder of a checkpoint is not as it was written."""
  # Of several processes the first one: all would read the same files.
  if jax.process_index():
    return
  reason = digests.problem(path, within)
  if reason:
    raise InputError(
      f'checkpoint {str(path)!r}: is damaged: {reason}; expected it whole, or WORKDIR@step of '
      'another one'
    )


def contract(path: pathlib.Path) -> dict:
  """The contract that a checkpoint was saved with (train/initialization.py says what it holds)."""
  _require_whole(path, _METADATA)
  with one_error(f'checkpoint: cannot read {str(path)!r}'):
    return ocp.checkpointables_metadata(path).custom_metadata or {}


def load(path: pathlib.Path, part: str, abstract: dict, *, rename: dict | None = None) -> dict:
  """One part ('params', 'teachers', 'train') of a checkpoint in the shapes, dtypes and shardings of
  `abstract`, which may hold fewer names than the file.

  rename: {name in the file: name in the result} of the first level of keys. Shapes and dtypes that
  differ are one InputError.
  """
  here = rename or {}
  saved_as = dict(zip(here.values(), here))
  requested = {saved_as.get(name, name): leaves for name, leaves in abstract.items()}
  _require_whole(path, part)
  check(path, part, requested)
  # The file may hold more than is asked for: heads, the towers that another model lacks.
  context = ocp.Context()
  context.pytree_options.loading.partial_load = True
  with context, one_error(f'checkpoint: cannot read {str(path)!r}'):
    restored = ocp.load_checkpointables(path, {part: requested})[part]
  return {k: restored[saved_as.get(k, k)] for k in abstract}


def names(path: pathlib.Path, part: str) -> dict[str, tuple]:
  """{leaf name: (shape, dtype)} of a saved part; {} when the checkpoint lacks it."""
  _require_whole(path, f'{part}/{_METADATA_OF_PART}')
  with one_error(f'checkpoint: cannot read {str(path)!r}'):
    metadata = ocp.checkpointables_metadata(path).metadata
  leaves = metadata.get(part)
  # Orbax logs why it cannot read a part, and gives None.
  if leaves is None and (path / part).exists():
    _require_whole(path, part)
    raise InputError(f'checkpoint {str(path)!r}: got {part}, which cannot be read back')
  result = {}
  for name, leaf in tree.named_leaves(leaves or {}):
    result[name] = (tuple(leaf.shape), leaf.dtype)
  return result


def check(path: pathlib.Path, part: str, requested: dict) -> None:
  """One clear error where a saved part does not fit; orbax would cast dtypes silently."""
  saved = names(path, part)
  for name, leaf in tree.named_leaves(requested):
    if name not in saved:
      raise InputError(
        f'checkpoint {str(path)!r}: got no {part}/{name}; expected {leaf.shape}'
        f'{did_you_mean(name, saved)}'
      )
    shape, dtype = saved[name]
    if (shape, dtype) != (tuple(leaf.shape), leaf.dtype):
      raise InputError(
        f'checkpoint {str(path)!r}: {part}/{name}: got {dtype}{list(shape)}; expected '
        f'{leaf.dtype}{list(leaf.shape)}: another model wrote it'
      )


@contextlib.contextmanager
def one_error(what: str) -> Iterator[None]:
  """Turns whatever the storage raises into one InputError.

  Errors of the device pass: they are no fault of the files, and a failed peer is known by them.
  """
  try:
    yield
  except (InputError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    # Orbax's messages go on for pages; the first line says what it was.
    lines = str(error).strip().splitlines() or ['']
    raise InputError(f'{what} ({type(error).__name__}: {lines[0][:300]})') from error

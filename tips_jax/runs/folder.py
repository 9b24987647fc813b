"""What a run leaves on disk, read: work folders, their checkpoints, parts of a checkpoint."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

import jax
from orbax.checkpoint import v1 as ocp

from tips_jax.core import tree
from tips_jax.core.errors import InputError
from tips_jax.core.strict import did_you_mean

FOLDER = 'checkpoints'
TOKENIZER = 'tokenizer.model'


def is_run(path: str | pathlib.Path) -> bool:
  """Whether a path is a work folder, or one with @step behind it."""
  return (pathlib.Path(split(path)[0]) / FOLDER).is_dir()


def split(path: str | pathlib.Path) -> tuple[str, int | None]:
  """(work folder, step or None) of 'FOLDER' or 'FOLDER@step'; a folder of that very name is one."""
  match = re.fullmatch(r'(.+)@(\d+)', str(path))
  if match and not os.path.exists(path):
    return match[1], int(match[2])
  return str(path), None


def find(path: str | pathlib.Path, what: str) -> pathlib.Path:
  """Path of the newest complete checkpoint of a run, or of the step after '@'.

  InputError, which names `what` (a flag or a field), where the run has no such checkpoint.
  """
  workdir, step = split(path)
  folder = pathlib.Path(workdir).absolute() / FOLDER
  steps = []
  if folder.is_dir():
    # Orbax writes into a folder with a suffix and renames it: a bare number is complete.
    steps = [int(p.name) for p in folder.glob('*') if p.name.isdigit()]
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
  return folder / str(step)


def contract(path: pathlib.Path) -> dict:
  """The contract that a checkpoint was saved with (train/initialization.py says what it holds)."""
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
  check(path, part, requested)
  # The file may hold more than is asked for: heads, the towers that another model lacks.
  context = ocp.Context()
  context.pytree_options.loading.partial_load = True
  with context, one_error(f'checkpoint: cannot read {str(path)!r}'):
    restored = ocp.load_checkpointables(path, {part: requested})[part]
  return {k: restored[saved_as.get(k, k)] for k in abstract}


def names(path: pathlib.Path, part: str) -> dict[str, tuple]:
  """{leaf name: (shape, dtype)} of a saved part; {} when the checkpoint lacks it."""
  with one_error(f'checkpoint: cannot read {str(path)!r}'):
    metadata = ocp.checkpointables_metadata(path).metadata
  result = {}
  for name, leaf in tree.named_leaves(metadata.get(part) or {}):
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

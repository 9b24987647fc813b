"""Where the tasks of a program are done: its flags for that, and what they mean."""

import functools
import re
import typing
from collections.abc import Callable, Sequence

from tips_jax.core import buckets, cli, files
from tips_jax.core.errors import InputError


def add_flags(flags: cli.Flags) -> None:
  """Adds --part, --merge, --runner, --beam and --task_mib."""
  flags.add_string('part', '', 'I/N: does the tasks of part I, from 0 to N - 1, and no more.')
  flags.add_boolean('merge', False, 'Makes the store of what parts have done; does no task.')
  flags.add_string('runner', '', "Does the tasks through Apache Beam, by this runner's name.")
  flags.add_strings('beam', [], 'Options of --runner: project=P,region=R,temp_location=gs://...')
  flags.add_number(
    'task_mib',
    0.0,
    'MiB of the input that are a task, which is done whole or not at all; 0: a 64th of the input, '
    'between 32 and 1024. The shards of the store follow from it.',
    0.0,
  )


def chosen(flags: cli.Flags, inputs: Sequence[str]) -> dict[str, typing.Any]:
  """The arguments of `convert.convert` that the flags stand for.

  inputs: the flags that say what is read. InputError for a bucket where several machines need a
  folder that all see.
  """
  part = _part(flags.part)
  if sum([part is not None, flags.merge, bool(flags.runner)]) > 1:
    raise InputError('--part: got it beside --merge or --runner; expected one of them')
  for name in (*inputs, 'output'):
    shared = bool(flags.runner) or name == 'output' and (part is not None or flags.merge)
    if shared and buckets.is_bucket(flags[name].value):
      raise InputError(
        f'--{name}: got {flags[name].value!r} with --part, --merge or --runner; expected a folder '
        'that all machines see'
      )
  run = None
  if flags.runner:
    from tips_jax.data.ingest import on_beam  # only now: --help and bad flags answer at once

    run = functools.partial(on_beam.do, runner=flags.runner, options=flags.beam)
  return {
    'part': part,
    'merge_only': flags.merge,
    'run': run,
    'task_bytes': round(flags.task_mib * 2**20),
  }


def write_store(flags: cli.Flags, make: Callable[..., dict[str, typing.Any] | None]) -> None:
  """Makes the store --output by make(folder), which returns its report, or None after a part; says
  what came of it.
  """
  # Only now: --help and bad flags answer at once.
  from tips_jax.data import store
  from tips_jax.data.ingest import report

  # Before the input is read, which may take hours.
  files.require_writable(flags.output, '--output')
  with buckets.output(flags.output, '--output', last=store.INFO_FILE) as output:
    store.refuse_existing(output)
    result = make(output)
  if result is None:
    print(f'part {flags.part} is done; when all are, the same command with --merge makes the store')
    return
  print(report.summary(result))
  print(f'store written: {flags.output}')


def _part(text):
  """(17, 1000) of '17/1000'; None of ''."""
  if not text:
    return None
  numbers = re.fullmatch(r'(\d{1,9})/(\d{1,9})', text)
  if not numbers or not int(numbers[1]) < int(numbers[2]):
    raise InputError(f'--part: got {text!r}; expected I/N with I from 0 to N - 1, as 0/8 or 7/8')
  return int(numbers[1]), int(numbers[2])

"""python -m tips_jax.plan --config=FILE[:arg] --topology=v5p:8x8x8|gpu:h100x8
[--config.a.b=value] [--batch=16384] [--json]

Compiles the training step for devices that need not be there, and says whether it fits, how long it
takes and what it costs. Exit codes: 0 it fits; 1 it does not fit; 2 there is no plan: bad input or
a compiled program that was not understood, in one line, or a fault of the program; 130 or 143
stopped by Ctrl-C or SIGTERM.
"""

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Sequence

from tips_jax.core import cli, files
from tips_jax.core.errors import InputError

FLAGS = cli.Flags()
FLAGS.add_config_file()
FLAGS.add_string(
  'topology',
  None,
  'v5e:4x4, v5p:8x8x8 and so on: ahead of time, with libtpu; gpu:h100x8 and so on: ahead of time, '
  "with XLA's compiler for GPUs; gpu or cpu: the attached devices; auto: search, for --chips of "
  '--chip.',
)
FLAGS.add_integer('batch', 0, 'Global batch size in place of schedule.batch_size.', 0)
FLAGS.add_integer('chips', 0, 'How many: with --topology=auto, or of the attached devices.', 0)
FLAGS.add_string('chip', None, 'v5p, h100 and so on, with --topology=auto.')
FLAGS.add_integer(
  'slices', 1, 'Slices or nodes of that topology, joined by the slower network.', 1, 1024
)
FLAGS.add_number('price_per_chip_hour', 0.0, 'For the cost of the whole schedule.', 0.0)
FLAGS.add_boolean('json', False, 'Print one JSON object instead of the page.')
FLAGS.add_integer('top', 0, 'Also the longest single instructions, this many.', 0)
FLAGS.add_string('dump', '', 'Folder that keeps the compiled HLO.')
FLAGS.add_boolean(
  'suggest', False, 'Where it does not fit, compile what may: a few more compilations.'
)
FLAGS.add_integer('tries', 6, 'How many plans --topology=auto compiles.', 1)
FLAGS.add_strings(
  'compiler_options', [], 'Added to compute.options: options of XLA, as NAME=VALUE,NAME=VALUE.'
)


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` (program name first) and returns the exit code."""
  try:
    return cli.run(_plan, argv, FLAGS, about=__doc__, stopped='nothing was planned')
  except Exception:  # Python's own code for it is 1: 'it does not fit'
    traceback.print_exc()
    return 2


def _plan(argv):
  cli.parse(FLAGS, argv)
  config = cli.load_config(FLAGS)
  if not FLAGS.topology:
    raise InputError(
      '--topology: missing; expected v5e:4x4, v5p:8x8x8, gpu:h100x8, auto, gpu or cpu'
    )
  if FLAGS.dump:
    files.require_writable(FLAGS.dump, '--dump')
  for text in FLAGS.compiler_options:
    if '=' not in text:
      raise InputError(f'--compiler_options: got {text!r}; expected NAME=VALUE')
  if FLAGS.compiler_options:
    options = (*config.compute.options, *FLAGS.compiler_options)
    compute = dataclasses.replace(config.compute, options=options)
    config = dataclasses.replace(config, compute=compute)
  if FLAGS.batch:
    schedule = dataclasses.replace(config.schedule, batch_size=FLAGS.batch)
    config = dataclasses.replace(config, schedule=schedule)
  # Ahead of time, or for the CPU: devices that are attached here are left alone.
  if FLAGS.topology != 'gpu':
    os.environ['JAX_PLATFORMS'] = 'cpu'
  # Only now: --help and bad flags answer at once.
  from tips_jax.planning import compiler, report, search
  from tips_jax.train import method as method_lib

  compiler.prepare()  # before anything loads libtpu
  method = method_lib.build(config)
  common = dict(
    chips=FLAGS.chips,
    slices=FLAGS.slices,
    dump=FLAGS.dump,
    price=FLAGS.price_per_chip_hour,
  )
  if FLAGS.topology == 'auto':
    # The arguments become the command that trains with the fastest plan.
    result = search.auto(method, chip=FLAGS.chip, tries=FLAGS.tries, command=argv[1:], **common)
  else:
    result = search.one(method, topology=FLAGS.topology, suggest=FLAGS.suggest, **common)
  if FLAGS.json:
    # A step has thousands of instructions.
    result['instructions'] = result.get('instructions', [])[: FLAGS.top]
    print(json.dumps(result, indent=1))
  else:
    print(report.text(result, top=FLAGS.top))
    if 'ranking' in result:
      print(report.ranking(result['ranking'], result['command']))
  return 0 if result['memory']['fits'] else 1


if __name__ == '__main__':
  sys.exit(main(sys.argv))

"""python -m tips_jax.plan --config=FILE[:arg] --topology=v5p:8x8x8 [--config.a.b=value]
[--batch=16384] [--json]

Compiles the training step for devices that need not be there, and says whether it fits, how long it
takes and what it
costs. Exit codes: 0 it fits; 1 it does not fit; 2 bad input, in one line.
"""

import json
import os
import pathlib
import sys

from absl import app, flags, logging

from tips_jax import main as training
from tips_jax.core.errors import InputError

_TOPOLOGY = flags.DEFINE_string(
  'topology',
  None,
  'v5e:4x4, v5p:8x8x8 and so on: ahead of time, with libtpu; gpu or '
  'cpu: the attached devices; auto: search, for --chips of --chip.',
)
_BATCH = flags.DEFINE_integer('batch', 0, 'Global batch size in place of schedule.batch_size.', 0)
_CHIPS = flags.DEFINE_integer(
  'chips', 0, 'How many: with --topology=auto, or of the attached devices.', 0
)
_CHIP = flags.DEFINE_string('chip', None, 'v4, v5e, v5p or v6e, with --topology=auto.')
_SLICES = flags.DEFINE_integer(
  'slices', 1, 'TPU slices of that topology, joined by the slower network.', 1
)
_PRICE = flags.DEFINE_float('price_per_chip_hour', 0.0, 'For the cost of the whole schedule.', 0.0)
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object instead of the page.')
_TOP = flags.DEFINE_integer('top', 0, 'Also the longest single instructions, this many.', 0)
_DUMP = flags.DEFINE_string('dump', '', 'Folder that keeps the compiled HLO.')
_SUGGEST = flags.DEFINE_bool(
  'suggest', False, 'Where it does not fit, compile what may: a few more compilations.'
)
_TRIES = flags.DEFINE_integer('tries', 6, 'How many plans --topology=auto compiles.', 1)
_OPTIONS = flags.DEFINE_list(
  'compiler_options', [], 'Options of XLA for this compilation, as NAME=VALUE,NAME=VALUE.'
)


def main(_):
  import dataclasses

  config = training.load_config()
  if not _TOPOLOGY.value:
    raise InputError('--topology: missing; expected v5e:4x4, v5p:8x8x8, auto, gpu or cpu')
  if _BATCH.value:
    schedule = dataclasses.replace(config.schedule, batch_size=_BATCH.value)
    config = dataclasses.replace(config, schedule=schedule)
  if _TOPOLOGY.value != 'gpu':
    os.environ['JAX_PLATFORMS'] = 'cpu'
  from tips_jax.planning import compiler, report, search
  from tips_jax.train import method as method_lib

  compiler.prepare()
  method = method_lib.build(config)
  options = dict(o.split('=', 1) for o in _OPTIONS.value if '=' in o)
  common = dict(slices=_SLICES.value, dump=_DUMP.value, price=_PRICE.value, options=options)
  if _TOPOLOGY.value == 'auto':
    result = search.auto(
      method,
      chip=_CHIP.value,
      chips=_CHIPS.value,
      tries=_TRIES.value,
      command=sys.argv[1:],
      **common,
    )
  else:
    result = search.one(
      method, topology=_TOPOLOGY.value, chips=_CHIPS.value, suggest=_SUGGEST.value, **common
    )
  if _JSON.value:
    result['instructions'] = result.get('instructions', [])[: _TOP.value]
    print(json.dumps(result, indent=1))
  else:
    print(report.text(result, top=_TOP.value) if result['memory'] else '')
    if 'ranking' in result:
      print(report.ranking(result['ranking'], result['command']))
  return 0 if result['memory'] and result['memory']['fits'] else 1


def run():
  """Entry point: one line and a code for whatever a user can mend."""
  logging.set_verbosity(logging.WARNING)
  for arg in sys.argv:  # a config file may import its neighbors
    if arg.startswith('--config='):
      path = pathlib.Path(arg.split('=', 1)[1].split(':')[0]).absolute()
      sys.path[:0] = map(str, path.parents[1:3])  # of configs/x.py and of configs/methods/x.py
  try:
    app.run(main, flags_parser=parse)
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def parse(argv):
  """main's parser; its own help."""
  if {'--help', '-help', '-h'} & set(argv):
    print(
      f'{__doc__}{flags.FLAGS.main_module_help()}\n\nFields of the config: tips_jax/core/schema.py.'
    )
    sys.exit()
  return training.parse(argv)


if __name__ == '__main__':
  run()

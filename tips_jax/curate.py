"""Curates a store: keeps of it what the steps of a config leave, and shows what went and why.

  python -m tips_jax.curate --store=IN --output=OUT --config=configs/curation/web.py

Steps are image size, text length, junk and repeated texts, language, image-text similarity, exact
and near duplicates, images of evaluation sets, retrieval toward curated images, balance over
clusters, and judges of one's own: tips_jax/curation/schema.py has their fields. Records that stay
are copied byte for byte. OUT/curation.html shows the funnel with pictures, OUT/dropped.jsonl lists
all that went. --config.steps[0].least=64 changes a field of the first step. Exit codes: 0 done, 2
bad input, 75 a process died, 130 or 143 stopped by Ctrl-C or SIGTERM.

Work is cut into tasks; however it was stopped, the same command goes on, and the store is the same
bit for bit, whoever did them: --workers processes, jobs of a scheduler (--part=0/8 to --part=7/8
measure the records, then --merge does the rest), or Apache Beam.
"""

import sys
from collections.abc import Sequence

from tips_jax.core import buckets, cli, files, processes
from tips_jax.core.errors import InputError
from tips_jax.data.ingest import where

FLAGS = cli.Flags()
FLAGS.add_config_file()
FLAGS.add_path('store', '', 'Store that is curated.')
FLAGS.add_path('output', '', 'Folder of the new store; must not exist.')
FLAGS.add_integer('workers', 0, 'Processes; 0: one for each core, or one where images are encoded.')
where.add_flags(FLAGS)


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` (program name first) and returns the exit code."""
  return cli.run(
    _curate,
    argv,
    FLAGS,
    about=__doc__,
    stopped='run the same command again to go on from the last task that was done',
  )


def _curate(argv):
  cli.parse(FLAGS, argv)
  for name in ('store', 'output', 'config'):
    if not FLAGS[name].value:
      raise InputError(
        f'--{name}: missing; expected python -m tips_jax.curate --store=IN --output=OUT '
        f'--config=configs/curation/web.py'
      )
  how = where.chosen(FLAGS, ('store',))
  # Only now: --help and bad flags answer at once.
  from tips_jax.curation import curating, report, schema
  from tips_jax.data import store

  curation = cli.load_config(FLAGS, schema.Curation, 'configs/curation/web.py')
  files.require_writable(FLAGS.output, '--output')
  with buckets.output(FLAGS.output, '--output', last=store.INFO_FILE) as output:
    store.refuse_existing(output)
    opened = curating.open_input(FLAGS.store, curation)
    workers = FLAGS.workers or _workers(curation)
    content = curating.curate(opened, curation, output, curating.How(workers=workers, **how))
  if content is None:
    print(f'part {FLAGS.part} is done; when all are, the same command with --merge makes the store')
    return
  print(report.summary(content))
  print(f'store written: {FLAGS.output} (see {report.PAGE} in it)')


def _workers(curation):
  """An encoder has the device, or all cores, for itself."""
  if any(getattr(step, 'encoder', '') for step in curation.steps):
    return 1
  return processes.cores()


if __name__ == '__main__':
  sys.exit(main(sys.argv))

"""Evaluates any checkpoint, frozen, on the nine tasks of TIPS, and on those of regions and tags: a
table, results.json and a page with pictures.

  python -m tips_jax.evaluate --checkpoint=PATH --suite=quick
  python -m tips_jax.evaluate --checkpoint=PATH --suite=tips --data=DIR
  python -m tips_jax.evaluate --checkpoint=PATH --task=segmentation --store=STORE
  python -m tips_jax.evaluate --check --suite=voc,uned --data=DIR
  python -m tips_jax.evaluate --compare=OUTPUT,OUTPUT

PATH is a work folder (WORKDIR or WORKDIR@step), a Hugging Face folder, an export, or official npz
files. A suite is 'quick' (drawn scenes, minutes on a CPU), 'tips' (the twenty data sets), or data
sets by name; docs/datasets.md says where they come from. Features are kept in --cache: a stopped
run goes on where it was. Exit codes: 0 done, 2 bad input, 130 or 143 stopped.
"""

import contextlib
import os
import pathlib
import sys

from tips_jax.core import buckets, cli, files
from tips_jax.core.errors import InputError

FLAGS = cli.Flags()
FLAGS.add_model()
FLAGS.add_string(
  'suite', '', "'quick', 'tips', 'uned', 'packs', or names of data sets, with commas."
)
FLAGS.add_string('data', '', 'Folder of the data sets.')
FLAGS.add_string(
  'task',
  '',
  'Only these tasks, with commas: segmentation, depth, dpt_depth, dpt_normals, knn, '
  'linear, instance_retrieval, retrieval, zeroshot, zeroshot_segmentation, '
  'region_classification, region_retrieval, tagging.',
)
FLAGS.add_path(
  'store', '', 'Your own data instead of a suite: a store, a TFDS folder or a TFDS name.'
)
FLAGS.add_path(
  'output', '', 'Folder for the results; evaluation/NAME beside the checkpoint if not given.'
)
FLAGS.add_string(
  'cache', '', 'Folder for features; evaluation/cache beside the checkpoint if not given.'
)
FLAGS.add_path(
  'compare',
  '',
  'Folders of other finished evaluations, with commas: further columns. Without a '
  'checkpoint: only their table.',
)
FLAGS.add_boolean('check', False, 'Only looks whether the data are whole; computes nothing.')
FLAGS.add_boolean(
  'random', None, 'Also evaluates the same towers with random weights. Default: with --suite=quick.'
)
FLAGS.add_enum(
  'recipe',
  'protocol',
  ['protocol', 'short'],
  'How probes and decoders are trained; short: in '
  'minutes on a CPU, with no published figures beside it.',
)
FLAGS.add_integer('size', 0, "Pixels of the images' short side; 0: as the protocol says.", 0)
FLAGS.add_integer('limit', 0, 'Images of each split, evenly spaced; 0: all.', 0)
FLAGS.add_integer('batch_size', 64, 'Images that the encoder gets at once.', 1)
FLAGS.add_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of activations.')

_RANDOM = 'random_weights'  # folder of their results, inside the output


def main(argv: list[str]) -> int:
  """Runs the command line `argv` (program name first) and returns the exit code."""
  return cli.run(
    _evaluate,
    argv,
    FLAGS,
    about=__doc__,
    stopped='run the same command again to go on from the cache',
  )


def _evaluate(argv):
  _flags(argv)
  # Only now: --help and bad flags answer at once.
  from tips_jax.evals.datasets import evaluations, on_disk
  from tips_jax.evals.report import results

  if FLAGS.compare and not FLAGS.checkpoint:
    print(results.compare(_compared()))
    return 0
  others = [results.read(path) for path in _compared()]
  names = evaluations.dataset_names(FLAGS.suite) if FLAGS.suite else ()
  only = evaluations.task_names(FLAGS.task)
  public = evaluations.benchmark_tasks(names, only)
  if public:
    on_disk.require_folder('--data', FLAGS.data, public)
  if FLAGS.check:
    return _check(public, only)
  # Before the checkpoint is loaded, which takes longer.
  on_disk.require(_reports(public))

  import tips_jax

  # Exact: cached features must not depend on which images shared a batch.
  encoder = tips_jax.load(
    FLAGS.checkpoint,
    weights=FLAGS.weights,
    tokenizer=FLAGS.tokenizer or None,
    dtype=FLAGS.dtype,
    exact=True,
  )
  output, cache = _folders()
  files.require_writable(output, '--output')
  jobs = _jobs(names, public, only, encoder, cache)
  with buckets.updated(output, '--output', last=results.FILE) as folder:
    _refuse_another(folder, encoder, jobs)
    # Drawn scenes have no published numbers: random weights show what training has added.
    random = evaluations.QUICK in names if FLAGS.random is None else FLAGS.random
    if random:
      _run(_random(encoder), jobs, folder / _RANDOM, cache, name='random weights')
      others.insert(0, folder / _RANDOM)
    name = pathlib.Path(FLAGS.checkpoint).name or encoder.name
    table = _run(encoder, jobs, folder, cache, others=others, name=name)
  print(table)
  print(f'written: {buckets.join(output, "index.html")}')
  return 0


def _jobs(names, public, only, encoder, cache):
  """The evaluations that the flags ask for."""
  from tips_jax.core.log import Progress
  from tips_jax.evals.datasets import evaluations

  jobs = []
  for name in public:
    jobs += evaluations.of_benchmark(name, FLAGS.data, only=only, size=FLAGS.size)
  if FLAGS.store:
    # A store has no protocol that says a size.
    size = FLAGS.size or encoder.size
    jobs += evaluations.of_store(FLAGS.store, only=only, size=size, texts=encoder.has_text)
  if FLAGS.recipe == 'short':
    jobs = list(map(evaluations.short, jobs))
  if evaluations.QUICK in names:
    with contextlib.closing(Progress(1, label='drawing scenes')) as bar:

      def progress(done, total):
        bar.total = total
        bar.update(done)

      # In the cache, since every checkpoint is measured on the same scenes.
      jobs += evaluations.of_scenes(
        cache, only=only, size=FLAGS.size, texts=encoder.has_text, progress=progress
      )
  if not jobs:
    raise InputError(
      f'--task: got {FLAGS.task!r}, which none of {", ".join(names)} has; expected one of theirs'
    )
  return jobs


def _flags(argv):
  cli.parse(FLAGS, argv)
  for name in ('output', 'cache'):
    if FLAGS[name].value:
      files.require_writable(FLAGS[name].value, f'--{name}')
  if FLAGS.compare and not FLAGS.checkpoint:
    for name in ('check', 'suite', 'store', 'task', 'output', 'random'):
      if FLAGS[name].present:
        raise InputError(
          f'--compare, --{name}: got both without --checkpoint; expected --compare=DIR,DIR alone, '
          'which prints a table, or --checkpoint=PATH to evaluate'
        )
    if len(_compared()) < 2:
      raise InputError(
        f'--compare: got {FLAGS.compare!r} alone; expected two evaluations or more, or --checkpoint'
      )
    return
  if not FLAGS.check and not FLAGS.checkpoint:
    raise InputError(
      '--checkpoint: missing; expected python -m tips_jax.evaluate --checkpoint=PATH --suite=quick'
    )
  if bool(FLAGS.suite) == bool(FLAGS.store):
    raise InputError(
      f'--suite, --store: got {"both" if FLAGS.suite else "neither"}; expected one of them: '
      '--suite=quick, --suite=tips --data=DIR, or --store=STORE'
    )


def _compared():
  parts = [part.strip() for part in FLAGS.compare.split(',') if part.strip()]
  return [buckets.local(part, '--compare') for part in parts]


def _reports(public):
  from tips_jax.evals.datasets import on_disk

  return [on_disk.check(name, FLAGS.data, tasks=tasks) for name, tasks in public.items()]


def _check(public, only):
  """Says whether the data are whole; returns the exit code."""
  from tips_jax.evals.datasets import evaluations, on_disk, records

  if FLAGS.store:
    jobs = evaluations.of_store(FLAGS.store, only=only)
    records.check_data(jobs)
    print(f'{FLAGS.store}: ready for {", ".join(job.task.name for job in jobs)}')
    return 0
  reports = _reports(public)
  if not reports:
    print('quick: the scenes are drawn; there is nothing to check')
    return 0
  print(on_disk.table(reports))
  return 0 if all(report.ok for report in reports) else 2


def _folders():
  """(output, cache): beside the checkpoint where flags do not say; of one in a bucket the output
  is in the bucket, and the cache on this machine.
  """
  from tips_jax.runs import folder as runs

  folder, step = runs.split(FLAGS.checkpoint)
  marks = [FLAGS.suite.replace(',', '+') or pathlib.Path(FLAGS.store).name]
  marks.append(FLAGS.task.replace(',', '+'))
  if not runs.is_run(FLAGS.checkpoint):
    # Several checkpoints may be in one folder.
    marks.append(pathlib.Path(folder).stem)
    folder = os.path.dirname(folder.rstrip('/')) or '.'
  marks.append(FLAGS.weights)
  if step is not None:
    marks.append(f'step{step}')
  folder = buckets.join(folder, 'evaluation')
  output = FLAGS.output or buckets.join(folder, '-'.join(filter(None, marks)))
  if FLAGS.cache:
    return output, pathlib.Path(FLAGS.cache)
  if buckets.is_bucket(folder):
    return output, buckets.mirror(folder, 'features')
  return output, pathlib.Path(folder) / 'cache'


def _refuse_another(output, encoder, jobs):
  """InputError where the output holds what this run would lose."""
  from tips_jax.evals.report import results

  if not (output / results.FILE).exists():
    # A stopped run leaves these.
    ours = {_RANDOM, 'decoders', results.PICTURES}
    if output.is_dir() and not ours.issuperset(path.name for path in output.iterdir()):
      raise InputError(
        f'--output: got {str(output)!r}, which holds other things than an evaluation; expected a '
        'new folder'
      )
    return
  before = results.read(output)
  if before['checkpoint']['sha256'] != encoder.sha256:
    raise InputError(
      f'--output: {str(output)!r} holds the evaluation of another checkpoint, '
      f'{before["checkpoint"]["name"]!r}; expected another folder, --output=DIR: nothing is '
      'overwritten'
    )
  now = {(job.dataset, job.task.name) for job in jobs}
  for entry in before['results']:
    # An average of data sets has no time of its own; it is made anew.
    if entry['seconds'] and (entry['dataset'], entry['task']) not in now:
      raise InputError(
        f'--output: {str(output)!r} holds {entry["dataset"]} {entry["task"]}, which this run does '
        'not measure; expected another folder, --output=DIR: nothing is overwritten'
      )


def _run(encoder, jobs, output, cache, *, name, others=()):
  """Runs the jobs and writes the results, after every data set while there are none yet; returns
  the table.
  """
  from tips_jax.core.log import Progress
  from tips_jax.evals import suite
  from tips_jax.evals.features import cache as cache_lib
  from tips_jax.evals.report import results

  # Results of an earlier run stay whole until these are.
  fresh = not (output / results.FILE).exists()
  finished = []
  facts = {
    'checkpoint': FLAGS.checkpoint,
    'model': encoder.name,
    'weights': FLAGS.weights or 'as the run chose',
    'data': FLAGS.store or FLAGS.suite,
    'recipe': FLAGS.recipe,
    'images of a split': FLAGS.limit or 'all',
  }

  def write():
    return results.write(
      output,
      finished,
      title=f'Evaluation of {name}',
      facts=facts,
      checkpoint=name,
      sha256=encoder.sha256,
      others=others,
    )

  def after(result):
    finished.append(result)
    metrics = ', '.join(f'{k} {v:.3f}' for k, v in list(result.metrics.items())[:2])
    say(f'{result.dataset} {result.task}: {metrics}')
    remaining = jobs[len(finished) :]
    if fresh and remaining and remaining[0].dataset != result.dataset:
      write()

  def say(line):
    print(f'{name}: {line}', file=sys.stderr)

  suite.run(
    encoder,
    jobs,
    cache=cache_lib.Cache(cache),
    output=output,
    batch_size=FLAGS.batch_size,
    limit=FLAGS.limit,
    progress=lambda label, total: Progress(total, label=label),
    after=after,
    tell=say,
  )
  return write()


def _random(encoder):
  """The same towers before any training."""
  from tips_jax.interop import weights as weights_lib
  from tips_jax.interop.encoder import Encoder

  params = weights_lib.initial(encoder.weights)
  return Encoder(
    encoder.weights.replace(params=params, name='random weights'), dtype=FLAGS.dtype, exact=True
  )


if __name__ == '__main__':
  sys.exit(main(sys.argv))

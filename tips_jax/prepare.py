"""Turns a person's own image-text data into a store that training reads.

  python -m tips_jax.prepare --input=PATH --output=STORE

PATH is a table (CSV, TSV, JSON, JSONL) beside its images or a zip of them, webdataset tars
(img2dataset's too), parquet files, a Hugging Face save_to_disk folder, a TFDS folder or a TFDS
name. Exit codes: 0 done, 2 bad input, 75 a process died, 130 or 143 stopped by Ctrl-C or SIGTERM.

The work is cut into tasks by the input alone; STORE.partial holds those that are done. However it
was stopped, the same command goes on, and the store is the same bit for bit, whoever did the tasks:
--workers processes, jobs of a scheduler (--part=0/8 to --part=7/8, then --merge), or Apache Beam.
"""

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Sequence

from tips_jax.core import buckets, cli, files
from tips_jax.core.errors import InputError

FLAGS = cli.Flags()
FLAGS.add_path('input', '', 'File, folder, glob pattern or TFDS name.')
FLAGS.add_path('output', '', 'Folder of the new store; must not exist.')
FLAGS.add_string('split', 'train', 'Name of the split that --input becomes.')
FLAGS.add_string(
  'input_split', '', 'Split to read from --input, where it has several; as --split if not given.'
)
FLAGS.add_path('test_input', '', 'A second input, which becomes the split "test".')
FLAGS.add_string(
  'test_input_split', 'test', 'Split to read from --test_input, where it has several.'
)
FLAGS.add_number('test_fraction', 0.0, 'Share of --input that becomes the split "test".', 0.0, 0.9)
FLAGS.add_path('images', '', 'Folder or zip with the images of a table; else beside it.')
FLAGS.add_path('test_images', '', 'The same for --test_input.')
FLAGS.add_string('image_column', '', 'Column with the image; guessed if not given.')
FLAGS.add_string(
  'alt_text_column', '', 'Column with the alt text; guessed if not given, "none": there is none.'
)
FLAGS.add_strings('captions_column', [], 'Column or columns with captions; as above.')
FLAGS.add_string('label_column', '', 'Column with a class, carried over as "label".')
FLAGS.add_string(
  'mask_column', '', 'Column with a mask of class ids (255: ignore), carried over as "mask".'
)
FLAGS.add_boolean(
  'first_caption_as_alt_text', False, 'Without alt text, the first caption takes its place.'
)
FLAGS.add_path(
  'tokenizer', '', '--tokenizer trains a SentencePiece model; --tokenizer=PATH copies one.'
)
FLAGS.add_integer(
  'vocab_size', 32_000, 'Pieces of the trained tokenizer; fewer where the texts give no more.', 260
)
FLAGS.add_integer('min_side', 16, 'Images with a shorter side (pixels) are left out.', 1)
FLAGS.add_integer(
  'max_pixels', 50_000_000, 'Images with more pixels are refused before they are decoded.', 1
)
FLAGS.add_integer('limit', 0, 'Samples to read from each input, in one process; 0: all.', 0)
FLAGS.add_integer('workers', 0, 'Processes; 0: one for each core.', 0)
FLAGS.add_string('part', '', 'I/N: does the tasks of part I, from 0 to N - 1, and no more.')
FLAGS.add_boolean('merge', False, 'Makes the store of what the parts have done, and does no task.')
FLAGS.add_string('runner', '', "Does the tasks through Apache Beam, by this runner's name.")
FLAGS.add_strings('beam', [], 'Options of --runner: project=P,region=R,temp_location=gs://...')
FLAGS.add_number(
  'task_mib',
  0.0,
  'MiB of the input that are a task, which is done whole or not at all; 0: a 64th of the input, '
  'between 32 and 1024. The shards of the store follow from it.',
  0.0,
)


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` (program name first) and returns the exit code."""
  return cli.run(
    _prepare,
    argv,
    FLAGS,
    about=__doc__,
    stopped='run the same command again to go on from the last task that was done',
  )


def _prepare(argv):
  # absl has no flag with an optional value.
  bare = {'--tokenizer': '--tokenizer=train', '-tokenizer': '--tokenizer=train'}
  cli.parse(FLAGS, [bare.get(argument, argument) for argument in argv])
  for name in ('input', 'output'):
    if not FLAGS[name].value:
      raise InputError(
        f'--{name}: missing; expected python -m tips_jax.prepare --input=PATH --output=STORE'
      )
  # Records of two sources would be mixed in one split.
  if FLAGS.test_input and (FLAGS.test_fraction or FLAGS.split == 'test'):
    raise InputError(
      '--test_input: got it beside --test_fraction or --split=test; expected one source of test'
    )
  part = _part(FLAGS.part)
  if sum([part is not None, FLAGS.merge, bool(FLAGS.runner)]) > 1:
    raise InputError('--part: got it beside --merge or --runner; expected one of them')
  _require_shared(part)
  # Only now: --help and bad flags answer at once.
  from tips_jax.data import store
  from tips_jax.data.ingest import report
  from tips_jax.data.ingest.columns import Columns
  from tips_jax.data.ingest.reader import Options

  columns = Columns(
    image=FLAGS.image_column,
    alt_text=FLAGS.alt_text_column,
    captions=tuple(FLAGS.captions_column),
    label=FLAGS.label_column,
    mask=FLAGS.mask_column,
  )
  options = Options(
    columns=columns,
    split=FLAGS.input_split or FLAGS.split,
    first_caption_as_alt_text=FLAGS.first_caption_as_alt_text,
  )
  # Before the input is read, which may take hours.
  files.require_writable(FLAGS.output, '--output')
  with buckets.output(FLAGS.output, '--output', last=store.INFO_FILE) as output:
    store.refuse_existing(output)
    result = _convert(output, options, part)
  if result is None:
    print(f'part {FLAGS.part} is done; when all are, the same command with --merge makes the store')
    return
  print(report.summary(result))
  print(f'store written: {FLAGS.output}')


def _convert(output, options, part):
  """Writes the store; returns the report, or None after a part."""
  from tips_jax.data.ingest import convert, on_beam
  from tips_jax.data.ingest.formats import open_inputs

  inputs = {FLAGS.split: _input('input', 'images', options)}
  if FLAGS.test_input:
    # Both inputs have the same columns, so that the splits of the store agree.
    test = dataclasses.replace(options, split=FLAGS.test_input_split)
    inputs['test'] = _input('test_input', 'test_images', test)
  reopen = functools.partial(open_inputs, inputs)
  run = None
  if FLAGS.runner:
    run = functools.partial(on_beam.do, runner=FLAGS.runner, options=FLAGS.beam)
  return convert.convert(
    reopen(),
    output,
    tokenizer_from=FLAGS.tokenizer,
    vocab_size=FLAGS.vocab_size,
    min_side=FLAGS.min_side,
    max_pixels=FLAGS.max_pixels,
    limit=FLAGS.limit,
    test_fraction=FLAGS.test_fraction,
    task_bytes=round(FLAGS.task_mib * 2**20),
    workers=FLAGS.workers or _cores(),
    reopen=reopen,
    run=run,
    part=part,
    merge_only=FLAGS.merge,
  )


def _require_shared(part):
  """InputError for a bucket where several machines need a folder that all see."""
  for name in ('input', 'test_input', 'images', 'test_images', 'output'):
    shared = bool(FLAGS.runner) or name == 'output' and (part is not None or FLAGS.merge)
    if shared and buckets.is_bucket(FLAGS[name].value):
      raise InputError(
        f'--{name}: got {FLAGS[name].value!r} with --part, --merge or --runner; expected a folder '
        'that all machines see'
      )


def _input(flag, images_flag, options):
  """(path, options) of an input, both as on this machine."""
  from tips_jax.data.ingest.formats import local_input

  images = buckets.local(FLAGS[images_flag].value, f'--{images_flag}')
  path = local_input(FLAGS[flag].value, images, f'--{flag}')
  return path, dataclasses.replace(options, images=images)


def _part(text):
  """(17, 1000) of '17/1000'; None of ''."""
  if not text:
    return None
  numbers = re.fullmatch(r'(\d{1,9})/(\d{1,9})', text)
  if not numbers or not int(numbers[1]) < int(numbers[2]):
    raise InputError(f'--part: got {text!r}; expected I/N with I from 0 to N - 1, as 0/8 or 7/8')
  return int(numbers[1]), int(numbers[2])


def _cores():
  """Those that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


if __name__ == '__main__':
  sys.exit(main(sys.argv))

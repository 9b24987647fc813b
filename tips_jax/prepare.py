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
import sys
from collections.abc import Sequence

from tips_jax.core import buckets, cli, processes
from tips_jax.core.errors import InputError
from tips_jax.data.ingest import where

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
FLAGS.add_string(
  'regions_column', '', 'Column with boxes, or with objects that have a box and texts of their own.'
)
FLAGS.add_string('region_captions_column', '', 'Column with captions, one or a list for each box.')
FLAGS.add_string('region_tags_column', '', 'Column with tags, one or a list for each box.')
FLAGS.add_string('tags_column', '', 'Column with tags of the image.')
FLAGS.add_string('box_format', 'xywh', 'What the numbers of a box are: xywh, xyxy or yxyx.')
FLAGS.add_string('box_unit', 'pixels', 'In which they are: pixels, or shares of the image.')
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
where.add_flags(FLAGS)


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
  how = where.chosen(FLAGS, ('input', 'test_input', 'images', 'test_images'))
  # Only now: --help and bad flags answer at once.
  from tips_jax.data.ingest import regions
  from tips_jax.data.ingest.columns import Columns
  from tips_jax.data.ingest.reader import Options

  regions.check(FLAGS.box_format, FLAGS.box_unit)
  columns = Columns(
    image=FLAGS.image_column,
    alt_text=FLAGS.alt_text_column,
    captions=tuple(FLAGS.captions_column),
    label=FLAGS.label_column,
    mask=FLAGS.mask_column,
    regions=FLAGS.regions_column,
    region_captions=FLAGS.region_captions_column,
    region_tags=FLAGS.region_tags_column,
    tags=FLAGS.tags_column,
  )
  options = Options(
    columns=columns,
    split=FLAGS.input_split or FLAGS.split,
    first_caption_as_alt_text=FLAGS.first_caption_as_alt_text,
    box_format=FLAGS.box_format,
    box_unit=FLAGS.box_unit,
  )
  where.write_store(FLAGS, functools.partial(_convert, options=options, how=how))


def _convert(output, options, how):
  """Writes the store; returns the report, or None after a part."""
  from tips_jax.data.ingest import convert
  from tips_jax.data.ingest.formats import open_inputs

  inputs = {FLAGS.split: _input('input', 'images', options)}
  if FLAGS.test_input:
    # Both inputs have the same columns, so that the splits of the store agree.
    test = dataclasses.replace(options, split=FLAGS.test_input_split)
    inputs['test'] = _input('test_input', 'test_images', test)
  reopen = functools.partial(open_inputs, inputs)
  return convert.convert(
    reopen(),
    output,
    tokenizer_from=FLAGS.tokenizer,
    vocab_size=FLAGS.vocab_size,
    min_side=FLAGS.min_side,
    max_pixels=FLAGS.max_pixels,
    limit=FLAGS.limit,
    test_fraction=FLAGS.test_fraction,
    workers=FLAGS.workers or processes.cores(),
    reopen=reopen,
    **how,
  )


def _input(flag, images_flag, options):
  """(path, options) of an input, both as on this machine."""
  from tips_jax.data.ingest.formats import local_input

  images = buckets.local(FLAGS[images_flag].value, f'--{images_flag}')
  path = local_input(FLAGS[flag].value, images, f'--{flag}')
  return path, dataclasses.replace(options, images=images)


if __name__ == '__main__':
  sys.exit(main(sys.argv))

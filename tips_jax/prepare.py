"""Turns a person's own image-text data into a store that training reads.

  python -m tips_jax.prepare --input=PATH --output=STORE

PATH is a table (CSV, TSV, JSON, JSONL) beside its images or a zip of them, webdataset tars
(img2dataset's too), parquet files, a Hugging Face save_to_disk folder, a TFDS folder or a TFDS
name. Exit codes: 0 done, 2 bad input, 130 or 143 stopped by Ctrl-C or SIGTERM. A stopped run leaves
nothing behind; the same command starts anew.
"""

import dataclasses
import sys
from collections.abc import Sequence

from tips_jax.core import cli, files
from tips_jax.core.errors import InputError

FLAGS = cli.Flags()
FLAGS.add_string('input', '', 'File, folder, glob pattern or TFDS name.')
FLAGS.add_string('output', '', 'Folder of the new store; must not exist.')
FLAGS.add_string('split', 'train', 'Name of the split that --input becomes.')
FLAGS.add_string(
  'input_split', '', 'Split to read from --input, where it has several; as --split if not given.'
)
FLAGS.add_string('test_input', '', 'A second input, which becomes the split "test".')
FLAGS.add_string(
  'test_input_split', 'test', 'Split to read from --test_input, where it has several.'
)
FLAGS.add_number('test_fraction', 0.0, 'Share of --input that becomes the split "test".', 0.0, 0.9)
FLAGS.add_string('images', '', 'Folder or zip with the images of a table; else beside it.')
FLAGS.add_string('test_images', '', 'The same for --test_input.')
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
FLAGS.add_string(
  'tokenizer', '', '--tokenizer trains a SentencePiece model; --tokenizer=PATH copies one.'
)
FLAGS.add_integer(
  'vocab_size', 32_000, 'Pieces of the trained tokenizer; fewer where the texts give no more.', 260
)
FLAGS.add_integer('min_side', 16, 'Images with a shorter side (pixels) are left out.', 1)
FLAGS.add_integer(
  'max_pixels', 50_000_000, 'Images with more pixels are refused before they are decoded.', 1
)
FLAGS.add_integer('limit', 0, 'Samples to read from each input; 0: all.', 0)


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` (program name first) and returns the exit code."""
  return cli.run(
    _prepare,
    argv,
    FLAGS,
    about=__doc__,
    stopped='nothing was written; run the same command again to start anew',
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
  # Only now: --help and bad flags answer at once.
  from tips_jax.data import store
  from tips_jax.data.ingest import convert
  from tips_jax.data.ingest.columns import Columns
  from tips_jax.data.ingest.formats import open_input
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
    images=FLAGS.images,
    first_caption_as_alt_text=FLAGS.first_caption_as_alt_text,
  )
  # Before the input is read, which may take hours.
  files.require_writable(FLAGS.output, '--output')
  store.refuse_existing(FLAGS.output)
  readers = {FLAGS.split: open_input(FLAGS.input, options)}
  if FLAGS.test_input:
    # Both inputs have the same columns, so that the splits of the store agree.
    test = dataclasses.replace(options, split=FLAGS.test_input_split, images=FLAGS.test_images)
    readers['test'] = open_input(FLAGS.test_input, test)
  report = convert.convert(
    readers,
    FLAGS.output,
    tokenizer_from=FLAGS.tokenizer,
    vocab_size=FLAGS.vocab_size,
    min_side=FLAGS.min_side,
    max_pixels=FLAGS.max_pixels,
    limit=FLAGS.limit,
    test_fraction=FLAGS.test_fraction,
  )
  print(convert.summary(report))
  print(f'store written: {FLAGS.output}')


if __name__ == '__main__':
  sys.exit(main(sys.argv))

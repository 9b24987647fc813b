"""Gives the images of a store synthetic captions, as TIPS has one beside each alt text.

  python -m tips_jax.caption --store=IN --output=OUT --captioner=CAPTIONER --prompt='caption en'

CAPTIONER is hf:NAME_OR_FOLDER (a model of transformers), openai:URL#MODEL (a server: vLLM, SGLang
or any other that speaks OpenAI's protocol; its key is $OPENAI_API_KEY) or table:FILE (captions that
somebody has, by image id). Exit codes: 0 done, 2 bad input, 75 the server gave no answer, 130 or
143 stopped by Ctrl-C or SIGTERM.

OUT.partial holds every answer as soon as it is there: the same command goes on, and asks for no
image twice. Empty, repeated and endless captions are dropped and counted.
"""

import datetime
import functools
import sys
from collections.abc import Sequence

from tips_jax.core import cli
from tips_jax.core.errors import InputError
from tips_jax.data.ingest import where

FLAGS = cli.Flags()
FLAGS.add_path('store', '', 'Store whose images get captions.')
FLAGS.add_path('output', '', 'Folder of the new store; must not exist.')
FLAGS.add_string('captioner', '', 'hf:NAME_OR_FOLDER, openai:URL#MODEL or table:FILE.')
FLAGS.add_texts(
  'prompt',
  [],
  'What is asked; {alt_text} stands for that of the image. May be given several times.',
)
FLAGS.add_integer('captions', 1, 'Captions of an image for each prompt.', 1, 100)
FLAGS.add_number('temperature', 0.0, 'Of sampling; 0: the likeliest words.', 0.0, 10.0)
FLAGS.add_number('top_p', 1.0, 'Share of the likeliest words from which is sampled.', 0.0, 1.0)
FLAGS.add_integer('max_tokens', 64, 'Of a caption; a longer one is dropped.', 1)
FLAGS.add_integer('seed', 0, 'Of sampling.', 0)
FLAGS.add_boolean('replace', False, 'Leaves out the captions that the store has.')
FLAGS.add_strings('splits', [], 'Splits to caption and to keep; all if not given.')
FLAGS.add_integer('limit', 0, 'Images of each split; 0: all.', 0)
FLAGS.add_path('tokenizer', '', '"train" on the new texts, or a model to copy; else the old one.')
FLAGS.add_integer('vocab_size', 32_000, 'Pieces of a tokenizer that is trained.', 260)
FLAGS.add_integer('batch_size', 16, 'Images that a model of transformers sees at once.', 1)
FLAGS.add_integer('requests', 32, 'Requests that a server gets at the same time.', 1)
FLAGS.add_integer('tries', 8, 'How often a request is sent until the run stops.', 1)
FLAGS.add_number('timeout_s', 120.0, 'How long a server may be silent.', 0.1)
where.add_flags(FLAGS)


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` (program name first) and returns the exit code."""
  return cli.run(
    _caption,
    argv,
    FLAGS,
    about=__doc__,
    stopped='run the same command again to go on from the last answer',
  )


def _caption(argv):
  cli.parse(FLAGS, argv)
  for name in ('store', 'output', 'captioner'):
    if not FLAGS[name].value:
      raise InputError(
        f'--{name}: missing; expected python -m tips_jax.caption --store=IN --output=OUT '
        f'--captioner=hf:NAME'
      )
  if FLAGS.captions > 1 and not FLAGS.temperature:
    raise InputError(
      f'--captions: got {FLAGS.captions} at --temperature=0, which are all the same; expected a '
      f'temperature, or several of --prompt'
    )
  how = where.chosen(FLAGS, ('store',))
  where.write_store(FLAGS, functools.partial(_convert, how=how))


def _convert(output, how):
  """Writes the store; returns the report, or None after a part."""
  from tips_jax.data import store
  from tips_jax.data.ingest import asking, captioners, captioning, convert

  opened = asking.open_store(FLAGS.store, FLAGS.splits)
  ask = captioners.Ask(
    captioner=FLAGS.captioner,
    prompts=tuple(FLAGS.prompt) or ('',),
    captions=FLAGS.captions,
    temperature=FLAGS.temperature,
    top_p=FLAGS.top_p,
    max_tokens=FLAGS.max_tokens,
    seed=FLAGS.seed,
  )
  open_captioner = functools.partial(
    captioning.open_captioner,
    ask,
    batch=FLAGS.batch_size,
    threads=FLAGS.requests,
    tries=FLAGS.tries,
    timeout_s=FLAGS.timeout_s,
  )
  opened_here = functools.cache(open_captioner)
  if not FLAGS.merge:
    opened_here()  # what is wrong with it is said before anything is written
  readers = functools.partial(
    asking.open_readers,
    captioning.CaptioningReader,
    opened.path,
    FLAGS.splits or list(opened.splits),
    folder=store.work_path(output),
    ask=ask,
    replace=FLAGS.replace,
    limit=FLAGS.limit,
  )
  today = datetime.datetime.now(datetime.UTC).date().isoformat()
  return convert.convert(
    readers(opened_here),
    output,
    tokenizer_from=FLAGS.tokenizer or opened.tokenizer_path or '',
    vocab_size=FLAGS.vocab_size,
    # The store has been checked.
    min_side=1,
    max_pixels=sys.maxsize,
    limit=FLAGS.limit,
    reopen=functools.partial(readers, open_captioner),
    about=asking.provenance(opened, 'caption', 'captions', {**vars(ask), 'date': today}),
    **how,
  )


if __name__ == '__main__':
  sys.exit(main(sys.argv))

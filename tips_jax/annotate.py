"""Gives the images of a store boxes, texts of regions and tags, as UMG-CLIP learns from.

  python -m tips_jax.annotate --store=IN --output=OUT --detector=DETECTOR --captioner=hf:CAPTIONER

Four annotators, all of them models of transformers by name or from a folder, and each may be left
out: detectors of objects (boxes, and their classes as region_tags), a segmenter (SAM; boxes whose
mask changes when they move a little are dropped), a captioner of what is in the boxes
(region_captions; as --captioner of tips_jax.caption) and a tagger (tags). Exit codes: 0 done, 2 bad
input, 75 the captioner's server gave no answer, 130 or 143 stopped by Ctrl-C or SIGTERM.

OUT.partial holds what was said of each image: the same command goes on, and asks about no image
twice. What is dropped is counted in OUT/report.json.
"""

import datetime
import functools
import sys
from collections.abc import Sequence

from tips_jax.core import cli
from tips_jax.core.errors import InputError
from tips_jax.data.ingest import where

FLAGS = cli.Flags()
FLAGS.add_path('store', '', 'Store whose images get annotations.')
FLAGS.add_path('output', '', 'Folder of the new store; must not exist.')
FLAGS.add_texts('detector', [], 'A model that finds objects; may be given several times.')
FLAGS.add_strings('classes', [], 'What zero-shot detectors look for; or a file with a name a line.')
FLAGS.add_number('confidence', 0.3, 'Least of a box.', 0.0, 1.0)
FLAGS.add_number('overlap', 0.7, 'Of a box with a surer one, at most: shared area / all.', 0.0, 1.0)
FLAGS.add_integer('least_side', 16, 'Pixels of the shorter side of a box.', 1)
FLAGS.add_integer('most_boxes', 32, 'Of an image; the surest.', 1)
FLAGS.add_string('segmenter', '', 'A SAM, which tells whether boxes are stable.')
FLAGS.add_number(
  'shift', 0.1, 'How far a box is moved for that, as a share of its sides.', 0.0, 1.0
)
FLAGS.add_number('stability', 0.7, 'Least mean overlap of the masks of the moved boxes.', 0.0, 1.0)
FLAGS.add_string('captioner', '', 'Of what is in the boxes: hf:NAME_OR_FOLDER or openai:URL#MODEL.')
FLAGS.add_texts('prompt', [], 'What it is asked; may be given several times.')
FLAGS.add_integer('max_tokens', 32, 'Of a caption; a longer one is dropped.', 1)
FLAGS.add_string('tagger', '', 'A model that classifies images; a dual encoder needs --tags.')
FLAGS.add_strings('tags', [], 'Tags that a dual encoder chooses from; or a file with one a line.')
FLAGS.add_number('tag_confidence', 0.2, 'Least of a tag.', 0.0, 1.0)
FLAGS.add_integer('most_tags', 8, 'Of an image; the surest.', 1)
FLAGS.add_boolean('replace', False, 'Leaves out what the store has of what is made.')
FLAGS.add_strings('splits', [], 'Splits to annotate and to keep; all if not given.')
FLAGS.add_integer('limit', 0, 'Images of each split; 0: all.', 0)
FLAGS.add_integer('batch_size', 8, 'Images that a tagger or a captioner sees at once.', 1)
FLAGS.add_integer('requests', 32, 'Requests that a server gets at the same time.', 1)
FLAGS.add_integer('tries', 8, 'How often a request is sent until the run stops.', 1)
FLAGS.add_number('timeout_s', 120.0, 'How long a server may be silent.', 0.1)
where.add_flags(FLAGS)


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` (program name first) and returns the exit code."""
  return cli.run(
    _annotate,
    argv,
    FLAGS,
    about=__doc__,
    stopped='run the same command again to go on from the last image',
  )


def _annotate(argv):
  cli.parse(FLAGS, argv)
  for name in ('store', 'output'):
    if not FLAGS[name].value:
      raise InputError(
        f'--{name}: missing; expected python -m tips_jax.annotate --store=IN --output=OUT '
        f'--detector=NAME'
      )
  if not (FLAGS.detector or FLAGS.segmenter or FLAGS.captioner or FLAGS.tagger):
    raise InputError(
      '--detector: missing, and so are --segmenter, --captioner and --tagger; expected one at least'
    )
  if FLAGS.captioner.startswith('table:'):
    raise InputError(
      f'--captioner: got {FLAGS.captioner!r}; expected hf:NAME_OR_FOLDER or openai:URL#MODEL; '
      f'boxes with texts that somebody has are read by tips_jax.prepare'
    )
  how = where.chosen(FLAGS, ('store',))
  where.write_store(FLAGS, functools.partial(_convert, how=how))


def _convert(output, how):
  """Writes the store; returns the report, or None after a part."""
  from tips_jax.data import store
  from tips_jax.data.ingest import annotating, asking, convert

  opened = asking.open_store(FLAGS.store, FLAGS.splits)
  ask, captions = _asks()
  annotations = annotating.annotations_of(opened, ask, captions, replace=FLAGS.replace)
  open_asked = functools.partial(
    annotating.open_annotators,
    ask,
    captions,
    batch=FLAGS.batch_size,
    threads=FLAGS.requests,
    tries=FLAGS.tries,
    timeout_s=FLAGS.timeout_s,
  )
  opened_here = functools.cache(open_asked)
  if not FLAGS.merge:
    opened_here()  # what is wrong with it is said before anything is written
  readers = functools.partial(
    asking.open_readers,
    annotating.AnnotatingReader,
    opened.path,
    FLAGS.splits or list(opened.splits),
    folder=store.work_path(output),
    ask=ask,
    captions=captions,
    annotations=annotations,
    replace=FLAGS.replace,
    limit=FLAGS.limit,
  )
  today = datetime.datetime.now(datetime.UTC).date().isoformat()
  now = {**vars(ask), 'captions': captions and vars(captions), 'date': today}
  return convert.convert(
    readers(opened_here),
    output,
    tokenizer_from=opened.tokenizer_path or '',
    # The store has been checked.
    min_side=1,
    max_pixels=sys.maxsize,
    limit=FLAGS.limit,
    reopen=functools.partial(readers, open_asked),
    about=asking.provenance(opened, 'annotate', 'annotations', now),
    **how,
  )


def _asks():
  """(what the annotators are asked, what the captioner of regions is asked or None)."""
  from tips_jax.data.ingest import annotating, annotators, captioners

  ask = annotators.Ask(
    detectors=tuple(FLAGS.detector),
    classes=annotating.read_names(FLAGS.classes, 'classes'),
    confidence=FLAGS.confidence,
    overlap=FLAGS.overlap,
    least_side=FLAGS.least_side,
    most=FLAGS.most_boxes,
    segmenter=FLAGS.segmenter,
    shift=FLAGS.shift,
    stability=FLAGS.stability,
    tagger=FLAGS.tagger,
    tags=annotating.read_names(FLAGS.tags, 'tags'),
    tag_confidence=FLAGS.tag_confidence,
    most_tags=FLAGS.most_tags,
  )
  captions = None
  if FLAGS.captioner:
    captions = captioners.Ask(
      captioner=FLAGS.captioner,
      prompts=tuple(FLAGS.prompt) or ('',),
      max_tokens=FLAGS.max_tokens,
    )
  return ask, captions


if __name__ == '__main__':
  sys.exit(main(sys.argv))

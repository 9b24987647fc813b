"""Features of images and texts, from any checkpoint, to one .npz file.

  python -m tips_jax.encode --checkpoint=PATH --images='photos/*.jpg' --texts=texts.txt
  --output=features.npz

PATH is a work folder (WORKDIR or WORKDIR@step), a Hugging Face folder, an export, or official npz
files. The file holds what was asked for: paths [N], cls [N, C, D], cls_names [C], image_embedding
[N, E], patch [N, h, w, D]; texts [T], text [T, E]; temperature. Exit codes: 0 done, 2 bad input,
130 or 143 stopped by Ctrl-C or SIGTERM, which leaves nothing.
"""

import collections
import concurrent.futures
import glob
import os
import pathlib
import sys
from collections.abc import Sequence

from tips_jax.core import cli, files
from tips_jax.core.errors import InputError

FLAGS = cli.Flags()
FLAGS.add_model()
FLAGS.add_string(
  'images', '', 'Files, as a glob; ** matches folders at any depth. In sorted order.'
)
FLAGS.add_string('texts', '', 'File of texts, UTF-8, one a line; empty lines are left out.')
FLAGS.add_string('output', '', 'The new .npz file; must not exist.')
FLAGS.add_integer(
  'size', 0, 'Pixels that images are resized to, square; 0: what the model is best at.', 0
)
FLAGS.add_integer('batch_size', 0, 'Of one call of the program; 0: as suits the device.', 0)
FLAGS.add_boolean('patches', False, 'Also the features of every patch, which are large.')
FLAGS.add_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of activations.')

_AHEAD = 2  # groups of images that are decoded while the device works


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` (program name first) and returns the exit code."""
  return cli.run(_encode, argv, FLAGS, about=__doc__, stopped='nothing was written')


def _encode(argv):
  paths, texts, output = _inputs(argv)
  import tips_jax  # only now: --help and bad flags answer at once

  options = {}
  if FLAGS.batch_size:  # else the encoder's own default, which depends on the device
    options['batch_size'] = FLAGS.batch_size
  encoder = tips_jax.load(
    FLAGS.checkpoint,
    weights=FLAGS.weights,
    tokenizer=FLAGS.tokenizer or None,
    dtype=FLAGS.dtype,
    **options,
  )
  if texts:
    # A missing text tower or tokenizer is an error before the images are encoded.
    encoder.encode_text([])
  arrays = {}
  if paths:
    arrays |= _images(encoder, paths)
  if texts:
    arrays['texts'] = texts
    arrays['text'] = _texts(encoder, texts)
  # With it, a reader turns cosines into the logits of the contrastive loss.
  if 'logit' in encoder.weights.towers:
    arrays['temperature'] = encoder.temperature
  _write(output, arrays)
  shapes = ', '.join(f'{k} {list(v.shape)}' for k, v in arrays.items() if getattr(v, 'ndim', 0) > 1)
  print(f'{output}: {shapes}')


def _inputs(argv):
  """(image paths, texts, output path) of the flags, after all checks that need no model."""
  cli.parse(FLAGS, argv, hint='; a glob needs quotes')
  for name in ('checkpoint', 'output'):
    if not FLAGS[name].value:
      raise InputError(
        f'--{name}: missing; expected python -m tips_jax.encode --checkpoint=PATH --images=GLOB '
        '--texts=FILE --output=FEATURES.npz'
      )
  if not (FLAGS.images or FLAGS.texts):
    raise InputError('--images, --texts: got neither; expected at least one of them')
  if FLAGS.patches and not FLAGS.images:
    raise InputError('--patches: got it without --images; expected both')
  output = pathlib.Path(FLAGS.output)
  if output.suffix != '.npz':
    raise InputError(f'--output: got {FLAGS.output!r}; expected a file name that ends in .npz')
  _refuse_existing(output)
  # All of this before the model is loaded, which takes longest.
  if not output.absolute().parent.is_dir():
    raise InputError(f'--output: got {FLAGS.output!r}; expected a file in a folder that exists')
  files.require_writable(output, '--output')
  matches = [FLAGS.images]
  # photo[1].jpg may be the name of a file.
  if not os.path.isfile(FLAGS.images):
    matches = glob.glob(FLAGS.images, recursive=True)
  # ** matches folders, too.
  paths = sorted(filter(os.path.isfile, matches))
  if FLAGS.images and not paths:
    raise InputError(
      f"--images: got {FLAGS.images!r}, which matches no file; expected a glob, as 'photos/*.jpg'"
    )
  texts = _lines(FLAGS.texts) if FLAGS.texts else []
  return paths, texts, output


def _lines(path):
  """Texts of a file, one a line."""
  try:
    # Editors on Windows put a byte order mark before the first text.
    lines = pathlib.Path(path).read_text(encoding='utf-8-sig').split('\n')
  except OSError as error:
    raise InputError(f'--texts: cannot read {path!r} ({error.strerror})') from None
  except UnicodeDecodeError as error:
    raise InputError(f'--texts: got {path!r}, which is not UTF-8 (byte {error.start})') from None
  texts = [line.strip() for line in lines if line.strip()]
  if not texts:
    raise InputError(f'--texts: got {path!r}, which holds no text; expected one a line')
  return texts


def _refuse_existing(output):
  if os.path.lexists(output):
    raise InputError(
      f'--output: got {str(output)!r}, which exists; expected a new file: nothing is overwritten'
    )


def _images(encoder, paths):
  """Arrays of the readable images; the others are named on stderr."""
  import numpy as np

  from tips_jax.core.log import Progress

  size = FLAGS.size or encoder.size
  progress = Progress(len(paths), label='image')
  names = [*encoder.cls_names, 'embedding']
  if FLAGS.patches:
    names.append('patch')
  features = {name: [] for name in names}
  readable = []
  count = 0
  try:
    for group in _read_ahead(encoder, paths, size):
      images = []
      for path, image in group:
        if isinstance(image, InputError):
          # One broken file must not end a long run; it is named, and missing in `paths`.
          progress.message(f'left out: {image}')
          continue
        images.append(image)
        readable.append(path)
      if images:
        outputs = encoder.features(np.stack(images), patches=FLAGS.patches)
        for name in names:
          features[name].append(outputs[name])
      count += len(group)
      progress.update(count)
  finally:
    progress.close()
  if not readable:
    raise InputError(
      f'--images: none of the {len(paths)} files that {FLAGS.images!r} matches is a readable image'
    )
  features = {name: np.concatenate(groups) for name, groups in features.items()}
  arrays = {
    'paths': readable,
    'cls': np.stack([features[name] for name in encoder.cls_names], axis=1),
    'cls_names': encoder.cls_names,
    'image_embedding': features['embedding'],
  }
  if FLAGS.patches:
    arrays['patch'] = features['patch']
  return arrays


def _read_ahead(encoder, paths, size):
  """Yields groups of (path, image or the InputError of reading it), as many as one call encodes.

  Threads decode the next groups while the device works on this one.
  """

  def read(path):
    try:
      return path, encoder.resize(path, size)
    except InputError as error:
      return path, error

  step = encoder.group(size)
  pool = concurrent.futures.ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1)))
  try:
    pending = collections.deque()
    for start in range(0, len(paths), step):
      pending.append([pool.submit(read, path) for path in paths[start : start + step]])
      if len(pending) > _AHEAD:
        yield [job.result() for job in pending.popleft()]
    for jobs in pending:
      yield [job.result() for job in jobs]
  finally:
    # After Ctrl-C, images that were submitted are of no use.
    pool.shutdown(wait=False, cancel_futures=True)


def _texts(encoder, texts):
  import numpy as np

  from tips_jax.core.log import Progress

  progress = Progress(len(texts), label='text')
  step = 8 * encoder.group()  # texts are shorter than images
  embeddings = []
  try:
    for start in range(0, len(texts), step):
      embeddings.append(encoder.encode_text(texts[start : start + step]))
      progress.update(min(start + step, len(texts)))
  finally:
    progress.close()
  return np.concatenate(embeddings)


def _write(output, arrays):
  """An .npz without pickles, whole or absent."""
  import numpy as np

  columns = {name: np.asarray(array) for name, array in arrays.items()}
  try:
    files.write(output, lambda file: np.savez(file, **columns), replace=False)
  except FileExistsError:  # it appeared while the features were computed
    _refuse_existing(output)


if __name__ == '__main__':
  sys.exit(main(sys.argv))

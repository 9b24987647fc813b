"""Writes the weights of a run, or of any other checkpoint, in a format that others read, and proves
that they agree.

  python -m tips_jax.export --checkpoint=WORKDIR[@step] --to=hf --output=DIR

The files are read back, and compared with the model on fixed inputs; where they differ, nothing is
left behind. Exit codes: 0 done, 2 bad input, 4 the files do not reproduce the model, 75 a disk that
is busy, 130 or 143 stopped.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tips_jax.core import buckets, cli, files
from tips_jax.core.errors import InputError

if TYPE_CHECKING:  # interop imports jax: --help and bad flags answer at once
  from tips_jax.interop.weights import Weights

FLAGS = cli.Flags()
FLAGS.add_model()
FLAGS.add_enum(
  'to',
  None,
  ['hf', 'official_torch', 'official_jax', 'safetensors', 'onnx'],
  'Hugging Face (transformers), google-deepmind/tips for PyTorch or for JAX, our own names, ONNX.',
)
FLAGS.add_path('output', '', 'Folder to write; must not exist.')
FLAGS.add_enum(
  'dtype',
  'float32',
  ['float32', 'bfloat16', 'float16', 'int8'],
  'Of the numbers in the files; int8: ONNX alone, whose other choice is float32.',
)
FLAGS.add_string(
  'resolution', 'dynamic', "ONNX: pixels of the square images, 'native' or 'dynamic'."
)


# Who reads the files, by the key of parity.TOLERANCE.
_READERS = {'onnx': 'onnxruntime', 'jax': 'tips_jax, read back', 'torch': 'transformers'}


# Cosine with float32, of the worst vector, below which a file of int8 is refused: a choice.
LEAST_INT8 = 0.9


class Differs(Exception):
  """The files do not give what the model gives."""


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` (program name first) and returns the exit code."""
  return cli.run(_export, argv, FLAGS, about=__doc__, stopped='nothing was written')


def reproduces(
  weights: 'Weights', format: str, folder: pathlib.Path, *, dtype: str, size: int | None = None
) -> bool:
  """Whether the files in a folder give what the model gives; prints the tables that show it.

  size: of ONNX's images.
  """
  from tips_jax.interop import parity, read

  inputs = parity.fixed_inputs(weights, size=size)
  model = parity.reference(weights, inputs)
  if dtype != 'float32' and format != 'onnx':
    # The files are compared with the rounded model; what rounding itself costs is printed.
    rounded = parity.reference(weights.cast(dtype), inputs)
    worst = min(row.cosine for row in parity.compare(model, rounded))
    print(f'{dtype} instead of float32: least cosine {worst:.6f}')
    model = rounded
  if format == 'onnx':
    outputs = {'onnx': parity.onnx_outputs(folder, inputs)}
  else:
    outputs = {'jax': parity.reference(read.read(folder), inputs)}
  if format == 'hf':  # our own reader could share a mistake with our writer
    outputs['torch'] = parity.torch_outputs(folder, inputs)
  good = True
  if dtype == 'int8':
    worst = min(row.cosine for row in parity.compare(model, outputs['onnx']))
    print(f'int8 instead of float32: least cosine {worst:.6f}')
    return worst >= LEAST_INT8
  for reader, features in outputs.items():
    name = _READERS[reader]
    if features is None:
      print(f'{name}: not compared; it is not installed (pip install torch transformers)')
      continue
    rows = parity.compare(model, features)
    good &= parity.passed(rows, parity.TOLERANCE[reader])
    print(f'model - {name}\n{parity.table(rows, parity.TOLERANCE[reader])}\n')
  return good


def _export(argv):
  cli.parse(FLAGS, argv)
  for name in ('checkpoint', 'to', 'output'):
    if not FLAGS[name].value:
      raise InputError(
        f'--{name}: missing; expected python -m tips_jax.export --checkpoint=WORKDIR --to=hf '
        '--output=DIR'
      )
  if FLAGS.to == 'onnx' and FLAGS.dtype not in ('float32', 'int8'):
    raise InputError(f'--dtype: got {FLAGS.dtype!r}; expected float32 or int8 for --to=onnx')
  if FLAGS.to != 'onnx' and FLAGS.dtype == 'int8':
    raise InputError("--dtype: got 'int8'; expected another one: only --to=onnx has it")
  files.require_writable(FLAGS.output, '--output')
  # Only now: --help and bad flags answer at once.
  from tips_jax.interop import write

  try:
    with buckets.output(FLAGS.output, '--output', last=write.CONTRACT) as output:
      write.refuse_existing(output)
      _write(_weights(), output)
  except Differs as error:
    print(f'error: {error}', file=sys.stderr)
    return 4
  print(f'written: {FLAGS.output}')
  return 0


def _weights():
  """The model that the flags name, as the format wants it."""
  from tips_jax.interop import read
  from tips_jax.interop.weights import at_own_size, only_vit

  weights = read.read(
    FLAGS.checkpoint, weights=FLAGS.weights, tokenizer=FLAGS.tokenizer or None, what='--checkpoint'
  )
  for note in weights.about.get('notes', ()):
    print(f'note: {note}', file=sys.stderr)
  # Token ids mean nothing without the model that made them.
  if weights.text and not weights.tokenizer:
    raise InputError(
      f'--tokenizer: missing, and none is beside {FLAGS.checkpoint!r}; expected the SentencePiece '
      'model that the weights were trained with'
    )
  if FLAGS.to in ('hf', 'official_torch'):
    only_vit(weights, FLAGS.to)
    grid = weights.image.grid
    weights = at_own_size(weights)
    if weights.image.grid != grid:
      print(
        f'note: the position table of {grid} x {grid} is written for {weights.size} pixels, as the '
        'official program reads it; images of other sizes get features that differ a little',
        file=sys.stderr,
      )
  return weights


def _write(weights, output):
  from tips_jax.interop import onnx, write

  options = {}
  size = None
  if FLAGS.to == 'onnx':
    options['resolution'] = FLAGS.resolution
    size = onnx.fixed_size(weights.image, FLAGS.resolution)
  # Files that do not reproduce the model raise inside of it, and the folder is gone.
  with write.new_folder(output) as folder:
    write.write(weights, FLAGS.to, folder, dtype=FLAGS.dtype, **options)
    if FLAGS.to in ('official_jax', 'onnx') and getattr(weights.image, 'mask_token', False):
      print(
        f'note: {FLAGS.to} has no place for the mask token, which training alone reads',
        file=sys.stderr,
      )
    if FLAGS.to == 'onnx' and 'region_head' in weights.towers:
      print(
        'note: onnx has no place for the projection of regions; --to=safetensors holds it',
        file=sys.stderr,
      )
    if not reproduces(weights, FLAGS.to, folder, dtype=FLAGS.dtype, size=size):
      raise Differs(f'{FLAGS.to}: the files do not reproduce the model; nothing was written')


if __name__ == '__main__':
  sys.exit(main(sys.argv))

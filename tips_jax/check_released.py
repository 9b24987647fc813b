"""Checks a copy of the released weights of TIPSv2 against the numbers that are published of them.

  python -m tips_jax.check_released --checkpoint=DIR --image=000000039769.jpg

DIR is google/tipsv2-b14, -l14, -so400m14 or -g14, fetched, or the official npz files with
--tokenizer=tokenizer.model, or google/tipsv2-b14-dpt with its decoders. Embeddings and decoders are
known of B/14 alone, of the image 000000039769.jpg of COCO val2017, which is not fetched either; of
the others the parameters and the vocabulary. Exit codes: 0 all agree, 1 some do not, 2 bad input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tips_jax.core import cli
from tips_jax.core.errors import InputError

if TYPE_CHECKING:  # --help and bad flags answer at once
  import numpy as np

  from tips_jax.interop.encoder import Encoder
  from tips_jax.interop.official.released import Vector

FLAGS = cli.Flags()
FLAGS.add_string('checkpoint', '', 'Hugging Face folder, or official npz files.')
FLAGS.add_string('tokenizer', '', 'SentencePiece model, where none is beside the weights.')
FLAGS.add_string('image', '', '000000039769.jpg of COCO val2017; for B/14.')


class Row(NamedTuple):
  """One published fact, and what the weights give."""

  name: str
  passed: bool
  got: str
  expected: str


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` (program name first) and returns the exit code."""
  return cli.run(_check, argv, FLAGS, about=__doc__, stopped='nothing is kept')


def _check(argv):
  cli.parse(FLAGS, argv)
  if not FLAGS.checkpoint:
    raise InputError(
      '--checkpoint: missing; expected python -m tips_jax.check_released --checkpoint=DIR '
      '--image=000000039769.jpg'
    )
  # Only now: --help and bad flags answer at once.
  import tips_jax
  from tips_jax.interop.huggingface import folder as huggingface
  from tips_jax.interop.official import released

  encoder = tips_jax.load(FLAGS.checkpoint, tokenizer=FLAGS.tokenizer or None)
  release = released.of(encoder.width)
  for note in encoder.weights.about.get('notes', ()):
    print(f'note: {note}', file=sys.stderr)
  rows = []
  expected = release.vectors
  outputs = _outputs
  if huggingface.has_decoders(FLAGS.checkpoint):
    expected = release.decoders
    outputs = _decoded
  else:
    rows += _of_both_towers(encoder, release)
  if expected:
    if not FLAGS.image:
      raise InputError(f'--image: missing; expected a file, {released.IMAGE}')
    got = outputs(encoder, encoder.resize(FLAGS.image)[None])
    rows += [_compared(name, got[name], vector) for name, vector in expected.items()]
  print(_table(release.name, rows))
  return 0 if all(row.passed for row in rows) else 1


def _of_both_towers(encoder, release):
  """Rows of what is known without an image."""
  from tips_jax.interop.official import released

  if not encoder.has_text:
    raise InputError(
      f'checkpoint: got {FLAGS.checkpoint!r}, an image tower alone; expected one with a text tower'
    )
  count = released.parameters(encoder.weights.towers)
  wrong = []
  for piece, number in released.PIECES.items():
    got = encoder.tokenizer.id_of(piece)
    if got != number:
      wrong.append(f'{piece!r} as {got} for {number}')
  right = len(released.PIECES) - len(wrong)
  return [
    Row('parameters', count == release.parameters, f'{count:,}', f'{release.parameters:,}'),
    Row(
      'pieces of the vocabulary',
      not wrong,
      ', '.join([f'{right} right', *wrong[:3]]),
      f'{len(released.PIECES)} right',
    ),
  ]


def _outputs(encoder: Encoder, images_1HWC: np.ndarray) -> dict[str, np.ndarray]:
  """The outputs of which vectors are known, by the names that transformers has for them."""
  from tips_jax.core import vectors
  from tips_jax.interop.official import released

  cls_1ND, patch_1HWD = encoder.encode_image(images_1HWC)
  text_TD = encoder.encode_text(list(released.TEXTS))
  return {
    'image_embeds[0, :5]': vectors.unit(cls_1ND[:, 0])[0, :5],
    'vision_pooler[0, :5]': cls_1ND[0, 0, :5],
    'patch_tokens[0, 0, :5]': patch_1HWD[0, 0, 0, :5],
    'text_embeds[0, :5]': vectors.unit(text_TD)[0, :5],
    'text_pooler[0, :5]': text_TD[0, :5],
    'logits_per_image[0]': encoder.similarity(cls_1ND, text_TD)[0],
  }


def _decoded(encoder: Encoder, images_1HWC: np.ndarray) -> dict[str, np.ndarray]:
  """As `_outputs`, of the decoders in a folder of TIPSv2-DPT."""
  from tips_jax.evals.probes import dpt
  from tips_jax.interop import arrays

  blocks = dpt.intermediate_layers_of(encoder.depth)
  inside = encoder.inspect(images_1HWC, intermediate_layers=blocks)
  layers = inside['intermediate_layers']
  tensors = arrays.read_safetensors(FLAGS.checkpoint)
  decoders = {task: dpt.read_hf(tensors, task=task, where=FLAGS.checkpoint) for task in dpt.TASKS}
  return {
    'depth[0, :3, :3]': dpt.depth(decoders['depth'], layers)[0, :3, :3],
    'normals[0, 0, :3, :3]': dpt.apply(decoders['normals'], layers)[0, :3, :3, 0],
    'seg_logits[0, 0, :3, :3]': dpt.apply(decoders['segmentation'], layers)[0, :3, :3, 0],
  }


def _compared(name: str, values: np.ndarray, vector: Vector) -> Row:
  import numpy as np

  got = np.ravel(values)
  expected = np.array(vector.values)
  # NaN is not within anything.
  near = bool(np.all(np.abs(got - expected) <= vector.least + vector.share * np.abs(expected)))
  allowed = f'within {vector.least:g} + {vector.share:g} of the value'
  return Row(name, near, _numbers(got), f'{_numbers(expected)}, {allowed}')


def _numbers(values):
  return ' '.join(f'{value:.5f}' for value in values)


def _table(name, rows):
  """The report as text: for each row whether it passed, what was got and what was expected."""
  lines = []
  for row in rows:
    mark = 'pass' if row.passed else 'FAIL'
    lines.append(f'{mark}  {row.name}\n      got      {row.got}\n      expected {row.expected}')
  passed = sum(row.passed for row in rows)
  lines.append(f'{passed} of {len(rows)} agree with {name}')
  return '\n'.join(lines)


if __name__ == '__main__':
  sys.exit(main(sys.argv))

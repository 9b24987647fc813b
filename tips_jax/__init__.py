"""tips_jax: TIPS and TIPSv2 pretraining in JAX, and its neighbors as configs of one step."""

from typing import Any

__version__ = '0.1.0'


def load(path: str, *, weights: str = '', tokenizer: str | None = None, **options: Any) -> Any:
  """The encoder of any checkpoint, with encode_image, encode_text and similarity.

  path: WORKDIR[@step] of a run, a Hugging Face folder, an export, or official npz files. weights:
  of a run, 'student', 'teacher' or a teacher's name. tokenizer: a SentencePiece file, where none
  is beside the weights. options: of `interop.encoder.Encoder` (dtype, batch_size). Raises
  InputError, a ValueError, for whatever cannot be read whole.
  """
  from tips_jax.interop import read
  from tips_jax.interop.encoder import Encoder

  return Encoder(read.read(path, weights=weights, tokenizer=tokenizer), **options)

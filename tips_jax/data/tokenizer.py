"""Text to token ids: SentencePiece BPE with byte fallback, lower-cased ASCII, padded with 0 to a
fixed length T.

The official TIPS `tokenizer.model` loads as it is. Each text is cut and padded by itself, so that
an over-long neighbor in a batch never changes the padding of a short one.
"""

import hashlib
import io
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece as spm

from tips_jax.core import buckets, files
from tips_jax.core.errors import InputError

PAD_ID = 0
UNK_ID = 1
# SentencePiece skips sentences above 4192 bytes, so longer ones are cut instead of lost.
_MAX_TEXT_BYTES = 4000
# A sample of this size settles the merges; more only costs memory.
_MAX_SENTENCES = 5_000_000


def lower(text: str | bytes) -> bytes:
  """Lower-cases A-Z and nothing else (as tf.strings.lower), from str or bytes to UTF-8 bytes."""
  raw = text.encode('utf-8', 'replace') if isinstance(text, str) else bytes(text)
  return raw.lower()


def train(
  texts: Iterable[str | bytes], path: str | os.PathLike, *, vocab_size: int = 32_000
) -> int:
  """Trains a BPE model on texts, writes it to `path` and returns its vocabulary size.

  The size is smaller than `vocab_size` when the texts do not hold enough different words. The same
  texts in the same order give the same bytes. Raises InputError when there is no text, or when
  `vocab_size` cannot even hold the characters of the texts.
  """
  sentences = (lower(text).strip()[:_MAX_TEXT_BYTES].decode('utf-8', 'ignore') for text in texts)
  model = io.BytesIO()
  try:
    spm.SentencePieceTrainer.train(
      sentence_iterator=(s for s in sentences if s),
      model_writer=model,
      model_type='bpe',
      vocab_size=vocab_size,
      hard_vocab_limit=False,  # few texts give a smaller vocabulary, not an error
      byte_fallback=True,  # no text is ever unknown
      pad_id=PAD_ID,
      unk_id=UNK_ID,
      bos_id=-1,
      eos_id=-1,
      input_sentence_size=_MAX_SENTENCES,
      shuffle_input_sentence=True,
      num_threads=1,  # more would make the model depend on their order
      minloglevel=2,
    )
  except RuntimeError as error:
    raise _training_error(str(error), vocab_size) from error
  files.write(path, model.getvalue())
  return spm.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()


def _training_error(message, vocab_size):
  if 'sentences_.empty()' in message:
    return InputError(
      'tokenizer texts: got no text at all; expected at least one non-empty alt text or caption'
    )
  needed = re.search(r'required_chars\. \d+ vs (\d+)', message)
  if needed:
    return InputError(
      f'vocab_size: got {vocab_size}; expected at least {needed[1]}, the bytes and characters that '
      f'occur in the texts'
    )
  return InputError(f'tokenizer training with vocab_size={vocab_size}: {message}')


class Tokenizer:
  """A SentencePiece model file as a picklable function from text to int32 ids [T].

  Attributes: `path`, `vocab_size` (pieces in the model), `sha256` (hex, of the file). Raises
  InputError if the file is missing, is not a SentencePiece model, or uses id 0 (the padding) for an
  ordinary piece.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = buckets.local(path, 'tokenizer')
    try:
      self._model = pathlib.Path(self.path).read_bytes()
    except OSError as error:
      raise InputError(
        f'tokenizer: got {self.path!r} ({error.strerror}); expected a SentencePiece model file, '
        f'such as the tokenizer.model of a store made with --tokenizer'
      ) from error
    self.sha256 = hashlib.sha256(self._model).hexdigest()
    self._processor = self._load()
    self.vocab_size = self._processor.get_piece_size()
    if not (self._processor.is_control(PAD_ID) or self._processor.is_unknown(PAD_ID)):
      piece = self._processor.id_to_piece(PAD_ID)
      raise InputError(
        f'tokenizer: got {self.path!r} whose id 0 is the piece {piece!r}; expected <pad> or <unk> '
        f'there, because 0 pads texts'
      )

  def _load(self):
    try:
      processor = spm.SentencePieceProcessor()
      processor.LoadFromSerializedProto(self._model)
      processor.id_to_piece(PAD_ID)  # not even text, of some damaged models
      return processor
    except (RuntimeError, UnicodeDecodeError) as error:
      raise InputError(
        f'tokenizer: got {self.path!r}, which is not a SentencePiece model; expected a file '
        f'written by SentencePiece, such as tokenizer.model'
      ) from error

  # A copy in a worker process reads the file anew. What is sent there must be small: Python waits
  # for ever where a process dies before it has read more than a pipe holds.
  def __getstate__(self):
    return {'path': self.path, 'sha256': self.sha256}

  def __setstate__(self, state):
    self.__init__(state['path'])
    if self.sha256 != state['sha256']:
      raise InputError(f'tokenizer: {self.path!r} has changed; expected it as it was at the start')

  def id_of(self, piece: str) -> int:
    """The id of a piece, written as in the model's file; that of <unk> where there is none."""
    return self._processor.piece_to_id(piece)

  def encode(self, text: str | bytes, length: int) -> np.ndarray:
    """One text as int32 [length]: lower-cased, cut on the right, padded with 0."""
    ids = self._processor.encode(lower(text))[:length]
    out = np.full(length, PAD_ID, np.int32)
    out[: len(ids)] = ids
    return out

  def encode_batch(self, texts: Sequence[str | bytes], length: int) -> np.ndarray:
    """Texts as int32 [B, length], each exactly as `encode` does by itself."""
    if not len(texts):
      return np.zeros((0, length), np.int32)
    return np.stack([self.encode(text, length) for text in texts])

"""A stand-in for the released tokenizer, which is not at hand: its layout, and the pieces of which
the ids are published.
"""

import functools
import io

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as proto

from tips_jax.interop.official.released import PIECES

SIZE = 32_000
FIRST_MERGE = 260  # after four special pieces and 256 bytes
FIRST_CHARACTER = 26_717


@functools.cache
def official_vocabulary():
  """Bytes of a SentencePiece model with PIECES at their ids, and all merges that lead to them."""
  written = io.BytesIO()
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter(['a b']),
    model_writer=written,
    model_type='bpe',
    vocab_size=300,
    hard_vocab_limit=False,
    byte_fallback=True,
    pad_id=0,
    unk_id=1,
    eos_id=2,
    bos_id=3,
    minloglevel=2,
  )
  model = proto.ModelProto.FromString(written.getvalue())
  # Of its own pieces only the special ones and the bytes are kept.
  del model.pieces[FIRST_MERGE:]
  by_id = {number: piece for piece, number in PIECES.items() if number >= FIRST_MERGE}
  merges = iter(sorted(_prefixes() - PIECES.keys()))
  characters = iter(sorted(set(''.join(PIECES)) - PIECES.keys()))
  for number in range(FIRST_MERGE, SIZE):
    others = merges if number < FIRST_CHARACTER else characters
    piece = by_id.get(number) or next(others, f'⊗{number}')
    # An earlier merge is tried first.
    model.pieces.add(
      piece=piece, score=FIRST_MERGE - number, type=proto.ModelProto.SentencePiece.NORMAL
    )
  assert not list(merges)
  assert not list(characters)
  model.trainer_spec.vocab_size = SIZE
  return model.SerializeToString()


def _prefixes():
  """The beginnings, of two characters or more, of all pieces."""
  prefixes = set()
  for piece in PIECES:
    for end in range(2, len(piece)):
      prefixes.add(piece[:end])
  return prefixes

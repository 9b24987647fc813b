"""A SentencePiece model as a `tokenizer.json` with the same ids, which transformers reads alone.

transformers' own conversion (Tipsv2Tokenizer) lower-cases all of Unicode where TIPS lower-cases
ASCII, splits pieces at white space, and reads a unigram model as if it were BPE. So this file
spells out every step.
"""

import functools
import string
import unicodedata
from collections.abc import Iterable
from typing import Any

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as proto

from tips_jax.core.errors import InputError

Json = dict[str, Any]
_SPACE = '▁'
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# Noncharacters, which no text holds: a barrier that is removed again, and the first of those that
# stand in for characters which NFKC must not touch.
_GUARD = '\ufdd0'
_STAND_INS = 0xFDD1
_LATER = '\u061c\u32ff'  # newer than Unicode 3.2, yet in every rule set of SentencePiece
_MOST_EXCEPTIONS = 200  # of nmt_nfkc from NFKC; more is another rule


def tokenizer_json(model: bytes) -> Json:
  """The content of tokenizer.json for a serialized SentencePiece BPE model.

  InputError where the same ids are impossible: unigram, word and character models, user-defined
  symbols, and normalization rules other than none and (nmt_)nfkc. Known differences: several
  combining accents in an order that no language uses, letter-like symbols newer than Unicode 12,
  and a final jamo after a complete Hangul syllable.
  """
  parsed = proto.ModelProto.FromString(model)
  _check(parsed)
  processor = spm.SentencePieceProcessor(model_proto=model)
  pieces = parsed.pieces
  special = [i for i, p in enumerate(pieces) if p.type in (_UNKNOWN, _CONTROL)]
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [
      {
        'id': i,
        'content': pieces[i].piece,
        'single_word': False,
        'lstrip': False,
        'rstrip': False,
        'normalized': False,
        'special': True,
      }
      for i in special
    ],
    'normalizer': {
      'type': 'Sequence',
      'normalizers': _normalizers(parsed.normalizer_spec, processor),
    },
    'pre_tokenizer': None,
    'post_processor': None,
    'decoder': {
      'type': 'Sequence',
      'decoders': [
        {'type': 'Replace', 'pattern': {'String': _SPACE}, 'content': ' '},
        {'type': 'ByteFallback'},
        {'type': 'Fuse'},
        {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0},
      ],
    },
    'model': {
      'type': 'BPE',
      'dropout': None,
      'unk_token': pieces[parsed.trainer_spec.unk_id].piece,
      'continuing_subword_prefix': None,
      'end_of_word_suffix': None,
      'fuse_unk': True,
      'byte_fallback': parsed.trainer_spec.byte_fallback,
      'ignore_merges': False,
      'vocab': {p.piece: i for i, p in enumerate(pieces)},
      'merges': _merges(pieces),
    },
  }


def special_tokens(model: bytes) -> tuple[str, str]:
  """(padding piece, unknown piece)."""
  parsed = proto.ModelProto.FromString(model)
  return parsed.pieces[0].piece, parsed.pieces[parsed.trainer_spec.unk_id].piece


def _check(parsed: proto.ModelProto) -> None:
  trainer = parsed.trainer_spec
  normalizer = parsed.normalizer_spec
  if trainer.model_type != trainer.BPE:
    kind = trainer.ModelType.Name(trainer.model_type).lower()
    raise InputError(
      f'tokenizer: got a SentencePiece {kind} model; expected BPE for --to=hf: transformers '
      f'(Tipsv2) would silently cut texts into other pieces'
    )
  kinds = {p.type for p in parsed.pieces} & {_USER_DEFINED, _UNUSED}
  if kinds:
    kind = 'user-defined' if _USER_DEFINED in kinds else 'unused'
    raise InputError(
      f'tokenizer: got pieces that are {kind}; expected none for --to=hf: transformers would give '
      'other ids'
    )
  if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
    raise InputError(
      'tokenizer: got a model that does not mark the start of words with ▁; expected one that does '
      'for --to=hf'
    )


def _merges(pieces: Iterable[Any]) -> list[list[str]]:
  """All pairs of pieces that form a piece, the best first."""
  score = {p.piece: (-p.score, i) for i, p in enumerate(pieces) if p.type == _NORMAL}
  merges = []
  for piece in sorted(score, key=score.get):
    for k in range(1, len(piece)):
      if piece[:k] in score and piece[k:] in score:
        merges.append([piece[:k], piece[k:]])
  return merges


def _normalizers(spec: Any, processor: spm.SentencePieceProcessor) -> list[Json]:
  # TIPS lower-cases A-Z alone, before SentencePiece sees the text.
  steps = [_replace(letter, letter.lower()) for letter in string.ascii_uppercase]
  if spec.precompiled_charsmap:
    steps += _nfkc(spec, processor)
  if spec.remove_extra_whitespaces:
    steps += [_regex(r'\A +', ''), _regex(f'[ {_SPACE}]+\\z', ''), _regex(' +', ' ')]
  steps.append(_replace(' ', _SPACE))
  if spec.add_dummy_prefix:
    steps.append({'type': 'Prepend', 'prepend': _SPACE})
  return steps


def _nfkc(spec: Any, processor: spm.SentencePieceProcessor) -> list[Json]:
  """NFKC with SentencePiece's exceptions: rules for some characters, and marks keep their order."""
  exceptions = {}  # result -> characters
  unchanged = []
  for c in _characters():
    # Between bars: no mark combines with a bar, and white space at the ends would be removed.
    result = processor.normalize(f'|{c}|').removeprefix(_SPACE)[1:-1].replace(_SPACE, ' ')
    if result == unicodedata.normalize('NFKC', c) and c not in _LATER:
      continue
    if result == c:
      unchanged.append(c)
    else:
      exceptions.setdefault(result, []).append(c)
  if len(unchanged) + sum(map(len, exceptions.values())) > _MOST_EXCEPTIONS:
    raise InputError(
      f'tokenizer: got the normalization rule {spec.name!r}; expected nmt_nfkc, nfkc or identity '
      'for --to=hf'
    )
  # Whether a ▁ in the text itself is white space, of which several become one.
  if processor.normalize(f'x{_SPACE}{_SPACE}x').count(_SPACE) == 1 + spec.add_dummy_prefix:
    exceptions.setdefault(' ', []).append(_SPACE)
  steps = [_regex(_class(characters), result) for result, characters in exceptions.items()]
  restore = []
  for i, c in enumerate(unchanged):
    stand_in = chr(_STAND_INS + i)
    steps.append(_replace(c, stand_in))
    restore.append(_replace(stand_in, c))
  return [*steps, _regex(_barriers(), _GUARD), {'type': 'NFKC'}, _replace(_GUARD, ''), *restore]


@functools.cache
def _characters() -> list[str]:
  """Those of Unicode 3.2, which every version of NFKC knows, without the spaces."""
  result = []
  for c in map(chr, range(1, 0x30000)):
    # Not unassigned, for private use, or a surrogate.
    if unicodedata.ucd_3_2_0.category(c) not in ('Cn', 'Co', 'Cs') and c not in (' ', _SPACE):
      result.append(c)
  return [*result, *_LATER]


@functools.cache
def _barriers() -> str:
  """A pattern for the places where NFKC would swap two marks, or compose across the first of them.

  SentencePiece does neither. A mark's combining class is its place in the canonical order.
  """
  first = {}  # combining class -> characters whose decomposition starts with such a mark
  last = {}  # combining class -> characters whose decomposition ends with such a mark
  ends = {}  # character -> characters whose normal form ends with it
  bases = {}  # mark -> characters that compose with it
  # Without Hangul, which has no marks, and surrogates.
  for c in map(chr, [*range(ord('a'), 0xAC00), *range(0xF900, 0x30000)]):
    compatible = unicodedata.normalize('NFKD', c)
    canonical = unicodedata.normalize('NFD', c)
    composed = unicodedata.normalize('NFKC', c)
    for table, mark in ((first, compatible[0]), (last, compatible[-1])):
      if unicodedata.combining(mark):
        table.setdefault(unicodedata.combining(mark), set()).add(c)
    ends.setdefault(composed[-1], set()).add(c)
    if len(canonical) > 1 and composed == c and unicodedata.combining(canonical[-1]):
      base = unicodedata.normalize('NFC', canonical[:-1])
      bases.setdefault(canonical[-1], set()).add(base)
  patterns = []
  # A mark after one of a higher class: NFKC would sort them.
  for rank in sorted(first):
    higher = set().union(*(characters for k, characters in last.items() if k > rank))
    if higher:
      patterns.append(f'(?<={_class(higher)})(?={_class(first[rank])})')
  # A mark that composes with nothing, or with something else than what precedes it: NFKC would
  # compose the next mark with the base before both.
  marks = set().union(*first.values())
  lone = {c for c in marks if unicodedata.normalize('NFKD', c)[0] not in bases}
  patterns.append(f'(?<={_class(lone)})(?={_class(bases)})')
  for mark, composing in sorted(bases.items()):
    before = set(bases).union(*(ends.get(base, base) for base in composing))
    patterns.append(f'(?<={_class(mark)})(?<!{_class(before)}{_class(mark)})(?={_class(bases)})')
  return f'(?={_class(marks)})(?:{"|".join(patterns)})'


def _class(characters: Iterable[str]) -> str:
  """A character class of a regular expression, ranges folded."""
  ranges = []
  for code in sorted(map(ord, characters)):
    if ranges and code == ranges[-1][1] + 1:
      ranges[-1][1] = code
    else:
      ranges.append([code, code])
  parts = []
  for begin, end in ranges:
    parts.append(f'\\x{{{begin:x}}}')
    if end > begin:
      parts.append(f'-\\x{{{end:x}}}')
  return f'[{"".join(parts)}]'


def _replace(old: str, new: str) -> Json:
  return {'type': 'Replace', 'pattern': {'String': old}, 'content': new}


def _regex(pattern: str, new: str) -> Json:
  return {'type': 'Replace', 'pattern': {'Regex': pattern}, 'content': new}

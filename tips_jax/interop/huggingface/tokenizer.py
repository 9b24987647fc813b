"""A SentencePiece model as the `tokenizer.json` that transformers reads without SentencePiece: the
same ids.

transformers' own conversion (Tipsv2Tokenizer) lower-cases all of Unicode where TIPS lower-cases
ASCII, takes its piece ends from white space, and reads a unigram model as if it were BPE. So the
file states every step itself.
"""

import functools
import unicodedata

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as proto

from tips_jax.core.errors import InputError

_SPACE = '▁'
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_GUARD = '\ufdd0'  # noncharacters, which no text holds: a barrier, and stand-ins
_STAND_INS = 0xFDD1
_LATER = '\u061c\u32ff'  # newer than Unicode 3.2, yet of every SentencePiece rule set
_MOST_ODD = 200


def tokenizer_json(model):
  """The content of tokenizer.json for a serialized SentencePiece BPE model.

  InputError where the same ids are not to be had: unigram, word and character models, symbols that
  a user defined, and normalization rules other than none and (nmt_)nfkc. Text whose accents are not
  letters of their own may still differ where several follow each other in an order that no word of
  a language has, and so may letter-like symbols newer than Unicode 12, and a final jamo that
  follows a whole Hangul syllable.
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


def special_tokens(model):
  """(piece that pads, piece for the unknown)."""
  parsed = proto.ModelProto.FromString(model)
  return parsed.pieces[0].piece, parsed.pieces[parsed.trainer_spec.unk_id].piece


def _check(parsed):
  trainer, normalizer = parsed.trainer_spec, parsed.normalizer_spec
  if trainer.model_type != trainer.BPE:
    kind = trainer.ModelType.Name(trainer.model_type).lower()
    raise InputError(
      f'tokenizer: got a SentencePiece {kind} model; expected BPE for --to=hf: transformers (Tipsv2) '
      f'would silently cut texts into other pieces'
    )
  kinds = {p.type for p in parsed.pieces} & {_USER_DEFINED, _UNUSED}
  if kinds:
    raise InputError(
      f'tokenizer: got pieces that are {"user-defined" if _USER_DEFINED in kinds else "unused"}; '
      'expected none for --to=hf: transformers would give other ids'
    )
  if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
    raise InputError(
      'tokenizer: got a model that does not mark the start of words with ▁; expected one that does '
      'for --to=hf'
    )


def _merges(pieces):
  """All pairs of pieces that make a piece, the best first."""
  score = {p.piece: (-p.score, i) for i, p in enumerate(pieces) if p.type == _NORMAL}
  return [
    [p[:k], p[k:]]
    for p in sorted(score, key=score.get)
    for k in range(1, len(p))
    if p[:k] in score and p[k:] in score
  ]


def _normalizers(spec, processor):
  steps = [_replace(chr(c), chr(c).lower()) for c in range(ord('A'), ord('Z') + 1)]
  if spec.precompiled_charsmap:
    steps += _nfkc(spec, processor)
  if spec.remove_extra_whitespaces:
    steps += [_regex(r'\A +', ''), _regex(f'[ {_SPACE}]+\\z', ''), _regex(' +', ' ')]
  steps.append(_replace(' ', _SPACE))
  return steps + ([{'type': 'Prepend', 'prepend': _SPACE}] if spec.add_dummy_prefix else [])


def _nfkc(spec, processor):
  """NFKC as SentencePiece has it: its own rule for some characters, and marks stay in the order
  they came in.
  """
  odd, kept = {}, []
  for c in _characters():
    into = (
      processor.normalize(f'|{c}|').removeprefix(_SPACE)[1:-1].replace(_SPACE, ' ')
    )  # no mark joins a bar
    if into == unicodedata.normalize('NFKC', c) and c not in _LATER:
      continue
    if into == c:
      kept.append(c)
    else:
      odd.setdefault(into, []).append(c)
  if len(kept) + sum(map(len, odd.values())) > _MOST_ODD:
    raise InputError(
      f'tokenizer: got the normalization rule {spec.name!r}; expected nmt_nfkc, nfkc or identity for '
      '--to=hf'
    )
  if processor.normalize(f'x{_SPACE}{_SPACE}x').count(_SPACE) == 1 + spec.add_dummy_prefix:
    odd.setdefault(' ', []).append(_SPACE)
  stand_ins = {c: chr(_STAND_INS + i) for i, c in enumerate(kept)}
  return [
    *(_regex(_class(cs), into) for into, cs in odd.items()),
    *(_replace(*pair) for pair in stand_ins.items()),
    _regex(_barriers(), _GUARD),
    {'type': 'NFKC'},
    _replace(_GUARD, ''),
    *(_replace(there, c) for c, there in stand_ins.items()),
  ]


@functools.cache
def _characters():
  """Those of Unicode 3.2, which every version of NFKC knows; the space is the pattern's own."""
  old = unicodedata.ucd_3_2_0
  return [
    c
    for c in map(chr, range(1, 0x30000))
    if old.category(c) not in ('Cn', 'Co', 'Cs') and c not in (' ', _SPACE)
  ] + list(_LATER)


@functools.cache
def _barriers():
  """A pattern for the places between two marks that NFKC would swap, or where it would reach over
  the first.

  SentencePiece does neither. A mark's class tells its place in the canonical order.
  """
  first, last, ends, bases = {}, {}, {}, {}
  for c in map(
    chr, [*range(ord('a'), 0xAC00), *range(0xF900, 0x30000)]
  ):  # no surrogates; Hangul has no marks
    whole, parts, composed = (unicodedata.normalize(form, c) for form in ('NFKD', 'NFD', 'NFKC'))
    for table, mark in ((first, whole[0]), (last, whole[-1])):
      if unicodedata.combining(mark):
        table.setdefault(unicodedata.combining(mark), []).append(c)
    ends.setdefault(composed[-1], set()).add(c)
    if len(parts) > 1 and composed == c and unicodedata.combining(parts[-1]):
      bases.setdefault(parts[-1], set()).add(unicodedata.normalize('NFC', parts[:-1]))
  swapped = [
    f'(?<={_class(c for k in last if k > rank for c in last[k])})(?={_class(first[rank])})'
    for rank in sorted(first)
    if rank < max(last)
  ]
  marks, joining = {c for cs in first.values() for c in cs}, _class(bases)
  lone = {c for c in marks if unicodedata.normalize('NFKD', c)[0] not in bases}
  over = [f'(?<={_class(lone)})(?={joining})']
  for mark, joins in sorted(bases.items()):
    under = {c for base in joins for c in ends.get(base, base)} | bases.keys()
    over.append(f'(?<={_class(mark)})(?<!{_class(under)}{_class(mark)})(?={joining})')
  return f'(?={_class(marks)})(?:{"|".join(swapped + over)})'


def _class(characters):
  """A character class of a regular expression, ranges folded."""
  codes, ranges = sorted(map(ord, characters)), []
  for code in codes:
    if ranges and code == ranges[-1][1] + 1:
      ranges[-1][1] = code
    else:
      ranges.append([code, code])
  return (
    '[' + ''.join(f'\\x{{{a:x}}}' + (f'-\\x{{{b:x}}}' if b > a else '') for a, b in ranges) + ']'
  )


def _replace(old, new):
  return {'type': 'Replace', 'pattern': {'String': old}, 'content': new}


def _regex(pattern, new):
  return {'type': 'Replace', 'pattern': {'Regex': pattern}, 'content': new}

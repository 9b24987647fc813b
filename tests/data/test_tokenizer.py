import pathlib
import pickle
import random

import numpy as np
import pytest
import sentencepiece as spm

from tips_jax.core.errors import InputError
from tips_jax.data import tokenizer

WORDS = 'a red dog runs under the green tree beside two houses near water'.split()


def texts(count=300, seed=0):
  rng = random.Random(seed)
  return [' '.join(rng.choices(WORDS, k=8)).capitalize() + '.' for _ in range(count)]


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  path = str(tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model')
  tokenizer.train(texts(), path, vocab_size=300)
  return path


def test_trained_model_has_the_promised_special_pieces(path):
  model = spm.SentencePieceProcessor(model_file=path)
  assert (model.pad_id(), model.unk_id(), model.bos_id(), model.eos_id()) == (0, 1, -1, -1)
  assert model.get_piece_size() == 300


def test_training_is_deterministic_and_lower_cases(tmp_path, path):
  again, lowered = str(tmp_path / 'again.model'), str(tmp_path / 'lowered.model')
  tokenizer.train(texts(), again, vocab_size=300)
  tokenizer.train([t.lower().encode() for t in texts()], lowered, vocab_size=300)
  first = open(path, 'rb').read()
  assert open(again, 'rb').read() == first
  assert open(lowered, 'rb').read() == first


def test_small_text_gives_a_smaller_vocabulary_and_says_so(tmp_path):
  path = str(tmp_path / 'small.model')
  size = tokenizer.train(['', '  ', *texts(50)], path)
  assert 256 < size < 400
  assert tokenizer.Tokenizer(path).vocab_size == size


def test_no_text_or_too_small_a_vocabulary_is_an_input_error(tmp_path):
  path = tmp_path / 'none.model'
  with pytest.raises(InputError, match='no text at all'):
    tokenizer.train(['', ' \n'], str(path))
  with pytest.raises(InputError, match=r'vocab_size: got 100; expected at least 2\d\d'):
    tokenizer.train(texts(), str(path), vocab_size=100)
  assert list(tmp_path.iterdir()) == []


def test_ids_equal_sentencepiece_on_lower_cased_text(path):
  model = spm.SentencePieceProcessor(model_file=path)
  t = tokenizer.Tokenizer(path)
  for text in ('A RED dog', 'Über den BÄUMEN 東京 🦊', ''):
    lowered = ''.join(chr(ord(c) + 32) if 'A' <= c <= 'Z' else c for c in text)
    expected = model.encode(lowered)
    ids = t.encode(text, 64)
    assert ids.dtype == np.int32 and ids.shape == (64,)
    assert ids[: len(expected)].tolist() == expected and not ids[len(expected) :].any()
    assert (t.encode(text.encode(), 64) == ids).all()


def test_no_text_has_an_unknown_or_padding_id_inside(path):
  ids = tokenizer.Tokenizer(path).encode('🦊 <pad> <unk> \x00 \xff', 64)
  used = np.trim_zeros(ids, 'b')
  assert len(used) > 5 and (used > 1).all()


def test_over_long_text_is_cut_and_leaves_its_neighbors_padding_alone(path):
  t = tokenizer.Tokenizer(path)
  long, short = ' '.join(WORDS * 20), 'a red dog'
  assert len(spm.SentencePieceProcessor(model_file=path).encode(long)) > 64
  both = t.encode_batch([long, short, ''], 64)
  assert both.shape == (3, 64) and both.dtype == np.int32
  assert (both[0] != 0).all()
  assert (both[1] == t.encode(short, 64)).all() and both[1, -1] == 0
  assert not both[2].any()
  assert t.encode_batch([], 64).shape == (0, 64)


def test_broken_utf8_and_lone_surrogates_do_not_raise(path):
  t = tokenizer.Tokenizer(path)
  assert t.encode(b'\xff\xfe dog', 16).any()
  assert t.encode('\ud800 dog', 16).any()


def test_pickles(path):
  t = tokenizer.Tokenizer(path)
  copy = pickle.loads(pickle.dumps(t))
  assert copy.sha256 == t.sha256 and copy.vocab_size == t.vocab_size
  assert (copy.encode('a red dog', 8) == t.encode('a red dog', 8)).all()


def test_missing_or_foreign_file_is_an_input_error(tmp_path):
  with pytest.raises(InputError, match='No such file'):
    tokenizer.Tokenizer(str(tmp_path / 'nothing.model'))
  foreign = tmp_path / 'foreign.model'
  for content in (b'', b'not a model'):
    foreign.write_bytes(content)
    with pytest.raises(InputError, match='not a SentencePiece model'):
      tokenizer.Tokenizer(str(foreign))


def test_a_model_whose_first_piece_is_no_text_is_an_input_error(tmp_path, path):
  damaged = pathlib.Path(path).read_bytes().replace(b'<pad>', b'<p\xb0d>', 1)
  (tmp_path / 'tokenizer.model').write_bytes(damaged)
  with pytest.raises(InputError, match='not a SentencePiece model'):
    tokenizer.Tokenizer(tmp_path / 'tokenizer.model')


def test_model_whose_id_0_is_an_ordinary_piece_is_refused_and_unk_0_is_not(tmp_path):
  for name, ids in (
    ('unk0', dict(unk_id=0)),
    ('pad5', dict(unk_id=4, pad_id=5, user_defined_symbols=['dog'])),
  ):
    spm.SentencePieceTrainer.train(
      sentence_iterator=iter(texts()),
      model_prefix=str(tmp_path / name),
      vocab_size=40,
      model_type='bpe',
      bos_id=-1,
      eos_id=-1,
      minloglevel=2,
      **ids,
    )
  assert tokenizer.Tokenizer(str(tmp_path / 'unk0.model')).vocab_size == 40
  with pytest.raises(InputError, match='whose id 0 is the piece'):
    tokenizer.Tokenizer(str(tmp_path / 'pad5.model'))

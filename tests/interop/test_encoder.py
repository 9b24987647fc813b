"""Images and texts in, features out: against the towers called by hand."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from PIL import Image

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.data import tokenizer
from tips_jax.data.pixels import views
from tips_jax.interop.encoder import Encoder
from tips_jax.interop.weights import Weights
from tips_jax.models import towers

F32 = schema.Compute(dtype='float32')
IMAGE = schema.ViT(kind='vit', width=32, depth=2, heads=2, mlp=64, patch=4, grid=4, mask_token=True)
TEXT = schema.TextTower(kind='text', width=32, depth=2, heads=2, mlp=64, vocab=300)
HEAD = schema.ProjectionHead(kind='projection', width=32, output=24)
rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
WORDS = [
  'a red ball',
  'a blue box on the grass',
  'two cats',
  'the tall tree by the old house',
  'rain',
]
KNOWN = {
  'image': IMAGE,
  'text': TEXT,
  'logit': schema.Logit(kind='logit'),
  'image_head': HEAD,
  'text_head': HEAD,
}


def parameters(name):
  shapes = jax.eval_shape(functools.partial(towers.init, name, KNOWN[name], seed=0))
  rng = np.random.default_rng(len(name))
  return jax.tree.map(lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), shapes)


PARAMS = {name: parameters(name) for name in KNOWN}


def weights(*names, **fields):
  pick = lambda d: {name: d[name] for name in names or ('image', 'text', 'logit')}
  return Weights(
    name='test', towers=pick(KNOWN), params=pick(PARAMS), size=16, text_length=24, **fields
  )


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model'
  tokenizer.train(WORDS * 20, path, vocab_size=300)
  return path


@pytest.fixture(scope='module')
def encoder(model):
  return Encoder(weights(tokenizer=model.read_bytes()))


def by_hand(images):
  out = towers.apply(PARAMS['image'], IMAGE, F32, {'images': images[:, None]})
  return {k: np.asarray(v)[:, 0] for k, v in out.items()}


def text_by_hand(ids):
  return np.asarray(towers.apply(PARAMS['text'], TEXT, F32, {'ids': ids})['text'])


def close(a, b, atol=1e-5):
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


def test_an_array_is_taken_as_it_is(encoder):
  images = rng.integers(0, 256, (5, 18, 24, 3), np.uint8)  # padded by the tower to 20 x 24
  cls, patch = encoder.encode_image(images)
  want = by_hand(images)
  assert (
    cls.shape == (5, 2, 32)
    and patch.shape == (5, 5, 6, 32)
    and cls.dtype == patch.dtype == np.float32
  )
  close(cls, np.stack([want['web'], want['synthetic']], axis=1))
  close(patch.reshape(5, 30, 32), want['patch'])
  close(encoder.encode_image(images.astype(np.float32) / 255)[0], cls)


@pytest.mark.parametrize('count', [1, 3, 19])
def test_any_number_of_images(encoder, count):
  images = rng.integers(0, 256, (count, 16, 16, 3), np.uint8)
  close(encoder.encode_image(images)[1].reshape(count, 16, 32), by_hand(images)['patch'])


def test_few_shapes_are_compiled_and_one_image_is_no_batch():
  e = Encoder(weights(), batch_size=8, devices=jax.devices()[:1])
  for count in range(1, 20):
    e.encode_image(np.zeros((count, 16, 16, 3), np.uint8))
  assert e._image._cache_size() <= 4  # 1, 2, 4, 8
  assert e._rows(1, 16) == 1


def test_devices_split_the_rows():
  images, ids = (
    rng.integers(0, 256, (21, 16, 16, 3), np.uint8),
    rng.integers(1, 300, (21, 7)).astype(np.int32),
  )
  one, all_ = (
    Encoder(weights(), devices=jax.devices()[:1]),
    Encoder(weights(), devices=jax.devices()),
  )
  assert len(jax.devices()) == 8
  close(one.encode_image(images)[0], all_.encode_image(images)[0])
  close(one.encode_text(ids), all_.encode_text(ids))
  assert len(all_._params['image']['cls'].sharding.device_set) == 8


def test_a_tower_goes_to_the_device_when_it_is_used():
  e = Encoder(weights())
  assert not e._params
  e.encode_text(np.ones((1, 3), np.int32))
  assert set(e._params) == {'text'}


def test_files_pillow_images_and_arrays_become_one_thing(encoder, tmp_path):
  color = rng.integers(0, 256, (40, 30, 3), np.uint8)
  Image.fromarray(color).save(tmp_path / 'a.png')
  data = (tmp_path / 'a.png').read_bytes()
  want = encoder.encode_image(views.evaluation(data, 16)[None])
  for x in (tmp_path / 'a.png', str(tmp_path / 'a.png'), Image.open(tmp_path / 'a.png'), color):
    for got, one in zip(encoder.encode_image([x]), want):
      close(got, one)
  assert encoder.encode_image([color, color[:7]], size=24)[1].shape == (2, 6, 6, 32)


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'LA', '1', 'I;16'])
def test_every_mode_becomes_rgb_as_in_data(encoder, tmp_path, mode):
  gray = Image.fromarray(rng.integers(0, 256, (20, 20), np.uint8))
  if mode == 'RGBA':
    image = Image.fromarray(rng.integers(0, 256, (20, 20, 4), np.uint8))
  else:
    image = (
      Image.fromarray(np.asarray(gray).astype(np.uint16) * 256)
      if mode == 'I;16'
      else gray.convert(mode)
    )
  image.save(tmp_path / 'x.png')
  want = views.evaluation((tmp_path / 'x.png').read_bytes(), 16)
  np.testing.assert_array_equal(encoder.resize(image), want)
  np.testing.assert_array_equal(encoder.resize(tmp_path / 'x.png'), want)


def test_one_pillow_image_many_times(encoder, tmp_path):
  Image.fromarray(IMAGES[0]).resize((300, 300)).save(tmp_path / 'a.png')
  patch = encoder.encode_image([Image.open(tmp_path / 'a.png')] * 9)[1]
  close(patch, np.repeat(patch[:1], 9, axis=0))


def test_texts_are_alone_and_lower_cased(encoder, model):
  ids = tokenizer.Tokenizer(model).encode_batch(WORDS, 24)
  want = text_by_hand(ids)
  close(encoder.encode_text(WORDS), want)
  close(encoder.encode_text(ids), want)
  close(encoder.text(ids), want)
  np.testing.assert_array_equal(
    encoder.encode_text([w.upper() for w in WORDS]), encoder.encode_text(WORDS)
  )
  np.testing.assert_array_equal(
    encoder.encode_text(WORDS[:1] + ['a tree ' * 50]),
    encoder.encode_text([WORDS[0], 'a tree ' * 20]),
  )


def test_padding_is_cut_and_changes_nothing(encoder):
  ids = rng.integers(1, 300, (9, 40)).astype(np.int32)
  for i, length in enumerate((0, 1, 15, 16, 17, 32, 33, 40, 5)):
    ids[i, length:] = 0
  ids[8, 2] = 0  # a gap in the middle
  want = text_by_hand(ids)
  close(encoder.encode_text(ids), want)
  assert not encoder.encode_text(ids)[0].any()
  close(encoder.encode_text(ids[:, :33][:7]), text_by_hand(ids[:, :33][:7]))


def test_similarity_is_a_cosine_over_the_temperature(encoder):
  x, y = by_hand(IMAGES), text_by_hand(encoder.tokenizer.encode_batch(WORDS, 24))
  unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
  temperature = np.exp(PARAMS['logit']['log_temperature'])
  assert encoder.temperature == pytest.approx(temperature)
  want = lambda name: unit(x[name]) @ unit(y).T / temperature
  close(encoder.similarity(IMAGES, WORDS), want('web'))
  close(encoder.similarity(IMAGES, WORDS, cls='synthetic'), want('synthetic'))
  cls, texts = encoder.encode_image(IMAGES)[0], encoder.encode_text(WORDS)
  close(encoder.similarity(cls, texts, cls='synthetic'), want('synthetic'))
  close(encoder.similarity(cls[:, 0], texts), want('web'))
  other = Encoder(encoder.weights, cls='synthetic')
  close(other.similarity(IMAGES, WORDS), want('synthetic'))
  close(other.image(IMAGES)['embedding'], x['synthetic'])


def test_projections_and_bias(model):
  w = weights(*KNOWN, tokenizer=model.read_bytes())
  w = w.replace(params=w.params | {'logit': w.params['logit'] | {'bias': np.float32(-3)}})
  e = Encoder(w)
  x = by_hand(IMAGES)['web'] @ PARAMS['image_head']['kernel']
  y = text_by_hand(e.tokenizer.encode_batch(WORDS, 24)) @ PARAMS['text_head']['kernel']
  out = e.image(IMAGES)
  close(out['embedding'], x)
  close(out['web'], by_hand(IMAGES)['web'])
  close(e.encode_text(WORDS), y)
  cosine = x @ y.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)
  want = cosine / e.temperature - 3
  close(e.similarity(IMAGES, WORDS), want)
  close(e.similarity(e.encode_image(IMAGES)[0], e.encode_text(WORDS)), want)
  close(e.similarity(out['embedding'], y), want)


def test_nothing_gives_nothing(encoder):
  cls, patch = encoder.encode_image([])
  assert cls.shape == (0, 2, 32) and patch.shape == (0, 4, 4, 32)
  assert encoder.encode_image(np.zeros((0, 8, 12, 3), np.uint8))[1].shape == (0, 2, 3, 32)
  assert encoder.encode_text([]).shape == (0, 32)
  assert encoder.similarity([], WORDS).shape == (0, 5) and encoder.similarity(IMAGES, []).shape == (
    5,
    0,
  )


def test_evaluators_get_what_they_ask_for(encoder):
  out, want = encoder.image(IMAGES), by_hand(IMAGES)
  assert set(out) == {'web', 'synthetic', 'patch', 'embedding'}
  close(out['synthetic'], want['synthetic'])
  assert 'patch' not in encoder.features(IMAGES, patches=False)
  assert Encoder(weights('image')).text(np.ones((1, 4), np.int32)) is None


@pytest.mark.parametrize('options', [{}, {'intermediate_layers': (0, 1)}, {'values': True}])
def test_patches_that_nobody_wants_stay_on_the_device(options):
  """Of several calls of the program; everything else is the same to the last bit."""
  encoder = Encoder(weights(), batch_size=2, exact=True)
  whole, rest = (
    encoder.inspect(IMAGES, **options),
    encoder.inspect(IMAGES, patches=False, **options),
  )
  close(whole['patch'].reshape(5, 16, 32), by_hand(IMAGES)['patch'])
  assert set(whole) - set(rest) == {'patch'} and {'web', 'synthetic', 'embedding'} <= set(rest)
  assert ('intermediate_layers' in rest, 'value_patch' in rest) == (
    'intermediate_layers' in options,
    'values' in options,
  )
  jax.tree.map(np.testing.assert_array_equal, {name: whole[name] for name in rest}, rest)


def test_bfloat16_is_near_and_comes_back_as_float32(encoder):
  cls, patch = Encoder(weights(), dtype='bfloat16').encode_image(IMAGES)
  assert cls.dtype == patch.dtype == np.float32
  want = encoder.encode_image(IMAGES)[1]
  cosine = (patch * want).sum(-1) / np.linalg.norm(patch, axis=-1) / np.linalg.norm(want, axis=-1)
  assert 1e-7 < np.abs(patch - want).max() and cosine.min() > 0.99


@pytest.mark.parametrize(
  'images, message',
  [
    (IMAGES.astype(np.float32), r'floats from .*\[0, 1\]'),
    (IMAGES - np.float32(np.nan), 'floats from nan'),
    (IMAGES.astype(np.int64), 'int64'),
    (IMAGES[0], r'shape \(16, 16, 3\)'),
    ('a.png', 'got str'),
    (IMAGES[..., :1], 'B, H, W, 3'),
    ([3], 'got int'),
    ([IMAGES[0] / 255], 'float64'),
    (['missing.png'], "cannot read 'missing.png'"),
    (np.zeros((2, 0, 4, 3), np.uint8), 'shape'),
  ],
)
def test_bad_images_are_one_clear_error(encoder, images, message):
  with pytest.raises(InputError, match=message):
    encoder.encode_image(images)


def test_a_broken_file_is_named(encoder, tmp_path):
  (tmp_path / 'bad.jpg').write_bytes(b'no image')
  with pytest.raises(InputError, match='bad.jpg.*no known image format'):
    encoder.encode_image([IMAGES[0], tmp_path / 'bad.jpg'])


def test_bad_texts_and_missing_parts(encoder):
  image_only, no_tokenizer = Encoder(weights('image')), Encoder(weights())
  for call, message in [
    (lambda: image_only.encode_text(WORDS), 'a text tower'),
    (lambda: image_only.temperature, 'a temperature'),
    (lambda: no_tokenizer.encode_text(WORDS), 'carries no tokenizer'),
    (lambda: encoder.encode_text('a cat'), 'expected a list of str'),
    (lambda: encoder.encode_text(np.ones((2, 3))), 'float64'),
    (lambda: encoder.encode_text(np.full((1, 3), 300)), 'expected 0 to 299'),
    (lambda: encoder.encode_text([1, 2]), 'ids'),
    (lambda: encoder.similarity(IMAGES, WORDS, cls='wep'), "did you mean 'web'"),
    (lambda: encoder.similarity(np.ones((2, 5), np.float32), WORDS), r'\(2, 5\)'),
    (lambda: encoder.encode_image([IMAGES[0]], size=0), 'size'),
    (lambda: Encoder(weights(), dtype='float16'), 'dtype'),
    (lambda: Encoder(weights(), batch_size=0), 'batch_size'),
  ]:
    with pytest.raises(InputError, match=message):
      call()


def test_weights_are_not_changed(encoder):
  assert encoder.weights.params['image'] is PARAMS['image'] and dataclasses.is_dataclass(
    encoder.weights
  )
  assert (encoder.size, encoder.patch, encoder.width) == (16, 4, 32)

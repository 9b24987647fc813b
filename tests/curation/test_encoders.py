"""Dual encoders of transformers and of ours, as the steps use them."""

import json

import jax
import numpy as np
import pytest

import tips_jax
from tests.curation.test_looks import photo
from tests.test_curate import record, run, write
from tips_jax.core import schema as core_schema
from tips_jax.core.errors import InputError
from tips_jax.curation import encoders
from tips_jax.data import store, tokenizer
from tips_jax.interop.weights import Weights
from tips_jax.interop.write import write as write_weights
from tips_jax.models import towers


def test_a_dual_encoder_of_transformers(tmp_path):
  transformers = pytest.importorskip('transformers')
  words = ['<|startoftext|>', '<|endoftext|>', 'a</w>', 'b</w>', 'c</w>']
  (tmp_path / 'vocab.json').write_text(json.dumps({word: i for i, word in enumerate(words)}))
  (tmp_path / 'merges.txt').write_text('#version: 0.2\n')
  tokenizer = transformers.CLIPTokenizer(str(tmp_path / 'vocab.json'), str(tmp_path / 'merges.txt'))
  size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
  text = dict(size, vocab_size=5, max_position_embeddings=8, bos_token_id=0, eos_token_id=1)
  config = transformers.CLIPConfig(
    text_config=text, vision_config=dict(size, image_size=32, patch_size=16), projection_dim=8
  )
  images = transformers.CLIPImageProcessor(size={'shortest_edge': 32}, crop_size=32)
  transformers.set_seed(0)
  transformers.CLIPModel(config).save_pretrained(tmp_path / 'clip')
  transformers.CLIPProcessor(images, tokenizer).save_pretrained(tmp_path / 'clip')
  name = f'hf:{tmp_path / "clip"}'
  pictures = [encoders.prepare(name, photo(seed)) for seed in range(3)]
  together = encoders.image_features(name, pictures)
  assert together.shape == (3, 8)
  np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(
    encoders.image_features(name, pictures[1:2])[0], together[1], atol=1e-5
  )
  texts = encoders.text_features(name, ['a b', 'a c a'])
  np.testing.assert_allclose(encoders.text_features(name, ['a b'])[0], texts[0], atol=1e-5)
  assert not np.allclose(texts[0], texts[1])


def test_an_encoder_of_ours(tmp_path):
  tower = dict(width=16, depth=1, heads=2, mlp=16)
  towers_of = {
    'image': core_schema.ViT(
      kind='vit', patch=8, grid=2, mask_token=True, cls=('web', 'synthetic'), **tower
    ),
    'text': core_schema.TextTower(kind='text', vocab=300, **tower),
    'logit': core_schema.Logit(kind='logit'),
  }
  texts = ['a red thing', 'a blue one', 'the green']
  tokenizer.train(texts * 20, tmp_path / 'tokenizer.model', vocab_size=300)
  weights = Weights(
    name='t',
    towers=towers_of,
    params={k: jax.device_get(towers.init(k, t, seed=0)) for k, t in towers_of.items()},
    size=16,
    tokenizer=(tmp_path / 'tokenizer.model').read_bytes(),
  )
  (tmp_path / 'model').mkdir()
  write_weights(weights, 'safetensors', tmp_path / 'model')
  name = str(tmp_path / 'model')
  records = [record(str(i), photo(i), texts[i]) for i in range(3)]
  source = write(tmp_path / 'in', train=records)
  images = [encoders.prepare(name, photo(i)) for i in range(3)]
  expected = encoders.image_features(name, images) * encoders.text_features(name, texts)
  expected = expected.sum(1)
  # The other CLS token is another encoder.
  other = f'{name}#synthetic'
  token = tips_jax.load(name).encode_image([photo(0)])[0][0, 1]
  [found] = encoders.image_features(other, images[:1])
  np.testing.assert_allclose(found, token / np.linalg.norm(token), atol=1e-5)
  assert encoders.identity(other) != encoders.identity(name)
  with pytest.raises(InputError, match="CLS token: got 'synthetics'; .*'synthetic'?"):
    encoders.load(f'{name}#synthetics')
  best = str(np.argmax(expected))
  stay, went = run(source, tmp_path / 'out', dict(kind='similarity', encoder=name, best=0.34))
  assert stay == [best]
  for key, line in went.items():
    assert line['why'].startswith(f'similarity {expected[int(key)]:.3f}')
  [made] = store.open_store(tmp_path / 'out').info['curation']
  assert made['encoders'] == {name: tips_jax.load(name).sha256}

"""Runs that start from weights of another format: what is taken, what starts fresh, what is
refused.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import vitb
from tests.interop import conftest as interop
from tests.runs.test_checkpoint import assert_equal, begin, different, write
from tips_jax.core import schema, strict, tree
from tips_jax.core.errors import InputError
from tips_jax.interop import write as files
from tips_jax.interop.official import pytorch
from tips_jax.interop.weights import Weights, fit_positions, flat
from tips_jax.train import initialization as start_lib


@pytest.fixture(scope='module')
def weights(small):
  """A model of the sizes of tips_v1's runlocal towers."""
  towers = {k: small.config('tips_v1').towers[k] for k in ('image', 'text', 'logit')}
  params = {k: interop.parameters(k, t, seed=5) for k, t in towers.items()}
  return Weights(name='tiny', towers=towers, params=params)


@pytest.fixture(scope='module')
def tokenizer_model(tmp_path_factory):
  from tips_jax.data import tokenizer

  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model'
  tokenizer.train(interop.WORDS, path, vocab_size=300)
  return path.read_bytes()


@pytest.mark.parametrize('format', ['hf', 'official_torch', 'official_jax', 'safetensors'])
def test_every_format_starts_a_run(small, weights, tokenizer_model, tmp_path, format):
  files.write(weights.replace(tokenizer=tokenizer_model), format, tmp_path)
  said = []
  state, fresh = begin(small, 'tips_v1', said, init_from=str(tmp_path)), small.host_state('tips_v1')
  for tower in ('image', 'text', 'logit'):
    for name, x in flat(weights.params[tower]).items():
      found = np.asarray(flat(state.params[tower])[name])
      if name == 'mask_token' and format == 'official_jax':  # it has no place for one
        assert not found.any()
        continue
      np.testing.assert_allclose(
        found, x, rtol=0, atol=3e-7 if name == 'log_temperature' else 0, err_msg=name
      )
  assert_equal(state.params['head'], fresh.params['head'])
  assert_equal(
    state.teachers['ema']['image'], state.params['image']
  )  # an EMA teacher starts as the student
  assert any('fresh: head' in line for line in said)
  assert any('teachers, losses and optimizer start fresh' in line for line in said)


def test_adapters_start_fresh_and_this_is_said(small, weights, tmp_path):
  """From weights without them, and with them; a model without them cannot take them."""
  for folder in ('plain', 'adapted'):
    (tmp_path / folder).mkdir()
  files.write(weights, 'official_torch', tmp_path / 'plain')
  on = dict(towers=dict(image=dict(adapters=dict(width=4))))
  said = []
  state = begin(small, 'tips_v1', said, init_from=str(tmp_path / 'plain'), **on)
  [line] = [line for line in said if line.startswith('params from')]
  found = flat(state.params['image'])
  added = {name for name in found if '/adapter' in name}
  assert len(added) == 12 and all(f'image/{name}' in line.split('fresh: ')[1] for name in added)
  for name, x in flat(weights.params['image']).items():
    np.testing.assert_array_equal(found[name], x)
  assert not any(np.any(found[name]) for name in added if '/up/' in name)
  assert np.any(found['encoder/blocks/adapter1/down/kernel'])

  tower = dataclasses.replace(weights.image, adapters=schema.Adapters(width=4))
  params = weights.params | {'image': interop.parameters('image', tower, seed=6)}
  adapted = weights.replace(towers=weights.towers | {'image': tower}, params=params)
  files.write(adapted, 'safetensors', tmp_path / 'adapted')
  state = begin(small, 'tips_v1', [], init_from=str(tmp_path / 'adapted'), **on)
  assert_equal(state.params['image'], params['image'])
  with pytest.raises(InputError, match='got image/encoder/blocks/adapter1/.*; expected none'):
    begin(small, 'tips_v1', [], init_from=str(tmp_path / 'adapted'))
  for format in ('hf', 'official_torch', 'official_jax'):
    with pytest.raises(InputError, match=f'--to={format}: .*--to=onnx and --to=safetensors hold'):
      files.write(adapted, format, tmp_path)


def test_rules_choose_the_image_tower_alone(small, weights, tmp_path):
  files.write(weights, 'official_torch', tmp_path)
  said = []
  state = begin(
    small,
    'tips_v1',
    said,
    init_from=str(tmp_path),
    init_from_rules=(('image/.*', True), ('.*', False)),
  )
  fresh = small.host_state('tips_v1')
  assert_equal(state.params['image'], weights.params['image'])
  assert_equal(state.params['text'], fresh.params['text'])
  assert any('fresh: head, logit, text' in line for line in said)


@pytest.mark.once
def test_rules_choose_of_a_run_too(small, tmp_path):
  state = different(small.host_state('tips_v2')).replace(step=np.int32(7))
  write(tmp_path, small.place(small.method('tips_v2'), small.mesh(8, data=2, fsdp=4), state))
  found = begin(
    small,
    'tips_v2',
    init_from=str(tmp_path),
    init_parts=('params',),
    init_from_rules=(('image/.*', True), ('.*', False)),
  )
  assert_equal(found.params['image'], state.params['image'])
  assert_equal(found.params['text'], small.host_state('tips_v2').params['text'])


def test_a_grid_is_resized_from_a_run_and_from_a_file(small, weights, tmp_path):
  state = different(small.host_state('tips_v2')).replace(step=np.int32(7))
  write(
    tmp_path / 'run', small.place(small.method('tips_v2'), small.mesh(8, data=2, fsdp=4), state)
  )
  files_folder = tmp_path / 'files'
  files_folder.mkdir()
  files.write(weights, 'safetensors', files_folder)
  for path, table in ((tmp_path / 'run', state.params), (files_folder, weights.params)):
    said = []
    found = begin(
      small,
      'tips_v2',
      said,
      init_from=str(path),
      init_parts=('params',),
      towers=dict(image=dict(grid=8)),
    )
    expected = jax.image.resize(table['image']['posembed'], (1, 8, 8, 32), 'bilinear')
    np.testing.assert_allclose(found.params['image']['posembed'], expected, atol=2e-6)
    assert 'image/posembed: resized from 4x4 to 8x8' in said


def test_high_resolution_file_of_the_first_release(small, weights, tmp_path):
  """PyTorch's holds the 4 x 4 table of a model at 8 x 8; ours is 4 x 4 again, and any other table
  is refused.
  """
  image = weights.params['image']
  large = weights.replace(
    towers={**weights.towers, 'image': interop.schema.ViT(**vars(weights.image) | {'grid': 8})}
  )
  for name, table, fits in (
    ('up', fit_positions(image['posembed'], 8, 'x'), True),
    ('own', np.random.default_rng(0).normal(size=(1, 8, 8, 32)).astype(np.float32), False),
  ):
    folder = tmp_path / name
    folder.mkdir()
    params = {**weights.params, 'image': {**image, 'posembed': table}}
    files.write(large.replace(params=params), 'official_torch', folder)
    if fits:
      found = begin(small, 'tips_v1', init_from=str(folder))
      np.testing.assert_allclose(found.params['image']['posembed'], image['posembed'], atol=1e-5)
    else:
      with pytest.raises(
        InputError, match='got a table of 8 x 8 positions that no 4 x 4 one gives'
      ):
        begin(small, 'tips_v1', init_from=str(folder))


def test_a_shape_that_does_not_fit(small, weights, tmp_path):
  files.write(weights, 'official_jax', tmp_path)
  with pytest.raises(InputError, match='init_from: .*text/.*mlp/.*got shape .* expected'):
    begin(small, 'tips_v1', init_from=str(tmp_path), towers=dict(text=dict(mlp=96)))
  with pytest.raises(InputError, match='got no image/encoder/blocks/mlp/gate'):
    begin(small, 'tips_v1', init_from=str(tmp_path), towers=dict(image=dict(ffn='swiglu')))


def test_word_embeddings_of_another_tokenizer(small, weights, tokenizer_model, tmp_path):
  files.write(weights.replace(tokenizer=tokenizer_model), 'safetensors', tmp_path)
  method, mesh = small.method('tips_v1', init_from=str(tmp_path)), small.mesh(8, data=4, fsdp=2)
  abstract = small.abstract(method, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  start = lambda method, sha: start_lib.initial_state(
    method, shardings, abstract, print, tokenizer_sha256=sha
  )
  with pytest.raises(InputError, match='word embeddings of another tokenizer'):
    start(method, 'f' * 64)
  image_only = small.method(
    'tips_v1', init_from=str(tmp_path), init_from_rules=(('text/.*', False), ('.*', True))
  )
  assert_equal(start(image_only, 'f' * 64).params['image'], weights.params['image'])


def test_a_frozen_teacher_from_a_file(small, weights, tmp_path):
  files.write(weights, 'official_torch', tmp_path)
  with pytest.raises(
    InputError, match="has no 'head'; expected all of .*released weights come without heads"
  ):
    begin(small, 'tips_distill', teachers=dict(large=dict(init_from=str(tmp_path))))


def test_layer_scale_of_a_foreign_file_is_folded(small, weights, tmp_path):
  files.write(weights, 'official_torch', tmp_path)
  file = tmp_path / 'tiny_vision.npz'
  arrays = files.arrays.read_npz(file)
  arrays['blocks.0.ls1.gamma'] = np.full(32, 3, np.float32)
  files.arrays.write_npz(file, arrays)
  # Only what we wrote has a digest.
  contract = json.loads((tmp_path / 'tips_jax.json').read_text())
  del contract['sha256'][file.name]
  (tmp_path / 'tips_jax.json').write_text(json.dumps(contract))
  found = begin(small, 'tips_v1', init_from=str(tmp_path)).params['image']
  expected = pytorch.image_in(arrays, weights.image)
  assert_equal(found, expected)
  out = lambda p: dict(tree.named_leaves(p))['encoder/blocks/attention/out/kernel'][0]
  np.testing.assert_allclose(out(found), 3 * out(weights.params['image']), rtol=1e-6)


def test_weights_that_must_be_given_are_asked_for():
  high = strict.build(schema.Config, vitb.get_config('hr').to_dict())
  with pytest.raises(InputError, match='^init_from: missing; expected the run of the stage before'):
    start_lib.require_sources(high)
  start_lib.require_sources(dataclasses.replace(high, init_from='run'))
  start_lib.require_sources(dataclasses.replace(high, init_required=False))
  distilled = strict.build(schema.Config, vitb.get_config('distill').to_dict())
  with pytest.raises(InputError, match='^teachers.large.init_from: missing; expected a trained'):
    start_lib.require_sources(distilled)


def test_a_file_of_which_nothing_is_taken_is_an_error(small, weights, tmp_path):
  files.write(weights, 'safetensors', tmp_path)
  with pytest.raises(InputError, match="of which nothing is taken; expected .*there \\['image'"):
    begin(
      small, 'tips_v1', init_from=str(tmp_path), init_from_rules=(('head/.*', True), ('.*', False))
    )
  with pytest.raises(InputError, match=r"init_parts: got .*expected one of \['params'\]"):
    begin(small, 'tips_v1', init_from=str(tmp_path), init_parts=('teachers', 'optimizer'))

"""The decoder equals transformers' Tipsv2Dpt and Flax's layers; official files have the released
names; training learns.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.core import tree
from tips_jax.core.errors import InputError
from tips_jax.evals.probes import depth as depth_lib
from tips_jax.evals.probes import dpt, dpt_train, normals

pytestmark = pytest.mark.once

WIDTH, CHANNELS, BINS = 16, 12, 256
WIDTHS = (2, 4, 8, 16)


def random_layers(*, batch=2, h=4, w=5, seed=0, width=WIDTH):
  rng = np.random.default_rng(seed)
  return [
    (
      rng.normal(size=(batch, h, w, width)).astype(np.float32),
      rng.normal(size=(batch, width)).astype(np.float32),
    )
    for _ in range(4)
  ]


def random_params(outputs, seed=0):
  rng = np.random.default_rng(seed)  # biases that are not zero
  shapes = jax.eval_shape(
    lambda key: dpt.init(key, width=WIDTH, outputs=outputs, channels=CHANNELS), jax.random.key(0)
  )
  return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), shapes)


def test_initial_kernels_keep_the_scale_of_their_inputs():
  params = dpt.init(jax.random.key(0), width=64, outputs=5, channels=48)
  sums = {
    'reassemble/0/readout': 128,
    'reassemble/0/up': 8,
    'reassemble/3/down': 9 * 64,
    'convs/3': 9 * 64,
    'fusion/2/main/conv1': 9 * 48,
    'head': 48,
  }
  leaves = dict(tree.named_leaves(params))
  for name, fan in sums.items():
    kernel = np.asarray(leaves[f'{name}/kernel'])
    assert kernel.std() * np.sqrt(3 * fan) == pytest.approx(1, abs=4 / np.sqrt(2 * kernel.size))
    assert np.abs(kernel).max() <= 1 / np.sqrt(fan)
  assert all(not x.any() for n, x in leaves.items() if n.endswith('bias'))
  first, second = (np.ravel(leaves[f'fusion/{i}/main/conv1/kernel']) for i in (1, 2))
  assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def transformers_model(labels=7):
  torch = pytest.importorskip('torch')
  models = pytest.importorskip('transformers')
  if not hasattr(models, 'Tipsv2DptForDensePrediction'):
    pytest.skip('this transformers has no Tipsv2Dpt')
  backbone = dict(
    model_type='tipsv2_vision_model',
    hidden_size=WIDTH,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=28,
    patch_size=7,
    out_indices=[1, 2, 3, 4],
    apply_layernorm=True,
    reshape_hidden_states=False,
  )
  torch.manual_seed(0)
  config = models.Tipsv2DptConfig(
    backbone_config=backbone,
    neck_hidden_sizes=list(WIDTHS),
    num_labels=labels,
    fusion_hidden_size=CHANNELS,
    num_depth_bins=BINS,
  )
  model = models.Tipsv2DptForDensePrediction(config).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.05 * torch.randn_like(p))
  return torch, model


def with_decoders(torch, model, folder):
  """(the model with random decoders of ours in its own file, their parameters by task)."""
  safetensors = pytest.importorskip('safetensors.numpy')
  model.save_pretrained(folder)  # under the official names
  file = folder / 'model.safetensors'
  arrays = safetensors.load_file(file)
  decoders = {}
  for seed, (task, outputs) in enumerate({'depth': BINS, 'normals': 3, 'segmentation': 7}.items()):
    decoders[task] = random_params(outputs, seed)
    exported = dpt.export(decoders[task], task=task, format='hf')
    theirs = {name: x.shape for name, x in arrays.items() if name.startswith(f'{task}_head.')}
    assert {name: x.shape for name, x in exported.items()} == theirs and len(theirs) == 52
    arrays |= exported
  safetensors.save_file(arrays, file, metadata={'format': 'pt'})
  return type(model).from_pretrained(folder).eval(), decoders


@pytest.mark.parametrize('grid', [(4, 5), (5, 3), (1, 1)])
def test_equals_transformers_on_the_same_weights_and_features(grid, tmp_path):
  torch, model = transformers_model()
  model, decoders = with_decoders(torch, model, tmp_path)
  model = model.double()  # so that only our own rounding is compared with the tolerance
  intermediate_layers = random_layers(h=grid[0], w=grid[1])
  tokens = model.config.backbone_config.num_register_tokens
  hidden = [
    torch.tensor(
      np.concatenate(
        [c[:, None], np.zeros((len(c), tokens, WIDTH), np.float32), p.reshape(len(p), -1, WIDTH)], 1
      ),
      dtype=torch.float64,
    )
    for p, c in intermediate_layers
  ]
  with torch.no_grad():
    neck = lambda name: getattr(model, f'{name}_neck')(
      hidden, patch_height=grid[0], patch_width=grid[1]
    )[-1]
    logits = model.depth_decoder(neck('depth'))
    expected = {'depth': logits}
    if grid == (4, 5):
      expected |= {
        'normals': model.normals_decoder(neck('normals')),
        'segmentation': model.segmentation_decoder(neck('segmentation')),
      }
    meters = model.depth_bin_regressor(logits).numpy()
  for task, value in expected.items():
    found = dpt.apply(decoders[task], intermediate_layers, relu=task == 'depth')
    assert found.shape[1:3] == tuple(16 * -(-n // 2) for n in grid)
    scale = float(value.std())  # about 100 with these weights
    np.testing.assert_allclose(found / scale, value.permute(0, 2, 3, 1).numpy() / scale, atol=1e-5)
  np.testing.assert_allclose(
    dpt.depth(decoders['depth'], intermediate_layers), meters, atol=1e-4, rtol=1e-4
  )


def test_a_whole_model_gives_the_depth_of_its_intermediate_layers(tmp_path):
  """They are the outputs of the blocks after the final norm, with the first CLS token."""
  torch, model = transformers_model()
  model, decoders = with_decoders(torch, model, tmp_path)
  images = torch.rand(2, 3, 28, 35)
  with torch.no_grad():
    output = model(images)
    maps = model.backbone(images).feature_maps
  skip = 1 + model.config.backbone_config.num_register_tokens
  intermediate_layers = [
    (m[:, skip:].reshape(2, 4, 5, WIDTH).numpy(), m[:, 0].numpy()) for m in maps
  ]
  np.testing.assert_allclose(
    dpt.depth(decoders['depth'], intermediate_layers),
    output.predicted_depth.numpy(),
    atol=1e-4,
    rtol=1e-4,
  )


@pytest.mark.parametrize('format', ['official_torch', 'official_jax'])
@pytest.mark.parametrize('task, outputs', [('depth', BINS), ('normals', 3), ('segmentation', 5)])
def test_official_files_have_the_names_of_the_released_ones(format, task, outputs, tmp_path):
  params = random_params(outputs)
  path = tmp_path / 'decoder.npz'
  dpt.write_official(params, path, task=task, format=format)
  with np.load(path) as file:
    assert len(file.files) == 52  # as the official notebooks print
    names = set(file.files)
    exported = dpt.export(params, task=task, format=format)
    assert names == set(exported)
    for name in names:
      np.testing.assert_array_equal(file[name], exported[name])
  if format == 'official_jax':
    assert {
      'decoder/dpt/reassemble_blocks/out_projection_0/kernel',
      'decoder/dpt/fusion_blocks_3/Conv_0/bias',
      'decoder/dpt/fusion_blocks_1/PreActResidualConvUnit_1/conv2/kernel',
      f'decoder/{dpt.TASKS[task]}/bias',
      'decoder/dpt/convs_2/kernel',
      'decoder/dpt/project/bias',
    } <= names
    assert 'decoder/dpt/fusion_blocks_0/PreActResidualConvUnit_1/conv1/kernel' not in names
  else:
    assert {
      'reassemble.resize_layers.3.weight',
      'fusion_blocks.0.main_unit.conv1.weight',
      'convs.3.weight',
      'fusion_blocks.1.residual_unit.conv2.weight',
      f'{task}_head.weight',
    } <= names


def test_a_decoder_is_read_back_from_the_arrays_of_a_hugging_face_model():
  decoders = {
    task: random_params(outputs)
    for task, outputs in (('depth', BINS), ('normals', 3), ('segmentation', 5))
  }
  arrays = {'vision_encoder.cls_token': np.zeros((1, 1, WIDTH), np.float32)}
  for task, params in decoders.items():
    arrays |= dpt.export(params, task=task, format='hf')
  for task, params in decoders.items():
    again = dpt.read_hf(arrays, task=task, where='model')
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_arrays_that_are_no_decoder_are_one_clear_error():
  arrays = dpt.export(random_params(3), task='normals', format='hf')

  def refused(message, **changes):
    with pytest.raises(InputError, match=message):
      dpt.read_hf({**arrays, **changes}, task='normals', where='model')

  with pytest.raises(InputError, match="model: got no 'depth_head.depth_head.weight'"):
    dpt.read_hf(arrays, task='depth', where='model')
  refused('expected .12, 12, 3, 3.', **{'normals_head.project.weight': np.zeros((12, 12, 3, 2))})
  refused('got 1 arrays that no part', **{'normals_head.extra': np.zeros(1)})


def test_the_jax_file_holds_what_flax_layers_read():
  """Up- and down-sampling by Flax's own layers on the exported kernels equals ours: the mirroring
  is right.
  """
  params = random_params(3)
  arrays = dpt.export(params, task='normals', format='official_jax')
  x = np.random.default_rng(1).normal(size=(2, 3, 4, WIDTHS[0])).astype(np.float32)
  kernel, bias = (
    arrays[f'decoder/dpt/reassemble_blocks/resize_layers_0/{n}'] for n in ('kernel', 'bias')
  )
  layer = nn.ConvTranspose(WIDTHS[0], (4, 4), strides=(4, 4), padding=3)
  theirs = layer.apply({'params': {'kernel': kernel, 'bias': bias}}, x)
  up = params['reassemble']['0']['up']
  ours = jnp.einsum('bhwc,ijcd->bhiwjd', x, up['kernel']).reshape(2, 12, 16, -1) + up['bias']
  np.testing.assert_allclose(theirs, ours, atol=1e-5)
  kernel, bias = (
    arrays[f'decoder/dpt/reassemble_blocks/out_projection_3/{n}'] for n in ('kernel', 'bias')
  )
  patch = random_layers()[3][0]
  theirs = nn.Conv(WIDTHS[3], (1, 1)).apply({'params': {'kernel': kernel, 'bias': bias}}, patch)
  project = params['reassemble']['3']['project']
  np.testing.assert_allclose(theirs, patch @ project['kernel'] + project['bias'], atol=1e-5)


def test_the_uncertainty_stays_out_of_official_files_and_in_our_own(tmp_path):
  params = random_params(4)
  intermediate_layers = random_layers()
  exported = dpt.export(params, task='normals')
  np.testing.assert_array_equal(exported['normals_head.weight'], params['head']['kernel'][:, :3].T)
  np.testing.assert_array_equal(exported['normals_head.bias'], params['head']['bias'][:3])
  own = dpt_train.Decoder(params=params, task='normals')
  own.save(tmp_path / 'b.npz')
  again = dpt_train.load(tmp_path / 'b.npz')
  assert again.task == 'normals' and again.max_depth == own.max_depth
  np.testing.assert_array_equal(
    again.predict(intermediate_layers), own.predict(intermediate_layers)
  )


def test_bad_files_and_arguments_are_one_clear_error(tmp_path):
  params, path = random_params(BINS), tmp_path / 'x.npz'
  dpt_train.Decoder(params=params, task='depth').save(path)
  whole = path.read_bytes()
  for content in (whole[: len(whole) // 2], b'no zip', b''):
    path.write_bytes(content)
    with pytest.raises(InputError, match='x.npz'):
      dpt_train.load(path)
  with pytest.raises(InputError, match='missing.npz'):
    dpt_train.load(tmp_path / 'missing.npz')
  with pytest.raises(InputError, match='expected one of'):
    dpt.export(params, task='deph')
  with pytest.raises(InputError, match='expected one of'):
    dpt.export(params, task='depth', format='npz')
  with pytest.raises(InputError, match='4: '):
    dpt.apply(params, random_layers()[:3])
  with pytest.raises(InputError, match='task'):
    dpt_train.DPTRecipe(task='segmentation')
  for task, truth in (('depth', np.zeros((8, 8))), ('normals', np.zeros((8, 8, 3)))):
    with pytest.raises(InputError, match='no pixel'):
      dpt_train.fit(random_layers(), lambda i: truth, dpt_train.DPTRecipe(task=task))


def test_the_blocks_are_the_published_ones():
  assert dpt.intermediate_layers_of(12) == (2, 5, 8, 11) and dpt.intermediate_layers_of(24) == (
    5,
    11,
    17,
    23,
  )
  assert dpt.intermediate_layers_of(27) == (6, 13, 20, 26) and dpt.intermediate_layers_of(40) == (
    9,
    19,
    29,
    39,
  )
  assert (
    dpt.intermediate_layers_of(4) == (0, 1, 2, 3)
    and dpt.intermediate_layers_of(8) == (1, 3, 5, 7)
    and dpt.intermediate_layers_of(6)[-1] == 5
  )
  assert dpt.intermediate_layers_of(1) == (0, 0, 0, 0)


@pytest.mark.parametrize('shape', [(8, 8), (5, 11), (3, 2)])
def test_bicubic_equals_pytorch(shape):
  torch = pytest.importorskip('torch')
  x = np.random.default_rng(0).normal(size=(2, 4, 3, 5)).astype(np.float32)
  theirs = torch.nn.functional.interpolate(
    torch.tensor(x).permute(0, 3, 1, 2), shape, mode='bicubic'
  )
  np.testing.assert_allclose(
    dpt_train.bicubic(x, shape), theirs.permute(0, 2, 3, 1).numpy(), atol=1e-5
  )


def test_the_schedule_is_probe3ds():
  recipe = dpt_train.DPTRecipe(task='depth')  # of 80 images: 100 steps, 15 of them warm-up
  assert recipe.steps(80) == 100
  for step in (0, 7, 15, 16, 60, 100):
    expected = (
      0.99 * step / 15 + 0.01
      if step <= 15
      else 0.99 * np.cos(0.5 * np.pi * (step - 15) / 85) + 0.01
    )
    assert float(recipe.schedule(step, images=80)) == pytest.approx(5e-4 * expected, rel=1e-4)


def test_without_uncertainty_the_loss_is_the_angle_at_the_size_of_the_truth():
  params, intermediate_layers = random_params(3), random_layers()
  truth = normals.unit(np.random.default_rng(0).normal(size=(2, 20, 30, 3))).astype(np.float32)
  truth[:, 5:] = 0
  recipe = dpt_train.DPTRecipe(task='normals', uncertainty=False)
  predicted = normals.unit(dpt_train.bicubic(dpt.apply(params, intermediate_layers), (20, 30)))
  cosine = (np.asarray(predicted) * truth).sum(-1)[:, :5]
  found = float(dpt_train._loss(params, intermediate_layers, truth, recipe))
  assert found == pytest.approx(np.arccos(np.clip(cosine, -1, 1)).mean(), abs=1e-3)


def synthetic(count, seed):
  """Four intermediate_layers whose features hold depth and normal of each patch; truths at 8 pixels
  a patch, one corner missing.
  """
  rng = np.random.default_rng(seed)
  meters = rng.uniform(1, 5, (count, 3, 3))
  vectors = normals.unit(rng.normal(size=(count, 3, 3, 3)) + [0, 0, 1])
  hidden = np.concatenate([meters[..., None] - 3, 2 * vectors], -1) @ np.random.default_rng(
    9
  ).normal(size=(4, 8))
  intermediate_layers = [(hidden.astype(np.float32), np.zeros((count, 8), np.float32))] * 4
  big = lambda x: x.repeat(8, 1).repeat(8, 2).astype(np.float32)
  depth, normal = big(meters), big(vectors)
  depth[:, :3, :3], normal[:, :3, :3] = 0, 0
  return intermediate_layers, depth, normal


@pytest.mark.parametrize('task, uncertainty', [('depth', False), ('normals', True)])
def test_training_beats_the_naive_baselines(task, uncertainty):
  intermediate_layers, depth, normal = synthetic(40, 0)
  test_layers, *test_truth = synthetic(10, 1)
  truth, held = (depth, test_truth[0]) if task == 'depth' else (normal, test_truth[1])
  decoder = dpt_train.fit(
    intermediate_layers,
    truth.__getitem__,
    dpt_train.DPTRecipe(
      task=task,
      channels=16,
      epochs=24,
      learning_rate=1e-3,
      bins=32,
      uncertainty=uncertainty,
    ),
  )
  lib, scorer = depth_lib, depth_lib.DepthScorer()
  if task == 'normals':
    lib, scorer = normals, normals.NormalScorer()
  predicted = decoder.predict(test_layers)
  assert predicted.shape == (10, 32, 32) + (() if task == 'depth' else (3 + uncertainty,))
  for p, t in zip(predicted, held):
    scorer.add(p, t)
  naive = lib.baselines(truth.__getitem__, range(40), held.__getitem__, range(10))
  best = min(metrics['rmse_pooled'] for metrics in naive.values())
  assert scorer.result()['rmse_pooled'] < 0.75 * best
  assert (
    np.isfinite(decoder.losses).all() and decoder.losses[-5:].mean() < decoder.losses[:5].mean()
  )

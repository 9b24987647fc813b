"""The image tower and the pixel decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tips_jax.core import parallel, schema
from tips_jax.core.errors import InputError
from tips_jax.interop import weights
from tips_jax.models import attention, attention_tpu, sines, towers, vit

F32 = schema.Compute(dtype='float32')
TINY = schema.ViT(kind='vit', width=16, depth=2, heads=2, mlp=32, patch=4, grid=3, mask_token=True)
rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (2, 2, 12, 12, 3), np.uint8)


def parameters(tower):
  """No leaf is at its initial zero or one, so that each counts."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(functools.partial(towers.init, 'image', tower, seed=0))
  return jax.tree.map(lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), shapes)


PARAMS = parameters(TINY)
apply = jax.jit(towers.apply, static_argnums=(1, 2))


def run(images=IMAGES, params=PARAMS, tower=TINY, **arrays):
  return apply(params, tower, F32, {'images': images, **arrays})


def same(a, b, rtol=1e-5, atol=2e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_outputs():
  out = run()
  assert {k: v.shape for k, v in out.items()} == {
    'web': (2, 2, 16),
    'synthetic': (2, 2, 16),
    'patch': (2, 2, 9, 16),
  }
  assert np.abs(out['web'] - out['synthetic']).max() > 0.1


def test_bytes_are_floats_times_255():
  same(run(), run(IMAGES.astype(np.float32) / 255))


def test_views_and_images_do_not_meet():
  out = run(IMAGES[1:, :1])
  same(jax.tree.map(lambda x: x[1:, :1], run()), out)


def test_sizes_that_do_not_divide_are_padded_around_the_center():
  images = IMAGES[:, :, :9, :10]  # 3 rows are missing: 1 above, 2 below; 2 columns: 1 and 1
  padded = np.pad(images, [(0, 0), (0, 0), (1, 2), (1, 1), (0, 0)])
  same(run(images), run(padded))


def test_patches_are_in_reading_order():
  image = np.arange(2 * 6 * 4 * 3).reshape(2, 6, 4, 3)
  x = np.asarray(vit.patches(image, 2))
  assert x.shape == (2, 3, 2, 2, 2, 3)
  np.testing.assert_array_equal(x[1, 2, 1], image[1, 4:6, 2:4])


def test_patch_embedding_is_a_strided_convolution():
  embed = vit.PatchEmbedding(TINY, jnp.float32)
  params = {
    'kernel': rng.normal(size=(4, 4, 3, 16)).astype(np.float32),
    'bias': np.ones(16, np.float32),
  }
  x = IMAGES[0].astype(np.float32) / 255
  y = jax.lax.conv_general_dilated(
    x, params['kernel'], (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  np.testing.assert_allclose(embed.apply({'params': params}, x), y + 1, rtol=1e-5, atol=1e-5)


def test_a_centered_embedding_begins_with_pixels_of_mean_0_and_deviation_1():
  images = np.asarray(IMAGES[:, 0], np.float32) / 255
  plain, centered = (
    vit.PatchEmbedding(dataclasses.replace(TINY, centered=c), jnp.float32) for c in (False, True)
  )
  key = jax.random.key(3)
  expected = plain.apply(plain.init(key, images), (images - 0.5) * 4)
  same(centered.apply(centered.init(key, images), images), expected, rtol=1e-4, atol=1e-5)
  assert np.abs(centered.apply(centered.init(key, images), np.full_like(images, 0.5))).max() < 1e-5


def test_the_table_is_resized_to_the_grid_of_the_image():
  table = rng.normal(size=(1, 3, 3, 2)).astype(np.float32)
  np.testing.assert_array_equal(vit.positions(table, 3, 3), table)
  for h, w in ((6, 6), (2, 2), (3, 5)):
    np.testing.assert_allclose(
      vit.positions(table, h, w), jax.image.resize(table, (1, h, w, 2), 'bilinear'), rtol=1e-6
    )
  # Antialiased: halving a checkerboard gives gray, not one of its colors.
  board = (np.indices((8, 8)).sum(0) % 2).astype(np.float32)[None, :, :, None]
  assert np.abs(np.asarray(vit.positions(board, 4, 4))[0, 1:-1, 1:-1] - 0.5).max() < 0.05


def test_another_size_uses_the_resized_table():
  images = np.tile(IMAGES, (1, 1, 2, 2, 1))  # 24 x 24: a grid of 6 x 6
  out = run(images)
  assert out['patch'].shape == (2, 2, 36, 16)
  params = PARAMS | {'posembed': jax.image.resize(PARAMS['posembed'], (1, 6, 6, 16), 'bilinear')}
  same(run(images, params=params, tower=dataclasses.replace(TINY, grid=6)), out)


def test_the_mask_token_replaces_patches_before_positions():
  mask = np.zeros((2, 2, 9), bool)
  mask[:, :, [1, 5]] = True
  hidden = run(mask=mask)
  images = IMAGES.copy()
  images[:, :, :4, 4:8] = rng.integers(0, 256, (2, 2, 4, 4, 3))
  images[:, :, 4:8, 8:] = 0
  same(run(images, mask=mask), hidden)  # what is under the mask does not count
  assert np.abs(run(images)['web'] - hidden['web']).max() > 1e-3
  other = PARAMS | {'mask_token': -PARAMS['mask_token']}
  assert np.abs(run(params=other, mask=mask)['patch'] - hidden['patch']).max() > 1e-3
  same(run(params=other), run())  # and the token counts under the mask alone
  same(run(mask=np.zeros_like(mask)), run())
  a, b = (run(mask=np.ones_like(mask))['patch'][0, 0, i] for i in (0, 1))
  assert np.abs(a - b).max() > 1e-2  # masked patches still have their positions


def test_a_zero_token_is_a_zero_embedding():
  still = PARAMS['embedding'] | {'bias': np.zeros(16, np.float32)}
  params = PARAMS | {'mask_token': np.zeros((1, 16), np.float32), 'embedding': still}
  images, mask = IMAGES.copy(), np.zeros((2, 2, 9), bool)
  images[:, :, 8:, :4] = 0
  mask[:, :, 6] = True
  same(run(params=params, mask=mask), run(images, params=params))


def test_a_tower_without_a_mask_token_takes_no_mask():
  bare = schema.ViT(kind='vit', width=16, depth=1, heads=2, mlp=32, patch=4, grid=3)
  assert 'mask_token' not in parameters(bare) and 'mask_token' in PARAMS
  assert set(towers.inputs(bare)) == {'images', 'visible'} and set(towers.inputs(TINY)) == {
    'images',
    'visible',
    'mask',
  }


def test_kept_tokens_alone_are_computed():
  everything = np.tile(np.arange(9), (2, 2, 1))
  same(run(visible=everything), run())
  visible = np.tile([2, 3, 7], (2, 2, 1))
  out = run(visible=visible)
  assert out['patch'].shape == (2, 2, 3, 16)
  images = IMAGES.copy()
  images[:, :, :4, :8] = 0  # patches 0 and 1 are not visible
  same(run(images, visible=visible), out)
  order = np.tile([7, 2, 3], (2, 2, 1))
  swapped = run(visible=order)
  same(swapped['web'], out['web'])
  same(swapped['patch'], out['patch'][:, :, [2, 0, 1]])  # tokens take their positions along


@pytest.mark.parametrize('names', [('cls',), ('a', 'b', 'c')])
def test_cls_tokens_have_names(names):
  tower = schema.ViT(kind='vit', width=8, depth=1, heads=2, mlp=8, patch=4, grid=3, cls=names)
  out = run(params=parameters(tower), tower=tower)
  assert set(out) == {*names, 'patch'} == towers.outputs(tower)


DECODER = schema.PixelDecoder(
  kind='pixel_decoder', width=16, decoder_width=8, depth=1, heads=2, mlp=16, patch=4, grid=3
)


def test_positions_start_as_sines_where_asked():
  for tower, width in ((TINY, 16), (DECODER, 8)):
    tower = dataclasses.replace(tower, positions='sincos')
    table = towers.init('image', tower, seed=0)['posembed']
    np.testing.assert_allclose(table, sines.grid(3, width), rtol=1e-6)


def test_the_decoder_reads_a_cls_token_and_gives_no_pixels_for_it():
  params = parameters(DECODER)
  arrays = {
    'patch': rng.normal(size=(2, 1, 3, 16)).astype(np.float32),
    'visible': np.tile([0, 4, 8], (2, 1, 1)),
    'mask': np.tile(~np.isin(np.arange(9), [0, 4, 8]), (2, 1, 1)),
  }
  cls = rng.normal(size=(2, 1, 16)).astype(np.float32)
  decode = lambda **more: apply(params, DECODER, F32, arrays | more)['pixels']
  assert decode(cls=cls).shape == decode().shape == (2, 1, 9, 48)
  assert np.abs(decode(cls=cls) - decode(cls=-cls)).max() > 1e-3
  # The token is embedded as patches are, and has no position: by hand, without blocks' mixing.
  moved = cls.copy()
  moved[0] += 1
  assert not np.array_equal(decode(cls=moved)[0], decode(cls=cls)[0])
  np.testing.assert_array_equal(decode(cls=moved)[1], decode(cls=cls)[1])


def test_drop_path_is_drawn_for_each_crop_of_each_input():
  tower = dataclasses.replace(TINY, drop_path=0.5)
  alike = np.tile(IMAGES[:1, :1], (40, 2, 1, 1, 1))
  run_all = jax.jit(
    lambda rows: towers.apply_all(
      PARAMS,
      tower,
      F32,
      [{'images': alike}, {'images': alike[:, :1]}],
      rng=jax.random.key(0),
      rows=rows,
    )
  )
  first, second = run_all(np.arange(40))
  kinds = np.round(np.concatenate([first['web'].reshape(-1, 16), second['web'][:, 0]]), 4)
  assert 10 < len(np.unique(kinds, axis=0)) <= 16  # four branches, kept or not
  assert np.abs(first['web'][:, 0] - first['web'][:, 1]).max(1).astype(bool).mean() > 0.8
  later, _ = run_all(np.arange(20, 60))  # other rows of the batch
  same(jax.tree.map(lambda x: x[20:], first), jax.tree.map(lambda x: x[:20], later))
  plain = towers.apply(PARAMS, tower, F32, {'images': alike[:1]})
  same(plain, towers.apply(PARAMS, TINY, F32, {'images': alike[:1]}))


def test_crops_of_an_image_lie_together_for_the_kernel_and_change_nothing(monkeypatch):
  tower = dataclasses.replace(TINY, drop_path=0.5)
  parts = []
  together = attention_tpu.together

  def recorded(*args, **more):
    parts.append(together(*args, **more))
    return parts[-1]

  # flax cannot loop over Pallas' interpreter on jax 0.12; the kernel has tests of its own.
  def kernel_of_tpu(*arrays, interpret, **more):
    return attention.attention(*arrays, kernel='plain', **more)

  monkeypatch.setattr(attention_tpu, 'together', recorded)
  monkeypatch.setattr(attention_tpu, 'attention', kernel_of_tpu)
  crops = np.random.default_rng(2).integers(0, 256, (5, 3, 12, 12, 3), np.uint8)

  def run(kernel):
    compute = dataclasses.replace(F32, attention=kernel)
    inputs = [{'images': crops}, {'images': crops[:, 1:2]}]
    key = jax.random.key(0)

    def loss(params):
      outs = towers.apply_all(params, tower, compute, inputs, rng=key, rows=np.arange(5))
      return sum(jnp.sin(x).sum() for x in jax.tree.leaves(outs)), outs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)

  plain = run('plain')
  assert not parts
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, run('fused'), plain)
  assert parts == [3, 1]


def test_the_decoder_puts_visible_patches_back_in_their_places():
  params = parameters(DECODER)
  mask = np.ones((2, 1, 9), bool)
  visible = np.array([[[0, 4, 8]], [[1, 2, 5]]])
  np.put_along_axis(mask, visible, False, axis=2)
  patch = rng.normal(size=(2, 1, 3, 16)).astype(np.float32)
  decode = lambda params, patch: apply(
    params, DECODER, F32, {'patch': patch, 'visible': visible, 'mask': mask}
  )['pixels']
  out = decode(params, patch)
  assert out.shape == (2, 1, 9, 48)
  # With the encoder's blocks out of the way, a pixel depends on its own token and position alone.
  still = jax.tree.map(np.zeros_like, params['decoder'])
  bare = lambda patch: decode(params | {'decoder': still}, patch)
  moved = patch.copy()
  moved[0, 0, 1] += rng.normal(size=16)  # the patch at place 4 of image 0
  changed = np.abs(np.asarray(bare(moved)) - np.asarray(bare(patch))).max(-1)
  assert np.argwhere(changed > 1e-6).tolist() == [[0, 0, 4]]
  assert np.abs(np.asarray(out)[0, 0, 4] - np.asarray(out)[0, 0, 3]).max() > 1e-3


# --- what the evaluation reads inside -----------------------------------------------------------

DEEP = dataclasses.replace(TINY, depth=3)
DEEP_PARAMS = parameters(DEEP)
WIDE = IMAGES[:, :, :8]  # a grid of 2 x 3


def look(images=WIDE, params=DEEP_PARAMS, tower=DEEP, **options):
  return jax.jit(lambda p, x: vit.inspect(p, tower, F32, x, **options))(params, images)


def by_hand(images, params, tower):
  """NumPy, float64: the normalized tokens [B * V, T, D] after each block, and after a last block of
  values alone.
  """
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  unit = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  norm = lambda x, p: unit(x) * p['scale'] + p['bias']
  dense = lambda x, p: x @ p['kernel'] + p['bias']
  gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  cut = (
    np.asarray(vit.patches(images.reshape(-1, *images.shape[2:]), tower.patch), np.float64) / 255
  )
  n, h, w = cut.shape[:3]
  x = (
    np.einsum('bhwpqc,pqcd->bhwd', cut, params['embedding']['kernel']) + params['embedding']['bias']
  )
  x = x + np.asarray(vit.positions(np.float32(params['posembed']), h, w))
  x = np.concatenate([np.tile(params['cls'], (n, 1, 1)), x.reshape(n, h * w, -1)], axis=1)
  after = []
  for i in range(tower.depth):
    block = jax.tree.map(lambda p, i=i: p[i], params['encoder']['blocks'])
    y = norm(x, block['norm1'])
    q, k, v = (
      dense(y, block['attention'][name]).reshape(n, -1, tower.heads, tower.width // tower.heads)
      for name in ('query', 'key', 'value')
    )
    weights = np.exp(np.einsum('bqhd,bkhd->bhqk', q, k) / np.sqrt(q.shape[-1]))
    mixed = np.einsum('bhqk,bkhd->bqhd', weights / weights.sum(-1, keepdims=True), v)
    ends = []
    for read in (mixed, v):
      z = x + dense(read.reshape(x.shape), block['attention']['out'])
      ends.append(
        z + dense(gelu(dense(norm(z, block['norm2']), block['mlp']['up'])), block['mlp']['down'])
      )
    x = ends[0]
    after.append(norm(x, params['norm']))
  return after, norm(ends[1], params['norm'])


def joined(out):
  """Tokens [B * V, T, D] of an output."""
  return np.concatenate(
    [*(out[name][:, :, None] for name in DEEP.cls), out['patch']], axis=2
  ).reshape(4, -1, 16)


def test_taps_and_value_patches_by_hand():
  after, alone = by_hand(WIDE, DEEP_PARAMS, DEEP)
  out = look(intermediate_layers=(2, 0), values=True)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  for layer, number in zip(out['intermediate_layers'], (2, 0)):  # in the order that was asked for
    close(joined(layer), after[number])
  close(joined(out), after[-1])
  close(out['value_patch'].reshape(4, -1, 16), alone[:, 2:])
  assert np.abs(out['value_patch'] - out['patch']).max() > 0.1


def test_taps_have_their_gains():
  tower = dataclasses.replace(DEEP, layer_scale=0.1, last_layer_scale=0.5)
  params = parameters(tower)
  plain, folded = weights.fold_layer_scale(tower, params)
  assert plain == DEEP
  options = dict(intermediate_layers=(0, 2), values=True)
  same(look(params=params, tower=tower, **options), look(params=folded, tower=plain, **options))
  same(run(WIDE, params, tower), run(WIDE, folded, plain))


def test_the_last_block_has_a_gain_of_its_own():
  tower = dataclasses.replace(DEEP, layer_scale=0.1, last_layer_scale=0.5)
  blocks = towers.init('image', tower, seed=0)['encoder']['blocks']
  for scale in ('scale1', 'scale2'):
    expected = np.full((3, 16), 0.1, np.float32)
    expected[-1] = 0.5
    np.testing.assert_array_equal(blocks[scale]['gamma'], expected)
  with pytest.raises(InputError, match='last_layer_scale: got 0.5 with layer_scale 0'):
    dataclasses.replace(DEEP, last_layer_scale=0.5)


def test_looking_inside_changes_nothing():
  whole = run(WIDE, DEEP_PARAMS, DEEP)
  for options, more in (
    ({}, set()),
    ({'intermediate_layers': (1,)}, {'intermediate_layers'}),
    ({'values': True}, {'value_patch'}),
  ):
    out = look(**options)
    assert set(out) == set(whole) | more
    same({name: out[name] for name in whole}, whole)
  one = DEEP_PARAMS | {'encoder': jax.tree.map(lambda p: p[:1], DEEP_PARAMS['encoder'])}
  single = look(
    params=one, tower=dataclasses.replace(DEEP, depth=1), intermediate_layers=(0,), values=True
  )
  same(single['intermediate_layers'][0]['patch'], single['patch'])
  for intermediate_layers in ((3,), (-1,)):
    with pytest.raises(
      ValueError, match=r'intermediate_layers: got .*; expected numbers of blocks from 0 to 2'
    ):
      look(intermediate_layers=intermediate_layers)


def test_looking_inside_with_split_weights(mesh):
  specs = jax.tree.map(
    lambda p: P(*[None] * (p.ndim - 1), 'fsdp') if p.shape[-1] % 4 == 0 else P(), DEEP_PARAMS
  )
  local = lambda params, images, _: vit.inspect(
    params, DEEP, F32, images, intermediate_layers=(1,), values=True
  )
  images = np.tile(WIDE, (4, 1, 1, 1, 1))
  with mesh(2, 4):
    split = jax.jit(lambda p, x: parallel.map_batch(local, p, x, specs=specs))(DEEP_PARAMS, images)
  same(jax.tree.map(lambda x: x[:2], split), look(intermediate_layers=(1,), values=True))


def test_taps_and_value_patches_are_those_of_transformers():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  if not hasattr(transformers, 'Tipsv2VisionModel'):
    pytest.skip('transformers without Tipsv2')
  tower = dataclasses.replace(DEEP, mask_token=False)
  model = transformers.Tipsv2VisionModel(
    transformers.Tipsv2VisionConfig(
      hidden_size=16,
      num_hidden_layers=3,
      num_attention_heads=2,
      mlp_ratio=2,
      image_size=12,
      patch_size=4,
      hidden_act='gelu_pytorch_tanh',
    )
  ).eval()
  p, state = DEEP_PARAMS, model.state_dict()
  positions = np.concatenate([np.zeros((1, 1, 16)), p['posembed'].reshape(1, 9, 16)], axis=1)
  theirs = {
    'embeddings.cls_token': p['cls'][:, :1],
    'embeddings.register_tokens': p['cls'][:, 1:],
    'embeddings.position_embeddings': positions,
    'embeddings.patch_embeddings.projection.weight': p['embedding']['kernel'].transpose(3, 2, 0, 1),
    'embeddings.patch_embeddings.projection.bias': p['embedding']['bias'],
    'layernorm.weight': p['norm']['scale'],
    'layernorm.bias': p['norm']['bias'],
  }
  names = {
    'attention.q_proj': ('attention', 'query'),
    'attention.k_proj': ('attention', 'key'),
    'attention.v_proj': ('attention', 'value'),
    'attention.o_proj': ('attention', 'out'),
    'mlp.fc1': ('mlp', 'up'),
    'mlp.fc2': ('mlp', 'down'),
  }
  for i in range(3):
    block = jax.tree.map(lambda x, i=i: x[i], p['encoder']['blocks'])
    for name, (part, layer) in names.items():
      theirs[f'encoder.layer.{i}.{name}.weight'] = block[part][layer]['kernel'].T
      theirs[f'encoder.layer.{i}.{name}.bias'] = block[part][layer]['bias']
    for norm in ('norm1', 'norm2'):
      theirs |= {
        f'encoder.layer.{i}.{norm}.{ours}': block[norm][leaf]
        for ours, leaf in (('weight', 'scale'), ('bias', 'bias'))
      }
  assert {k for k in state if k not in theirs} == {'embeddings.mask_token'} | {
    f'encoder.layer.{i}.layer_scale{n}.lambda1' for i in range(3) for n in (1, 2)
  }
  model.load_state_dict(
    {k: torch.tensor(np.asarray(v, np.float32)) for k, v in theirs.items()}, strict=False
  )
  images, after = IMAGES.reshape(4, 12, 12, 3).astype(np.float32) / 255, []
  for layer in model.encoder.layer:
    layer.register_forward_hook(lambda module, args, out: after.append(out))
  pixels = torch.tensor(images.transpose(0, 3, 1, 2))
  with torch.inference_mode():
    model(pixel_values=pixels)
    attention = model.encoder.layer[2].attention
    attention.forward = lambda x, **_: (attention.o_proj(attention.v_proj(x)), None)
    alone = model(pixel_values=pixels).last_hidden_state[:, 2:]
    after = [model.layernorm(x) for x in after[:3]]
  out = look(images[:, None], tower=tower, intermediate_layers=(0, 1, 2), values=True)
  for layer, expected in zip(out['intermediate_layers'], after):
    np.testing.assert_allclose(joined(layer), expected, rtol=1e-4, atol=2e-5)
  np.testing.assert_allclose(out['value_patch'][:, 0], alone, rtol=1e-4, atol=2e-5)

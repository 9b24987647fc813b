"""The official layouts: tables of names and shapes, round trips, and what is folded away on
reading.
"""

import weakref

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import vitb, vitg, vitl, vits, vitso400m
from tests.interop import conftest
from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.interop.official import pytorch, scenic
from tips_jax.interop.weights import flat, initial
from tips_jax.models import towers

PAGES = {'s': vits, 'b': vitb, 'l': vitl, 'so400m': vitso400m, 'g': vitg}
LAYOUTS = {'pytorch': pytorch, 'scenic': scenic}
layouts = pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
F32 = schema.Compute(dtype='float32')


def hollow(name, tower):
  """Parameters of the right shapes that take no memory."""
  shapes = jax.eval_shape(lambda: towers.init(name, tower, seed=0))
  return jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)


def shapes_of(monkeypatch, layout, scale, grid):
  """{name: shape} of both towers of a published size, without its gigabytes."""
  image = schema.ViT(kind='vit', **PAGES[scale].IMAGE, grid=grid, mask_token=True)
  text = schema.TextTower(kind='text', **PAGES[scale].TEXT)
  params = hollow('image', image), hollow('text', text)
  monkeypatch.setattr(
    np,
    'concatenate',
    lambda parts, axis=0: np.broadcast_to(
      np.float32(0),
      tuple(
        sum(p.shape[i] for p in parts) if i == axis else n for i, n in enumerate(parts[0].shape)
      ),
    ),
  )
  return tuple(
    {k: x.shape for k, x in out.items()}
    for out in (layout.image_out(params[0], image), layout.text_out(params[1], text))
  )


# Tensors of the official modules, counted there (vision, text); elements in millions (README of
# google-deepmind/tips).
COUNTS = {
  ('pytorch', 's'): (176, 147),
  ('pytorch', 'b'): (176, 147),
  ('pytorch', 'l'): (344, 147),
  ('pytorch', 'so400m'): (386, 327),
  ('pytorch', 'g'): (568, 147),
  ('scenic', 's'): (198, 195),
  ('scenic', 'b'): (198, 195),
  ('scenic', 'l'): (390, 195),
  ('scenic', 'so400m'): (438, 435),
  ('scenic', 'g'): (726, 195),
}
SIZES = {
  's': (21.62, 33.58),
  'b': (85.71, 109.63),
  'l': (303.18, 183.92),
  'so400m': (412.44, 448.33),
  'g': (1134.65, 389.13),
}


@pytest.mark.parametrize('name,scale', COUNTS)
def test_published_sizes_have_the_official_tensors(monkeypatch, name, scale):
  image, text = shapes_of(monkeypatch, LAYOUTS[name], scale, 16)
  assert (len(image), len(text)) == COUNTS[name, scale]
  if (
    name == 'scenic'
  ):  # the other layout has LayerScale, a mask token and a position of the CLS token beside them
    millions = [sum(np.prod(s) for s in shapes.values()) / 1e6 for shapes in (image, text)]
    assert millions == pytest.approx(SIZES[scale], abs=0.006)


def test_large_high_resolution_file_has_the_elements_of_the_released_one(monkeypatch):
  image, _ = shapes_of(monkeypatch, pytorch, 'l', 32)
  assert (len(image), sum(np.prod(s) for s in image.values())) == (344, 304_016_384)


def test_shapes_of_the_pytorch_layout(monkeypatch):
  image, text = shapes_of(monkeypatch, pytorch, 'g', 32)
  assert image['pos_embed'] == (1, 1025, 1536) and image['cls_token'] == image[
    'register_tokens'
  ] == (1, 1, 1536)
  assert image['patch_embed.proj.weight'] == (1536, 3, 14, 14) and image['mask_token'] == (1, 1536)
  assert image['blocks.39.mlp.w12.weight'] == (8192, 1536) and image['blocks.0.mlp.w3.weight'] == (
    1536,
    4096,
  )
  assert image['blocks.7.attn.qkv.weight'] == (4608, 1536) and image['blocks.7.ls2.gamma'] == (
    1536,
  )
  assert text['transformer.resblocks.11.mlp.c_fc.weight'] == (6144, 1536)
  assert text['transformer.resblocks.0.attn.in_proj_bias'] == (4608,) and text['ln_final.bias'] == (
    1536,
  )


def test_shapes_of_the_scenic_layout(monkeypatch):
  image, text = shapes_of(monkeypatch, scenic, 'so400m', 16)
  block = 'encoder/transformer/encoderblock_26/'
  assert image['encoder/ToTokenSequence_0/cls'] == (1, 2, 1152)
  assert image['encoder/ToTokenSequence_0/posembed_input'] == (1, 16, 16, 1152)
  assert image[block + 'MultiHeadDotProductAttention_0/query/kernel'] == (1152, 16, 72)
  assert image[block + 'MultiHeadDotProductAttention_0/out/kernel'] == (16, 72, 1152)
  assert image[block + 'MultiHeadDotProductAttention_0/key/bias'] == (16, 72)
  assert image[block + 'MlpBlock_0/Dense_1/kernel'] == (4304, 1152)
  assert 'transformer/encoderblock_26/LayerNorm_1/scale' in text  # 27 layers
  assert text['token_emb/emb_var'] == (32000, 1152)


def same(one, other):
  one, other = flat(one), flat(other)
  assert one.keys() == other.keys()
  for name in one:
    assert one[name].dtype == np.float32
    np.testing.assert_array_equal(one[name], other[name], name)


@settings(max_examples=15, deadline=None)
@given(
  layout=st.sampled_from(sorted(LAYOUTS)),
  heads=st.integers(1, 3),
  per_head=st.sampled_from((2, 4, 6)),
  depth=st.integers(1, 3),
  mlp=st.integers(1, 20),
  ffn=st.sampled_from(('gelu', 'swiglu')),
  patch=st.integers(1, 4),
  grid=st.integers(1, 5),
  vocab=st.integers(1, 9),
  cls=st.integers(1, 3),
)
def test_round_trip_of_any_shape(layout, heads, per_head, depth, mlp, ffn, patch, grid, vocab, cls):
  layout, width, names = LAYOUTS[layout], heads * per_head, ('a', 'b', 'c')[:cls]
  image = schema.ViT(
    kind='vit',
    width=width,
    depth=depth,
    heads=heads,
    mlp=mlp,
    ffn=ffn,
    patch=patch,
    grid=grid,
    cls=names,
    mask_token=layout is pytorch,
  )
  text = schema.TextTower(kind='text', width=width, depth=depth, heads=heads, mlp=mlp, vocab=vocab)
  a, b = conftest.parameters('image', image), conftest.parameters('text', text)
  there = layout.image_out(a, image)
  assert layout.image_tower(there, heads=heads, cls=names) == image
  same(layout.image_in(there, image), a)
  there = layout.text_out(b, text)
  assert layout.text_tower(there, heads=heads) == text
  same(layout.text_in(there, text), b)


@pytest.mark.once
@pytest.mark.parametrize('scale', ['s', 'b'])
@pytest.mark.parametrize('grid', [16, 32])
@layouts
def test_round_trip_of_published_sizes(layout, grid, scale):
  image = schema.ViT(kind='vit', **PAGES[scale].IMAGE, grid=grid)
  params = conftest.parameters('image', image)
  there = layout.image_out(params, image)
  assert layout.image_tower(there) == image  # heads of these widths are known
  same(layout.image_in(there, image), params)


def test_layer_scale_and_the_position_of_the_cls_token_are_folded(model):
  """Against the layout's own definition: x + gamma * f(x), and a position added to the first
  token.
  """
  weights, rng = model(depth=1), np.random.default_rng(3)
  tower, images = weights.image, rng.random((2, 1, 56, 56, 3), np.float32)
  there = pytorch.image_out(weights.params['image'], tower)

  def run(arrays):
    params = pytorch.image_in(dict(arrays), tower)
    return towers.apply(params, tower, F32, {'images': images})

  plain = run(there)
  gamma = rng.normal(size=32).astype(np.float32)
  scaled = {**there, 'blocks.0.ls1.gamma': gamma, 'blocks.0.ls2.gamma': 2 * gamma}
  by_hand = {
    **there,
    **{
      f'blocks.0.{n}.weight': there[f'blocks.0.{n}.weight'] * g[:, None]
      for n, g in (('attn.proj', gamma), ('mlp.fc2', 2 * gamma))
    },
    **{
      f'blocks.0.{n}.bias': there[f'blocks.0.{n}.bias'] * g
      for n, g in (('attn.proj', gamma), ('mlp.fc2', 2 * gamma))
    },
  }
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run(scaled), run(by_hand))
  moved = {**there, 'pos_embed': there['pos_embed'].copy()}
  moved['pos_embed'][:, 0] = gamma
  by_hand = {**there, 'cls_token': there['cls_token'] + gamma}
  jax.tree.map(np.testing.assert_array_equal, run(moved), run(by_hand))
  for other in (scaled, moved):
    assert np.abs(run(other)['web'] - plain['web']).max() > 1e-3


def test_a_tower_is_never_in_memory_twice(model):
  """Arrays are taken out of what was read, and freed as soon as their layers are stacked."""
  weights = model(depth=3)
  there = pytorch.image_out(weights.params['image'], weights.image)
  # Of their own, as a file gives them, and not views of the stacks.
  there = {name: np.array(x) for name, x in there.items()}
  kernels = [weakref.ref(there[f'blocks.{i}.mlp.fc1.weight']) for i in range(3)]
  params = pytorch.image_in(there, weights.image)
  assert not there and not any(ref() is not None for ref in kernels)
  same(params, weights.params['image'])


@layouts
def test_what_does_not_fit_is_named(layout, model):
  weights = model()
  there = layout.image_out(weights.params['image'], weights.image)
  lost = next(k for k in there if 'attn.proj.weight' in k or 'out/kernel' in k)
  with pytest.raises(InputError, match='got no .*expected it'):
    layout.image_in({k: x for k, x in there.items() if k != lost}, weights.image)
  with pytest.raises(InputError, match='got shape .*expected'):
    layout.image_in({**there, lost: there[lost][:-1]}, weights.image)
  with pytest.raises(InputError, match="no part of this model is, such as 'extra'"):
    layout.image_in({**there, 'extra': np.zeros(1, np.float32)}, weights.image)
  with pytest.raises(InputError, match='got 2 CLS tokens; expected 3'):
    layout.image_tower(there, heads=2, cls=('a', 'b', 'c'))


def test_a_width_without_known_heads_asks_for_them(model):
  weights = model()
  with pytest.raises(InputError, match='got width 32.*tells the number of heads'):
    pytorch.image_tower(pytorch.image_out(weights.params['image'], weights.image))


def test_towers_before_training_have_the_gains_that_they_started_with(model):
  """`evaluate --random` of a run, whose gains are folded."""
  gains = dict(layer_scale=0.25, last_layer_scale=0.5)
  config = dict(towers=dict(vision=gains), evals=dict(image_tower='vision'))
  folded = model(depth=3).replace(about={'config': config})
  plain = initial(model(depth=3))
  found = initial(folded)
  of = lambda params: params['image']['encoder']['blocks']['mlp']['down']['kernel']
  expected = of(plain) * np.array([0.25, 0.25, 0.5])[:, None, None]
  np.testing.assert_allclose(of(found), expected, rtol=1e-6)
  same(found['text'], plain['text'])

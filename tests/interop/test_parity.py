"""The comparison: what it says of arrays that differ, and of encoders that do."""

import sys

import jax
import numpy as np
import pytest

from tests.interop.conftest import model
from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.interop import parity
from tips_jax.interop.huggingface import folder as huggingface
from tips_jax.models import towers

TINY = model()
# Larger, so that attention is far from even.
WEIGHTS = TINY.replace(
  params={
    n: jax.tree.map(lambda x: 4 * x, p) if n != 'logit' else p for n, p in TINY.params.items()
  }
)
INPUTS = parity.fixed_inputs(WEIGHTS)


@pytest.fixture(scope='module', name='ours')
def _ours():
  return parity.reference(WEIGHTS, INPUTS)


def changed(name, fn):
  """The outputs of the model with one parameter of the image tower changed; name: 'a/b'."""
  params = jax.tree.map(np.array, WEIGHTS.params)
  *groups, leaf = name.split('/')
  place = params['image']
  for group in groups:
    place = place[group]
  place[leaf] = fn(place[leaf])
  return parity.reference(WEIGHTS.replace(params=params), INPUTS)


def failing(ours, theirs, tolerance=1e-4):
  rows = parity.compare(ours, theirs)
  assert not parity.passed(rows, tolerance)
  text = parity.table(rows, tolerance)
  return {line.split('  ')[0].strip() for line in text.splitlines() if 'DIFFERS' in line}


IMAGE = {'56x56 cls', '56x56 patch', '42x70 cls', '42x70 patch', 'similarity'}


def test_inputs_are_fixed_and_cover_what_goes_wrong():
  square, wide = INPUTS.images
  assert square.shape == (2, 56, 56, 3) and wide.shape == (2, 42, 70, 3)
  assert square.dtype == np.float32 and square.min() >= 0 and square.max() <= 1
  assert INPUTS.ids.dtype == np.int32 and INPUTS.ids.shape == (4, 64) and INPUTS.ids.max() < 300
  assert [list(row != 0) for row in INPUTS.ids] == [
    [True] * n + [False] * (64 - n) for n in (64, 32, 5, 1)
  ]
  jax.tree.map(np.testing.assert_array_equal, INPUTS, parity.fixed_inputs(WEIGHTS))


def test_inputs_of_other_models():
  sizes = lambda **options: [x.shape[1:3] for x in parity.fixed_inputs(model(**options)).images]
  assert sizes(grid=32) == [(224, 224), (168, 280)]
  assert sizes(grid=1) == [(14, 14), (14, 28)]
  assert sizes(grid=1, patch=300) == [(300, 300), (300, 600)]
  assert [x.shape for x in parity.fixed_inputs(WEIGHTS, size=(28, 42)).images] == [(2, 28, 42, 3)]
  assert parity.fixed_inputs(model(text=False)).ids is None


def test_reference_is_the_towers(ours):
  compute = schema.Compute(dtype='float32')
  x = INPUTS.images[1]
  one = towers.apply(WEIGHTS.params['image'], WEIGHTS.image, compute, {'images': x[:, None]})
  np.testing.assert_allclose(ours['42x70 cls'][:, 1], one['synthetic'][:, 0], atol=1e-5)
  np.testing.assert_allclose(ours['42x70 patch'][1, 2, 3], one['patch'][1, 0, 2 * 5 + 3], atol=1e-5)
  text = towers.apply(WEIGHTS.params['text'], WEIGHTS.text, compute, {'ids': INPUTS.ids})['text']
  np.testing.assert_allclose(ours['text'], text, atol=1e-5)
  cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  assert ours['similarity'].shape == (2, 4)
  assert ours['similarity'][1, 2] == pytest.approx(
    cosine(ours['56x56 cls'][1, 0], np.asarray(text[2])), abs=1e-6
  )
  assert ours['log temperature'] == pytest.approx(np.log(0.0125))
  assert set(ours) == IMAGE | {'text', 'text unit', 'log temperature'}


def test_heads_and_no_text():
  weights = model(heads=True)
  out = parity.reference(weights, parity.fixed_inputs(weights, size=(28, 28)))
  kernel = weights.params['image_head']['kernel']
  np.testing.assert_allclose(out['28x28 embedding'], out['28x28 cls'] @ kernel, atol=1e-5)
  assert out['text embedding'].shape == out['text unit'].shape == (4, 16) and out[
    'similarity'
  ].shape == (2, 4)
  weights = model(text=False)
  assert set(parity.reference(weights, parity.fixed_inputs(weights))) == IMAGE - {'similarity'}


def test_the_same_passes_exactly(ours):
  rows = parity.compare(ours, {k: np.array(v) for k, v in ours.items()})
  assert [r.name for r in rows] == list(ours) and all(r.max_abs == 0 for r in rows)
  assert all(r.cosine == pytest.approx(1, abs=1e-12) for r in rows) and parity.passed(rows, 1e-9)
  assert parity.table(rows, 2e-5).splitlines()[-1].startswith('8 of 8 outputs within 2e-05')


@pytest.mark.parametrize(
  'name, fn',
  [
    ('encoder/blocks/attention/query/kernel', lambda x: x.swapaxes(1, 2)),
    ('encoder/blocks/attention/out/kernel', lambda x: x.swapaxes(1, 2)),
    ('encoder/blocks/norm2/bias', lambda x: x[::-1]),
    ('posembed', lambda x: x.swapaxes(1, 2)),
    ('embedding/kernel', lambda x: x.swapaxes(0, 1)),
    ('cls', lambda x: x[:, ::-1]),  # patches read both tokens, in whatever order
  ],
)
def test_a_wrong_conversion_is_seen(ours, name, fn):
  assert failing(ours, changed(name, fn)) == {x for x in IMAGE if name != 'cls' or 'patch' not in x}


def test_a_swapped_cls_and_a_transposed_grid_are_seen(ours):
  swapped = ours | {'56x56 cls': ours['56x56 cls'][:, ::-1]}
  assert failing(ours, swapped) == {'56x56 cls'}
  assert failing(ours, ours | {'56x56 patch': ours['56x56 patch'].swapaxes(1, 2)}) == {
    '56x56 patch'
  }
  rows = {
    r.name: r
    for r in parity.compare(ours, ours | {'42x70 patch': ours['42x70 patch'].swapaxes(1, 2)})
  }
  assert (
    rows['42x70 patch'].max_abs == np.inf
    and 'shape (2, 3, 5, 32) and (2, 5, 3, 32)' in rows['42x70 patch'].note
  )


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('side', ['ours', 'theirs'])
def test_no_number_fails(ours, value, side):
  broken = {k: np.array(v) for k, v in ours.items()}
  broken['56x56 patch'][0, 0, 0, 0] = value
  assert failing(*((broken, ours) if side == 'ours' else (ours, broken)), tolerance=1e9) == {
    '56x56 patch'
  }
  assert failing(broken, broken, tolerance=1e9) == {'56x56 patch'}


def test_what_one_side_lacks_fails(ours):
  less = {k: v for k, v in ours.items() if k != 'text'}
  assert failing(ours, less) == failing(less, ours) == {'text'}
  assert 'missing in theirs' in parity.table(parity.compare(ours, less), 1)
  assert 'missing in ours' in parity.table(parity.compare(less, ours), 1)
  assert not parity.passed(parity.compare({}, {}), 1)
  assert failing({'x': np.zeros((0, 3))}, {'x': np.zeros((0, 3))}) == {'x'}


def test_large_features_are_compared_relative_to_their_size():
  x = np.random.default_rng(0).normal(size=(50, 8))
  assert parity.passed(parity.compare({'x': 10 * x}, {'x': 10 * x + 1e-4}), 2e-5)
  assert failing({'x': x}, {'x': x + 1e-4}, 2e-5) == {'x'}
  assert failing({'x': 1e-6 * x}, {'x': -1e-6 * x}, 2e-5) == {'x'}  # near, and opposite


def test_zero_vectors():
  zero, one = np.zeros((2, 3)), np.array([[0, 0, 0], [0, 0, 1e-9]])
  [row] = parity.compare({'x': zero}, {'x': zero})
  assert (row.max_abs, row.cosine) == (0, 1) and parity.passed([row], 1e-9)
  assert parity.compare({'x': zero}, {'x': one})[0].cosine == 0


@pytest.mark.parametrize('options', [{}, {'text': False}, {'ffn': 'swiglu', 'mlp': 48, 'grid': 3}])
def test_transformers(tmp_path, tokenizer_model, options):
  pytest.importorskip('torch')
  pytest.importorskip('transformers', minversion='5.14')
  weights = model(tokenizer=None if 'text' in options else tokenizer_model, **options)
  inputs = parity.fixed_inputs(weights)
  huggingface.write(weights, tmp_path)
  rows = parity.compare(parity.reference(weights, inputs), parity.torch_outputs(tmp_path, inputs))
  assert len(rows) == (4 if 'text' in options else 8)
  assert parity.passed(rows, parity.TOLERANCE['torch']), parity.table(rows, 2e-5)


def test_transformers_that_is_installed_and_fails_is_an_error(tmp_path):
  pytest.importorskip('transformers')
  pytest.importorskip('torch')
  (tmp_path / 'config.json').write_text('{"model_type": "unheard_of"}')
  with pytest.raises(InputError, match='^transformers: it is installed and fails'):
    parity.torch_outputs(tmp_path, INPUTS)


def test_without_transformers_there_is_no_answer(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'transformers', None)
  assert parity.torch_outputs(tmp_path, INPUTS) is None

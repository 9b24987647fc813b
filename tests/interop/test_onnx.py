"""ONNX files, run in onnxruntime against the JAX towers."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from tests.interop.conftest import model
from tips_jax.core import schema, tree
from tips_jax.core.errors import InputError
from tips_jax.interop import onnx, parity
from tips_jax.interop.weights import flat

for package in ('torch', 'onnx', 'onnxscript', 'onnxruntime'):
  pytest.importorskip(package)


@pytest.fixture(scope='module', name='dynamic')
def _dynamic(tmp_path_factory):
  """(weights, folder) of a model for any size, with projections."""
  weights, folder = model(heads=True), tmp_path_factory.mktemp('dynamic')
  assert onnx.write(weights, folder) == ['image.onnx', 'text.onnx']
  return weights, folder


@pytest.fixture(scope='module', name='fixed')
def _fixed(tmp_path_factory):
  """(weights, folder) for images of 45 x 60, with one CLS token, SwiGLU, no texts, and weights
  beside the graph.
  """
  weights, folder = (
    model(ffn='swiglu', mlp=40, cls=('cls',), grid=8, text=False),
    tmp_path_factory.mktemp('fixed'),
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(onnx, 'LARGE', 1000)
    assert onnx.write(weights, folder, resolution='45x60') == ['image.onnx', 'image.onnx.data']
  return weights, folder


def session(folder, name):
  import onnxruntime

  return onnxruntime.InferenceSession(str(folder / f'{name}.onnx'))


def pixels(*shape):
  return np.random.default_rng(0).random((*shape, 3), np.float32)


def near(weights, folder, images, ids=None):
  inputs = parity.Inputs(tuple(images), ids)
  found = parity.onnx_outputs(folder, inputs)
  rows = parity.compare(parity.reference(weights, inputs), found)
  assert parity.passed(rows, 1e-5), parity.table(rows, 1e-5)
  return found


@pytest.mark.once
def test_any_batch_and_size(dynamic):
  """The table's own grid, larger, smaller, not square, one patch; and sizes that are padded."""
  shapes = (
    (2, 56, 56),
    (1, 112, 112),
    (3, 28, 28),
    (2, 42, 84),
    (1, 84, 14),
    (1, 14, 14),
    (2, 45, 60),
    (1, 5, 29),
  )
  found = near(*dynamic, [pixels(*shape) for shape in shapes])
  assert len(found) == 3 * len(shapes)
  assert [found[f'45x60 {n}'].shape for n in ('cls', 'patch', 'embedding')] == [
    (2, 2, 32),
    (2, 4, 5, 32),
    (2, 2, 16),
  ]


@pytest.mark.parametrize('batch', [1, 3])
def test_fixed_size(fixed, batch):
  """Not a multiple of the patch: padded in the graph; positions were resized before."""
  weights, folder = fixed
  assert sorted(p.name for p in folder.iterdir()) == ['image.onnx', 'image.onnx.data']
  assert (folder / 'image.onnx.data').stat().st_size > 1000
  assert [x.shape for x in session(folder, 'image').get_inputs()] == [['batch', 3, 45, 60]]
  assert near(weights, folder, [pixels(batch, 45, 60)])['45x60 patch'].shape == (batch, 4, 5, 32)


def test_adapters_are_kept(tmp_path):
  weights = model(adapters=schema.Adapters(width=4), text=False)
  large = {
    name: 10 * x if '/adapter' in name else x for name, x in flat(weights.params['image']).items()
  }
  weights = weights.replace(params={'image': tree.nested(large)})
  onnx.write(weights, tmp_path)
  near(weights, tmp_path, [pixels(2, 42, 56), pixels(1, 14, 70)])
  without = dataclasses.replace(weights.image, adapters=schema.Adapters())
  plain = weights.replace(towers={'image': without})
  inputs = parity.Inputs((pixels(2, 42, 56),), None)
  rows = parity.compare(parity.reference(plain, inputs), parity.onnx_outputs(tmp_path, inputs))
  assert not parity.passed(rows, 1e-3)


@pytest.mark.parametrize('shape', [(1, 1), (2, 7), (5, 64)])
def test_texts(dynamic, shape):
  ids = np.random.default_rng(0).integers(1, 300, shape).astype(np.int32)
  ids[0, 1:] = 0
  ids[-1, shape[1] // 2 + 1 :] = 0
  found = near(*dynamic, [pixels(1, 14, 14)], ids)
  assert found['text'].shape == (shape[0], 32) and found['text embedding'].shape == (shape[0], 16)


def test_padding_counts_for_nothing(dynamic):
  _, folder = dynamic
  run = lambda *ids: session(folder, 'text').run(['text'], {'input_ids': np.array(ids, np.int64)})[
    0
  ]
  short, empty = run([5, 9, 0, 0, 0, 0], [0] * 6)
  np.testing.assert_allclose(short, run([5, 9])[0], atol=1e-6)
  assert np.all(empty == 0) and np.abs(short).max() > 0.1


def test_the_file_says_what_it_is_and_where_nothing_was(dynamic):
  weights, folder = dynamic
  image = session(folder, 'image')
  names = {x.name: x.shape for x in image.get_inputs() + image.get_outputs()}
  assert names == {
    'pixel_values': ['batch', 3, 'height', 'width'],
    'cls': ['batch', 2, 32],
    'patch': ['batch', 'rows', 'columns', 32],
    'embedding': ['batch', 2, 16],
  }
  about = image.get_modelmeta().custom_metadata_map
  assert about['name'] == weights.name and json.loads(about['cls']) == ['web', 'synthetic']
  assert json.loads(about['preprocessing'])['range'] == [0, 1] and int(about['patch']) == 14
  assert float(about['log_temperature']) == pytest.approx(np.log(0.0125))
  for name in ('image.onnx', 'text.onnx'):
    assert b'interop/onnx.py' not in (folder / name).read_bytes()


def test_resolutions():
  tower = model().image
  sizes = {r: onnx.fixed_size(tower, r) for r in ('dynamic', 'native', '28', 28, '336x448')}
  assert list(sizes.values()) == [None, (56, 56), (28, 28), (28, 28), (336, 448)]
  for bad in ('0', '-14', '224.0', '12x', 'x', '', 'Dynamic', True):
    with pytest.raises(InputError, match="--resolution: got .*; expected 'dynamic'"):
      onnx.fixed_size(tower, bad)


def test_missing_packages_are_one_error(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'onnxscript', None)
  with pytest.raises(InputError, match=r"no package onnxscript; .*pip install -e '\.\[onnx\]'"):
    onnx.write(model(), tmp_path)
  assert not any(tmp_path.iterdir())

"""The image towers of four stages as ONNX and safetensors, against the JAX towers."""

import jax
import numpy as np
import pytest

from tests.interop.conftest import parameters
from tests.models.test_stages import TINY, pixels, tower_of
from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.interop import onnx, parity, read, write
from tips_jax.interop.encoder import Encoder
from tips_jax.interop.weights import Weights


def model(name):
  """Weights of a tiny tower and its projection, none at its start; variances are positive."""
  tower = tower_of(TINY[name])
  head = schema.ProjectionHead(kind='projection', width=tower.width, output=5)
  params = {'image': parameters('image', tower), 'image_head': parameters('image_head', head)}
  params['image'] = jax.tree.map_with_path(
    lambda path, x: np.abs(x) + 0.1 if path[-1].key == 'var' else 3 * x, params['image']
  )
  return Weights(name='tiny', towers={'image': tower, 'image_head': head}, params=params, size=64)


@pytest.mark.once
@pytest.mark.parametrize(
  'name, resolution, sizes',
  [
    ('resnet18', 'dynamic', [(2, 64, 64), (1, 40, 100)]),
    ('mobilenetv2', 'dynamic', [(2, 64, 64), (1, 40, 100)]),
    ('swin_nano', '64x90', [(2, 64, 90)]),
  ],
)
def test_the_files_equal_the_towers(name, resolution, sizes, tmp_path):
  for package in ('torch', 'onnx', 'onnxscript', 'onnxruntime'):
    pytest.importorskip(package)
  weights = model(name)
  assert onnx.write(weights, tmp_path, resolution=resolution) == ['image.onnx']
  images = tuple(pixels(*size).astype(np.float32) / 255 for size in sizes)
  inputs = parity.Inputs(images, None)
  rows = parity.compare(parity.reference(weights, inputs), parity.onnx_outputs(tmp_path, inputs))
  assert parity.passed(rows, 1e-5), parity.table(rows, 1e-5)


def test_int8_is_near_and_a_quarter_of_the_bytes(tmp_path):
  for package in ('torch', 'onnx', 'onnxscript', 'onnxruntime'):
    pytest.importorskip(package)
  import onnx as onnx_lib

  weights = model('resnet18')
  kinds, sizes = {}, {}
  for dtype in ('float32', 'int8'):
    (tmp_path / dtype).mkdir()
    assert onnx.write(weights, tmp_path / dtype, resolution=64, dtype=dtype) == ['image.onnx']
    graph = onnx_lib.load(tmp_path / dtype / 'image.onnx').graph
    kinds[dtype] = {node.op_type for node in graph.node}
    sizes[dtype] = sum(x.data_type in (1, 2, 3) and len(x.raw_data) for x in graph.initializer)
  assert 'Conv' in kinds['float32'] and 'Conv' not in kinds['int8']
  assert 'ConvInteger' in kinds['int8'] and sizes['int8'] < 0.4 * sizes['float32']
  inputs = parity.Inputs((pixels(2, 64, 64).astype(np.float32) / 255,), None)
  rows = parity.compare(
    parity.reference(weights, inputs), parity.onnx_outputs(tmp_path / 'int8', inputs)
  )
  assert min(row.cosine for row in rows) > 0.98, parity.table(rows, 1e-4)
  assert not parity.passed(rows, 1e-5)


def test_windows_need_a_size(tmp_path):
  pytest.importorskip('torch')
  with pytest.raises(InputError, match="--resolution: got 'dynamic' with an image tower of kind"):
    onnx.write(model('swin_nano'), tmp_path)


def test_our_own_format_holds_them_and_those_of_others_do_not(tmp_path):
  weights = model('resnet18')
  with write.new_folder(tmp_path / 'ours') as folder:
    write.write(weights, 'safetensors', folder)
  found = read.read(tmp_path / 'ours')
  assert found.towers == weights.towers
  jax.tree.map(np.testing.assert_array_equal, found.params, weights.params)
  with pytest.raises(InputError, match="--to=hf: got an image tower of kind 'resnet'; expected a"):
    write.write(weights, 'hf', tmp_path)


def test_the_encoder_takes_them():
  weights = model('mobilenetv2')
  encoder = Encoder(weights)
  cls, patch = encoder.encode_image(pixels(3, 40, 70))
  inputs = parity.Inputs((pixels(3, 40, 70).astype(np.float32) / 255,), None)
  want = parity.reference(weights, inputs)
  np.testing.assert_allclose(cls, want['40x70 cls'], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(patch, want['40x70 patch'], rtol=1e-4, atol=1e-5)
  assert patch.shape == (3, 2, 3, 12) and encoder.patch == 32
  assert encoder.features(pixels(0, 40, 70))['pooled'].shape == (0, 12)

"""ONNX: the towers as a plain torch model, exported by torch.

The torch model here reads our parameters as they are (kernels [in, out], stacked layers), pads
images as the JAX tower does, and resizes the position table in the graph by two small matrix
products, for any height and width.
"""

import contextlib
import importlib
import json
import logging
import math
import os
import pathlib
import re
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.interop import onnx_stages
from tips_jax.interop.weights import PREPROCESSING, Weights, flat

FILES = {'image': 'image.onnx', 'text': 'text.onnx'}
OPSET = 20  # the first with a GELU operator; supported since onnxruntime 1.17
LARGE = 2**30  # bytes above which weights go to a separate file; protobuf is limited to 2**31
EPS = 1e-6
AXES = ('batch', 'rows', 'columns')


def write(
  weights: Weights,
  folder: str | os.PathLike,
  *,
  resolution: str | int = 'dynamic',
  dtype: str = 'float32',
) -> list[str]:
  """Writes `image.onnx` and `text.onnx` (with `*.onnx.data` where large); returns their names.

  image.onnx: `pixel_values` [B, 3, H, W] float32 in [0, 1] -> `cls` [B, N, D] and `patch` [B, h, w,
  D]; images are padded with zeros around their center to multiples of the patch. text.onnx:
  `input_ids` [B, T] int64, 0 is padding -> `text` [B, D], zeros of a row of padding alone. Where
  the model has heads: `embedding` [B, N, E] or [B, E].
  resolution: 'dynamic' (any H and W), 'native' (patch times grid), or pixels: 224, '336x448'
  (height, width). dtype: of the weights; 'int8' quantizes the inputs of products as they come
  (onnxruntime's dynamic quantization). InputError for another resolution, or without the packages.
  """
  size = fixed_size(weights.image, resolution)
  torch = packages('torch', 'onnx', 'onnxscript')[0]
  if dtype == 'int8':
    packages('onnxruntime')
  folder = pathlib.Path(folder)
  about = _about(weights)
  with _quiet(), torch.no_grad():
    names = _save(torch, _image(torch, weights, size), folder / FILES['image'], about)
    if weights.text:
      names += _save(torch, _text(torch, weights), folder / FILES['text'], about)
    if dtype == 'int8':
      names = [name for name in names if not name.endswith('.data')]
      for name in names:
        _quantize(folder / name)
  return names


def packages(*names: str) -> list[types.ModuleType]:
  """The optional modules, or one InputError that says how to install them."""
  missing = []
  modules = []
  for name in names:
    try:
      modules.append(importlib.import_module(name))
    except ImportError:
      missing.append(name)
  if missing:
    raise InputError(
      f"ONNX: got no package {', '.join(missing)}; expected the extra: pip install -e '.[onnx]'"
    )
  return modules


def fixed_size(tower: schema.ViT, resolution: str | int) -> tuple[int, int] | None:
  """(height, width) in pixels of a resolution as `write` takes it; None for any size."""
  if resolution == 'dynamic':
    return None
  if resolution == 'native':
    return (tower.patch * tower.grid,) * 2
  match = re.fullmatch(r'([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?', str(resolution))
  if not match:
    raise InputError(
      f"--resolution: got {resolution!r}; expected 'dynamic', 'native', pixels as in 224, or "
      'height '
      'and width as in 336x448'
    )
  return int(match[1]), int(match[2] or match[1])


def _about(weights: Weights) -> dict[str, str]:
  """Metadata of each file."""
  about = {
    'name': weights.name,
    'preprocessing': PREPROCESSING,
    'size': weights.size,
    'patch': weights.image.patch,
    'cls': list(weights.image.cls),
  }
  if weights.text:
    about |= {'text_length': weights.text_length, 'padding_id': 0}
  if 'logit' in weights.params:
    logit = weights.params['logit']
    about['log_temperature'] = float(logit['log_temperature'])
    if 'bias' in logit:
      about['bias'] = float(logit['bias'])
  # ONNX metadata are texts.
  return {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}


# --- the torch model ----------------------------------------------------------------------------


class _Program(NamedTuple):
  """A torch module and what its export takes."""

  module: Any  # torch.nn.Module
  example: Any  # torch.Tensor, an input
  input: str
  outputs: list[str]
  axes: dict[int, str]  # dynamic axes of the input


def _image(torch: types.ModuleType, weights: Weights, size: tuple[int, int] | None) -> _Program:
  tower = weights.image
  p = _tensors(torch, weights, 'image')
  of_stages = None
  if not isinstance(tower, schema.ViT):
    of_stages = onnx_stages.program(torch, tower, size)
  if size:
    height, width = size
    # The table is resized now: a fixed size leaves nothing to compute in the graph.
    h, w = (-(-n // tower.patch) for n in size)
    for name in p:
      if name.endswith('posembed'):
        p[name] = onnx_stages.positions(torch, p[name], h, w)[None]
    axes = {0: 'batch'}
  else:
    # Of no multiple of the patch and not square, so that the exporter specializes on neither.
    height = tower.patch * tower.grid + 1
    width = tower.patch * (tower.grid + 1) + 1
    axes = {0: 'batch', 2: 'height', 3: 'width'}

  def forward(p, images_BCHW):
    x = _pad(torch, images_BCHW, tower.patch)
    if of_stages:
      cls, patch = of_stages(p, x)
    else:
      cls, patch = vit(p, x)
    return (cls, patch, cls @ p['head']) if 'head' in p else (cls, patch)

  def vit(p, x):
    x = torch.nn.functional.conv2d(
      x, p['embedding/kernel'].permute(3, 2, 0, 1), p['embedding/bias'], tower.patch
    )
    b, d, h, w = x.shape
    table = p['posembed'][0] if size else onnx_stages.positions(torch, p['posembed'], h, w)
    x = x.permute(0, 2, 3, 1) + table
    x = torch.cat([p['cls'].expand(b, -1, -1), x.reshape(b, h * w, d)], dim=1)
    x = _norm(torch, _blocks(torch, x, p, tower, tower.ffn, grid=(h, w)), p, 'norm')
    return x[:, : len(tower.cls)], x[:, len(tower.cls) :].reshape(b, h, w, d)

  outputs = ['cls', 'patch']
  if 'head' in p:
    outputs.append('embedding')
  example = torch.zeros(2, 3, height, width)
  return _Program(_module(torch, p, forward), example, 'pixel_values', outputs, axes)


def _text(torch: types.ModuleType, weights: Weights) -> _Program:
  tower = weights.text
  p = _tensors(torch, weights, 'text')
  scales = tower.width // 2
  rate = torch.exp(-torch.arange(scales) * (math.log(1e4) / max(scales - 1, 1)))

  def forward(p, ids_BT):
    keep = ids_BT != 0
    angle = torch.arange(ids_BT.shape[1], dtype=torch.float32)[:, None] * rate
    x = p['embedding'].index_select(0, ids_BT.flatten())
    x = x.reshape(*ids_BT.shape, tower.width) * math.sqrt(tower.width)
    x = x + torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)
    read = keep | ~keep.any(dim=1, keepdim=True)  # attention over no key at all would be NaN
    x = _norm(torch, _blocks(torch, x, p, tower, 'relu', read[:, None, None]), p, 'norm')
    text = (x * keep[..., None]).sum(dim=1) / keep.sum(dim=1, keepdim=True).clamp(min=1)
    return (text, text @ p['head']) if 'head' in p else (text,)

  outputs = ['text']
  if 'head' in p:
    outputs.append('embedding')
  # An axis of length 1 would be taken for a constant.
  example = torch.ones(2, max(2, weights.text_length), dtype=torch.int64)
  axes = {0: 'batch', 1: 'length'}
  return _Program(_module(torch, p, forward), example, 'input_ids', outputs, axes)


def _tensors(torch: types.ModuleType, weights: Weights, tower: str) -> dict[str, Any]:
  """{name: tensor} of a tower and of its head; 'encoder/0/norm1/scale' of layer 0."""
  arrays = {}
  for name, x in flat(weights.params[tower]).items():
    if name.startswith('encoder/blocks/'):
      for i, layer in enumerate(x):
        arrays[name.replace('blocks', str(i))] = layer
    elif name != 'mask_token':
      arrays[name] = x
  if f'{tower}_head' in weights.params:
    arrays['head'] = weights.params[f'{tower}_head']['kernel']
  # from_numpy shares memory: a large model is not copied.
  return {n: torch.from_numpy(np.ascontiguousarray(x, np.float32)) for n, x in arrays.items()}


def _module(torch: types.ModuleType, tensors: dict[str, Any], forward: Callable) -> Any:
  class Tower(torch.nn.Module):
    def __init__(self):
      super().__init__()
      # In the file 'weights.encoder_0_norm1_scale', which cannot be the name of an output.
      self.weights = torch.nn.Module()
      for name, x in tensors.items():
        self.weights.register_buffer(name.replace('/', '_'), x)

    def forward(self, x):
      return forward({name: getattr(self.weights, name.replace('/', '_')) for name in tensors}, x)

  return Tower().eval()


def _pad(torch, x, patch):
  height = -x.shape[2] % patch
  width = -x.shape[3] % patch
  top = height // 2
  left = width // 2
  return torch.nn.functional.pad(x, (left, width - left, top, height - top))


def _blocks(torch, x, p, tower, ffn, mask=None, grid=None):
  """Pre-norm blocks on x [B, T, D]. mask: [B, 1, 1, T] bool, True where a key may be read; grid:
  rows and columns of the patches.
  """
  f = torch.nn.functional
  b, t, d = x.shape
  heads = tower.heads

  def dense(y, name):
    return y @ p[f'{name}/kernel'] + p[f'{name}/bias']

  def by_head(y):
    return y.reshape(b, t, heads, d // heads).transpose(1, 2)

  def adapted(x, y, name):
    if f'{name}/up/kernel' not in p:
      return x
    h = _neighbors(torch, quick_gelu(dense(y, f'{name}/down')), len(tower.cls), *grid)
    h = quick_gelu(dense(h, f'{name}/conv'))
    return x + dense(h, f'{name}/up') * tower.adapters.scale

  def quick_gelu(y):
    return y * torch.sigmoid(1.702 * y)

  for i in range(tower.depth):
    layer = f'encoder/{i}'
    y = _norm(torch, x, p, f'{layer}/norm1')
    x = adapted(x, y, f'{layer}/adapter1')
    q = by_head(dense(y, f'{layer}/attention/query'))
    k = by_head(dense(y, f'{layer}/attention/key'))
    v = by_head(dense(y, f'{layer}/attention/value'))
    y = f.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(b, t, d)
    x = x + dense(y, f'{layer}/attention/out')
    y = _norm(torch, x, p, f'{layer}/norm2')
    x = adapted(x, y, f'{layer}/adapter2')
    up = dense(y, f'{layer}/mlp/up')
    match ffn:
      case 'gelu':
        h = f.gelu(up, approximate='tanh')
      case 'relu':
        h = f.relu(up)
      case 'swiglu':
        h = f.silu(dense(y, f'{layer}/mlp/gate')) * up
    x = x + dense(h, f'{layer}/mlp/down')
  return x


def _neighbors(torch, x, names, h, w):
  """The 3 x 3 patches around each of x [B, names + h * w, C]; of the others only themselves."""
  pad = torch.nn.functional.pad
  b, _, c = x.shape
  square = pad(x[:, names:].reshape(b, h, w, c), (0, 0, 1, 1, 1, 1))
  shifted = [square[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
  patches = torch.cat(shifted, dim=-1).reshape(b, h * w, 9 * c)
  return torch.cat([pad(x[:, :names], (4 * c, 4 * c)), patches], dim=1)


def _norm(torch, x, p, name):
  return torch.nn.functional.layer_norm(x, x.shape[-1:], p[f'{name}/scale'], p[f'{name}/bias'], EPS)


# --- the file -----------------------------------------------------------------------------------


def _save(
  torch: types.ModuleType, program: _Program, path: pathlib.Path, about: dict[str, str]
) -> list[str]:
  """Exports one module; the names of its files."""
  exported = torch.onnx.export(
    program.module,
    (program.example,),
    dynamo=True,
    opset_version=OPSET,
    verbose=False,
    input_names=[program.input],
    output_names=program.outputs,
    dynamic_shapes=(program.axes,),
  )
  exported.model.metadata_props.update(about)
  for node in exported.model.graph:
    node.metadata_props.clear()  # they hold stack traces with paths of this machine
  for x in exported.model.graph.outputs:
    # The exporter names computed axes by their formula, such as '((height + 13) // 14)'.
    axes = list(x.shape)
    for i, n in enumerate(axes):
      if i > 0 and not isinstance(n, int):
        axes[i] = AXES[i]
    x.shape = type(x.shape)(axes)
  large = sum(x.nbytes for x in program.module.state_dict().values()) > LARGE
  exported.save(path, external_data=large)
  if large:
    return [path.name, f'{path.name}.data']
  return [path.name]


def _quantize(path: pathlib.Path) -> None:
  """The file with weights of 8 bits in place of the one with float32."""
  from onnxruntime import quantization

  # Unsigned: the processors without VNNI add pairs of products in 16 bits, which signed ones leave.
  quantization.quantize_dynamic(path, path, weight_type=quantization.QuantType.QUInt8)
  data = path.with_name(f'{path.name}.data')
  data.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences the exporter's warnings on missing packages, deprecated calls and read-only arrays."""
  before = logging.root.manager.disable
  logging.disable(logging.WARNING)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    logging.disable(before)

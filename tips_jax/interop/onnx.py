"""ONNX: the towers as a plain torch model, handed to torch's own exporter.

The torch model here reads our parameters as they are (kernels [in, out], stacked layers), pads
images as the JAX tower does, and resizes the position table by two small products, in the graph,
for any height and width.
"""

import contextlib
import importlib
import json
import logging
import math
import pathlib
import re
import warnings

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.interop.weights import PREPROCESSING, flat

FILES = {'image': 'image.onnx', 'text': 'text.onnx'}
OPSET = 20  # the first with GELU in one piece; read since onnxruntime 1.17
LARGE = 2**30  # bytes above which weights go beside the graph; protobuf ends at 2**31
EPS = 1e-6
AXES = ('batch', 'rows', 'columns')


def write(weights, folder, *, resolution='dynamic'):
  """Writes `image.onnx` and, of a model with one, `text.onnx` (and `*.onnx.data` where large);
  returns their names.

  image.onnx: `pixel_values` [B, 3, H, W] float32 in [0, 1] -> `cls` [B, N, D] and `patch` [B, h, w,
  D]; images are padded with zeros around their center to multiples of the patch. text.onnx:
  `input_ids` [B, T] int64, 0 is padding -> `text` [B, D], zeros of a row of padding alone. Where
  the model has heads: `embedding` [B, N, E] or [B, E].
  resolution: 'dynamic' (any H and W), 'native' (patch times grid), or pixels: 224, '336x448'
  (height, width). InputError for another resolution, or without torch, onnx and onnxscript.
  """
  size = fixed_size(weights.image, resolution)
  torch = packages('torch', 'onnx', 'onnxscript')[0]
  folder = pathlib.Path(folder)
  about = _about(weights)
  with _quiet(), torch.no_grad():
    names = _save(torch, _image(torch, weights, size), folder / FILES['image'], about)
    if weights.text:
      names += _save(torch, _text(torch, weights), folder / FILES['text'], about)
  return names


def packages(*names):
  """The optional modules, or one InputError that says how to get them."""
  missing, modules = [], []
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


def fixed_size(tower, resolution):
  """(height, width) in pixels that a resolution, as `write` takes it, stands for; None: any."""
  if resolution == 'dynamic':
    return None
  if resolution == 'native':
    return (tower.patch * tower.grid,) * 2
  found = re.fullmatch(r'([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?', str(resolution))
  if not found:
    raise InputError(
      f"--resolution: got {resolution!r}; expected 'dynamic', 'native', pixels as in 224, or height and "
      'width as in 336x448'
    )
  return int(found[1]), int(found[2] or found[1])


def _about(weights):
  """{key: text}, written into each file."""
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
    about |= {'bias': float(logit['bias'])} if 'bias' in logit else {}
  return {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}


# --- the torch model ----------------------------------------------------------------------------


def _image(torch, weights, size):
  """A module, an example of its inputs, and the names of inputs, outputs and dynamic axes."""
  tower, p = weights.image, _tensors(torch, weights, 'image')
  height, width = size or (tower.patch * tower.grid + 1, tower.patch * (tower.grid + 1) + 1)
  if size:  # nothing is left to compute
    p['posembed'] = _positions(torch, p['posembed'], *(-(-n // tower.patch) for n in size))[None]

  def forward(p, images_BCHW):
    x = _pad(torch, images_BCHW, tower.patch)
    x = torch.nn.functional.conv2d(
      x, p['embedding/kernel'].permute(3, 2, 0, 1), p['embedding/bias'], tower.patch
    )
    b, d, h, w = x.shape
    x = x.permute(0, 2, 3, 1) + (
      p['posembed'][0] if size else _positions(torch, p['posembed'], h, w)
    )
    x = torch.cat([p['cls'].expand(b, -1, -1), x.reshape(b, h * w, d)], dim=1)
    x = _norm(torch, _blocks(torch, x, p, tower, tower.ffn), p, 'norm')
    cls, patch = x[:, : len(tower.cls)], x[:, len(tower.cls) :].reshape(b, h, w, d)
    return (cls, patch, cls @ p['head']) if 'head' in p else (cls, patch)

  axes = {0: 'batch'} if size else {0: 'batch', 2: 'height', 3: 'width'}
  outputs = ['cls', 'patch'] + ['embedding'] * ('head' in p)
  return _module(torch, p, forward), torch.zeros(2, 3, height, width), 'pixel_values', outputs, axes


def _text(torch, weights):
  """As _image."""
  tower, p = weights.text, _tensors(torch, weights, 'text')
  scales = tower.width // 2
  rate = torch.exp(-torch.arange(scales) * (math.log(1e4) / max(scales - 1, 1)))

  def forward(p, ids_BT):
    keep = ids_BT != 0
    angle = torch.arange(ids_BT.shape[1], dtype=torch.float32)[:, None] * rate
    x = p['embedding'].index_select(0, ids_BT.flatten()).reshape(
      *ids_BT.shape, tower.width
    ) * math.sqrt(tower.width)
    x = x + torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)
    read = keep | ~keep.any(dim=1, keepdim=True)  # attention over no key at all would be NaN
    x = _norm(torch, _blocks(torch, x, p, tower, 'relu', read[:, None, None]), p, 'norm')
    text = (x * keep[..., None]).sum(dim=1) / keep.sum(dim=1, keepdim=True).clamp(min=1)
    return (text, text @ p['head']) if 'head' in p else (text,)

  example = torch.ones(2, max(2, weights.text_length), dtype=torch.int64)
  return (
    _module(torch, p, forward),
    example,
    'input_ids',
    ['text'] + ['embedding'] * ('head' in p),
    {0: 'batch', 1: 'length'},
  )


def _tensors(torch, weights, tower):
  """{name: tensor} of a tower, its layers apart, and of its head."""
  p = flat(weights.params[tower])
  p.pop('mask_token', None)
  stacked = [n for n in p if n.startswith('encoder/blocks/')]
  for name in stacked:
    p |= {name.replace('blocks', str(i)): x for i, x in enumerate(p[name])}
  p = {n: x for n, x in p.items() if n not in stacked}
  if f'{tower}_head' in weights.params:
    p['head'] = weights.params[f'{tower}_head']['kernel']
  return {
    n: torch.from_numpy(np.ascontiguousarray(x, np.float32)) for n, x in p.items()
  }  # memory is shared


def _module(torch, tensors, forward):
  class Tower(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.weights = (
        torch.nn.Module()
      )  # in the file 'weights.encoder_0_norm1_scale': no name of an output
      for name, x in tensors.items():
        self.weights.register_buffer(name.replace('/', '_'), x)

    def forward(self, x):
      return forward({name: getattr(self.weights, name.replace('/', '_')) for name in tensors}, x)

  return Tower().eval()


def _pad(torch, x, patch):
  (top, height), (left, width) = ((-n % patch // 2, -n % patch) for n in x.shape[2:])
  return torch.nn.functional.pad(x, (left, width - left, top, height - top))


def _positions(torch, table_1GGD, h, w):
  """[h, w, D]: jax.image.resize(..., 'bilinear'), antialiased, as one product for each axis."""

  def resize(full, size):
    ratio = full / size
    at = (torch.arange(size, dtype=torch.float32) + 0.5) * ratio - 0.5
    near = (1 - (at[:, None] - torch.arange(full)).abs() / torch.sym_max(ratio, 1.0)).clamp(min=0)
    return near / near.sum(dim=1, keepdim=True)

  _, gh, gw, d = table_1GGD.shape
  x = (resize(gh, h) @ table_1GGD.reshape(gh, gw * d)).reshape(h, gw, d)
  return resize(gw, w) @ x


def _blocks(torch, x, p, tower, ffn, mask=None):
  """Pre-norm blocks on x [B, T, D]. mask: [B, 1, 1, T] bool, True where a key may be read."""
  f, (b, t, d), heads = torch.nn.functional, x.shape, tower.heads
  dense = lambda y, name: y @ p[f'{name}/kernel'] + p[f'{name}/bias']
  for layer in (f'encoder/{i}' for i in range(tower.depth)):
    y = _norm(torch, x, p, f'{layer}/norm1')
    q, k, v = (
      dense(y, f'{layer}/attention/{n}').reshape(b, t, heads, d // heads).transpose(1, 2)
      for n in ('query', 'key', 'value')
    )
    y = f.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(b, t, d)
    x = x + dense(y, f'{layer}/attention/out')
    y = _norm(torch, x, p, f'{layer}/norm2')
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


def _norm(torch, x, p, name):
  return torch.nn.functional.layer_norm(x, x.shape[-1:], p[f'{name}/scale'], p[f'{name}/bias'], EPS)


# --- the file -----------------------------------------------------------------------------------


def _save(torch, tower, path, about):
  """Exports one module; the names of its files."""
  module, example, name, outputs, axes = tower
  program = torch.onnx.export(
    module,
    (example,),
    dynamo=True,
    opset_version=OPSET,
    verbose=False,
    input_names=[name],
    output_names=outputs,
    dynamic_shapes=(axes,),
  )
  program.model.metadata_props.update(about)
  for node in program.model.graph:  # paths of this machine
    node.metadata_props.clear()
  for x in program.model.graph.outputs:  # axes that are computed are named by their formula
    x.shape = type(x.shape)(
      [n if isinstance(n, int) or i == 0 else AXES[i] for i, n in enumerate(x.shape)]
    )
  large = sum(x.nbytes for x in module.state_dict().values()) > LARGE
  program.save(path, external_data=large)
  return [path.name] + [f'{path.name}.data'] * large


@contextlib.contextmanager
def _quiet():
  """No word of the exporter on packages that it lacks, calls that are deprecated, arrays that it
  must not write.
  """
  before = logging.root.manager.disable
  logging.disable(logging.WARNING)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    logging.disable(before)

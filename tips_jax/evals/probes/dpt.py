"""The DPT decoder of TIPSv2 (Ranftl et al. 2021): four layers of a frozen ViT to depth or normals.

Plain functions over a nested dict of float32 arrays. `intermediate_layers` are four (patch [B, h,
w, D], cls [B, D]): the outputs of the blocks `intermediate_layers_of(layers)`, each after the
encoder's final LayerNorm, with its first CLS token. Each patch is read out with the CLS token
concatenated, projected to a width per level, resized to 4, 2, 1 and 1/2 times the grid, convolved
to `channels`; then from coarse to fine: residual units, 2x up. The output is 16 ceil(h / 2) pixels
tall: 8 to a patch.

    reassemble/i   readout [2D, D], project [D, C_i], up [k, k, C_i, C_i] (i = 0, 1) or
                   down [3, 3, C_i, C_i] (i = 3)
    convs/i        [3, 3, C_i, C]
    fusion/i       residual (i > 0) and main: conv1, conv2 [3, 3, C, C]; out [C, C]
    project        [3, 3, C, C]
    head           [C, K]

Each has a kernel and, but for convs, conv1 and conv2, a bias.

Official formats: 'official_jax' is the npz for JAX ('decoder/dpt/...', deduced from the official
PyTorch code that reads it; its up-sampling kernels are mirrored in space, as Flax does not mirror
them), 'official_torch' the npz for PyTorch, 'hf' the Hugging Face model's. 'depth_head' and
'normals_head' as names of the last layer in 'official_torch' are deduced from 'segmentation_head'.
"""

import functools
import math
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.core import tree
from tips_jax.core.errors import InputError
from tips_jax.evals.probes import depth as depth_lib
from tips_jax.interop.arrays import Reader

# Four (patch [B, h, w, D], cls [B, D]), from the first block to the last.
Layers = Sequence[tuple[depth_lib.Array, depth_lib.Array]]
Params = Mapping[str, Any]

CHANNELS = 256
# Name of the last layer in the official JAX file.
TASKS = {
  'depth': 'pixel_depth_classif',
  'normals': 'pixel_normals',
  'segmentation': 'pixel_segmentation',
}
# TIPSv2's blocks by depth of the ViT: B, L, So400m, g.
BLOCKS = {
  12: (2, 5, 8, 11),
  24: (5, 11, 17, 23),
  27: (6, 13, 20, 26),
  40: (9, 19, 29, 39),
}
FORMATS = ('official_torch', 'official_jax', 'hf')
# Size of each level's map, in grids of patches.
_FACTORS = (4, 2, 1, 0.5)
# Width of each level: D divided by this, as released.
_DIVISORS = (8, 4, 2, 1)


def intermediate_layers_of(layers: int) -> tuple[int, ...]:
  """The four blocks, from 0, that the decoder reads: TIPSv2's, or the ends of the four quarters."""
  if layers in BLOCKS:
    return BLOCKS[layers]
  return tuple(max(round(layers * quarter / 4) - 1, 0) for quarter in (1, 2, 3, 4))


@functools.partial(jax.jit, static_argnames=('width', 'outputs', 'channels', 'widths'))
def init(
  key: jax.Array,
  *,
  width: int,
  outputs: int,
  channels: int = CHANNELS,
  widths: tuple[int, ...] | None = None,
) -> Params:
  """Parameters for layers of width D and K outputs: bins, 3 or 4 (with uncertainty), or classes.

  `widths`: of the four levels; default: D/8, D/4, D/2, D as released. Kernels are uniform within
  1 / sqrt(fan in), PyTorch's default, with which Probe3D trains; biases 0. Flax's default, larger
  by sqrt(3), trains worse, and normals with uncertainty not at all from some seeds.
  """
  if widths is None:
    widths = tuple(max(width // divisor, 1) for divisor in _DIVISORS)
  shapes = {}

  def layer(name, *shape, bias=True):
    shapes[f'{name}/kernel'] = shape
    if bias:
      shapes[f'{name}/bias'] = shape[-1:]

  for i, (c, factor) in enumerate(zip(widths, _FACTORS)):
    layer(f'reassemble/{i}/readout', 2 * width, width)
    layer(f'reassemble/{i}/project', width, c)
    if factor > 1:
      layer(f'reassemble/{i}/up', factor, factor, c, c)
    elif factor < 1:
      layer(f'reassemble/{i}/down', 3, 3, c, c)
    layer(f'convs/{i}', 3, 3, c, channels, bias=False)
    layer(f'fusion/{i}/out', channels, channels)
    # The coarsest level has nothing to add a residual to.
    for unit in ('residual', 'main')[not i :]:
      for conv in ('conv1', 'conv2'):
        layer(f'fusion/{i}/{unit}/{conv}', 3, 3, channels, channels, bias=False)
  layer('project', 3, 3, channels, channels)
  layer('head', channels, outputs)
  # One draw for all: fifty would take long to compile.
  count = sum(math.prod(shape) for shape in shapes.values())
  drawn = jax.random.uniform(key, (count,), minval=-1, maxval=1)
  leaves = {}
  for name, shape in shapes.items():
    size = math.prod(shape)
    leaf = drawn[:size].reshape(shape)
    drawn = drawn[size:]
    if name.endswith('bias'):
      leaf = jnp.zeros(shape)
    elif len(shape) == 4 and '/up/' not in name:
      leaf = leaf / math.sqrt(shape[-2] * 9)
    else:  # a pixel that `up` writes has one cell as its input, not 3 x 3
      leaf = leaf / math.sqrt(shape[-2])
    leaves[name] = leaf
  return tree.nested(leaves)


# --- forward ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames='relu')
def apply(params: Params, intermediate_layers: Layers, *, relu: bool = False) -> jax.Array:
  """Outputs [B, 16 ceil(h / 2), 16 ceil(w / 2), K]: raw logits, or normals of any length.

  `relu`: before the last layer, as for depth in transformers' Tipsv2Dpt; off by default, as in the
  official PyTorch code.
  """
  if len(intermediate_layers) != len(_FACTORS):
    raise InputError(
      f'dpt: got {len(intermediate_layers)} intermediate_layers; expected {len(_FACTORS)}: '
      '(patch [B, h, w, D], cls [B, D]) each'
    )
  maps = []
  for i, (patch, cls) in enumerate(intermediate_layers):
    level = _reassemble(params['reassemble'][str(i)], patch, cls)
    maps.append(_conv(level, params['convs'][str(i)]))
  x = None
  for i, skip in enumerate(reversed(maps)):
    block = params['fusion'][str(i)]
    if x is None:
      x = skip
    else:
      x = x + _residual(depth_lib.resize(skip, x.shape[1:3]), block['residual'])
    x = _linear(_double(_residual(x, block['main'])), block['out'])
  x = _conv(x, params['project'])
  if relu:
    x = jax.nn.relu(x)
  return _linear(x, params['head'])


def depth(
  params: Params,
  intermediate_layers: Layers,
  *,
  min_depth: float = depth_lib.MIN_DEPTH,
  max_depth: float = depth_lib.MAX_DEPTH,
  relu: bool = True,
) -> jax.Array:
  """Depth [B, H', W'] in meters: the expectation over the bins."""
  logits = apply(params, intermediate_layers, relu=relu)
  # eps = min_depth, as in the released decoder.
  return depth_lib.expectation(logits, min_depth=min_depth, max_depth=max_depth, eps=min_depth)


def _reassemble(p, patch, cls):
  kernel = p['readout']['kernel']
  width = patch.shape[-1]
  # The CLS token's half of the product is the same for all patches: computed once an image.
  shared = cls @ kernel[width:] + p['readout']['bias']
  x = jax.nn.gelu(patch @ kernel[:width] + shared[:, None, None], approximate=True)
  x = _linear(x, p['project'])
  if 'up' in p:
    # A transposed convolution whose stride is its size: each cell becomes k x k pixels.
    kernel = p['up']['kernel']
    k, *_, c = kernel.shape
    b, h, w, _ = x.shape
    x = jnp.einsum('bhwc,ijcd->bhiwjd', x, kernel).reshape(b, k * h, k * w, c) + p['up']['bias']
  if 'down' in p:
    x = _conv(x, p['down'], stride=2)
  return x


def _residual(x, p):
  return x + _conv(jax.nn.relu(_conv(jax.nn.relu(x), p['conv1'])), p['conv2'])


def _conv(x, p, stride=1):
  # Padding is explicit: with stride 2, 'SAME' pads other sides than PyTorch does.
  padding = ((1, 1), (1, 1))
  dimensions = ('NHWC', 'HWIO', 'NHWC')
  y = jax.lax.conv_general_dilated(
    x, p['kernel'], (stride, stride), padding, dimension_numbers=dimensions
  )
  if 'bias' in p:
    y = y + p['bias']
  return y


def _linear(x, p):
  return x @ p['kernel'] + p['bias']


def _double(x):
  """Twice the size, bilinear with aligned corners (PyTorch's align_corners=True)."""
  rows = _aligned(x.shape[1])
  columns = _aligned(x.shape[2])
  return jnp.einsum('yh,bhwc,xw->byxc', rows, x, columns, optimize='optimal')


def _aligned(n):
  position = np.arange(2 * n) * (n - 1) / (2 * n - 1)
  return np.maximum(1 - np.abs(position[:, None] - np.arange(n)), 0).astype(np.float32)


# --- official files -----------------------------------------------------------------------------

# (a layer here, its name in the file), tried in order; others keep their name.
_TORCH_NAMES = (
  (r'reassemble/(\d)/readout', r'reassemble.readout_projects.\1'),
  (r'reassemble/(\d)/project', r'reassemble.out_projections.\1'),
  (r'reassemble/(\d)/(up|down)', r'reassemble.resize_layers.\1'),
  (r'convs/(\d)', r'convs.\1'),
  (r'fusion/(\d)/out', r'fusion_blocks.\1.out_conv'),
  (r'fusion/(\d)/(residual|main)/(conv\d)', r'fusion_blocks.\1.\2_unit.\3'),
)
_JAX_NAMES = (
  (r'reassemble/(\d)/readout', r'reassemble_blocks/readout_projects_\1'),
  (r'reassemble/(\d)/project', r'reassemble_blocks/out_projection_\1'),
  (r'reassemble/(\d)/(up|down)', r'reassemble_blocks/resize_layers_\1'),
  (r'convs/(\d)', r'convs_\1'),
  (r'fusion/(\d)/out', r'fusion_blocks_\1/Conv_0'),
  # Flax numbers the units of a block, and the first block has no residual unit.
  (r'fusion/0/main/(conv\d)', r'fusion_blocks_0/PreActResidualConvUnit_0/\1'),
  (r'fusion/(\d)/residual/(conv\d)', r'fusion_blocks_\1/PreActResidualConvUnit_0/\2'),
  (r'fusion/(\d)/main/(conv\d)', r'fusion_blocks_\1/PreActResidualConvUnit_1/\2'),
)


def write_official(
  params: Params, path: str | pathlib.Path, *, task: str, format: str = 'official_torch'
) -> None:
  """Writes a decoder as an npz that the official code reads; see `export`.

  format: 'official_torch' or 'official_jax'.
  """
  _check(format, FORMATS[:2], 'dpt: format')
  arrays = export(params, task=task, format=format)
  with open(path, 'wb') as file:
    np.savez(file, **arrays)


def export(params: Params, *, task: str, format: str = 'official_torch') -> dict[str, np.ndarray]:
  """{name: float32 array} of a decoder under its official names; format: one of FORMATS.

  The fourth output of normals, the uncertainty, has no place there: three are exported.
  """
  _check(task, TASKS, 'dpt: task')
  _check(format, FORMATS, 'dpt: format')
  result = {}
  for name, leaf in tree.named_leaves(params):
    layer, _, kind = name.rpartition('/')
    array = np.asarray(leaf, np.float32)
    if layer == 'head' and task == 'normals':
      array = array[..., :3]
    official = _official_name(layer, task, format)
    if format == 'official_jax':
      official = f'{official}/{kind}'
      if kind == 'kernel':
        array = _jax_kernel(array, layer)
    elif kind == 'kernel':
      official = f'{official}.weight'
      array = _torch_kernel(array, layer)
    else:
      official = f'{official}.bias'
    result[official] = array
  return result


def read_hf(arrays: Mapping[str, np.ndarray], *, task: str, where: str) -> Params:
  """The decoder of a task among the arrays of a Hugging Face model: the inverse of `export`.

  where: what the arrays are of, for the InputError of a name or a shape that does not fit.
  """
  _check(task, TASKS, 'dpt: task')
  prefix = f'{task}_head.'
  reader = Reader({name: x for name, x in arrays.items() if name.startswith(prefix)}, where)

  def theirs(layer, kind):
    return f'{_official_name(layer, task, "hf")}.{kind}'

  outputs, channels = reader.shape(theirs('head', 'weight'), 2)
  widths = []
  for i in range(len(_FACTORS)):
    widths.append(reader.shape(theirs(f'reassemble/{i}/project', 'weight'), 4)[0])
  width = reader.shape(theirs('reassemble/0/readout', 'weight'), 2)[0]
  make = functools.partial(
    init, width=width, outputs=outputs, channels=channels, widths=tuple(widths)
  )
  leaves = {}
  for name, leaf in tree.named_leaves(jax.eval_shape(make, jax.random.key(0))):
    layer, _, kind = name.rpartition('/')
    if kind == 'bias':
      leaves[name] = reader.take(theirs(layer, 'bias'), *leaf.shape)
      continue
    # Shapes alone: what `export` would make of the kernel.
    shape = _torch_kernel(np.broadcast_to(np.float32(0), leaf.shape), layer).shape
    leaves[name] = _kernel_of_torch(reader.take(theirs(layer, 'weight'), *shape), layer)
  reader.done()
  return tree.nested(leaves)


def _official_name(layer, task, format):
  if layer == 'head':
    names = {
      'official_jax': f'decoder/{TASKS[task]}',
      'official_torch': f'{task}_head',
      'hf': f'{task}_head.{task}_head',
    }
    return names[format]
  if format == 'official_jax':
    return 'decoder/dpt/' + _renamed(layer, _JAX_NAMES)
  if format == 'hf':
    return f'{task}_head.' + _renamed(layer, _TORCH_NAMES)
  return _renamed(layer, _TORCH_NAMES)


def _renamed(layer, rules):
  for pattern, replacement in rules:
    if match := re.fullmatch(pattern, layer):
      return match.expand(replacement)
  return layer


def _check(value: str, known: Collection[str], what: str):
  if value not in known:
    raise InputError(f'{what}: got {value!r}; expected one of {sorted(known)}')


# Kernels here are [in, out] or [k, k, in, out]; of `up`, pixel (i, j) of a cell's k x k.


def _torch_kernel(kernel, layer):
  if layer.endswith('/up'):
    return np.ascontiguousarray(kernel.transpose(2, 3, 0, 1))
  if kernel.ndim == 2:
    kernel = np.ascontiguousarray(kernel.T)
  else:
    kernel = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
  if _pointwise(layer):
    return kernel[..., None, None]
  return kernel


def _kernel_of_torch(kernel, layer):
  """The inverse of _torch_kernel."""
  if layer.endswith('/up'):
    return kernel.transpose(2, 3, 0, 1)
  if _pointwise(layer):
    kernel = kernel[..., 0, 0]
  if kernel.ndim == 2:
    return kernel.T
  return kernel.transpose(2, 3, 1, 0)


def _jax_kernel(kernel, layer):
  if layer.endswith('/up'):
    return np.ascontiguousarray(kernel[::-1, ::-1])
  if _pointwise(layer):
    return kernel[None, None]
  return kernel


def _pointwise(layer):
  """Whether the official layer is a 1 x 1 convolution, which is a matrix product here."""
  return re.fullmatch(r'reassemble/\d/project|fusion/\d/out', layer) is not None

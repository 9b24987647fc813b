"""The DPT decoder of TIPSv2 (Ranftl et al. 2021): four tapped layers of a frozen ViT to depth or
normals.

Plain functions over a nested dict of float32 arrays. `intermediate_layers` are four (patch [B, h,
w, D], cls [B, D]): the outputs of the blocks `intermediate_layers_of(layers)`, each after the
encoder's final LayerNorm, with its first CLS token. Each patch is read out with the CLS token
beside it, brought to its own width and to 4, 2, 1 and 1/2 times the grid, convolved to `channels`;
then from coarse to fine: residual units, 2x up. The output is 16 ceil(h / 2) pixels tall: 8 to a
patch.

    reassemble/i: readout [2D, D], project [D, C_i], up [k, k, C_i, C_i] (i = 0, 1) or down [3, 3,
    C_i, C_i] (i = 3) convs/i [3, 3, C_i, C]; fusion/i: residual (i > 0) and main: conv1, conv2 [3,
    3, C, C], out [C, C]
    project [3, 3, C, C]; head [C, K]    (a kernel and, but for convs, conv1 and conv2, a bias each)

Official files, told by their names: the zip for JAX ('decoder/dpt/...', told from the official
PyTorch code that reads
it: its up-sampling kernels are mirrored in space, as Flax does not mirror them), the npz for
PyTorch ('reassemble...' or 'dpt.reassemble...') and the Hugging Face model's
('depth_head.reassemble...'). Deduced, as no
released file was at hand: 'depth_head.' and 'normals_head.' as names of the last layer in the npz
beside 'segmentation_head.' and 'head.', which the official code knows. An official PyTorch file was
converted without the mirroring by the first script that did it; nothing in a file tells.
"""

import functools
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.core import tree
from tips_jax.core.errors import InputError
from tips_jax.evals.probes import depth as depth_lib

# Four (patch [B, h, w, D], cls [B, D]), from the first block to the last.
Layers = Sequence[tuple[np.ndarray, np.ndarray]]

CHANNELS = 256
TASKS = {
  'depth': 'pixel_depth_classif',
  'normals': 'pixel_normals',
  'segmentation': 'pixel_segmentation',
}
TAPS = {
  12: (2, 5, 8, 11),
  24: (5, 11, 17, 23),
  27: (6, 13, 20, 26),
  40: (9, 19, 29, 39),
}  # TIPSv2: B, L, So400m, g
FORMATS = ('official_torch', 'official_jax', 'hf')
_FACTORS = (4, 2, 1, 0.5)


def intermediate_layers_of(layers: int) -> tuple[int, ...]:
  """The four blocks, from 0, that the decoder intermediate_layers: TIPSv2's, or the ends of the
  four quarters of the layers.
  """
  return TAPS.get(layers) or tuple(max(round(layers * q / 4) - 1, 0) for q in (1, 2, 3, 4))


@functools.partial(jax.jit, static_argnames=('width', 'outputs', 'channels', 'widths'))
def init(key, *, width, outputs, channels=CHANNELS, widths=None):
  """Parameters for intermediate_layers of width D and K outputs: 256 bins, 3 or 4 (with
  uncertainty) for normals, or classes.

  `widths`: a tuple of the four levels', D/8, D/4, D/2, D as released.
  Kernels uniform within 1 / sqrt(fan in), PyTorch's law, with which Probe3D trains; biases 0.
  Flax's, larger by sqrt(3), trains worse, and normals with uncertainty not at all from some seeds.
  """
  widths = widths or tuple(max(width // d, 1) for d in (8, 4, 2, 1))
  shapes = {}
  for i, (c, factor) in enumerate(zip(widths, _FACTORS)):
    shapes |= _layer(f'reassemble/{i}/readout', 2 * width, width) | _layer(
      f'reassemble/{i}/project', width, c
    )
    if factor > 1:
      shapes |= _layer(f'reassemble/{i}/up', factor, factor, c, c)
    elif factor < 1:
      shapes |= _layer(f'reassemble/{i}/down', 3, 3, c, c)
    shapes |= _layer(f'convs/{i}', 3, 3, c, channels, bias=False) | _layer(
      f'fusion/{i}/out', channels, channels
    )
    for unit in ('residual', 'main')[not i :]:
      for conv in ('conv1', 'conv2'):
        shapes |= _layer(f'fusion/{i}/{unit}/{conv}', 3, 3, channels, channels, bias=False)
  shapes |= _layer('project', 3, 3, channels, channels) | _layer('head', channels, outputs)
  count = sum(math.prod(shape) for shape in shapes.values())
  drawn, leaves = (
    jax.random.uniform(key, (count,), minval=-1, maxval=1),
    {},
  )  # at once: it compiles in no time
  for name, shape in shapes.items():
    leaf, drawn = drawn[: math.prod(shape)].reshape(shape), drawn[math.prod(shape) :]
    if name.endswith('bias'):
      leaves[name] = jnp.zeros(shape)
    else:  # one output pixel sums 3 x 3 cells of a convolution, one of `up`
      leaves[name] = leaf / math.sqrt(
        shape[-2] * (9 if len(shape) == 4 and '/up/' not in name else 1)
      )
  return tree.nested(leaves)


def _layer(name, *shape, bias=True):
  return {f'{name}/kernel': shape} | ({f'{name}/bias': shape[-1:]} if bias else {})


# --- forward ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames='relu')
def apply(params, intermediate_layers, *, relu=False):
  """Outputs [B, 16 ceil(h / 2), 16 ceil(w / 2), K] of four intermediate_layers: raw logits, or
  normals of any length.

  `relu`: before the last layer, as for depth in transformers' Tipsv2Dpt; the official PyTorch code
  leaves it out unless it is told otherwise.
  """
  if len(intermediate_layers) != len(_FACTORS):
    raise InputError(
      f'dpt: got {len(intermediate_layers)} intermediate_layers; expected {len(_FACTORS)}: (patch [B, h, w, D], cls [B, D]) each'
    )
  maps = [
    _reassemble(params['reassemble'][str(i)], *layer) for i, layer in enumerate(intermediate_layers)
  ]
  maps = [_conv(m, params['convs'][str(i)]) for i, m in enumerate(maps)]
  x = None
  for i, skip in enumerate(reversed(maps)):
    block = params['fusion'][str(i)]
    if x is None:
      x = skip
    else:
      x = x + _residual(depth_lib.resize(skip, x.shape[1:3]), block['residual'])
    x = _linear(_double(_residual(x, block['main'])), block['out'])
  x = _conv(x, params['project'])
  return _linear(jax.nn.relu(x) if relu else x, params['head'])


def depth(
  params,
  intermediate_layers,
  *,
  min_depth=depth_lib.MIN_DEPTH,
  max_depth=depth_lib.MAX_DEPTH,
  relu=True,
):
  """Depth [B, H', W'] in meters: the expectation over the bins, with eps = min_depth as in the
  released decoder.
  """
  logits = apply(params, intermediate_layers, relu=relu)
  return depth_lib.expectation(logits, min_depth=min_depth, max_depth=max_depth, eps=min_depth)


def _reassemble(p, patch, cls):
  kernel = p['readout']['kernel']
  beside = (
    cls @ kernel[patch.shape[-1] :] + p['readout']['bias']
  )  # the same for all patches: added, not repeated
  x = jax.nn.gelu(patch @ kernel[: patch.shape[-1]] + beside[:, None, None], approximate=True)
  x = _linear(x, p['project'])
  if 'up' in p:
    k, *_, c = p['up']['kernel'].shape
    b, h, w, _ = x.shape
    x = (
      jnp.einsum('bhwc,ijcd->bhiwjd', x, p['up']['kernel']).reshape(b, k * h, k * w, c)
      + p['up']['bias']
    )
  return _conv(x, p['down'], stride=2) if 'down' in p else x


def _residual(x, p):
  return x + _conv(jax.nn.relu(_conv(jax.nn.relu(x), p['conv1'])), p['conv2'])


def _conv(x, p, stride=1):
  y = jax.lax.conv_general_dilated(
    x, p['kernel'], (stride, stride), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  return y + p['bias'] if 'bias' in p else y


def _linear(x, p):
  return x @ p['kernel'] + p['bias']


def _double(x):
  """Twice the size, bilinear, the corners of both grids on each other (PyTorch's
  align_corners=True).
  """
  return jnp.einsum(
    'yh,bhwc,xw->byxc', _aligned(x.shape[1]), x, _aligned(x.shape[2]), optimize='optimal'
  )


def _aligned(n):
  position = np.arange(2 * n) * (n - 1) / (2 * n - 1)
  return np.maximum(1 - np.abs(position[:, None] - np.arange(n)), 0).astype(np.float32)


# --- official files -----------------------------------------------------------------------------


def _names(style):
  """[(our layer, its name in a file of this style)] of all layers but the head."""
  torch = style != 'official_jax'
  dot = lambda *parts: '.'.join(parts) if torch else 'decoder/dpt/' + '/'.join(parts)
  number = lambda name, i: f'{name}.{i}' if torch else f'{name}_{i}'
  inside = 'reassemble' if torch else 'reassemble_blocks'
  result = [('project', dot('project'))]
  for i, factor in enumerate(_FACTORS):
    result += [
      (f'reassemble/{i}/readout', dot(inside, number('readout_projects', i))),
      (
        f'reassemble/{i}/project',
        dot(inside, number('out_projections' if torch else 'out_projection', i)),
      ),
      (f'convs/{i}', dot(number('convs', i))),
      (f'fusion/{i}/out', dot(number('fusion_blocks', i), 'out_conv' if torch else 'Conv_0')),
    ]
    if factor != 1:
      ours = 'up' if factor > 1 else 'down'
      result.append((f'reassemble/{i}/{ours}', dot(inside, number('resize_layers', i))))
    for n, unit in enumerate(('residual', 'main')[not i :]):
      theirs = f'{unit}_unit' if torch else f'PreActResidualConvUnit_{n}'
      result += [
        (f'fusion/{i}/{unit}/{conv}', dot(number('fusion_blocks', i), theirs, conv))
        for conv in ('conv1', 'conv2')
      ]
  return result


def write_official(params, path, *, task, format='official_torch'):
  """Writes a decoder as an npz (for JAX: the zip of npy files, which is one) that the official code
  reads.

  format: 'official_torch' or 'official_jax'. The fourth output of normals, the uncertainty, has no
  place there: only three are written.
  """
  _check(format, FORMATS[:2], 'dpt: format')
  arrays = export(params, task=task, format=format)
  with open(path, 'wb') as file:
    np.savez(file, **arrays)


def export(params, *, task, format='official_torch'):
  """{name: float32 array} of a decoder under its official names; format: one of FORMATS."""
  _check(task, TASKS, 'dpt: task')
  _check(format, FORMATS, 'dpt: format')
  leaves = {name: np.asarray(x, np.float32) for name, x in tree.named_leaves(params)}
  if task == 'normals':
    leaves |= {name: leaves[name][..., :3] for name in ('head/kernel', 'head/bias')}
  jax_style = format == 'official_jax'
  head = {
    'official_jax': f'decoder/{TASKS[task]}',
    'official_torch': f'{task}_head',
    'hf': f'{task}_head.{task}_head',
  }[format]
  prefix = f'{task}_head.' if format == 'hf' else ''
  result = {}
  for ours, theirs in [*((o, prefix + t) for o, t in _names(format)), ('head', head)]:
    kernel, kernel_name = (
      leaves[f'{ours}/kernel'],
      f'{theirs}/kernel' if jax_style else f'{theirs}.weight',
    )
    result[kernel_name] = _out_jax(kernel, ours) if jax_style else _out_torch(kernel, ours)
    if f'{ours}/bias' in leaves:
      result[f'{theirs}/bias' if jax_style else f'{theirs}.bias'] = leaves[f'{ours}/bias']
  return result


def _check(value, known, what):
  if value not in known:
    raise InputError(f'{what}: got {value!r}; expected one of {sorted(known)}')


# Kernels: ours are [in, out] or [k, k, in, out]; of `up`, pixel (i, j) of a cell's k x k.


def _out_torch(kernel, layer):
  if layer.endswith('/up'):
    return np.ascontiguousarray(kernel.transpose(2, 3, 0, 1))
  kernel = np.ascontiguousarray(kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1))
  return kernel[..., None, None] if _pointwise(layer) else kernel


def _out_jax(kernel, layer):
  kernel = np.ascontiguousarray(kernel[::-1, ::-1]) if layer.endswith('/up') else kernel
  return kernel[None, None] if _pointwise(layer) else kernel


def _pointwise(layer):
  """Whether the official layer is a 1 x 1 convolution, ours a product."""
  return re.fullmatch(r'reassemble/\d/project|fusion/\d/out', layer) is not None

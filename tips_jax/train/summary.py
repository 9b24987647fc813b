"""What a run is before it runs: parameters, floating-point operations, memory. Allocates
nothing.
"""

import math

import jax

from tips_jax.core import tree
from tips_jax.core.types import Shapes
from tips_jax.data.batch import layout
from tips_jax.models import towers
from tips_jax.train import sharding, state
from tips_jax.train.method import Method


def shapes(method: Method) -> Shapes:
  """{feature path: shape} of one image: what the batch, the masks and every pass give."""
  c = method.config
  result = {f'batch.{name}': entry.shape for name, entry in layout(c.data).items()}
  for name, mask in c.masks.items():
    view = c.data.views[mask.view]
    patches = math.ceil(view.size / method.mask_patch[name]) ** 2
    masked = round(mask.ratio * patches)
    result[f'masks.{name}.mask'] = (view.count, patches)
    result[f'masks.{name}.masked_indices'] = (view.count, masked)
    result[f'masks.{name}.visible'] = (view.count, patches - masked)
  for group in method.order:
    for name in group:
      tower = c.towers[c.passes[name].tower]
      inputs = {argument: result[path] for argument, path in c.passes[name].inputs.items()}
      for output, shape in towers.module(tower).outputs(tower, inputs).items():
        result[f'{name}.{output}'] = shape
  return result


def flops(method: Method) -> dict[str, float]:
  """{pass: forward and backward FLOPs per image}, by closed form; normalization and softmax are
  left out.
  """
  c = method.config
  known = shapes(method)
  result = {}
  for group in method.order:
    for name in group:
      p = c.passes[name]
      tower = c.towers[p.tower]
      inputs = {argument: known[path] for argument, path in p.inputs.items()}
      result[name] = towers.module(tower).flops(tower, inputs)
      if p.by == 'student':  # the backward pass computes twice as much
        result[name] *= 3
  return result


def text(method: Method, *, devices: int = 1) -> str:
  """The dry-run page: parameter table, FLOPs and the memory of the state."""
  c = method.config
  abstract = jax.eval_shape(lambda: state.init(method))
  sizes = dict(zip(sharding.AXES, sharding.shape(c.mesh, devices)))
  o = c.optimizer
  lines = [
    f'{"parameter":<58}{"shape":<22}{"count":>13}  '
    f'{"dtype":<9}{"sharding":<26}{"decay":>6}{"rate":>6}'
    f'{"frozen":>8}'
  ]
  for name, leaf in tree.named_leaves({'params': abstract.params}):
    spec = [a or '-' for a in sharding.spec(c.mesh.rules, sizes, name, leaf)]
    short = name.removeprefix('params/')
    decay = o.weight_decay * tree.match(o.decay_rules, short, 'optimizer.decay_rules')
    rate = tree.match(o.lr_rules, short, 'optimizer.lr_rules')
    frozen = tree.match(o.freeze_rules, short, 'optimizer.freeze_rules')
    lines.append(
      f'{short:<58}{"x".join(map(str, leaf.shape)) or "scalar":<22}{leaf.size:>13,}  '
      f'{leaf.dtype!s:<9}'
      f'{",".join(spec):<26}{decay:>6g}{rate:>6g}{frozen:>8g}'
    )
  lines += ['', f'{"tower":<28}{"parameters":>16}{"":4}by']
  for tower, params in abstract.params.items():
    lines.append(f'{tower:<28}{tree.size(params) / 1e6:>14.2f} M    student (float32)')
  for by, covered in abstract.teachers.items():
    for tower, params in covered.items():
      lines.append(
        f'{tower:<28}{tree.size(params) / 1e6:>14.2f} M    {by} ({c.teachers[by].kind}, float32)'
      )
  parts, batch = flops(method), c.schedule.batch_size
  total = sum(parts.values())
  lines += ['', f'{"pass":<28}{"GFLOP per image":>16}{"share":>8}']
  lines += [f'{n:<28}{f / 1e9:>16.2f}{f / max(total, 1):>8.1%}' for n, f in parts.items()]
  lines += [
    f'{"all passes":<28}{total / 1e9:>16.2f}',
    f'per step of {batch:,} images: {total * batch / 1e12:,.2f} TFLOP',
    '',
  ]
  each = 1
  for size in sizes.values():
    each *= size
  lines.append(
    f'memory of the state on {each} device(s), mesh {sizes}: GiB in all, and of one device'
  )
  for part in ('params', 'teachers', 'optimizer', 'loss_state'):
    leaves = tree.named_leaves({part: getattr(abstract, part)})
    own = sum(
      x.size
      * x.dtype.itemsize
      / math.prod(sizes[a] for a in sharding.spec(c.mesh.rules, sizes, n, x) if a)
      for n, x in leaves
    )
    total = sum(x.size * x.dtype.itemsize for _, x in leaves)
    lines.append(f'{part:<28}{total / 2**30:>14.3f}{own / 2**30:>14.3f}')
  lines.append(f'{"gradient (during a step)":<28}{tree.nbytes(abstract.params) / 2**30:>14.3f}')
  return '\n'.join(lines)

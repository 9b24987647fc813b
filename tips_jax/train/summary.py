"""What a run is before it runs: parameters, floating-point operations, memory. Allocates
nothing.
"""

import math

import jax

from tips_jax.core import schema, tree
from tips_jax.train import sharding, state


def _transformer(width, depth, mlp, ffn, tokens):
  """Forward FLOPs of a stack: matrices 2 per weight and token, attention 4 N^2 d (tips.md, section
  7).
  """
  matrices = 4 * width**2 + (3 if ffn == 'swiglu' else 2) * width * mlp
  return depth * (2 * matrices * tokens + 4 * tokens**2 * width)


def flops(method):
  """{pass or term: forward and backward FLOPs per image}, by closed form; normalization and softmax
  left out.
  """
  c, result, tokens = method.config, {}, {}
  for name in (n for group in method.order for n in group):
    p = c.passes[name]
    tower = c.towers[p.tower]
    if isinstance(tower, schema.ViT):
      view = c.data.views[p.inputs['images'].removeprefix('batch.')]
      n, count = math.ceil(view.size / tower.patch) ** 2, view.count
      if 'visible' in p.inputs:
        n -= round(c.masks[p.inputs['visible'].split('.')[1]].ratio * n)
      tokens[name] = {**{cls: count for cls in tower.cls}, 'patch': n * count}
      one = _transformer(tower.width, tower.depth, tower.mlp, tower.ffn, n + len(tower.cls))
      forward = count * (one + 2 * 3 * tower.patch**2 * tower.width * n)
    elif isinstance(tower, schema.TextTower):
      forward = _transformer(tower.width, tower.depth, tower.mlp, 'relu', c.data.text_length)
    elif isinstance(tower, schema.DINOHead):
      source, output = p.inputs['tokens'].split('.')
      rows = tokens[source][output]
      if 'masked_indices' in p.inputs:
        rows = round(rows * c.masks[p.inputs['masked_indices'].split('.')[1]].ratio)
      widths = (
        [tower.width] + [tower.hidden] * (tower.layers - 1) + [tower.bottleneck, tower.prototypes]
      )
      forward = 2 * rows * sum(a * b for a, b in zip(widths, widths[1:]))
    elif isinstance(tower, schema.PixelDecoder):
      mask = c.masks[p.inputs['mask'].split('.')[1]]
      view = c.data.views[mask.view]
      n, count = math.ceil(view.size / tower.patch) ** 2, view.count
      one = _transformer(tower.decoder_width, tower.depth, tower.mlp, 'gelu', n)
      forward = count * (one + 2 * n * tower.decoder_width * (tower.width + 3 * tower.patch**2))
    elif isinstance(tower, schema.ProjectionHead):
      forward = 2 * tower.width * tower.output
    else:
      forward = 0
    result[name] = forward * (3 if p.by == 'student' else 1)
  return result


def text(method, *, devices=1):
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
  for by, towers in abstract.teachers.items():
    for tower, params in towers.items():
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

"""What a run is before it runs: parameters, floating-point operations, memory. Allocates
nothing.
"""

import math

import jax
import jax.numpy as jnp

from tips_jax.core import schema, tree
from tips_jax.core.errors import InputError
from tips_jax.core.types import Shapes
from tips_jax.data.reading.batch import layout
from tips_jax.models import towers
from tips_jax.objectives import masks
from tips_jax.train import optim, sharding, state
from tips_jax.train.method import Method
from tips_jax.train.step import pick


def shapes(method: Method) -> Shapes:
  """{feature path: shape} of one image: what the batch, the masks and every pass give."""
  c = method.config
  result = {f'batch.{name}': entry.shape for name, entry in layout(c.data).items()}
  for name, mask in c.masks.items():
    if isinstance(mask, schema.WordMask):
      for output, entries in masks.outputs(mask, c.data.text_length).items():
        result[f'masks.{name}.{output}'] = (entries,)
      continue
    view = c.data.views[mask.view]
    patches = math.ceil(view.size / method.mask_unit[name]) ** 2
    masked = masks.slots(mask, patches)
    if not 0 < masked < patches:
      raise InputError(
        f'masks.{name}.ratio: got {mask.ratio}, {masked} of the {patches} patches of the view '
        f'{mask.view!r}; expected at least one, and not all'
      )
    for output, entries in masks.outputs(mask, patches).items():
      result[f'masks.{name}.{output}'] = (view.count, entries)
  for group in method.order:
    for name in group:
      tower = c.towers[c.passes[name].tower]
      inputs = pick(result, c.passes[name].inputs)
      _check_inputs(f'passes.{name}.inputs', inputs, tower)
      for output, shape in towers.module(tower).outputs(tower, inputs).items():
        result[f'{name}.{output}'] = shape
  return result


def _check_inputs(where, given, tower):
  """InputError for a feature that a tower cannot take: of other axes, or of another width."""
  examples = towers.inputs(tower)
  any_axes = getattr(towers.module(tower), 'ANY_AXES', ())
  for arg, shape in given.items():
    example = examples[arg]
    expected = example.shape[1:]
    fits = len(shape) == len(expected) or arg in any_axes
    if jnp.issubdtype(example.dtype, jnp.floating):  # vectors, with any axes before them
      fits = shape[-1:] == expected[-1:]
    if not fits:
      raise InputError(f'{where}.{arg}: got the shape {shape}; expected one such as {expected}')


def flops(method: Method) -> dict[str, float]:
  """{pass: forward and backward FLOPs per image}, by closed form; normalization and softmax are
  left out.
  """
  return _by_pass(method, 'flops')


def embedding_flops(method: Method) -> dict[str, float]:
  """{pass: those of `flops` that embed patches}. A compiler leaves some of them out: pixels need no
  gradient, and passes that see the same pixels share them.
  """
  return _by_pass(method, 'embedding_flops')


def _by_pass(method, count):
  c = method.config
  known = shapes(method)
  trained = _trained(method)
  slopes = set()  # passes that a gradient goes through
  result = {}
  for group in method.order:
    for name in group:
      p = c.passes[name]
      tower = c.towers[p.tower]
      times = 1.0
      reads = {path.split('.')[0] for path in p.inputs.values()}
      # The backward pass computes as much for the inputs, and again for the weights.
      if p.by == 'student' and (trained[p.tower] or reads & slopes):
        slopes.add(name)
        times = 2 + trained[p.tower]
      of_tower = getattr(towers.module(tower), count, None)
      if of_tower is not None:
        result[name] = times * of_tower(tower, pick(known, p.inputs))
  return result


def _trained(method):
  """{tower: share of its matrices that are not frozen for good}."""
  abstract = jax.eval_shape(lambda: state.parameters(method)[0])
  trained = optim.split(method.config, abstract)[0]
  result = dict.fromkeys(method.config.towers, 0.0)
  for tower, leaves in abstract.items():
    sizes = [_matrices(leaves), _matrices(trained[tower])]
    result[tower] = sizes[1] / sizes[0] if sizes[0] else 1.0
  return result


def _matrices(leaves):
  return sum(x.size for name, x in tree.named_leaves(leaves) if name.endswith('kernel'))


def sinkhorn_warning(method: Method) -> str:
  """One line that names the losses whose batch has fewer targets than there are prototypes, which
  Sinkhorn cannot use evenly; '' where there are none.
  """
  c = method.config
  known = shapes(method)
  few = []
  for name, loss in c.losses.items():
    if loss.kind != 'dino' or loss.args.get('centering') != 'sinkhorn':
      continue
    targets = c.schedule.batch_size * math.prod(known[loss.inputs['teacher']][:-1])
    prototypes = c.towers[method.losses[name].parameters['teacher_prototypes'].tower].prototypes
    if targets < prototypes:
      few.append(f'{name} has {targets:,} for {prototypes:,}')
  if not few:
    return ''
  return (
    'warning: Sinkhorn spreads the targets of a batch evenly over the prototypes, and there are '
    f'fewer targets: {", ".join(few)}; a larger batch or fewer prototypes would fit'
  )


def text(method: Method, *, devices: int = 1) -> str:
  """The dry-run page: parameter table, FLOPs and the memory of the state."""
  c = method.config
  abstract = jax.eval_shape(lambda: state.init(method))
  sizes = dict(zip(sharding.AXES, sharding.shape(c.mesh, devices)))
  lines = [*_parameters(c, abstract, sizes), '', *_towers(c, abstract), '', *_passes(method), '']
  return '\n'.join([*lines, *_memory(c, abstract, sizes)])


def _parameters(c, abstract, sizes):
  """A line for each parameter: shape, size, place, and what the optimizer's rules say of it."""
  lines = [
    f'{"parameter":<58}{"shape":<22}{"count":>13}  '
    f'{"dtype":<9}{"sharding":<26}{"decay":>6}{"rate":>6}'
    f'{"frozen":>8}'
  ]
  o = c.optimizer
  for name, leaf in tree.named_leaves({'params': abstract.params}):
    axes = ','.join(axis or '-' for axis in sharding.spec(c.mesh.rules, sizes, name, leaf))
    short = name.removeprefix('params/')
    shape = 'x'.join(map(str, leaf.shape)) or 'scalar'
    decay = optim.ramp(o.weight_decay, 0.0) * tree.match(
      o.decay_rules, short, 'optimizer.decay_rules'
    )
    rate = tree.match(o.lr_rules, short, 'optimizer.lr_rules')
    frozen = tree.match(o.freeze_rules, short, 'optimizer.freeze_rules')
    lines.append(
      f'{short:<58}{shape:<22}{leaf.size:>13,}  '
      f'{leaf.dtype!s:<9}{axes:<26}{decay:>6g}{rate:>6g}{frozen:>8g}'
    )
  return lines


def _towers(c, abstract):
  owners = {'student (float32)': abstract.params}
  for by, covered in abstract.teachers.items():
    owners[f'{by} ({c.teachers[by].kind}, float32)'] = covered
  lines = [f'{"tower":<28}{"parameters":>16}{"":4}by']
  for owner, covered in owners.items():
    for tower, params in covered.items():
      lines.append(f'{tower:<28}{tree.size(params) / 1e6:>14.2f} M    {owner}')
  return lines


def _passes(method):
  parts = flops(method)
  batch = method.config.schedule.batch_size
  total = sum(parts.values())
  lines = [f'{"pass":<28}{"GFLOP per image":>16}{"share":>8}']
  for name, part in parts.items():
    # A method may have parameters alone, and no pass that computes anything.
    lines.append(f'{name:<28}{part / 1e9:>16.2f}{part / max(total, 1):>8.1%}')
  lines.append(f'{"all passes":<28}{total / 1e9:>16.2f}')
  lines.append(f'per step of {batch:,} images: {total * batch / 1e12:,.2f} TFLOP')
  return lines


def _memory(c, abstract, sizes):
  lines = [
    f'memory of the state on {math.prod(sizes.values())} device(s), mesh {sizes}: GiB in all, and '
    'of one device'
  ]
  for part in ('params', 'teachers', 'optimizer', 'loss_state'):
    of_one = 0.0
    leaves = {part: getattr(abstract, part)}
    for name, leaf in tree.named_leaves(leaves):
      axes = sharding.spec(c.mesh.rules, sizes, name, leaf)
      of_one += tree.nbytes(leaf) / math.prod(sizes[axis] for axis in axes if axis)
    lines.append(f'{part:<28}{tree.nbytes(leaves) / 2**30:>14.3f}{of_one / 2**30:>14.3f}')
  trained = optim.split(c, abstract.params)[0]
  lines.append(f'{"gradient (during a step)":<28}{tree.nbytes(trained) / 2**30:>14.3f}')
  return lines

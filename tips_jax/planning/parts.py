"""Attributes an instruction to a part of the method, by its op_name."""

import dataclasses
import re
from collections.abc import Container

from tips_jax.planning.hlo import Array
from tips_jax.train.method import Method
from tips_jax.train.step import LOSS_SCOPE

_LAYERS = (
  ('kernel', r'pallas_call|dot_product_attention_(fwd|bwd)'),
  ('attention', r'/attention\b'),
  ('mlp', r'/mlp\b'),
  ('norm', r'/norm\d?\b'),
  ('embedding', r'/(embedding|posembed|TextTower\.(tokens|setup)/(all_)?gather)\b'),
)


@dataclasses.dataclass(frozen=True)
class Part:
  name: str  # pass or passes ('clean+masked'), loss ('loss masked'), 'update', 'other'
  direction: str  # 'forward', 'backward', 'recompute'
  layer: str


def part(op_name: str, passes: Container[str], losses: Container[str]) -> Part:
  """Part of an op_name; `passes` and `losses` are the scopes that the step names."""
  direction = 'forward'
  if 'transpose(' in op_name:
    direction = 'recompute' if 'rematted_computation' in op_name else 'backward'
  layer = next((name for name, pattern in _LAYERS if re.search(pattern, op_name)), 'rest')
  for piece in op_name.split('/'):
    # Transformations wrap a scope: 'transpose(jvp(clean))' is 'clean'.
    scope = re.sub(r'^.*\(|\)+$', '', piece)
    if scope in passes:
      return Part(scope, direction, layer)
    if scope in losses:
      return Part(f'loss {scope.removeprefix(LOSS_SCOPE)}', direction, 'loss')
  if op_name.startswith('jit(') and 'jvp(' not in op_name:
    return Part('update', 'forward', 'optimizer')
  return Part('other', direction, layer)


def scopes(method: Method) -> tuple[set[str], set[str]]:
  """(scopes of the passes, scopes of the losses) as the step names them."""
  passes = {*map('+'.join, method.order), *method.config.passes}
  return passes, {LOSS_SCOPE + name for name in method.config.losses}


def buffer(
  op_name: str, opcode: str, array: Array | None, weights: Container[tuple[int, ...]]
) -> str:
  """Group of a temporary; `weights`: shapes of the parameters' shards on one chip."""
  if opcode in ('all-gather', 'all-gather-start') or 'all_gather' in op_name:
    return 'gathered weights'
  differentiated = re.search(r'jvp\((?=\w)', op_name)
  in_tower = re.search(r'/(ViT|TextTower)\b', op_name)
  if 'DINOHead' in op_name or differentiated and not in_tower:
    return 'logits and losses'
  # Nothing marks a weight or its gradient, but activations of the same shape are rare.
  is_weight = array is not None and array.dims in weights
  # The transposed program is the backward pass; its op_names have jvp( inside, too.
  if 'transpose(' in op_name:
    kinds = ('backward activations', 'gradients')
  elif 'jvp(' in op_name:
    kinds = ('kept activations', 'weights in bfloat16')
  else:
    return 'update and other'
  return kinds[is_weight]

"""Which part of a method an instruction serves, by its op_name: a pass or a term, the direction,
and the layer.
"""

import dataclasses
import re

_TOWERS = {'ViT', 'TextTower', 'DINOHead', 'ProjectionHead', 'PixelDecoder', 'Logit'}
_LAYERS = (
  ('kernel', r'pallas_call|attention_kernel|fmha'),
  ('attention', r'/attention\b'),
  ('mlp', r'/mlp\b'),
  ('norm', r'/norm\d?\b'),
  ('embedding', r'/(embedding|posembed|TextTower/(gather|all_gather))\b'),
)


@dataclasses.dataclass(frozen=True)
class Part:
  name: str  # pass or passes ('clean+masked'), term ('loss masked'), 'update', 'other'
  direction: str  # 'forward', 'backward', 'recompute'
  layer: str


def part(op_name, passes, losses):
  """Part of an op_name; `passes` and `losses` are the scopes that the step names."""
  direction = 'forward'
  if 'transpose(' in op_name:
    direction = 'recompute' if 'rematted_computation' in op_name else 'backward'
  layer = next((name for name, pattern in _LAYERS if re.search(pattern, op_name)), 'rest')
  pieces = op_name.split('/')
  for piece, after in zip(pieces, pieces[1:] + ['']):
    scope = re.sub(r'^.*\(|\)+$', '', piece)
    plain = scope == piece
    if scope in passes and (scope not in losses or plain or after in _TOWERS):
      return Part(scope, direction, layer)
    if scope in losses and (scope not in passes or not plain):
      return Part(f'loss {scope}', direction, 'loss')
  if op_name.startswith('jit(') and 'jvp(' not in op_name:
    return Part('update', 'forward', 'optimizer')
  return Part('other', direction, layer)


def scopes(method):
  """(scopes of the passes, scopes of the losses) as the step names them."""
  passes = {'+'.join(group) for group in method.order} | set(method.config.passes)
  return passes, set(method.config.losses)


def buffer(op_name, opcode, array, weights):
  """Group of a temporary; `weights`: the dims of the parameters' parts on one chip."""
  if opcode in ('all-gather', 'all-gather-start') or 'all_gather' in op_name:
    return 'gathered weights'
  if (
    'DINOHead' in op_name
    or re.search(r'jvp\((?=\w)', op_name)
    and not re.search(r'/(ViT|TextTower)\b', op_name)
  ):
    return 'logits and losses'
  if 'transpose(' in op_name:
    return 'gradients' if array is not None and array.dims in weights else 'backward activations'
  if 'jvp(' in op_name:
    return (
      'weights in bfloat16' if array is not None and array.dims in weights else 'kept activations'
    )
  return 'update and other'

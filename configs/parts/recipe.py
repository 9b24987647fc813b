"""From a recipe to a config: the recipe that an argument names, late losses, `runlocal`."""

import collections
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import ml_collections

from tips_jax.core import schema, strict
from tips_jax.core.errors import InputError

Recipe = dict[str, Any]  # plain nested dicts, as tips_jax.core.schema.Config reads them


def merge(*parts: Recipe) -> Recipe:
  """Nested dicts, later ones win."""
  result = {}
  for part in parts:
    for key, value in part.items():
      if isinstance(value, dict):
        old = result.get(key)
        # Copied even where nothing is there to merge with: pages share module constants.
        value = merge(old if isinstance(old, dict) else {}, value)
      result[key] = value
  return result


def select(
  arg: str,
  recipes: dict[str, Callable[[], Recipe]],
  *,
  changes: Mapping[str, Callable[[Recipe], Recipe]] = MappingProxyType({}),
  runlocal: Recipe | None = None,
) -> ml_collections.ConfigDict:
  """The config that a --config argument names, as 'v2,hr' names recipes['v2,hr'].

  The first recipe that has all the options: 'hr' alone is 'v1,hr', nothing at all is the first.
  changes: options that change any of the recipes. runlocal: what this option merges in where the
  recipe is small already.
  """
  options = {option for option in arg.split(',') if option}
  known = {option for name in recipes for option in name.split(',')} | {'runlocal', *changes}
  for option in sorted(options - known):
    raise strict.unknown('--config argument', option, known)
  for name, make in recipes.items():
    if options - {'runlocal', *changes} <= set(name.split(',')):
      recipe = make()
      for option, change in changes.items():
        if option in options:
          recipe = change(recipe)
      if 'runlocal' not in options:
        return finish(recipe)
      if runlocal:
        return finish(merge(recipe, runlocal))
      return finish(recipe, 'runlocal')
  raise InputError(f'--config argument: got {arg!r}; expected one of {sorted(recipes)}')


def finish(recipe: Recipe, arg: str = '') -> ml_collections.ConfigDict:
  """The recipe with every field of the schema; `arg` 'runlocal' shrinks it to seconds on a CPU."""
  if arg not in ('', 'runlocal'):
    raise strict.unknown('--config argument', arg, ('runlocal',))
  if arg:
    recipe = runlocal(recipe)
  return ml_collections.ConfigDict(strict.plain(strict.build(schema.Config, recipe)))


def late(recipe: Recipe, *losses: str, begin: float = 0.1, until: float = 0.3) -> Recipe:
  """The recipe with the weights of these losses raised from zero between two fractions of the run:
  a short run needs features to distill (docs/lab.md). Before `begin` they cost nothing.
  """
  ramps = {}
  for name in losses:
    weight = recipe['losses'][name]['weight']
    ramps[name] = dict(weight=dict(start=0.0, end=weight, begin=begin, until=until))
  return merge(recipe, dict(losses=ramps))


def only(recipe: Recipe, losses: Collection[str]) -> Recipe:
  """The recipe with these losses and the monitors, which weigh nothing, and without the passes,
  towers, masks, teachers, views and texts that none of them needs.
  """
  kept = {}
  paths = []
  for name, loss in recipe['losses'].items():
    if name in losses or not loss['weight']:
      kept[name] = loss
      paths += loss['inputs'].values()
  used = collections.defaultdict(set)  # group of the recipe -> names in it
  while paths:
    root, name, *_ = paths.pop().split('.')
    if root == 'batch':
      used['data'].add(name.removesuffix('_valid'))
    elif root == 'masks':
      used['masks'].add(name)
    elif root in recipe['passes']:
      step = recipe['passes'][root]
      used['passes'].add(root)
      used['towers'].add(step['tower'])
      used['teachers'].add(step.get('by'))
      paths += step['inputs'].values()
    else:  # a parameter, 'student.head.prototypes'
      used['teachers'].add(root)
      used['towers'].add(name)
  result = recipe | dict(losses=kept)
  for group in ('passes', 'towers', 'masks', 'teachers'):
    result[group] = _among(recipe[group], used[group])
  data = recipe['data']
  views = _among(data['views'], used['data'])
  return result | dict(data=data | dict(views=views, texts=_among(data['texts'], used['data'])))


def _among(group: Recipe, names: Collection[str]) -> Recipe:
  return {name: value for name, value in group.items() if name in names}


_TINY = {
  'vit': dict(width=32, depth=2, heads=2, mlp=64, patch=14, grid=4),
  'resnet': dict(widths=(8, 8, 16, 32), depths=(1, 1, 1, 1), grid=2),
  'mobilenetv2': dict(
    stem=8, widths=(8, 8, 8, 8, 16, 16, 16), depths=(1,) * 7, expansion=2, last=32
  ),
  'swin': dict(embedding=4, depths=(1, 1, 2, 1), head_width=4, window=4),
  'fusion': dict(widths=(8, 16), output=32),
  'word_head': dict(width=32, vocab=1024),
  'text': dict(width=32, depth=2, heads=2, mlp=64, vocab=1024),
  'dino_head': dict(width=32, hidden=32, bottleneck=16, prototypes=64),
  'projection': dict(width=32, output=16),
  'region_head': dict(width=32, output=16),
  'pixel_decoder': dict(width=32, decoder_width=16, depth=1, heads=2, mlp=32, grid=4),
  'logit': {},
}


def _tiny(tower):
  changes = _TINY[tower['kind']]
  if 'reduce' in tower:
    changes = changes | dict(reduce=dict(after=1, neighbors=2))
  return changes


def runlocal(recipe: Recipe) -> Recipe:
  """The same program on generated scenes with tiny towers: seconds on a laptop."""
  largest = max(view['size'] for view in recipe['data']['views'].values())
  views = {}
  for name, view in recipe['data']['views'].items():
    size = 56 if view['size'] > largest / 2 else 28  # 4 or 2 patches a side
    views[name] = dict(size=size, count=min(view.get('count', 1), 2))
  losses = {}
  for name, loss in recipe['losses'].items():
    if 'logits' in loss.get('args', {}):  # a CPU is slow with 16 bits
      losses[name] = dict(args=dict(logits='float32'))
  return merge(
    recipe,
    dict(
      losses=losses,
      towers={name: _tiny(tower) for name, tower in recipe['towers'].items()},
      compute=dict(dtype='float32', remat='none'),
      mesh=dict(data=-1, fsdp=1),
      data=dict(
        views=views,
        store='',
        extra_stores=(),
        tokenizer='',
        scenes=dict(train=96, test=32, size=64),
        threads=2,
      ),
      schedule=dict(total_steps=8, batch_size=8, warmup_steps=2),
      init_from='',
      init_required=False,
      checkpoint=dict(every_steps=4),
      log=dict(every_steps=1),
      evals=dict(size=56, batch_size=16, limit=64),
    ),
  )

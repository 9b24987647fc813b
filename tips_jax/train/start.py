"""Where a run starts: initial weights, another run's (`init_from`), a frozen teacher's; and what its weights mean."""
import json

import jax
import jax.numpy as jnp

from tips_jax.core import strict
from tips_jax.train import checkpoint
from tips_jax.train import state as state_lib


def contract(config, pipeline):
  """What weights mean: kept in every checkpoint and compared when one is read."""
  image = {n: t.patch for n, t in config.towers.items() if t.kind == 'vit'}
  return json.loads(json.dumps({
      'config': strict.plain(config), 'towers': strict.plain(config.towers),
      'text_length': config.data.text_length if config.data.texts else None,
      'tokenizer_sha256': pipeline.tokenizer.sha256 if pipeline.tokenizer else None,
      'preprocessing': {'channels': 'RGB', 'range': [0, 1], 'mean': 0, 'std': 1, 'resize': 'bilinear, antialiased',
                        'padding': 'centre, zeros, to a multiple of the patch', 'patch': image,
                        'lower_case': 'ASCII'},
      'data_fingerprint': pipeline.fingerprint}))


def initial_state(method, shardings, abstract, say):
  """Initial weights, and the parts that `init_from` and frozen teachers bring; EMA teachers start as the student."""
  c = method.config
  state = jax.jit(lambda: state_lib.init(method), out_shardings=shardings)()
  if c.init_from:
    path = checkpoint.find(c.init_from, 'init_from')
    if 'params' in c.init_parts:
      state = state.replace(params=_from_run(path, 'params', abstract.params, state.params, say))
      ema = {name: {tower: jax.tree.map(jnp.copy, state.params[tower]) for tower in towers}
             for name, towers in state.teachers.items() if c.teachers[name].kind == 'ema'}
      state = state.replace(teachers={**state.teachers, **ema})
    if 'teachers' in c.init_parts:
      state = state.replace(teachers={
          name: _from_run(path, 'teachers', abstract.teachers[name], towers, say, name)
          for name, towers in state.teachers.items()})
    for part in ('memory', 'optimizer'):
      if part in c.init_parts:
        found = _from_run(path, 'train', {part: getattr(abstract, part)}, {part: getattr(state, part)}, say)
        state = state.replace(**found)
  for name, teacher in c.teachers.items():
    if teacher.kind == 'frozen':
      weights = frozen_teacher(name, teacher, abstract.teachers[name], say)
      state = state.replace(teachers={**state.teachers, name: weights})
  return state


def _from_run(path, part, wanted, own, say, within=''):
  """`own`, with those entries that a part of another run's checkpoint holds; says which are there."""
  prefix = f'{within}/' if within else ''
  found = checkpoint.names(path, part)
  here = {k: v for k, v in wanted.items() if any(n.startswith(f'{prefix}{k}/') for n in found)}
  fresh = sorted(set(wanted) - set(here))
  say(f'{within or part} from {path}: {", ".join(here) or "nothing"}'
      + (f'; not there: {", ".join(fresh)}' if fresh else ''))
  if not here:
    return own
  loaded = checkpoint.load(path, part, {within: here} if within else here)
  return {**own, **(loaded[within] if within else loaded)}


def frozen_teacher(name, teacher, abstract, say):
  """Weights of a frozen teacher: the other run's EMA teacher where it has one, its student elsewhere."""
  path = checkpoint.find(teacher.init_from, f'teachers.{name}.init_from')
  saved, result = checkpoint.names(path, 'teachers'), {}
  for tower, leaves in abstract.items():
    other = teacher.rename.get(tower, tower)
    owner = next((n.split('/')[0] for n in saved if n.split('/')[1] == other), None)
    if owner:
      result[tower] = checkpoint.load(path, 'teachers', {owner: {other: leaves}})[owner][other]
    else:
      result[tower] = checkpoint.load(path, 'params', {tower: leaves}, rename={other: tower})[tower]
    say(f'{name}/{tower} from {path}: {owner or "student"}/{other}')
  return result

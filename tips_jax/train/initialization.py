"""Where a run starts: initial weights, other ones (`init_from`), a frozen teacher's; and what its
weights mean.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.core import schema, strict, tree
from tips_jax.core.errors import InputError
from tips_jax.data.pipeline import Pipeline
from tips_jax.interop import read
from tips_jax.interop import weights as weights_lib
from tips_jax.runs import folder as runs
from tips_jax.train import state as state_lib
from tips_jax.train.method import Method
from tips_jax.train.state import State


def contract(config: schema.Config, pipeline: Pipeline) -> dict[str, Any]:
  """What weights mean: kept in every checkpoint and compared when one is read."""
  image = {n: t.patch for n, t in config.towers.items() if t.kind == 'vit'}
  return json.loads(
    json.dumps(
      {
        'config': strict.plain(config),
        'towers': strict.plain(config.towers),
        'text_length': config.data.text_length if config.data.texts else None,
        'tokenizer_sha256': pipeline.tokenizer.sha256 if pipeline.tokenizer else None,
        'preprocessing': weights_lib.PREPROCESSING | {'patch': image},
        'data_fingerprint': pipeline.fingerprint,
      }
    )
  )


def initial_state(
  method: Method,
  shardings: State,
  abstract: State,
  say: Callable[[str], None],
  *,
  tokenizer_sha256: str | None = None,
) -> State:
  """Initial weights, and the parts that `init_from` and frozen teachers bring; EMA teachers start
  as the student.
  """
  c = method.config
  state = jax.jit(lambda: state_lib.init(method), out_shardings=shardings)()
  if c.init_from:
    foreign = not runs.is_run(c.init_from)
    if 'params' in c.init_parts:
      args = (abstract.params, state.params, say, tokenizer_sha256)
      state = state.replace(params=_foreign(c, *args) if foreign else _from_run(c, 'params', *args))
      ema = {
        name: {tower: jax.tree.map(jnp.copy, state.params[tower]) for tower in towers}
        for name, towers in state.teachers.items()
        if c.teachers[name].kind == 'ema'
      }
      state = state.replace(teachers={**state.teachers, **ema})
    if foreign:
      say(f'teachers, losses and optimizer start fresh: {c.init_from} has none')
    else:
      state = _more_from_run(c, state, abstract, say)
  for name, teacher in c.teachers.items():
    if teacher.kind == 'frozen':
      weights = frozen_teacher(c, name, abstract.teachers[name], say)
      state = state.replace(teachers={**state.teachers, name: weights})
  return state


def _more_from_run(c, state, abstract, say):
  """What another run has beside its parameters, as `init_parts` says."""
  if 'teachers' in c.init_parts:
    state = state.replace(
      teachers={
        name: _from_run(c, 'teachers', abstract.teachers[name], towers, say, within=name)
        for name, towers in state.teachers.items()
      }
    )
  for part in ('loss_state', 'optimizer'):
    if part in c.init_parts:
      state = state.replace(
        **{part: _state_from_run(c, part, getattr(abstract, part), getattr(state, part), say)}
      )
  return state


def _state_from_run(c, part, abstract, initial, say):
  """The memory of the losses or the optimizer's state, whole."""
  path = runs.find(c.init_from, 'init_from')
  there = any(n.startswith(f'{part}/') for n in runs.names(path, 'train'))
  say(f'{part} from {path}: {"all" if there else "nothing"}')
  return runs.load(path, 'train', {part: abstract})[part] if there else initial


def _from_run(c, part, abstract, initial, say, tokenizer_sha256=None, *, within=''):
  """`initial`, with those leaves that a part of another run's checkpoint holds and the rules ask
  for.
  """
  path, prefix = runs.find(c.init_from, 'init_from'), f'{within}/' if within else ''
  saved = runs.names(path, part)
  there = {n.removeprefix(prefix) for n in saved if n.startswith(prefix)}
  wanted = _same_leaves(_chosen(c, abstract), there, f'init_from: {part}', rules=c.init_from_rules)
  _same_tokenizer(c, wanted, runs.contract(path).get('tokenizer_sha256'), tokenizer_sha256)
  # A position table may have another grid there; it is small, and comes whole.
  grids = {
    n: saved[prefix + n][0]
    for n, x in wanted.items()
    if n.endswith('posembed') and prefix + n in saved and saved[prefix + n][0] != x.shape
  }
  shaped = {
    n: jax.ShapeDtypeStruct(grids[n], x.dtype, sharding=_whole(x)) if n in grids else x
    for n, x in wanted.items()
  }
  if not wanted:
    _report(f'{within or part} from {path}', {}, initial, say)
    return initial
  nested = tree.nested(shaped)
  loaded = runs.load(path, part, {within: nested} if within else nested)
  loaded = dict(tree.named_leaves(loaded[within] if within else loaded))
  loaded |= {
    n: _put(_fit(n, np.asarray(loaded[n]), wanted[n].shape, say), wanted[n]) for n in grids
  }
  return _report(f'{within or part} from {path}', loaded, initial, say)


def _foreign(c, abstract, initial, say, tokenizer_sha256=None):
  """`initial`, with those leaves that weights of another format hold and the rules ask for."""
  found = read.read(c.init_from, what='init_from')
  _report_notes(found, say)
  arrays = _named_as_here(c, found)
  wanted = _same_leaves(_chosen(c, abstract), arrays, 'init_from', rules=c.init_from_rules)
  _same_tokenizer(c, wanted, weights_lib.sha256(found.tokenizer), tokenizer_sha256, say)
  loaded = {n: _put(_fit(n, arrays[n], x.shape, say), x) for n, x in wanted.items()}
  return _report(f'params from {c.init_from}', loaded, initial, say)


def _named_as_here(c, found):
  """{parameter name of this config: array} of foreign weights."""
  here = weights_lib.tower_names(c.evals, c.towers)
  arrays = {}
  for tower, params in found.params.items():
    for name, x in weights_lib.flat(params).items():
      arrays[f'{here.get(tower, "")}/{name}'] = x
  return arrays


def _chosen(c, abstract):
  """{name: leaf} without those that the rules let start fresh."""
  return {
    n: x
    for n, x in tree.named_leaves(abstract)
    if tree.match(c.init_from_rules, n, 'init_from_rules')
  }


def _same_leaves(wanted, there, what, rules=(('.*', True),)):
  """Those of the wanted leaves whose tower is there. A tower is taken whole, but for the mask
  token.
  """
  groups = {n.split('/')[0] for n in wanted} & {n.split('/')[0] for n in there}
  wanted = {n: x for n, x in wanted.items() if n.split('/')[0] in groups}
  other = {
    n for n in there if n.split('/')[0] in groups and tree.match(rules, n, 'init_from_rules')
  }
  for n in sorted(wanted.keys() ^ other):
    if not n.endswith('/mask_token'):
      raise InputError(
        f'{what}: got {"no " if n in wanted else ""}{n}; expected '
        f'{"it" if n in wanted else "none"}: '
        'another kind of model; init_from_rules leaves parameters out'
      )
  return {n: x for n, x in wanted.items() if n in other}


def _fit(name, x, shape, say):
  """An array in a shape of ours: the position table is resized; anything else must fit."""
  if x.shape == shape:
    return x
  if name.endswith('posembed') and x.ndim == len(shape) == 4 and x.shape[-1] == shape[-1]:
    say(f'{name}: resized from {x.shape[1]}x{x.shape[2]} to {shape[1]}x{shape[2]}')
    return weights_lib.fit_positions(x, shape[1], f'init_from: {name}')
  raise InputError(
    f'init_from: {name}: got shape {x.shape}; expected {shape}: another size of model; '
    'init_from_rules leaves parameters out'
  )


def _same_tokenizer(c, wanted, there, here, say=None):
  """Embeddings of words mean nothing to another tokenizer."""
  if f'{c.evals.text_tower}/embedding' not in wanted or not here or there == here:
    return
  if there is None:
    say and say(
      f'init_from: {c.init_from} comes without its tokenizer: whether it is the one of the data is '
      'not known'
    )
    return
  raise InputError(
    f"init_from: got word embeddings of another tokenizer (SHA-256 {there[:12]}) than the data's "
    f'({here[:12]}); expected --config.data.tokenizer=FILE with theirs, or init_from_rules with '
    f"('{c.evals.text_tower}/.*', False)"
  )


def _put(x, like):
  """A host array as a global one; every process gives the parts of its devices."""
  return jax.make_array_from_callback(
    like.shape, like.sharding, lambda part: x[part].astype(like.dtype)
  )


def _whole(x):
  return jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())


def _report(what, loaded, initial, say):
  """`initial` with the loaded leaves in it; says which are there, whole groups by their name."""
  leaves = dict(tree.named_leaves(initial))
  say(
    f'{what}: {_summary(loaded, leaves) or "nothing"}'
    + (
      f'; fresh: {_summary(leaves.keys() - loaded.keys(), leaves)}'
      if leaves.keys() - loaded.keys()
      else ''
    )
  )
  return tree.map_named(lambda n, x: loaded.get(n, x), initial)


def _report_notes(found, say):
  for note in found.about.get('notes', ()):
    say(f'init_from: {note}')


def _summary(names, known):
  """Names, where a group is whole by the group's."""
  groups = {}
  for n in names:
    groups.setdefault(n.split('/')[0], []).append(n)
  whole = {g: sum(n.split('/')[0] == g for n in known) for g in groups}
  return ', '.join(
    x
    for g, some in sorted(groups.items())
    for x in ([g] if len(some) == whole[g] else sorted(some))
  )


def frozen_teacher(
  c: schema.Config, name: str, abstract: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
  """Weights of a frozen teacher: of another run its EMA teacher where it has one, its student
  elsewhere; or foreign.
  """
  teacher, result = c.teachers[name], {}
  if teacher.init_from and not runs.is_run(teacher.init_from):
    return _foreign_teacher(teacher, name, abstract, say)
  path = runs.find(teacher.init_from, f'teachers.{name}.init_from')
  saved = runs.names(path, 'teachers')
  for tower, leaves in abstract.items():
    other = teacher.rename.get(tower, tower)
    owner = next((n.split('/')[0] for n in saved if n.split('/')[1] == other), None)
    if owner:
      result[tower] = runs.load(path, 'teachers', {owner: {other: leaves}})[owner][other]
    else:
      result[tower] = runs.load(path, 'params', {tower: leaves}, rename={other: tower})[tower]
    say(f'{name}/{tower} from {path}: {owner or "student"}/{other}')
  return result


def _foreign_teacher(teacher, name, abstract, say):
  what = f'teachers.{name}.init_from'
  found = read.read(teacher.init_from, what=what)
  _report_notes(found, say)
  there = {tower: teacher.rename.get(tower, tower) for tower in abstract}
  missing = sorted(set(there.values()) - set(found.params))
  if missing:
    raise InputError(
      f'{what}: got {teacher.init_from!r}, which has no {missing[0]!r}; expected all of '
      f'{sorted(there.values())}: released weights come without heads'
    )
  arrays = {
    f'{tower}/{n}': x
    for tower, other in there.items()
    for n, x in weights_lib.flat(found.params[other]).items()
  }
  _same_leaves(dict(tree.named_leaves(abstract)), arrays, what)
  say(f'{name} from {teacher.init_from}: {", ".join(sorted(there.values()))}')
  return tree.map_named(lambda n, x: _put(_fit(n, arrays[n], x.shape, say), x), abstract)

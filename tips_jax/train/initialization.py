"""Where a run starts: initial weights, other ones (`init_from`), a frozen teacher's; and what its
weights mean.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.core import schema, strict, tree
from tips_jax.core.errors import InputError
from tips_jax.data.reading.pipeline import Pipeline
from tips_jax.data.tokenizer import Tokenizer
from tips_jax.interop import read
from tips_jax.interop import weights as weights_lib
from tips_jax.runs import folder as runs
from tips_jax.train import state as state_lib
from tips_jax.train.method import Method
from tips_jax.train.state import State


def contract(config: schema.Config, pipeline: Pipeline) -> dict[str, Any]:
  """What weights mean: kept in every checkpoint and compared when one is read."""
  patches = {}
  for name, tower in config.towers.items():
    if isinstance(tower, schema.ImageTower):
      patches[name] = tower.patch
  result = {
    'config': strict.plain(config),
    'towers': strict.plain(config.towers),
    'text_length': None,
    'tokenizer_sha256': None,
    'preprocessing': weights_lib.PREPROCESSING | {'patch': patches},
    'data_fingerprint': pipeline.fingerprint,
  }
  if config.data.texts:
    result['text_length'] = config.data.text_length
  if pipeline.tokenizer:
    result['tokenizer_sha256'] = pipeline.tokenizer.sha256
  # As it will be read back, so that the two can be compared: JSON has no tuples.
  return json.loads(json.dumps(result))


def require_sources(config: schema.Config) -> None:
  """InputError where the config names no weights for what must not start from random ones."""
  if config.init_required and not config.init_from:
    raise InputError(
      'init_from: missing; expected the run of the stage before, as --config.init_from=WORKDIR '
      '(--config.init_required=False starts from random weights)'
    )
  for name, teacher in config.teachers.items():
    if teacher.kind == 'frozen' and not teacher.init_from:
      raise InputError(
        f'teachers.{name}.init_from: missing; expected a trained run, as '
        f'--config.teachers.{name}.init_from=WORKDIR'
      )


def check_vocabulary(config: schema.Config, tokenizer: Tokenizer | None) -> None:
  """InputError for an embedding that is too small: it would clip ids in silence."""
  for name, tower in config.towers.items():
    if tower.kind == 'text' and tokenizer and tokenizer.vocab_size > tower.vocab:
      raise InputError(
        f"towers.{name}.vocab: got {tower.vocab}; expected at least the tokenizer's "
        f'{tokenizer.vocab_size} pieces'
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
  if c.init_from:
    _check_parts(c)
  # Jitted with the shardings of the run: no device ever holds a whole large model.
  state = jax.jit(lambda: state_lib.init(method), out_shardings=shardings)()
  if c.init_from:
    if 'params' in c.init_parts:
      state = _with_params(c, state, abstract, say, tokenizer_sha256)
    if runs.is_run(c.init_from):
      state = _with_more(c, state, abstract, say)
    else:
      say(f'teachers, losses and optimizer start fresh: {c.init_from} has none')
  teachers = dict(state.teachers)
  loss_state = dict(state.loss_state)
  for name, teacher in c.teachers.items():
    if teacher.kind == 'frozen':
      teachers[name] = frozen_teacher(c, name, abstract.teachers[name], say)
      loss_state |= _memory_of_teacher(method, name, abstract.loss_state, say)
  return state.replace(teachers=teachers, loss_state=loss_state)


def _check_parts(c):
  """One of the parts that are asked for must be there."""
  there = {'params'}
  if runs.is_run(c.init_from):
    path = runs.find(c.init_from, 'init_from')
    train = runs.names(path, 'train')
    there |= {part for part in ('loss_state', 'optimizer') if _below(part, train)}
    if runs.names(path, 'teachers'):
      there.add('teachers')
  if not there & set(c.init_parts):
    raise InputError(
      f'init_parts: got {c.init_parts}; expected one of {sorted(there)}, which {c.init_from!r} has'
    )


def _check_taken(c, wanted, abstract, there):
  """A run that takes nothing of what it names would start afresh in silence."""
  if not wanted:
    raise InputError(
      f'init_from: got {c.init_from!r}, of which nothing is taken; expected a tower that both have '
      f'(here {sorted(_by_tower(dict(tree.named_leaves(abstract))))}, there '
      f'{sorted(_by_tower(there))}) and init_from_rules ask for'
    )


def _with_params(c, state, abstract, say, tokenizer_sha256):
  """The state with the student of `init_from`, and EMA teachers that start as it."""
  args = (c, abstract.params, state.params, say, tokenizer_sha256)
  if runs.is_run(c.init_from):
    params = _from_run('params', *args)
  else:
    params = _foreign(*args)
  teachers = dict(state.teachers)
  for name, towers in state.teachers.items():
    if c.teachers[name].kind == 'ema':
      # Copies: the step gives its state away, and no buffer can be given twice.
      teachers[name] = {tower: jax.tree.map(jnp.copy, params[tower]) for tower in towers}
  return state.replace(params=params, teachers=teachers)


def _with_more(c, state, abstract, say):
  """What another run has beside its parameters, as `init_parts` says."""
  if 'teachers' in c.init_parts:
    teachers = {}
    for name, towers in state.teachers.items():
      teachers[name] = towers
      if c.teachers[name].kind == 'ema':  # a frozen one says itself where it is from
        teachers[name] = _from_run('teachers', c, abstract.teachers[name], towers, say, within=name)
    state = state.replace(teachers=teachers)
  for part in ('loss_state', 'optimizer'):
    if part in c.init_parts:
      value = _whole_part(c, part, getattr(abstract, part), getattr(state, part), say)
      state = state.replace(**{part: value})
  return state


def _whole_part(c, part, abstract, initial, say):
  """The memory of the losses or the optimizer's state: all of it, or `initial`."""
  path = runs.find(c.init_from, 'init_from')
  if not _below(part, runs.names(path, 'train')):
    say(f'{part} from {path}: nothing')
    return initial
  say(f'{part} from {path}: all')
  return runs.load(path, 'train', {part: abstract})[part]


# --- leaves of another run, or of weights of another format -------------------------------------


def _from_run(part, c, abstract, initial, say, tokenizer_sha256=None, *, within=''):
  """`initial`, with those leaves that a part of another run's checkpoint holds and the rules ask
  for. within: of the part's groups (teachers) the one that is read.
  """
  path = runs.find(c.init_from, 'init_from')
  saved = runs.names(path, part)
  if within:
    saved = _below(within, saved)
  wanted = _same_leaves(_chosen(c, abstract), saved, f'init_from: {part}', c.init_from_rules)
  if part == 'params':
    _check_taken(c, wanted, abstract, saved)
  _same_tokenizer(c, wanted, runs.contract(path).get('tokenizer_sha256'), tokenizer_sha256, say)
  loaded = {}
  if wanted:
    loaded = _load(path, part, within, wanted, saved, say)
  return _report(f'{within or part} from {path}', loaded, initial, say)


def _load(path, part, within, wanted, saved, say):
  """{name: array} of the wanted leaves, position tables resized."""
  requested = dict(wanted)
  for name, x in wanted.items():
    # Another grid there has no sharding here; the table is small, and comes whole.
    if name.endswith('posembed') and saved[name][0] != x.shape:
      whole = jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())
      requested[name] = jax.ShapeDtypeStruct(saved[name][0], x.dtype, sharding=whole)
  nested = tree.nested(requested)
  if within:
    nested = {within: nested}
  loaded = dict(tree.named_leaves(runs.load(path, part, nested)))
  if within:
    loaded = _below(within, loaded)
  for name, x in wanted.items():
    if requested[name] is not x:
      loaded[name] = _put(_fit(name, np.asarray(loaded[name]), x.shape, say), x)
  return loaded


def _foreign(c, abstract, initial, say, tokenizer_sha256=None):
  """`initial`, with those leaves that weights of another format hold and the rules ask for."""
  found = read.read(c.init_from, what='init_from')
  _report_notes(found, say)
  arrays = _named_as_here(c, found)
  wanted = _same_leaves(_chosen(c, abstract), arrays, 'init_from', c.init_from_rules)
  _check_taken(c, wanted, abstract, arrays)
  _same_tokenizer(c, wanted, weights_lib.sha256(found.tokenizer), tokenizer_sha256, say)
  loaded = {n: _put(_fit(n, arrays[n], x.shape, say), x) for n, x in wanted.items()}
  return _report(f'params from {c.init_from}', loaded, initial, say)


def _named_as_here(c, found):
  """{parameter name of this config: array} of foreign weights."""
  here = weights_lib.tower_names(c.evals, c.towers)
  arrays = {}
  for role, params in found.params.items():
    for name, x in weights_lib.flat(params).items():
      arrays[f'{here.get(role, "")}/{name}'] = x
  return arrays


def _below(group, named):
  """{rest of the name: value} of the names GROUP/..."""
  prefix = f'{group}/'
  return {n.removeprefix(prefix): x for n, x in named.items() if n.startswith(prefix)}


def _chosen(c, abstract):
  """{name: leaf} without those that the rules let start fresh."""
  chosen = {}
  for name, x in tree.named_leaves(abstract):
    if tree.match(c.init_from_rules, name, 'init_from_rules'):
      chosen[name] = x
  return chosen


# Of a tower that is adapted.
_ADAPTER = re.compile('/adapter[12]/')


def _same_leaves(wanted, there, what, rules=(('.*', True),), *, fresh_adapters=True):
  """Those of the wanted leaves whose tower is there. A tower is taken whole, but for the mask
  token, and for adapters, which change nothing at the start.
  """
  # A tower of which a part is missing is another model: half of it would be noise in silence.
  towers = _by_tower(wanted).keys() & _by_tower(there).keys()
  wanted = {n: x for n, x in wanted.items() if _tower(n) in towers}
  other = {n for n in there if _tower(n) in towers and tree.match(rules, n, 'init_from_rules')}
  for name in sorted(wanted.keys() ^ other):
    if name.endswith('/mask_token'):  # released weights may come without
      continue
    if name in wanted and fresh_adapters and _ADAPTER.search(name):
      continue
    got = f'got {name}; expected none'
    if name in wanted:
      got = f'got no {name}; expected it'
    raise InputError(f'{what}: {got}: another kind of model; init_from_rules leaves parameters out')
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


def _same_tokenizer(c, wanted, there, here, say):
  """Embeddings of words mean nothing to another tokenizer."""
  if f'{c.evals.text_tower}/embedding' not in wanted or not here or there == here:
    return
  if there is None:
    say(
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


def _report(what, loaded, initial, say):
  """`initial` with the loaded leaves in it; says which are there, whole towers by their name."""
  leaves = dict(tree.named_leaves(initial))
  line = f'{what}: {_summary(loaded, leaves) or "nothing"}'
  fresh = leaves.keys() - loaded.keys()
  if fresh:
    line += f'; fresh: {_summary(fresh, leaves)}'
  say(line)
  return tree.map_named(lambda n, x: loaded.get(n, x), initial)


def _report_notes(found, say):
  for note in found.about.get('notes', ()):
    say(f'init_from: {note}')


def _summary(names, known):
  """Names; where a tower is whole the tower's."""
  whole = _by_tower(known)
  parts = []
  for tower, leaves in sorted(_by_tower(names).items()):
    if len(leaves) == len(whole[tower]):
      parts.append(tower)
    else:
      parts += sorted(leaves)
  return ', '.join(parts)


def _by_tower(names):
  towers = {}
  for name in names:
    towers.setdefault(_tower(name), []).append(name)
  return towers


def _tower(name):
  return name.split('/')[0]


# --- frozen teachers ----------------------------------------------------------------------------


def frozen_teacher(
  c: schema.Config, name: str, abstract: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
  """Weights of a frozen teacher: of another run its EMA teacher where it has one, its student
  elsewhere; or foreign.
  """
  teacher = c.teachers[name]
  if teacher.init_from and not runs.is_run(teacher.init_from):
    return _foreign_teacher(teacher, name, abstract, say)
  path = runs.find(teacher.init_from, f'teachers.{name}.init_from')
  owners = {}  # tower -> a teacher of that run which has it
  for leaf in runs.names(path, 'teachers'):
    owner, tower, _ = leaf.split('/', 2)
    owners.setdefault(tower, owner)
  result = {}
  for tower, leaves in abstract.items():
    there = teacher.rename.get(tower, tower)
    owner = owners.get(there)
    if owner:
      result[tower] = runs.load(path, 'teachers', {owner: {there: leaves}})[owner][there]
    else:
      result[tower] = runs.load(path, 'params', {tower: leaves}, rename={there: tower})[tower]
    say(f'{name}/{tower} from {path}: {owner or "student"}/{there}')
  return result


def _memory_of_teacher(method, name, abstract, say):
  """{loss: its state at the end of a frozen teacher's training}, of losses that read the teacher's
  parameters: the center of a trained teacher is not zero.
  """
  source = method.config.teachers[name].init_from
  path = None
  there = {}
  if runs.is_run(source):
    path = runs.find(source, f'teachers.{name}.init_from')
    there = _below('loss_state', runs.names(path, 'train'))
  result = {}
  for loss, leaves in abstract.items():
    if name not in {parameter.by for parameter in method.losses[loss].parameters.values()}:
      continue
    if not _below(loss, there):
      say(f'{loss}: its state starts fresh: {source} has none of a loss of this name')
      continue
    say(f'{loss}: its state from {path}')
    saved = runs.load(path, 'train', {'loss_state': {loss: leaves}})
    result[loss] = saved['loss_state'][loss]
  return result


def _foreign_teacher(teacher, name, abstract, say):
  what = f'teachers.{name}.init_from'
  found = read.read(teacher.init_from, what=what)
  _report_notes(found, say)
  there = {tower: teacher.rename.get(tower, tower) for tower in abstract}
  names = sorted(there.values())
  missing = sorted(set(names) - set(found.params))
  if missing:
    raise InputError(
      f'{what}: got {teacher.init_from!r}, which has no {missing[0]!r}; expected all of '
      f'{names}: released weights come without heads'
    )
  # A teacher is frozen as it is: no rules, nothing of it may start fresh.
  arrays = {}
  for tower, other in there.items():
    for leaf, x in weights_lib.flat(found.params[other]).items():
      arrays[f'{tower}/{leaf}'] = x
  _same_leaves(dict(tree.named_leaves(abstract)), arrays, what, fresh_adapters=False)
  say(f'{name} from {teacher.init_from}: {", ".join(names)}')
  return tree.map_named(lambda n, x: _put(_fit(n, arrays[n], x.shape, say), x), abstract)

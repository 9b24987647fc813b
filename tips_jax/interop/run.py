"""Runs of this project, read: the checkpoints that runs/checkpoint.py writes."""

import json
import logging
import pathlib
import re

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from tips_jax.core import schema, strict, tree
from tips_jax.core.errors import InputError
from tips_jax.core.strict import did_you_mean
from tips_jax.data.tokenizer import Tokenizer
from tips_jax.interop.weights import PREPROCESSING, Weights

FOLDER = 'checkpoints'
TOKENIZER = 'tokenizer.model'
# Orbax logs the traceback of every thread that an error passes through; the error itself reaches
# the caller.
logging.getLogger('absl').setLevel(logging.CRITICAL)


def is_run(path):
  """Whether a path is a work folder, or one with @step behind it."""
  return (pathlib.Path(split(path)[0]) / FOLDER).is_dir()


def split(path):
  """(work folder, step or None) of 'FOLDER' or 'FOLDER@step'."""
  found = re.fullmatch(r'(.+)@(\d+)', str(path))
  return (found[1], int(found[2])) if found else (str(path), None)


def find(path, what):
  """Path of the newest complete checkpoint of a run, or of the one after '@'; InputError when there
  is none.
  """
  workdir, step = split(path)
  folder = pathlib.Path(workdir).absolute() / FOLDER
  steps = [int(p.name) for p in folder.glob('*') if p.name.isdigit()] if folder.is_dir() else []
  if not steps:
    raise InputError(
      f'{what}: got {str(workdir)!r}; expected the work folder of a run that has saved a checkpoint'
    )
  if step is not None and step not in steps:
    raise InputError(
      f'{what}: got step {step}; expected one that {str(workdir)!r} has: {sorted(steps)}'
    )
  return folder / str(max(steps) if step is None else step)


def contract(path):
  """What the run that wrote this checkpoint was: see the module's head."""
  with one_error(f'checkpoint: cannot read {str(path)!r}'):
    return ocp.checkpointables_metadata(path).custom_metadata or {}


def load(path, part, abstract, *, rename=None):
  """One part ('params', 'teachers', 'train') of a checkpoint, as `abstract` says, which may hold
  fewer names.

  rename: {name there: name here} of the first level of keys. Shapes and dtypes that differ are one
  InputError.
  """
  there = {v: k for k, v in (rename or {}).items()}
  wanted = {there.get(k, k): v for k, v in abstract.items()}
  check(path, part, wanted)
  context = ocp.Context()
  context.pytree_options.loading.partial_load = True
  with context, one_error(f'checkpoint: cannot read {str(path)!r}'):
    out = ocp.load_checkpointables(path, {part: wanted})[part]
  return {k: out[there.get(k, k)] for k in abstract}


def names(path, part):
  """{leaf name: (shape, dtype)} of a saved part; {} when the checkpoint lacks it."""
  with one_error(f'checkpoint: cannot read {str(path)!r}'):
    found = ocp.checkpointables_metadata(path).metadata
  return {n: (tuple(x.shape), x.dtype) for n, x in tree.named_leaves(found.get(part) or {})}


def check(path, part, wanted):
  """One clear error where a saved part does not fit; orbax would cast dtypes silently."""
  saved = names(path, part)
  for name, leaf in tree.named_leaves(wanted):
    if name not in saved:
      raise InputError(
        f'checkpoint {str(path)!r}: got no {part}/{name}; expected {leaf.shape}'
        f'{did_you_mean(name, saved)}'
      )
    if saved[name] != (tuple(leaf.shape), leaf.dtype):
      shape, dtype = saved[name]
      raise InputError(
        f'checkpoint {str(path)!r}: {part}/{name}: got {dtype}{list(shape)}; expected '
        f'{leaf.dtype}{list(leaf.shape)}: another model wrote it'
      )


class one_error:
  """Turns whatever the storage raises into one InputError."""

  def __init__(self, what):
    self.what = what

  def __enter__(self):
    return self

  def __exit__(self, kind, error, _):
    if isinstance(error, Exception) and not isinstance(
      error, (InputError, jax.errors.JaxRuntimeError)
    ):
      first = str(error).strip().splitlines()
      raise InputError(
        f'{self.what} ({kind.__name__}: {first[0][:300] if first else ""})'
      ) from error


# --- a whole model ------------------------------------------------------------------------------


def read(path, *, weights='', what='checkpoint'):
  """Weights of a run. weights: 'student', 'teacher', a teacher's name, or '': those that its
  evaluations used.
  """
  folder = pathlib.Path(split(path)[0])
  step = find(path, what)
  saved = contract(step)
  towers = strict.value(dict[str, schema.Tower], saved['towers'], f'{what}: towers')
  evals = strict.build(
    schema.Evals,
    {k: v for k, v in saved['config']['evals'].items() if k in schema.Evals.__dataclass_fields__},
    f'{what}: evals',
  )
  if evals.image_tower not in towers or towers[evals.image_tower].kind != 'vit':
    raise InputError(
      f'{what} {str(path)!r}: got no image tower {evals.image_tower!r}; expected one'
    )
  if saved['preprocessing'] | PREPROCESSING != saved['preprocessing']:
    raise InputError(
      f'{what} {str(path)!r}: got the preprocessing {saved["preprocessing"]}; expected {PREPROCESSING}'
    )
  here = {
    'image': evals.image_tower,
    'text': evals.text_tower,
    'image_head': evals.image_head,
    'text_head': evals.text_head,
    'logit': next((n for n, t in towers.items() if t.kind == 'logit'), ''),
  }
  here = {k: name for k, name in here.items() if name in towers}
  teachers = names(step, 'teachers')
  teacher = _teacher(teachers, weights or evals.encoder, here['image'], what)
  loaded = _towers(step, here.values(), teacher, teachers)
  params = {k: loaded[name] for k, name in here.items()}
  tokenizer, notes = _tokenizer(folder, saved) if 'text' in here else (None, [])
  about = {
    'config': saved['config'],
    'data_fingerprint': saved.get('data_fingerprint'),
    'step': int(step.name),
    'weights': teacher or 'student',
    'evaluation': _evaluation(folder, int(step.name)),
    'notes': notes,
  }
  return Weights(
    name=saved['config']['name'],
    towers={k: towers[n] for k, n in here.items()},
    params=params,
    tokenizer=tokenizer,
    text_length=saved['text_length'] or 64,
    size=evals.size,
    about=about,
  )


def _teacher(saved, weights, image, what):
  """Name of the teacher whose towers are asked for, or None. saved: names of the checkpoint's
  teachers' parameters.
  """
  if weights == 'student':
    return None
  owners = {n.split('/')[0] for n in saved if n.split('/')[1] == image}
  if weights == 'teacher' and len(owners) == 1:
    return owners.pop()
  if weights not in owners:
    raise InputError(
      f'{what}: weights: got {weights!r}; expected one of {["student", *sorted(owners)]}: teachers that '
      'have an image tower of their own'
    )
  return weights


def _towers(step, wanted, teacher, teachers):
  """{tower: NumPy parameters}: the teacher's where it covers a tower, else the student's."""
  covered = {n for n in wanted if any(k.startswith(f'{teacher}/{n}/') for k in teachers)}
  found = _host(
    step, 'params', names(step, 'params'), {n: f'{n}/' for n in wanted if n not in covered}
  )
  return found | _host(step, 'teachers', teachers, {n: f'{teacher}/{n}/' for n in covered})


def _host(step, part, saved, prefixes):
  """{name: NumPy arrays of a part's leaves with its prefix}."""
  host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend='cpu')[0])
  leaves = {
    n: jax.ShapeDtypeStruct(shape, dtype, sharding=host)
    for n, (shape, dtype) in saved.items()
    if n.startswith(tuple(prefixes.values()))
  }
  for name, prefix in prefixes.items():
    if not any(n.startswith(prefix) for n in leaves):
      raise InputError(f'checkpoint {str(step)!r}: got no tower {name!r}; expected its parameters')
  out, result = load(step, part, tree.nested(leaves)) if leaves else {}, {}
  for name, prefix in prefixes.items():
    result[name] = out
    for key in prefix.split('/')[:-1]:
      result[name] = result[name][key]
  return jax.tree.map(lambda x: np.asarray(x, np.float32), result)


def _tokenizer(folder, saved):
  """(bytes of the run's tokenizer or None, notes)."""
  data = saved['config']['data']
  beside = [
    folder / TOKENIZER,
    data['tokenizer'],
    pathlib.Path(data['store'] or folder / 'scenes') / TOKENIZER,
  ]
  for path in map(pathlib.Path, filter(None, beside)):
    if path.is_file() and Tokenizer(path).sha256 == saved['tokenizer_sha256']:
      return path.read_bytes(), []
  return None, [f'the tokenizer of the run (SHA-256 {saved["tokenizer_sha256"]}) is not beside it']


def _evaluation(folder, step):
  """The evaluation nearest to a step that is not after it: {metric: value}."""
  lines = []
  if (folder / 'metrics.jsonl').is_file():
    for line in (folder / 'metrics.jsonl').read_text().splitlines():
      try:
        lines.append(json.loads(line))
      except ValueError:  # the last line of a run that was killed
        pass
  found = [
    l for l in lines if l.get('step', step + 1) <= step and any(k.startswith('eval/') for k in l)
  ]
  return (
    {
      k.removeprefix('eval/'): v
      for k, v in found[-1].items()
      if k.startswith('eval/') and k != 'eval/seconds'
    }
    if found
    else {}
  )

"""Weights of a run of this project: what runs/checkpoint.py wrote, as one model."""

import pathlib
from collections.abc import Iterable

import jax
import numpy as np

from tips_jax.core import log, schema, strict, tree
from tips_jax.core.errors import InputError
from tips_jax.data.tokenizer import Tokenizer
from tips_jax.interop import arrays
from tips_jax.interop.weights import PREPROCESSING, Weights, fold_layer_scale, tower_names
from tips_jax.runs import folder as runs


def read(path: str | pathlib.Path, *, weights: str = '', what: str = 'checkpoint') -> Weights:
  """Weights of a run, as float32 NumPy arrays.

  weights: 'student', 'teacher', a teacher's name, or '': those that its evaluations used.
  """
  checkpoint = runs.find(path, what, without=('train',))
  workdir = checkpoint.parent.parent
  step = int(checkpoint.name)
  saved = runs.contract(checkpoint)
  towers = strict.value(dict[str, schema.Tower], saved['towers'], f'{what}: towers')
  evals = strict.build(schema.Evals, saved['config']['evals'], f'{what}: evals')
  if not isinstance(towers.get(evals.image_tower), schema.ImageTower):
    raise InputError(
      f'{what} {str(path)!r}: got no image tower {evals.image_tower!r}; expected one'
    )
  # The run may say more than PREPROCESSING does, but nothing else.
  if saved['preprocessing'] | PREPROCESSING != saved['preprocessing']:
    raise InputError(
      f'{what} {str(path)!r}: got the preprocessing {saved["preprocessing"]}; expected '
      f'{PREPROCESSING}'
    )
  roles = tower_names(evals, towers)
  teacher_leaves = runs.names(checkpoint, 'teachers')
  teacher = _teacher(teacher_leaves, weights or evals.encoder, roles['image'], what)
  params = _params(checkpoint, roles.values(), teacher, teacher_leaves)
  params = {role: params[name] for role, name in roles.items()}
  towers = {role: towers[name] for role, name in roles.items()}
  if isinstance(towers['image'], schema.ViT):
    towers['image'], params['image'] = fold_layer_scale(towers['image'], params['image'])
  tokenizer = None
  notes = []
  if 'text' in roles:
    tokenizer = _tokenizer(workdir, saved)
    if tokenizer is None:
      notes.append(
        f'the tokenizer of the run (SHA-256 {saved["tokenizer_sha256"]}) is not beside it'
      )
  return Weights(
    name=saved['config']['name'],
    towers=towers,
    params=params,
    tokenizer=tokenizer,
    text_length=saved['text_length'] or 64,
    size=evals.size,
    about={
      'config': saved['config'],
      'data_fingerprint': saved.get('data_fingerprint'),
      'step': step,
      'weights': teacher or 'student',
      'evaluation': _evaluation(workdir, step),
      'notes': notes,
    },
  )


def _teacher(leaves, weights, image, what):
  """Name of the teacher whose towers are asked for, or None: the student's.

  leaves: names of the checkpoint's teacher parameters, TEACHER/TOWER/...; image: the image tower.
  """
  if weights == 'student':
    return None
  teachers = {leaf.split('/')[0] for leaf in leaves if leaf.split('/')[1] == image}
  if weights == 'teacher' and len(teachers) == 1:
    return teachers.pop()
  if weights not in teachers:
    raise InputError(
      f'{what}: weights: got {weights!r}; expected one of {["student", *sorted(teachers)]}: '
      'teachers that have an image tower of their own'
    )
  return weights


def _params(checkpoint, towers: Iterable[str], teacher, teacher_leaves):
  """{tower: NumPy parameters}: the teacher's where it has the tower, else the student's."""
  of_student = {}
  of_teacher = {}
  for tower in towers:
    if any(leaf.startswith(f'{teacher}/{tower}/') for leaf in teacher_leaves):
      of_teacher[tower] = f'{teacher}/{tower}/'
    else:
      of_student[tower] = f'{tower}/'
  params = _host(checkpoint, 'params', runs.names(checkpoint, 'params'), of_student)
  return params | _host(checkpoint, 'teachers', teacher_leaves, of_teacher)


def _host(checkpoint, part, saved, prefixes):
  """{tower: NumPy arrays of the part's leaves that begin with the tower's prefix}."""
  if not prefixes:
    return {}
  # On the CPU, whatever the accelerator: the model may be larger than one device.
  host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend='cpu')[0])
  leaves = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=host)
    for name, (shape, dtype) in saved.items()
    if name.startswith(tuple(prefixes.values()))
  }
  for tower, prefix in prefixes.items():
    if not any(name.startswith(prefix) for name in leaves):
      raise InputError(
        f'checkpoint {str(checkpoint)!r}: got no tower {tower!r}; expected its parameters'
      )
  restored = runs.load(checkpoint, part, tree.nested(leaves))
  for name, x in tree.named_leaves(restored):
    arrays.finite(np.asarray(x, np.float32), f'checkpoint {str(checkpoint)!r}: {part}/{name}')
  params = {}
  for tower, prefix in prefixes.items():
    params[tower] = restored
    for key in prefix.split('/')[:-1]:
      params[tower] = params[tower][key]
  return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def _tokenizer(workdir, saved):
  """Bytes of the run's tokenizer; None where no file beside the run has its SHA-256."""
  data = saved['config']['data']
  candidates = [
    workdir / runs.TOKENIZER,
    data['tokenizer'],
    pathlib.Path(data['store'] or workdir / 'scenes') / runs.TOKENIZER,
  ]
  for path in candidates:
    if not path:
      continue
    path = pathlib.Path(path)
    if path.is_file() and Tokenizer(path).sha256 == saved['tokenizer_sha256']:
      return path.read_bytes()
  return None


def _evaluation(workdir, step):
  """{metric: value} of the last evaluation at or before a step; {} without one."""
  values = {}
  # A run goes on behind the checkpoint that is read: what was measured later is of other weights.
  for line in log.read(workdir / log.FILE):
    if line['step'] <= step:
      values = log.evaluation(line) or values
  return values

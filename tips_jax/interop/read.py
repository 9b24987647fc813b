"""Any checkpoint -> Weights: recognizes the format and enforces the contract of an export."""

import dataclasses
import functools
import os
import pathlib

from tips_jax.core import buckets, files, schema, strict, tree
from tips_jax.core.errors import InputError
from tips_jax.data.tokenizer import Tokenizer
from tips_jax.interop import arrays, run
from tips_jax.interop.huggingface import folder as huggingface
from tips_jax.interop.official import npz
from tips_jax.interop.weights import PREPROCESSING, Weights, flat
from tips_jax.interop.write import ARRAYS, CONTRACT, Contract, digest
from tips_jax.runs import folder as runs

_EXPECTED = (
  'a work folder (FOLDER or FOLDER@step), a Hugging Face folder, an export of tips_jax, or '
  'official NAME_vision.npz and NAME_text.npz'
)
# Fields of towers that change nothing in a trained model, and their defaults.
_OF_TRAINING = {'dropout': 0.0, 'drop_path': 0.0, 'centered': False, 'positions': 'normal'}
_PICKLES = ('.pt', '.pth', '.bin', '.ckpt', '.pkl')


def read(
  path: str | os.PathLike,
  *,
  weights: str = '',
  tokenizer: str | os.PathLike | None = None,
  what: str = 'checkpoint',
) -> Weights:
  """The model at a path, in any supported format; InputError when it cannot be read completely.

  weights: of a run of ours, 'student', 'teacher' or a teacher's name; '': those that its
  evaluations used.
  tokenizer: a SentencePiece file, for weights without a tokenizer beside them.
  what: names the checkpoint in errors.
  """
  if not runs.is_run(path):
    path = _here(path, what)
  model = _read(path, weights, what)
  if tokenizer:
    return model.replace(tokenizer=_tokenizer_bytes(tokenizer))
  # A run has its tokenizer in its own folder or none: a file beside the run is another one's.
  if model.text and not model.tokenizer and not runs.is_run(path):
    folder = pathlib.Path(path)
    if not folder.is_dir():
      folder = folder.parent
    if (folder / runs.TOKENIZER).is_file():
      return model.replace(tokenizer=_tokenizer_bytes(folder / runs.TOKENIZER))
  return model


def _here(path: str | os.PathLike, what: str) -> str:
  """The path on this machine of weights that may be in a bucket."""
  path = os.fspath(path)
  folder, _, name = path.rpartition('/')
  if not buckets.is_bucket(path) or not name.endswith('.npz'):
    return buckets.local(path, what)
  # Official files are of one tower each, and have their tokenizer beside them.
  model = name.rpartition('_')[0]
  copy = buckets.local(
    folder, what, wanted=lambda other: other.startswith(f'{model}_') or other == runs.TOKENIZER
  )
  return os.path.join(copy, name)


def _read(path: str | os.PathLike, weights: str, what: str) -> Weights:
  if runs.is_run(path):
    return run.read(path, weights=weights, what=what)
  if weights:
    raise InputError(
      f'{what}: got weights {weights!r} of {str(path)!r}; expected a work folder, which has a '
      'choice'
    )
  path = pathlib.Path(path)
  if path.suffix in _PICKLES:
    raise InputError(
      f'{what}: got {str(path)!r}, a pickle, which may run code; expected safetensors or npz'
    )
  if (path / CONTRACT).is_file():
    return _export(path, what)
  if (path / 'config.json').is_file():
    return huggingface.read(path)
  got = repr(str(path))
  if not path.exists():
    got += ', which does not exist'
  elif path.suffix == '.npz' or path.is_dir() and any(path.glob('*.npz')):
    return npz.read(path)
  hint = ''
  if not path.exists() and path.suffix != '.npz' and len(path.parts) == 2:
    # It may be the name of a repository on the Hugging Face hub.
    hint = f'; to fetch it: hf download {path} --local-dir FOLDER'
  raise InputError(f'{what}: got {got}; expected {_EXPECTED}{hint}')


def _export(path: pathlib.Path, what: str) -> Weights:
  """A folder that write.write wrote."""
  where = str(path / CONTRACT)
  contract = strict.build(Contract, arrays.read_json(path / CONTRACT), where)
  files.check_name(contract.name, f'{where}: name')
  _check_contract(path, contract)
  format = contract.format
  towers = contract.towers
  if format == 'hf':
    model = huggingface.read(path, towers=towers)
  elif format in npz.LAYOUTS:
    model = npz.read(path, towers=towers)
  elif format == 'safetensors':
    params = tree.nested(arrays.read_safetensors(path))
    for name in params.keys() - towers.keys():
      raise InputError(f'{str(path)!r}: got arrays of {name!r}; expected those of {list(towers)}')
    model = Weights(
      name=contract.name,
      towers={name: _as_arrays_show(tower) for name, tower in towers.items()},
      params={name: params.get(name, {}) for name in towers},
    )
    _check_shapes(model, path)
  else:
    raise InputError(
      f'{what}: got {str(path)!r}, an export to {format}, which is a program; expected {_EXPECTED}'
    )
  for name, tower in towers.items():
    # The arrays of a logit only show whether it has a bias, not its initial values.
    if name != 'logit' and _as_arrays_show(tower) != model.towers.get(name):
      raise InputError(
        f'{what} {str(path)!r}: {name}: got arrays of {model.towers.get(name)}; expected {tower}, '
        f'as {CONTRACT} says'
      )
  return model.replace(
    name=contract.name,
    towers=towers,
    size=contract.size,
    about=contract.about,
    text_length=contract.text_length,
    tokenizer=_checked_tokenizer(path, contract),
  )


def _as_arrays_show(tower: schema.Tower) -> schema.Tower:
  """The tower without what only its training reads, as arrays alone show it."""
  fields = {name: value for name, value in _OF_TRAINING.items() if hasattr(tower, name)}
  return dataclasses.replace(tower, **fields)


def _check_contract(path: pathlib.Path, contract: Contract) -> None:
  where = repr(str(path / CONTRACT))
  if contract.preprocessing != PREPROCESSING:
    raise InputError(
      f'{where}: got the preprocessing {contract.preprocessing}; expected {PREPROCESSING}'
    )
  if 'image' not in contract.towers:
    raise InputError(f'{where}: got towers {list(contract.towers)}; expected one named image')
  for name, size in contract.files.items():
    file = path / files.check_name(name, f'{where}: files')
    if not file.is_file():
      got = 'no file'
    # A person may edit a README or a config; arrays never change.
    elif file.stat().st_size != size and file.suffix in ARRAYS:
      got = f'{file.stat().st_size} bytes'
    else:
      continue
    raise InputError(
      f'{str(file)!r}: got {got}; expected {size} bytes: a half-written or half-copied folder'
    )
  for name, expected in contract.sha256.items():
    file = path / files.check_name(name, f'{where}: sha256')
    if digest(file) != expected:
      raise InputError(
        f'{str(file)!r}: got other bytes than were written; expected the SHA-256 {expected}; '
        'export or fetch it again'
      )


def _checked_tokenizer(path: pathlib.Path, contract: Contract) -> bytes | None:
  expected = contract.tokenizer_sha256
  if not expected:
    return None
  file = path / runs.TOKENIZER
  if Tokenizer(file).sha256 != expected:
    raise InputError(
      f'{str(file)!r}: got another tokenizer than the weights were trained with; expected SHA-256 '
      f'{expected}'
    )
  return file.read_bytes()


def _check_shapes(model: Weights, path: pathlib.Path) -> None:
  """InputError unless the parameters are exactly those of the towers."""
  import jax

  from tips_jax.models import towers

  for name, tower in model.towers.items():
    expected = flat(jax.eval_shape(functools.partial(towers.init, name, tower, seed=0)))
    params = flat(model.params[name])
    for leaf in sorted({*expected, *params}):
      got_shape = getattr(params.get(leaf), 'shape', None)
      expected_shape = getattr(expected.get(leaf), 'shape', None)
      if got_shape != expected_shape:
        raise InputError(
          f'{str(path)!r}: {name}/{leaf}: got {got_shape or "nothing"}; '
          f'expected {expected_shape or "nothing"}'
        )


def _tokenizer_bytes(path: str | os.PathLike) -> bytes:
  """The bytes of a file, after a check that it is a tokenizer."""
  return pathlib.Path(Tokenizer(path).path).read_bytes()

"""Any checkpoint -> Weights: which format it is, and whether its contract is one that we keep."""

import dataclasses
import json
import pathlib

from tips_jax.core import schema, strict, tree
from tips_jax.core.errors import InputError
from tips_jax.data.tokenizer import Tokenizer
from tips_jax.interop import arrays, run
from tips_jax.interop.huggingface import folder as huggingface
from tips_jax.interop.official import npz as official
from tips_jax.interop.weights import PREPROCESSING, Weights, flat
from tips_jax.interop.write import CONTRACT, VERSION
from tips_jax.runs import folder as runs

_EXPECTED = (
  'a work folder (FOLDER or FOLDER@step), a Hugging Face folder, an export of tips_jax, or official '
  'NAME_vision.npz and NAME_text.npz'
)
_PICKLES = ('.pt', '.pth', '.bin', '.ckpt', '.pkl')


def read(path, *, weights='', tokenizer=None, what='checkpoint'):
  """The model at a path, whatever wrote it; InputError when it cannot be read whole.

  weights: of a run of ours, 'student', 'teacher' or a teacher's name; '': those that its
  evaluations used.
  tokenizer: file of a SentencePiece model, where none lies beside the weights.
  """
  found = _read(path, weights, what)
  if tokenizer:
    found = found.replace(tokenizer=_bytes(tokenizer))
  elif found.text and not found.tokenizer and not runs.is_run(path):
    beside = (
      pathlib.Path(path) if pathlib.Path(path).is_dir() else pathlib.Path(path).parent
    ) / runs.TOKENIZER
    found = found.replace(tokenizer=_bytes(beside) if beside.is_file() else None)
  return found


def _read(path, weights, what):
  if runs.is_run(path):
    return run.read(path, weights=weights, what=what)
  if weights:
    raise InputError(
      f'{what}: got weights {weights!r} of {str(path)!r}; expected a work folder, which has a choice'
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
  if path.suffix == '.npz' or path.is_dir() and any(path.glob('*.npz')):
    if not path.exists():
      raise InputError(f'{what}: got {str(path)!r}, which does not exist; expected {_EXPECTED}')
    return official.read(path)
  hub = (
    f'; to fetch it: hf download {path} --local-dir FOLDER'
    if len(path.parts) == 2 and not path.exists()
    else ''
  )
  raise InputError(
    f'{what}: got {str(path)!r}{"" if path.exists() else ", which does not exist"}; expected '
    f'{_EXPECTED}{hub}'
  )


def _export(path, what):
  """A folder that write.write wrote."""
  try:
    contract = json.loads((path / CONTRACT).read_text())
    format = contract['format']
    towers = strict.value(dict[str, schema.Tower], contract['towers'], f'{path / CONTRACT}: towers')
  except (ValueError, KeyError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(f'{str(path / CONTRACT)!r}: cannot be read ({error})') from None
  _check_contract(path, contract)
  if format == 'hf':
    found = huggingface.read(path, towers=towers)
  elif format in official.LAYOUTS:
    found = official.read(path, towers=towers)
  elif format == 'safetensors':
    params = tree.nested(arrays.read_safetensors(path))
    found = Weights(
      name=contract['name'],
      towers={k: _arrays_of(t) for k, t in towers.items()},
      params={k: params.get(k, {}) for k in towers},
    )
    _check_shapes(found, path)
  else:
    raise InputError(
      f'{what}: got {str(path)!r}, an export to {format}, which is a program; expected {_EXPECTED}'
    )
  for name, tower in towers.items():
    if name != 'logit' and _arrays_of(tower) != found.towers.get(
      name
    ):  # which tells no more than its bias
      raise InputError(
        f'{what} {str(path)!r}: {name}: got arrays of {found.towers.get(name)}; expected {tower}, as '
        f'{CONTRACT} says'
      )
  return found.replace(
    name=contract['name'],
    towers=towers,
    size=contract['size'],
    about=contract['about'],
    text_length=contract['text_length'],
    tokenizer=_checked_tokenizer(path, contract),
  )


def _arrays_of(tower):
  """The tower as its arrays tell it: they know of no dropout."""
  return dataclasses.replace(tower, dropout=0.0) if hasattr(tower, 'dropout') else tower


def _check_contract(path, contract):
  if contract.get('version') != VERSION:
    raise InputError(
      f'{str(path / CONTRACT)!r}: got version {contract.get("version")}; expected {VERSION}'
    )
  if contract.get('preprocessing') != PREPROCESSING:
    raise InputError(
      f'{str(path / CONTRACT)!r}: got the preprocessing {contract.get("preprocessing")}; expected '
      f'{PREPROCESSING}'
    )
  for name, size in contract.get('files', {}).items():
    there = (path / name).stat().st_size if (path / name).is_file() else None
    if there is None or there != size and name.endswith(('.npz', '.safetensors')):
      raise InputError(
        f'{str(path / name)!r}: got {"no file" if there is None else f"{there} bytes"}; expected {size} '
        'bytes: a half-written or half-copied folder'
      )


def _checked_tokenizer(path, contract):
  if not contract['tokenizer_sha256']:
    return None
  tokenizer = Tokenizer(path / runs.TOKENIZER)
  if tokenizer.sha256 != contract['tokenizer_sha256']:
    raise InputError(
      f'{str(path / runs.TOKENIZER)!r}: got another tokenizer than the weights were trained with; '
      f'expected SHA-256 {contract["tokenizer_sha256"]}'
    )
  return (path / runs.TOKENIZER).read_bytes()


def _check_shapes(weights, path):
  """InputError unless the parameters are exactly those of the towers."""
  import functools

  import jax

  from tips_jax.models import towers

  for name, tower in weights.towers.items():
    wanted = flat(jax.eval_shape(functools.partial(towers.init, name, tower, seed=0)))
    found = flat(weights.params[name])
    for leaf in sorted({*wanted, *found}):
      got, expected = (x[leaf].shape if leaf in x else None for x in (found, wanted))
      if got != expected:
        raise InputError(
          f'{str(path)!r}: {name}/{leaf}: got {got or "nothing"}; expected {expected or "nothing"}'
        )


def _bytes(path):
  """A tokenizer's bytes, once it is known to be one."""
  return pathlib.Path(Tokenizer(path).path).read_bytes()

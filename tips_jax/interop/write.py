"""Weights -> a folder in one of the formats, complete or absent, with the contract beside them."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile

from tips_jax.core import strict
from tips_jax.core.errors import InputError
from tips_jax.interop import arrays, onnx
from tips_jax.interop.huggingface import folder as huggingface
from tips_jax.interop.official import npz as official
from tips_jax.interop.weights import PREPROCESSING, flat, sha256
from tips_jax.runs.folder import TOKENIZER

CONTRACT = 'tips_jax.json'
VERSION = 1
FORMATS = ('hf', 'official_torch', 'official_jax', 'safetensors', 'onnx')


@contextlib.contextmanager
def new_folder(path):
  """A temporary folder that becomes `path` when all went well, and vanishes when not."""
  path = pathlib.Path(path).absolute()
  refuse_existing(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  building = pathlib.Path(tempfile.mkdtemp(prefix=f'.{path.name}-', dir=path.parent))
  try:
    yield building
    os.chmod(building, 0o755)
    if path.is_dir():
      path.rmdir()
    os.replace(building, path)
  except BaseException:
    shutil.rmtree(building, ignore_errors=True)
    raise


def refuse_existing(path):
  path = pathlib.Path(path)
  if path.is_file() or path.is_dir() and any(path.iterdir()):
    raise InputError(
      f'--output: got {str(path)!r}, which exists; expected a new folder: nothing is overwritten'
    )


def write(weights, format, folder, *, dtype='float32', **options):
  """Writes a model into an empty folder. options: of the format (ONNX: resolution)."""
  folder = pathlib.Path(folder)
  if format == 'hf':
    huggingface.write(weights, folder, dtype=dtype)
  elif format in official.LAYOUTS:
    official.write(weights, folder, format=format, dtype=dtype)
  elif format == 'onnx':
    onnx.write(weights, folder, **options)
  elif format == 'safetensors':
    arrays.write_safetensors(
      folder / 'model.safetensors',
      arrays.rounded(flat(weights.params), dtype),
      {'format': 'tips_jax'},
    )
  else:
    raise strict.unknown('--to', format, FORMATS)
  if weights.tokenizer:
    (folder / TOKENIZER).write_bytes(weights.tokenizer)
  sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
  (folder / CONTRACT).write_text(
    json.dumps(contract(weights, format) | {'files': sizes}, indent=1) + '\n'
  )


def contract(weights, format):
  """What the weights are and what they must be fed: enforced when they are read."""
  return {
    'version': VERSION,
    'format': format,
    'name': weights.name,
    'towers': {k: strict.plain(t) for k, t in weights.towers.items()},
    'preprocessing': PREPROCESSING,
    'size': weights.size,
    'text_length': weights.text_length,
    'tokenizer_sha256': sha256(weights.tokenizer),
    'about': weights.about,
  }

"""Weights -> a folder in one of the formats, complete or absent, with the contract beside them."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, Literal

from tips_jax.core import files, schema, strict
from tips_jax.core.errors import InputError
from tips_jax.interop import arrays, onnx
from tips_jax.interop.huggingface import folder as huggingface
from tips_jax.interop.official import npz
from tips_jax.interop.weights import (
  PREPROCESSING,
  TOWERS,
  Weights,
  flat,
  only_vit,
  only_whole,
  sha256,
)
from tips_jax.runs.folder import TOKENIZER

CONTRACT = 'tips_jax.json'
VERSION = 1
ARRAYS = ('.npz', '.safetensors')
FORMATS = ('hf', 'official_torch', 'official_jax', 'safetensors', 'onnx')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contract:
  """What tips_jax.json says of the weights beside it: enforced when they are read."""

  version: Literal[1]
  format: Literal[FORMATS]
  name: str
  towers: dict[Literal[TOWERS], schema.Tower]
  preprocessing: dict[str, Any]
  size: schema.Pixels
  text_length: schema.Count
  tokenizer_sha256: str | None
  about: dict[str, Any]
  # Sizes let a reader recognize a folder that was copied in part, digests a flipped bit.
  files: dict[str, schema.Bytes]
  sha256: dict[str, str]  # of the arrays


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A temporary folder that is renamed to `path` on success and removed on failure.

  Errors of the disk are those of `files.writing`.
  """
  path = pathlib.Path(path).absolute()
  refuse_existing(path)
  with files.writing(f'--output: cannot write {str(path)!r}'), _building(path) as building:
    yield building


@contextlib.contextmanager
def _building(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  # On the same file system as `path`, so that the rename is atomic.
  building = pathlib.Path(tempfile.mkdtemp(prefix=f'.{path.name}-', dir=path.parent))
  try:
    yield building
    os.chmod(building, 0o755)  # mkdtemp makes folders that only their owner can read
    if path.is_dir():
      path.rmdir()
    os.replace(building, path)
  except BaseException:  # an interrupt must not leave a half-written folder either
    shutil.rmtree(building, ignore_errors=True)
    raise


def refuse_existing(path: str | os.PathLike) -> None:
  path = pathlib.Path(path)
  if path.is_file() or path.is_dir() and any(path.iterdir()):
    raise InputError(
      f'--output: got {str(path)!r}, which exists; expected a new folder: nothing is overwritten'
    )


def write(
  weights: Weights,
  format: str,
  folder: str | os.PathLike,
  *,
  dtype: str = 'float32',
  **options: Any,
) -> None:
  """Writes a model into an empty folder. options: of the format (ONNX: resolution)."""
  folder = pathlib.Path(folder)
  if format in ('hf', *npz.LAYOUTS):
    only_vit(weights, format)
  if format != 'safetensors':
    only_whole(weights, format)
  if format == 'hf':
    huggingface.write(weights, folder, dtype=dtype)
  elif format in npz.LAYOUTS:
    npz.write(weights, folder, format=format, dtype=dtype)
  elif format == 'onnx':
    onnx.write(weights, folder, dtype=dtype, **options)
  elif format == 'safetensors':
    tensors = arrays.rounded(flat(weights.params), dtype)
    arrays.write_safetensors(folder / 'model.safetensors', tensors, {'format': 'tips_jax'})
  else:
    raise strict.unknown('--to', format, FORMATS)
  if weights.tokenizer:
    (folder / TOKENIZER).write_bytes(weights.tokenizer)
  # The contract comes last, as it does not list itself.
  content = strict.plain(_contract(weights, format, sorted(folder.iterdir())))
  (folder / CONTRACT).write_text(json.dumps(content, indent=1) + '\n')


def _contract(weights, format, written):
  digests = {file.name: digest(file) for file in written if file.suffix in ARRAYS}
  return Contract(
    version=VERSION,
    format=format,
    name=weights.name,
    towers=weights.towers,
    preprocessing=PREPROCESSING,
    size=weights.size,
    text_length=weights.text_length,
    tokenizer_sha256=sha256(weights.tokenizer),
    about=weights.about,
    files={file.name: file.stat().st_size for file in written},
    sha256=digests,
  )


def digest(file: pathlib.Path) -> str:
  """The SHA-256 of a file, in hex."""
  with open(file, 'rb') as opened:
    return hashlib.file_digest(opened, 'sha256').hexdigest()

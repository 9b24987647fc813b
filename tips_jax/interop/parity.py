"""Parity: compares two implementations of one encoder on the same inputs."""

import contextlib
import importlib.util
import json
import logging
import os
import pathlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from tips_jax.core import schema, vectors
from tips_jax.core.errors import InputError
from tips_jax.interop import onnx
from tips_jax.interop.weights import Weights
from tips_jax.models import towers

Outputs = dict[str, np.ndarray]
TOLERANCE = {'jax': 2e-5, 'torch': 2e-5, 'onnx': 1e-4}  # for `passed`, by implementation
MIN_COSINE = 0.9999  # catches features that are too small for an absolute tolerance
LARGEST = 224  # pixels; a larger position table is compared where it is resized
_apply = jax.jit(towers.apply, static_argnums=(1, 2))


class Inputs(NamedTuple):
  images: tuple[np.ndarray, ...]  # [B, H, W, 3] float32 in [0, 1] each
  ids: np.ndarray | None  # [C, T] int32, 0 is padding


class Row(NamedTuple):
  """The comparison of one output."""

  name: str
  max_abs: float  # NaN where either has a NaN, inf where one is missing
  cosine: float  # smallest of all vectors
  rms: float  # of ours
  note: str = ''


# --- inputs and outputs -------------------------------------------------------------------------


def fixed_inputs(weights: Weights, *, size: tuple[int, int] | None = None) -> Inputs:
  """Deterministic inputs for a model: square and non-square images, and texts of four lengths.

  The square has the size of the position table, at most 224 pixels; the other images are lower and
  wider. Texts fill text_length, half of it, 5 tokens, and 1.
  size: (height, width) in pixels, of an encoder with a fixed size.
  """
  rng = np.random.default_rng(0)
  tower = weights.image
  sizes = [size]
  if not size:
    side = max(1, min(tower.grid, LARGEST // tower.patch))
    rows = max(1, side * 3 // 4)
    columns = side + max(1, side // 4)
    sizes = [
      (side * tower.patch, side * tower.patch),
      (rows * tower.patch, columns * tower.patch),
    ]
  # Images of equal statistics would have nearly equal features: the second one is darker.
  gamma = np.array([1, 3])[:, None, None, None]
  images = tuple((rng.random((2, h, w, 3)) ** gamma).astype(np.float32) for h, w in sizes)
  if not weights.text:
    return Inputs(images, None)
  t = weights.text_length
  lengths = np.array([t, max(1, t // 2), min(5, t), 1])
  ids = rng.integers(1, weights.text.vocab, (len(lengths), t), dtype=np.int32)
  return Inputs(images, np.where(np.arange(t) < lengths[:, None], ids, 0))


def reference(weights: Weights, inputs: Inputs) -> Outputs:
  """{name: float32 array} of our towers, in float32.

  For each image size 'HxW cls' [B, N, D], 'HxW patch' [B, h, w, D] and, with a head,
  'HxW embedding' [B, N, E]. With a text tower 'text' [C, D] and, with a head, 'text embedding'
  [C, E]; 'text unit': the text's normalized vector in the joint space; 'similarity' [B, C]: cosines
  of the texts to the first CLS token of the first size; 'log temperature' [].
  """
  compute = schema.Compute(dtype='float32', attention='plain')
  patch = weights.image.patch

  def run(name: str, **arrays: np.ndarray) -> dict[str, jax.Array]:
    return _apply(weights.params[name], weights.towers[name], compute, arrays)

  out = {}
  # The default precision of a TPU or GPU rounds float32 products.
  with jax.default_matmul_precision('highest'):
    for x in inputs.images:
      b, h, w, _ = x.shape
      features = run('image', images=x[:, None])
      image = {
        'cls': np.stack([features[name][:, 0] for name in weights.image.cls], axis=1),
        'patch': np.reshape(features['patch'], (b, -(-h // patch), -(-w // patch), -1)),
      }
      if 'image_head' in weights.towers:
        image['embedding'] = run('image_head', x=image['cls'])['embedding']
      out |= _sized(x, image)
    if inputs.ids is not None:
      out['text'] = run('text', ids=inputs.ids)['text']
      if 'text_head' in weights.towers:
        out['text embedding'] = run('text_head', x=out['text'])['embedding']
      if 'logit' in weights.towers:
        out['log temperature'] = weights.params['logit']['log_temperature']
  return _joint({name: np.asarray(x, np.float32) for name, x in out.items()}, inputs)


def onnx_outputs(folder: str | os.PathLike, inputs: Inputs) -> Outputs:
  """As `reference`, of the files that `onnx.write` wrote, in onnxruntime on the CPU."""
  runtime = onnx.packages('onnxruntime')[0]

  def run(session, x: np.ndarray) -> Outputs:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: x})))

  def open_session(name: str):
    file = str(pathlib.Path(folder) / onnx.FILES[name])
    return runtime.InferenceSession(file, providers=['CPUExecutionProvider'])

  out = {}
  session = open_session('image')
  for x in inputs.images:
    out |= _sized(x, run(session, x.transpose(0, 3, 1, 2)))
  if inputs.ids is not None:
    session = open_session('text')
    metadata = session.get_modelmeta().custom_metadata_map
    if 'log_temperature' in metadata:
      out['log temperature'] = np.float32(json.loads(metadata['log_temperature']))
    outputs = run(session, inputs.ids.astype(np.int64))
    out['text'] = outputs.pop('text')
    out |= {f'text {name}': x for name, x in outputs.items()}
  return _joint(out, inputs)


def torch_outputs(folder: str | os.PathLike, inputs: Inputs) -> Outputs | None:
  """As `reference`, of a Hugging Face folder in transformers on the CPU.

  None where torch or transformers is not installed. 'text unit', 'similarity' and 'log temperature'
  are computed by the model of transformers, and missing without a text tower. InputError where
  transformers is older than 5.14, or fails.
  """
  if not all(importlib.util.find_spec(name) for name in ('torch', 'transformers')):
    return None
  try:
    torch = importlib.import_module('torch')
    transformers = importlib.import_module('transformers')
    transformers.Tipsv2Model  # noqa: B018  (older releases lack it)
    with _quiet(transformers):
      model = transformers.AutoModel.from_pretrained(str(folder), dtype=torch.float32).eval()
  except Exception as error:  # a broken installation may raise anything
    raise InputError(
      f'transformers: it is installed and fails ({type(error).__name__}: {error}); expected 5.14 '
      'or later, with torch and torchvision of one release; or none, then it is not compared'
    ) from error
  vision = getattr(model, 'vision_model', model)  # of a joint model; else it is the image tower
  cls_count = 1 + vision.config.num_register_tokens
  patch = vision.config.patch_size
  pixels = [torch.tensor(x.transpose(0, 3, 1, 2)) for x in inputs.images]
  out = {}
  with torch.inference_mode():
    for x, pixel_values in zip(inputs.images, pixels):
      b, h, w, _ = x.shape
      tokens = vision(pixel_values=pixel_values).last_hidden_state.numpy()
      patches = tokens[:, cls_count:].reshape(b, h // patch, w // patch, -1)
      out |= _sized(x, {'cls': tokens[:, :cls_count], 'patch': patches})
    if hasattr(model, 'text_model') and inputs.ids is not None:
      ids = torch.tensor(inputs.ids, dtype=torch.int64)
      both = model(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=pixels[0])
      out |= {
        'text': both.text_model_output.pooler_output.numpy(),
        'text unit': both.text_embeds.numpy(),
        'similarity': (both.logits_per_image * model.temperature).numpy(),
        'log temperature': model.temperature.log().numpy(),
      }
  return out


def _sized(images_BHWC: np.ndarray, outputs: Outputs) -> Outputs:
  h, w = images_BHWC.shape[1:3]
  return {f'{h}x{w} {name}': x for name, x in outputs.items()}


def _joint(out: Outputs, inputs: Inputs) -> Outputs:
  """Adds the outputs that follow from the vectors of texts and images."""
  if 'text' not in out:
    return out
  h, w = inputs.images[0].shape[1:3]
  text = vectors.unit(out.get('text embedding', out['text']))
  image = vectors.unit(out.get(f'{h}x{w} embedding', out[f'{h}x{w} cls'])[:, 0])
  out = out | {'text unit': text}
  if image.shape[1] == text.shape[1]:
    out['similarity'] = image @ text.T
  return out


@contextlib.contextmanager
def _quiet(transformers: types.ModuleType) -> Iterator[None]:
  """Without progress bars and lists of unused weights: the table shows what is wrong."""
  log = transformers.utils.logging
  level = log.get_verbosity()
  bars = log.is_progress_bar_enabled()
  log.set_verbosity(logging.CRITICAL)
  log.disable_progress_bar()
  try:
    yield
  finally:
    log.set_verbosity(level)
    if bars:
      log.enable_progress_bar()


# --- the report ---------------------------------------------------------------------------------


def compare(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> list[Row]:
  """A row for every name that either has; a missing name or another shape fails."""
  rows = []
  for name in dict.fromkeys([*ours, *theirs]):
    if name not in theirs:
      rows.append(Row(name, np.inf, np.nan, np.nan, 'missing in theirs'))
    elif name not in ours:
      rows.append(Row(name, np.inf, np.nan, np.nan, 'missing in ours'))
    else:
      rows.append(_row(name, np.asarray(ours[name]), np.asarray(theirs[name])))
  return rows


def _row(name: str, ours: np.ndarray, theirs: np.ndarray) -> Row:
  a = ours.astype(np.float64)
  b = theirs.astype(np.float64)
  if not a.size:
    return Row(name, np.inf, np.nan, np.nan, f'shape {a.shape} and {b.shape}')
  rms = float(np.sqrt(np.mean(a * a)))
  if a.shape != b.shape:
    return Row(name, np.inf, np.nan, rms, f'shape {a.shape} and {b.shape}')
  with np.errstate(invalid='ignore', divide='ignore'):  # a NaN fails later, in _near
    return Row(name, float(np.max(np.abs(a - b))), float(np.min(_cosine(a, b))), rms)


def passed(rows: Sequence[Row], tolerance: float) -> bool:
  """Whether there are rows, and each is within the tolerance (relative where rms is above 1)."""
  return bool(rows) and all(_near(row, tolerance) for row in rows)


def table(rows: Sequence[Row], tolerance: float) -> str:
  """The report as text: a line for every output, and the verdict."""
  width = max([len('output'), *(len(row.name) for row in rows)])
  lines = [f'{"output":<{width}}  {"max abs":>8}  {"min cosine":>11}  {"rms":>8}']
  near = 0
  for row in rows:
    line = f'{row.name:<{width}}  {row.max_abs:8.1e}  {row.cosine:11.8f}  {row.rms:8.2g}'
    if _near(row, tolerance):
      near += 1
    else:
      line += '  DIFFERS'
      if row.note:
        line += f': {row.note}'
    lines.append(line)
  lines.append(
    f'{near} of {len(rows)} outputs within {tolerance:.0e} (times rms, where that is above 1)'
  )
  return '\n'.join(lines)


def _near(row: Row, tolerance: float) -> bool:
  # Comparisons with NaN are False, so that a NaN anywhere fails.
  return bool(row.max_abs <= tolerance * max(1.0, row.rms) and row.cosine >= MIN_COSINE)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """[...] of vectors on the last axis; 1 of two zero vectors, 0 of one."""
  a = np.atleast_1d(a)
  b = np.atleast_1d(b)
  norm_a = np.linalg.norm(a, axis=-1)
  norm_b = np.linalg.norm(b, axis=-1)
  product = norm_a * norm_b
  both_zero = (norm_a == 0) & (norm_b == 0)
  return np.where(both_zero, 1.0, np.where(product == 0, 0.0, np.sum(a * b, axis=-1) / product))

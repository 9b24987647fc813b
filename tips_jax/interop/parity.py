"""Parity: two ways to compute the same encoder, on the same inputs, side by side."""

import contextlib
import json
import logging
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.interop import onnx
from tips_jax.models import towers

TOLERANCE = {'jax': 2e-5, 'torch': 2e-5, 'onnx': 1e-4}  # for `passed`, by who computes
MIN_COSINE = 0.9999  # features too small for an absolute tolerance differ here
LARGEST = 224  # pixels; a wider table is compared where it is resized
_apply = jax.jit(towers.apply, static_argnums=(1, 2))


class Inputs(NamedTuple):
  """images: arrays [B, H, W, 3] float32 in [0, 1], of one size each. ids: [C, T] int32, 0 is
  padding, or None.
  """

  images: tuple
  ids: np.ndarray | None


class Row(NamedTuple):
  """One output. max_abs: NaN where either has one, inf where it is missing. cosine: the least of
  all vectors.
  """

  name: str
  max_abs: float
  cosine: float
  rms: float  # of ours
  note: str = ''


# --- inputs and outputs -------------------------------------------------------------------------


def fixed_inputs(weights, *, size=None):
  """Inputs, always the same for a model: two square images, two that are not square, and texts of
  four lengths.

  The square is the position table's, at most 224 pixels; the other has fewer rows and more columns.
  Texts fill text_length, half of it, 5 tokens, and 1. size: (height, width) in pixels, of an
  encoder that takes no other.
  """
  rng, tower = np.random.default_rng(0), weights.image
  side = max(1, min(tower.grid, LARGEST // tower.patch))
  other = max(1, side * 3 // 4), side + max(1, side // 4)
  sizes = (
    [size] if size else [tuple(n * tower.patch for n in pair) for pair in ((side, side), other)]
  )
  light = np.array([1, 3])[:, None, None, None]  # the second image is darker
  images = tuple((rng.random((2, h, w, 3)) ** light).astype(np.float32) for h, w in sizes)
  if not weights.text:
    return Inputs(images, None)
  t = weights.text_length
  lengths = np.array([t, max(1, t // 2), min(5, t), 1])
  ids = rng.integers(1, weights.text.vocab, (len(lengths), t), dtype=np.int32)
  return Inputs(images, np.where(np.arange(t) < lengths[:, None], ids, 0))


def reference(weights, inputs):
  """{name: float32 array} of our towers, in float32.

  'HxW cls' [B, N, D] and 'HxW patch' [B, h, w, D] for each size, with a head 'HxW embedding' [B, N,
  E]; of a text tower 'text' [C, D], with a head 'text embedding' [C, E]; 'text unit', the text's
  vector in the joint space, of length one; 'similarity' [B, C], cosines of the first size's first
  CLS token to the texts; 'log temperature' ().
  """
  compute, out = schema.Compute(dtype='float32', attention='plain'), {}
  run = lambda name, arrays: _apply(weights.params[name], weights.towers[name], compute, arrays)
  with jax.default_matmul_precision('highest'):
    for x in inputs.images:
      b, h, w, _ = x.shape
      found = run('image', {'images': x[:, None]})
      one = {
        'cls': np.stack([found[n][:, 0] for n in weights.image.cls], axis=1),
        'patch': np.reshape(
          found['patch'], (b, -(-h // weights.image.patch), -(-w // weights.image.patch), -1)
        ),
      }
      if 'image_head' in weights.towers:
        one['embedding'] = run('image_head', {'x': one['cls']})['embedding']
      out |= _sized(x, one)
    if inputs.ids is not None:
      out['text'] = run('text', {'ids': inputs.ids})['text']
      if 'text_head' in weights.towers:
        out['text embedding'] = run('text_head', {'x': out['text']})['embedding']
      if 'logit' in weights.towers:
        out['log temperature'] = weights.params['logit']['log_temperature']
  return _joint({k: np.asarray(v, np.float32) for k, v in out.items()}, inputs)


def onnx_outputs(folder, inputs):
  """As `reference`, of the files that `onnx.write` wrote, in onnxruntime on the CPU."""
  runtime, out = onnx.packages('onnxruntime')[0], {}

  def run(name, x):
    session = runtime.InferenceSession(
      str(pathlib.Path(folder) / onnx.FILES[name]), providers=['CPUExecutionProvider']
    )
    about = session.get_modelmeta().custom_metadata_map
    if name == 'text' and 'log_temperature' in about:
      out['log temperature'] = np.float32(json.loads(about['log_temperature']))
    names = [o.name for o in session.get_outputs()]
    return [dict(zip(names, session.run(names, {session.get_inputs()[0].name: one}))) for one in x]

  for x, found in zip(
    inputs.images, run('image', [x.transpose(0, 3, 1, 2) for x in inputs.images])
  ):
    out |= _sized(x, found)
  if inputs.ids is not None:
    found = run('text', [inputs.ids.astype(np.int64)])[0]
    out |= {'text' if k == 'text' else f'text {k}': v for k, v in found.items()}
  return _joint(out, inputs)


def torch_outputs(folder, inputs):
  """As `reference`, of a Hugging Face folder in transformers on the CPU; None without transformers
  5.14 and torch.

  'text unit', 'similarity' and 'log temperature' are the model's own; without a text tower there
  are none of them.
  """
  try:
    torch, transformers = onnx.packages('torch', 'transformers')
    transformers.Tipsv2Model  # noqa: B018  (older releases lack it)
  except (InputError, AttributeError, ImportError):
    return None
  with _quiet(transformers):
    model = transformers.AutoModel.from_pretrained(str(folder), dtype=torch.float32).eval()
  vision, text = getattr(model, 'vision_model', model), getattr(model, 'text_model', None)
  n, patch, out = 1 + vision.config.num_register_tokens, vision.config.patch_size, {}
  pixels = [torch.tensor(x.transpose(0, 3, 1, 2)) for x in inputs.images]
  with torch.inference_mode():
    for x, y in zip(inputs.images, pixels):
      b, h, w, _ = x.shape
      found = vision(pixel_values=y).last_hidden_state.numpy()
      out |= _sized(
        x, {'cls': found[:, :n], 'patch': found[:, n:].reshape(b, h // patch, w // patch, -1)}
      )
    if text is not None and inputs.ids is not None:
      ids = torch.tensor(inputs.ids, dtype=torch.int64)
      both = model(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=pixels[0])
      out |= {
        'text': both.text_model_output.pooler_output.numpy(),
        'text unit': both.text_embeds.numpy(),
        'similarity': (both.logits_per_image * model.temperature).numpy(),
        'log temperature': model.temperature.log().numpy(),
      }
  return out


def _sized(images_BHWC, outputs):
  h, w = images_BHWC.shape[1:3]
  return {f'{h}x{w} {name}': x for name, x in outputs.items()}


def _joint(out, inputs):
  """The same, and what follows from the vectors of texts and images."""
  if 'text' not in out:
    return out
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  h, w = inputs.images[0].shape[1:3]
  text = unit(out.get('text embedding', out['text']))
  image = unit(out.get(f'{h}x{w} embedding', out[f'{h}x{w} cls'])[:, 0])
  return (
    out
    | {'text unit': text}
    | ({'similarity': image @ text.T} if image.shape[1] == text.shape[1] else {})
  )


@contextlib.contextmanager
def _quiet(transformers):
  """No progress bars and no list of weights: the table says what is wrong."""
  log = transformers.utils.logging
  level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
  log.set_verbosity(logging.CRITICAL)
  log.disable_progress_bar()
  try:
    yield
  finally:
    log.set_verbosity(level)
    if bars:
      log.enable_progress_bar()


# --- the report ---------------------------------------------------------------------------------


def compare(ours, theirs):
  """Rows, one for every name that either has: arrays of one shape are compared, all else is a row
  that fails.
  """
  rows = []
  for name in [*ours, *(n for n in theirs if n not in ours)]:
    if name not in ours or name not in theirs:
      rows.append(
        Row(name, np.inf, np.nan, np.nan, f'missing in {"theirs" if name in ours else "ours"}')
      )
      continue
    a, b = (np.asarray(x[name], np.float64) for x in (ours, theirs))
    rms = float(np.sqrt(np.mean(a * a))) if a.size else np.nan
    if a.shape != b.shape or not a.size:
      rows.append(Row(name, np.inf, np.nan, rms, f'shape {a.shape} and {b.shape}'))
    else:
      with np.errstate(invalid='ignore', divide='ignore'):  # what is no number fails
        rows.append(Row(name, float(np.max(np.abs(a - b))), float(np.min(_cosine(a, b))), rms))
  return rows


def passed(rows, tolerance):
  """Whether there are rows, and each is near: absolute, or relative to a root mean square above
  one.
  """
  return bool(rows) and all(_near(r, tolerance) for r in rows)


def table(rows, tolerance):
  """The report as text: a line for every output, and the verdict."""
  width = max([len(r.name) for r in rows] + [len('output')])
  lines = [f'{"output":<{width}}  {"max abs":>8}  {"min cosine":>11}  {"rms":>8}']
  for r in rows:
    mark = '' if _near(r, tolerance) else '  DIFFERS' + f': {r.note}' * bool(r.note)
    lines.append(f'{r.name:<{width}}  {r.max_abs:8.1e}  {r.cosine:11.8f}  {r.rms:8.2g}{mark}')
  near = sum(_near(r, tolerance) for r in rows)
  return '\n'.join(
    [
      *lines,
      f'{near} of {len(rows)} outputs within {tolerance:.0e} (times rms, where that is above 1)',
    ]
  )


def _near(row, tolerance):
  return bool(row.max_abs <= tolerance * max(1.0, row.rms) and row.cosine >= MIN_COSINE)


def _cosine(a, b):
  """[...] of vectors on the last axis; 1 of two zero vectors, 0 of one."""
  a, b = np.atleast_1d(a), np.atleast_1d(b)
  sizes = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
  product = sizes[0] * sizes[1]
  both = (sizes[0] == 0) & (sizes[1] == 0)
  return np.where(both, 1.0, np.where(product == 0, 0.0, np.sum(a * b, axis=-1) / product))

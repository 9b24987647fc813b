"""What the steps say of a record by itself, whatever the others are.

`judge` gives a value, for the histogram of the step, and a reason to drop the record or ''.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.curation import encoders, schema, texts
from tips_jax.curation.records import Record
from tips_jax.data.ingest.cells import utf8

NAN = float('nan')
# Their judges see several records at once.
BATCHED = (schema.Similarity, schema.Filter)


def _image_size(step, record):
  height, width = record.size
  shorter = min(height, width)
  longer = max(height, width)
  if shorter < step.least:
    return shorter, f'{width} x {height} pixels; the shorter side is under {step.least}'
  if longer > step.most:
    return shorter, f'{width} x {height} pixels; the longer side is over {step.most}'
  if longer > step.aspect * shorter:
    return shorter, f'{width} x {height} pixels; the aspect is over {step.aspect:g}'
  return shorter, ''


def _by_text(judge):
  """Of several texts one that stays is enough; a record without has nothing to judge."""

  def judge_record(step, record):
    found = [judge(step, text) for text in record.texts(step.field)]
    if not found:
      return NAN, ''
    for value, reason in found:
      if not reason:
        return value, ''
    return found[0]

  return judge_record


def _text_length(step, record):
  # A text that is missing is one of no words.
  found = [texts.length(step, text) for text in record.texts(step.field) or ['']]
  return next((each for each in found if not each[1]), found[0])


_JUDGES: Mapping[type, Callable[[Any, Record], tuple[float, str]]] = {
  schema.ImageSize: _image_size,
  schema.TextLength: _text_length,
  schema.JunkText: _by_text(texts.junk),
  schema.Language: _by_text(texts.language),
}


def judge(step: schema.Step, record: Record) -> tuple[float, str]:
  """(value, reason) of a step that is not BATCHED; (nan, '') of one that looks at all records."""
  judge_record = _JUDGES.get(type(step))
  if judge_record is None:
    return NAN, ''
  return judge_record(step, record)


def judge_all(
  step: schema.Step, records: Sequence[Record], features: Mapping[str, np.ndarray]
) -> list[tuple[float, str]]:
  """The same of a BATCHED step. features: of the images, by encoder, float32 [n, E]."""
  if isinstance(step, schema.Filter):
    return _filter(step, records)
  return _similarity(step, records, features[step.encoder])


def _filter(step, records):
  function = encoders.function(step.function, 'function')
  reasons = list(function([record.plain() for record in records]))
  if len(reasons) != len(records):
    raise InputError(
      f'function: {step.function!r} gave {len(reasons)} reasons for {len(records)} records; '
      f'expected one for each'
    )
  return [(NAN, utf8(str(reason or ''))) for reason in reasons]


def _similarity(step, records, images_BE):
  owners = []
  all_texts = []
  for number, record in enumerate(records):
    for text in record.texts(step.field):
      owners.append(number)
      all_texts.append(text)
  values = np.full(len(records), -np.inf)
  if all_texts:
    found = encoders.text_features(step.encoder, all_texts)
    np.maximum.at(values, owners, np.sum(images_BE[owners] * found, axis=1))
  result = []
  for value in values.tolist():
    reason = ''
    if not np.isfinite(value):
      value = NAN  # no text
    elif step.least is not None and value < step.least:
      reason = f'similarity {value:.3f} is under {step.least:g}'
    result.append((value, reason))
  return result


def check(curation: schema.Curation, features: Sequence[str]) -> None:
  """InputError for what a step needs and is not there: fields of the store, libraries, encoders,
  functions.
  """
  for number, step in enumerate(curation.steps):
    field = getattr(step, 'field', '')
    where = f'config.steps[{number}] ({step.kind})'
    if field and field not in features:
      raise InputError(
        f'{where}: got a store without the field {field!r}; expected one with it; it has '
        f'{", ".join(features)}'
      )
    try:
      if isinstance(step, schema.Language):
        texts.require_detector()
      if isinstance(step, schema.Filter):
        encoders.function(step.function, 'function')
      if getattr(step, 'encoder', ''):
        encoders.load(step.encoder)
      if isinstance(step, schema.Similarity):
        encoders.require_texts(step.encoder)
    except InputError as error:
      raise InputError(f'{where}: {error}') from error

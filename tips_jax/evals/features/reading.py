"""Frozen features of a split of a store: what every evaluator starts from."""

import concurrent.futures
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sized
from typing import Any, Protocol

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Evals
from tips_jax.data import views

_AHEAD = 4  # batches that are read and decoded while the device works


class Encoder(Protocol):
  """What is evaluated. Both methods get full batches of one shape, so that each compiles once."""

  def image(self, images_BHWC: np.ndarray) -> dict[str, np.ndarray]:
    """uint8 RGB -> float32 by name: each CLS token [B, D], 'patch' [B, h, w, D], and 'embedding'
    [B, E] if joint.
    """

  def text(self, ids_BT: np.ndarray) -> np.ndarray | None:
    """int32 ids (pad 0) -> float32 [B, E] in the joint space; None where there is no text tower."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
  """Of the N readable images of a split. Rows that are not finite (a diverged model) are all zero.

  `image`: name -> float32 [N, D]; `label` [N] class ids, -1 without; `text` [T, E] or None; `owner`
  [T]: the image of each text; `captions`: the T texts; `record` [N]: numbers in the store.
  """

  image: dict[str, np.ndarray]
  label: np.ndarray
  text: np.ndarray | None
  owner: np.ndarray
  captions: tuple[str, ...]
  record: np.ndarray


def records(source: Sized, limit: int) -> np.ndarray:
  """The numbers of at most `limit` records, evenly spaced."""
  # A sorted split must not be cut to its first classes.
  total = len(source)
  count = min(limit, total)
  return np.arange(count) * total // max(count, 1)


def batches(
  source: Any, numbers: np.ndarray, *, config: Evals
) -> Iterator[tuple[np.ndarray, list]]:
  """Yields (images uint8 [B, size, size, 3], records): B is always the batch size, `records` may be
  fewer.

  `records` are (number, record) of the readable images; the rest of the batch repeats its last
  image.
  """
  size = config.batch_size

  def read(chunk):
    images, found = [], []
    for number, record in zip(chunk, source.__getitems__([int(i) for i in chunk])):
      try:
        images.append(views.evaluation(record['image'], config.size))
        found.append((number, record))
      except ValueError as error:
        logging.warning('evaluation leaves out record %d, which cannot be read: %s', number, error)
    images += images[-1:] * (size - len(images))
    return (np.stack(images), found) if found else None

  chunks = [numbers[i : i + size] for i in range(0, len(numbers), size)]
  with concurrent.futures.ThreadPoolExecutor(_AHEAD) as pool:
    pending = [pool.submit(read, chunk) for chunk in chunks[:_AHEAD]]
    for i in range(len(chunks)):
      batch = pending.pop(0).result()
      if i + _AHEAD < len(chunks):
        pending.append(pool.submit(read, chunks[i + _AHEAD]))
      if batch:
        yield batch


def texts_of(record: Mapping[str, Any], field: str) -> list[str]:
  """The non-empty texts of a record: its alt text or all its captions."""
  values = record[field]
  if field == 'alt_text':
    values = [values]
  texts = []
  for value in values:
    if isinstance(value, bytes):
      # One broken byte must not end an evaluation.
      value = value.decode('utf-8', 'replace')
    if str(value).strip():
      texts.append(str(value))
  return texts


def extract(
  encoder: Encoder,
  store,
  split: str,
  *,
  config: Evals,
  names,
  tokenizer=None,
  text_length: int = 64,
  visit=None,
) -> Features:
  """Encodes a split: the image outputs `names`, and, where a tokenizer is given, the texts of every
  image.

  `visit(patch [b, h, w, D], records)` sees the patch features of every batch: they are too large to
  be kept. Raises InputError where no image can be read or where the encoder lacks an output.
  """
  source = store.source(split)
  image, label, owner, captions, found = {name: [] for name in names}, [], [], [], []
  for images, rows in batches(source, records(source, config.limit), config=config):
    output = encoder.image(images)
    for name in names:
      if name not in output:
        raise InputError(f'evals: got the image feature {name!r}; expected one of {sorted(output)}')
      image[name].append(finite(output[name][: len(rows)]))
    if visit:
      visit(finite(output['patch'][: len(rows)]), [record for _, record in rows])
    for number, record in rows:
      if tokenizer:
        texts = texts_of(record, config.retrieval_text)
        captions += texts
        owner += [len(found)] * len(texts)
      label.append(int(record.get('label', -1)))
      found.append(number)
  if not found:
    raise InputError(
      f'evals: split {split!r} of {store.path!r} holds no readable image; expected at least one'
    )
  return Features(
    image={name: np.concatenate(parts) for name, parts in image.items()},
    label=np.array(label),
    text=encode_texts(encoder, captions, tokenizer, text_length, config.batch_size)
    if captions
    else None,
    owner=np.array(owner, np.int64),
    captions=tuple(captions),
    record=np.array(found),
  )


def encode_texts(
  encoder: Encoder, texts, tokenizer, length: int, batch_size: int
) -> np.ndarray | None:
  """Embeddings [T, E] of texts. Equal token ids are encoded once, so that they tie exactly."""
  ids, row = np.unique(tokenizer.encode_batch(texts, length), axis=0, return_inverse=True)
  parts = []
  for i in range(0, len(ids), batch_size):
    part = ids[i : i + batch_size]
    output = encoder.text(np.concatenate([part, np.repeat(part[-1:], batch_size - len(part), 0)]))
    if output is None:
      return None
    parts.append(finite(output[: len(part)]))
  return np.concatenate(parts)[row.ravel()]


def finite(features: np.ndarray) -> np.ndarray:
  """float32 with every row [..., D] that holds a nan or an infinity set to zero."""
  features = np.asarray(features, np.float32)
  return np.where(np.isfinite(features).all(-1, keepdims=True), features, np.float32(0))


def normalize(features: np.ndarray) -> np.ndarray:
  """Rows of unit length; zero rows stay zero."""
  features = np.asarray(features, np.float32)
  return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
